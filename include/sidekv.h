/* sidekv: the client API of the shared KV cache.
 *
 * A worker opens a session with the daemon, maps the pool of KV pages once, and then, per batch:
 * skv_acquire(), run its layers on the pages in place, skv_commit() (or skv_release()). The library
 * needs no CUDA to link and no io_uring.
 *
 * Failure is a shorter hit: every call has a deadline, and a lost daemon turns every later call
 * into SKV_ELOST until skv_reconnect() has succeeded. A call that returned SKV_ETIMEDOUT or
 * SKV_EPROTO has lost the daemon too: its answer might come at any time. Nothing here aborts the
 * caller's process because of what the daemon or a peer did.
 *
 * A function's comment names the statuses that its caller can act on. Any other one says that it
 * cannot be done as things are, and that trying again alone does not help: a wrong argument
 * (SKV_EINVAL), a forked child (SKV_EPERM), memory, files or a device that this process cannot
 * have.
 *
 * Threads: a handle is used by one thread at a time; a process may open several. After fork() a
 * child may only close. */
#ifndef SIDEKV_H
#define SIDEKV_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SKV_VERSION        "0.1.0"
#define SKV_DEFAULT_SOCKET "/run/sidekv/sidekv.sock"

/* Limits that the wire's layout is dimensioned for. */
#define SKV_MAX_BATCH       64u    /* users a batch */
#define SKV_MAX_TOKENS      32768u /* history tokens a user */
#define SKV_MIN_PAGE_TOKENS 16u    /* smallest page */
#define SKV_MAX_USER_PAGES  2048u  /* SKV_MAX_TOKENS / SKV_MIN_PAGE_TOKENS */
#define SKV_MAX_LAYERS      64u    /* layers of a model; a gate row is one word each */
#define SKV_MAX_ROWS        8u     /* gate rows, so batches in flight, a session */

/* Every status of the project: name, value, text. Functions return 0 or one of these, negative. */
#define SKV_STATUS_MAP(X)                                                                          \
    X(SKV_OK, 0, "ok")                                                                             \
    X(SKV_EINVAL, -1, "invalid argument")                                                          \
    X(SKV_ENOMEM, -2, "out of memory")                                                             \
    X(SKV_EBUSY, -3, "busy: an earlier batch or session still holds it")                           \
    X(SKV_ESTALE, -4, "stale: the lease was fenced or has ended")                                  \
    X(SKV_ENOENT, -5, "no such user, model or object")                                             \
    X(SKV_ETIMEDOUT, -6, "timed out")                                                              \
    X(SKV_ELOST, -7, "the daemon is gone; reconnect")                                              \
    X(SKV_EGEOMETRY, -8, "the peer's KV geometry differs")                                         \
    X(SKV_EVERSION, -9, "the peer speaks another protocol version")                                \
    X(SKV_EPERM, -10, "not permitted")                                                             \
    X(SKV_EIO, -11, "input/output error")                                                          \
    X(SKV_ENOSPC, -12, "no space left")                                                            \
    X(SKV_ECORRUPT, -13, "damaged data")                                                           \
    X(SKV_EDEVICE, -14, "device error")                                                            \
    X(SKV_ENODEVICE, -15, "no such device or driver")                                              \
    X(SKV_ENOTSUP, -16, "not supported here")                                                      \
    X(SKV_EPROTO, -17, "protocol violation")                                                       \
    X(SKV_EAGAIN, -18, "not yet")                                                                  \
    X(SKV_EEXIST, -19, "already there")                                                            \
    X(SKV_ELOAD, -20, "a cached page could not be loaded; release and acquire again")              \
    X(SKV_EFULL, -21, "the cache is full")

enum skv_status {
#define X(name, value, text) name = value,
    SKV_STATUS_MAP(X)
#undef X
};

/* The text of a status, static; never NULL. */
const char *skv_strerror(int status);

/* What one page holds: [layer][K|V][head][token][dim], bf16. One daemon serves one geometry. */
struct skv_geometry {
    uint32_t layers;      /* L: 1 to SKV_MAX_LAYERS */
    uint32_t heads;       /* H: 1 to 64 */
    uint32_t head_dim;    /* D: 64, 128 or 256 */
    uint32_t page_tokens; /* S: 16, 32, 64 or 128 */
};

/* Bytes of K and V of one layer in one page: the unit of a layered onboard. */
static inline uint64_t skv_slice_bytes(const struct skv_geometry *g)
{
    return UINT64_C(2) * 2 * g->heads * g->page_tokens * g->head_dim;
}

static inline uint64_t skv_page_bytes(const struct skv_geometry *g)
{
    return g->layers * skv_slice_bytes(g);
}

/* 0, or SKV_EINVAL when a field is outside the ranges above. */
int skv_geometry_check(const struct skv_geometry *g);

/* 128 bits: a user's key within a model, or a model's fingerprint (all zero: none, or all of them).
 */
struct skv_id {
    uint64_t lo, hi;
};

/* An integer user is {id, 0}; a named one is the XXH3-128 of its bytes. */
static inline struct skv_id skv_user_integer(uint64_t id)
{
    return (struct skv_id){.lo = id, .hi = 0};
}
struct skv_id skv_user_string(const char *name);

/* Chain hashes. Before page 0 stands XXH3_64(model, user); a page's hash is the XXH3_64 of its
 * tokens, u64 little-endian, seeded with its predecessor's. Writes one hash per page begun, the
 * last one up to `history`, to hashes[]. Returns how many: ceil(history / page_tokens). To extend
 * known hashes, pass `first_page` > 0: hashes[first_page - 1] must be right. */
uint32_t skv_chain_hashes(struct skv_id model, struct skv_id user, uint32_t page_tokens,
                          const uint64_t *tokens, uint32_t history, uint32_t first_page,
                          uint64_t *hashes);

/* ---- sessions ---- */

struct skv; /* one session: a connection, its rings, its gate rows, the mapped pool */

struct skv_options {
    const char *socket; /* NULL: $SIDEKV_SOCKET, else SKV_DEFAULT_SOCKET */
    bool admin; /* true: admin commands only; no pool, no gates; geometry and model unused */
    struct skv_geometry geometry; /* must equal the daemon's */
    struct skv_id model;          /* this session's model fingerprint, not all zero */
    uint32_t rows;                /* gate rows, 1 to SKV_MAX_ROWS: batches in flight; 0 means 2 */
    uint32_t timeout_ms;          /* deadline of every call; 0 means 5000 */
    uint32_t spin_us;             /* spin this long for a completion before sleeping */
    bool no_spin_default; /* true: take spin_us as it is, even 0; false and spin_us 0: 50 us, or 0
                             on under 4 cores */
};

/* Connects, maps the pool on the daemon's device and starts the watcher thread. The device is the
 * daemon's, found by its UUID. The soft limit of open files is raised where the pool's fds need it.
 * Follow with skv_close(). The reason of a failure is also logged in words. Returns 0, or what may
 * pass, so that it is worth another try:
 *
 *   SKV_ELOST      nobody listens, or the daemon ended meanwhile
 *   SKV_ETIMEDOUT  it did not answer in time
 *   SKV_EAGAIN     it does not take sessions yet, or any more: another one comes
 *   SKV_EFULL      no room for another session (till one ends), or for another model
 *
 * or what does not pass by itself:
 *
 *   SKV_EGEOMETRY  the daemon serves another geometry
 *   SKV_EVERSION   it is of another release: the log says which of the two to restart
 *   SKV_EPERM      the socket, or the pool's memory, is not for this user
 *   SKV_EPROTO     what listens there is no sidekvd, or the pool's fds did not get through
 *   SKV_ENODEVICE  this process cannot see the daemon's device
 *   others         as said at the top: SKV_EINVAL, SKV_ENOMEM, SKV_ENOSPC (the hard limit of open
 *                  files), SKV_EIO, SKV_EDEVICE, SKV_ENOTSUP */
int skv_open(const struct skv_options *options, struct skv **out);

/* Ends the session; its leases end with it. NULL is fine. The caller's graphs must have completed,
 * and what it opened on the session's device must be closed: a runner before its session. */
void skv_close(struct skv *skv);

/* Where a keeper brings a new daemon at once (sidekv-keeper(8)), a lost session comes back by
 * itself: skv_acquire(), skv_prefetch() and the calls that look and manage wait for the new daemon,
 * once and within their deadline, when no batch of the session is open. A batch that is open counts
 * until its skv_commit() or skv_release(), which then returns SKV_ELOST. The pool stays mapped;
 * pages of an ungated pass stay untouched till then, so that its result is good. */

/* After SKV_ELOST, and only once the caller's streams have drained: reconnects with backoff for up
 * to timeout_ms and maps the new pool at the old address, so that captured graphs stay good: ask
 * skv_pool_base() and skv_pool_append_base() whether it could. Every batch of the old session is
 * lost. What may pass is tried again until then. Returns 0, or the last error of skv_open(). */
int skv_reconnect(struct skv *skv, uint32_t timeout_ms);

/* Has the connection been lost? Cheap: one atomic load. */
bool skv_lost(const struct skv *skv);

/* The mapped pool: page p is at base + p * page_bytes, in the device's address space (a host
 * pointer on the host backend). */
void *skv_pool_base(const struct skv *skv);
/* Where to write: page p is at this base + p * page_bytes too, but only there can be written, and
 * only to the pages that a grant lets append to: where the daemon protects the pool, as it
 * does by default, nothing else is mapped there, and the pool at skv_pool_base() is mapped
 * read-only. The same address as skv_pool_base() otherwise. */
void *skv_pool_append_base(const struct skv *skv);
uint64_t skv_pool_pages(const struct skv *skv);

/* What the pool lives on, for opening a runner there. Owned by the session. */
struct skv_device;
struct skv_device *skv_session_device(const struct skv *skv);

/* Gate row `row`: `layers` words, each 0 (closed) or >= 1 (resident), then a status word (0 or a
 * skv_status). In host memory, registered with the device; same addresses for the session's whole
 * life, reconnects included. */
uint32_t *skv_gate_row(const struct skv *skv, uint32_t row);

/* ---- the batch ---- */

enum skv_request_flags {
    SKV_REQUEST_READ = 1u << 0,       /* never take an append lease */
    SKV_REQUEST_NO_ONBOARD = 1u << 1, /* GPU hits only: never bring pages from the store */
};

struct skv_request {
    struct skv_id user;
    const uint64_t *tokens; /* [history] the whole history, oldest first */
    const uint64_t
        *hashes; /* [ceil(history/S)] from skv_chain_hashes(), or NULL: the library computes them */
    uint32_t history;    /* h, up to SKV_MAX_TOKENS */
    uint32_t max_cached; /* never grant more cached tokens than this; UINT32_MAX: no limit */
    uint32_t flags;      /* enum skv_request_flags */
};

enum skv_grant_flags {
    SKV_GRANT_APPEND =
        1u << 0, /* pages cover all h tokens; write K and V of tokens [cached, h) through them */
    SKV_GRANT_GATED = 1u << 1, /* some of its pages are still being onboarded */
    SKV_GRANT_STORE = 1u << 2, /* its onboard was started by this batch */
};

struct skv_grant {
    int32_t status;  /* 0, or why this user got nothing (cached is 0 then, and there is no lease) */
    uint32_t flags;  /* enum skv_grant_flags */
    uint32_t cached; /* c: tokens [0, c) are in pages[0 .. ceil(c/S)) */
    uint32_t gpu_tokens;   /* of these, resident before this batch */
    uint32_t page_count;   /* ceil(h/S) with SKV_GRANT_APPEND, else ceil(c/S) */
    const uint32_t *pages; /* page ids; the library's memory, good until commit or release */
    uint64_t lease;
};

struct skv_batch {
    uint32_t row;   /* the gate row */
    uint32_t count; /* users */
    bool gated;     /* wait for the row's gates, layer by layer, before touching pages */
    struct skv_grant grants[SKV_MAX_BATCH];
};

/* Leases the pages of `count` users for one forward pass, in one round trip that waits for no copy.
 * Follow with skv_commit() or skv_release(), both only after the pass has completed; leases also
 * end with the session. `batch` is the caller's; the page lists in it are the library's, good
 * until then. Returns 0 (look at each grant's status), SKV_EBUSY (the row still belongs to an
 * earlier batch), SKV_EINVAL, SKV_ELOST, SKV_ETIMEDOUT, SKV_EPROTO; with anything but 0 no
 * batch has begun. */
int skv_acquire(struct skv *skv, uint32_t row, const struct skv_request *requests, uint32_t count,
                struct skv_batch *batch);

struct skv_committed {
    int32_t status; /* 0, or SKV_ESTALE (fenced: nothing of it counts) */
    uint32_t
        committed; /* tokens of this user now committed: visible to every worker, survive workers */
    uint32_t stored; /* of these, stored: survive kill -9 of the daemon */
};

/* Makes what the batch appended visible to every worker, ends its leases and frees its row. A grant
 * without append commits nothing and just ends. `results` is [batch->count] or NULL. Returns 0
 * (look at each result); SKV_ELOST, SKV_ETIMEDOUT, SKV_EPROTO (the daemon may have committed it or
 * not); SKV_ESTALE (the batch has ended before, or is an earlier session's), SKV_EINVAL (it is no
 * batch of this session): nothing was done. */
int skv_commit(struct skv *skv, struct skv_batch *batch, struct skv_committed *results);

/* Ends the batch's leases without committing. What was written past the valid tokens counts for
 * nothing. Returns what skv_commit() does; whatever it is, there is nothing left to do for this
 * batch. */
int skv_release(struct skv *skv, struct skv_batch *batch);

/* Was a page of a gated batch damaged or missing? Look after the pass, before answering: SKV_ELOAD
 * means release and acquire again (a shorter hit). SKV_ELOST: the gates were opened because the
 * daemon died; the pass is worth nothing. So it is with anything else but 0. */
int skv_batch_status(const struct skv *skv, const struct skv_batch *batch);

/* Starts bringing a user's stored pages to the pool, as an acquire would, without a lease. Returns
 * at once: 0, SKV_EBUSY (every row has a batch), SKV_EINVAL, or a lost session as of skv_acquire().
 */
int skv_prefetch(struct skv *skv, const struct skv_request *request);

/* ---- looking and managing; `model` all zero: the session's own, or for an admin all models ----
 */

struct skv_user_info {
    struct skv_id model, user;
    uint64_t generation;
    uint64_t last_use_s; /* seconds since the epoch */
    uint32_t committed;  /* tokens */
    uint32_t resident;   /* tokens in the pool */
    uint32_t stored;     /* tokens in the store */
    uint32_t leases;     /* batches holding it now */
};

int skv_ping(struct skv *skv, uint64_t *round_trip_ns);
/* The next four return SKV_ENOENT for a user that is not there, SKV_EINVAL for a worker that names
 * another model than its own. */
int skv_lookup(struct skv *skv, struct skv_id model, struct skv_id user,
               struct skv_user_info *info);
/* The next three may return SKV_EAGAIN, and then nothing was done: after a hot restart, while the
 * daemon awaits its store (store_awaited in the stats). These and skv_flush() return the store's
 * error, SKV_ENOSPC, SKV_EIO or SKV_ENOMEM, while it refuses what they have to write; it is tried
 * again. */
int skv_evict(struct skv *skv, struct skv_id model,
              struct skv_id user); /* pool pages only; stores them first; SKV_EBUSY */
int skv_forget(struct skv *skv, struct skv_id model,
               struct skv_id user); /* everywhere; returns when it is durable */
int skv_truncate(struct skv *skv, struct skv_id model, struct skv_id user,
                 uint32_t tokens); /* keep this many, SKV_MAX_TOKENS at most */
int skv_flush(struct skv *skv); /* returns when everything committed before it is stored; may take
                                   long: no deadline but the daemon's life */

/* Admin: asks the daemon to end and its keeper to start it anew, the pool staying as it is. Returns
 * when it is accepted; the session is lost soon after. SKV_ENOTSUP: no keeper runs. SKV_EINVAL:
 * this session is a worker's. */
int skv_restart(struct skv *skv);

/* Up to `capacity` users from *cursor on (0 starts); *cursor is 0 after the last. Returns how many,
 * or an error. Users that come or go meanwhile may be missed or seen. */
int skv_list(struct skv *skv, uint64_t *cursor, struct skv_user_info *infos, uint32_t capacity);

/* Name, unit-bearing text. Counters since the daemon's start unless said otherwise. New ones are
 * added at the end: daemon and worker may be of builds that know different numbers of them. */
#define SKV_STATS_MAP(X)                                                                           \
    X(uptime_ms, "milliseconds since the daemon started")                                          \
    X(epoll, "1 when the daemon serves by epoll, for want of io_uring")                            \
    X(pool_pages, "pages in the pool")                                                             \
    X(pool_pages_free, "pages free now")                                                           \
    X(pool_pages_quarantined, "pages waiting for a fenced session to be gone, now")                \
    X(pool_protected, "1 when workers can write to nothing but extents of their own")              \
    X(extents, "extents of a protected pool")                                                      \
    X(extents_free, "of these, without a page in use, now")                                        \
    X(extents_common, "of these, shared: filled by onboards or given up, now")                     \
    X(extents_owned, "of these, writable by a worker, now")                                        \
    X(users_known, "users resident or stored, now")                                                \
    X(users_resident, "users with pages in the pool, now")                                         \
    X(users_stored, "users in the store, now")                                                     \
    X(sessions, "sessions live now")                                                               \
    X(sessions_total, "sessions accepted")                                                         \
    X(sessions_refused, "handshakes refused")                                                      \
    X(sessions_violations, "sessions ended for a protocol violation")                              \
    X(acquires, "ACQUIRE commands")                                                                \
    X(acquire_users, "users in them")                                                              \
    X(history_tokens, "history tokens asked for")                                                  \
    X(hit_gpu_tokens, "of these, served from pool pages")                                          \
    X(hit_store_tokens, "of these, onboarded from the store")                                      \
    X(append_refused, "grants that could have appended but got no append lease")                   \
    X(full_pool, "grants cut short because the pool was full")                                     \
    X(tail_differs, "tails that the library found to differ")                                      \
    X(cuts, "users cut by a proven mismatch, TRUNCATE or FORGET")                                  \
    X(commits, "leases committed")                                                                 \
    X(commits_stale, "commits refused as stale")                                                   \
    X(appended_tokens, "tokens committed by appends")                                              \
    X(evicted_users, "users evicted from the pool")                                                \
    X(dropped_tokens, "committed tokens dropped from the pool before they were stored")            \
    X(onboard_jobs, "onboards started")                                                            \
    X(onboard_bytes, "bytes copied store to pool")                                                 \
    X(onboard_in_place_bytes, "of these, read by the device straight from the store's map")        \
    X(onboard_failures, "onboards that met a missing, damaged or unreadable page")                 \
    X(offload_bytes, "bytes copied pool to staging")                                               \
    X(offload_pages, "pages put into the store")                                                   \
    X(offload_backlog, "pages committed but not stored, now")                                      \
    X(offload_stopped, "1 while nothing can be stored: disk or map full, I/O error, no memory")    \
    X(store_bytes, "bytes of the store in use, now")                                               \
    X(store_limit_bytes, "bytes the store may use")                                                \
    X(store_evicted_users, "users evicted from the store")                                         \
    X(store_errors, "store transactions that failed")                                              \
    X(store_damaged_pages, "stored pages whose checksum or trailer did not match")                 \
    X(store_damaged_records, "stored users left out at start: their records did not match")        \
    X(store_cold_starts,                                                                           \
      "starts that could not trust the store and emptied it, since it was made")                   \
    X(pinned_bytes, "bytes of the store's map registered with the device, now")                    \
    X(fenced_leases, "leases ended by fencing")                                                    \
    X(mps, "1 when the daemon runs under MPS")                                                     \
    X(mps_workers, "live sessions of workers under MPS, now")                                      \
    X(store_awaited, "1 while a restarted daemon's store is being checked: pool hits only")        \
    X(standby, "1 while the next daemon waits beside this one, its device open")

struct skv_stats {
#define X(name, text) uint64_t name;
    SKV_STATS_MAP(X)
#undef X
};

/* What the daemon does not count is 0. */
int skv_stats(struct skv *skv, struct skv_stats *stats);

/* What the daemon told us of itself at connect. */
struct skv_server {
    struct skv_geometry geometry;
    uint64_t pool_pages;
    uint64_t pool_bytes;
    char device[64]; /* "host", or the GPU's name */
    uint32_t pid;
    bool cuda;
    bool mps;
    bool protect; /* the pool is mapped read-only but for what is appended to */
};
const struct skv_server *skv_server(const struct skv *skv);

#ifdef __cplusplus
}
#endif
#endif
