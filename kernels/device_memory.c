/* Which memory may take part in copies: two sorted tables a device, one of device memory (pools,
 * private allocations), one of host memory (pinned, registered). Every copy is looked up in both,
 * so that a wrong one is refused here, with a reason, on every backend alike.
 *
 * The backend's calls can take milliseconds (registering faults pages in), and the copy thread
 * must not wait for them: the lock covers the tables alone, and a region is in the table, not
 * ready, while its call runs. */
#include "device.h"

#include <stdlib.h>
#include <string.h>

#include "device_backend.h"
#include "log.h"

static struct skv_regions *table_of(struct skv_device *device, enum skv_side side)
{
    return side == SKV_SIDE_DEVICE ? &device->device_memory : &device->host_memory;
}

/* The index of the first region that ends after `address`. */
static uint32_t position(const struct skv_regions *table, uintptr_t address)
{
    uint32_t low = 0, high = table->count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (table->items[middle].end <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static bool contains(const struct skv_region *region, uintptr_t address, uint64_t bytes)
{
    return address >= region->start && address < region->end && bytes <= region->end - address;
}

/* The region that holds all of [address, address + bytes), ready; or NULL. *hint is where the last
 * search ended: copies come in runs. */
static const struct skv_region *find(const struct skv_regions *table, uintptr_t address,
                                     uint64_t bytes, uint32_t *hint)
{
    if (*hint >= table->count || !contains(&table->items[*hint], address, bytes))
        *hint = position(table, address);
    if (*hint >= table->count)
        return NULL;
    const struct skv_region *region = &table->items[*hint];
    return contains(region, address, bytes) && region->ready ? region : NULL;
}

static struct skv_region *starting_at(struct skv_regions *table, uintptr_t start)
{
    uint32_t at = position(table, start);
    return at < table->count && table->items[at].start == start ? &table->items[at] : NULL;
}

static int grow(struct skv_regions *table)
{
    if (table->count < table->capacity)
        return 0;
    uint32_t capacity = table->capacity ? 2 * table->capacity : 64;
    struct skv_region *items = realloc(table->items, capacity * sizeof *items);
    if (!items)
        return SKV_ENOMEM;
    table->items = items;
    table->capacity = capacity;
    return 0;
}

int skv_region_add(struct skv_device *device, enum skv_side side, struct skv_region region)
{
    struct skv_regions *table = table_of(device, side);
    int status = region.start < region.end ? 0 : SKV_EINVAL;
    pthread_rwlock_wrlock(&device->lock);
    uint32_t at = position(table, region.start);
    if (at < table->count && table->items[at].start < region.end)
        status = SKV_EINVAL; /* overlaps */
    if (status == 0)
        status = grow(table);
    if (status == 0) {
        region.ready = false;
        memmove(&table->items[at + 1], &table->items[at],
                (table->count - at) * sizeof *table->items);
        table->items[at] = region;
        table->count++;
    }
    pthread_rwlock_unlock(&device->lock);
    return status;
}

void skv_region_ready(struct skv_device *device, enum skv_side side, uintptr_t start,
                      uintptr_t on_device)
{
    pthread_rwlock_wrlock(&device->lock);
    struct skv_region *region = starting_at(table_of(device, side), start);
    if (region) {
        region->device = on_device;
        region->ready = true;
    }
    pthread_rwlock_unlock(&device->lock);
}

int skv_region_retire(struct skv_device *device, enum skv_side side, uintptr_t start, bool owned,
                      struct skv_region *was)
{
    pthread_rwlock_wrlock(&device->lock);
    struct skv_region *region = starting_at(table_of(device, side), start);
    int status = region && region->ready && region->owned == owned ? 0 : SKV_EINVAL;
    if (status == 0) {
        *was = *region;
        region->ready = false;
    }
    pthread_rwlock_unlock(&device->lock);
    return status;
}

void skv_region_remove(struct skv_device *device, enum skv_side side, uintptr_t start)
{
    struct skv_regions *table = table_of(device, side);
    pthread_rwlock_wrlock(&device->lock);
    struct skv_region *region = starting_at(table, start);
    if (region) {
        size_t after = (size_t)(table->items + table->count - (region + 1));
        memmove(region, region + 1, after * sizeof *region);
        table->count--;
    }
    pthread_rwlock_unlock(&device->lock);
}

int skv_copies_check(struct skv_device *device, enum skv_direction direction,
                     const struct skv_copy *copies, uint32_t count)
{
    const char *wrong = NULL;
    uint32_t i, device_hint = 0, host_hint = 0;
    pthread_rwlock_rdlock(&device->lock);
    for (i = 0; i < count; i++) {
        uintptr_t to = (uintptr_t)copies[i].dst, from = (uintptr_t)copies[i].src;
        bool up = direction == SKV_TO_DEVICE;
        const struct skv_region *on_device =
            find(&device->device_memory, up ? to : from, copies[i].bytes, &device_hint);
        const struct skv_region *on_host =
            find(&device->host_memory, up ? from : to, copies[i].bytes, &host_hint);
        if (copies[i].bytes == 0)
            wrong = "it has no bytes";
        else if (!on_device)
            wrong = "its device side is not within one pool";
        else if (up && on_device->read_only)
            wrong = "its target is mapped read-only";
        else if (!on_host)
            wrong = "its host side is not within one registration";
        else if (!up && on_host->read_only)
            wrong = "its target is registered read-only";
        if (wrong)
            break;
    }
    pthread_rwlock_unlock(&device->lock);
    if (!wrong)
        return 0;
    skv_error("copy %u of %u (%p from %p, %llu bytes) is refused: %s", i, count, copies[i].dst,
              copies[i].src, (unsigned long long)copies[i].bytes, wrong);
    return SKV_EINVAL;
}

int skv_region_address(struct skv_device *device, const void *address, uint64_t bytes,
                       bool for_writing, uintptr_t *on_device)
{
    uint32_t hint = 0;
    pthread_rwlock_rdlock(&device->lock);
    const struct skv_region *region = find(&device->host_memory, (uintptr_t)address, bytes, &hint);
    bool good = region && !(for_writing && region->read_only);
    if (good)
        *on_device = region->device + ((uintptr_t)address - region->start);
    pthread_rwlock_unlock(&device->lock);
    return good ? 0 : SKV_EINVAL;
}

void skv_regions_fini(struct skv_device *device)
{
    const struct skv_backend *backend = device->backend;
    for (uint32_t i = 0; i < device->host_memory.count; i++) {
        struct skv_region *region = &device->host_memory.items[i];
        if (region->owned)
            backend->pinned_free(device, (void *)region->start, region->end - region->start);
        else
            backend->host_unregister(device, (void *)region->start);
    }
    for (uint32_t i = 0; i < device->device_memory.count; i++) {
        struct skv_region *region = &device->device_memory.items[i];
        backend->memory_free(device, (void *)region->start, region->end - region->start);
    }
    free(device->host_memory.items);
    free(device->device_memory.items);
}

/* ---- what callers ask for ---- */

/* Enters memory that the backend has just given. It cannot overlap what is known, but the table may
 * fail to grow. */
static int adopt(struct skv_device *device, enum skv_side side, void *memory, uint64_t bytes,
                 uintptr_t on_device)
{
    uintptr_t start = (uintptr_t)memory;
    struct skv_region region = {.start = start, .end = start + bytes, .owned = true};
    int status = skv_region_add(device, side, region);
    if (status == 0)
        skv_region_ready(device, side, start, on_device);
    return status;
}

int skv_device_alloc(struct skv_device *device, uint64_t bytes, void **out)
{
    if (!device || !out || bytes == 0)
        return SKV_EINVAL;
    void *memory;
    int status = device->backend->memory_alloc(device, bytes, &memory);
    if (status)
        return status;
    status = adopt(device, SKV_SIDE_DEVICE, memory, bytes, (uintptr_t)memory);
    if (status)
        device->backend->memory_free(device, memory, bytes);
    else
        *out = memory;
    return status;
}

/* Takes memory out of `side`'s table for good, if it was given by us. */
static bool disown(struct skv_device *device, enum skv_side side, void *memory,
                   struct skv_region *was)
{
    if (skv_region_retire(device, side, (uintptr_t)memory, true, was) != 0) {
        skv_error("%p was not allocated here, or was freed before", memory);
        return false;
    }
    skv_region_remove(device, side, (uintptr_t)memory);
    return true;
}

void skv_device_free(struct skv_device *device, void *memory)
{
    struct skv_region was;
    if (!memory || !skv_device_is_ours(device))
        return;
    if (disown(device, SKV_SIDE_DEVICE, memory, &was))
        device->backend->memory_free(device, memory, was.end - was.start);
}

int skv_pinned_alloc(struct skv_device *device, uint64_t bytes, void **out)
{
    if (!device || !out || bytes == 0)
        return SKV_EINVAL;
    void *memory;
    uintptr_t on_device;
    bytes = (bytes + SKV_HOST_PAGE - 1) / SKV_HOST_PAGE * SKV_HOST_PAGE;
    int status = device->backend->pinned_alloc(device, bytes, &memory, &on_device);
    if (status)
        return status;
    status = adopt(device, SKV_SIDE_HOST, memory, bytes, on_device);
    if (status)
        device->backend->pinned_free(device, memory, bytes);
    else
        *out = memory;
    return status;
}

void skv_pinned_free(struct skv_device *device, void *memory)
{
    struct skv_region was;
    if (!memory || !skv_device_is_ours(device))
        return;
    if (disown(device, SKV_SIDE_HOST, memory, &was))
        device->backend->pinned_free(device, memory, was.end - was.start);
}

int skv_host_register(struct skv_device *device, void *memory, uint64_t bytes, bool read_only)
{
    uintptr_t start = (uintptr_t)memory, on_device;
    if (!device || !memory || bytes == 0 || start % SKV_HOST_PAGE || bytes % SKV_HOST_PAGE ||
        start + bytes < start) {
        skv_error("registering %p, %llu bytes: not whole pages", memory, (unsigned long long)bytes);
        return SKV_EINVAL;
    }
    struct skv_region region = {.start = start, .end = start + bytes, .read_only = read_only};
    int status = skv_region_add(device, SKV_SIDE_HOST, region);
    if (status == SKV_EINVAL)
        skv_error("registering %p, %llu bytes: some of it is registered already", memory,
                  (unsigned long long)bytes);
    if (status)
        return status;
    status = device->backend->host_register(device, memory, bytes, read_only, &on_device);
    if (status)
        skv_region_remove(device, SKV_SIDE_HOST, start);
    else
        skv_region_ready(device, SKV_SIDE_HOST, start, on_device);
    return status;
}

int skv_host_unregister(struct skv_device *device, void *memory)
{
    struct skv_region was;
    if (!device || !memory)
        return SKV_EINVAL;
    if (!skv_device_is_ours(device))
        return 0;
    int status = skv_region_retire(device, SKV_SIDE_HOST, (uintptr_t)memory, false, &was);
    if (status)
        return status;
    status = device->backend->host_unregister(device, memory);
    skv_region_remove(device, SKV_SIDE_HOST, was.start);
    return status;
}
