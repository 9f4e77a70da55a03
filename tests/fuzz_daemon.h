/* A whole sidekvd in process for fuzzers, on the host backend: the daemon's own accept, handshake,
 * rings, commands, core and mover, turned by hand. Each input brings clients of its own and must
 * leave the daemon as it found it: their sessions ended, their pages free, no descriptor open that
 * was not, every invariant of the core true, and an honest client, there all the time, served. */
#ifndef SKV_FUZZ_DAEMON_H
#define SKV_FUZZ_DAEMON_H

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "clock.h"
#include "daemon.h"
#include "log.h"
#include "fuzz_input.h"
#include "raw_client.h"

/* ---- the daemon ---- */

static const struct skv_geometry fuzz_geometry = {
    .layers = 2, .heads = 2, .head_dim = 64, .page_tokens = 32};
#define FUZZ_BACKLOG    128
#define FUZZ_POOL_BYTES UINT64_C(2097152) /* 64 pages */

static struct daemon fuzz_daemon = {.listener = -1, .signals = -1, .kept.socket = -1};
static struct rig fuzz_rig; /* its directory and socket */
static struct raw fuzz_witness;
static uint32_t fuzz_fds; /* open before the input */

static inline void fuzz_turn(void)
{
    FUZZ_MUST(loop_turn(fuzz_daemon.loop, false, 0) >= 0);
    skv_work(&fuzz_daemon);
}

/* The hello with its fds is sent: what the daemon answers to it. False: refused. */
static inline bool fuzz_enter(struct raw *raw)
{
    int fds[8] = {-1, -1, -1, -1};
    for (int i = 0; i < 3; i++) /* accept, read, answer */
        fuzz_turn();
    if (raw_receive(raw->socket, &raw->welcome, sizeof raw->welcome, fds, 0) !=
            sizeof raw->welcome ||
        raw->welcome.status)
        return false;
    struct wire_extents part;
    for (uint32_t seen = 0; seen < raw->welcome.extents; seen += part.count)
        if (raw_receive(raw->socket, &part, sizeof part, NULL, 0) != sizeof part)
            return false;
    raw->memory =
        mmap(NULL, raw->welcome.session_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fds[0], 0);
    FUZZ_MUST(raw->memory != MAP_FAILED);
    raw->ring = (struct wire_ring *)(void *)raw->memory;
    raw->sqes = (struct wire_sqe *)(void *)(raw->memory + WIRE_SQ_OFFSET);
    raw->cqes = (struct wire_cqe *)(void *)(raw->memory + WIRE_CQ_OFFSET);
    raw->slots = (struct wire_slot *)(void *)(raw->memory + WIRE_SLOTS_OFFSET);
    raw->memory_fd = fds[0];
    raw->sq_fd = fds[1];
    raw->cq_fd = fds[2];
    return true;
}

/* A client that is let in: a worker with `rows` gate rows, or with none an admin. */
static inline void fuzz_open(struct raw *raw, uint32_t rows)
{
    struct wire_hello hello = raw_hello(&fuzz_geometry);
    int fds[2] = {(int)syscall(SYS_pidfd_open, getpid(), 0), -1};
    if (rows) {
        hello.rows = rows;
        fds[1] = raw_gates(wire_gate_bytes(fuzz_geometry.layers, rows), true);
    } else {
        hello =
            (struct wire_hello){.magic = WIRE_MAGIC, .version = WIRE_VERSION, .kind = WIRE_ADMIN};
    }
    *raw = (struct raw){.socket = raw_connect(&fuzz_rig), .gate_fd = -1};
    raw_send(raw->socket, &hello, sizeof hello, fds, rows ? 2 : 1);
    close(fds[0]);
    if (rows)
        close(fds[1]);
    FUZZ_MUST(fuzz_enter(raw));
}

static inline void fuzz_make_table(uint64_t pages)
{
    struct daemon *d = &fuzz_daemon;
    d->table_bytes = sizeof *d->table + pages * sizeof *d->table->entries;
    d->table =
        mmap(NULL, d->table_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    FUZZ_MUST(d->table != MAP_FAILED);
    d->table->pages = pages;
}

static inline void fuzz_listen(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strncpy(address.sun_path, fuzz_rig.socket, sizeof address.sun_path - 1);
    fuzz_daemon.listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    FUZZ_MUST(bind(fuzz_daemon.listener, (struct sockaddr *)&address, sizeof address) == 0);
    FUZZ_MUST(listen(fuzz_daemon.listener, FUZZ_BACKLOG) == 0);
    fuzz_daemon.accepting = (struct watch){.done = skv_accept, .context = &fuzz_daemon};
    loop_poll(fuzz_daemon.loop, &fuzz_daemon.accepting, fuzz_daemon.listener, POLLIN);
}

/* The copy thread opens files of its own when it starts; it has when it answers. */
static inline void fuzz_wait_for_mover(void)
{
    static uint64_t hashes[SKV_MAX_USER_PAGES];
    static struct skv_lookup_job job = {.hashes = hashes};
    struct skv_mover_event event;
    skv_mover_lookup(fuzz_daemon.mover, &job);
    while (!skv_mover_next(fuzz_daemon.mover, &event))
        usleep(1000);
    FUZZ_MUST(event.kind == SKV_MOVER_FOUND);
}

static inline void fuzz_end(void)
{
    rig_fini(&fuzz_rig);
}

/* What main.c does, in the order it does it; the log goes nowhere. */
static inline void fuzz_start(bool store)
{
    struct daemon *d = &fuzz_daemon;
    const char *what;
    skv_log_init("fuzz", SKV_LOG_ERROR);
    signal(SIGPIPE, SIG_IGN);
    rig_init(&fuzz_rig);
    atexit(fuzz_end);
    d->options = (struct options){.geometry = fuzz_geometry,
                                  .export = SKV_EXPORT_FD,
                                  .pool_bytes = FUZZ_POOL_BYTES,
                                  .staging_bytes = UINT64_C(1) << 20,
                                  .store = store ? fuzz_rig.store : NULL};
    d->protect = store; /* in entries: lists of views are told, too */
    d->free_ns = d->now_ns = skv_now_ns();
    d->session_ids = d->now_ns;
    d->generation_limit = UINT64_MAX;
    skv_peers_init(d);
    FUZZ_MUST(loop_open(&d->loop, true, &what) == 0);
    FUZZ_MUST(skv_kept_open(d) == 0 && skv_kept_take(d) == 0);
    FUZZ_MUST(skv_device_open("host", &d->device) == 0);
    FUZZ_MUST(!store || skv_store_open(&(struct skv_store_options){.path = fuzz_rig.store,
                                                                   .geometry = fuzz_geometry,
                                                                   .map_bytes = UINT64_C(256) << 20,
                                                                   .durability = SKV_PROCESS},
                                       &d->store) == 0);
    uint64_t page_bytes = skv_page_bytes(&fuzz_geometry);
    FUZZ_MUST(skv_pool_create(d->device, FUZZ_POOL_BYTES, page_bytes, SKV_EXPORT_FD, &d->pool) ==
              0);
    fuzz_make_table(skv_pool_exported(d->pool)->pool_bytes / page_bytes);
    FUZZ_MUST(skv_cache_open(&(struct skv_cache_options){.geometry = fuzz_geometry,
                                                         .pages = (uint32_t)d->table->pages,
                                                         .extent_pages = store ? 8 : 0,
                                                         .sessions = SKV_MAX_SESSIONS,
                                                         .max_records = 64,
                                                         .generation = 1,
                                                         .lease_ms = 0,
                                                         .tail_ms = 1,
                                                         .store = store,
                                                         .table = d->table},
                             &d->cache) == 0);
    FUZZ_MUST(skv_cache_restored(d->cache, 1));
    FUZZ_MUST(
        skv_mover_start(&(struct skv_mover_options){.device = d->device,
                                                    .pool = d->pool,
                                                    .geometry = fuzz_geometry,
                                                    .store = d->store,
                                                    .staging_bytes = d->options.staging_bytes},
                        &d->mover) == 0);
    fuzz_wait_for_mover();
    fuzz_listen();
    fuzz_open(&fuzz_witness, 1);
    d->session_ids += 256; /* nobody's earlier session is the witness' */
}

/* Before an input. */
static inline void fuzz_begin(void)
{
    fuzz_fds = fuzz_count_fds();
}

/* The next completion of a client, when there is one. */
static inline bool fuzz_completion(struct raw *raw, struct wire_cqe *cqe)
{
    if (__atomic_load_n(&raw->ring->cq_tail, __ATOMIC_ACQUIRE) == raw->cq_head)
        return false;
    *cqe = raw->cqes[raw->cq_head & (WIRE_CQ_ENTRIES - 1)];
    __atomic_store_n(&raw->ring->cq_head, ++raw->cq_head, __ATOMIC_RELEASE);
    return true;
}

/* A session that ended with leases waits for its process, which is ours: it is gone now. */
static inline bool fuzz_others_gone(void)
{
    struct pollfd backlog = {.fd = fuzz_daemon.listener, .events = POLLIN};
    bool gone = poll(&backlog, 1, 0) == 0;
    for (uint32_t i = 0; i < SKV_MAX_PEERS; i++) {
        struct peer *peer = &fuzz_daemon.peers[i];
        if (peer->state == PEER_ENDING && peer->due_ns == UINT64_MAX)
            peer->due_ns = fuzz_daemon.now_ns;
        gone =
            gone && (peer->state == PEER_FREE ||
                     (peer->state == PEER_LIVE && peer->session == fuzz_witness.welcome.session));
    }
    return gone && !fuzz_daemon.requests;
}

/* Forgets every user; true: no page is held any more. */
static inline bool fuzz_forget(void)
{
    struct skv_stats stats;
    uint64_t cursor = 0, change;
    uint32_t record, kept;
    do {
        record = skv_cache_next(fuzz_daemon.cache, &cursor, UINT32_MAX);
        if (record != SKV_NONE)
            skv_cache_truncate(fuzz_daemon.cache, record, 0, NULL, &kept, &change);
        skv_drain_actions(&fuzz_daemon);
    } while (cursor);
    skv_cache_stats(fuzz_daemon.cache, &stats);
    return stats.pool_pages_free == stats.pool_pages && !stats.users_known;
}

/* After an input, whose clients have hung up: everything is as before. */
static inline void fuzz_settle(void)
{
    struct wire_cqe cqe;
    uint64_t deadline_ns = skv_now_ns() + UINT64_C(60000000000);
    skv_cache_check(fuzz_daemon.cache);
    raw_submit(&fuzz_witness, &(struct wire_sqe){.opcode = WIRE_NOP, .user_data = 4711});
    fuzz_turn();
    FUZZ_MUST(fuzz_completion(&fuzz_witness, &cqe));
    FUZZ_MUST(cqe.user_data == 4711 && cqe.status == 0);
    bool quiet = false;
    while (!quiet) {
        FUZZ_MUST(skv_now_ns() < deadline_ns);
        fuzz_daemon.kept_ns = 0; /* housekeeping every time */
        fuzz_turn();
        quiet = fuzz_others_gone() && fuzz_forget();
    }
    skv_cache_check(fuzz_daemon.cache);
    FUZZ_MUST(fuzz_daemon.stats.sessions == 1 && fuzz_daemon.live_count == 1);
    FUZZ_MUST(!fuzz_daemon.broken && !fuzz_daemon.restarting);
    FUZZ_MUST(fuzz_count_fds() == fuzz_fds);
}

#endif
