/* The element-wise kernels of a layer: norm before UVQK, activation after it, gate before the
 * projection; and, once a pass, what Hopper's layers have instead of the norm: statistics of the
 * first x, and attention's units. Each reads and writes every element once, 16 bytes a thread;
 * statistics are fp32, two passes over registers. */
#include "cuda_kernels.h"

#include <cuda_runtime.h>

#include "attention_sm90_item.cuh"
#include "mma.cuh"

namespace
{

struct eight {
    float v[8];
};

__device__ __forceinline__ eight widen(uint4 bits)
{
    float2 a = mma::unpack(bits.x), b = mma::unpack(bits.y), c = mma::unpack(bits.z),
           d = mma::unpack(bits.w);
    return {{a.x, a.y, b.x, b.y, c.x, c.y, d.x, d.y}};
}

__device__ __forceinline__ uint4 narrow(const eight &e)
{
    return make_uint4(mma::pack(e.v[0], e.v[1]), mma::pack(e.v[2], e.v[3]),
                      mma::pack(e.v[4], e.v[5]), mma::pack(e.v[6], e.v[7]));
}

__device__ __forceinline__ float warp_sum(float x)
{
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

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

/* ---- gate: THREADS threads a row, x of the block; its y are rows ---- */

template <int THREADS> __device__ __forceinline__ void sync_row()
{
    asm volatile("bar.sync %0, %1;" ::"r"(1 + threadIdx.y), "n"(THREADS) : "memory");
}

/* The sum over a row's threads; each gets it. `shared` [32] may be used again right after. */
template <int THREADS> __device__ __forceinline__ float row_sum(float x, float *shared)
{
    x = warp_sum(x);
    if (THREADS == 32)
        return x;
    shared += threadIdx.y * (THREADS / 32);
    sync_row<THREADS>();
    if (threadIdx.x % 32 == 0)
        shared[threadIdx.x / 32] = x;
    sync_row<THREADS>();
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < THREADS / 32; i++)
        sum += shared[i];
    return sum;
}

/* What a thread has of a row: of every THREADS chunks of eight columns its own. */
template <int THREADS, int CHUNKS> struct share {
    eight e[CHUNKS];
    uint32_t chunks; /* of the row */

    __device__ __forceinline__ uint32_t at(int i) const
    {
        return i * THREADS + threadIdx.x;
    }

    /* Adds N slices, all of them in flight at once, in their order. */
    template <int N> __device__ __forceinline__ void add_slices(const float4 *o, uint64_t plane)
    {
        float4 low[N][CHUNKS], high[N][CHUNKS];
#pragma unroll
        for (int s = 0; s < N; s++)
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) {
                const bool in = at(i) < chunks;
                low[s][i] = in ? __ldcs(o + s * plane + at(i) * 2) : float4{};
                high[s][i] = in ? __ldcs(o + s * plane + at(i) * 2 + 1) : float4{};
            }
#pragma unroll
        for (int s = 0; s < N; s++)
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) {
                const float4 &l = low[s][i], &h = high[s][i];
                float *v = e[i].v;
                v[0] += l.x, v[1] += l.y, v[2] += l.z, v[3] += l.w;
                v[4] += h.x, v[5] += h.y, v[6] += h.z, v[7] += h.w;
            }
    }

    /* N at a time, then half as many. */
    template <int N>
    __device__ __forceinline__ void add_all(const float4 *o, uint64_t plane, uint32_t slices)
    {
        for (; slices >= N; slices -= N, o += N * plane)
            add_slices<N>(o, plane);
        if constexpr (N > 1)
            add_all<N / 2>(o, plane, slices);
    }

    /* The sum of a row's slices in the order of slices, always: the same bits whoever computed
     * them. `o`: the row, of fp32, or of bf16 if that is how the sums of one slice come. */
    template <int N>
    __device__ __forceinline__ void sum(const float4 *o, uint64_t plane, uint32_t slices,
                                        bool rounded)
    {
        if (rounded && slices == 1) {
            const uint4 *from = reinterpret_cast<const uint4 *>(o);
            uint4 bits[CHUNKS];
#pragma unroll
            for (int i = 0; i < CHUNKS; i++)
                bits[i] = at(i) < chunks ? __ldcs(from + at(i)) : uint4{};
#pragma unroll
            for (int i = 0; i < CHUNKS; i++)
                e[i] = widen(bits[i]);
            return;
        }
#pragma unroll
        for (int i = 0; i < CHUNKS; i++)
            e[i] = eight{};
        add_all<N>(o, plane, slices);
    }
};

constexpr int GATE_WARPS = 4; /* rows of a block, where a warp has a row */
/* Up to so many rows a multiprocessor one block there does all, whichever comes free first: with
 * room for eight slices in flight, or four. */
constexpr int FEW_ROWS = 5, SOME_ROWS = 8;

/* N: slices in flight; ROWS: of a block, at most; BLOCKS: a multiprocessor, which bounds the
 * registers. */
template <int THREADS, int CHUNKS, int N, int ROWS, int BLOCKS>
__global__ void __launch_bounds__(THREADS *ROWS, BLOCKS)
    gate_kernel(const __grid_constant__ hstu_gate_args a)
{
    __shared__ float shared[32];
    const uint32_t row = blockIdx.x * blockDim.y + threadIdx.y;
    const uint32_t slices = row < a.rows ? a.slices[row] : 0, chunks = a.columns / 8;
    const uint64_t plane = (uint64_t)a.rows * chunks * 2; /* in float4 */
    const float4 *o = reinterpret_cast<const float4 *>(a.partial) + (uint64_t)row * chunks * 2;
    const uint4 *u = static_cast<const uint4 *>(a.m) + (uint64_t)row * chunks * 4;
    const uint4 *weight = static_cast<const uint4 *>(a.weight);
    const uint4 *bias = static_cast<const uint4 *>(a.bias);
    share<THREADS, CHUNKS> mine;
    mine.chunks = chunks;
    eight(&e)[CHUNKS] = mine.e;
    /* What there is room for is asked for before the sums: u is older than the kernel before. */
    constexpr bool U_AHEAD = THREADS == 32 || CHUNKS == 1, NORM_AHEAD = CHUNKS == 1;
    uint4 gate[CHUNKS], scales[CHUNKS], shifts[CHUNKS];
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
        const bool in = slices > 0 && mine.at(i) < chunks;
        gate[i] = U_AHEAD && in ? u[mine.at(i)] : uint4{};
        scales[i] = NORM_AHEAD && in ? __ldg(weight + mine.at(i)) : uint4{};
        shifts[i] = NORM_AHEAD && in ? __ldg(bias + mine.at(i)) : uint4{};
    }
    mma::dependency_wait();
    mma::dependency_trigger(); /* the projection fetches weights meanwhile */
    if (slices == 0)           /* padding */
        return;
    mine.template sum<N>(o, plane, slices, a.rounded);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
#pragma unroll
        for (int k = 0; k < 8; k++) {
            e[i].v[k] *= a.inverse_n;
            sum += e[i].v[k];
        }
    }
    const float mean = row_sum<THREADS>(sum, shared) / a.columns;
    float square = 0.0f;
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
        bool in = mine.at(i) < chunks;
#pragma unroll
        for (int k = 0; k < 8; k++) {
            float d = e[i].v[k] - mean;
            square += in ? d * d : 0.0f;
        }
    }
    const float scale = rsqrtf(row_sum<THREADS>(square, shared) / a.columns + a.eps);
    uint4 *y = static_cast<uint4 *>(a.y) + (uint64_t)row * chunks;
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
        const uint32_t at = mine.at(i);
        if (at >= chunks)
            break;
        eight w = widen(NORM_AHEAD ? scales[i] : __ldg(weight + at));
        eight b = widen(NORM_AHEAD ? shifts[i] : __ldg(bias + at));
        eight g = widen(U_AHEAD ? gate[i] : u[at]);
#pragma unroll
        for (int k = 0; k < 8; k++)
            e[i].v[k] = ((e[i].v[k] - mean) * scale * w.v[k] + b.v[k]) * g.v[k];
        y[at] = narrow(e[i]);
    }
}

} // namespace

/* `early`: its blocks may start while the kernel before it ends. */
template <typename Args>
static int launch(void (*kernel)(Args), uint32_t blocks, dim3 threads, const Args &args, bool early,
                  void *stream)
{
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks);
    config.blockDim = threads;
    config.stream = (cudaStream_t)stream;
    config.attrs = &attribute;
    config.numAttrs = early ? 1 : 0;
    /* The kernels around these take nearly all shared memory. A multiprocessor that had to change
     * its split could not start one of them before the last block here has gone. */
    cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                         cudaSharedmemCarveoutMaxShared);
    if (e == cudaSuccess)
        e = cudaLaunchKernelEx(&config, kernel, args);
    return e == cudaSuccess ? SKV_OK : SKV_EDEVICE;
}

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

int hstu_launch_gate(const struct hstu_gate_args *args, void *stream)
{
    const uint32_t chunks = args->columns / 8;
    const uint32_t rows_each = (args->rows + args->sm_count - 1) / args->sm_count;
    auto kernel = rows_each <= FEW_ROWS ? gate_kernel<128, 1, 8, FEW_ROWS, 1>
                                        : gate_kernel<128, 1, 4, SOME_ROWS, 1>;
    dim3 threads(128, rows_each); /* one block a multiprocessor */
    /* A warp a row waits for no other; more threads a row have more of it in flight. */
    if (chunks <= 32 || (chunks <= 128 && rows_each > SOME_ROWS)) {
        kernel = chunks <= 32 ? gate_kernel<32, 1, 8, GATE_WARPS, 5>
                              : gate_kernel<32, 4, 1, GATE_WARPS, 4>;
        threads = dim3(32, GATE_WARPS);
    } else if (chunks > 128) {
        kernel = chunks <= 256   ? gate_kernel<256, 1, 4, 1, 4>
                 : chunks <= 512 ? gate_kernel<256, 2, 4, 1, 4>
                                 : gate_kernel<256, 8, 1, 1, 1>;
        threads = dim3(256);
    }
    return launch(kernel, (args->rows + threads.y - 1) / threads.y, threads, *args, args->early,
                  stream);
}
