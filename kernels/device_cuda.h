/* Inside the CUDA backend: the driver's functions, found at run time, and what the backend's files
 * share. libcuda is never linked: the same programs start on machines without a driver. */
#ifndef SKV_DEVICE_CUDA_H
#define SKV_DEVICE_CUDA_H

#include <cuda.h>
#include <cudaTypedefs.h>

#include "device_backend.h"

/* Every driver function in use, with the CUDA version (x 1000) whose signature we speak. */
#define SKV_CUDA_MAP(X)                                                                            \
    X(cuInit, 2000)                                                                                \
    X(cuDriverGetVersion, 2020)                                                                    \
    X(cuDeviceGetCount, 2000)                                                                      \
    X(cuDeviceGet, 2000)                                                                           \
    X(cuDeviceGetName, 2000)                                                                       \
    X(cuDeviceGetUuid, 11040)                                                                      \
    X(cuDeviceGetAttribute, 2000)                                                                  \
    X(cuDevicePrimaryCtxRetain, 7000)                                                              \
    X(cuDevicePrimaryCtxRelease, 11000)                                                            \
    X(cuCtxSetCurrent, 4000)                                                                       \
    X(cuMemGetInfo, 3020)                                                                          \
    X(cuMemGetAllocationGranularity, 10020)                                                        \
    X(cuMemAddressReserve, 10020)                                                                  \
    X(cuMemAddressFree, 10020)                                                                     \
    X(cuMemCreate, 10020)                                                                          \
    X(cuMemRelease, 10020)                                                                         \
    X(cuMemMap, 10020)                                                                             \
    X(cuMemUnmap, 10020)                                                                           \
    X(cuMemSetAccess, 10020)                                                                       \
    X(cuMemExportToShareableHandle, 10020)                                                         \
    X(cuMemImportFromShareableHandle, 10020)                                                       \
    X(cuMemAlloc, 3020)                                                                            \
    X(cuMemFree, 3020)                                                                             \
    X(cuIpcGetMemHandle, 4010)                                                                     \
    X(cuIpcOpenMemHandle, 11000)                                                                   \
    X(cuIpcCloseMemHandle, 4010)                                                                   \
    X(cuMemHostAlloc, 2020)                                                                        \
    X(cuMemFreeHost, 2000)                                                                         \
    X(cuMemHostRegister, 6050)                                                                     \
    X(cuMemHostUnregister, 4000)                                                                   \
    X(cuMemHostGetDevicePointer, 3020)                                                             \
    X(cuStreamCreate, 2000)                                                                        \
    X(cuStreamDestroy, 4000)                                                                       \
    X(cuStreamSynchronize, 2000)                                                                   \
    X(cuStreamWriteValue32, 11070)                                                                 \
    X(cuMemcpyAsync, 4000)                                                                         \
    X(cuEventCreate, 2000)                                                                         \
    X(cuEventDestroy, 4000)                                                                        \
    X(cuEventRecord, 2000)                                                                         \
    X(cuEventQuery, 2000)                                                                          \
    X(cuGetErrorName, 6000)                                                                        \
    X(cuGetErrorString, 6000)

/* CUDA 13 dropped failIdx from the 12.8 signature; only the new one is asked for. */
typedef CUresult (*skv_cuda_batch)(CUdeviceptr *dsts, CUdeviceptr *srcs, size_t *sizes,
                                   size_t count, CUmemcpyAttributes *attributes,
                                   size_t *attribute_starts, size_t attribute_count,
                                   CUstream stream);

struct skv_cuda_driver {
#define X(name, version) PFN_##name##_v##version name;
    SKV_CUDA_MAP(X)
#undef X
    skv_cuda_batch batch; /* cuMemcpyBatchAsync; NULL where the driver has none */
};

/* Filled once by skv_cuda_load(). */
extern struct skv_cuda_driver skv_cuda;

/* Opens libcuda and starts the driver, once a process. 0; or SKV_ENODEVICE (nothing there to be
 * used) or SKV_EDEVICE (there, but failing), with the reason. */
int skv_cuda_load(char *reason, size_t size);

/* "cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY, out of memory": the original text of an error. */
void skv_cuda_text(CUresult result, const char *what, char *text, size_t size);
/* Translates an error, and logs it: `what` is the function that failed. */
int skv_cuda_failed(CUresult result, const char *what);

/* status = SKV_CUDA(cuMemMap, address, ...): 0, or the translated error. */
#define SKV_CUDA(function, ...) skv_cuda_status(skv_cuda.function(__VA_ARGS__), #function)
static inline int skv_cuda_status(CUresult result, const char *what)
{
    return result == CUDA_SUCCESS ? 0 : skv_cuda_failed(result, what);
}

struct skv_cuda_device {
    struct skv_device device;
    CUdevice ordinal;
    CUcontext context; /* the primary one, retained */
    bool read_only_registration;
};

/* Makes the device's primary context current in the calling thread. */
int skv_cuda_enter(const struct skv_device *device);

int skv_cuda_stream_open(struct skv_device *device, struct skv_stream **out);
void skv_cuda_stream_close(struct skv_stream *stream);
int skv_cuda_stream_copy(struct skv_stream *stream, enum skv_direction direction,
                         const struct skv_copy *copies, uint32_t count);
int skv_cuda_stream_write32(struct skv_stream *stream, uint32_t *word, uintptr_t on_device,
                            uint32_t value);
int skv_cuda_stream_mark(struct skv_stream *stream, uint64_t *mark);
int skv_cuda_stream_query(struct skv_stream *stream, uint64_t mark);
int skv_cuda_stream_wait(struct skv_stream *stream, uint64_t mark, uint64_t deadline_ns);

#endif
