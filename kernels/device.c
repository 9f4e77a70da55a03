/* Opening a device: the table of backends, and the choice between them.
 *
 * "auto" takes the first GPU. It falls back to the host only when there is no driver or no GPU at
 * all: a GPU that is there but fails is an error, not a reason to serve from the CPU. */
#include "device.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "device_backend.h"
#include "log.h"

static const struct skv_backend *const backends[] = {
    [SKV_DEVICE_HOST] = &skv_backend_host,
    [SKV_DEVICE_CUDA] = &skv_backend_cuda,
};

static int open_with(const struct skv_backend *backend, struct skv_device_query *query,
                     struct skv_device **out)
{
    struct skv_device *device = NULL;
    int status = backend->open(query, &device);
    if (status)
        return status;
    device->backend = backend;
    device->pid = getpid();
    pthread_rwlock_init(&device->lock, NULL);
    *out = device;
    return 0;
}

static int open_auto(struct skv_device **out)
{
    struct skv_device_query query = {0};
    int status = open_with(&skv_backend_cuda, &query, out);
    if (status == 0) {
        skv_info("device auto: cuda:0, %s", (*out)->info.name);
        return 0;
    }
    if (status != SKV_ENODEVICE) {
        skv_error("device auto: there is a GPU, but it cannot be used: %s", query.reason);
        return status;
    }
    skv_info("device auto: the host, for want of a GPU (%s)", query.reason);
    status = open_with(&skv_backend_host, &query, out);
    if (status)
        skv_error("device auto: host: %s", query.reason);
    return status;
}

int skv_device_open(const char *name, struct skv_device **out)
{
    if (!name || !out)
        return SKV_EINVAL;
    if (strcmp(name, "auto") == 0)
        return open_auto(out);
    const struct skv_backend *backend = NULL;
    struct skv_device_query query = {0};
    for (size_t i = 0; i < sizeof backends / sizeof *backends; i++) {
        size_t length = strlen(backends[i]->name);
        if (strncmp(name, backends[i]->name, length) != 0)
            continue;
        char *end = (char *)name + length;
        if (*end == ':' && end[1] >= '0' && end[1] <= '9') {
            errno = 0;
            long ordinal = strtol(end + 1, &end, 10);
            query.ordinal = errno || ordinal > 1023 ? 1023 : (int)ordinal;
        }
        if (*end == '\0')
            backend = backends[i];
    }
    if (!backend) {
        skv_error("device '%s': want auto, host, cuda or cuda:N", name);
        return SKV_EINVAL;
    }
    int status = open_with(backend, &query, out);
    if (status)
        skv_error("device %s: %s", name, query.reason);
    return status;
}

int skv_device_open_uuid(enum skv_device_kind kind, const uint8_t uuid[16], struct skv_device **out)
{
    if ((unsigned)kind >= sizeof backends / sizeof *backends || !uuid || !out)
        return SKV_EINVAL;
    struct skv_device_query query = {.uuid = uuid};
    int status = open_with(backends[kind], &query, out);
    if (status)
        skv_error("the daemon's %s device: %s", backends[kind]->name, query.reason);
    return status;
}

bool skv_device_is_ours(const struct skv_device *device)
{
    return device->pid == getpid();
}

void skv_device_close(struct skv_device *device)
{
    if (!device)
        return;
    if (!skv_device_is_ours(device))
        return; /* the parent's; a child's copy of it goes with exec or exit */
    assert(atomic_load(&device->children) == 0 && "close pools and streams before their device");
    skv_regions_fini(device);
    pthread_rwlock_destroy(&device->lock);
    device->backend->close(device);
}

const struct skv_device_info *skv_device_info(const struct skv_device *device)
{
    return &device->info;
}

uint64_t skv_device_free_bytes(struct skv_device *device)
{
    return device->backend->memory_available(device);
}

void skv_device_delay(struct skv_device *device, uint64_t delay_us)
{
    if (device->backend->delay)
        device->backend->delay(device, delay_us);
}

int skv_fd_limit_raise(uint32_t more)
{
    /* What a daemon or worker holds besides: sockets, eventfds, files, the driver's own. */
    const rlim_t others = 512;
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0)
        return SKV_EIO;
    rlim_t wanted = more + others;
    if (limit.rlim_cur == RLIM_INFINITY || limit.rlim_cur >= wanted)
        return 0;
    if (limit.rlim_max != RLIM_INFINITY && limit.rlim_max < wanted) {
        skv_error("%u file descriptors for the pool: the hard limit of open files is %llu "
                  "(raise LimitNOFILE or ulimit -Hn)",
                  more, (unsigned long long)limit.rlim_max);
        return SKV_ENOSPC;
    }
    limit.rlim_cur = wanted;
    if (setrlimit(RLIMIT_NOFILE, &limit) != 0) {
        skv_error("raising RLIMIT_NOFILE to %llu: %s", (unsigned long long)wanted, strerror(errno));
        return SKV_EIO;
    }
    return 0;
}
