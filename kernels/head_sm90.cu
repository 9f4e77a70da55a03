/* The head on Hopper: logits of candidate rows of x, in two kernels. The first one multiplies the
 * row tiles that have candidates by W1 (gemm_sm90.cuh), scales each row to length 1 after the sum,
 * so that nothing is rounded before fp32, and in registers goes on through ReLU and the second
 * layer: a tile leaves one sum a row and output. The other adds the tiles' sums, in order.
 *
 * How long a row is, the projection of the last layer has told (struct hstu_moments).
 *
 * Moves: x once per column block (from L2), W1 once per row block, sums of 4 bytes a row, column
 * block and output. */
#include "gemm_sm90.cuh"
#include "rows.cuh"

namespace
{

/* Costs as of the projection's tiles of the same shape. */
template <int Groups, int Columns, int Stages>
struct head : listed<shape<Groups, Columns, Stages, 1>> {
    static constexpr double START = Groups == 2 ? 2.3 : 2.5, ROUND = Groups == 2 ? 5.95 : 2.9;
};

/* Calls f with the shape of these tiles. */
template <typename F> auto with_shape(enum hstu_tiles tiles, F f)
{
    return tiles == HSTU_TILES_128X128 ? f(head<2, 128, 6>()) : f(head<1, 64, 12>());
}

struct parameters {
    CUtensorMap x, b;
    const hstu_moments *moments;
    const uint32_t *bias; /* of two columns */
    const __nv_bfloat16 *weight2;
    float *sums;
    uint32_t rows, n, k, parts, outputs;
    tile_order order;
    uint64_t b_policy;
};

/* 1 / the row's length; four lanes of a warp share its parts. */
__device__ __forceinline__ float inverse_length(const parameters &p, uint32_t row)
{
    const float width = (float)(p.k / p.parts);
    float square = 0.0f;
    for (uint32_t i = threadIdx.x % 4; i < p.parts && row < p.rows; i += 4) {
        const hstu_moments m = p.moments[(uint64_t)i * p.rows + row];
        square += fmaf(width * m.mean, m.mean, m.square);
    }
    square += __shfl_xor_sync(~0u, square, 1);
    square += __shfl_xor_sync(~0u, square, 2);
    return 1.0f / fmaxf(sqrtf(square), 1e-6f);
}

/* What a tile's sums d come to, for one output: ReLU(d) W2, by this lane's columns of two rows. */
template <typename S>
__device__ __forceinline__ float2 second_layer(const parameters &p, const float *d,
                                               uint32_t column0, uint32_t output)
{
    float2 sum = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < S::COLUMNS / 4; i++) { /* [8 columns][row] */
        const uint32_t column = column0 + i / 2 * 8 + threadIdx.x % 4 * 2;
        const __nv_bfloat16 *w = p.weight2 + (uint64_t)column * p.outputs + output;
        const float x =
            fmaf(d[i * 2], __bfloat162float(w[0]), d[i * 2 + 1] * __bfloat162float(w[p.outputs]));
        (i % 2 == 0 ? sum.x : sum.y) += x;
    }
    return sum;
}

/* One consumer warpgroup; its sums lie as in uvqk_sm90.cu. */
template <typename S>
__device__ void consume(const parameters &p, stage_ring<S> ring, uint32_t group)
{
    schedule<S> tiles(p.rows, p.order);
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32, steps = p.k / S::DEPTH;
    uint32_t row0, column0;
    float d[S::COLUMNS / 2];
    mma::dependency_wait();
    while (tiles.take(&row0, &column0)) {
        const uint32_t row = row0 + group * 64 + warp * 16 + lane / 4;
        const float scale[2] = {inverse_length(p, row), inverse_length(p, row + 8)};
#pragma unroll 1
        for (uint32_t step = 0; step < steps; step++) {
            multiply_stage<S>(d, ring, group, step > 0);
            release_before<S>(ring, step > 0);
        }
        sm90::wgmma_wait();
        sm90::pin<S::COLUMNS / 2>(d);
        ring.release(ring.before());
#pragma unroll
        for (int i = 0; i < S::COLUMNS / 4; i++) {
            const float2 b = mma::unpack(__ldg(p.bias + column0 / 2 + i / 2 * 4 + lane % 4));
            d[i * 2] = fmaxf(fmaf(d[i * 2], scale[i % 2], b.x), 0.0f);
            d[i * 2 + 1] = fmaxf(fmaf(d[i * 2 + 1], scale[i % 2], b.y), 0.0f);
        }
        float *out = p.sums + (uint64_t)column0 / S::COLUMNS * p.rows * p.outputs;
        for (uint32_t o = 0; o < p.outputs; o++) {
            float2 sum = second_layer<S>(p, d, column0, o);
            for (int offset = 1; offset < 4; offset *= 2) {
                sum.x += __shfl_xor_sync(~0u, sum.x, offset);
                sum.y += __shfl_xor_sync(~0u, sum.y, offset);
            }
            if (lane % 4 == 0 && row < p.rows)
                out[(uint64_t)row * p.outputs + o] = sum.x;
            if (lane % 4 == 0 && row + 8 < p.rows)
                out[(uint64_t)(row + 8) * p.outputs + o] = sum.y;
        }
    }
}

template <typename S>
__global__ void __launch_bounds__(S::THREADS, 1) head_kernel(const __grid_constant__ parameters p)
{
    extern __shared__ char memory[];
    run_block<S>(
        shared_base(memory),
        [&](stage_ring<S> ring) {
            if (threadIdx.x == 0)
                produce<S, 0>(p, &p.x, ring, [](auto &, uint32_t, uint32_t, uint32_t) {});
        },
        [&](stage_ring<S> ring, uint32_t group) { consume<S>(p, ring, group); });
}

/* ---- the sums of all tiles, and where they belong ---- */

constexpr int SUM_THREADS = 128;

struct sum_args {
    hstu_head_args head;
    uint32_t blocks; /* of columns */
};

__global__ void __launch_bounds__(SUM_THREADS) sum_kernel(const __grid_constant__ sum_args args)
{
    const hstu_head_args &a = args.head;
    __shared__ uint32_t target_start[SKV_MAX_BATCH + 1], first_row[SKV_MAX_BATCH];
    const hstu_device_batch &batch = a.batch;
    /* Counts are older than the layers, whose first kernels waited for all that pull wrote. */
    for (uint32_t b = threadIdx.x; b < SKV_MAX_BATCH + 1; b += SUM_THREADS) {
        target_start[b] = batch.target_start[b];
        if (b < SKV_MAX_BATCH)
            first_row[b] = batch.row_start[b] + batch.history[b] - batch.cached[b];
    }
    const uint32_t count = *a.row_count * a.outputs;
    __syncthreads();
    const uint32_t i = blockIdx.x * SUM_THREADS + threadIdx.x, candidate = i / a.outputs;
    mma::dependency_wait();
    if (i >= count)
        return;
    uint32_t b = 0;
    while (target_start[b + 1] <= candidate)
        b++;
    const uint32_t row = first_row[b] + candidate - target_start[b], output = i % a.outputs;
    const float *sums = a.scratch + (uint64_t)row * a.outputs + output;
    float sum = 0.0f;
#pragma unroll 8
    for (uint32_t k = 0; k < args.blocks; k++)
        sum += __ldcg(sums + (uint64_t)k * a.rows * a.outputs);
    a.logits[i] = sum + __bfloat162float(static_cast<const __nv_bfloat16 *>(a.bias2)[output]);
}

/* ---- host ---- */

template <typename S> double cost(const struct hstu_head_args *args, S)
{
    const uint32_t n = args->hidden_columns, tiles = tiles_of<S>(wanted_rows<S>(args->rows), n);
    return estimate<S>(tiles, n, args->embed, args->sm_count);
}

enum hstu_tiles choose(const struct hstu_head_args *args)
{
    return cost(args, head<2, 128, 6>()) < cost(args, head<1, 64, 12>()) ? HSTU_TILES_128X128
                                                                         : HSTU_TILES_64X64;
}

template <typename S> int launch_product(const struct hstu_head_args *args, cudaStream_t stream)
{
    parameters p = {};
    int status = encode(&p.x, args->x, args->rows, args->embed, S::ROWS, 1);
    if (status == SKV_OK)
        status =
            encode(&p.b, args->weight1, args->embed, args->hidden_columns, S::DEPTH, S::CHUNKS);
    if (status != SKV_OK)
        return status;
    p.moments = args->moments;
    p.bias = (const uint32_t *)args->bias1;
    p.weight2 = (const __nv_bfloat16 *)args->weight2;
    p.sums = args->scratch;
    p.rows = args->rows;
    p.n = args->hidden_columns;
    p.k = args->embed;
    p.parts = args->parts;
    p.outputs = args->outputs;
    p.b_policy = sm90::L2_USUAL;
    p.order.columns = args->hidden_columns;
    p.order.wanted = args->wanted;
    p.order.part = UINT32_MAX;
    return launch_tiles<S>(head_kernel<S>, p, args->sm_count, S::SHARED, true, stream);
}

} // namespace

uint32_t hstu_head_sm90_listed_rows(const struct hstu_head_args *args)
{
    return with_shape(choose(args), [](auto shape) { return (uint32_t)shape.ROWS; });
}

int hstu_launch_head_sm90(const struct hstu_head_args *args, void *stream)
{
    return with_shape(choose(args), [&](auto shape) -> int {
        using S = decltype(shape);
        const struct sum_args sum = {*args, args->hidden_columns / S::COLUMNS};
        const uint64_t most = (uint64_t)args->rows * args->outputs;
        int status = launch_product<S>(args, (cudaStream_t)stream);
        return status == SKV_OK
                   ? launch(sum_kernel, (uint32_t)((most + SUM_THREADS - 1) / SUM_THREADS),
                            SUM_THREADS, sum, true, stream)
                   : status;
    });
}
