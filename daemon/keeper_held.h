/* What sidekv-keeper holds for the next sidekvd: the pool's memory, the page descriptors, the
 * session table and its workers' pidfds, as plain file descriptors, and the end of a pipe that
 * tells when the daemon is being killed. All of it comes from daemons, in keeper.h's messages, or
 * from the copies that a service manager kept; it is given on, and never looked into. */
#ifndef SKV_KEEPER_HELD_H
#define SKV_KEEPER_HELD_H

#include <stdbool.h>
#include <sys/types.h>

#include "keeper.h"

#define KEEPER_GIVE_S 10  /* whoever does not take its fds, or does not die, is given up */
#define HELD_TURN     64u /* messages that are heard before anything else is looked at */

/* What a daemon has said of itself. */
struct heard {
    bool serves;
    bool standby; /* and wants the next one started, to wait */
};

struct held {
    int pool[KEEPER_FDS];
    uint32_t extents;
    uint64_t extent_bytes;
    int table, sessions;
    int life;   /* of the daemon that runs: see KEEPER_LIFE */
    bool whole; /* pool and tables are complete: a daemon may be given them */
    struct {
        uint64_t id;
        int pidfd;
    } workers[KEEPER_SESSIONS];
    uint32_t worker_count;
    int manager; /* systemd, which holds copies; -1: there is none */
};

/* Once, at the start: finds the manager and takes back the copies that an earlier keeper left,
 * after it has ended what is left of that one's daemon. */
void skv_held_open(struct held *held);
/* Takes what the daemon at `socket` has said, HELD_TURN messages at most, and adds to *heard.
 * false: its end is closed, and all has been heard. */
bool skv_held_listen(struct held *held, int socket, struct heard *heard);
/* Gives a new daemon what is held, or nothing where that is not whole; it keeps being held. The
 * daemon before it is gone. 0; -1 with errno: it did not take all of it in time, and hears the end.
 */
int skv_held_give(struct held *held, int socket);
/* The manager holds the pidfd of the daemon that runs, for the next keeper to end it; 0: of none.
 */
void skv_held_daemon(const struct held *held, pid_t pid);
void skv_held_drop_life(struct held *held);

#endif
