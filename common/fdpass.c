#include "fdpass.h"

#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

union control {
    struct cmsghdr header;
    char room[CMSG_SPACE(SKV_FDS_PER_MESSAGE * sizeof(int))];
};

int skv_send_fds(int socket, const void *message, size_t bytes, const int *fds, uint32_t count,
                 int flags)
{
    assert(count <= SKV_FDS_PER_MESSAGE);
    union control control;
    struct iovec part = {.iov_base = (void *)(uintptr_t)message, .iov_len = bytes};
    struct msghdr out = {.msg_iov = &part, .msg_iovlen = 1};
    if (count) {
        memset(&control, 0, sizeof control);
        out.msg_control = &control;
        out.msg_controllen = CMSG_SPACE(count * sizeof(int));
        struct cmsghdr *header = CMSG_FIRSTHDR(&out);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(count * sizeof(int));
        memcpy(CMSG_DATA(header), fds, count * sizeof(int));
    }
    ssize_t sent;
    do
        sent = sendmsg(socket, &out, flags | MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    return sent == (ssize_t)bytes ? 0 : -1;
}

ssize_t skv_receive_fds(int socket, void *message, size_t bytes, int *fds, uint32_t room,
                        uint32_t *count, int flags)
{
    assert(room <= SKV_FDS_PER_MESSAGE);
    union control control;
    struct iovec part = {.iov_base = message, .iov_len = bytes};
    struct msghdr in = {.msg_iov = &part, .msg_iovlen = 1};
    ssize_t got;
    *count = 0;
    do {
        in.msg_control = &control;
        in.msg_controllen = CMSG_LEN(room * sizeof(int)); /* CMSG_SPACE may have room for more */
        got = recvmsg(socket, &in, flags | MSG_CMSG_CLOEXEC);
    } while (got < 0 && errno == EINTR);
    for (struct cmsghdr *h = got >= 0 ? CMSG_FIRSTHDR(&in) : NULL; h; h = CMSG_NXTHDR(&in, h)) {
        if (h->cmsg_level != SOL_SOCKET || h->cmsg_type != SCM_RIGHTS)
            continue;
        *count =
            (uint32_t)((h->cmsg_len - CMSG_LEN(0)) / sizeof(int)); /* one such header at most */
        memcpy(fds, CMSG_DATA(h), *count * sizeof(int));
    }
    int wrong = 0;
    if (got >= 0 && (in.msg_flags & MSG_CTRUNC || (got == 0 && *count)))
        wrong = EPROTO;
    else if (got >= 0 && in.msg_flags & MSG_TRUNC)
        wrong = EMSGSIZE;
    if (!wrong)
        return got;
    while (*count)
        close(fds[--*count]);
    errno = wrong;
    return -1;
}
