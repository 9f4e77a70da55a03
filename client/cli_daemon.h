/* A daemon of replay's own: started on a private socket, stopped and cleaned up after the run. */
#ifndef SKV_CLI_DAEMON_H
#define SKV_CLI_DAEMON_H

#include "cli_child.h"

struct replay_daemon_options {
    const char *model, *device;
    const char *store;                    /* kept; NULL: a temporary one */
    const char *pool_bytes, *store_bytes; /* passed on as they are; NULL: the daemon's defaults */
    const char *protection;               /* --protect or --trust; NULL: likewise */
};

struct replay_daemon {
    pid_t pid;
    char directory[104]; /* temporary: socket, perhaps store */
    char socket[112];
};

/* Starts sidekvd (beside this program, else in ../sbin from there, else in PATH) and waits until it
 * is ready. Follow with replay_daemon_stop(). Returns 0, SKV_EIO, SKV_ETIMEDOUT, or SKV_ELOST
 * (there is none, or it ended; logged). */
int replay_daemon_start(const struct replay_daemon_options *options, struct replay_daemon *daemon);

/* SIGTERM: it stores what is not stored yet. Then removes the temporary directory. SKV_ELOST: it
 * had ended before, or ended badly; logged. */
int replay_daemon_stop(struct replay_daemon *daemon);

#endif
