/* A scripted daemon for the client's tests: a forked child that listens on a real socket in a
 * directory of its own and does what the test's script says, right or wrong. A real process, since
 * a pool cannot be imported where it was created, and since it can be killed.
 *
 * In the test: fake_start(), the library's calls, fake_end(). In the script (the child): FAKE_CHECK
 * instead of cr_assert; it ends the child with 99, which fake_end() returns. */
#ifndef FAKE_DAEMON_H
#define FAKE_DAEMON_H

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "clock.h"
#include "device.h"
#include "fdpass.h"
#include "hash.h"
#include "ring.h"

#define FAKE_PATIENCE_MS 60000 /* for what the other side does at once, on a busy machine */
#define FAKE_POOL_BYTES  (UINT64_C(2) << 20)

#define FAKE_CHECK(condition)                                                                      \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "fake daemon: %s:%d: not so: %s\n", __FILE__, __LINE__, #condition);   \
            _exit(99);                                                                             \
        }                                                                                          \
    } while (0)

/* What test and script tell each other, in shared memory. */
struct fake_shared {
    uint32_t go;      /* the test lets the script go on */
    uint32_t here;    /* the script has come this far */
    uint64_t drained; /* of the last HELLO */
    uint64_t seen;    /* whatever the script wants to report */
};

struct fake {
    char directory[40], path[64];
    pid_t pid;
    struct fake_shared *shared;
    const void *argument; /* for the script */
    uint64_t session;     /* id to give out; 0: 77 */
    uint64_t pool_bytes;  /* 0: FAKE_POOL_BYTES */
    uint32_t extents;     /* of a protected pool; 0: not protected */
    /* the child's */
    int listener, socket;
    struct wire_hello hello;
    int hello_fds[WIRE_HELLO_FDS];
    uint32_t *gates;
    struct skv_device *device;
    struct skv_pool *pool;
    struct wire_welcome welcome;
    int fds[WIRE_WELCOME_FDS + 1]; /* one more, to send too many */
    int bell;                      /* our end of the client's */
    uint8_t *memory;
    struct ring_side sq, cq;
};

static const struct skv_geometry fake_geometry = {
    .layers = 2, .heads = 1, .head_dim = 64, .page_tokens = 16};
static const struct skv_id fake_model = {.lo = 11, .hi = 22};

static inline struct skv_options fake_options(const struct fake *f)
{
    return (struct skv_options){.socket = f->path,
                                .geometry = fake_geometry,
                                .model = fake_model,
                                .rows = 2,
                                .timeout_ms = FAKE_PATIENCE_MS};
}

/* ---- in the test ---- */

static inline void fake_init(struct fake *f)
{
    *f = (struct fake){.listener = -1, .socket = -1};
    strcpy(f->directory, "/tmp/sidekv-fake-XXXXXX");
    if (!mkdtemp(f->directory))
        abort();
    snprintf(f->path, sizeof f->path, "%s/s", f->directory);
    f->shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (f->shared == MAP_FAILED)
        abort();
}

static inline void fake_listen(struct fake *f)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, f->path);
    unlink(f->path);
    f->listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (f->listener < 0 || bind(f->listener, (struct sockaddr *)&address, sizeof address) != 0 ||
        listen(f->listener, 4) != 0)
        abort();
}

/* Listens, then forks: a client may connect at once. */
static inline void fake_start(struct fake *f, void (*script)(struct fake *))
{
    fake_listen(f);
    fflush(NULL);
    f->pid = fork();
    if (f->pid < 0)
        abort();
    if (f->pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        signal(SIGPIPE, SIG_IGN);
        script(f);
        _exit(0);
    }
    close(f->listener);
    f->listener = -1;
}

/* The script's end: its exit code, or 128 + signal. */
static inline int fake_end(struct fake *f)
{
    int status = 0;
    waitpid(f->pid, &status, 0);
    f->pid = 0;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* Opens a session whose calls time out soon: as soon as can be on this machine, where a handshake
 * must be in time too. Returns the timeout, which the script has as its argument (uint32_t); 0: no
 * session. */
static inline uint32_t fake_open_impatient(struct fake *f, void (*script)(struct fake *),
                                           struct skv **skv)
{
    static uint32_t timeout_ms;
    struct skv_options options = fake_options(f);
    int status = SKV_ETIMEDOUT;
    f->argument = &timeout_ms;
    for (timeout_ms = 200; status == SKV_ETIMEDOUT; timeout_ms *= 2) {
        options.timeout_ms = timeout_ms;
        fake_start(f, script);
        status = skv_open(&options, skv);
        if (status == 0)
            return timeout_ms;
        kill(f->pid, SIGKILL);
        fake_end(f);
    }
    return 0;
}

static inline void fake_fini(struct fake *f)
{
    unlink(f->path);
    rmdir(f->directory);
    munmap(f->shared, 4096);
}

static inline void fake_go(struct fake *f)
{
    __atomic_add_fetch(&f->shared->go, 1, __ATOMIC_RELEASE);
}

static inline bool fake_await(const uint32_t *word, uint32_t value)
{
    for (int i = 0; i < FAKE_PATIENCE_MS; i++) {
        if (__atomic_load_n(word, __ATOMIC_ACQUIRE) >= value)
            return true;
        poll(NULL, 0, 1);
    }
    return false;
}

static inline int fake_open_fds(void)
{
    DIR *directory = opendir("/proc/self/fd");
    int count = 0;
    while (directory && readdir(directory))
        count++;
    closedir(directory);
    return count;
}

/* ---- in the script: the handshake ---- */

static inline void fake_wait_go(struct fake *f, uint32_t value)
{
    FAKE_CHECK(fake_await(&f->shared->go, value));
}

static inline void fake_here(struct fake *f)
{
    __atomic_add_fetch(&f->shared->here, 1, __ATOMIC_RELEASE);
}

static inline void fake_accept(struct fake *f)
{
    f->socket = accept4(f->listener, NULL, NULL, SOCK_CLOEXEC);
    FAKE_CHECK(f->socket >= 0);
    uint32_t count;
    ssize_t got = skv_receive_fds(f->socket, &f->hello, sizeof f->hello, f->hello_fds,
                                  WIRE_HELLO_FDS, &count, 0);
    FAKE_CHECK(got == (ssize_t)sizeof f->hello);
    FAKE_CHECK(f->hello.magic == WIRE_MAGIC && f->hello.version == WIRE_VERSION);
    bool worker = f->hello.kind == WIRE_WORKER;
    FAKE_CHECK(count == (worker ? 2 : 1));
    f->shared->drained = f->hello.drained;
    if (!worker)
        return;
    uint64_t bytes = wire_gate_bytes(f->hello.geometry.layers, f->hello.rows);
    FAKE_CHECK(fcntl(f->hello_fds[1], F_GET_SEALS) == (F_SEAL_SHRINK | F_SEAL_GROW));
    FAKE_CHECK(lseek(f->hello_fds[1], 0, SEEK_END) == (off_t)bytes);
    f->gates = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, f->hello_fds[1], 0);
    FAKE_CHECK(f->gates != MAP_FAILED);
}

static inline int fake_memory(uint64_t bytes, int seals)
{
    int fd = memfd_create("fake", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    FAKE_CHECK(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0);
    FAKE_CHECK(fcntl(fd, F_ADD_SEALS, seals) == 0);
    return fd;
}

/* Everything that a right welcome needs; the script may then spoil it. */
static inline void fake_prepare(struct fake *f)
{
    struct wire_welcome *w = &f->welcome;
    uint64_t page_bytes = skv_page_bytes(&fake_geometry);
    *w = (struct wire_welcome){.magic = WIRE_MAGIC,
                               .version = WIRE_VERSION,
                               .daemon_pid = (uint32_t)getpid(),
                               .geometry = fake_geometry,
                               .session = f->session ? f->session : 77,
                               .export = SKV_EXPORT_FD,
                               .device_kind = SKV_DEVICE_HOST,
                               .device = "host",
                               .session_bytes = wire_session_bytes(f->hello.rows),
                               .protect = f->extents != 0};
    FAKE_CHECK(skv_device_open("host", &f->device) == 0);
    memcpy(w->uuid, skv_device_info(f->device)->uuid, sizeof w->uuid);
    FAKE_CHECK(skv_pool_create_split(f->device, f->pool_bytes ? f->pool_bytes : FAKE_POOL_BYTES,
                                     page_bytes, f->extents ? f->extents : 1, &f->pool) == 0);
    const struct skv_pool_handles *pool = skv_pool_exported(f->pool);
    w->pool_bytes = pool->pool_bytes;
    w->pool_pages = pool->pool_bytes / page_bytes;
    w->extent_bytes = pool->extent_bytes;
    w->extents = pool->extents;

    f->fds[0] = fake_memory(w->session_bytes, F_SEAL_SHRINK | F_SEAL_GROW);
    f->fds[1] = eventfd(0, EFD_CLOEXEC);
    int bell[2];
    FAKE_CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, bell) == 0);
    f->fds[2] = bell[1];
    f->bell = bell[0];
    f->fds[3] = eventfd(0, EFD_CLOEXEC);
    f->memory = mmap(NULL, w->session_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, f->fds[0], 0);
    FAKE_CHECK(f->memory != MAP_FAILED);
    struct wire_ring *ring = (struct wire_ring *)f->memory;
    f->sq = (struct ring_side){.mine = &ring->sq_head,
                               .theirs = &ring->sq_tail,
                               .flags = &ring->sq_flags,
                               .entries = WIRE_ENTRIES};
    f->cq = (struct ring_side){.mine = &ring->cq_tail,
                               .theirs = &ring->cq_head,
                               .flags = &ring->cq_flags,
                               .entries = WIRE_CQ_ENTRIES};
}

/* false: the client has hung up. */
static inline bool fake_try_send(struct fake *f, const void *bytes, size_t size, const int *fds,
                                 uint32_t count)
{
    return skv_send_fds(f->socket, bytes, size, fds, count, 0) == 0;
}

static inline void fake_send(struct fake *f, const void *bytes, size_t size, const int *fds,
                             uint32_t count)
{
    FAKE_CHECK(fake_try_send(f, bytes, size, fds, count));
}

static inline void fake_send_welcome(struct fake *f)
{
    fake_send(f, &f->welcome, sizeof f->welcome, f->fds, WIRE_WELCOME_FDS);
}

static inline void fake_send_extents(struct fake *f)
{
    const struct skv_pool_handles *pool = skv_pool_exported(f->pool);
    struct wire_extents message = {.magic = WIRE_MAGIC, .count = pool->extents};
    fake_send(f, &message, sizeof message, pool->fds, pool->extents);
}

/* All of it, right. */
static inline void fake_handshake(struct fake *f)
{
    fake_accept(f);
    fake_prepare(f);
    fake_send_welcome(f);
    if (f->hello.kind == WIRE_WORKER)
        fake_send_extents(f);
}

static inline void fake_await_hang_up(struct fake *f)
{
    struct pollfd poller = {.fd = f->socket, .events = POLLIN};
    char byte;
    FAKE_CHECK(poll(&poller, 1, FAKE_PATIENCE_MS) == 1);
    FAKE_CHECK(recv(f->socket, &byte, 1, 0) <= 0);
}

/* ---- in the script: the rings ---- */

/* Takes one entry, asleep until it comes (NEED_WAKEUP set). */
static inline struct wire_sqe fake_take_any(struct fake *f)
{
    for (;;) {
        uint32_t ready = ring_ready(&f->sq);
        FAKE_CHECK(ready != UINT32_MAX);
        if (ready)
            break;
        if (ring_sleep(&f->sq)) {
            struct pollfd bell = {.fd = f->fds[1], .events = POLLIN};
            FAKE_CHECK(poll(&bell, 1, FAKE_PATIENCE_MS) == 1);
            eventfd_t rings;
            eventfd_read(f->fds[1], &rings);
        }
        ring_awake(&f->sq);
    }
    const struct wire_sqe *entries = (struct wire_sqe *)(f->memory + WIRE_SQ_OFFSET);
    struct wire_sqe sqe = entries[f->sq.index % WIRE_ENTRIES];
    ring_publish(&f->sq, 1);
    FAKE_CHECK(sqe.reserved0 == 0 && sqe.reserved == 0);
    return sqe;
}

static inline struct wire_sqe fake_take(struct fake *f, enum wire_opcode opcode)
{
    struct wire_sqe sqe = fake_take_any(f);
    FAKE_CHECK(sqe.opcode == opcode);
    return sqe;
}

static inline void fake_complete(struct fake *f, struct wire_cqe cqe)
{
    struct wire_cqe *entries = (struct wire_cqe *)(f->memory + WIRE_CQ_OFFSET);
    entries[f->cq.index % WIRE_CQ_ENTRIES] = cqe;
    ring_publish(&f->cq, 1);
    if (ring_must_wake(&f->cq))
        send(f->bell, &(uint64_t){1}, sizeof(uint64_t), MSG_NOSIGNAL);
}

static inline void fake_answer(struct fake *f, const struct wire_sqe *sqe, int status)
{
    fake_complete(f, (struct wire_cqe){.user_data = sqe->user_data, .status = status});
}

static inline void fake_answer_a_ping(struct fake *f)
{
    struct wire_sqe sqe = fake_take(f, WIRE_NOP);
    fake_answer(f, &sqe, 0);
    fake_await_hang_up(f);
}

/* A script: a session that is asked for one ping. */
static inline void fake_serve_a_ping(struct fake *f)
{
    fake_handshake(f);
    fake_answer_a_ping(f);
}

static inline struct wire_slot *fake_slot(struct fake *f, uint32_t row)
{
    return (struct wire_slot *)(f->memory + WIRE_SLOTS_OFFSET) + row;
}

/* A right grant of `cached` tokens for request `i`, with pages 3 * i, 3 * i + 1, ... */
static inline struct wire_grant *fake_grant(struct fake *f, uint32_t row, uint32_t i,
                                            uint32_t cached, bool append)
{
    struct wire_slot *slot = fake_slot(f, row);
    uint32_t covered = append ? slot->requests[i].history : cached;
    uint32_t offset = i * SKV_MAX_USER_PAGES;
    struct wire_grant *g = &slot->grants[i];
    *g = (struct wire_grant){.flags = append ? SKV_GRANT_APPEND : 0,
                             .cached = cached,
                             .gpu_tokens = cached,
                             .page_offset = offset,
                             .page_count = (covered + 15) / 16,
                             .lease = 1000 + i};
    for (uint32_t page = 0; page < g->page_count; page++)
        slot->pages[offset + page] = 3 * i + page;
    return g;
}

#endif
