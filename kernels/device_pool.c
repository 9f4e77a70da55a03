/* Pools: an address range, and equal extents mapped into it back to back, each behind an fd that
 * another process can map. The daemon creates, a worker imports. Sizes, fds and the refusals are
 * here; mapping one extent is the backend's.
 *
 * A pool imported read-only has a second range, for views: single extents mapped once more, to be
 * written.
 *
 * A range outlives its mapping: unmap and remap put another pool at the same address, so that
 * graphs captured on the old one stay good. Handles come from a socket, so they are checked like
 * any input. */
#include "device.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "device_backend.h"
#include "log.h"

/* lcm of a huge page size and the granularity stays far from overflow. */
#define PAGE_BYTES_MAX (UINT64_C(1) << 36)
#define POOL_BYTES_MAX (UINT64_C(1) << 46)

/* The pools that this process created: importing one of them here is refused. */
static pthread_mutex_t created_lock = PTHREAD_MUTEX_INITIALIZER;
static struct skv_pool *created_pools;

static uint64_t round_up(uint64_t value, uint64_t unit)
{
    return (value + unit - 1) / unit * unit;
}

static uint64_t least_common_multiple(uint64_t a, uint64_t b)
{
    uint64_t x = a, y = b;
    while (y) {
        uint64_t rest = x % y;
        x = y;
        y = rest;
    }
    return a / x * b;
}

static bool created_here(const struct skv_device *device, const struct skv_pool_handles *handles)
{
    bool found = false;
    pthread_mutex_lock(&created_lock);
    for (const struct skv_pool *pool = created_pools; pool && !found; pool = pool->next) {
        if (pool->pid != getpid() || pool->device->backend != device->backend ||
            pool->handles.export != handles->export)
            continue;
        if (handles->export == SKV_EXPORT_IPC)
            found = memcmp(pool->handles.ipc, handles->ipc, sizeof handles->ipc) == 0;
        else
            for (uint32_t i = 0; i < pool->handles.extents && !found; i++)
                found = device->backend->extent_same(pool->handles.fds[i], handles->fds[0]);
    }
    pthread_mutex_unlock(&created_lock);
    return found;
}

static void created_add(struct skv_pool *pool)
{
    pthread_mutex_lock(&created_lock);
    pool->next = created_pools;
    created_pools = pool;
    pthread_mutex_unlock(&created_lock);
}

static void created_remove(struct skv_pool *pool)
{
    pthread_mutex_lock(&created_lock);
    for (struct skv_pool **at = &created_pools; *at; at = &(*at)->next)
        if (*at == pool) {
            *at = pool->next;
            break;
        }
    pthread_mutex_unlock(&created_lock);
}

static void *extent_address(const struct skv_pool *pool, uint32_t extent)
{
    return (char *)pool->address + extent * pool->handles.extent_bytes;
}

static void unmap_extents(struct skv_pool *pool, uint32_t extents)
{
    while (extents-- > 0)
        pool->device->backend->extent_unmap(pool->device, extent_address(pool, extents),
                                            pool->handles.extent_bytes);
}

/* Copies may touch the pool from here on. */
static int admit(struct skv_pool *pool)
{
    uintptr_t start = (uintptr_t)pool->address;
    struct skv_region region = {.start = start,
                                .end = start + pool->handles.pool_bytes,
                                .read_only = pool->handles.read_only};
    int status = skv_region_add(pool->device, SKV_SIDE_DEVICE, region);
    if (status)
        return status;
    skv_region_ready(pool->device, SKV_SIDE_DEVICE, start, start);
    pool->mapped = true;
    return 0;
}

static int create_extents(struct skv_pool *pool)
{
    const struct skv_backend *backend = pool->device->backend;
    struct skv_pool_handles *handles = &pool->handles;
    int status = skv_fd_limit_raise(handles->extents);
    if (status)
        return status;
    handles->fds = malloc(handles->extents * sizeof *handles->fds);
    if (!handles->fds)
        return SKV_ENOMEM;
    status = backend->reserve(pool->device, handles->pool_bytes, &pool->address);
    if (status)
        goto fail;
    pool->reserved_bytes = handles->pool_bytes;
    uint32_t made = 0;
    while (made < handles->extents) {
        status = backend->extent_create(pool->device, extent_address(pool, made),
                                        handles->extent_bytes, &handles->fds[made]);
        if (status)
            goto unmap;
        made++;
    }
    status = backend->range_access(pool->device, pool->address, handles->pool_bytes, true);
    if (status == 0)
        status = admit(pool);
    if (status == 0)
        return 0;
unmap:
    unmap_extents(pool, made);
    while (made-- > 0)
        close(handles->fds[made]);
    backend->unreserve(pool->device, pool->address, pool->reserved_bytes);
fail:
    free(handles->fds);
    return status;
}

static int create_ipc(struct skv_pool *pool)
{
    const struct skv_backend *backend = pool->device->backend;
    if (!backend->ipc_create) {
        skv_error("device %s: no IPC handles here; export file descriptors", backend->name);
        return SKV_ENOTSUP;
    }
    int status = backend->ipc_create(pool->device, pool->handles.pool_bytes, pool->handles.ipc,
                                     &pool->address);
    if (status)
        return status;
    status = admit(pool);
    if (status)
        backend->ipc_free(pool->device, pool->address);
    return status;
}

static int create(struct skv_device *device, uint64_t bytes, uint64_t page_bytes,
                  enum skv_export export, uint32_t extents, struct skv_pool **out)
{
    if (!device || !out || bytes == 0 || bytes > POOL_BYTES_MAX || page_bytes == 0 ||
        page_bytes > PAGE_BYTES_MAX || (export != SKV_EXPORT_FD && export != SKV_EXPORT_IPC))
        return SKV_EINVAL;
    uint64_t unit = least_common_multiple(page_bytes, SKV_GRANULARITY);
    uint64_t extent = round_up(SKV_EXTENT_BYTES, unit);
    if (bytes < extent)
        extent = round_up(bytes, unit);
    if (bytes / extents < extent) /* rounded down, so that there are enough */
        extent = bytes / extents < unit ? unit : bytes / extents / unit * unit;
    uint64_t pool_bytes = round_up(bytes, export == SKV_EXPORT_FD ? extent : unit);

    uint64_t available = device->backend->memory_available(device);
    if (pool_bytes > available) {
        skv_error("a pool of %llu MiB: device %s has %llu MiB free of %llu",
                  (unsigned long long)(pool_bytes >> 20), device->info.name,
                  (unsigned long long)(available >> 20),
                  (unsigned long long)(device->info.total_bytes >> 20));
        return SKV_ENOMEM;
    }
    struct skv_pool *pool = calloc(1, sizeof *pool);
    if (!pool)
        return SKV_ENOMEM;
    pool->device = device;
    pool->page_bytes = page_bytes;
    pool->created = true;
    pool->pid = getpid();
    pool->handles.export = export;
    pool->handles.pool_bytes = pool_bytes;
    if (export == SKV_EXPORT_FD) {
        pool->handles.extent_bytes = extent;
        pool->handles.extents = (uint32_t)(pool_bytes / extent);
    }
    int status = export == SKV_EXPORT_FD ? create_extents(pool) : create_ipc(pool);
    if (status) {
        free(pool);
        return status;
    }
    atomic_fetch_add(&device->children, 1);
    created_add(pool);
    *out = pool;
    return 0;
}

int skv_pool_create(struct skv_device *device, uint64_t bytes, uint64_t page_bytes,
                    enum skv_export export, struct skv_pool **out)
{
    return create(device, bytes, page_bytes, export, 1, out);
}

int skv_pool_create_split(struct skv_device *device, uint64_t bytes, uint64_t page_bytes,
                          uint32_t extents, struct skv_pool **out)
{
    return extents ? create(device, bytes, page_bytes, SKV_EXPORT_FD, extents, out) : SKV_EINVAL;
}

/* What a peer sent: does it describe a pool of whole pages? */
static int check_handles(const struct skv_pool_handles *handles, uint64_t page_bytes)
{
    const struct skv_pool_handles *h = handles;
    const char *wrong = NULL;
    if (h->pool_bytes == 0 || h->pool_bytes > POOL_BYTES_MAX)
        wrong = "its size";
    else if (h->export == SKV_EXPORT_IPC && h->read_only)
        wrong = "an IPC handle cannot be mapped read-only";
    else if (h->export == SKV_EXPORT_IPC)
        wrong = h->extents || h->extent_bytes ? "extents along with an IPC handle" : NULL;
    else if (h->export != SKV_EXPORT_FD)
        wrong = "its kind of export";
    else if (h->extents == 0 || !h->fds || h->extent_bytes == 0 ||
             h->extent_bytes > h->pool_bytes || h->extent_bytes * h->extents != h->pool_bytes)
        wrong = "its extents";
    else if (h->extent_bytes % page_bytes || h->extent_bytes % SKV_GRANULARITY)
        wrong = "an extent that is not whole pages";
    if (!wrong)
        return 0;
    skv_error("a pool of %llu bytes in %u extents of %llu is refused: %s",
              (unsigned long long)h->pool_bytes, h->extents, (unsigned long long)h->extent_bytes,
              wrong);
    return SKV_EINVAL;
}

/* ---- views ---- */

static void *view_address(const struct skv_pool *pool, uint32_t extent)
{
    return (char *)pool->views + extent * pool->handles.extent_bytes;
}

/* Room for the views of a pool that is to be mapped read-only. */
static int views_open(struct skv_pool *pool, uint32_t extents)
{
    pool->extents = calloc(extents, sizeof *pool->extents);
    pool->viewed = calloc(extents, sizeof *pool->viewed);
    if (!pool->extents || !pool->viewed)
        return SKV_ENOMEM;
    return pool->views
               ? 0
               : pool->device->backend->reserve(pool->device, pool->reserved_bytes, &pool->views);
}

/* Nothing of the pool can be written any more; its range stays. `imported`: extents so far. */
static void views_close(struct skv_pool *pool, uint32_t imported)
{
    for (uint32_t i = 0; pool->extents && i < imported; i++) {
        skv_pool_view(pool, i, false);
        pool->device->backend->extent_release(pool->device, pool->extents[i]);
    }
    free(pool->extents);
    free(pool->viewed);
    pool->extents = NULL;
    pool->viewed = NULL;
}

int skv_pool_view(struct skv_pool *pool, uint32_t extent, bool on)
{
    if (!pool->viewed || extent >= pool->handles.extents)
        return SKV_EINVAL;
    if (pool->viewed[extent] == on)
        return 0;
    const struct skv_backend *backend = pool->device->backend;
    uint64_t bytes = pool->handles.extent_bytes;
    void *address = view_address(pool, extent);
    uintptr_t start = (uintptr_t)address;
    int status = 0;
    if (on) {
        struct skv_region region = {.start = start, .end = start + bytes};
        status = skv_region_add(pool->device, SKV_SIDE_DEVICE, region);
        if (status)
            return status;
        status = backend->view_map(pool->device, address, bytes, pool->extents[extent]);
    }
    if (on && status == 0) {
        skv_region_ready(pool->device, SKV_SIDE_DEVICE, start, start);
    } else {
        skv_region_remove(pool->device, SKV_SIDE_DEVICE, start);
        if (!on)
            backend->extent_unmap(pool->device, address, bytes);
    }
    pool->viewed[extent] = on && status == 0;
    return status;
}

void *skv_pool_write_address(const struct skv_pool *pool)
{
    return pool->handles.read_only ? pool->views : pool->address;
}

/* ---- importing ---- */

/* Maps the peer's extents into the pool's range. */
static int map_extents(struct skv_pool *pool, const struct skv_pool_handles *handles)
{
    const struct skv_backend *backend = pool->device->backend;
    uint32_t mapped = 0;
    int status = handles->read_only ? views_open(pool, handles->extents) : 0;
    pool->handles = *handles;
    pool->handles.fds = NULL; /* the caller's */
    while (status == 0 && mapped < handles->extents) {
        status = backend->extent_import(pool->device, extent_address(pool, mapped),
                                        handles->extent_bytes, handles->fds[mapped],
                                        pool->extents ? &pool->extents[mapped] : NULL);
        mapped += status == 0;
    }
    if (status == 0)
        status = backend->range_access(pool->device, pool->address, handles->pool_bytes,
                                       !handles->read_only);
    if (status == 0)
        status = admit(pool);
    if (status == 0)
        return 0;
    views_close(pool, mapped);
    unmap_extents(pool, mapped);
    return status;
}

static int import_ipc(struct skv_pool *pool, const struct skv_pool_handles *handles)
{
    const struct skv_backend *backend = pool->device->backend;
    if (!backend->ipc_open)
        return SKV_ENOTSUP;
    int status = backend->ipc_open(pool->device, handles->ipc, &pool->address);
    if (status)
        return status;
    pool->handles = *handles;
    pool->handles.fds = NULL;
    status = admit(pool);
    if (status)
        backend->ipc_close(pool->device, pool->address);
    return status;
}

static void unreserve(struct skv_pool *pool)
{
    const struct skv_backend *backend = pool->device->backend;
    if (pool->views)
        backend->unreserve(pool->device, pool->views, pool->reserved_bytes);
    if (pool->reserved_bytes)
        backend->unreserve(pool->device, pool->address, pool->reserved_bytes);
}

static int import_extents(struct skv_pool *pool, const struct skv_pool_handles *handles)
{
    const struct skv_backend *backend = pool->device->backend;
    int status = backend->reserve(pool->device, handles->pool_bytes, &pool->address);
    if (status)
        return status;
    pool->reserved_bytes = handles->pool_bytes;
    status = map_extents(pool, handles);
    if (status)
        unreserve(pool);
    return status;
}

int skv_pool_import(struct skv_device *device, const struct skv_pool_handles *handles,
                    uint64_t page_bytes, struct skv_pool **out)
{
    if (!device || !handles || !out || page_bytes == 0)
        return SKV_EINVAL;
    int status = check_handles(handles, page_bytes);
    if (status)
        return status;
    if (created_here(device, handles)) {
        skv_error("a pool cannot be imported in the process that created it");
        return SKV_EINVAL;
    }
    struct skv_pool *pool = calloc(1, sizeof *pool);
    if (!pool)
        return SKV_ENOMEM;
    pool->device = device;
    pool->page_bytes = page_bytes;
    pool->pid = getpid();
    status = handles->export == SKV_EXPORT_FD ? import_extents(pool, handles)
                                              : import_ipc(pool, handles);
    if (status) {
        free(pool);
        return status;
    }
    atomic_fetch_add(&device->children, 1);
    *out = pool;
    return 0;
}

int skv_pool_adopt(struct skv_device *device, const struct skv_pool_handles *handles,
                   uint64_t page_bytes, struct skv_pool **out)
{
    if (!handles || handles->export != SKV_EXPORT_FD)
        return SKV_EINVAL;
    struct skv_pool *pool;
    int status = skv_pool_import(device, handles, page_bytes, &pool);
    if (status)
        return status;
    pool->handles.fds = handles->fds;
    pool->created = true; /* as far as everybody else is concerned */
    created_add(pool);
    *out = pool;
    return 0;
}

void skv_pool_unmap(struct skv_pool *pool)
{
    const struct skv_backend *backend = pool->device->backend;
    if (!pool->mapped)
        return;
    skv_region_remove(pool->device, SKV_SIDE_DEVICE, (uintptr_t)pool->address);
    pool->mapped = false;
    views_close(pool, pool->handles.extents);
    if (pool->handles.export == SKV_EXPORT_FD)
        unmap_extents(pool, pool->handles.extents);
    else if (pool->created)
        backend->ipc_free(pool->device, pool->address);
    else
        backend->ipc_close(pool->device, pool->address);
}

static int remap_ipc(struct skv_pool *pool, const struct skv_pool_handles *handles)
{
    void *old = pool->address;
    int status = import_ipc(pool, handles);
    if (status || pool->address == old)
        return status;
    skv_pool_unmap(pool);
    pool->address = old;
    skv_warn("the new pool cannot have the old one's address: IPC handles choose their own");
    return SKV_ENOTSUP;
}

int skv_pool_remap(struct skv_pool *pool, const struct skv_pool_handles *handles)
{
    if (!handles || pool->created || pool->mapped || handles->export != pool->handles.export)
        return SKV_EINVAL;
    int status = check_handles(handles, pool->page_bytes);
    if (status)
        return status;
    if (created_here(pool->device, handles))
        return SKV_EINVAL;
    if (handles->export == SKV_EXPORT_IPC)
        return remap_ipc(pool, handles);
    if (handles->pool_bytes > pool->reserved_bytes) {
        skv_warn("the new pool has %llu MiB, the address range of the old one %llu",
                 (unsigned long long)(handles->pool_bytes >> 20),
                 (unsigned long long)(pool->reserved_bytes >> 20));
        return SKV_ENOTSUP;
    }
    return map_extents(pool, handles);
}

void skv_pool_close(struct skv_pool *pool)
{
    if (!pool || pool->pid != getpid())
        return; /* a forked child's copy: see device_backend.h */
    struct skv_device *device = pool->device;
    if (pool->created)
        created_remove(pool);
    skv_pool_unmap(pool);
    unreserve(pool);
    for (uint32_t i = 0; pool->created && i < pool->handles.extents; i++)
        close(pool->handles.fds[i]);
    free(pool->handles.fds);
    free(pool);
    atomic_fetch_sub(&device->children, 1);
}

void *skv_pool_address(const struct skv_pool *pool)
{
    return pool->address;
}

const struct skv_pool_handles *skv_pool_exported(const struct skv_pool *pool)
{
    return &pool->handles;
}
