/* The daemon's side of sidekv-keeper: takes what an earlier daemon left (pool, page descriptors,
 * sessions), hands over its own, records sessions, and waits for the earlier daemon's workers to
 * reattach or to be gone. Without a keeper all of this does nothing. */
#ifndef SKV_KEPT_H
#define SKV_KEPT_H

#include <sys/types.h>

#include "device.h"
#include "keeper.h"
#include "loop.h"
#include "wire.h"

struct daemon;
struct peer;

/* A worker of an earlier daemon that may still touch pages. */
struct kept_worker {
    uint64_t id; /* its session; 0: settled */
    pid_t pid;
    int pidfd;
    bool dead;
    uint64_t due_ns; /* dead: when it is gone */
    struct watch death;
};

struct kept {
    int socket; /* to the keeper; -1: there is none */
    int life;   /* the end of a pipe that the keeper gets; -1: there is none */
    bool adopted;
    bool holds;     /* the keeper has the pool */
    bool succeeded; /* should the keeper die, another one follows with what it had: then */
    bool orphaned;  /* it died, and the daemon is to end */
    struct watch watch;
    struct keeper_sessions *sessions; /* or NULL */
    struct skv_pool_handles handles;  /* left by the earlier daemon */
    int table_fd, sessions_fd;        /* likewise */
    struct kept_worker workers[KEEPER_SESSIONS];
    uint32_t worker_count, unsettled;
};

/* At the start, in this order. open: finds the keeper, while there are few descriptors yet. take:
 * waits until the daemon of before is gone, takes what the keeper holds, and drops what does not
 * fit the options; the device is being opened meanwhile (device_bell), and where that fails while
 * it waits, so does this. take_pool: the pool of before; SKV_ENOENT: there is none, make one;
 * else end, for another daemon to take it. */
int skv_kept_open(struct daemon *daemon);
int skv_kept_take(struct daemon *daemon);
int skv_kept_take_pool(struct daemon *daemon);
/* The pool and the table (writable `table_fd`) are made: hands them to the keeper. */
void skv_kept_hand_over(struct daemon *daemon, int table_fd);
/* Everything is open: watches keeper and workers. */
void skv_kept_watch(struct daemon *daemon);
/* It listens: the keeper is told, and starts the next daemon (--standby). */
void skv_kept_serves(struct daemon *daemon);
void skv_kept_close(struct daemon *daemon);

/* The pool is not to be trusted: a new daemon shall start afresh. */
void skv_kept_disown(struct daemon *daemon);
/* Random, the same for as long as the pool lives; 0: it ends with this daemon. */
uint64_t skv_kept_pool_id(const struct daemon *daemon);
/* Before a worker's welcome. Why it cannot be recorded, with *status; NULL: it is, or need not be.
 */
const char *skv_kept_record(struct peer *peer, int *status);
void skv_kept_touches(struct peer *peer); /* before a grant */
void skv_kept_forget(struct daemon *daemon, uint64_t session);
/* A client says that its session of the earlier daemon has drained. */
void skv_kept_drained(struct daemon *daemon, uint64_t session, pid_t pid);
/* Deadlines; returns nanoseconds to the next. */
uint64_t skv_kept_tick(struct daemon *daemon);

#endif
