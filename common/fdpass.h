/* Messages with file descriptors, over a SOCK_SEQPACKET socket. */
#ifndef SKV_FDPASS_H
#define SKV_FDPASS_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define SKV_FDS_PER_MESSAGE 200u /* the kernel's limit is 253 */

/* Sends one message with up to SKV_FDS_PER_MESSAGE fds, which stay the caller's. `flags`: of
 * sendmsg(2), besides MSG_NOSIGNAL. 0, or -1 with errno. */
int skv_send_fds(int socket, const void *message, size_t bytes, const int *fds, uint32_t count,
                 int flags);

/* Receives one. Its fds are the caller's then, close-on-exec. Returns its length, 0 at the end, or
 * -1 with errno: EPROTO for a message or fds that do not fit (then no fd is left open). */
ssize_t skv_receive_fds(int socket, void *message, size_t bytes, int fds[SKV_FDS_PER_MESSAGE],
                        uint32_t *count, int flags);

#endif
