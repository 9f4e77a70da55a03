/* What sidekvd and its parent sidekv-keeper say to each other, and the session table: all that a
 * new daemon needs to go on where a killed one stopped.
 *
 * The keeper starts sidekvd with one end of a SOCK_SEQPACKET pair, its number in SIDEKV_KEEPER_FD.
 * First the keeper speaks: what it holds (nothing the first time), then KEEPER_END; not before the
 * daemon of before is gone, which may be days after the start. From then on the daemon does; the
 * same messages in the other direction say what to hold. The keeper looks into none of it. */
#ifndef SKV_KEEPER_H
#define SKV_KEEPER_H

#include <stdint.h>

#include "sidekv.h"

#define KEEPER_FD       "SIDEKV_KEEPER_FD"
#define KEEPER_MAGIC    0x4b764b53u
#define KEEPER_RESTART  75    /* exit status of a planned restart */
#define KEEPER_FDS      8192u /* of a pool, at most; WIRE_MAX_EXTENTS */
#define KEEPER_SESSIONS 1024u /* live or waited for, at one time */

enum keeper_kind {
    KEEPER_FRESH = 1, /* daemon: drop everything, another pool follows */
    KEEPER_POOL,      /* fds of extents, from `id` on; extent_bytes and all */
    KEEPER_TABLE,     /* fd of the page descriptors' memfd, writable */
    KEEPER_SESSION_TABLE,
    KEEPER_WHOLE,   /* daemon: pool and tables are complete and may be given to a successor */
    KEEPER_WORKER,  /* a worker's pidfd; session `id` */
    KEEPER_GONE,    /* daemon: session `id` needs no pidfd any more */
    KEEPER_END,     /* keeper: that was all; id: KEEPER_SUCCEEDED, or 0 */
    KEEPER_LIFE,    /* daemon: a pipe's end that hangs up as soon as it is being killed */
    KEEPER_WAITS,   /* daemon that was given nothing yet: its device is open */
    KEEPER_STANDBY, /* keeper, to the daemon that serves: does another one wait, its device open?
                       id: 0 or 1 */
    KEEPER_SERVES,  /* daemon: it listens. id: 1: the next one may be started, and wait; or 0 */
};

/* Another keeper follows this one when it dies, with all that it held (systemd's fd store): the
 * daemon then ends, for its sessions would be recorded by nobody. */
#define KEEPER_SUCCEEDED 1u

struct keeper_message {
    uint32_t magic;
    uint32_t kind; /* enum keeper_kind */
    uint64_t id;
    uint64_t extent_bytes;
    uint64_t reserved;
};

/* A session: recorded before its welcome, KEEPER_TOUCHES before its first grant. Of an earlier
 * daemon's, only those that may touch pages are waited for: a client whose welcome was lost does
 * not know its session, and would never say that it has drained. `state` is written last. */
enum keeper_state { KEEPER_FREE, KEEPER_WELCOMED, KEEPER_TOUCHES };

struct keeper_session {
    uint64_t id;
    int32_t pid;
    uint32_t state; /* enum keeper_state */
};

/* A memfd, written by the daemon alone. */
struct keeper_sessions {
    uint32_t magic;
    uint32_t device_kind; /* of the pool that it belongs to */
    uint8_t uuid[16];
    uint64_t pool_id;
    uint64_t requested_bytes; /* --pool-bytes; 0: the default */
    struct keeper_session sessions[KEEPER_SESSIONS];
};

#endif
