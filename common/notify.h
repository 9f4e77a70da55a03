/* Talking to the service manager (systemd's sd_notify protocol, by hand: a datagram of text, and
 * fds). Everything here does nothing where there is no manager: NOTIFY_SOCKET is not set. */
#ifndef SKV_NOTIFY_H
#define SKV_NOTIFY_H

#include <stdint.h>

/* Says `state`, such as "READY=1". 0; -1 with errno. */
int skv_notify(const char *state);

/* A connected socket to the manager, for saying more than once; -1 without a manager. */
int skv_notify_open(void);

/* Has the manager keep a copy of `fd` under a name, until it is dropped by that name: the next
 * process of the unit gets it, whatever this one dies of. systemd keeps as many as the unit's
 * FileDescriptorStoreMax. 0; -1 with errno. */
int skv_notify_store(int socket, const char *name, int fd);
int skv_notify_drop(int socket, const char *name);

/* The fds that an earlier process of the unit had stored: calls `take` with `context` and
 * each, close-on-exec and its own to close. Once, at the start; the variables that tell of them are
 * gone after it. */
void skv_notify_stored(void (*take)(void *context, const char *name, int fd), void *context);

#endif
