/* The daemon's parts and who holds what: one struct, one thread. main.c opens it, serve.c turns it,
 * peer.c lets clients in and out, commands.c does what they ask. */
#ifndef SKV_DAEMON_H
#define SKV_DAEMON_H

#include <sys/types.h>

#include "arrival.h"
#include "cache.h"
#include "kept.h"
#include "loop.h"
#include "mover.h"
#include "options.h"
#include "queue.h"
#include "ring.h"

#define SKV_MAX_PEERS     (SKV_MAX_SESSIONS + 32u) /* admins and half handshakes too */

#define GENERATIONS_AHEAD (UINT64_C(1) << 20) /* reserved in the store at a time */

/* From a worker's end until its pages are free: what the device still had of it. Facts say 0. */
#define GONE_NS UINT64_C(20000000)

struct daemon;

/* A connection:
 *
 *   free --accept--> hello --handshake--> live
 *   live --hang-up, violation, fence--> ending --gone--> free
 *
 * A worker that still holds leases when its connection ends is `ending` until its process has ended
 * (its pidfd, and 20 ms for what the device still had of it), or says in a new handshake that its
 * streams have drained. */
enum peer_state { PEER_FREE, PEER_HELLO, PEER_LIVE, PEER_ENDING };

struct peer {
    enum peer_state state;
    bool admin;
    bool answered; /* completions were published since the client was last woken */
    bool dead;     /* its process has ended */
    bool mps;      /* it says that it runs under MPS */
    struct daemon *daemon;
    uint32_t index;
    uint64_t session; /* id; also tells this use of the struct from the next */
    pid_t pid;
    uid_t uid;
    int socket, pidfd, memory_fd, sq_fd;
    int cq_fd, cq_client_fd; /* our end of its bell; its own, until it has it */
    struct watch hangup, bell, death;
    uint64_t due_ns;                 /* hello: its deadline; ending: when it is gone */
    int slot;                        /* of the cache's sessions, or -1 */
    struct keeper_session *recorded; /* in the session table, or NULL */
    struct skv_id model;
    uint32_t rows;
    uint8_t *gates; /* its gate memfd, mapped and registered */
    uint64_t gates_bytes;
    struct wire_ring *ring;
    struct wire_sqe *sqes;
    struct wire_cqe *cqes;
    uint8_t *scratch;
    struct wire_slot *slots;
    struct ring_side sq, cq;
    uint32_t unanswered;          /* entries taken, not completed */
    uint32_t viewed;              /* its list of extents that it has applied, seen last */
    bool acquiring[SKV_MAX_ROWS]; /* an ACQUIRE waits for records */
    uint32_t held[SKV_MAX_ROWS];  /* completions that wait for the row's copies */
    struct wire_cqe *holding;     /* [SKV_MAX_ROWS][WIRE_CQ_ENTRIES] */
};

/* A command that is answered later. */
struct request {
    enum { REQUEST_ACQUIRE, REQUEST_TRUNCATE, REQUEST_EVICT, REQUEST_FLUSH } kind;
    uint32_t peer;
    uint64_t session;
    struct wire_sqe sqe;
    uint32_t looking; /* lookups under way */
    uint32_t waiting; /* changes under way */
    uint64_t since_ns;
    bool held; /* TRUNCATE: for a store that is on its way; nothing of it is done */
    int32_t status;
    uint64_t value;    /* FLUSH: the epoch; TRUNCATE: tokens kept */
    uint32_t records;  /* of a TRUNCATE: changes[] used */
    uint64_t *changes; /* [records] ids waited for */
    struct skv_known known[SKV_MAX_BATCH];
    struct skv_lookup_job *lookups[SKV_MAX_BATCH];
    uint32_t lookup_count;
    struct request *next;
};

struct daemon {
    struct options options;
    struct skv_device *device;
    void *staging;         /* pinned, --staging-bytes of it; NULL: the mover makes its own */
    int device_status;     /* of opening it */
    int device_bell;       /* an eventfd: that has come to an end, and staging is pinned */
    int turn;              /* another one: it is this daemon's turn */
    uint64_t device_ns[2]; /* when it began and ended */
    struct skv_pool *pool;
    bool protect;              /* workers write to extents of their own only */
    struct skv_store *claimed; /* prepared, then locked and being checked, until it is on its way */
    struct arrival *arrival;   /* it is; or NULL: it is there, or there is none */
    struct skv_bell arrival_bell;
    int arrival_status;      /* why it does not come */
    struct skv_store *store; /* NULL: not open yet, or none */
    struct skv_pinner *pinner;
    struct skv_mover *mover; /* NULL: not started yet */
    struct skv_cache *cache;
    struct loop *loop;
    struct kept kept;        /* the keeper, and what it kept */
    uint64_t pool_requested; /* --pool-bytes as given */
    struct wire_table *table;
    uint64_t table_bytes;
    int listener;
    int signals;
    struct watch accepting, signalled, moved, arriving;
    struct peer peers[SKV_MAX_PEERS];
    uint32_t live[SKV_MAX_PEERS],
        live_count; /* indices of the live ones: a spin looks at no other */
    struct request *requests;
    uint64_t session_ids;
    uint64_t now_ns;
    uint32_t wall_s;  /* seconds since the epoch, of the last millisecond */
    uint64_t kept_ns; /* housekeeping's last; 0 after a sleep: due, and the wall clock too */
    uint64_t free_ns; /* since when the daemon of before is gone: the start of this one's time */
    uint64_t start_by_ns;      /* --start-wait's end */
    const char *awaited;       /* of an earlier daemon's, till then: it was said */
    uint64_t accept_ns;        /* not accepting till then; 0: the last one went well */
    uint64_t store_checked_ns; /* watermarks looked at */
    uint64_t generation_limit; /* high-water mark that is in the store */
    uint64_t stop_by_ns, stop_epoch;
    uint32_t evictions;   /* of the store, under way */
    bool offload_stopped; /* nothing is stored, but for one job a second that finds out */
    bool offload_probes;  /* that one is due */
    int offload_status;   /* why: SKV_ENOSPC, SKV_EIO, ... */
    uint32_t owed;        /* changes of the store that failed, and are tried again */
    bool halted;          /* the mover is: the store could not be opened anew yet */
    bool stopping;
    bool stop_waits;        /* for a store that refuses, which was said */
    bool restarting;        /* asked to: a planned restart */
    uint64_t restart_by_ns; /* then even with batches open */
    bool broken;            /* the device failed */
    struct skv_stats stats; /* the daemon's own share */
};

/* Readable once SIGTERM or SIGINT is to end a start, which has nothing to store yet. -1: they are
 * left to the loop, for what is in the pool to be taken over is stored first. */
static inline int skv_start_signals(const struct daemon *daemon)
{
    return daemon->kept.adopted || daemon->kept.handles.extents ? -1 : daemon->signals;
}

/* serve.c */
/* Serves until SIGTERM or SIGINT has stored everything, or the device breaks. Returns the exit
 * status. */
int skv_serve(struct daemon *daemon);
/* After it: the mover does what it was handed, and the core hears of it. */
void skv_finish(struct daemon *daemon);
/* One turn without its sleep, and without the loop's watches. Returns how much was done. */
uint32_t skv_work(struct daemon *daemon);
void skv_drain_actions(struct daemon *daemon);

/* peer.c */
void skv_peers_init(struct daemon *daemon);
void skv_accept(void *daemon, int32_t result);
/* A planned restart: tells every client that a new daemon comes. */
void skv_peers_goodbye(struct daemon *daemon);
/* Owes it nothing and leases it nothing. */
bool skv_peer_quiet(const struct peer *peer);
/* Touching what it shares with us was a SIGBUS: it is zeros by now. */
bool skv_peer_faulted(const struct peer *peer);
/* Ends a session; `reason` goes to the log and to the client. Nothing for one that is not live. */
void skv_peer_end(struct peer *peer, int status, const char *reason);
void skv_peer_tick(struct peer *peer);                   /* deadlines */
void skv_peer_row_free(struct peer *peer, uint32_t row); /* publishes what waited for the row */
void skv_peer_views(struct peer *peer);                  /* writes its list of extents anew */
void skv_peer_gone(struct peer *peer);

/* commands.c */
/* Takes and does up to `limit` entries. Returns how many. */
uint32_t skv_peer_serve(struct peer *peer, uint32_t limit);
void skv_complete(struct peer *peer, const struct wire_cqe *cqe);
void skv_commands_found(struct daemon *daemon, struct skv_lookup_job *lookup, int status);
void skv_commands_changed(struct daemon *daemon, uint64_t change, int status);
void skv_commands_retry(struct daemon *daemon);   /* those that wait for the store */
void skv_commands_arrived(struct daemon *daemon); /* that wait for one that was not there */

#endif
