/* The portable attention path: mma.sync and cp.async, compute capability 8.0 and up. One block of
 * four warps takes a work item: up to 64 query rows of one head against its keys, which come in
 * tiles of 64 (head dim 64, 128) or 32 (256), double buffered. Prefix keys come from pages,
 * in-flight ones from m. Each warp owns 16 query rows and their accumulators, so warps meet only at
 * the tile border.
 *
 *   s = (q . k) / sqrt(D), p = SiLU(s) where allowed, else 0 (a select), p to bf16, o += p v
 *
 * Moves, per item: the query tile once, each key and value row of the item once, 4 bytes of partial
 * sum per output. Out-of-range rows are zero-filled in shared memory, never loaded: what lies past
 * c in a page, in another sequence or in padding rows reaches no product. */
#include "cuda_pass.h"

#include <cuda_runtime.h>

#include "cuda_check.h"
#include "mma.cuh"

namespace
{

constexpr int TILE_ROWS = 64;
constexpr int KEY_STEP = 64;
constexpr int THREADS = 128;
constexpr int SHARED_LIMIT = 99 * 1024; /* what a block may have on 8.6 and 8.9 */

template <int D> struct layout {
    static constexpr int KEYS = D == 256 ? 32 : 64; /* keys a tile */
    static constexpr int CHUNKS = D / 8;            /* 16-byte chunks a row */
    static constexpr int ROW_BYTES = D * 2;
    static constexpr int Q = 0;
    static constexpr int K = TILE_ROWS * ROW_BYTES;
    static constexpr int V = K + 2 * KEYS * ROW_BYTES;
    static constexpr int BYTES = V + 2 * KEYS * ROW_BYTES;
    static_assert(BYTES <= SHARED_LIMIT, "the portable path must fit smaller GPUs");
    static_assert(KEY_STEP % KEYS == 0, "slices begin at a tile");
};

/* What an item's loads need, the same in every thread. */
struct source {
    const char *m;    /* of the sequence's first row */
    const char *pool; /* of this layer, K, this head, page 0 */
    const uint32_t *pages;
    uint64_t row_bytes; /* of m */
    uint64_t page_bytes;
    uint64_t head_bytes; /* from K to V of a page: all heads */
    uint32_t page_shift, cached, key1;
    uint32_t k_offset, v_offset, q_offset; /* bytes within a row of m */
};

/* Starts the copies of one tile of keys and values to shared memory. Rows at and past key1 become
 * zeros. */
template <int D>
__device__ __forceinline__ void load_keys(const source &s, uint32_t shared, int buffer,
                                          uint32_t key0)
{
    using L = layout<D>;
    constexpr int ROWS_AT_ONCE = THREADS / L::CHUNKS;
    uint32_t chunk = threadIdx.x % L::CHUNKS;
    uint32_t tile_bytes = buffer * L::KEYS * L::ROW_BYTES;
#pragma unroll
    for (int i = 0; i < L::KEYS / ROWS_AT_ONCE; i++) {
        uint32_t row = threadIdx.x / L::CHUNKS + i * ROWS_AT_ONCE;
        uint32_t key = key0 + row;
        bool valid = key < s.key1;
        const char *k = s.m, *v = s.m;
        if (valid && key < s.cached) {
            uint32_t page = __ldg(s.pages + (key >> s.page_shift));
            uint32_t slot = key & ((1u << s.page_shift) - 1);
            k = s.pool + page * s.page_bytes + (uint64_t)slot * L::ROW_BYTES;
            v = k + s.head_bytes;
        } else if (valid) {
            const char *at = s.m + (uint64_t)(key - s.cached) * s.row_bytes;
            k = at + s.k_offset;
            v = at + s.v_offset;
        }
        uint32_t offset = tile_bytes + mma::tile_offset<L::CHUNKS>(row, chunk);
        mma::copy_async(shared + L::K + offset, k + chunk * 16, valid);
        mma::copy_async(shared + L::V + offset, v + chunk * 16, valid);
    }
}

template <int D>
__device__ __forceinline__ void load_queries(const source &s, uint32_t shared, uint32_t row0,
                                             uint32_t rows)
{
    using L = layout<D>;
    constexpr int ROWS_AT_ONCE = THREADS / L::CHUNKS;
    uint32_t chunk = threadIdx.x % L::CHUNKS;
#pragma unroll
    for (int i = 0; i < TILE_ROWS / ROWS_AT_ONCE; i++) {
        uint32_t row = threadIdx.x / L::CHUNKS + i * ROWS_AT_ONCE;
        bool valid = row < rows;
        const char *q = s.m;
        if (valid)
            q += (uint64_t)(row0 + row) * s.row_bytes + s.q_offset;
        mma::copy_async(shared + L::Q + mma::tile_offset<L::CHUNKS>(row, chunk), q + chunk * 16,
                        valid);
    }
}

/* The two query rows of a thread, absolute, and where each one's own group begins. */
struct query_rows {
    uint32_t row[2], group[2];
};

template <int D>
__global__ void __launch_bounds__(THREADS)
    attention_kernel(const __grid_constant__ hstu_attention_args args, float scale)
{
    using L = layout<D>;
    constexpr int KEYS = L::KEYS;
    extern __shared__ __align__(128) char memory[];
    __shared__ uint32_t drawn;
    const uint32_t shared = mma::shared_address(memory);
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const hstu_device_batch &batch = args.batch;
    const uint32_t hd = args.geometry.heads * D;
    const uint32_t items = __ldg(batch.work_count);

    source s;
    s.row_bytes = (uint64_t)hd * 8;
    s.head_bytes = (uint64_t)args.geometry.heads * args.geometry.page_tokens * L::ROW_BYTES;
    s.page_bytes = s.head_bytes * 2 * args.geometry.layers;
    s.page_shift = __ffs(args.geometry.page_tokens) - 1;

    for (;;) {
        __syncthreads(); /* everyone is done with the last item's shared memory and `drawn` */
        if (threadIdx.x == 0)
            drawn = atomicAdd(&batch.next[args.layer], 1);
        __syncthreads();
        if (drawn >= items)
            return;
        const hstu_work item = batch.work[drawn];
        const uint32_t b = item.sequence;
        const uint32_t history = batch.history[b];
        const uint32_t first = batch.row_start[b];
        s.cached = batch.cached[b];
        s.key1 = item.key1;
        s.m = (const char *)args.m + (uint64_t)first * s.row_bytes;
        s.pages = batch.pages + batch.page_start[b];
        s.pool = (const char *)args.pool + args.layer * 2 * s.head_bytes +
                 (uint64_t)item.head * args.geometry.page_tokens * L::ROW_BYTES;
        s.v_offset = (hd + item.head * D) * 2;
        s.q_offset = (2 * hd + item.head * D) * 2;
        s.k_offset = (3 * hd + item.head * D) * 2;

        const uint32_t query0 = s.cached + item.row0; /* absolute */
        query_rows q;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            q.row[i] = query0 + warp * 16 + lane / 4 + i * 8;
            q.group[i] = q.row[i] < history
                             ? history
                             : history + (q.row[i] - history) / args.group * args.group;
        }
        /* Tiles of history, then tiles of the candidates' own groups, nothing between. */
        const uint32_t tile0 = item.key0 / KEYS;
        const uint32_t history_end = (min(item.key1, history) + KEYS - 1) / KEYS;
        const uint32_t history_tiles = history_end > tile0 ? history_end - tile0 : 0;
        uint32_t group_tile = 0, tiles = history_tiles;
        if (item.key1 > history) {
            uint32_t candidate = query0 > history ? query0 - history : 0;
            group_tile = (history + candidate / args.group * args.group) / KEYS;
            group_tile = max(group_tile, tile0 + history_tiles);
            uint32_t end = (item.key1 + KEYS - 1) / KEYS;
            tiles += end > group_tile ? end - group_tile : 0;
        }
        auto tile_key = [&](uint32_t index) {
            return KEYS *
                   (index < history_tiles ? tile0 + index : group_tile + (index - history_tiles));
        };

        float o[D / 8][4];
#pragma unroll
        for (int i = 0; i < D / 8; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                o[i][j] = 0.0f;

        load_queries<D>(s, shared, item.row0, item.rows);
        if (tiles)
            load_keys<D>(s, shared, 0, tile_key(0));
        mma::copy_commit();
        for (uint32_t tile = 0; tile < tiles; tile++) {
            mma::copy_wait<0>();
            __syncthreads(); /* this tile is here; the other buffer is free */
            if (tile + 1 < tiles)
                load_keys<D>(s, shared, (tile + 1) & 1, tile_key(tile + 1));
            mma::copy_commit();
            const uint32_t key0 = tile_key(tile);
            const uint32_t tile_bytes = (tile & 1) * KEYS * L::ROW_BYTES;
            const uint32_t k_tile = shared + L::K + tile_bytes, v_tile = shared + L::V + tile_bytes;

            float score[KEYS / 8][4];
#pragma unroll
            for (int i = 0; i < KEYS / 8; i++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    score[i][j] = 0.0f;
#pragma unroll
            for (int step = 0; step < D / 16; step++) {
                uint32_t a[4];
                mma::load4(a, shared + L::Q +
                                  mma::tile_offset<L::CHUNKS>(warp * 16 + lane % 16,
                                                              step * 2 + lane / 16));
#pragma unroll
                for (int n = 0; n < KEYS / 16; n++) {
                    uint32_t k[4];
                    mma::load4(k, k_tile +
                                      mma::tile_offset<L::CHUNKS>(n * 16 + lane % 8 + lane / 16 * 8,
                                                                  step * 2 + lane / 8 % 2));
                    mma::multiply(score[2 * n], a, k[0], k[1]);
                    mma::multiply(score[2 * n + 1], a, k[2], k[3]);
                }
            }
            /* A tile below the diagonal and within the history needs no mask. */
            const bool open = key0 + KEYS <= min(item.key1, history) && key0 + KEYS <= query0 + 1;
#pragma unroll
            for (int i = 0; i < KEYS / 8; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float p = mma::silu(score[i][j] * scale);
                    if (!open) {
                        uint32_t key = key0 + i * 8 + lane % 4 * 2 + j % 2;
                        uint32_t row = q.row[j / 2];
                        bool allowed = key < item.key1 && key <= row &&
                                       (key < history || key >= q.group[j / 2]);
                        p = allowed ? p : 0.0f;
                    }
                    score[i][j] = p;
                }
            }
#pragma unroll
            for (int step = 0; step < KEYS / 16; step++) {
                /* The score layout of two 8-column tiles is the layout of a 16x16 left operand. */
                uint32_t p[4] = {mma::pack(score[2 * step][0], score[2 * step][1]),
                                 mma::pack(score[2 * step][2], score[2 * step][3]),
                                 mma::pack(score[2 * step + 1][0], score[2 * step + 1][1]),
                                 mma::pack(score[2 * step + 1][2], score[2 * step + 1][3])};
#pragma unroll
                for (int n = 0; n < D / 16; n++) {
                    uint32_t v[4];
                    mma::load4_transposed(v, v_tile +
                                                 mma::tile_offset<L::CHUNKS>(step * 16 + lane % 16,
                                                                             n * 2 + lane / 16));
                    mma::multiply(o[2 * n], p, v[0], v[1]);
                    mma::multiply(o[2 * n + 1], p, v[2], v[3]);
                }
            }
        }
        mma::copy_wait<0>();

#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t local = warp * 16 + lane / 4 + i * 8;
            if (local >= item.rows)
                continue;
            float *out =
                args.partial + ((uint64_t)item.slice * args.rows + first + item.row0 + local) * hd;
            const uint32_t column = item.head * D + lane % 4 * 2;
            uint32_t *rounded = reinterpret_cast<uint32_t *>(out) + column / 2;
            float2 *sums = reinterpret_cast<float2 *>(out + column);
#pragma unroll
            for (int n = 0; n < D / 8; n++)
                if (args.max_slices == 1)
                    rounded[n * 4] = mma::pack(o[n][2 * i], o[n][2 * i + 1]);
                else
                    sums[n * 4] = make_float2(o[n][2 * i], o[n][2 * i + 1]);
        }
    }
}

template <int D> int launch_for(const hstu_attention_args *args, cudaStream_t stream)
{
    int per_sm = 0; /* blocks that a multiprocessor holds */
    cudaError_t e = cudaFuncSetAttribute(
        attention_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, layout<D>::BYTES);
    if (e == cudaSuccess)
        e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, attention_kernel<D>, THREADS,
                                                          layout<D>::BYTES);
    if (e == cudaSuccess) {
        attention_kernel<D><<<args->sm_count * per_sm, THREADS, layout<D>::BYTES, stream>>>(
            *args, 1.0f / sqrtf((float)D));
        e = cudaGetLastError();
    }
    return hstu_cuda_check(e, "launching portable attention");
}

uint32_t tile_rows(uint32_t head_dim)
{
    (void)head_dim;
    return TILE_ROWS;
}

int path_launch(const hstu_attention_args *args, void *stream)
{
    cudaStream_t s = (cudaStream_t)stream;
    switch (args->geometry.head_dim) {
    case 64:
        return launch_for<64>(args, s);
    case 128:
        return launch_for<128>(args, s);
    case 256:
        return launch_for<256>(args, s);
    }
    return SKV_ENOTSUP;
}

} // namespace

extern "C" const struct hstu_attention_path hstu_attention_portable = {
    "portable", tile_rows, KEY_STEP, 1, false, 0, path_launch};
