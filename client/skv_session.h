/* One session as libsidekv sees it: what lives as long as the handle (device, gate rows, options),
 * what lives as long as one connection (socket, rings, arena, pool mapping), and the functions that
 * the files of the library share. Internal.
 *
 *   skv_link.c     connect and shake hands: a socket and fds out of a path
 *   skv_session.c  open, reconnect, close: everything that is mapped, imported or registered
 *   skv_watch.c    the watcher thread, and what happens when the daemon is lost
 *   skv_views.c    where a protected pool may be written
 *   skv_ring.c     one command: submit, wait, check the completion
 *   skv_batch.c    acquire, commit, release, prefetch
 *   skv_admin.c    ping, lookup, list and the rest
 *
 * Two threads touch a session: the caller's, and the watcher. They share `lost` (atomic), the gate
 * words (atomic stores) and the fds, which are opened before the watcher starts and closed after it
 * has been joined. */
#ifndef SKV_SESSION_H
#define SKV_SESSION_H

#include <pthread.h>
#include <sys/types.h>
#include <sys/un.h>

#include "clock.h"
#include "device.h"
#include "failpoint.h"
#include "hash.h"
#include "log.h"
#include "ring.h"

#define SKV_DEFAULT_TIMEOUT_MS 5000u
#define SKV_DEFAULT_ROWS       2u
#define SKV_DEFAULT_SPIN_US    50u
#define SKV_SPIN_CORES         4u  /* fewer, and the default is not to spin */
#define SKV_SLEEP_SLICE_MS     100 /* a sleeping caller looks for `lost` at least this often */
#define SKV_BACKOFF_MS         5u  /* the first pause of a reconnect; doubles up to */
#define SKV_BACKOFF_SOON_MS    5u  /* in the first second: a keeper's next daemon comes soon */
#define SKV_BACKOFF_MAX_MS     500u
#define SKV_KEEP_MAPPED_MS     1000u /* the old pool stays mapped this long while nobody has it */
#define SKV_TAIL_RETRIES       3 /* echoes of a differing tail before the user's hit is given up */

/* ---- one connection, fresh from the handshake ---- */

struct skv_link {
    int socket;
    int memory;             /* session memfd */
    int sq_event, cq_event; /* doorbells: to the daemon, from the daemon */
    int *extents;           /* [extent_count] the pool's fds; NULL with IPC or for an admin */
    uint32_t extent_count;
    struct wire_welcome welcome; /* checked */
    char reason[320];            /* why the handshake failed, in words */
};

/* Connects and shakes hands until `deadline_ns`. The fds of `hello_fds` stay the caller's. On
 * failure everything is closed and link->reason says why in words (nothing is logged: a reconnect
 * tries often). Follow with skv_link_close(). Returns 0, SKV_ELOST (nobody listens, or it hung up),
 * SKV_ETIMEDOUT, SKV_EPROTO, or what the daemon refused with. */
int skv_link_open(struct skv_link *link, const char *path, const struct wire_hello *hello,
                  const int *hello_fds, uint32_t hello_fd_count, uint64_t deadline_ns);
void skv_link_close(struct skv_link *link);
void skv_link_close_extents(struct skv_link *link);
/* A link that holds nothing. */
void skv_link_init(struct skv_link *link);

/* ---- the session ---- */

struct skv_row {
    bool held;      /* a batch has it, from ACQUIRE to COMMIT or RELEASE */
    uint64_t lease; /* the batch's first: tells this batch from an earlier one of the row */
};

struct skv {
    /* for life */
    struct skv_options options; /* defaults filled in; socket unused */
    char path[sizeof(((struct sockaddr_un *)0)->sun_path)];
    const uint32_t *owner; /* 1; reads as 0 in a forked child (MADV_WIPEONFORK) */
    int gate_fd;
    uint32_t *gates; /* [rows][gate_stride / 4] */
    uint64_t gate_bytes;
    uint32_t gate_stride; /* bytes */
    bool gates_registered;
    /* [rows] of a worker: the grants' page lists, as they were checked, each where it was in the
     * row's slot. The daemon does not have this memory. */
    uint32_t (*pages)[WIRE_SLOT_PAGES];
    struct skv_device *device;
    uint64_t spin_ns;     /* now; at most options.spin_us, shrinks while spinning is in vain */
    uint64_t spin_max_ns; /* options.spin_us */
    int stop_event;       /* ends the watcher */

    /* for one connection */
    bool connected; /* mapped, watched; stays true when lost, until disconnected */
    struct skv_link link;
    uint8_t *memory; /* the session memfd: ring, entries, scratch, slots */
    uint64_t memory_bytes;
    struct skv_pool *pool; /* outlives connections, unmapped in between */
    bool pool_mapped;
    uint64_t pool_id;                       /* of the pool mapped; 0: it ended with its daemon */
    void *pool_base, *append_base;          /* where it was mapped last */
    bool moved;                             /* elsewhere than before */
    uint64_t viewed[WIRE_MAX_EXTENTS / 64]; /* a bit an extent: mapped for writing */
    uint32_t views_sequence;                /* the daemon's list that this is */
    struct skv_server server;
    uint64_t session; /* id; of the last session when disconnected */
    struct ring_side sq, cq;
    uint64_t user_data; /* of the last command */
    struct skv_row rows[SKV_MAX_ROWS];
    pthread_t watcher;

    uint32_t lost;   /* atomic: 1 once the connection is worth nothing */
    uint32_t coming; /* atomic, set before `lost`: a keeper, or a planned restart, brings a new
                        daemon at once */
};

/* Is this number from shared memory a status at all? */
static inline bool skv_status_told(int64_t status)
{
    switch (status) {
#define X(name, value, text) case value:
        SKV_STATUS_MAP(X)
#undef X
        return true;
    }
    return false;
}

/* The checks of every call: SKV_EPERM in a forked child, SKV_ELOST when lost. */
int skv_session_usable(const struct skv *skv);

static inline struct wire_slot *skv_slot(const struct skv *skv, uint32_t row)
{
    return (struct wire_slot *)(skv->memory + WIRE_SLOTS_OFFSET) + row;
}

static inline void *skv_scratch(const struct skv *skv)
{
    return skv->memory + WIRE_SCRATCH_OFFSET;
}

/* After a loss: waits for the new daemon that is coming, once, until the deadline, when no batch is
 * open. Returns 0 when the session can be used again, else SKV_ELOST or what skv_reconnect() said.
 */
int skv_session_return(struct skv *skv, uint64_t deadline_ns);
/* skv_session_usable(), and failing that skv_session_return(). */
int skv_session_ready(struct skv *skv, uint64_t deadline_ns);

/* ---- watcher ---- */

int skv_watch_start(struct skv *skv);
/* Stops and joins; after it the caller's thread is alone. */
void skv_watch_stop(struct skv *skv);

/* Declares the connection lost: the first caller sets every row's status word, opens all gates,
 * hangs up, wakes a waiting caller and logs the reason. Either thread. */
__attribute__((format(printf, 2, 3))) void skv_session_lose(struct skv *skv, const char *format,
                                                            ...);

/* ---- views of a protected pool; nothing for others ---- */

/* Maps what the batch's grants let the caller write to and is not mapped yet. */
int skv_views_grant(struct skv *skv, const struct skv_batch *batch);
/* After a batch: does what the daemon's list says. */
void skv_views_look(struct skv *skv);
/* Unmaps them all, and says so. */
void skv_views_drop(struct skv *skv);

/* ---- commands ---- */

#define SKV_NO_DEADLINE UINT64_MAX

/* The deadline of a call that starts now. */
static inline uint64_t skv_deadline(const struct skv *skv)
{
    return skv_now_ns() + (uint64_t)skv->options.timeout_ms * 1000000u;
}

/* Submits one command and waits for its completion. `sqe` needs no user_data. Returns the
 * command's status, SKV_ELOST, SKV_ETIMEDOUT or SKV_EPROTO; the last two lose the session.
 * `cqe` is set whenever a completion came. */
int skv_call(struct skv *skv, struct wire_sqe *sqe, uint64_t deadline_ns, struct wire_cqe *cqe);

/* skv_call() for a command that belongs to no batch and may be done twice: where the daemon is lost
 * and a new one is coming, asks that one. */
int skv_call_again(struct skv *skv, struct wire_sqe *sqe, uint64_t deadline_ns,
                   struct wire_cqe *cqe);

/* The daemon told us something that cannot be: loses the session, returns SKV_EPROTO. */
int skv_violation(struct skv *skv, const char *what);

#endif
