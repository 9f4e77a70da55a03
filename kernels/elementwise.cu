/* The element-wise kernels of a layer but the gate: norm before UVQK, activation after it; and,
 * once a pass, what Hopper's layers have instead of the norm: statistics of the first x, and
 * attention's units. Each reads and writes every element once, 16 bytes a thread; statistics are
 * fp32, two passes over registers. */
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
 * thread of the first warp ---- */

constexpr uint32_t UNIT_BLOCKS = 16;

__device__ void make_units(const hstu_units_args &a, uint32_t block)
{
    __shared__ sm90::item item[2][32], part[32];
    const uint32_t lane = threadIdx.x, units = max((*a.batch.work_count + 1) / 2, a.workers);
    for (uint32_t i = block * 32 + lane; i < units * 2; i += UNIT_BLOCKS * 32) {
        for (int k = 0; k < 2; k++)
            sm90::read_item(&item[k][lane], a, i / 2 * 2 + k);
        sm90::make_part(&part[lane], &item[0][lane], &item[1][lane], i % 2, a);
        static_cast<sm90::item *>(a.units)[i] = part[lane];
    }
}

template <int CHUNKS>
__global__ void __launch_bounds__(NORM_WARPS * 32)
    prepare_kernel(const __grid_constant__ hstu_prepare_args a)
{
    const uint32_t row = blockIdx.x * NORM_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t row_blocks = (a.rows + NORM_WARPS - 1) / NORM_WARPS;
    mma::dependency_trigger();
    if (blockIdx.x >= row_blocks && threadIdx.x < 32)
        make_units(a.units, blockIdx.x - row_blocks);
    if (row >= a.rows || a.row_sequence[row] == UINT32_MAX)
        return;
    eight e[CHUNKS];
    const hstu_moments m = moments_of<CHUNKS>(a.x, row, a.columns, e);
    if (lane == 0)
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
    return launch_rows({prepare_kernel<1>, prepare_kernel<2>, prepare_kernel<4>, prepare_kernel<8>},
                       *args, args->units.units ? UNIT_BLOCKS : 0, stream);
}

int hstu_launch_activate(const struct hstu_activate_args *args, void *stream)
{
    return launch(activate_kernel, args->rows, ACTIVATE_THREADS, *args, false, stream);
}
