/* Messages with file descriptors, over a SOCK_SEQPACKET socket. Everything that sends or receives
 * fds does it here: handshakes, the keeper and its daemon, the service manager. */
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

/* Receives one, with up to `room` fds, at most SKV_FDS_PER_MESSAGE: the caller's then,
 * close-on-exec. Returns its length, 0 at the end, or -1 with errno and no fd left open; with the
 * first two as much of the message is there as `bytes` are:
 *   EMSGSIZE  the message is longer
 *   EPROTO    more fds than `room`, or than this process may open, or fds without a message
 *   others    of recvmsg(2) */
ssize_t skv_receive_fds(int socket, void *message, size_t bytes, int *fds, uint32_t room,
                        uint32_t *count, int flags);

#endif
