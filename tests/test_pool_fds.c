/* Who holds a pool's fds holds its bytes: a process that never opens the device, as sidekv-keeper
 * and a service manager's fd store are, keeps them while every process that had the device dies.
 * The test is that process: on CUDA it has no context, then or later. */
#include <dirent.h>
#include <signal.h>

#include "device_help.h"

#define POOL_PAGES 128u /* two extents */
#define WRITTEN    77u  /* by the second process, in the second extent */

static struct skv_pool_handles held;
static int held_fds[MAX_FDS];

struct opened {
    struct skv_device *device;
    struct skv_stream *stream;
    char *pinned; /* a page */
};

static struct opened open_in_child(const struct backend *backend)
{
    struct opened o;
    CHILD_CHECK(skv_device_open(backend->name, &o.device) == 0);
    CHILD_CHECK(skv_pinned_alloc(o.device, PAGE, (void **)&o.pinned) == 0);
    CHILD_CHECK(skv_stream_open(o.device, &o.stream) == 0);
    return o;
}

static void put_page(const struct opened *o, const struct skv_pool *pool, uint64_t page,
                     uint64_t seed)
{
    fill(o->pinned, PAGE, seed);
    CHILD_CHECK(copy_now(o->stream, SKV_TO_DEVICE, page_of(pool, page), o->pinned, PAGE) == 0);
}

static bool has_page(const struct opened *o, const struct skv_pool *pool, uint64_t page,
                     uint64_t seed)
{
    memset(o->pinned, 0, PAGE);
    CHILD_CHECK(copy_now(o->stream, SKV_TO_HOST, o->pinned, page_of(pool, page), PAGE) == 0);
    return filled(o->pinned, PAGE, seed);
}

/* The first daemon: every page has bytes of its own. Lives until it is killed. */
static void creator(int socket, const struct backend *backend)
{
    struct opened o = open_in_child(backend);
    struct skv_pool *pool;
    CHILD_CHECK(skv_pool_create(o.device, POOL_PAGES * PAGE, PAGE, SKV_EXPORT_FD, &pool) == 0);
    for (uint64_t page = 0; page < POOL_PAGES; page++)
        put_page(&o, pool, page, page);
    CHILD_CHECK(send_pool(socket, skv_pool_exported(pool)));
    while (hear(socket))
        ;
}

/* A worker, given the fds over a socket: finds every byte, writes a page. Lives until it is
 * killed. */
static void importer(int socket, const struct backend *backend)
{
    struct skv_pool_handles handles;
    struct skv_pool *pool;
    int fds[MAX_FDS];
    CHILD_CHECK(receive_pool(socket, &handles, fds));
    struct opened o = open_in_child(backend);
    CHILD_CHECK(skv_pool_import(o.device, &handles, PAGE, &pool) == 0);
    close_fds(&handles);
    for (uint64_t page = 0; page < POOL_PAGES; page++)
        CHILD_CHECK(has_page(&o, pool, page, page));
    put_page(&o, pool, WRITTEN, 1000);
    CHILD_CHECK(say(socket, 'w'));
    while (hear(socket))
        ;
}

/* The next daemon, which has inherited the fds: adopts the pool, and finds what both wrote. */
static void successor(int socket, const struct backend *backend)
{
    struct opened o = open_in_child(backend);
    struct skv_pool_handles handles = held;
    struct skv_pool *pool;
    handles.fds = malloc(held.extents * sizeof *handles.fds);
    CHILD_CHECK(handles.fds);
    memcpy(handles.fds, held_fds, held.extents * sizeof *handles.fds);
    CHILD_CHECK(skv_pool_adopt(o.device, &handles, PAGE, &pool) == 0);
    for (uint64_t page = 0; page < POOL_PAGES; page++)
        CHILD_CHECK(has_page(&o, pool, page, page == WRITTEN ? 1000 : page));
    CHILD_CHECK(say(socket, 'a'));
    hear(socket);
    skv_stream_close(o.stream);
    skv_pool_close(pool);
    skv_device_close(o.device);
}

static void kill_peer(pid_t child, int socket)
{
    int status;
    cr_assert_eq(kill(child, SIGKILL), 0);
    cr_assert_eq(waitpid(child, &status, 0), child);
    cr_assert(WIFSIGNALED(status), "it failed before it was killed");
    close(socket);
}

/* Fds of this process that lead to NVIDIA's driver. */
static uint32_t driver_fds(void)
{
    char path[300], target[256];
    uint32_t count = 0;
    DIR *directory = opendir("/proc/self/fd");
    for (struct dirent *entry; directory && (entry = readdir(directory));) {
        snprintf(path, sizeof path, "/proc/self/fd/%s", entry->d_name);
        ssize_t length = readlink(path, target, sizeof target - 1);
        target[length > 0 ? length : 0] = 0;
        count += strncmp(target, "/dev/nvidia", strlen("/dev/nvidia")) == 0;
    }
    if (directory)
        closedir(directory);
    return count;
}

TEST_ON_EVERY_BACKEND(pool_fds, keep_every_byte_while_all_who_had_the_device_die, .timeout = 120)
{
    int socket;
    pid_t child = start_peer(creator, backend, &socket);
    cr_assert(receive_pool(socket, &held, held_fds));
    cr_assert_eq(held.extents, 2);
    kill_peer(child, socket);
    cr_assert_leq(driver_fds(), held.extents, "the holder has opened the driver itself");

    child = start_peer(importer, backend, &socket);
    cr_assert(send_pool(socket, &held));
    cr_assert_eq(hear(socket), 'w');
    kill_peer(child, socket);

    for (int round = 0; round < 2; round++) { /* the second adopts what the first has closed */
        child = start_peer(successor, backend, &socket);
        cr_assert_eq(hear(socket), 'a');
        end_peer(child, socket);
    }
    close_fds(&held);
}
