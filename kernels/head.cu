/* The head: candidate rows of the block's output to logits in pinned memory. Three kernels. `find`
 * gives each candidate its row and the inverse of its length; the product (gemm_mma.cu) gathers the
 * rows and applies the length after the sum, so that nothing is rounded before fp32; `score` is the
 * second layer, one warp a candidate. Only as many rows as there are candidates are computed,
 * though the grid is the graph's. */
#include "cuda_kernels.h"

#include "cuda_check.h"
#include "rows.cuh"

namespace
{

constexpr int WARPS = 4;

/* Reads x once. */
__global__ void __launch_bounds__(WARPS * 32) find_kernel(const __grid_constant__ hstu_head_args a)
{
    const uint32_t row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t b = row < a.rows ? a.batch.row_sequence[row] : UINT32_MAX;
    if (b == UINT32_MAX)
        return;
    const uint32_t first = a.batch.row_start[b] + a.batch.history[b] - a.batch.cached[b];
    if (row < first)
        return;
    const uint4 *x = static_cast<const uint4 *>(a.x) + (uint64_t)row * (a.embed / 8);
    float square = 0.0f;
    for (uint32_t i = lane; i < a.embed / 8; i += 32) {
        uint4 bits = x[i];
        const uint32_t *word = &bits.x;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float2 pair = mma::unpack(word[k]);
            square += pair.x * pair.x + pair.y * pair.y;
        }
    }
    square = warp_sum(square);
    if (lane == 0) {
        uint32_t candidate = a.batch.target_start[b] + row - first;
        a.candidate_row[candidate] = row;
        a.inverse_norm[candidate] = 1.0f / fmaxf(sqrtf(square), 1e-6f);
    }
}

/* Reads the hidden row once per output; writes the logits over PCIe. */
__global__ void __launch_bounds__(WARPS * 32) score_kernel(const __grid_constant__ hstu_head_args a)
{
    const uint32_t candidate = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (candidate >= *a.row_count)
        return;
    const float *hidden = a.scratch + (uint64_t)candidate * a.hidden_columns;
    const __nv_bfloat16 *weight = static_cast<const __nv_bfloat16 *>(a.weight2);
    for (uint32_t o = 0; o < a.outputs; o++) {
        float sum = 0.0f;
        for (uint32_t i = lane; i < a.hidden_columns; i += 32)
            sum += hidden[i] * __bfloat162float(weight[(uint64_t)i * a.outputs + o]);
        sum = warp_sum(sum);
        if (lane == 0)
            a.logits[(uint64_t)candidate * a.outputs + o] =
                sum + __bfloat162float(static_cast<const __nv_bfloat16 *>(a.bias2)[o]);
    }
}

} // namespace

int hstu_launch_head(const struct hstu_head_args *args, void *stream)
{
    cudaStream_t s = (cudaStream_t)stream;
    uint32_t blocks = (args->rows + WARPS - 1) / WARPS;
    find_kernel<<<blocks, WARPS * 32, 0, s>>>(*args);
    struct hstu_product_args product = {};
    product.a = args->x;
    product.b = args->weight1;
    product.extra = args->bias1;
    product.out = args->scratch;
    product.a_row = args->candidate_row;
    product.scale = args->inverse_norm;
    product.row_count = args->row_count;
    product.rows = args->rows;
    product.n = args->hidden_columns;
    product.k = args->embed;
    int status = hstu_launch_product(HSTU_PRODUCT_HEAD, &product, stream);
    if (status != SKV_OK)
        return status;
    score_kernel<<<blocks, WARPS * 32, 0, s>>>(*args);
    return hstu_cuda_check(cudaGetLastError(), "launching the head");
}
