/* A plain matrix product on mma.sync, for what cuBLASLt does not do: the head's first layer, whose
 * rows are gathered and counted on the device, and every product where libcublasLt is missing.
 * Blocks of 64 x 64 outputs, four warps of 32 x 32, depth 64 at a time, three stages. Every
 * output element is summed in an order that depends on nothing but k.
 *
 * Moves a and b once per 64 columns or rows of the result, the result once. */
#include "cuda_kernels.h"

#include <cuda_runtime.h>

#include "cuda_check.h"
#include "mma.cuh"

namespace
{

constexpr int TILE = 64; /* rows, columns and depth of a block's step */
constexpr int THREADS = 128;
constexpr int CHUNKS = TILE / 8;
constexpr int TILE_BYTES = TILE * TILE * 2;
constexpr int STAGES = 3; /* 48 KiB: what a block has without asking */

/* Rows of `from` at row index `index(row)`, 64 columns from `column` on, to a swizzled tile. */
template <typename Index>
__device__ __forceinline__ void load_tile(uint32_t shared, const char *from, uint64_t row_bytes,
                                          uint32_t column, uint32_t rows, Index index)
{
#pragma unroll
    for (int i = 0; i < TILE * CHUNKS / THREADS; i++) {
        uint32_t row = (threadIdx.x + i * THREADS) / CHUNKS;
        uint32_t chunk = (threadIdx.x + i * THREADS) % CHUNKS;
        bool valid = row < rows;
        const char *at = from;
        if (valid)
            at += index(row) * row_bytes + (uint64_t)column * 2 + chunk * 16;
        mma::copy_async(shared + mma::tile_offset<CHUNKS>(row, chunk), at, valid);
    }
}

template <int PRODUCT>
__device__ __forceinline__ void store_pair(const hstu_product_args &a, uint32_t row,
                                           uint32_t column, float c0, float c1)
{
    const uint64_t at = (uint64_t)row * a.n + column;
    if (PRODUCT == HSTU_PRODUCT_RESIDUAL) {
        uint32_t *out = reinterpret_cast<uint32_t *>(static_cast<char *>(a.out) + at * 2);
        float2 old = mma::unpack(*out);
        *out = mma::pack(c0 + old.x, c1 + old.y);
        return;
    }
    float2 bias = mma::unpack(
        __ldg(reinterpret_cast<const uint32_t *>(static_cast<const char *>(a.extra) + column * 2)));
    if (PRODUCT == HSTU_PRODUCT_BIAS) {
        *reinterpret_cast<uint32_t *>(static_cast<char *>(a.out) + at * 2) =
            mma::pack(c0 + bias.x, c1 + bias.y);
    } else {
        float scale = a.scale[row];
        *reinterpret_cast<float2 *>(static_cast<float *>(a.out) + at) =
            make_float2(fmaxf(c0 * scale + bias.x, 0.0f), fmaxf(c1 * scale + bias.y, 0.0f));
    }
}

template <int PRODUCT>
__global__ void __launch_bounds__(THREADS)
    product_kernel(const __grid_constant__ hstu_product_args a)
{
    __shared__ __align__(128) char memory[STAGES * 2 * TILE_BYTES]; /* a, b */
    const uint32_t shared = mma::shared_address(memory);
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t row0 = blockIdx.y * TILE, column0 = blockIdx.x * TILE;
    const uint32_t rows = a.row_count ? min(*a.row_count, a.rows) : a.rows;
    if (row0 >= rows)
        return;
    const uint32_t valid = min(rows - row0, TILE);
    const uint32_t *a_row = a.a_row;
    auto load = [&](uint32_t step) {
        uint32_t buffer = shared + step % STAGES * 2 * TILE_BYTES;
        load_tile(buffer, static_cast<const char *>(a.a), (uint64_t)a.k * 2, step * TILE, valid,
                  [&](uint32_t row) -> uint64_t {
                      return a_row ? __ldg(a_row + row0 + row) : row0 + row;
                  });
        load_tile(buffer + TILE_BYTES, static_cast<const char *>(a.b), (uint64_t)a.n * 2, column0,
                  TILE, [&](uint32_t row) -> uint64_t { return step * TILE + row; });
    };
    const uint32_t warp_row = warp / 2 * 32, warp_column = warp % 2 * 32;
    float c[2][4][4] = {};
    const uint32_t steps = a.k / TILE;
    for (uint32_t step = 0; step < STAGES - 1; step++) {
        if (step < steps)
            load(step);
        mma::copy_commit();
    }
    for (uint32_t step = 0; step < steps; step++) {
        mma::copy_wait<STAGES - 2>();
        __syncthreads(); /* this stage is here; the one before it is read */
        if (step + STAGES - 1 < steps)
            load(step + STAGES - 1);
        mma::copy_commit(); /* empty at the end: the count stays right */
        const uint32_t ta = shared + step % STAGES * 2 * TILE_BYTES, tb = ta + TILE_BYTES;
#pragma unroll
        for (int k = 0; k < TILE / 16; k++) {
            uint32_t x[2][4], y[2][4];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                mma::load4(x[i], ta + mma::tile_offset<CHUNKS>(warp_row + i * 16 + lane % 16,
                                                               k * 2 + lane / 16));
                mma::load4_transposed(
                    y[i], tb + mma::tile_offset<CHUNKS>(k * 16 + lane % 16,
                                                        warp_column / 8 + i * 2 + lane / 16));
            }
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    mma::multiply(c[i][j], x[i], y[j / 2][j % 2 * 2], y[j / 2][j % 2 * 2 + 1]);
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t row = row0 + warp_row + i * 16 + half * 8 + lane / 4;
            if (row >= rows)
                continue;
#pragma unroll
            for (int j = 0; j < 4; j++)
                store_pair<PRODUCT>(a, row, column0 + warp_column + j * 8 + lane % 4 * 2,
                                    c[i][j][half * 2], c[i][j][half * 2 + 1]);
        }
}

} // namespace

int hstu_launch_product(enum hstu_product product, const struct hstu_product_args *args,
                        void *stream)
{
    dim3 grid(args->n / TILE, (args->rows + TILE - 1) / TILE);
    cudaStream_t s = (cudaStream_t)stream;
    switch (product) {
    case HSTU_PRODUCT_BIAS:
        product_kernel<HSTU_PRODUCT_BIAS><<<grid, THREADS, 0, s>>>(*args);
        break;
    case HSTU_PRODUCT_RESIDUAL:
        product_kernel<HSTU_PRODUCT_RESIDUAL><<<grid, THREADS, 0, s>>>(*args);
        break;
    case HSTU_PRODUCT_HEAD:
        product_kernel<HSTU_PRODUCT_HEAD><<<grid, THREADS, 0, s>>>(*args);
        break;
    }
    return hstu_cuda_check(cudaGetLastError(), "launching a product on mma.sync");
}
