#include "cuda_check.h"

#include "log.h"
#include "sidekv.h"

int hstu_cuda_check(cudaError_t error, const char *what)
{
    if (error == cudaSuccess)
        return SKV_OK;
    skv_error("%s: %s", what, cudaGetErrorString(error));
    cudaGetLastError();
    if (error == cudaErrorMemoryAllocation)
        return SKV_ENOMEM;
    if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver)
        return SKV_ENODEVICE;
    return SKV_EDEVICE;
}
