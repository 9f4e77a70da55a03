/* The CUDA backend, through the driver API: the primary context, so that it shares one with
 * whatever framework is in the process; pools of cuMemCreate extents behind POSIX fds, or one
 * cuMemAlloc behind an IPC handle; host memory registered for the copy engines.
 *
 * Nothing here launches a kernel, a memset or a copy within the device: those would wait for a time
 * slice of the SMs while another process computes, copy engines and stream writes do not. Every
 * call makes the context current in its thread first. Streams are in device_cuda_stream.c. */
#include "device_cuda.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kcmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "log.h"

static struct skv_cuda_device *cuda_of(const struct skv_device *device)
{
    return (struct skv_cuda_device *)device;
}

int skv_cuda_enter(const struct skv_device *device)
{
    return SKV_CUDA(cuCtxSetCurrent, cuda_of(device)->context);
}

/* ---- opening ---- */

static bool has_uuid(CUdevice ordinal, const uint8_t uuid[16])
{
    CUuuid own;
    return skv_cuda.cuDeviceGetUuid(&own, ordinal) == CUDA_SUCCESS &&
           memcmp(own.bytes, uuid, sizeof own.bytes) == 0;
}

static int find_device(struct skv_device_query *query, CUdevice *ordinal)
{
    int count = 0;
    CUresult result = skv_cuda.cuDeviceGetCount(&count);
    if (result != CUDA_SUCCESS) {
        skv_cuda_text(result, "cuDeviceGetCount", query->reason, sizeof query->reason);
        return SKV_EDEVICE;
    }
    if (!query->uuid) {
        if (query->ordinal < count && skv_cuda.cuDeviceGet(ordinal, query->ordinal) == CUDA_SUCCESS)
            return 0;
        snprintf(query->reason, sizeof query->reason, "no GPU %d, there are %d", query->ordinal,
                 count);
        return SKV_ENODEVICE;
    }
    for (int i = 0; i < count; i++)
        if (skv_cuda.cuDeviceGet(ordinal, i) == CUDA_SUCCESS && has_uuid(*ordinal, query->uuid))
            return 0;
    const uint8_t *u = query->uuid;
    snprintf(query->reason, sizeof query->reason,
             "GPU-%02x%02x%02x%02x-%02x%02x-... is not among the %d that this process sees", u[0],
             u[1], u[2], u[3], u[4], u[5], count);
    return SKV_ENODEVICE;
}

static int attribute(CUdevice ordinal, CUdevice_attribute which)
{
    int value = 0;
    skv_cuda.cuDeviceGetAttribute(&value, which, ordinal);
    return value;
}

static CUmemAllocationProp extent_properties(CUdevice ordinal)
{
    return (CUmemAllocationProp){
        .type = CU_MEM_ALLOCATION_TYPE_PINNED,
        .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
        .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = ordinal},
    };
}

static void describe(struct skv_cuda_device *cuda)
{
    struct skv_device_info *info = &cuda->device.info;
    size_t free_bytes = 0, total_bytes = 0;
    CUuuid uuid = {{0}};
    info->kind = SKV_DEVICE_CUDA;
    info->ordinal = cuda->ordinal;
    skv_cuda.cuDeviceGetName(info->name, sizeof info->name, cuda->ordinal);
    skv_cuda.cuDeviceGetUuid(&uuid, cuda->ordinal);
    memcpy(info->uuid, uuid.bytes, sizeof info->uuid);
    skv_cuda.cuMemGetInfo(&free_bytes, &total_bytes);
    info->total_bytes = total_bytes;
    info->mps = attribute(cuda->ordinal, CU_DEVICE_ATTRIBUTE_MPS_ENABLED) != 0;
    cuda->read_only_registration =
        attribute(cuda->ordinal, CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED) != 0;
}

static void cuda_close(struct skv_device *device)
{
    struct skv_cuda_device *cuda = cuda_of(device);
    skv_cuda.cuCtxSetCurrent(NULL);
    skv_cuda.cuDevicePrimaryCtxRelease(cuda->ordinal);
    free(cuda);
}

static int cuda_open(struct skv_device_query *query, struct skv_device **out)
{
    int status = skv_cuda_load(query->reason, sizeof query->reason);
    if (status)
        return status;
    CUdevice ordinal;
    status = find_device(query, &ordinal);
    if (status)
        return status;
    struct skv_cuda_device *cuda = calloc(1, sizeof *cuda);
    if (!cuda) {
        snprintf(query->reason, sizeof query->reason, "out of memory");
        return SKV_ENOMEM;
    }
    cuda->ordinal = ordinal;
    CUresult result = skv_cuda.cuDevicePrimaryCtxRetain(&cuda->context, ordinal);
    if (result != CUDA_SUCCESS) {
        skv_cuda_text(result, "cuDevicePrimaryCtxRetain", query->reason, sizeof query->reason);
        free(cuda);
        return result == CUDA_ERROR_OUT_OF_MEMORY ? SKV_ENOMEM : SKV_EDEVICE;
    }
    size_t granularity = SKV_GRANULARITY;
    CUmemAllocationProp properties = extent_properties(ordinal);
    result = skv_cuda.cuCtxSetCurrent(cuda->context);
    if (result == CUDA_SUCCESS)
        result = skv_cuda.cuMemGetAllocationGranularity(&granularity, &properties,
                                                        CU_MEM_ALLOC_GRANULARITY_MINIMUM);
    if (result != CUDA_SUCCESS || SKV_GRANULARITY % granularity) {
        skv_cuda_text(result, "virtual memory management", query->reason, sizeof query->reason);
        cuda_close(&cuda->device);
        return SKV_EDEVICE;
    }
    describe(cuda);
    *out = &cuda->device;
    return 0;
}

/* ---- pools ---- */

static int cuda_reserve(struct skv_device *device, uint64_t bytes, void **address)
{
    CUdeviceptr range = 0;
    int status = skv_cuda_enter(device);
    if (status == 0)
        status = SKV_CUDA(cuMemAddressReserve, &range, bytes, 0, 0, 0);
    if (status == 0)
        *address = (void *)range;
    return status;
}

static void cuda_unreserve(struct skv_device *device, void *address, uint64_t bytes)
{
    if (skv_cuda_enter(device) == 0)
        SKV_CUDA(cuMemAddressFree, (CUdeviceptr)address, bytes);
}

static int cuda_extent_create(struct skv_device *device, void *address, uint64_t bytes, int *fd)
{
    CUmemAllocationProp properties = extent_properties(cuda_of(device)->ordinal);
    CUmemGenericAllocationHandle extent;
    int status = skv_cuda_enter(device);
    if (status == 0)
        status = SKV_CUDA(cuMemCreate, &extent, bytes, &properties, 0);
    if (status)
        return status;
    int file = -1;
    status = SKV_CUDA(cuMemExportToShareableHandle, &file, extent,
                      CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
    if (status == 0) {
        fcntl(file, F_SETFD, FD_CLOEXEC);
        status = SKV_CUDA(cuMemMap, (CUdeviceptr)address, bytes, 0, extent, 0);
        if (status)
            close(file);
    }
    /* From here the mapping and the fd keep the memory. */
    SKV_CUDA(cuMemRelease, extent);
    if (status == 0)
        *fd = file;
    return status;
}

static int cuda_extent_import(struct skv_device *device, void *address, uint64_t bytes, int fd,
                              uint64_t *kept)
{
    CUmemGenericAllocationHandle extent;
    int status = skv_cuda_enter(device);
    if (status == 0)
        status = SKV_CUDA(cuMemImportFromShareableHandle, &extent, (void *)(uintptr_t)fd,
                          CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    if (status)
        return status;
    status = SKV_CUDA(cuMemMap, (CUdeviceptr)address, bytes, 0, extent, 0);
    if (status == 0 && kept)
        *kept = extent;
    else
        SKV_CUDA(cuMemRelease, extent);
    return status;
}

static void cuda_extent_release(struct skv_device *device, uint64_t kept)
{
    if (skv_cuda_enter(device) == 0)
        SKV_CUDA(cuMemRelease, kept);
}

static void cuda_extent_unmap(struct skv_device *device, void *address, uint64_t bytes)
{
    if (skv_cuda_enter(device) == 0)
        SKV_CUDA(cuMemUnmap, (CUdeviceptr)address, bytes);
}

static int cuda_range_access(struct skv_device *device, void *address, uint64_t bytes,
                             bool writable)
{
    CUmemAccessDesc access = {
        .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = cuda_of(device)->ordinal},
        .flags = writable ? CU_MEM_ACCESS_FLAGS_PROT_READWRITE : CU_MEM_ACCESS_FLAGS_PROT_READ,
    };
    int status = skv_cuda_enter(device);
    return status ? status : SKV_CUDA(cuMemSetAccess, (CUdeviceptr)address, bytes, &access, 1);
}

static int cuda_view_map(struct skv_device *device, void *address, uint64_t bytes, uint64_t kept)
{
    int status = skv_cuda_enter(device);
    if (status == 0)
        status = SKV_CUDA(cuMemMap, (CUdeviceptr)address, bytes, 0, kept, 0);
    if (status)
        return status;
    status = cuda_range_access(device, address, bytes, true);
    if (status)
        SKV_CUDA(cuMemUnmap, (CUdeviceptr)address, bytes);
    return status;
}

/* The driver's fds are all of one inode; what tells them apart is the open file behind them. Where
 * kcmp is forbidden an import into its own process is not noticed, and works. */
static bool cuda_extent_same(int fd, int other)
{
    pid_t self = getpid();
    return syscall(SYS_kcmp, self, self, KCMP_FILE, (unsigned long)fd, (unsigned long)other) == 0;
}

static int cuda_ipc_create(struct skv_device *device, uint64_t bytes, uint8_t ipc[64],
                           void **address)
{
    CUdeviceptr memory;
    CUipcMemHandle handle;
    _Static_assert(sizeof handle == 64, "the IPC handle travels in 64 bytes");
    int status = skv_cuda_enter(device);
    if (status == 0)
        status = SKV_CUDA(cuMemAlloc, &memory, bytes);
    if (status)
        return status;
    status = SKV_CUDA(cuIpcGetMemHandle, &handle, memory);
    if (status) {
        SKV_CUDA(cuMemFree, memory);
        return status;
    }
    memcpy(ipc, &handle, sizeof handle);
    *address = (void *)memory;
    return 0;
}

static void cuda_ipc_free(struct skv_device *device, void *address)
{
    if (skv_cuda_enter(device) == 0)
        SKV_CUDA(cuMemFree, (CUdeviceptr)address);
}

static int cuda_ipc_open(struct skv_device *device, const uint8_t ipc[64], void **address)
{
    CUdeviceptr memory;
    CUipcMemHandle handle;
    memcpy(&handle, ipc, sizeof handle);
    int status = skv_cuda_enter(device);
    if (status == 0)
        status = SKV_CUDA(cuIpcOpenMemHandle, &memory, handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
    if (status == 0)
        *address = (void *)memory;
    return status;
}

static void cuda_ipc_close(struct skv_device *device, void *address)
{
    if (skv_cuda_enter(device) == 0)
        SKV_CUDA(cuIpcCloseMemHandle, (CUdeviceptr)address);
}

/* ---- memory ---- */

static int cuda_memory_alloc(struct skv_device *device, uint64_t bytes, void **address)
{
    CUdeviceptr memory;
    int status = skv_cuda_enter(device);
    if (status == 0)
        status = SKV_CUDA(cuMemAlloc, &memory, bytes);
    if (status == 0)
        *address = (void *)memory;
    return status;
}

static void cuda_memory_free(struct skv_device *device, void *address, uint64_t bytes)
{
    (void)bytes;
    cuda_ipc_free(device, address);
}

static uint64_t cuda_available(struct skv_device *device)
{
    size_t free_bytes = 0, total_bytes = 0;
    if (skv_cuda_enter(device) != 0 || SKV_CUDA(cuMemGetInfo, &free_bytes, &total_bytes) != 0)
        return 0;
    return free_bytes;
}

static int on_device_address(void *address, uintptr_t *on_device)
{
    CUdeviceptr mapped;
    int status = SKV_CUDA(cuMemHostGetDevicePointer, &mapped, address, 0);
    if (status == 0)
        *on_device = (uintptr_t)mapped;
    return status;
}

static int cuda_pinned_alloc(struct skv_device *device, uint64_t bytes, void **address,
                             uintptr_t *on_device)
{
    void *memory;
    int status = skv_cuda_enter(device);
    if (status == 0)
        status = SKV_CUDA(cuMemHostAlloc, &memory, bytes,
                          CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP);
    if (status)
        return status;
    status = on_device_address(memory, on_device);
    if (status)
        SKV_CUDA(cuMemFreeHost, memory);
    else
        *address = memory;
    return status;
}

static void cuda_pinned_free(struct skv_device *device, void *address, uint64_t bytes)
{
    (void)bytes;
    if (skv_cuda_enter(device) == 0)
        SKV_CUDA(cuMemFreeHost, address);
}

static int cuda_host_register(struct skv_device *device, void *address, uint64_t bytes,
                              bool read_only, uintptr_t *on_device)
{
    unsigned flags = CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP |
                     (read_only ? CU_MEMHOSTREGISTER_READ_ONLY : 0);
    if (read_only && !cuda_of(device)->read_only_registration) {
        skv_error("%s cannot register memory read-only", device->info.name);
        return SKV_ENOTSUP;
    }
    int status = skv_cuda_enter(device);
    if (status == 0)
        status = SKV_CUDA(cuMemHostRegister, address, bytes, flags);
    if (status)
        return status;
    status = on_device_address(address, on_device);
    if (status)
        SKV_CUDA(cuMemHostUnregister, address);
    return status;
}

static int cuda_host_unregister(struct skv_device *device, void *address)
{
    int status = skv_cuda_enter(device);
    return status ? status : SKV_CUDA(cuMemHostUnregister, address);
}

const struct skv_backend skv_backend_cuda = {
    .name = "cuda",
    .open = cuda_open,
    .close = cuda_close,
    .reserve = cuda_reserve,
    .unreserve = cuda_unreserve,
    .extent_create = cuda_extent_create,
    .extent_import = cuda_extent_import,
    .extent_release = cuda_extent_release,
    .view_map = cuda_view_map,
    .extent_unmap = cuda_extent_unmap,
    .range_access = cuda_range_access,
    .extent_same = cuda_extent_same,
    .ipc_create = cuda_ipc_create,
    .ipc_free = cuda_ipc_free,
    .ipc_open = cuda_ipc_open,
    .ipc_close = cuda_ipc_close,
    .memory_alloc = cuda_memory_alloc,
    .memory_free = cuda_memory_free,
    .memory_available = cuda_available,
    .pinned_alloc = cuda_pinned_alloc,
    .pinned_free = cuda_pinned_free,
    .host_register = cuda_host_register,
    .host_unregister = cuda_host_unregister,
    .stream_open = skv_cuda_stream_open,
    .stream_close = skv_cuda_stream_close,
    .stream_copy = skv_cuda_stream_copy,
    .stream_write32 = skv_cuda_stream_write32,
    .stream_mark = skv_cuda_stream_mark,
    .stream_query = skv_cuda_stream_query,
    .stream_wait = skv_cuda_stream_wait,
};
