/* UVQK on Hopper, in one kernel with the norm before it and the activation after it:
 * m = SiLU(bf16(LN(x) W + bias)), and K and V of rows with a slot to their page. No pass over
 * [rows, E] comes before the product and none over [rows, 4HD] after it.
 *
 * The norm: LN(x) W = (x W' - mean * sums) / deviation + bias', with W' = weight o W, the sums of
 * its columns, and the norm's own bias in bias'; what a row needs came with x, in parts
 * (project_sm90.cu and the prepare kernel write them). Sums are rounded to bf16 in registers,
 * activated, and stored by way of a little shared memory. A block of many tiles does that while the
 * tensor cores are at the next tile, a few columns after each step: SiLU, bound by the special
 * function unit, takes a quarter of a product's time.
 *
 * Moves: x once per column block (from L2), W' once per row block or cluster, m once; a page row
 * once. In the last layer not what nobody wants: u and q of row tiles without candidates. */
#include "gemm_sm90.cuh"

namespace
{

/* SHADOW: a tile is finished while the next one is multiplied. */
struct by_256 : shape<2, 256, 4, 2> {
    static constexpr bool SHADOW = true;
    static constexpr double START = 7.1, ROUND = 10;
};
template <int Groups, int Stages, bool Shadow> struct by_128 : shape<Groups, 128, Stages, 1> {
    static constexpr bool SHADOW = Shadow;
    static constexpr double START = Groups == 3 ? 3.8 : 2.5;
    static constexpr double ROUND = Groups == 4 ? 12.1 : Groups == 3 ? 8.8 : 6.8;
};

/* Calls f with the shape of these tiles. */
template <typename F> auto with_shape(enum hstu_tiles tiles, F f)
{
    switch (tiles) {
    case HSTU_TILES_128X256:
        return f(by_256());
    case HSTU_TILES_256X128:
        return f(by_128<4, 3, false>());
    case HSTU_TILES_192X128:
        return f(by_128<3, 4, true>());
    default:
        return f(by_128<2, 6, false>());
    }
}

/* Where this layer's K and V lie in the pool: per page K of every head, then V. */
struct page_layout {
    char *layer;    /* in page 0 */
    uint64_t bytes; /* a page, all layers of it */
    uint64_t head_bytes;
    uint32_t heads, shift; /* log2 of a page's tokens */
    uint32_t dim_shift;    /* log2 of the head dim */
};

struct parameters {
    CUtensorMap x, b, m; /* m in boxes of a warp's staging */
    const hstu_moments *moments;
    const float4 *fold; /* of two columns: sum, bias, sum, bias */
    const uint32_t *slot;
    page_layout pages;
    uint32_t rows, n, k, parts;
    tile_order order;
    uint64_t b_policy;
    float part_share, value_share; /* 1 / parts, 1 / k */
    float eps;
};

__device__ __forceinline__ void store_shared(uint32_t address, float2 v)
{
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(v.x), "f"(v.y) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, float4 v)
{
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x), "f"(v.y),
                 "f"(v.z), "f"(v.w)
                 : "memory");
}

__device__ __forceinline__ float2 load_two(uint32_t address)
{
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(v.x), "=f"(v.y)
                 : "r"(address)
                 : "memory");
    return v;
}

__device__ __forceinline__ float4 load_four(uint32_t address)
{
    const uint4 bits = load_shared(address);
    return make_float4(__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z),
                       __uint_as_float(bits.w));
}

/* ---- notes: what the consumers need to know of a tile's rows and columns once its sums are there.
 * The warps beside the producer write them, a tile ahead ---- */

constexpr uint32_t NOTE_THREADS = 96;

template <typename S> struct tile_notes {
    static constexpr uint32_t NORMS = S::OWN + 32; /* behind four barriers */
    static constexpr uint32_t NORM_BYTES = S::ROWS * sizeof(float2);
    static constexpr uint32_t BYTES = NORM_BYTES + S::COLUMNS * sizeof(hstu_fold);
    static constexpr int SHARED = S::SHARED + 32 + 2 * BYTES;

    uint32_t shared, tile; /* tile: how many there have been */

    __device__ __forceinline__ uint32_t full() const
    {
        return shared + S::OWN + tile % 2 * 8;
    }
    __device__ __forceinline__ uint32_t empty() const
    {
        return shared + S::OWN + 16 + tile % 2 * 8;
    }
    /* LN's factor and summand of a row of the tile. */
    __device__ __forceinline__ uint32_t norm(uint32_t row) const
    {
        return shared + NORMS + tile % 2 * BYTES + row * (uint32_t)sizeof(float2);
    }
    __device__ __forceinline__ uint32_t fold(uint32_t column) const
    {
        return shared + NORMS + tile % 2 * BYTES + NORM_BYTES +
               column * (uint32_t)sizeof(hstu_fold);
    }
    /* One thread of the block, before the ring is opened. */
    __device__ __forceinline__ void open()
    {
        for (tile = 0; tile < 2; tile++) {
            sm90::barrier_init(full(), NOTE_THREADS);
            sm90::barrier_init(empty(), S::GROUPS * 4);
        }
    }
    __device__ __forceinline__ void wait_full() const
    {
        sm90::barrier_wait(full(), tile / 2 % 2);
    }
    __device__ __forceinline__ void wait_empty() const
    {
        sm90::barrier_wait(empty(), tile / 2 % 2 ^ 1);
    }
    /* Consumers: a warp has read them. */
    __device__ __forceinline__ void release()
    {
        __syncwarp();
        if (threadIdx.x % 32 == 0)
            sm90::barrier_arrive(empty());
        tile++;
    }
};

/* LN's factor and summand of a row. Means are summed from the first part's on, so that nothing
 * large cancels. Batch parts are asked for at once. */
template <int Batch> __device__ __forceinline__ float2 norm_of(const parameters &p, uint32_t row)
{
    const hstu_moments *part = p.moments + row;
    float first = 0, off = 0, off_square = 0, square = 0;
#pragma unroll 1
    for (uint32_t i = 0; i < p.parts; i += Batch) {
        hstu_moments m[Batch];
#pragma unroll
        for (uint32_t j = 0; j < Batch; j++)
            m[j] = part[(uint64_t)min(i + j, p.parts - 1) * p.rows];
        if (i == 0)
            first = m[0].mean;
#pragma unroll
        for (uint32_t j = 0; j < Batch; j++) {
            const bool in = i + j < p.parts;
            const float d = in ? m[j].mean - first : 0.0f;
            off += d;
            off_square = fmaf(d, d, off_square);
            square += in ? m[j].square : 0.0f;
        }
    }
    off *= p.part_share;
    const float variance = square * p.value_share + off_square * p.part_share - off * off;
    const float factor = rsqrtf(variance + p.eps);
    return make_float2(factor, -(first + off) * factor);
}

/* The note warps. */
template <typename S> __device__ void note(const parameters &p, tile_notes<S> notes)
{
    constexpr int BATCH = 8;
    schedule<S> tiles(p.rows, p.order);
    const uint32_t thread = threadIdx.x - 32;
    uint32_t row0, column0;
    for (bool first = true; tiles.take(&row0, &column0); first = false, notes.tile++) {
        notes.wait_empty();
        for (uint32_t i = thread * 2; i < S::COLUMNS; i += NOTE_THREADS * 2)
            store_shared(notes.fold(i), __ldg(p.fold + (column0 + i) / 2));
        if (first)
            mma::dependency_wait();
        for (uint32_t i = thread; i < S::ROWS && row0 + i < p.rows; i += NOTE_THREADS)
            store_shared(notes.norm(i), norm_of<BATCH>(p, row0 + i));
        sm90::barrier_arrive(notes.full());
    }
}

/* Where K or V of this column of m goes in page 0, slot 0; NULL for u and q. */
__device__ __forceinline__ char *page_column(const parameters &p, uint32_t column)
{
    const uint32_t hd = p.n / 4, part = (column >= hd) + (column >= 2 * hd) + (column >= 3 * hd);
    const uint32_t head = (part == 1) * p.pages.heads + ((column - part * hd) >> p.pages.dim_shift);
    if (part == 0 || part == 2)
        return nullptr;
    return p.pages.layer + head * p.pages.head_bytes +
           (column & ((1 << p.pages.dim_shift) - 1)) * 2;
}

__device__ __forceinline__ uint32_t activate(uint32_t pair)
{
    const float2 x = mma::silu(mma::unpack(pair));
    return mma::pack(x.x, x.y);
}

/* Where a tile's sums go. */
struct place {
    uint32_t row0, column0; /* in the shadow: of the next 64 columns */
    uint32_t slot[4];       /* of the rows that this lane stores; UINT32_MAX: none */

    __device__ __forceinline__ place(uint32_t nowhere)
        : row0(nowhere), column0(0), slot{UINT32_MAX, UINT32_MAX, UINT32_MAX, UINT32_MAX}
    {
    }
    __device__ __forceinline__ void set(const parameters &p, uint32_t row0_, uint32_t column0_,
                                        uint32_t warp)
    {
        row0 = row0_;
        column0 = column0_;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t row = stored_row(row0, warp, i);
            slot[i] = row < p.rows ? __ldg(p.slot + row) : UINT32_MAX;
        }
    }
    /* Bytes from page 0's slot 0 to the i-th row's. Worked out where it is used: nothing waits for
     * the slots before. */
    __device__ __forceinline__ uint64_t page_row(const parameters &p, int i) const
    {
        const uint32_t page = slot[i] >> p.pages.shift, at = slot[i] - (page << p.pages.shift);
        return page * p.pages.bytes + ((uint64_t)at << (p.pages.dim_shift + 1));
    }
};

/* Columns at.column0 + 16 * piece and on: activated, to the warp's staging; every fourth time the
 * 64 columns there go to memory. */
__device__ __forceinline__ void finish(const parameters &p, const place &at, const uint32_t *sums,
                                       int piece, uint32_t staging, uint32_t warp)
{
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        word[i] = activate(sums[i]);
    stage_piece(staging, piece, word);
    if (piece % 4 != 3)
        return;
    const uint32_t chunk = at.column0 / 64 + piece / 4;
    store_staged(&p.m, staging, at.row0 + warp * 16, chunk);
    char *page = page_column(p, chunk * 64 + threadIdx.x % 8 * 8);
    if (!page)
        return;
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (at.slot[i] != UINT32_MAX)
            *reinterpret_cast<uint4 *>(page + at.page_row(p, i)) = staged(staging, i);
}

/* One consumer warpgroup. Of its tile a thread has, as wgmma lays sums out, rows lane / 4 and that
 * + 8 of its warp's 16, columns 8i + 2 (lane % 4) and the next. */
template <typename S>
__device__ void consume(const parameters &p, stage_ring<S> ring, tile_notes<S> notes,
                        uint32_t group)
{
    schedule<S> tiles(p.rows, p.order);
    const uint32_t thread = threadIdx.x % 128, lane = thread % 32;
    const uint32_t warp = group * 4 + thread / 32;
    const uint32_t staging = ring.shared + S::STAGING + warp * STAGING_BYTES;
    uint32_t row0, column0;
    float d[S::COLUMNS / 2];
    uint32_t sums[S::SHADOW ? S::COLUMNS / 4 : 4] = {}; /* [i][row]; normed, with bias, rounded;
                                                               what is not finished, first */
    place last(p.rows);                                 /* of no row yet */
    mma::dependency_wait();
    for (;;) { /* in the end once without products: for the last tile's shadow */
        const uint32_t steps = tiles.take(&row0, &column0) ? p.k / S::DEPTH : 0;
        if (!S::SHADOW) {
            if (steps == 0)
                break;
            last.set(p, row0, column0, warp);
        }
        uint32_t step = 0;
#pragma unroll 1
        for (int chunk = 0; chunk < (S::SHADOW ? S::CHUNKS : 1); chunk++) {
#pragma unroll
            for (int piece = 0; piece < (S::SHADOW ? 4 : 1); piece++) {
                const uint32_t until =
                    S::SHADOW ? steps * (chunk * 4 + piece + 1) / S::PIECES : steps;
#pragma unroll 1
                for (; step < until; step++) {
                    multiply_stage<S>(d, ring, group, step > 0);
                    if (step > 0) { /* as release_before(), which ptxas makes other code of here */
                        sm90::wgmma_wait<1>();
                        ring.release(ring.before());
                    }
                    ring.advance();
                }
                if (S::SHADOW)
                    finish(p, last, sums + piece * 4, piece, staging, warp);
            }
            if (S::SHADOW) { /* the next 64 columns, to where the loop's code looks for them */
                last.column0 += 64;
#pragma unroll
                for (int i = 0; i < S::COLUMNS / 4 - 16; i++)
                    sums[i] = sums[i + 16];
            }
        }
        sm90::wgmma_wait();
        sm90::pin<S::COLUMNS / 2>(d);
        if (steps == 0)
            break;
        ring.release(ring.before());
        notes.wait_full();
        float2 norm[2];
        for (int i = 0; i < 2; i++)
            norm[i] = load_two(notes.norm(warp * 16 + lane / 4 + i * 8));
#pragma unroll
        for (int piece = 0; piece < S::PIECES; piece++) {
            uint32_t *word = S::SHADOW ? sums + piece * 4 : sums;
            float4 fold;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (i % 2 == 0) /* two rows of the same columns */
                    fold = load_four(notes.fold((piece * 2 + i / 2) * 8 + lane % 4 * 2));
                const float *from = d + piece * 8 + i * 2;
                word[i] =
                    mma::pack(fmaf(from[0], norm[i % 2].x, fmaf(norm[i % 2].y, fold.x, fold.y)),
                              fmaf(from[1], norm[i % 2].x, fmaf(norm[i % 2].y, fold.z, fold.w)));
            }
            if (!S::SHADOW)
                finish(p, last, sums, piece, staging, warp);
        }
        notes.release();
        if (S::SHADOW)
            last.set(p, row0, column0, warp);
    }
}

template <typename S>
__global__ void __launch_bounds__(S::THREADS, 1) uvqk_kernel(const __grid_constant__ parameters p)
{
    extern __shared__ char memory[];
    if (threadIdx.x == 0) {
        sm90::map_prefetch(&p.x);
        sm90::map_prefetch(&p.b);
    }
    const uint32_t shared = shared_base(memory);
    tile_notes<S> notes = {shared, 0};
    if (threadIdx.x == 0)
        tile_notes<S>(notes).open();
    run_block<S>(
        shared,
        [&](stage_ring<S> ring) {
            if (threadIdx.x == 0)
                produce<S, 0>(p, &p.x, ring, [](auto &, uint32_t, uint32_t, uint32_t) {});
            else if (threadIdx.x >= 32)
                note<S>(p, notes);
        },
        [&](stage_ring<S> ring, uint32_t group) { consume<S>(p, ring, notes, group); });
}

template <typename S> int launch(const struct hstu_uvqk_args *args, cudaStream_t stream)
{
    parameters p = {};
    int status = encode(&p.x, args->x, args->rows, args->k, S::ROWS, 1);
    if (status == SKV_OK)
        status = encode(&p.b, args->b, args->k, args->n, S::DEPTH, S::CHUNKS / S::CLUSTER);
    if (status == SKV_OK)
        status = encode(&p.m, args->m, args->rows, args->n, 16, 1);
    if (status != SKV_OK)
        return status;
    p.moments = args->moments;
    p.fold = (const float4 *)args->fold;
    p.slot = args->slot;
    const skv_geometry &g = args->geometry;
    p.pages.head_bytes = (uint64_t)g.page_tokens * g.head_dim * 2;
    p.pages.bytes = p.pages.head_bytes * g.heads * 2 * g.layers;
    p.pages.layer = (char *)args->pool + args->layer * 2 * g.heads * p.pages.head_bytes;
    p.pages.heads = g.heads;
    p.pages.shift = __builtin_ctz(g.page_tokens);
    p.pages.dim_shift = __builtin_ctz(g.head_dim);
    p.rows = args->rows;
    p.n = args->n;
    p.k = args->k;
    p.b_policy = args->spares_l2 ? sm90::L2_FIRST_OUT : sm90::L2_USUAL;
    p.parts = args->parts;
    p.part_share = 1.0f / args->parts;
    p.value_share = 1.0f / args->k;
    p.eps = args->eps;
    p.order.columns = S::LISTED ? args->n / 2 : args->n;
    p.order.wanted = args->wanted;
    p.order.whole = args->rows;
    p.order.part = args->n / 4;
    return launch_tiles<S>(uvqk_kernel<S>, p, args->sm_count, tile_notes<S>::SHARED, args->early,
                           stream);
}

/* INFINITY where what nobody wants cannot be left out, as a tile would have columns of two parts.
 */
template <typename S> double cost(const struct hstu_uvqk_args *args, bool listed)
{
    if (listed && args->n / 4 % S::COLUMNS)
        return INFINITY;
    uint32_t tiles = tiles_of<S>(args->rows, args->n);
    if (listed)
        tiles = (tiles + tiles_of<S>(wanted_rows<S>(args->rows), args->n)) / 2;
    return estimate<S>(tiles, args->n, args->k, args->sm_count);
}

struct choice choose(const struct hstu_uvqk_args *args)
{
    return choose_tiles(args->tiles, HSTU_TILES_256X128, HSTU_TILES_128X128, args->wanted,
                        [&](enum hstu_tiles tiles, bool listed) {
                            return with_shape(tiles, [&](auto shape) {
                                return cost<decltype(shape)>(args, listed);
                            });
                        });
}

} // namespace

uint32_t hstu_uvqk_sm90_listed_rows(const struct hstu_uvqk_args *args)
{
    const struct choice choice = choose(args);
    return choice.listed ? with_shape(choice.tiles, [](auto shape) { return shape.ROWS; }) : 0;
}

int hstu_launch_uvqk_sm90(const struct hstu_uvqk_args *args, void *stream)
{
    const struct choice choice = choose(args);
    return with_shape(choice.tiles, [&](auto shape) {
        using S = decltype(shape);
        return choice.listed ? launch<listed<S>>(args, (cudaStream_t)stream)
                             : launch<S>(args, (cudaStream_t)stream);
    });
}
