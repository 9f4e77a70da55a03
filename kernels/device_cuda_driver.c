/* The way to libcuda: opened at run time, functions found by name and version, errors put into
 * words. A machine without a driver, or without a GPU, is not an error here, only an answer. */
#include "device_cuda.h"

#include <dlfcn.h>
#include <stdio.h>

#include "log.h"

struct skv_cuda_driver skv_cuda;

static pthread_once_t load_once = PTHREAD_ONCE_INIT;
static int load_status;
static char load_reason[256];

void skv_cuda_text(CUresult result, const char *what, char *text, size_t size)
{
    const char *name = NULL, *words = NULL;
    if (skv_cuda.cuGetErrorName)
        skv_cuda.cuGetErrorName(result, &name);
    if (skv_cuda.cuGetErrorString)
        skv_cuda.cuGetErrorString(result, &words);
    snprintf(text, size, "%s: %s (%d), %s", what, name ? name : "?", (int)result,
             words ? words : "?");
}

int skv_cuda_failed(CUresult result, const char *what)
{
    char text[256];
    skv_cuda_text(result, what, text, sizeof text);
    skv_error("%s", text);
    switch (result) {
    case CUDA_ERROR_OUT_OF_MEMORY:
        return SKV_ENOMEM;
    case CUDA_ERROR_INVALID_VALUE:
    case CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED:
    case CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED:
    case CUDA_ERROR_INVALID_HANDLE:
        return SKV_EINVAL;
    case CUDA_ERROR_NOT_SUPPORTED:
        return SKV_ENOTSUP;
    case CUDA_ERROR_NOT_PERMITTED:
        return SKV_EPERM;
    case CUDA_ERROR_NO_DEVICE:
    case CUDA_ERROR_INVALID_DEVICE:
        return SKV_ENODEVICE;
    default:
        return SKV_EDEVICE;
    }
}

/* A failing cuInit: is there nothing to be used, or is something broken? */
static int nothing_there(CUresult result)
{
    switch (result) {
    case CUDA_ERROR_NO_DEVICE:
    case CUDA_ERROR_STUB_LIBRARY:
    case CUDA_ERROR_SYSTEM_DRIVER_MISMATCH:
    case CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE:
    case CUDA_ERROR_OPERATING_SYSTEM:
    case CUDA_ERROR_UNKNOWN: /* no kernel module, no device nodes */
        return SKV_ENODEVICE;
    default:
        return SKV_EDEVICE;
    }
}

static void load(void)
{
    load_status = SKV_ENODEVICE;
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        snprintf(load_reason, sizeof load_reason, "%s", dlerror());
        return;
    }
    PFN_cuGetProcAddress_v12000 find =
        (PFN_cuGetProcAddress_v12000)dlsym(library, "cuGetProcAddress_v2");
    if (!find) {
        snprintf(load_reason, sizeof load_reason, "the driver is older than CUDA 12");
        return;
    }
    CUdriverProcAddressQueryResult found;
    void *function;
#define X(name, version)                                                                           \
    function = NULL;                                                                               \
    if (find(#name, &function, version, CU_GET_PROC_ADDRESS_DEFAULT, &found) != CUDA_SUCCESS ||    \
        !function) {                                                                               \
        snprintf(load_reason, sizeof load_reason, "the driver has no " #name);                     \
        return;                                                                                    \
    }                                                                                              \
    skv_cuda.name = (PFN_##name##_v##version)function;
    SKV_CUDA_MAP(X)
#undef X
    function = NULL;
    if (find("cuMemcpyBatchAsync", &function, 13000, CU_GET_PROC_ADDRESS_DEFAULT, &found) ==
        CUDA_SUCCESS)
        skv_cuda.batch = (skv_cuda_batch)function;

    CUresult result = skv_cuda.cuInit(0);
    if (result != CUDA_SUCCESS) {
        load_status = nothing_there(result);
        skv_cuda_text(result, "cuInit", load_reason, sizeof load_reason);
        return;
    }
    int version = 0;
    skv_cuda.cuDriverGetVersion(&version);
    skv_debug("CUDA driver %d.%d, batched copies: %s", version / 1000, version % 1000 / 10,
              skv_cuda.batch ? "yes" : "no");
    load_status = 0;
}

int skv_cuda_load(char *reason, size_t size)
{
    pthread_once(&load_once, load);
    if (load_status)
        snprintf(reason, size, "%s", load_reason);
    return load_status;
}
