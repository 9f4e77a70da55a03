/* The host backend: device memory is shared memory, so that everything but speed can be tried on
 * any machine.
 *
 * An extent is a memfd, sealed at its size: whoever imports it cannot be killed by a truncation.
 * Its memory is taken when it is touched first, so creating a pool compares with what is available
 * and then costs nothing. Registering memory pins nothing; it only checks, as CUDA would, that the
 * memory is mapped and may be used so. Streams are in device_host_stream.c. */
#include "device_host.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "log.h"

#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

/* errno to skv_status, logged: `what` failed. */
static int failed(const char *what)
{
    int error = errno;
    skv_error("host device: %s: %s", what, strerror(error));
    switch (error) {
    case ENOMEM:
    case EMFILE:
    case ENFILE:
        return SKV_ENOMEM;
    case EINVAL:
    case EBADF:
        return SKV_EINVAL;
    case EPERM:
    case EACCES:
        return SKV_EPERM;
    default:
        return SKV_EDEVICE;
    }
}

/* ---- opening ---- */

/* A line of /proc/meminfo, in bytes; 0 when it is not there. */
static uint64_t meminfo_bytes(const char *name)
{
    char line[128];
    unsigned long long kib = 0;
    FILE *file = fopen("/proc/meminfo", "re");
    while (file && fgets(line, sizeof line, file))
        if (strncmp(line, name, strlen(name)) == 0) {
            sscanf(line + strlen(name), ": %llu", &kib);
            break;
        }
    if (file)
        fclose(file);
    return kib * 1024;
}

/* The boot id: one host, and one life of it. All zero where the kernel gives none. false, with
 * errno: it cannot be read now, and another process may read it. */
static bool boot_uuid(uint8_t uuid[16])
{
    char text[64] = "";
    FILE *file = fopen("/proc/sys/kernel/random/boot_id", "re");
    bool known = file ? fgets(text, sizeof text, file) != NULL : errno == ENOENT;
    int error = errno;
    if (file)
        fclose(file);
    errno = error;
    if (!known)
        return false;
    memset(uuid, 0, 16);
    unsigned digits = 0;
    for (const char *at = text; *at && digits < 32; at++) {
        unsigned value;
        if (sscanf((char[]){*at, '\0'}, "%x", &value) != 1)
            continue; /* a dash */
        uuid[digits / 2] |= (uint8_t)(value << (digits % 2 ? 0 : 4));
        digits++;
    }
    return true;
}

static uint64_t host_available(struct skv_device *device)
{
    (void)device;
    uint64_t bytes = meminfo_bytes("MemAvailable");
    return bytes ? bytes : UINT64_MAX; /* no such line: the kernel decides */
}

static int host_open(struct skv_device_query *query, struct skv_device **out)
{
    uint8_t uuid[16];
    if (!boot_uuid(uuid)) {
        snprintf(query->reason, sizeof query->reason, "its boot id cannot be read: %s",
                 strerror(errno));
        return SKV_ENODEVICE;
    }
    if (query->uuid && memcmp(query->uuid, uuid, sizeof uuid) != 0) {
        snprintf(query->reason, sizeof query->reason, "it is another machine, or another boot");
        return SKV_ENODEVICE;
    }
    if (query->ordinal != 0) {
        snprintf(query->reason, sizeof query->reason, "there is one host");
        return SKV_ENODEVICE;
    }
    struct skv_host_device *host = calloc(1, sizeof *host);
    if (!host) {
        snprintf(query->reason, sizeof query->reason, "out of memory");
        return SKV_ENOMEM;
    }
    struct skv_device_info *info = &host->device.info;
    info->kind = SKV_DEVICE_HOST;
    snprintf(info->name, sizeof info->name, "host");
    memcpy(info->uuid, uuid, sizeof uuid);
    info->total_bytes = meminfo_bytes("MemTotal");
    info->mps = getenv("SIDEKV_TEST_MPS") != NULL; /* for tests: as if it were so */
    host->hold = getenv("SIDEKV_TEST_COPY_HOLD");
    *out = &host->device;
    return 0;
}

static void host_close(struct skv_device *device)
{
    free(device);
}

/* ---- pools ---- */

static int host_reserve(struct skv_device *device, uint64_t bytes, void **address)
{
    (void)device;
    void *range = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED)
        return failed("reserving an address range");
    *address = range;
    return 0;
}

static void host_unreserve(struct skv_device *device, void *address, uint64_t bytes)
{
    (void)device;
    munmap(address, bytes);
}

static int map_shared(void *address, uint64_t bytes, int fd, bool writable)
{
    int access = PROT_READ | (writable ? PROT_WRITE : 0);
    void *mapped = mmap(address, bytes, access, MAP_SHARED | MAP_FIXED, fd, 0);
    return mapped == MAP_FAILED ? failed("mapping an extent") : 0;
}

static int host_extent_create(struct skv_device *device, void *address, uint64_t bytes, int *fd)
{
    (void)device;
    int file = memfd_create("sidekv-pool", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (file < 0)
        return failed("memfd_create");
    int status = 0;
    if (ftruncate(file, (off_t)bytes) != 0)
        status = failed("sizing an extent");
    else if (fcntl(file, F_ADD_SEALS, SEALS) != 0)
        status = failed("sealing an extent");
    else
        status = map_shared(address, bytes, file, true);
    if (status)
        close(file);
    else
        *fd = file;
    return status;
}

static int host_extent_import(struct skv_device *device, void *address, uint64_t bytes, int fd,
                              uint64_t *kept)
{
    (void)device;
    struct stat file;
    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0 || fstat(fd, &file) != 0)
        return failed("an extent that is no memfd");
    if ((seals & SEALS) != SEALS || (uint64_t)file.st_size != bytes) {
        skv_error("host device: an extent of %lld bytes with seals %#x is refused: want %llu, %#x",
                  (long long)file.st_size, (unsigned)seals, (unsigned long long)bytes,
                  (unsigned)SEALS);
        return SKV_EINVAL;
    }
    if (!kept)
        return map_shared(address, bytes, fd, true);
    int own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (own < 0)
        return failed("keeping an extent's descriptor");
    int status = map_shared(address, bytes, own, false);
    if (status)
        close(own);
    else
        *kept = (uint64_t)own;
    return status;
}

static void host_extent_release(struct skv_device *device, uint64_t kept)
{
    (void)device;
    close((int)kept);
}

static int host_view_map(struct skv_device *device, void *address, uint64_t bytes, uint64_t kept)
{
    (void)device;
    return map_shared(address, bytes, (int)kept, true);
}

static void host_extent_unmap(struct skv_device *device, void *address, uint64_t bytes)
{
    (void)device;
    /* In one step: the range stays taken, nobody else's mapping can come in between. */
    if (mmap(address, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
             0) == MAP_FAILED)
        failed("unmapping an extent");
}

static int host_range_access(struct skv_device *device, void *address, uint64_t bytes,
                             bool writable)
{
    (void)device, (void)address, (void)bytes, (void)writable;
    return 0;
}

static bool host_extent_same(int fd, int other)
{
    struct stat a, b;
    return fstat(fd, &a) == 0 && fstat(other, &b) == 0 && a.st_dev == b.st_dev &&
           a.st_ino == b.st_ino;
}

/* ---- memory ---- */

static int host_memory_alloc(struct skv_device *device, uint64_t bytes, void **address)
{
    (void)device;
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return failed("allocating memory");
    *address = memory;
    return 0;
}

static void host_memory_free(struct skv_device *device, void *address, uint64_t bytes)
{
    (void)device;
    munmap(address, bytes);
}

static int host_pinned_alloc(struct skv_device *device, uint64_t bytes, void **address,
                             uintptr_t *on_device)
{
    int status = host_memory_alloc(device, bytes, address);
    if (status == 0)
        *on_device = (uintptr_t)*address;
    return status;
}

/* Is all of [start, end) mapped, readable, and writable if asked? */
static bool usable(uintptr_t start, uintptr_t end, bool writable)
{
    char line[512];
    FILE *file = fopen("/proc/self/maps", "re");
    if (!file)
        return true; /* cannot tell */
    while (start < end && fgets(line, sizeof line, file)) {
        unsigned long from, to;
        char may_read, may_write;
        if (sscanf(line, "%lx-%lx %c%c", &from, &to, &may_read, &may_write) != 4 || to <= start)
            continue;
        if (from > start || may_read != 'r' || (writable && may_write != 'w'))
            break;
        start = to;
    }
    fclose(file);
    return start >= end;
}

static int host_register(struct skv_device *device, void *address, uint64_t bytes, bool read_only,
                         uintptr_t *on_device)
{
    (void)device;
    uintptr_t start = (uintptr_t)address;
    if (!usable(start, start + bytes, !read_only)) {
        skv_error("host device: registering %p, %llu bytes: not all of it is mapped for %s",
                  address, (unsigned long long)bytes, read_only ? "reading" : "writing");
        return SKV_EINVAL;
    }
    *on_device = start;
    return 0;
}

static int host_unregister(struct skv_device *device, void *address)
{
    (void)device, (void)address;
    return 0;
}

static void host_delay(struct skv_device *device, uint64_t delay_us)
{
    atomic_store(&((struct skv_host_device *)device)->delay_ns, delay_us * 1000);
}

const struct skv_backend skv_backend_host = {
    .name = "host",
    .open = host_open,
    .close = host_close,
    .reserve = host_reserve,
    .unreserve = host_unreserve,
    .extent_create = host_extent_create,
    .extent_import = host_extent_import,
    .extent_release = host_extent_release,
    .view_map = host_view_map,
    .extent_unmap = host_extent_unmap,
    .range_access = host_range_access,
    .extent_same = host_extent_same,
    .memory_alloc = host_memory_alloc,
    .memory_free = host_memory_free,
    .memory_available = host_available,
    .pinned_alloc = host_pinned_alloc,
    .pinned_free = host_memory_free,
    .host_register = host_register,
    .host_unregister = host_unregister,
    .stream_open = skv_host_stream_open,
    .stream_close = skv_host_stream_close,
    .stream_copy = skv_host_stream_copy,
    .stream_write32 = skv_host_stream_write32,
    .stream_mark = skv_host_stream_mark,
    .stream_query = skv_host_stream_query,
    .stream_wait = skv_host_stream_wait,
    .delay = host_delay,
};
