/* A session's life: what skv_open() takes in order, skv_close() gives back in reverse, and what
 * skv_reconnect() exchanges in between.
 *
 *   open:       options, gate rows -> attach
 *   attach:     handshake -> map session memory -> device -> pool -> watcher
 *   detach:     watcher joined -> views unmapped -> unmap -> pool unmapped, its address range kept
 *               -> fds closed; a pool that a keeper holds stays mapped: the next daemon has it too
 *   reconnect:  detach, then attach until it works or the time is over
 *   close:      detach -> pool, gates, device
 *
 * A failed attach detaches what it had; the handle stays lost and may try again. In a forked child
 * only skv_close() works, and it gives back fds and mappings, nothing of the device. */
#include "skv_session.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define OWNER_BYTES 4096u

/* ---- what lives as long as the handle ---- */

static int check_options(struct skv *skv, const struct skv_options *options)
{
    struct skv_options *o = &skv->options;
    *o = *options;
    const char *path = options->socket ? options->socket : getenv("SIDEKV_SOCKET");
    if (!path || !*path)
        path = SKV_DEFAULT_SOCKET;
    o->socket = NULL;
    if (strlen(path) >= sizeof skv->path) {
        skv_error("the socket's path is longer than %zu bytes: %s", sizeof skv->path - 1, path);
        return SKV_EINVAL;
    }
    memcpy(skv->path, path, strlen(path) + 1);

    if (!o->timeout_ms)
        o->timeout_ms = SKV_DEFAULT_TIMEOUT_MS;
    if (!o->spin_us && !o->no_spin_default) {
        cpu_set_t cpus;
        bool many = sched_getaffinity(0, sizeof cpus, &cpus) != 0 ||
                    (unsigned)CPU_COUNT(&cpus) >= SKV_SPIN_CORES;
        o->spin_us = many ? SKV_DEFAULT_SPIN_US : 0;
    }
    skv->spin_ns = skv->spin_max_ns = (uint64_t)o->spin_us * 1000;

    if (o->admin) {
        o->geometry = (struct skv_geometry){0};
        o->model = (struct skv_id){0};
        o->rows = 0;
        return SKV_OK;
    }
    if (!o->rows)
        o->rows = SKV_DEFAULT_ROWS;
    if (skv_geometry_check(&o->geometry) || skv_id_is_zero(o->model) || o->rows > SKV_MAX_ROWS) {
        skv_error("a worker's session needs a valid geometry, a model fingerprint and at most %u "
                  "gate rows",
                  SKV_MAX_ROWS);
        return SKV_EINVAL;
    }
    return SKV_OK;
}

/* A word that a forked child reads as 0, without a system call. */
static int open_owner(struct skv *skv)
{
    uint32_t *owner =
        mmap(NULL, OWNER_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (owner == MAP_FAILED)
        return SKV_ENOMEM;
    skv->owner = owner;
    if (madvise(owner, OWNER_BYTES, MADV_WIPEONFORK) != 0) {
        skv_error("MADV_WIPEONFORK: %s", strerror(errno));
        return SKV_ENOTSUP;
    }
    *owner = 1;
    return SKV_OK;
}

/* The gate rows, and each row's page lists. */
static int open_rows(struct skv *skv)
{
    skv->pages = malloc(skv->options.rows * sizeof *skv->pages);
    if (!skv->pages)
        return SKV_ENOMEM;
    skv->gate_stride = wire_gate_stride(skv->options.geometry.layers);
    skv->gate_bytes = wire_gate_bytes(skv->options.geometry.layers, skv->options.rows);
    skv->gate_fd = memfd_create("sidekv-gates", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (skv->gate_fd < 0 || ftruncate(skv->gate_fd, (off_t)skv->gate_bytes) != 0)
        goto fail;
    void *gates = mmap(NULL, skv->gate_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, skv->gate_fd, 0);
    if (gates == MAP_FAILED)
        goto fail;
    skv->gates = gates;
    if (fcntl(skv->gate_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) != 0)
        goto fail;
    return SKV_OK;
fail:
    skv_error("gate rows: %s", strerror(errno));
    return SKV_ENOMEM;
}

/* ---- what lives as long as a connection ---- */

static int shake_hands(struct skv *skv, uint64_t deadline_ns)
{
    struct wire_hello hello = {.magic = WIRE_MAGIC,
                               .version = WIRE_VERSION,
                               .kind = skv->options.admin ? WIRE_ADMIN : WIRE_WORKER,
                               .geometry = skv->options.geometry,
                               .model = skv->options.model,
                               .rows = skv->options.rows,
                               .gate_stride = skv->gate_stride,
                               .drained = skv->session};
    int pidfd = (int)syscall(SYS_pidfd_open, getpid(), 0);
    if (pidfd < 0) {
        snprintf(skv->link.reason, sizeof skv->link.reason, "pidfd_open: %s", strerror(errno));
        return errno == ENOSYS ? SKV_ENOTSUP : SKV_ENOMEM;
    }
    int fds[2] = {pidfd, skv->gate_fd};
    int status =
        skv_link_open(&skv->link, skv->path, &hello, fds, skv->options.admin ? 1 : 2, deadline_ns);
    close(pidfd);
    if (!status && !skv->options.admin)
        skv->session = skv->link.welcome.session; /* the one before is known to have drained */
    return status;
}

static int map_memory(struct skv *skv)
{
    const struct wire_welcome *w = &skv->link.welcome;
    void *memory =
        mmap(NULL, w->session_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, skv->link.memory, 0);
    if (memory == MAP_FAILED) {
        snprintf(skv->link.reason, sizeof skv->link.reason, "mmap of the session's memory: %s",
                 strerror(errno));
        return SKV_ENOMEM;
    }
    skv->memory = memory;
    skv->memory_bytes = w->session_bytes;
    struct wire_ring *ring = memory;
    skv->sq = (struct ring_side){.mine = &ring->sq_tail,
                                 .theirs = &ring->sq_head,
                                 .flags = &ring->sq_flags,
                                 .entries = WIRE_ENTRIES};
    skv->cq = (struct ring_side){.mine = &ring->cq_head,
                                 .theirs = &ring->cq_tail,
                                 .flags = &ring->cq_flags,
                                 .entries = WIRE_CQ_ENTRIES};
    return SKV_OK;
}

/* The daemon's device, once: gate addresses and captured graphs belong to it. */
static int open_device(struct skv *skv)
{
    const struct wire_welcome *w = &skv->link.welcome;
    char *reason = skv->link.reason;
    if (skv->device) {
        const struct skv_device_info *info = skv_device_info(skv->device);
        if (info->kind == (enum skv_device_kind)w->device_kind &&
            memcmp(info->uuid, w->uuid, sizeof w->uuid) == 0)
            return SKV_OK;
        snprintf(reason, sizeof skv->link.reason,
                 "the daemon now serves another device, %s; close the session and open a new one",
                 w->device);
        return SKV_ENODEVICE;
    }
    int status = skv_device_open_uuid((enum skv_device_kind)w->device_kind, w->uuid, &skv->device);
    if (status) {
        snprintf(reason, sizeof skv->link.reason, "the daemon's device, %s: %s", w->device,
                 skv_strerror(status));
        return status;
    }
    status = skv_host_register(skv->device, skv->gates, skv->gate_bytes, false);
    if (status)
        snprintf(reason, sizeof skv->link.reason, "gate rows on %s: %s", w->device,
                 skv_strerror(status));
    else
        skv->gates_registered = true;
    return status;
}

static void unmap_pool(struct skv *skv)
{
    if (skv->pool_mapped) {
        skv_views_drop(skv);
        skv_pool_unmap(skv->pool);
    }
    skv->pool_mapped = false;
    skv->pool_id = 0;
}

/* At the old address if that can be had. The pool that is mapped already, if it is that one. */
static int map_pool(struct skv *skv)
{
    const struct wire_welcome *w = &skv->link.welcome;
    if (skv->pool_mapped && w->pool_id == skv->pool_id && w->pool_pages == skv->server.pool_pages &&
        w->pool_bytes == skv->server.pool_bytes && w->protect == skv->server.protect &&
        w->extent_bytes == skv_pool_exported(skv->pool)->extent_bytes) {
        skv_link_close_extents(&skv->link);
        return SKV_OK;
    }
    unmap_pool(skv);
    struct skv_pool_handles handles = {.export = (enum skv_export)w->export,
                                       .extent_bytes = w->extent_bytes,
                                       .pool_bytes = w->pool_bytes,
                                       .extents = skv->link.extent_count,
                                       .fds = skv->link.extents,
                                       .read_only = w->protect};
    memcpy(handles.ipc, w->ipc, sizeof handles.ipc);
    int status = SKV_ENOTSUP;
    if (skv->pool) {
        status = skv_pool_remap(skv->pool, &handles);
        if (status == SKV_ENOTSUP || status == SKV_EINVAL) { /* EINVAL: exported another way */
            skv_warn("the new pool cannot have the old address; graphs must be captured again");
            skv_pool_close(skv->pool);
            skv->pool = NULL;
            status = SKV_ENOTSUP;
        }
    }
    if (status == SKV_ENOTSUP)
        status = skv_pool_import(skv->device, &handles, skv_page_bytes(&w->geometry), &skv->pool);
    skv_link_close_extents(&skv->link);
    if (status) {
        snprintf(skv->link.reason, sizeof skv->link.reason, "mapping the pool on %s: %s", w->device,
                 skv_strerror(status));
        return status;
    }
    skv->pool_mapped = true;
    skv->pool_id = w->pool_id;
    skv->moved = skv->pool_base && (skv->pool_base != skv_pool_address(skv->pool) ||
                                    skv->append_base != skv_pool_write_address(skv->pool));
    skv->pool_base = skv_pool_address(skv->pool);
    skv->append_base = skv_pool_write_address(skv->pool);
    return SKV_OK;
}

static void describe_server(struct skv *skv)
{
    const struct wire_welcome *w = &skv->link.welcome;
    skv->server = (struct skv_server){.geometry = w->geometry,
                                      .pool_pages = w->pool_pages,
                                      .pool_bytes = w->pool_bytes,
                                      .pid = w->daemon_pid,
                                      .cuda = w->device_kind == SKV_DEVICE_CUDA,
                                      .protect = w->protect != 0,
                                      .mps = w->mps != 0};
    memcpy(skv->server.device, w->device, sizeof skv->server.device);
}

/* Each side tells the other, and warns. */
static void tell_mps(struct skv *skv)
{
    bool mine = skv_device_info(skv->device)->mps;
    if (!mine && !skv->server.mps)
        return;
    skv_warn("%s under MPS: " SKV_MPS_RISK, mine ? "this process runs" : "the daemon runs");
    struct wire_cqe cqe;
    if (mine)
        skv_call(skv, &(struct wire_sqe){.opcode = WIRE_UNDER_MPS}, skv_deadline(skv), &cqe);
}

/* No work of the caller's on the pool may be in flight. */
static void detach(struct skv *skv)
{
    if (skv->connected)
        skv_watch_stop(skv);
    skv->connected = false;
    if (skv->pool_mapped)
        skv_views_drop(skv); /* before the daemon hears that nothing of us runs */
    if (!skv->pool_id)
        unmap_pool(skv);
    if (skv->memory)
        munmap(skv->memory, skv->memory_bytes);
    skv->memory = NULL;
    skv_link_close(&skv->link);
    memset(skv->rows, 0, sizeof skv->rows);
}

static int attach(struct skv *skv, uint64_t deadline_ns)
{
    int status = shake_hands(skv, deadline_ns);
    skv_failpoint(FAIL_client_welcomed);
    if (!status)
        status = map_memory(skv);
    if (!status && !skv->options.admin)
        status = open_device(skv);
    if (!status && !skv->options.admin)
        status = map_pool(skv);
    if (!status) {
        describe_server(skv);
        __atomic_store_n(&skv->coming, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&skv->lost, 0, __ATOMIC_RELEASE);
        status = skv_watch_start(skv);
        if (status)
            snprintf(skv->link.reason, sizeof skv->link.reason, "no watcher thread");
    }
    if (status) {
        __atomic_store_n(&skv->lost, 1, __ATOMIC_RELEASE);
        detach(skv);
        return status;
    }
    skv->connected = true;
    if (!skv->options.admin)
        tell_mps(skv); /* should it fail, the next call says so */
    skv_failpoint(FAIL_client_attached);
    return SKV_OK;
}

/* ---- outside ---- */

int skv_open(const struct skv_options *options, struct skv **out)
{
    if (!options || !out)
        return SKV_EINVAL;
    struct skv *skv = calloc(1, sizeof *skv);
    if (!skv)
        return SKV_ENOMEM;
    skv->gate_fd = skv->stop_event = -1;
    skv->lost = 1;
    skv_link_init(&skv->link);
    int status = check_options(skv, options);
    if (!status)
        status = open_owner(skv);
    if (!status && (skv->stop_event = eventfd(0, EFD_CLOEXEC)) < 0) {
        skv_error("eventfd: %s", strerror(errno));
        status = SKV_ENOMEM;
    }
    if (!status && !skv->options.admin)
        status = open_rows(skv);
    if (!status) {
        status = attach(skv, skv_deadline(skv));
        if (status)
            skv_error("%s", skv->link.reason);
    }
    if (status) {
        skv_close(skv);
        return status;
    }
    *out = skv;
    return SKV_OK;
}

/* In a forked child: the parent's watcher, device and socket are not ours to end. */
static void close_in_child(struct skv *skv)
{
    skv_link_close(&skv->link);
    if (skv->memory)
        munmap(skv->memory, skv->memory_bytes);
}

void skv_close(struct skv *skv)
{
    if (!skv)
        return;
    if (skv->owner && *skv->owner == 0) {
        close_in_child(skv);
    } else {
        detach(skv);
        skv_pool_close(skv->pool);
        if (skv->gates_registered)
            skv_host_unregister(skv->device, skv->gates);
        skv_device_close(skv->device);
    }
    if (skv->gates)
        munmap(skv->gates, skv->gate_bytes);
    if (skv->gate_fd >= 0)
        close(skv->gate_fd);
    if (skv->stop_event >= 0)
        close(skv->stop_event);
    if (skv->owner)
        munmap((void *)(uintptr_t)skv->owner, OWNER_BYTES);
    free(skv->pages);
    free(skv);
}

/* Worth another try? Nobody there yet, not ready yet, no session free, or too slow this time. */
static bool may_pass(int status)
{
    return status == SKV_ELOST || status == SKV_EAGAIN || status == SKV_EFULL ||
           status == SKV_ETIMEDOUT;
}

int skv_reconnect(struct skv *skv, uint32_t timeout_ms)
{
    if (!skv)
        return SKV_EINVAL;
    if (*skv->owner == 0)
        return SKV_EPERM;
    if (!skv_lost(skv))
        return SKV_OK;
    detach(skv);
    skv_failpoint(FAIL_client_detached);
    uint64_t begin = skv_now_ns(), end = begin + (uint64_t)timeout_ms * 1000000u;
    uint32_t pause_ms = SKV_BACKOFF_MS;
    for (;;) {
        uint64_t deadline = skv_deadline(skv);
        int status = attach(skv, deadline < end ? deadline : end);
        if (!status) {
            skv_info("session %llu on %s", (unsigned long long)skv->session, skv->path);
            return SKV_OK;
        }
        uint64_t now = skv_now_ns();
        if (!may_pass(status) || now >= end) {
            skv_error("reconnect: %s", skv->link.reason);
            return status;
        }
        bool soon = now - begin <= SKV_KEEP_MAPPED_MS * UINT64_C(1000000);
        if (!soon)
            unmap_pool(skv); /* whoever comes may need its memory */
        uint64_t left_ms = (end - now + 999999) / 1000000;
        poll(NULL, 0, (int)(left_ms < pause_ms ? left_ms : pause_ms));
        uint32_t most_ms = soon ? SKV_BACKOFF_SOON_MS : SKV_BACKOFF_MAX_MS;
        pause_ms = 2 * pause_ms < most_ms ? 2 * pause_ms : most_ms;
    }
}

int skv_session_return(struct skv *skv, uint64_t deadline_ns)
{
    uint64_t now = skv_now_ns();
    for (uint32_t row = 0; row < skv->options.rows; row++)
        if (skv->rows[row].held)
            return SKV_ELOST; /* its pass may still run: the caller must drain, and say so */
    /* Once: if nobody comes, the calls that follow fail at once. */
    if (!__atomic_exchange_n(&skv->coming, 0, __ATOMIC_RELAXED) || now >= deadline_ns)
        return SKV_ELOST;
    uint64_t left_ms = (deadline_ns - now + 999999) / 1000000;
    skv->moved = false;
    int status = skv_reconnect(skv, left_ms < skv->options.timeout_ms ? (uint32_t)left_ms
                                                                      : skv->options.timeout_ms);
    if (status || !skv->moved)
        return status;
    skv_session_lose(skv, "the pool has another address now; reconnect, and capture graphs anew");
    return SKV_ELOST;
}

int skv_session_ready(struct skv *skv, uint64_t deadline_ns)
{
    int status = skv_session_usable(skv);
    return status == SKV_ELOST ? skv_session_return(skv, deadline_ns) : status;
}

bool skv_lost(const struct skv *skv)
{
    return __atomic_load_n(&skv->lost, __ATOMIC_ACQUIRE) != 0;
}

void *skv_pool_base(const struct skv *skv)
{
    return skv->pool_mapped ? skv_pool_address(skv->pool) : NULL;
}

void *skv_pool_append_base(const struct skv *skv)
{
    return skv->pool_mapped ? skv_pool_write_address(skv->pool) : NULL;
}

uint64_t skv_pool_pages(const struct skv *skv)
{
    return skv->server.pool_pages;
}

struct skv_device *skv_session_device(const struct skv *skv)
{
    return skv->device;
}

uint32_t *skv_gate_row(const struct skv *skv, uint32_t row)
{
    return row < skv->options.rows ? skv->gates + row * (skv->gate_stride / sizeof *skv->gates)
                                   : NULL;
}

const struct skv_server *skv_server(const struct skv *skv)
{
    return &skv->server;
}
