#include "notify.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "fdpass.h"

#define FIRST_FD 3 /* of those that a manager passes, by its protocol */

int skv_notify_open(void)
{
    const char *path = getenv("NOTIFY_SOCKET");
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    size_t length = path ? strlen(path) : 0;
    errno = ENOENT;
    if (!length || (path[0] != '/' && path[0] != '@') || length >= sizeof address.sun_path)
        return -1;
    memcpy(address.sun_path, path, length);
    if (path[0] == '@')
        address.sun_path[0] = 0;
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    socklen_t bytes = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + length);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, bytes) == 0)
        return fd;
    close(fd);
    return -1;
}

int skv_notify(const char *state)
{
    int socket = skv_notify_open();
    if (socket < 0)
        return errno == ENOENT ? 0 : -1;
    int failed = skv_send_fds(socket, state, strlen(state), NULL, 0, 0);
    close(socket);
    return failed;
}

int skv_notify_store(int socket, const char *name, int fd)
{
    char text[128]; /* not watched: a pidfd of a dead process is kept too */
    int length = snprintf(text, sizeof text, "FDSTORE=1\nFDPOLL=0\nFDNAME=%s", name);
    return skv_send_fds(socket, text, (size_t)length, &fd, 1, 0);
}

int skv_notify_drop(int socket, const char *name)
{
    char text[128];
    int length = snprintf(text, sizeof text, "FDSTOREREMOVE=1\nFDNAME=%s", name);
    return skv_send_fds(socket, text, (size_t)length, NULL, 0, 0);
}

void skv_notify_stored(void (*take)(void *context, const char *name, int fd), void *context)
{
    const char *pid = getenv("LISTEN_PID"), *count = getenv("LISTEN_FDS");
    const char *names = getenv("LISTEN_FDNAMES");
    if (pid && count && atol(pid) == (long)getpid())
        for (long i = 0; i < atol(count); i++) {
            int fd = FIRST_FD + (int)i;
            char name[128] = "";
            size_t length = names ? strcspn(names, ":") : 0;
            if (length < sizeof name)
                memcpy(name, names ? names : "", length);
            if (fcntl(fd, F_SETFD, FD_CLOEXEC))
                break; /* there are no more, whatever their number says */
            take(context, name, fd);
            names = names && names[length] ? names + length + 1 : NULL;
        }
    unsetenv("LISTEN_PID");
    unsetenv("LISTEN_FDS");
    unsetenv("LISTEN_FDNAMES");
}
