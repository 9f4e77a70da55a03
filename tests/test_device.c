/* device.h, on every backend this machine has: one set of claims, run against host and CUDA, and a
 * few that only make sense on one. Without a GPU the CUDA runs are skips that show. */
#include "device.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>

#include "clock.h"
#include "device_help.h"

#define ON_EVERY_BACKEND(claim) TEST_ON_EVERY_BACKEND(device, claim, .timeout = 180)

static struct skv_device *open_device(const struct backend *backend)
{
    struct skv_device *device = NULL;
    require(backend);
    cr_assert_eq(skv_device_open(backend->name, &device), 0);
    return device;
}

static bool is_host(const struct skv_device *device)
{
    return skv_device_info(device)->kind == SKV_DEVICE_HOST;
}

/* A device with a small pool, a pinned buffer and a stream: what most claims need. */
struct bench {
    struct skv_device *device;
    struct skv_pool *pool; /* 8 pages */
    struct skv_stream *stream;
    char *pinned; /* 8 pages */
};

static struct bench bench_open(const struct backend *backend)
{
    struct bench b = {.device = open_device(backend)};
    cr_assert_eq(skv_pool_create(b.device, 8 * PAGE, PAGE, SKV_EXPORT_FD, &b.pool), 0);
    cr_assert_eq(skv_pinned_alloc(b.device, 8 * PAGE, (void **)&b.pinned), 0);
    cr_assert_eq(skv_stream_open(b.device, &b.stream), 0);
    return b;
}

static void bench_close(struct bench *b)
{
    skv_stream_close(b->stream);
    skv_pinned_free(b->device, b->pinned);
    skv_pool_close(b->pool);
    skv_device_close(b->device);
}

/* ---- pools ---- */

static void importing_writer(int socket, const struct backend *backend)
{
    struct skv_pool_handles handles;
    int fds[MAX_FDS];
    struct skv_device *device;
    struct skv_pool *pool;
    struct skv_stream *stream;
    char *pinned;
    CHILD_CHECK(receive_pool(socket, &handles, fds));
    CHILD_CHECK(skv_device_open(backend->name, &device) == 0);
    CHILD_CHECK(skv_pool_import(device, &handles, PAGE, &pool) == 0);
    close_fds(&handles);
    CHILD_CHECK(skv_pinned_alloc(device, PAGE, (void **)&pinned) == 0);
    CHILD_CHECK(skv_stream_open(device, &stream) == 0);
    /* The creator's bytes are here, and the creator sees ours. */
    CHILD_CHECK(copy_now(stream, SKV_TO_HOST, pinned, page_of(pool, 3), PAGE) == 0);
    CHILD_CHECK(filled(pinned, PAGE, 3));
    fill(pinned, PAGE, 70);
    CHILD_CHECK(copy_now(stream, SKV_TO_DEVICE, page_of(pool, 7), pinned, PAGE) == 0);
    CHILD_CHECK(say(socket, 'w'));
    hear(socket);
    skv_stream_close(stream);
    skv_pool_close(pool);
    skv_device_close(device);
}

static void share_a_pool(const struct backend *backend, enum skv_export export)
{
    int socket;
    pid_t child = start_peer(importing_writer, backend, &socket);
    struct bench b = bench_open(backend);
    skv_pool_close(b.pool);
    cr_assert_eq(skv_pool_create(b.device, 8 * PAGE, PAGE, export, &b.pool), 0);
    fill(b.pinned, PAGE, 3);
    cr_assert_eq(copy_now(b.stream, SKV_TO_DEVICE, page_of(b.pool, 3), b.pinned, PAGE), 0);
    cr_assert(send_pool(socket, skv_pool_exported(b.pool)));
    cr_assert_eq(hear(socket), 'w');
    cr_assert_eq(copy_now(b.stream, SKV_TO_HOST, b.pinned, page_of(b.pool, 7), PAGE), 0);
    cr_assert(filled(b.pinned, PAGE, 70));
    end_peer(child, socket);
    bench_close(&b);
}

ON_EVERY_BACKEND(creator_and_importer_see_each_others_writes)
{
    share_a_pool(backend, SKV_EXPORT_FD);
}

/* How a child that stores there ends. */
static int signal_of_a_store(char *address)
{
    int status;
    pid_t child = fork();
    if (child == 0) {
        signal(SIGSEGV, SIG_DFL); /* a sanitizer's would tell of it */
        *(volatile char *)address = 1;
        _exit(0);
    }
    return waitpid(child, &status, 0) == child && WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

#define EXTENT_PAGES 2u /* of MIB, at the granularity */

static void importing_through_views(int socket, const struct backend *backend)
{
    struct skv_pool_handles handles;
    int fds[MAX_FDS];
    struct skv_device *device;
    struct skv_pool *pool;
    struct skv_stream *stream;
    char *pinned;
    CHILD_CHECK(receive_pool(socket, &handles, fds));
    CHILD_CHECK(skv_device_open(backend->name, &device) == 0);
    handles.read_only = true;
    CHILD_CHECK(skv_pool_import(device, &handles, PAGE, &pool) == 0);
    close_fds(&handles);
    CHILD_CHECK(skv_pinned_alloc(device, PAGE, (void **)&pinned) == 0);
    CHILD_CHECK(skv_stream_open(device, &stream) == 0);
    char *base = skv_pool_address(pool), *write = skv_pool_write_address(pool);
    CHILD_CHECK(write != base);
    CHILD_CHECK(copy_now(stream, SKV_TO_HOST, pinned, base + 3 * PAGE, PAGE) == 0);
    CHILD_CHECK(filled(pinned, PAGE, 3));
    fill(pinned, PAGE, 70);
    for (uint32_t extent = 0; extent < handles.extents; extent++)
        for (int on = 1; on >= 0; on--) {
            CHILD_CHECK(skv_pool_view(pool, extent, on) == 0);
            CHILD_CHECK(skv_pool_view(pool, extent, on) == 0); /* nothing to do */
            for (uint32_t page = 0; page < 8; page++) {
                bool own = on && page / EXTENT_PAGES == extent;
                CHILD_CHECK(copy_now(stream, SKV_TO_DEVICE, base + page * PAGE, pinned, PAGE) ==
                            SKV_EINVAL);
                if (!own)
                    CHILD_CHECK(copy_now(stream, SKV_TO_DEVICE, write + page * PAGE, pinned,
                                         PAGE) == SKV_EINVAL);
                if (!is_host(device))
                    continue; /* its memory cannot be stored to from here */
                CHILD_CHECK(signal_of_a_store(base + page * PAGE) == SIGSEGV);
                CHILD_CHECK(signal_of_a_store(write + page * PAGE + 8) == (own ? 0 : SIGSEGV));
            }
        }
    CHILD_CHECK(skv_pool_view(pool, handles.extents, true) == SKV_EINVAL);
    CHILD_CHECK(skv_pool_view(pool, 3, true) == 0);
    CHILD_CHECK(copy_now(stream, SKV_TO_DEVICE, write + 7 * PAGE, pinned, PAGE) == 0);
    fill(pinned, PAGE, 71);
    CHILD_CHECK(copy_now(stream, SKV_TO_HOST, pinned, base + 7 * PAGE, PAGE) == 0);
    CHILD_CHECK(filled(pinned, PAGE, 70));
    CHILD_CHECK(say(socket, 'w'));
    hear(socket);
    skv_stream_close(stream);
    skv_pool_close(pool); /* with a view mapped */
    skv_device_close(device);
}

ON_EVERY_BACKEND(a_pool_imported_read_only_is_written_through_its_views_alone)
{
    int socket;
    pid_t child = start_peer(importing_through_views, backend, &socket);
    struct bench b = bench_open(backend);
    skv_pool_close(b.pool);
    cr_assert_eq(skv_pool_create_split(b.device, 8 * PAGE, PAGE, 4, &b.pool), 0);
    cr_assert_eq(skv_pool_exported(b.pool)->extents, 4);
    cr_assert_eq(skv_pool_write_address(b.pool), skv_pool_address(b.pool));
    cr_assert_eq(skv_pool_view(b.pool, 0, true), SKV_EINVAL);
    fill(b.pinned, PAGE, 3);
    cr_assert_eq(copy_now(b.stream, SKV_TO_DEVICE, page_of(b.pool, 3), b.pinned, PAGE), 0);
    cr_assert(send_pool(socket, skv_pool_exported(b.pool)));
    cr_assert_eq(hear(socket), 'w');
    cr_assert_eq(copy_now(b.stream, SKV_TO_HOST, b.pinned, page_of(b.pool, 7), PAGE), 0);
    cr_assert(filled(b.pinned, PAGE, 70));
    end_peer(child, socket);
    bench_close(&b);
}

ON_EVERY_BACKEND(an_ipc_handle_shares_a_pool_or_is_not_supported)
{
    if (strcmp(backend->name, "cuda") == 0) {
        share_a_pool(backend, SKV_EXPORT_IPC);
        return;
    }
    struct skv_device *device = open_device(backend);
    struct skv_pool *pool = NULL;
    cr_assert_eq(skv_pool_create(device, PAGE, PAGE, SKV_EXPORT_IPC, &pool), SKV_ENOTSUP);
    cr_assert_null(pool);
    skv_device_close(device);
}

ON_EVERY_BACKEND(a_pool_is_not_imported_where_it_was_created)
{
    struct bench b = bench_open(backend);
    struct skv_pool *twin = NULL;
    cr_assert_eq(skv_pool_import(b.device, skv_pool_exported(b.pool), PAGE, &twin), SKV_EINVAL);
    cr_assert_null(twin);
    bench_close(&b);
}

/* Opens the device when it hears 'o'; then, for every 'p', sends a pool of two extents with page 65
 * filled by the round's number, and closes it at 'c'. */
static void creator(int socket, const struct backend *backend)
{
    struct skv_device *device;
    struct skv_stream *stream;
    char *pinned, word;
    CHILD_CHECK(hear(socket) == 'o');
    CHILD_CHECK(skv_device_open(backend->name, &device) == 0);
    CHILD_CHECK(skv_pinned_alloc(device, PAGE, (void **)&pinned) == 0);
    CHILD_CHECK(skv_stream_open(device, &stream) == 0);
    for (uint64_t round = 1; (word = hear(socket)) != '\0'; round++) {
        struct skv_pool *pool;
        CHILD_CHECK(word == 'p');
        CHILD_CHECK(skv_pool_create(device, 96 * MIB, PAGE, SKV_EXPORT_FD, &pool) == 0);
        fill(pinned, PAGE, round);
        CHILD_CHECK(copy_now(stream, SKV_TO_DEVICE, page_of(pool, 65), pinned, PAGE) == 0);
        CHILD_CHECK(send_pool(socket, skv_pool_exported(pool)));
        CHILD_CHECK(hear(socket) == 'c');
        skv_pool_close(pool);
    }
}

ON_EVERY_BACKEND(another_pool_takes_the_same_address)
{
    int socket, fds[MAX_FDS];
    pid_t child = start_peer(creator, backend, &socket);
    struct bench b = bench_open(backend);
    struct skv_pool_handles handles;
    struct skv_pool *pool;
    cr_assert(say(socket, 'o') && say(socket, 'p') && receive_pool(socket, &handles, fds));
    cr_assert_eq(handles.extents, 2); /* page 65 is in the second */
    cr_assert_eq(skv_pool_import(b.device, &handles, PAGE, &pool), 0);
    close_fds(&handles);
    char *address = skv_pool_address(pool);
    cr_assert_eq(copy_now(b.stream, SKV_TO_HOST, b.pinned, page_of(pool, 65), PAGE), 0);
    cr_assert(filled(b.pinned, PAGE, 1));

    skv_pool_unmap(pool);
    cr_assert_eq(copy_now(b.stream, SKV_TO_HOST, b.pinned, address, PAGE), SKV_EINVAL);
    cr_assert(say(socket, 'c') && say(socket, 'p') && receive_pool(socket, &handles, fds));
    cr_assert_eq(skv_pool_remap(pool, &handles), 0);
    cr_assert_eq(skv_pool_remap(pool, &handles), SKV_EINVAL, "it is mapped");
    close_fds(&handles);
    cr_assert_eq(skv_pool_address(pool), address);
    cr_assert_eq(copy_now(b.stream, SKV_TO_HOST, b.pinned, page_of(pool, 65), PAGE), 0);
    cr_assert(filled(b.pinned, PAGE, 2));

    cr_assert(say(socket, 'c'));
    skv_pool_close(pool);
    end_peer(child, socket);
    bench_close(&b);
}

ON_EVERY_BACKEND(a_larger_pool_does_not_fit_the_old_range)
{
    int socket, fds[MAX_FDS];
    pid_t child = start_peer(creator, backend, &socket);
    struct skv_device *device = open_device(backend);
    struct skv_pool_handles handles, smaller;
    struct skv_pool *pool;
    cr_assert(say(socket, 'o') && say(socket, 'p') && receive_pool(socket, &handles, fds));
    smaller = handles;
    smaller.extents = 1;
    smaller.pool_bytes = handles.extent_bytes;
    cr_assert_eq(skv_pool_import(device, &smaller, PAGE, &pool), 0);
    skv_pool_unmap(pool);
    cr_assert_eq(skv_pool_remap(pool, &handles), SKV_ENOTSUP);
    cr_assert_eq(skv_pool_remap(pool, &smaller), 0, "the range is still there");
    close_fds(&handles);
    skv_pool_close(pool);
    cr_assert(say(socket, 'c'));
    end_peer(child, socket);
    skv_device_close(device);
}

ON_EVERY_BACKEND(pages_outlive_a_killed_creator)
{
    int socket, fds[MAX_FDS];
    pid_t child = start_peer(creator, backend, &socket);
    struct bench b = bench_open(backend);
    struct skv_pool_handles handles;
    struct skv_pool *pool;
    cr_assert(say(socket, 'o') && say(socket, 'p') && receive_pool(socket, &handles, fds));
    cr_assert_eq(kill(child, SIGKILL), 0);
    cr_assert_eq(waitpid(child, NULL, 0), child);
    cr_assert_eq(skv_pool_import(b.device, &handles, PAGE, &pool), 0);
    close_fds(&handles);
    cr_assert_eq(copy_now(b.stream, SKV_TO_HOST, b.pinned, page_of(pool, 65), PAGE), 0);
    cr_assert(filled(b.pinned, PAGE, 1));
    close(socket);
    skv_pool_close(pool);
    bench_close(&b);
}

ON_EVERY_BACKEND(no_page_straddles_two_extents)
{
    struct skv_device *device = open_device(backend);
    struct skv_pool *pool;
    const uint64_t page = 192 << 10; /* 6 KiB a token, 32 tokens */
    cr_assert_eq(skv_pool_create(device, 100 * MIB, page, SKV_EXPORT_FD, &pool), 0);
    const struct skv_pool_handles *handles = skv_pool_exported(pool);
    cr_assert_eq(handles->extents, 2);
    cr_assert_eq(handles->extent_bytes, 66 * MIB);
    cr_assert_eq(handles->pool_bytes, 132 * MIB);
    skv_pool_close(pool);
    cr_assert_eq(skv_pool_create(device, 1, page, SKV_EXPORT_FD, &pool), 0);
    cr_assert_eq(skv_pool_exported(pool)->pool_bytes, 6 * MIB, "one small extent");
    skv_pool_close(pool);
    skv_device_close(device);
}

ON_EVERY_BACKEND(a_pool_beyond_memory_is_refused)
{
    struct skv_device *device = open_device(backend);
    struct skv_pool *pool = NULL;
    uint64_t bytes = skv_device_info(device)->total_bytes + 64 * MIB;
    cr_assert_eq(skv_pool_create(device, bytes, PAGE, SKV_EXPORT_FD, &pool), SKV_ENOMEM);
    cr_assert_eq(skv_pool_create(device, UINT64_MAX, PAGE, SKV_EXPORT_FD, &pool), SKV_EINVAL);
    cr_assert_eq(skv_pool_create(device, 0, PAGE, SKV_EXPORT_FD, &pool), SKV_EINVAL);
    cr_assert_null(pool);
    skv_device_close(device);
}

ON_EVERY_BACKEND(lying_handles_are_refused)
{
    struct bench b = bench_open(backend);
    struct skv_pool *pool = NULL;
    int pipes[2];
    cr_assert_eq(pipe(pipes), 0);
    const struct skv_pool_handles good = {
        .extent_bytes = 64 * MIB, .pool_bytes = 64 * MIB, .extents = 1, .fds = pipes};
    struct skv_pool_handles lies[8];
    for (int i = 0; i < 8; i++)
        lies[i] = good;
    /* lies[0]: the fd is a pipe */
    lies[1].extents = 0;
    lies[2].extents = 2;
    lies[3].pool_bytes = 0;
    lies[4].fds = NULL;
    lies[5].extent_bytes = lies[5].pool_bytes = 64 * MIB + 4096;
    lies[6].export = (enum skv_export)7;
    lies[7].extents = 3;
    lies[7].extent_bytes = UINT64_MAX / 3 + 64 * MIB;
    for (int i = 0; i < 8; i++) {
        cr_assert_neq(skv_pool_import(b.device, &lies[i], PAGE, &pool), 0, "lie %d", i);
        cr_assert_null(pool);
    }
    bench_close(&b);
}

Test(device, an_extent_that_could_shrink_is_refused)
{
    struct skv_device *device = open_device(&backends[0]);
    struct skv_pool *pool = NULL;
    int file = memfd_create("pool", MFD_ALLOW_SEALING);
    struct skv_pool_handles handles = {
        .extent_bytes = 2 * MIB, .pool_bytes = 2 * MIB, .extents = 1, .fds = &file};
    cr_assert_eq(ftruncate(file, 2 * MIB), 0);
    cr_assert_eq(skv_pool_import(device, &handles, PAGE, &pool), SKV_EINVAL);
    fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
    cr_assert_eq(skv_pool_import(device, &handles, PAGE, &pool), 0);
    skv_pool_close(pool);
    handles.extent_bytes = handles.pool_bytes = 4 * MIB;
    cr_assert_eq(skv_pool_import(device, &handles, PAGE, &pool), SKV_EINVAL, "longer than it is");
    skv_device_close(device);
}

ON_EVERY_BACKEND(pages_beyond_4_gib_are_their_own)
{
    struct bench b = bench_open(backend);
    const uint64_t bytes = 5120 * MIB, page = 4100, alias = page - 4096;
    struct skv_pool *pool;
    if (skv_device_free_bytes(b.device) < bytes + 1024 * MIB) {
        bench_close(&b);
        cr_skip_test("%s: less than 6 GiB free", backend->name);
    }
    cr_assert_eq(skv_pool_create(b.device, bytes, PAGE, SKV_EXPORT_FD, &pool), 0);
    fill(b.pinned, 2 * PAGE, 9);
    struct skv_copy copies[] = {{page_of(pool, alias), b.pinned, PAGE},
                                {page_of(pool, page), b.pinned + PAGE, PAGE}};
    uint64_t mark;
    cr_assert_eq(skv_stream_copy(b.stream, SKV_TO_DEVICE, copies, 2), 0);
    cr_assert_eq(skv_stream_mark(b.stream, &mark), 0);
    cr_assert_eq(skv_stream_wait(b.stream, mark, LONG), 0);
    cr_assert_eq(copy_now(b.stream, SKV_TO_HOST, b.pinned + 2 * PAGE, page_of(pool, alias), PAGE),
                 0);
    cr_assert_eq(copy_now(b.stream, SKV_TO_HOST, b.pinned + 3 * PAGE, page_of(pool, page), PAGE),
                 0);
    cr_assert(filled(b.pinned + 2 * PAGE, 2 * PAGE, 9));
    skv_pool_close(pool);
    bench_close(&b);
}

/* ---- which copies are refused ---- */

ON_EVERY_BACKEND(unregistered_memory_is_refused)
{
    struct bench b = bench_open(backend);
    char *plain = malloc(PAGE);
    uint32_t word = 0;
    cr_assert_eq(copy_now(b.stream, SKV_TO_DEVICE, page_of(b.pool, 0), plain, PAGE), SKV_EINVAL);
    cr_assert_eq(copy_now(b.stream, SKV_TO_HOST, plain, page_of(b.pool, 0), PAGE), SKV_EINVAL);
    cr_assert_eq(skv_stream_write32(b.stream, &word, 1), SKV_EINVAL);
    free(plain);
    bench_close(&b);
}

ON_EVERY_BACKEND(a_copy_across_two_registrations_is_refused)
{
    struct bench b = bench_open(backend);
    char *map = mmap(NULL, 2 * MIB, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    cr_assert_eq(skv_host_register(b.device, map, MIB, false), 0);
    cr_assert_eq(skv_host_register(b.device, map + MIB, MIB, false), 0);
    char *page = page_of(b.pool, 0);
    cr_assert_eq(copy_now(b.stream, SKV_TO_DEVICE, page, map + MIB / 2, MIB), SKV_EINVAL);
    cr_assert_eq(copy_now(b.stream, SKV_TO_DEVICE, page, map + MIB / 2, MIB / 2), 0);
    cr_assert_eq(copy_now(b.stream, SKV_TO_DEVICE, page, map + MIB, MIB), 0);
    cr_assert_eq(skv_host_unregister(b.device, map), 0);
    cr_assert_eq(copy_now(b.stream, SKV_TO_DEVICE, page, map, MIB / 2), SKV_EINVAL);
    cr_assert_eq(skv_host_unregister(b.device, map), SKV_EINVAL, "it is not registered any more");
    cr_assert_eq(skv_host_unregister(b.device, map + MIB), 0);
    munmap(map, 2 * MIB);
    bench_close(&b);
}

ON_EVERY_BACKEND(a_copy_that_leaves_the_pool_is_refused)
{
    struct bench b = bench_open(backend);
    uint64_t bytes = skv_pool_exported(b.pool)->pool_bytes;
    char *end = page_of(b.pool, 0) + bytes;
    cr_assert_eq(copy_now(b.stream, SKV_TO_DEVICE, end - PAGE, b.pinned, PAGE), 0);
    cr_assert_eq(copy_now(b.stream, SKV_TO_DEVICE, end - PAGE + 4, b.pinned, PAGE), SKV_EINVAL);
    cr_assert_eq(copy_now(b.stream, SKV_TO_HOST, b.pinned, end, PAGE), SKV_EINVAL);
    cr_assert_eq(copy_now(b.stream, SKV_TO_HOST, b.pinned, end - PAGE, 0), SKV_EINVAL);
    cr_assert_eq(copy_now(b.stream, SKV_TO_HOST, b.pinned, end - PAGE, UINT64_MAX), SKV_EINVAL);
    /* One wrong copy refuses all: nothing of the batch may happen. */
    fill(b.pinned, 2 * PAGE, 5);
    struct skv_copy copies[] = {{page_of(b.pool, 1), b.pinned, PAGE}, {end, b.pinned + PAGE, PAGE}};
    cr_assert_eq(copy_now(b.stream, SKV_TO_HOST, b.pinned + 2 * PAGE, page_of(b.pool, 1), PAGE), 0);
    bool before = filled(b.pinned + 2 * PAGE, PAGE, 5);
    cr_assert_eq(skv_stream_copy(b.stream, SKV_TO_DEVICE, copies, 2), SKV_EINVAL);
    cr_assert_eq(copy_now(b.stream, SKV_TO_HOST, b.pinned + 2 * PAGE, page_of(b.pool, 1), PAGE), 0);
    cr_assert_eq(filled(b.pinned + 2 * PAGE, PAGE, 5), before);
    bench_close(&b);
}

ON_EVERY_BACKEND(registrations_are_whole_pages_and_do_not_overlap)
{
    struct bench b = bench_open(backend);
    char *map = mmap(NULL, MIB, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    cr_assert_eq(skv_host_register(b.device, map + 64, 4096, false), SKV_EINVAL);
    cr_assert_eq(skv_host_register(b.device, map, 100, false), SKV_EINVAL);
    cr_assert_eq(skv_host_register(b.device, map + 8192, 8192, false), 0);
    cr_assert_eq(skv_host_register(b.device, map, 12288, false), SKV_EINVAL);
    cr_assert_eq(skv_host_register(b.device, map + 12288, 8192, false), SKV_EINVAL);
    cr_assert_eq(skv_host_register(b.device, map, MIB, false), SKV_EINVAL);
    cr_assert_eq(skv_host_register(b.device, map, 8192, false), 0);
    cr_assert_eq(skv_host_register(b.device, b.pinned, 4096, false), SKV_EINVAL);
    cr_assert_eq(skv_host_unregister(b.device, b.pinned), SKV_EINVAL, "pinned, not registered");
    char *hole = mmap(NULL, MIB, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    munmap(hole, MIB);
    cr_assert_neq(skv_host_register(b.device, hole, MIB, true), 0, "nothing is mapped there");
    skv_host_unregister(b.device, map);
    skv_host_unregister(b.device, map + 8192);
    munmap(map, MIB);
    bench_close(&b);
}

/* As a store's map is read: in place, from a file mapped read-only, which keeps changing. */
static void copy_from_file(struct bench *b, const char *folder)
{
    char path[256];
    snprintf(path, sizeof path, "%s/sidekv-test-XXXXXX", folder);
    int file = mkstemp(path);
    if (file < 0) {
        cr_log_warn("%s: no file there, left out", folder);
        return;
    }
    unlink(path);
    fill(b->pinned, PAGE, 21);
    cr_assert_eq(pwrite(file, b->pinned, PAGE, 0), (ssize_t)PAGE);
    char *map = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, file, 0);
    cr_assert_neq(map, MAP_FAILED);
    cr_assert_neq(skv_host_register(b->device, map, PAGE, false), 0, "not for writing");
    cr_assert_eq(skv_host_register(b->device, map, PAGE, true), 0, "%s", folder);
    cr_assert_eq(copy_now(b->stream, SKV_TO_DEVICE, page_of(b->pool, 2), map, PAGE), 0);
    cr_assert_eq(copy_now(b->stream, SKV_TO_HOST, map, page_of(b->pool, 2), PAGE), SKV_EINVAL);
    cr_assert_eq(skv_stream_write32(b->stream, (uint32_t *)map, 1), SKV_EINVAL);
    cr_assert_eq(copy_now(b->stream, SKV_TO_HOST, b->pinned + PAGE, page_of(b->pool, 2), PAGE), 0);
    cr_assert(filled(b->pinned + PAGE, PAGE, 21));

    fill(b->pinned, PAGE, 22);
    cr_assert_eq(pwrite(file, b->pinned, PAGE, 0), (ssize_t)PAGE);
    cr_assert_eq(copy_now(b->stream, SKV_TO_DEVICE, page_of(b->pool, 2), map, PAGE), 0);
    cr_assert_eq(copy_now(b->stream, SKV_TO_HOST, b->pinned + PAGE, page_of(b->pool, 2), PAGE), 0);
    cr_assert(filled(b->pinned + PAGE, PAGE, 22), "%s: a later write is seen", folder);
    cr_assert_eq(skv_host_unregister(b->device, map), 0);
    munmap(map, PAGE);
    close(file);
}

ON_EVERY_BACKEND(a_file_mapped_read_only_is_copied_from_in_place)
{
    struct bench b = bench_open(backend);
    copy_from_file(&b, "/dev/shm");
    copy_from_file(&b, ".");
    bench_close(&b);
}

ON_EVERY_BACKEND(private_device_memory_takes_copies)
{
    struct bench b = bench_open(backend);
    char *memory;
    cr_assert_eq(skv_device_alloc(b.device, 3 * PAGE + 100, (void **)&memory), 0);
    fill(b.pinned, PAGE, 8);
    cr_assert_eq(copy_now(b.stream, SKV_TO_DEVICE, memory + PAGE, b.pinned, PAGE), 0);
    cr_assert_eq(copy_now(b.stream, SKV_TO_HOST, b.pinned + PAGE, memory + PAGE, PAGE), 0);
    cr_assert(filled(b.pinned + PAGE, PAGE, 8));
    skv_device_free(b.device, memory);
    cr_assert_eq(copy_now(b.stream, SKV_TO_DEVICE, memory, b.pinned, PAGE), SKV_EINVAL);
    skv_device_free(b.device, skv_pool_address(b.pool)); /* not its to free: refused, logged */
    cr_assert_eq(copy_now(b.stream, SKV_TO_DEVICE, page_of(b.pool, 0), b.pinned, PAGE), 0);
    bench_close(&b);
}

/* ---- order ---- */

ON_EVERY_BACKEND(an_open_gate_means_the_copies_before_it_are_there)
{
    struct bench b = bench_open(backend);
    enum { ROUNDS = 50, CHUNKS = 64 };
    const uint64_t chunk = 4 * PAGE / CHUNKS;
    uint32_t *gate;
    cr_assert_eq(skv_pinned_alloc(b.device, 4096, (void **)&gate), 0);
    for (uint32_t round = 1; round <= ROUNDS; round++) {
        struct skv_copy up[CHUNKS], down[CHUNKS];
        uint64_t mark, later;
        fill(b.pinned, 4 * PAGE, round);
        for (uint64_t i = 0; i < CHUNKS; i++) {
            up[i] = (struct skv_copy){page_of(b.pool, 0) + i * chunk, b.pinned + i * chunk, chunk};
            down[i] = (struct skv_copy){b.pinned + 4 * PAGE + i * chunk, up[i].dst, chunk};
        }
        __atomic_store_n(gate, 0, __ATOMIC_RELAXED);
        cr_assert_eq(skv_stream_copy(b.stream, SKV_TO_DEVICE, up, CHUNKS), 0);
        cr_assert_eq(skv_stream_mark(b.stream, &mark), 0);
        cr_assert_eq(skv_stream_copy(b.stream, SKV_TO_HOST, down, CHUNKS), 0);
        cr_assert_eq(skv_stream_write32(b.stream, gate, round), 0);
        cr_assert_eq(skv_stream_mark(b.stream, &later), 0);
        cr_assert_leq(mark, later);
        cr_assert_eq(skv_gate_wait(gate, LONG), 0);
        cr_assert_eq(*gate, round);
        cr_assert(filled(b.pinned + 4 * PAGE, 4 * PAGE, round), "round %u", round);
        cr_assert_eq(skv_stream_wait(b.stream, later, LONG), 0);
        cr_assert_eq(skv_stream_query(b.stream, mark), 0, "marks are reached in order");
    }
    skv_pinned_free(b.device, gate);
    bench_close(&b);
}

ON_EVERY_BACKEND(many_marks_and_copies_in_flight_are_all_answered)
{
    struct bench b = bench_open(backend);
    enum { MANY = 3000 };
    static uint64_t marks[MANY];
    static struct skv_copy copies[MANY];
    for (uint64_t i = 0; i < MANY; i++) {
        copies[i] = (struct skv_copy){page_of(b.pool, 0) + i * 2048, b.pinned + i * 2048, 2048};
        cr_assert_eq(skv_stream_copy(b.stream, SKV_TO_DEVICE, &copies[i], 1), 0);
        cr_assert_eq(skv_stream_mark(b.stream, &marks[i]), 0);
        cr_assert(i == 0 || marks[i] >= marks[i - 1]);
    }
    cr_assert_eq(skv_stream_copy(b.stream, SKV_TO_DEVICE, copies, MANY), 0);
    for (int i = 0; i < MANY; i += 7)
        cr_assert_eq(skv_stream_wait(b.stream, marks[i], LONG), 0);
    cr_assert_eq(skv_stream_wait(b.stream, marks[MANY - 1], LONG), 0);
    cr_assert_eq(skv_stream_query(b.stream, marks[0]), 0);
    bench_close(&b);
}

ON_EVERY_BACKEND(closing_a_stream_waits_for_what_is_queued)
{
    struct bench b = bench_open(backend);
    fill(b.pinned, 4 * PAGE, 11);
    skv_device_delay(b.device, 20000);
    struct skv_copy up = {page_of(b.pool, 0), b.pinned, 4 * PAGE};
    struct skv_copy down = {b.pinned + 4 * PAGE, page_of(b.pool, 0), 4 * PAGE};
    cr_assert_eq(skv_stream_copy(b.stream, SKV_TO_DEVICE, &up, 1), 0);
    cr_assert_eq(skv_stream_copy(b.stream, SKV_TO_HOST, &down, 1), 0);
    skv_stream_close(b.stream);
    cr_assert(filled(b.pinned + 4 * PAGE, 4 * PAGE, 11));
    b.stream = NULL; /* closing NULL is fine */
    bench_close(&b);
}

Test(device, a_copy_is_invisible_until_it_is_reached)
{
    char hold[] = "/tmp/sidekv-hold-XXXXXX"; /* no copy is reached while it is there */
    int file = mkstemp(hold);
    cr_assert_geq(file, 0);
    close(file);
    setenv("SIDEKV_TEST_COPY_HOLD", hold, 1);
    struct bench b = bench_open(&backends[0]);
    uint32_t *gate = (uint32_t *)(b.pinned + 2 * PAGE);
    uint64_t mark;
    fill(b.pinned, PAGE, 1);
    struct skv_copy copy = {page_of(b.pool, 0), b.pinned, PAGE};
    cr_assert_eq(skv_stream_copy(b.stream, SKV_TO_DEVICE, &copy, 1), 0);
    cr_assert_eq(skv_stream_write32(b.stream, gate, 1), 0);
    cr_assert_eq(skv_stream_mark(b.stream, &mark), 0);
    cr_assert_not(filled(page_of(b.pool, 0), PAGE, 1));
    cr_assert_eq(skv_gate_wait(gate, 5), SKV_ETIMEDOUT);
    cr_assert_eq(skv_stream_query(b.stream, mark), SKV_EAGAIN);
    cr_assert_eq(skv_stream_wait(b.stream, mark, 5), SKV_ETIMEDOUT);
    /* A source changed too early is seen: the copy reads when it is reached. */
    fill(b.pinned, PAGE, 2);
    cr_assert_eq(unlink(hold), 0);
    cr_assert_eq(skv_stream_wait(b.stream, mark, LONG), 0);
    cr_assert(filled(page_of(b.pool, 0), PAGE, 2));
    cr_assert_eq(skv_gate_wait(gate, 0), 0);
    bench_close(&b);
}

/* ---- gates ---- */

static void *open_later(void *gate)
{
    usleep(20000);
    skv_gate_store(gate, 1);
    return NULL;
}

Test(device, a_store_opens_a_gate_and_wakes_its_waiter)
{
    uint32_t gate = 0;
    pthread_t opener;
    pthread_create(&opener, NULL, open_later, &gate);
    cr_assert_eq(skv_gate_wait(&gate, LONG), 0);
    pthread_join(opener, NULL);
    cr_assert_eq(skv_gate_wait(&gate, 0), 0, "an open gate needs no time");
}

Test(device, a_closed_gate_times_out)
{
    uint32_t gate = 0;
    uint64_t start = skv_now_ns();
    cr_assert_eq(skv_gate_wait(&gate, 0), SKV_ETIMEDOUT);
    cr_assert_eq(skv_gate_wait(&gate, 30), SKV_ETIMEDOUT);
    cr_assert_geq(skv_now_ns() - start, 30000000u);
}

Test(device, another_process_opens_a_gate_without_waking_anyone)
{
    uint32_t *gate = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pid_t child = fork();
    if (child == 0) {
        usleep(30000);
        __atomic_store_n(gate, 2, __ATOMIC_RELEASE); /* as a GPU would: no futex */
        _exit(0);
    }
    cr_assert_eq(skv_gate_wait(gate, LONG), 0);
    cr_expect_eq(__atomic_load_n(gate, __ATOMIC_RELAXED), 2, "it did not wait");
    waitpid(child, NULL, 0);
    munmap(gate, 4096);
}

/* ---- devices ---- */

ON_EVERY_BACKEND(a_device_is_found_by_its_uuid)
{
    struct skv_device *device = open_device(backend), *again = NULL;
    const struct skv_device_info *info = skv_device_info(device);
    cr_assert_eq(skv_device_open_uuid(info->kind, info->uuid, &again), 0);
    cr_assert_str_eq(skv_device_info(again)->name, info->name);
    cr_assert_gt(info->total_bytes, 0);
    cr_assert_leq(skv_device_free_bytes(device), info->total_bytes);
    skv_device_close(again);
    uint8_t other[16];
    memcpy(other, info->uuid, sizeof other);
    other[5] ^= 0x40;
    cr_assert_eq(skv_device_open_uuid(info->kind, other, &again), SKV_ENODEVICE);
    skv_device_close(device);
    skv_device_close(NULL);
}

Test(device, auto_opens_the_gpu_or_the_host)
{
    struct skv_device *device;
    cr_assert_eq(skv_device_open("auto", &device), 0);
    cr_assert_eq(is_host(device), !has_gpu());
    skv_device_close(device);
}

Test(device, unknown_devices_are_refused)
{
    struct skv_device *device = NULL;
    const char *names[] = {"", "gpu", "hostess", "cuda:", "cuda:x", "cuda:0x", "cuda:-1"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        cr_assert_eq(skv_device_open(names[i], &device), SKV_EINVAL, "'%s'", names[i]);
    cr_assert_eq(skv_device_open("cuda:1000", &device), SKV_ENODEVICE);
    cr_assert_eq(skv_device_open("host:1", &device), SKV_ENODEVICE);
    cr_assert_null(device);
}

ON_EVERY_BACKEND(a_forked_child_may_close)
{
    struct bench b = bench_open(backend);
    pid_t child = fork();
    if (child == 0) {
        bench_close(&b);
        _exit(0);
    }
    int status;
    cr_assert_eq(waitpid(child, &status, 0), child);
    cr_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    fill(b.pinned, PAGE, 4);
    cr_assert_eq(copy_now(b.stream, SKV_TO_DEVICE, page_of(b.pool, 0), b.pinned, PAGE), 0);
    bench_close(&b);
}

ON_EVERY_BACKEND(closing_a_device_gives_back_what_is_left)
{
    struct skv_device *device = open_device(backend);
    void *memory;
    char *map = mmap(NULL, MIB, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    cr_assert_eq(skv_pinned_alloc(device, MIB, &memory), 0);
    cr_assert_eq(skv_device_alloc(device, MIB, &memory), 0);
    cr_assert_eq(skv_host_register(device, map, MIB, false), 0);
    skv_device_close(device);
    cr_assert_eq(skv_device_open(backend->name, &device), 0);
    cr_assert_eq(skv_host_register(device, map, MIB, false), 0, "it was unregistered");
    skv_device_close(device);
    munmap(map, MIB);
}
