/* CUDA's errors as ours. */
#ifndef HSTU_CUDA_CHECK_H
#define HSTU_CUDA_CHECK_H

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Logs an error, "WHAT: CUDA's words", and clears it unless it is the context's own: 0, SKV_ENOMEM,
 * SKV_ENODEVICE or SKV_EDEVICE. */
int hstu_cuda_check(cudaError_t error, const char *what);

#ifdef __cplusplus
}
#endif

#endif
