/* pull: the first node of every graph. Copies the batch from the pinned block to its fixed device
 * addresses and embeds the rows, so that a launch patches nothing. One warp a row; besides, the
 * first blocks together copy counts, page ids and work items, 16 bytes a thread.
 *
 * Moves over PCIe: 16 bytes a row, 4 a page, 48 a work item, and sizeof(struct hstu_counts); on the
 * device two table rows read and one row of x written per row. What counts on PCIe is the number of
 * requests: one of 128 bytes for a block's eight rows, full lines for the rest. (Loads marked
 * volatile go out lane by lane: 2 us a row.) */
#include "cuda_kernels.h"

#include <cuda_runtime.h>

#include "mma.cuh"
#include "token_mix.h"

namespace
{

constexpr int WARPS = 8;
constexpr int COPY_BLOCKS = 32; /* enough to hide PCIe's latency */

__device__ void copy16(void *to, const void *from, uint64_t bytes, uint32_t thread,
                       uint32_t threads)
{
    for (uint64_t i = thread; i < (bytes + 15) / 16; i += threads)
        static_cast<uint4 *>(to)[i] = static_cast<const uint4 *>(from)[i];
}

__global__ void __launch_bounds__(WARPS * 32) pull_kernel(const __grid_constant__ hstu_pull_args a)
{
    __shared__ uint4 shared_row[WARPS];
    __shared__ uint32_t shared_count[2];
    const uint32_t copy_blocks = min(gridDim.x, COPY_BLOCKS);
    if (threadIdx.x < WARPS && blockIdx.x * WARPS + threadIdx.x < a.rows)
        shared_row[threadIdx.x] =
            reinterpret_cast<const uint4 *>(a.row)[blockIdx.x * WARPS + threadIdx.x];
    if (blockIdx.x < copy_blocks && threadIdx.x == 32) {
        shared_count[0] = a.counts->pages;
        shared_count[1] = a.counts->work;
    }
    __syncthreads();
    if (blockIdx.x < copy_blocks) {
        const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
        const uint32_t threads = copy_blocks * blockDim.x;
        copy16(a.to_counts, a.counts, sizeof *a.counts, thread, threads);
        copy16(a.to_page, a.page, (uint64_t)shared_count[0] * 4, thread, threads);
        copy16(a.to_work, a.work, (uint64_t)shared_count[1] * sizeof *a.work, thread, threads);
    }
    const uint32_t row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= a.rows)
        return;
    const uint4 bits = shared_row[threadIdx.x / 32];
    const uint32_t position = bits.w & 0xffff, sequence = bits.w >> 16 & 0xff,
                   slices = bits.w >> 24;
    if (lane == 0) {
        a.to_row_sequence[row] = sequence == HSTU_ROW_PADDING ? UINT32_MAX : sequence;
        a.to_slot[row] = bits.z;
        a.to_slices[row] = slices;
    }
    if (sequence == HSTU_ROW_PADDING)
        return;
    const uint32_t token_row = hstu_mix_row((uint64_t)bits.y << 32 | bits.x, a.embedding_rows);
    const float scale = sqrtf((float)a.embed);
    const uint32_t chunks = a.embed / 8;
    const uint4 *e = static_cast<const uint4 *>(a.embedding) + (uint64_t)token_row * chunks;
    const uint4 *p = static_cast<const uint4 *>(a.position) + (uint64_t)position * chunks;
    uint4 *x = static_cast<uint4 *>(a.x) + (uint64_t)row * chunks;
    for (uint32_t i = lane; i < chunks; i += 32) {
        uint4 ei = __ldg(e + i), pi = __ldg(p + i), out;
        const uint32_t *ew = &ei.x, *pw = &pi.x;
        uint32_t *ow = &out.x;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float2 ef = mma::unpack(ew[k]), pf = mma::unpack(pw[k]);
            /* Not fused: the reference's bits. */
            ow[k] = mma::pack(__fadd_rn(__fmul_rn(ef.x, scale), pf.x),
                              __fadd_rn(__fmul_rn(ef.y, scale), pf.y));
        }
        x[i] = out;
    }
}

} // namespace

int hstu_launch_pull(const struct hstu_pull_args *args, void *stream)
{
    uint32_t blocks = (args->rows + WARPS - 1) / WARPS;
    pull_kernel<<<blocks, WARPS * 32, 0, (cudaStream_t)stream>>>(*args);
    return cudaGetLastError() == cudaSuccess ? SKV_OK : SKV_EDEVICE;
}
