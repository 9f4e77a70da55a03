/* For the kernels that go over whole rows of bf16, eight values (16 bytes) a thread at a time. */
#ifndef HSTU_ROWS_CUH
#define HSTU_ROWS_CUH

#include "cuda_kernels.h"

#include <cuda_runtime.h>

#include "cuda_check.h"
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

/* `early`: its blocks may start while the kernel before it ends. */
template <typename Args>
int launch(void (*kernel)(Args), uint32_t blocks, dim3 threads, const Args &args, bool early,
           void *stream)
{
    cudaLaunchAttribute attribute = mma::early_start();
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
    return hstu_cuda_check(e, "launching a kernel of rows");
}

} // namespace

#endif
