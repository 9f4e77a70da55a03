/* What tests of device.h share: bytes that are known again, a copy that has ended, and pools that
 * travel to other processes. */
#ifndef SKV_DEVICE_HELP_H
#define SKV_DEVICE_HELP_H

#include <stdlib.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "device.h"
#include "every_backend.h"
#include "fdpass.h"

#define MIB  (UINT64_C(1) << 20)
#define PAGE MIB /* the benchmark model's */
#define LONG 60000u

static inline void fill(void *memory, uint64_t bytes, uint64_t seed)
{
    uint64_t *words = memory, x = seed * 2 + 1;
    for (uint64_t i = 0; i < bytes / 8; i++) {
        x = x * UINT64_C(6364136223846793005) + 1442695040888963407u;
        words[i] = x;
    }
}

static inline bool filled(const void *memory, uint64_t bytes, uint64_t seed)
{
    const uint64_t *words = memory;
    uint64_t x = seed * 2 + 1;
    for (uint64_t i = 0; i < bytes / 8; i++) {
        x = x * UINT64_C(6364136223846793005) + 1442695040888963407u;
        if (words[i] != x)
            return false;
    }
    return true;
}

/* One copy, and wait for it. */
static inline int copy_now(struct skv_stream *stream, enum skv_direction direction, void *dst,
                           const void *src, uint64_t bytes)
{
    struct skv_copy copy = {.dst = dst, .src = src, .bytes = bytes};
    uint64_t mark;
    int status = skv_stream_copy(stream, direction, &copy, 1);
    if (status == 0)
        status = skv_stream_mark(stream, &mark);
    return status ? status : skv_stream_wait(stream, mark, LONG);
}

static inline char *page_of(const struct skv_pool *pool, uint64_t page)
{
    return (char *)skv_pool_address(pool) + page * PAGE;
}

/* ---- another process ---- */

/* In a child there is no Criterion: it says what went wrong, and its exit status does. */
#define CHILD_CHECK(condition)                                                                     \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "child, line %d: %s\n", __LINE__, #condition);                         \
            _exit(1);                                                                              \
        }                                                                                          \
    } while (0)

#define MAX_FDS SKV_FDS_PER_MESSAGE

static inline bool send_pool(int to, const struct skv_pool_handles *handles)
{
    return skv_send_fds(to, handles, sizeof *handles, handles->fds, handles->extents, 0) == 0;
}

static inline bool receive_pool(int from, struct skv_pool_handles *handles, int fds[MAX_FDS])
{
    uint32_t count;
    if (skv_receive_fds(from, handles, sizeof *handles, fds, MAX_FDS, &count, 0) != sizeof *handles)
        return false;
    handles->fds = fds;
    return handles->extents == count;
}

static inline void close_fds(const struct skv_pool_handles *handles)
{
    for (uint32_t i = 0; i < handles->extents; i++)
        close(handles->fds[i]);
}

static inline bool say(int to, char word)
{
    return write(to, &word, 1) == 1;
}

static inline char hear(int from)
{
    char word = 0;
    return read(from, &word, 1) == 1 ? word : '\0';
}

/* Starts `body` in a child; call before opening a device. The child dies with its socket. */
static inline pid_t start_peer(void (*body)(int socket, const struct backend *backend),
                               const struct backend *backend, int *socket)
{
    int ends[2];
    require(backend);
    cr_assert_eq(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends), 0);
    pid_t child = fork();
    cr_assert_geq(child, 0);
    if (child == 0) {
        close(ends[0]);
        body(ends[1], backend);
        _exit(0);
    }
    close(ends[1]);
    *socket = ends[0];
    return child;
}

static inline void end_peer(pid_t child, int socket)
{
    int status = 0;
    close(socket);
    cr_assert_eq(waitpid(child, &status, 0), child);
    cr_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the other process failed");
}

#endif
