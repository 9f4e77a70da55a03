/* What a hostile or broken client may do, as scripts: each plays one client in a process of its own
 * and tells how the daemon took it. A script's expected outcome stands beside it. */
#ifndef SKV_HOSTILE_SCRIPTS_H
#define SKV_HOSTILE_SCRIPTS_H

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

#include "clock.h"
#include "raw_client.h"
#include "verifier.h"

#define LIVES  "(lives)"  /* it is served on */
#define CLOSED "(closed)" /* ended without a word: it hung up first */

struct outcome {
    int status;
    char text[256];
};

struct scene {
    const struct rig *rig;
    struct raw raw;
    struct outcome out;
};

static inline void tell(struct scene *s, int status, const char *text)
{
    s->out.status = status;
    snprintf(s->out.text, sizeof s->out.text, "%s", text);
}

/* Reads how the session ended. */
static inline void ended(struct scene *s)
{
    struct wire_goodbye bye = {0};
    ssize_t got = raw_receive(s->raw.socket, &bye, sizeof bye, NULL, RAW_PATIENCE_MS);
    if (got == sizeof bye && bye.magic == WIRE_MAGIC)
        tell(s, bye.status, bye.text);
    else
        tell(s, 0, got == 0 ? CLOSED : "(nothing said in time)");
}

/* Is it served? NOP and back. */
static inline void lives(struct scene *s)
{
    struct wire_cqe cqe;
    raw_submit(&s->raw, &(struct wire_sqe){.opcode = WIRE_NOP, .user_data = 4711});
    if (raw_completion(&s->raw, &cqe) && cqe.user_data == 4711 && cqe.status == 0)
        tell(s, 0, LIVES);
    else
        tell(s, 1, "(not served any more)");
}

/* For a step that must have worked: otherwise the outcome is what did not. */
#define NEED(condition)                                                                            \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            tell(s, 1, "(not so: " #condition ")");                                                \
            return;                                                                                \
        }                                                                                          \
    } while (0)

static inline bool does(struct raw *raw, struct wire_sqe sqe, struct wire_cqe *cqe)
{
    raw_submit(raw, &sqe);
    return raw_completion(raw, cqe);
}

/* Acquires one user with `history` tokens, hashes all 9s, in a row. */
static inline bool acquires(struct raw *raw, uint16_t row, uint64_t user, uint32_t history,
                            struct wire_cqe *cqe)
{
    struct wire_slot *slot = &raw->slots[row];
    slot->requests[0] =
        (struct wire_request){.user = {user, 1}, .history = history, .max_cached = UINT32_MAX};
    for (uint32_t i = 0; i < history / tiny.page_tokens + 1; i++)
        slot->hashes[i] = 9 + i;
    return does(raw, (struct wire_sqe){.opcode = WIRE_ACQUIRE, .row = row, .count = 1}, cqe);
}

/* Ends the lease that the row's grant names. */
static inline bool ends(struct raw *raw, uint8_t opcode, uint16_t row, struct wire_cqe *cqe)
{
    raw->slots[row].leases[0] = raw->slots[row].grants[0].lease;
    return does(raw, (struct wire_sqe){.opcode = opcode, .row = row, .count = 1}, cqe);
}

/* A user that no other script has. */
static inline uint64_t own_user(void)
{
    return (uint64_t)getpid();
}

/* ---- handshakes ---- */

enum gift { /* what may come as a file descriptor */
            PIDFD = 1,
            PIDFD_OF_INIT,
            GATES,
            GATES_UNSEALED,
            GATES_WRITE_SEALED,
            GATES_SMALL,
            GATES_LARGE,
            GATES_READ_ONLY,
            GATES_HUGE_PAGES,
            A_PIPE,
            A_DIRECTORY,
            A_SOCKET,
            A_URING,
            AN_EPOLL,
            AN_EVENTFD,
            DEV_ZERO,
            DEV_NULL,
};

static inline int gift_fd(enum gift kind)
{
    const uint64_t bytes = wire_gate_bytes(tiny.layers, 1);
    int fd, pair[2];
    char path[64];
    switch (kind) {
    case PIDFD:
        return (int)syscall(SYS_pidfd_open, getpid(), 0);
    case PIDFD_OF_INIT:
        return (int)syscall(SYS_pidfd_open, 1, 0);
    case GATES:
        return raw_gates(bytes, true);
    case GATES_UNSEALED:
        return raw_gates(bytes, false);
    case GATES_WRITE_SEALED:
        fd = raw_gates(bytes, true);
        fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE);
        return fd;
    case GATES_SMALL:
        return raw_gates(bytes / 2, true);
    case GATES_LARGE:
        return raw_gates(UINT64_C(1) << 40, true);
    case GATES_READ_ONLY:
        snprintf(path, sizeof path, "/proc/self/fd/%d", raw_gates(bytes, true));
        return open(path, O_RDONLY | O_CLOEXEC);
    case GATES_HUGE_PAGES:
        fd = memfd_create("huge", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_HUGETLB);
        if (fd < 0)
            return raw_gates(2u << 20, true);
        if (ftruncate(fd, 2 << 20) || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW))
            abort();
        return fd;
    case A_PIPE:
        return pipe(pair) ? -1 : pair[1];
    case A_DIRECTORY:
        return open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    case A_SOCKET:
        return socketpair(AF_UNIX, SOCK_STREAM, 0, pair) ? -1 : pair[0];
    case A_URING: {
        char parameters[120] = {0};
        return (int)syscall(SYS_io_uring_setup, 4, parameters);
    }
    case AN_EPOLL:
        return epoll_create1(0);
    case AN_EVENTFD:
        return eventfd(0, 0);
    case DEV_ZERO:
        return open("/dev/zero", O_RDWR | O_CLOEXEC);
    case DEV_NULL:
        return open("/dev/null", O_RDWR | O_CLOEXEC);
    }
    return -1;
}

struct greeting {
    struct wire_hello hello;
    size_t bytes;
    enum gift gifts[2];
    uint32_t copies; /* of the last gift */
};

static inline void greet(struct scene *s, const struct greeting *g)
{
    char longer[256] = {0};
    int fds[256];
    uint32_t count = 0;
    memcpy(longer, &g->hello, sizeof g->hello);
    for (uint32_t i = 0; i < 2 && g->gifts[i]; i++)
        fds[count++] = gift_fd(g->gifts[i]);
    for (uint32_t i = 1; i < g->copies; i++, count++)
        fds[count] = fds[count - 1];
    s->raw.socket = raw_connect(s->rig);
    if (!raw_send(s->raw.socket, longer, g->bytes, fds, count)) {
        fds[count - 1] = gift_fd(DEV_NULL); /* newer kernels pass no io_uring on */
        raw_send(s->raw.socket, longer, g->bytes, fds, count);
    }
    if (raw_welcome(&s->raw, g->hello.rows))
        lives(s);
    else if (s->raw.welcome.magic == WIRE_MAGIC)
        tell(s, s->raw.welcome.status, s->raw.welcome.text);
    else
        tell(s, 0, CLOSED);
}

/* ---- rings ---- */

/* Some entries first, so that no index is 0. */
static inline bool opens(struct scene *s)
{
    struct wire_cqe cqe;
    bool fine = raw_open(&s->raw, s->rig, &tiny);
    for (int i = 0; fine && i < 5; i++)
        fine = does(&s->raw, (struct wire_sqe){.opcode = WIRE_NOP}, &cqe);
    return fine;
}

static inline bool opens_rows(struct scene *s, uint32_t rows)
{
    struct wire_hello hello = raw_hello(&tiny);
    hello.rows = rows;
    return raw_open_as(&s->raw, s->rig, &hello, raw_gates(wire_gate_bytes(tiny.layers, rows), 1));
}

static inline void tail_becomes(struct scene *s, uint32_t by)
{
    NEED(opens(s));
    __atomic_store_n(&s->raw.ring->sq_tail, s->raw.sq_tail + by, __ATOMIC_RELEASE);
    raw_bell(&s->raw);
    ended(s);
}

static inline void tail_one_too_far(struct scene *s)
{
    tail_becomes(s, WIRE_ENTRIES + 1);
}

static inline void tail_half_way_round(struct scene *s)
{
    tail_becomes(s, UINT32_C(1) << 31);
}

static inline void tail_one_back(struct scene *s)
{
    tail_becomes(s, UINT32_MAX);
}

static inline void head_becomes(struct scene *s, uint32_t by)
{
    NEED(opens(s));
    __atomic_store_n(&s->raw.ring->cq_head, s->raw.cq_head + by, __ATOMIC_RELEASE);
    raw_submit(&s->raw, &(struct wire_sqe){.opcode = WIRE_NOP});
    ended(s);
}

static inline void head_before_the_tail(struct scene *s)
{
    head_becomes(s, 1);
}

static inline void head_too_far_back(struct scene *s)
{
    head_becomes(s, 0u - WIRE_CQ_ENTRIES - 1);
}

static inline void head_half_way_round(struct scene *s)
{
    head_becomes(s, UINT32_C(1) << 31);
}

/* As far back as may be: no room, so nothing is taken till it comes back. */
static inline void head_back_and_again(struct scene *s)
{
    NEED(opens(s));
    uint32_t head = s->raw.cq_head;
    __atomic_store_n(&s->raw.ring->cq_head, head - WIRE_CQ_ENTRIES, __ATOMIC_RELEASE);
    raw_submit(&s->raw, &(struct wire_sqe){.opcode = WIRE_NOP});
    usleep(20000);
    NEED(__atomic_load_n(&s->raw.ring->cq_tail, __ATOMIC_ACQUIRE) == head);
    __atomic_store_n(&s->raw.ring->cq_head, head, __ATOMIC_RELEASE);
    struct wire_cqe cqe;
    raw_bell(&s->raw);
    NEED(raw_completion(&s->raw, &cqe));
    lives(s);
}

static inline void daemons_indices_overwritten(struct scene *s)
{
    NEED(opens(s));
    s->raw.ring->sq_head = 12345;
    s->raw.ring->sq_flags = UINT32_MAX;
    s->raw.ring->cq_flags = UINT32_MAX;
    __atomic_store_n(&s->raw.ring->cq_tail, s->raw.cq_head, __ATOMIC_RELEASE);
    lives(s);
}

static inline void entries_overwritten_once_taken(struct scene *s)
{
    NEED(opens(s));
    for (int i = 0; i < 100; i++) {
        struct wire_cqe cqe;
        NEED(does(&s->raw, (struct wire_sqe){.opcode = WIRE_NOP}, &cqe));
        memset(s->raw.sqes, 0xff, WIRE_CQ_OFFSET - WIRE_SQ_OFFSET);
        memset(s->raw.cqes, 0xff, WIRE_SCRATCH_OFFSET - WIRE_CQ_OFFSET);
    }
    lives(s);
}

static inline void completions_not_taken(struct scene *s)
{
    struct wire_cqe cqe;
    NEED(raw_open(&s->raw, s->rig, &tiny));
    for (uint32_t i = 0; i < WIRE_CQ_ENTRIES + WIRE_ENTRIES; i++) {
        for (int wait = 0;
             s->raw.sq_tail - __atomic_load_n(&s->raw.ring->sq_head, __ATOMIC_ACQUIRE) ==
             WIRE_ENTRIES;
             wait++) {
            NEED(wait < RAW_PATIENCE_MS);
            usleep(1000);
        }
        raw_submit(&s->raw, &(struct wire_sqe){.opcode = WIRE_STATS, .user_data = i});
    }
    for (uint32_t i = 0; i < WIRE_CQ_ENTRIES + WIRE_ENTRIES; i++) {
        NEED(raw_completion(&s->raw, &cqe) && cqe.user_data == i);
        raw_bell(&s->raw);
    }
    lives(s);
}

/* ---- leases ---- */

static inline void commit_twice(struct scene *s)
{
    struct wire_cqe cqe;
    NEED(raw_open(&s->raw, s->rig, &tiny));
    NEED(acquires(&s->raw, 0, own_user(), 40, &cqe) && !s->raw.slots[0].grants[0].status);
    NEED(ends(&s->raw, WIRE_COMMIT, 0, &cqe) && s->raw.slots[0].results[0].committed == 40);
    NEED(ends(&s->raw, WIRE_COMMIT, 0, &cqe) && s->raw.slots[0].results[0].status == SKV_ESTALE);
    NEED(ends(&s->raw, WIRE_RELEASE, 0, &cqe) && s->raw.slots[0].results[0].status == SKV_ESTALE);
    lives(s);
}

static inline void one_lease_64_times(struct scene *s)
{
    struct wire_cqe cqe;
    struct wire_slot *slot;
    NEED(raw_open(&s->raw, s->rig, &tiny));
    slot = s->raw.slots;
    NEED(acquires(&s->raw, 0, own_user(), 40, &cqe));
    for (uint32_t i = 0; i < SKV_MAX_BATCH; i++)
        slot->leases[i] = slot->grants[0].lease;
    NEED(does(&s->raw, (struct wire_sqe){.opcode = WIRE_COMMIT, .count = SKV_MAX_BATCH}, &cqe));
    NEED(slot->results[0].status == 0);
    for (uint32_t i = 1; i < SKV_MAX_BATCH; i++)
        NEED(slot->results[i].status == SKV_ESTALE);
    lives(s);
}

static inline void acquire_on_an_owned_row(struct scene *s)
{
    struct wire_cqe cqe;
    NEED(raw_open(&s->raw, s->rig, &tiny));
    NEED(acquires(&s->raw, 0, own_user(), 40, &cqe) && !cqe.status);
    NEED(acquires(&s->raw, 0, own_user(), 40, &cqe) && cqe.status == SKV_EBUSY);
    NEED(does(&s->raw, (struct wire_sqe){.opcode = WIRE_PREFETCH, .count = 1}, &cqe));
    NEED(cqe.status == SKV_EBUSY);
    lives(s);
}

static inline void lease_of_another_row(struct scene *s)
{
    struct wire_cqe cqe;
    NEED(opens_rows(s, 2));
    NEED(acquires(&s->raw, 0, own_user(), 40, &cqe));
    s->raw.slots[1].leases[0] = s->raw.slots[0].grants[0].lease;
    NEED(does(&s->raw, (struct wire_sqe){.opcode = WIRE_COMMIT, .row = 1, .count = 1}, &cqe));
    NEED(s->raw.slots[1].results[0].status == SKV_ESTALE);
    NEED(ends(&s->raw, WIRE_COMMIT, 0, &cqe) && s->raw.slots[0].results[0].committed == 40);
    lives(s);
}

static inline void lease_of_an_earlier_batch(struct scene *s)
{
    struct wire_cqe cqe;
    NEED(raw_open(&s->raw, s->rig, &tiny));
    NEED(acquires(&s->raw, 0, own_user(), 40, &cqe));
    uint64_t lease = s->raw.slots[0].grants[0].lease;
    NEED(ends(&s->raw, WIRE_RELEASE, 0, &cqe));
    NEED(acquires(&s->raw, 0, own_user(), 40, &cqe));
    for (uint64_t bit = 0; bit < 64; bit++) { /* and every one that is a bit beside its own */
        s->raw.slots[0].leases[0] =
            bit ? s->raw.slots[0].grants[0].lease ^ UINT64_C(1) << bit : lease;
        NEED(does(&s->raw, (struct wire_sqe){.opcode = WIRE_COMMIT, .count = 1}, &cqe));
        NEED(s->raw.slots[0].results[0].status == SKV_ESTALE);
    }
    lives(s);
}

static inline void lease_of_another_session(struct scene *s)
{
    struct wire_cqe cqe;
    struct raw other;
    NEED(raw_open(&s->raw, s->rig, &tiny) && raw_open(&other, s->rig, &tiny));
    NEED(acquires(&other, 0, own_user(), 40, &cqe));
    s->raw.slots[0].leases[0] = other.slots[0].grants[0].lease;
    NEED(does(&s->raw, (struct wire_sqe){.opcode = WIRE_COMMIT, .count = 1}, &cqe));
    NEED(s->raw.slots[0].results[0].status == SKV_ESTALE);
    NEED(ends(&other, WIRE_COMMIT, 0, &cqe) && other.slots[0].results[0].committed == 40);
    lives(s);
}

static inline void one_user_64_times(struct scene *s)
{
    struct wire_cqe cqe;
    NEED(raw_open(&s->raw, s->rig, &tiny));
    for (uint32_t i = 0; i < SKV_MAX_BATCH; i++)
        s->raw.slots[0].requests[i] = (struct wire_request){
            .user = {own_user(), 1}, .history = 40 + i, .max_cached = UINT32_MAX};
    NEED(does(&s->raw, (struct wire_sqe){.opcode = WIRE_ACQUIRE, .count = SKV_MAX_BATCH}, &cqe));
    for (uint32_t i = 0; i < SKV_MAX_BATCH; i++)
        s->raw.slots[0].leases[i] = s->raw.slots[0].grants[i].lease;
    NEED(does(&s->raw, (struct wire_sqe){.opcode = WIRE_COMMIT, .count = SKV_MAX_BATCH}, &cqe));
    lives(s);
}

/* The longest there are, hashes that lie over each other, tails that differ from nothing. */
static inline void longest_histories_over_each_other(struct scene *s)
{
    struct wire_cqe cqe;
    NEED(raw_open(&s->raw, s->rig, &tiny));
    for (uint32_t i = 0; i < SKV_MAX_BATCH; i++)
        s->raw.slots[0].requests[i] = (struct wire_request){.user = {own_user(), 2 + i},
                                                            .history = SKV_MAX_TOKENS,
                                                            .max_cached = i * 1234567,
                                                            .tail_hash = i,
                                                            .hash_offset = i,
                                                            .flags = i % 8 | WIRE_READ};
    NEED(does(&s->raw, (struct wire_sqe){.opcode = WIRE_PREFETCH, .count = SKV_MAX_BATCH}, &cqe));
    NEED(does(&s->raw, (struct wire_sqe){.opcode = WIRE_ACQUIRE, .count = SKV_MAX_BATCH}, &cqe));
    for (uint32_t i = 0; i < SKV_MAX_BATCH; i++)
        s->raw.slots[0].leases[i] = s->raw.slots[0].grants[i].lease;
    NEED(does(&s->raw, (struct wire_sqe){.opcode = WIRE_RELEASE, .count = SKV_MAX_BATCH}, &cqe));
    lives(s);
}

static inline void append_lease_held_too_long(struct scene *s)
{
    struct wire_cqe cqe;
    struct raw other;
    NEED(raw_open(&s->raw, s->rig, &tiny) && raw_open(&other, s->rig, &tiny));
    NEED(acquires(&s->raw, 0, own_user(), 40, &cqe));
    usleep(300000); /* --lease-ms 200 */
    NEED(acquires(&other, 0, own_user(), 50, &cqe) && !other.slots[0].grants[0].status);
    ended(s);
}

static inline void truncate_under_its_own_lease(struct scene *s)
{
    struct wire_cqe cqe;
    const struct wire_sqe cut = {.opcode = WIRE_TRUNCATE, .user = {own_user(), 1}, .argument = 32};
    NEED(raw_open(&s->raw, s->rig, &tiny));
    NEED(acquires(&s->raw, 0, own_user(), 70, &cqe) && ends(&s->raw, WIRE_COMMIT, 0, &cqe));
    NEED(acquires(&s->raw, 0, own_user(), 90, &cqe) && does(&s->raw, cut, &cqe) && !cqe.status);
    NEED(ends(&s->raw, WIRE_COMMIT, 0, &cqe) && s->raw.slots[0].results[0].status == SKV_ESTALE);
    lives(s);
}

/* A batch whose pages come from the store, with no pass behind it. */
static inline bool gated(struct scene *s)
{
    struct wire_cqe cqe;
    uint64_t user = own_user();
    const struct wire_sqe out = {.opcode = WIRE_EVICT, .user = {user, 1}};
    return raw_open(&s->raw, s->rig, &tiny) && acquires(&s->raw, 0, user, 640, &cqe) &&
           ends(&s->raw, WIRE_COMMIT, 0, &cqe) && does(&s->raw, out, &cqe) && !cqe.status &&
           acquires(&s->raw, 0, user, 640, &cqe) && cqe.value[0] == 1;
}

static inline void gates_scribbled(struct scene *s)
{
    struct wire_cqe cqe;
    NEED(gated(s));
    for (int i = 0; i < 1000; i++)
        memset(s->raw.gates, i, 4096);
    NEED(ends(&s->raw, WIRE_RELEASE, 0, &cqe));
    lives(s);
}

static inline void gates_punched(struct scene *s)
{
    struct wire_cqe cqe;
    NEED(gated(s));
    for (int i = 0; i < 100; i++)
        fallocate(s->raw.gate_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096);
    NEED(ends(&s->raw, WIRE_RELEASE, 0, &cqe));
    NEED(acquires(&s->raw, 0, 1, 0, &cqe));
    lives(s);
}

static inline void gated_batch_dropped_with_the_session(struct scene *s)
{
    NEED(gated(s));
    raw_close(&s->raw);
    tell(s, 0, CLOSED);
}

/* ---- what it shares with the daemon ---- */

static inline void memory_punched(struct scene *s)
{
    struct wire_cqe cqe;
    NEED(raw_open(&s->raw, s->rig, &tiny));
    for (uint32_t i = 0; i < WIRE_ENTRIES + 3; i++) /* an index of 0 is none that may be */
        NEED(does(&s->raw, (struct wire_sqe){.opcode = WIRE_NOP}, &cqe));
    NEED(!fallocate(s->raw.memory_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
                    (off_t)s->raw.welcome.session_bytes));
    raw_bell(&s->raw);
    ended(s);
}

static inline void arena_punched_under_a_batch(struct scene *s)
{
    struct wire_cqe cqe;
    NEED(raw_open(&s->raw, s->rig, &tiny) && acquires(&s->raw, 0, own_user(), 400, &cqe));
    NEED(!fallocate(s->raw.memory_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, WIRE_SLOTS_OFFSET,
                    (off_t)sizeof(struct wire_slot)));
    NEED(does(&s->raw, (struct wire_sqe){.opcode = WIRE_COMMIT, .count = 1}, &cqe));
    NEED(s->raw.slots[0].results[0].status == SKV_ESTALE);
    lives(s);
}

static inline void memory_cut_grown_and_sealed(struct scene *s)
{
    NEED(opens(s));
    NEED(ftruncate(s->raw.memory_fd, 0) && ftruncate(s->raw.memory_fd, 1 << 30));
    NEED(fcntl(s->raw.memory_fd, F_ADD_SEALS, F_SEAL_WRITE));
    NEED(fallocate(s->raw.memory_fd, 0, 0, 1 << 30));
    lives(s);
}

static inline void doorbell_storm(struct scene *s)
{
    NEED(opens(s));
    for (uint64_t until = skv_now_ns() + 50000000; skv_now_ns() < until;)
        raw_bell(&s->raw);
    lives(s);
}

static inline void doorbells_stolen(struct scene *s)
{
    uint64_t rings;
    NEED(opens(s));
    for (uint64_t until = skv_now_ns() + 50000000; skv_now_ns() < until;) {
        fcntl(s->raw.sq_fd, F_SETFL, 0);
        raw_bell(&s->raw);
        fcntl(s->raw.sq_fd, F_SETFL, O_NONBLOCK);
        if (read(s->raw.sq_fd, &rings, sizeof rings) < 0 && errno != EAGAIN)
            break;
    }
    lives(s);
}

static inline void doorbell_filled(struct scene *s)
{
    uint64_t most = UINT64_MAX - 1;
    NEED(opens(s));
    fcntl(s->raw.sq_fd, F_SETFL, O_NONBLOCK);
    for (int i = 0; i < 100; i++)
        if (write(s->raw.sq_fd, &most, sizeof most) < 0 && errno != EAGAIN)
            break;
    for (int i = 0; i < 1000 && write(s->raw.sq_fd, &(uint64_t){1}, 8) < 0; i++)
        usleep(10000);
    fcntl(s->raw.sq_fd, F_SETFL, 0);
    lives(s);
}

/* More rings than it has room for, none taken. */
static inline void completion_bell_filled_and_blocking(struct scene *s)
{
    NEED(opens(s));
    NEED(raw_takes_no_ring(&s->raw, 100));
    lives(s);
}

/* Nobody rings any more, but the daemon looks now and then. */
static inline void everything_closed_but_the_socket(struct scene *s)
{
    struct wire_cqe cqe;
    NEED(opens(s));
    close(s->raw.sq_fd);
    close(s->raw.cq_fd);
    close(s->raw.memory_fd);
    close(s->raw.gate_fd);
    munmap(s->raw.gates, 4096);
    raw_publish(&s->raw, &(struct wire_sqe){.opcode = WIRE_NOP, .user_data = 1});
    NEED(raw_completion(&s->raw, &cqe) && cqe.user_data == 1);
    tell(s, 0, LIVES);
}

#endif
