/* The handshake: a path in, a checked welcome and its fds out. Called by skv_open() and
 * skv_reconnect() only.
 *
 * connect -> HELLO with our fds -> WELCOME with {session memfd, SQ eventfd, CQ bell} -> the
 * pool's extents, WIRE_FDS_PER_MESSAGE at a time. Every step has the same deadline. The socket
 * is non-blocking from its first moment; a full backlog is retried, not waited for.
 *
 * What can go wrong: nobody listens, the peer hangs up or falls silent, refuses with a reason, is
 * another version, or sends nonsense: each has its own words. fds that came with a bad message are
 * closed with everything else. */
#include "skv_session.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fdpass.h"

_Static_assert(WIRE_FDS_PER_MESSAGE <= SKV_FDS_PER_MESSAGE, "a message of the wire fits");

#define CONNECT_RETRY_MS 10

__attribute__((format(printf, 3, 4))) static int fail(struct skv_link *link, int status,
                                                      const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(link->reason, sizeof link->reason, format, arguments);
    va_end(arguments);
    return status;
}

/* Whole milliseconds to the deadline, rounded up, for poll(). */
static int remaining_ms(uint64_t deadline_ns)
{
    uint64_t now = skv_now_ns();
    if (now >= deadline_ns)
        return 0;
    uint64_t ms = (deadline_ns - now + 999999) / 1000000;
    return ms > INT_MAX ? INT_MAX : (int)ms;
}

static int await(struct skv_link *link, short events, uint64_t deadline_ns, const char *what)
{
    for (;;) {
        struct pollfd poller = {.fd = link->socket, .events = events};
        int left = remaining_ms(deadline_ns);
        int ready = poll(&poller, 1, left);
        if (ready > 0)
            return SKV_OK; /* errors and hang-ups show in the call that follows */
        if (ready < 0 && errno != EINTR)
            return fail(link, SKV_EIO, "poll: %s", strerror(errno));
        if (ready == 0 && left == 0)
            return fail(link, SKV_ETIMEDOUT, "the daemon did not %s in time", what);
    }
}

/* ---- connect ---- */

/* Is it there, and no socket? connect() says of such a file what it says of a dead daemon's socket,
 * or of one that is not ours to write to. */
static bool is_other_file(const char *path)
{
    struct stat file;
    return stat(path, &file) == 0 && !S_ISSOCK(file.st_mode);
}

static int connect_to(struct skv_link *link, const char *path, uint64_t deadline_ns)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        return fail(link, SKV_EINVAL, "the socket's path is longer than %zu bytes",
                    sizeof address.sun_path - 1);
    memcpy(address.sun_path, path, strlen(path) + 1);
    link->socket = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (link->socket < 0)
        return fail(link, SKV_ENOMEM, "socket: %s", strerror(errno));

    while (connect(link->socket, (struct sockaddr *)&address, sizeof address) != 0) {
        int error = errno;
        if ((error == ECONNREFUSED || error == EACCES) && is_other_file(path))
            error = EPROTOTYPE;
        switch (error) {
        case EAGAIN: /* its backlog is full */
            if (remaining_ms(deadline_ns) == 0)
                return fail(link, SKV_ETIMEDOUT, "the daemon at %s takes no connections", path);
            poll(NULL, 0, CONNECT_RETRY_MS);
            continue;
        case EINTR:
            continue;
        case ENOENT:
        case ECONNREFUSED:
            return fail(link, SKV_ELOST,
                        "nobody listens on %s (%s); start the daemon: sidekvd --socket %s", path,
                        strerror(error), path);
        case EACCES:
        case EPERM:
            return fail(link, SKV_EPERM,
                        "%s: %s; the socket is open to the daemon's own user and root", path,
                        strerror(error));
        case EPROTOTYPE:
            return fail(link, SKV_EPROTO, "%s is not a sidekvd socket", path);
        default:
            return fail(link, SKV_EIO, "connect to %s: %s", path, strerror(error));
        }
    }
    return SKV_OK;
}

/* ---- messages ---- */

static int send_hello(struct skv_link *link, const struct wire_hello *hello, const int *fds,
                      uint32_t count, uint64_t deadline_ns)
{
    while (skv_send_fds(link->socket, hello, sizeof *hello, fds, count, 0) != 0) {
        if (errno == EPIPE || errno == ECONNRESET)
            return fail(link, SKV_ELOST, "the daemon hung up before the handshake");
        if (errno != EAGAIN)
            return fail(link, SKV_EIO, "sendmsg: %s", strerror(errno));
        int status = await(link, POLLOUT, deadline_ns, "take the handshake");
        if (status)
            return status;
    }
    return SKV_OK;
}

static void close_all(int *fds, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        if (fds[i] >= 0)
            close(fds[i]);
}

/* One message with up to `room` fds. *length and *count say what came: of a message longer than
 * `size`, size + 1 and no fds. */
static int receive(struct skv_link *link, void *bytes, size_t size, size_t *length, int *fds,
                   uint32_t room, uint32_t *count, uint64_t deadline_ns)
{
    ssize_t got;
    do {
        int status = await(link, POLLIN, deadline_ns, "answer the handshake");
        if (status)
            return status;
        got = skv_receive_fds(link->socket, bytes, size, fds, room, count, 0);
    } while (got < 0 && errno == EAGAIN);
    if (got == 0)
        return fail(link, SKV_ELOST, "the daemon hung up in the middle of the handshake");
    if (got < 0 && errno == EPROTO)
        return fail(link, SKV_EPROTO,
                    "fds of the handshake were lost: too many, or more than RLIMIT_NOFILE allows");
    if (got < 0 && errno != EMSGSIZE)
        return fail(link, SKV_ELOST, "the daemon hung up: %s", strerror(errno));
    *length = got < 0 ? size + 1 : (size_t)got;
    return SKV_OK;
}

/* ---- what the welcome says ---- */

/* The daemon's words, without what a terminal would obey. */
static void plain_text(char *out, const char *text, size_t size)
{
    size_t i = 0;
    for (; i < size - 1 && text[i]; i++)
        out[i] = text[i] >= 0x20 && text[i] < 0x7f ? text[i] : '?';
    out[i] = '\0';
}

static bool all_zero(const uint64_t *words, size_t count)
{
    uint64_t any = 0;
    for (size_t i = 0; i < count; i++)
        any |= words[i];
    return any == 0;
}

static int check_pool(struct skv_link *link)
{
    const struct wire_welcome *w = &link->welcome;
    uint64_t page_bytes = skv_page_bytes(&w->geometry);
    if (w->pool_pages == 0 || w->pool_pages > UINT32_MAX ||
        w->pool_pages > w->pool_bytes / page_bytes)
        return fail(link, SKV_EPROTO, "the welcome's pool makes no sense");
    if (w->protect > (w->export == SKV_EXPORT_FD))
        return fail(link, SKV_EPROTO, "the welcome's protection makes no sense");
    bool fits = w->export == SKV_EXPORT_FD
                    ? w->extents >= 1 && w->extents <= WIRE_MAX_EXTENTS && w->extent_bytes != 0 &&
                          w->extent_bytes % page_bytes == 0 &&
                          w->pool_bytes % w->extent_bytes == 0 &&
                          w->pool_bytes / w->extent_bytes == w->extents
                    : w->export == SKV_EXPORT_IPC && w->extents == 0 && w->extent_bytes == 0;
    if (!fits)
        return fail(link, SKV_EPROTO, "the welcome's pool extents make no sense");
    return SKV_OK;
}

static int check_welcome(struct skv_link *link, const struct wire_hello *hello, size_t length)
{
    struct wire_welcome *w = &link->welcome;
    if (length < 8 || w->magic != WIRE_MAGIC)
        return fail(link, SKV_EPROTO, "what listens there is not sidekvd");
    bool whole = length == sizeof *w;
    char text[sizeof w->text];
    if (whole) {
        plain_text(text, w->text, sizeof w->text);
        plain_text(w->device, w->device, sizeof w->device);
    }
    if (w->version != WIRE_VERSION)
        return fail(link, SKV_EVERSION,
                    "the daemon speaks protocol %u, this library %u: %s, or install both from one "
                    "release",
                    w->version, WIRE_VERSION,
                    w->version < WIRE_VERSION
                        ? "restart the daemon, if a later one is installed"
                        : "restart this process with the library that is installed");
    if (!whole)
        return fail(link, SKV_EPROTO, "the welcome has %s bytes than %zu",
                    length > sizeof *w ? "more" : "fewer", sizeof *w);
    if (!skv_status_told(w->status))
        return fail(link, SKV_EPROTO, "the welcome's status %d is none", w->status);
    if (w->status)
        return fail(link, w->status, "the daemon refused: %s", text[0] ? text : "no reason given");

    bool worker = hello->kind == WIRE_WORKER;
    if (w->reserved0 || w->reserved1 ||
        !all_zero(w->reserved, sizeof w->reserved / sizeof *w->reserved))
        return fail(link, SKV_EPROTO, "the welcome's reserved fields are not zero");
    if (skv_geometry_check(&w->geometry) ||
        (worker && memcmp(&w->geometry, &hello->geometry, sizeof w->geometry) != 0))
        return fail(link, SKV_EPROTO, "the welcome's geometry is not what was asked for");
    if (w->session == 0 || w->session_bytes != wire_session_bytes(hello->rows) ||
        w->device_kind > SKV_DEVICE_CUDA || w->mps > 1)
        return fail(link, SKV_EPROTO, "the welcome's session makes no sense");
    return worker ? check_pool(link) : SKV_OK;
}

/* A bell rung too often, or one that is none, shall not hold up whoever rings it. */
static int check_bells(struct skv_link *link)
{
    if (fcntl(link->sq_event, F_SETFL, O_NONBLOCK) || fcntl(link->cq_event, F_SETFL, O_NONBLOCK))
        return fail(link, SKV_EPROTO, "the session's doorbells: %s", strerror(errno));
    return SKV_OK;
}

/* A memfd that is smaller than it should be, or may shrink, is a SIGBUS to come. */
static int check_memory(struct skv_link *link)
{
    struct stat info;
    int seals = fcntl(link->memory, F_GET_SEALS);
    if (fstat(link->memory, &info) != 0 || (uint64_t)info.st_size < link->welcome.session_bytes)
        return fail(link, SKV_EPROTO, "the session's memory is smaller than the welcome says");
    if (seals < 0 || !(seals & F_SEAL_SHRINK))
        return fail(link, SKV_EPROTO, "the session's memory is not sealed against shrinking");
    return SKV_OK;
}

static int receive_welcome(struct skv_link *link, const struct wire_hello *hello,
                           uint64_t deadline_ns)
{
    int fds[WIRE_WELCOME_FDS];
    uint32_t count = 0;
    size_t length = 0;
    int status = receive(link, &link->welcome, sizeof link->welcome, &length, fds, WIRE_WELCOME_FDS,
                         &count, deadline_ns);
    if (status)
        return status;
    status = check_welcome(link, hello, length);
    if (!status && count != WIRE_WELCOME_FDS)
        status =
            fail(link, SKV_EPROTO, "the welcome carries %u fds, not %u", count, WIRE_WELCOME_FDS);
    if (status) {
        close_all(fds, count);
        return status;
    }
    link->memory = fds[0];
    link->sq_event = fds[1];
    link->cq_event = fds[2];
    status = check_bells(link);
    return status ? status : check_memory(link);
}

/* ---- the pool's fds ---- */

static int receive_extents(struct skv_link *link, uint64_t deadline_ns)
{
    const struct wire_welcome *w = &link->welcome;
    /* Protected, the host backend keeps one of each for its views. */
    int status = skv_fd_limit_raise((1 + w->protect) * w->extents);
    if (status)
        return fail(link, status, "the pool's %u fds are more than this process may open",
                    w->extents);
    link->extents = malloc(w->extents * sizeof *link->extents);
    if (!link->extents)
        return fail(link, SKV_ENOMEM, "no memory for %u fds", w->extents);
    while (link->extent_count < w->extents) {
        struct wire_extents message;
        int fds[WIRE_FDS_PER_MESSAGE];
        uint32_t count = 0;
        size_t length = 0;
        status = receive(link, &message, sizeof message, &length, fds, WIRE_FDS_PER_MESSAGE, &count,
                         deadline_ns);
        if (status)
            return status;
        if (length != sizeof message || message.magic != WIRE_MAGIC || message.reserved ||
            message.first != link->extent_count || message.count != count || count == 0 ||
            count > w->extents - link->extent_count) {
            close_all(fds, count);
            return fail(link, SKV_EPROTO, "the pool's fds came in disorder");
        }
        memcpy(link->extents + link->extent_count, fds, count * sizeof *fds);
        link->extent_count += count;
    }
    if (w->device_kind != SKV_DEVICE_HOST)
        return SKV_OK; /* a driver's fds have no size to ask for */
    for (uint32_t i = 0; i < link->extent_count; i++) {
        struct stat info;
        if (fstat(link->extents[i], &info) != 0 || (uint64_t)info.st_size < w->extent_bytes)
            return fail(link, SKV_EPROTO, "extent %u is smaller than the welcome says", i);
    }
    return SKV_OK;
}

/* ---- outside ---- */

void skv_link_init(struct skv_link *link)
{
    memset(link, 0, sizeof *link);
    link->socket = link->memory = link->sq_event = link->cq_event = -1;
}

void skv_link_close_extents(struct skv_link *link)
{
    if (link->extents)
        close_all(link->extents, link->extent_count);
    free(link->extents);
    link->extents = NULL;
    link->extent_count = 0;
}

void skv_link_close(struct skv_link *link)
{
    skv_link_close_extents(link);
    close_all((int[]){link->socket, link->memory, link->sq_event, link->cq_event}, 4);
    link->socket = link->memory = link->sq_event = link->cq_event = -1;
}

int skv_link_open(struct skv_link *link, const char *path, const struct wire_hello *hello,
                  const int *hello_fds, uint32_t hello_fd_count, uint64_t deadline_ns)
{
    skv_link_init(link);
    int status = connect_to(link, path, deadline_ns);
    if (!status)
        status = send_hello(link, hello, hello_fds, hello_fd_count, deadline_ns);
    if (!status)
        status = receive_welcome(link, hello, deadline_ns);
    if (!status && hello->kind == WIRE_WORKER && link->welcome.export == SKV_EXPORT_FD)
        status = receive_extents(link, deadline_ns);
    if (status)
        skv_link_close(link);
    return status;
}
