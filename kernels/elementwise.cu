/* The element-wise kernels of a layer but the gate: norm before UVQK, activation after it; and,
 * once a pass, what Hopper's layers have instead of the norm: statistics of the first x,
 * attention's units, and which row tiles are wanted of the last layer. Each reads and writes every
 * element once, 16 bytes a thread; statistics are fp32, two passes over registers. */
#include "cuda_kernels.h"

#include "attention_sm90_item.cuh"
#include "rows.cuh"

namespace
{

/* ---- norm: one warp a row ---- */

constexpr int NORM_WARPS = 4;

/* A row's values, eight a lane and chunk, and their moments. A whole warp. */
template <int CHUNKS>
__device__ __forceinline__ hstu_moments moments_of(const void *from, uint32_t row, uint32_t columns,
                                                   eight *e)
{
    const uint32_t lane = threadIdx.x % 32, chunks = columns / 8;
    const uint4 *x = static_cast<const uint4 *>(from) + (uint64_t)row * chunks;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
        uint32_t at = i * 32 + lane;
        e[i] = widen(at < chunks ? x[at] : make_uint4(0, 0, 0, 0));
#pragma unroll
        for (int k = 0; k < 8; k++)
            sum += e[i].v[k];
    }
    const float mean = warp_sum(sum) / columns;
    float square = 0.0f;
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
        bool in = i * 32 + lane < chunks;
#pragma unroll
        for (int k = 0; k < 8; k++) {
            float d = e[i].v[k] - mean;
            square += in ? d * d : 0.0f;
        }
    }
    return {mean, warp_sum(square)};
}

template <int CHUNKS>
__global__ void __launch_bounds__(NORM_WARPS * 32)
    norm_kernel(const __grid_constant__ hstu_norm_args a)
{
    const uint32_t row = blockIdx.x * NORM_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= a.rows)
        return;
    /* Asked for beside the row itself; padding is computed too, but not stored. */
    const bool padding = a.row_sequence[row] == UINT32_MAX;
    const uint32_t chunks = a.columns / 8;
    eight e[CHUNKS];
    const hstu_moments m = moments_of<CHUNKS>(a.x, row, a.columns, e);
    const float mean = m.mean, scale = rsqrtf(m.square / a.columns + a.eps);
    uint4 *out = static_cast<uint4 *>(a.out) + (uint64_t)row * chunks;
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
        uint32_t at = i * 32 + lane;
        if (at >= chunks || padding)
            break;
        eight w = widen(__ldg(static_cast<const uint4 *>(a.weight) + at));
        eight b = widen(__ldg(static_cast<const uint4 *>(a.bias) + at));
#pragma unroll
        for (int k = 0; k < 8; k++)
            e[i].v[k] = (e[i].v[k] - mean) * scale * w.v[k] + b.v[k];
        out[at] = narrow(e[i]);
    }
}

/* ---- prepare: the norm's statistics alone, one warp a row; in a few blocks more a unit's part a
 * thread of the first warp, and in one more, a warp each, lists of wanted tiles ---- */

constexpr uint32_t UNIT_BLOCKS = 16; /* of each of two lists */

__device__ __forceinline__ hstu_work work_at(const hstu_device_batch &b, uint32_t index)
{
    union {
        uint4 chunk[sizeof(hstu_work) / 16];
        hstu_work work;
    } item = {};
#pragma unroll
    for (int i = 0; i < (int)(sizeof item / 16); i++)
        if (index < b.work_room)
            item.chunk[i] = reinterpret_cast<const uint4 *>(b.work + index)[i];
    return item.work;
}

__device__ void make_units(const hstu_units_args &a, uint32_t block)
{
    __shared__ sm90::item item[32], part[32];
    const uint32_t lane = threadIdx.x, count = *a.batch.work_count;
    for (uint32_t i = block * 32 + lane;; i += UNIT_BLOCKS * 32) {
        const hstu_work work = work_at(a.batch, i); /* asked for beside the count itself */
        if (i >= max((count + 1) / 2, a.workers) * 2)
            return;
        __syncwarp();
        sm90::read_item(&item[lane], a, work, i < count);
        __syncwarp(); /* a unit's two items are neighbouring lanes' */
        sm90::make_part(&part[lane], &item[lane & ~1u], &item[lane | 1], i % 2, a);
        static_cast<sm90::item *>(a.units)[i] = part[lane];
    }
}

/* Bits [from, end) of word `word` of a bitmap. */
__device__ __forceinline__ uint32_t bits_of(uint32_t from, uint32_t end, uint32_t word)
{
    const uint32_t low = max(from, word * 32), high = min(end, word * 32 + 32);
    return low < high ? ~0u >> (32 - (high - low)) << (low % 32) : 0;
}

/* One warp: of a bitmap of tiles each lane has a word. All that is read is asked for at once. */
__device__ void list_wanted(const hstu_counts &c, const hstu_wanted_tiles &to)
{
    constexpr uint32_t EACH = SKV_MAX_BATCH / 32;
    const hstu_layout &l = c.layout;
    const uint32_t lane = threadIdx.x % 32, batch = l.batch, every_row = c.every_row;
    uint32_t from[EACH], end[EACH], word = 0;
#pragma unroll
    for (uint32_t k = 0; k < EACH; k++) {
        const uint32_t b = lane + k * 32;
        const uint32_t before_candidates = l.history[b] - l.cached[b];
        from[k] = l.row_start[b] + (every_row ? 0 : before_candidates);
        end[k] = l.row_start[b + 1];
    }
#pragma unroll
    for (uint32_t k = 0; k < EACH; k++)
#pragma unroll 1
        for (uint32_t i = 0; i < 32 && k * 32 + i < batch; i++) {
            const uint32_t first = __shfl_sync(~0u, from[k], i),
                           after = __shfl_sync(~0u, end[k], i);
            if (first < after)
                word |= bits_of(first / to.rows, (after - 1) / to.rows + 1, lane);
        }
    uint32_t before = __popc(word);
#pragma unroll
    for (uint32_t step = 1; step < 32; step *= 2) {
        const uint32_t of_lower = __shfl_up_sync(~0u, before, step);
        before += lane >= step ? of_lower : 0;
    }
    if (lane == 31)
        to.list[0] = before;
    before -= __popc(word);
    for (; word; word &= word - 1)
        to.list[1 + before++] = lane * 32 + __ffs(word) - 1;
}

template <int CHUNKS>
__global__ void __launch_bounds__(NORM_WARPS * 32)
    prepare_kernel(const __grid_constant__ hstu_prepare_args a)
{
    const uint32_t row = blockIdx.x * NORM_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t row_blocks = (a.rows + NORM_WARPS - 1) / NORM_WARPS;
    mma::dependency_trigger();
    if (blockIdx.x >= row_blocks) {
        const uint32_t block = blockIdx.x - row_blocks, which = block / UNIT_BLOCKS;
        const uint32_t warp = threadIdx.x / 32;
        if (which < 2 && warp == 0 && a.units[which].units)
            make_units(a.units[which], block % UNIT_BLOCKS);
        else if (which == 2 && warp < 3 && a.wanted[warp].rows > 0)
            list_wanted(*a.counts, a.wanted[warp]);
        return;
    }
    if (row >= a.rows)
        return;
    const bool padding = a.row_sequence[row] == UINT32_MAX; /* as above */
    eight e[CHUNKS];
    const hstu_moments m = moments_of<CHUNKS>(a.x, row, a.columns, e);
    if (lane == 0 && !padding)
        a.out[row] = m;
}

/* ---- activate: one block a row ---- */

constexpr int ACTIVATE_THREADS = 256;

__global__ void __launch_bounds__(ACTIVATE_THREADS)
    activate_kernel(const __grid_constant__ hstu_activate_args a)
{
    const uint32_t row = blockIdx.x;
    if (a.row_sequence[row] == UINT32_MAX)
        return;
    const uint32_t slot = a.slot[row];
    const uint32_t part = a.geometry.heads * a.geometry.head_dim / 8; /* chunks of u, v, q or k */
    const uint32_t dim = a.geometry.head_dim / 8;
    uint4 *m = static_cast<uint4 *>(a.m) + (uint64_t)row * 4 * part;
    /* Chunk 0 of K of this layer and token, head 0. */
    uint4 *page = nullptr;
    if (slot != UINT32_MAX)
        page = static_cast<uint4 *>(a.pool) +
               (((uint64_t)(slot / a.geometry.page_tokens) * a.geometry.layers + a.layer) * 2 *
                    a.geometry.heads * a.geometry.page_tokens +
                slot % a.geometry.page_tokens) *
                   dim;
#pragma unroll 2
    for (uint32_t i = threadIdx.x; i < 4 * part; i += ACTIVATE_THREADS) {
        eight e = widen(m[i]);
#pragma unroll
        for (int k = 0; k < 8; k += 2) {
            const float2 x = mma::silu(make_float2(e.v[k], e.v[k + 1]));
            e.v[k] = x.x, e.v[k + 1] = x.y;
        }
        uint4 bits = narrow(e);
        m[i] = bits;
        uint32_t which = i / part; /* u, v, q, k */
        if (page && (which == 1 || which == 3)) {
            uint32_t head = i % part / dim, kv = which == 1;
            page[(uint64_t)(kv * a.geometry.heads + head) * a.geometry.page_tokens * dim +
                 i % dim] = bits;
        }
    }
}

} // namespace

/* A warp a row, and `more` blocks: of four kernels the one for the fewest chunks that hold it. */
template <typename Args>
static int launch_rows(void (*const (&kernels)[4])(Args), const Args &args, uint32_t more,
                       void *stream)
{
    const uint32_t c = args.columns;
    return launch(kernels[c <= 256    ? 0
                          : c <= 512  ? 1
                          : c <= 1024 ? 2
                                      : 3],
                  (args.rows + NORM_WARPS - 1) / NORM_WARPS + more, NORM_WARPS * 32, args, false,
                  stream);
}

int hstu_launch_norm(const struct hstu_norm_args *args, void *stream)
{
    return launch_rows({norm_kernel<1>, norm_kernel<2>, norm_kernel<4>, norm_kernel<8>}, *args, 0,
                       stream);
}

int hstu_launch_prepare(const struct hstu_prepare_args *args, void *stream)
{
    const bool lists = args->wanted[0].rows || args->wanted[1].rows || args->wanted[2].rows;
    const uint32_t more = lists                  ? 2 * UNIT_BLOCKS + 1
                          : args->units[1].units ? 2 * UNIT_BLOCKS
                          : args->units[0].units ? UNIT_BLOCKS
                                                 : 0;
    return launch_rows({prepare_kernel<1>, prepare_kernel<2>, prepare_kernel<4>, prepare_kernel<8>},
                       *args, more, stream);
}

int hstu_launch_activate(const struct hstu_activate_args *args, void *stream)
{
    return launch(activate_kernel, args->rows, ACTIVATE_THREADS, *args, false, stream);
}
