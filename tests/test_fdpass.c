/* Descriptors in messages that should not have any: nobody may be left holding them. */
#include <criterion/criterion.h>
#include <dirent.h>
#include <errno.h>

#include "fdpass.h"
#include "raw_client.h"

static uint32_t open_fds(pid_t pid)
{
    char path[64];
    uint32_t count = 0;
    snprintf(path, sizeof path, "/proc/%d/fd", (int)pid);
    DIR *directory = opendir(path);
    while (directory && readdir(directory))
        count++;
    if (directory)
        closedir(directory);
    return count;
}

Test(fdpass, an_empty_message_with_descriptors_is_refused_and_leaves_none)
{
    int ends[2], fds[SKV_FDS_PER_MESSAGE];
    uint32_t count;
    cr_assert_eq(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
    uint32_t before = open_fds(getpid());
    raw_send(ends[0], "", 0, ends, 2);
    cr_assert_eq(skv_receive_fds(ends[1], fds, sizeof fds, fds, &count, 0), -1);
    cr_assert_eq(errno, EPROTO);
    cr_assert_eq(open_fds(getpid()), before);
    close(ends[0]);
    cr_assert_eq(skv_receive_fds(ends[1], fds, sizeof fds, fds, &count, 0), 0, "the end is an end");
}

Test(fdpass, empty_handshakes_with_descriptors_leave_none_in_the_daemon)
{
    struct rig rig;
    rig_init(&rig);
    rig_start(&rig, (const char *const[]){NULL});
    int waiting = raw_connect(&rig);
    close(waiting);
    uint32_t before = 0;
    for (int i = 0; i < 64; i++) {
        char answer[1024];
        int socket = raw_connect(&rig), fds[7];
        for (int k = 0; k < 7; k++)
            fds[k] = socket;
        raw_send(socket, "", 0, fds, 7);
        while (raw_receive(socket, answer, sizeof answer, NULL, RAW_PATIENCE_MS) > 0)
            ;
        close(socket);
        if (i == 0)
            before = open_fds(rig.daemon);
    }
    uint32_t after = open_fds(rig.daemon);
    for (int i = 0; i < 6000 && after >= before + 16; i++, after = open_fds(rig.daemon))
        usleep(10000); /* it may not have come to closing them all */
    cr_assert_lt(after, before + 16, "%u descriptors, then %u", before, after);
    rig_fini(&rig);
}
