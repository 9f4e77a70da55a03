/* Messages with file descriptors: all arrive or none does, and of those that should not have come
 * nobody is left holding any. */
#include <criterion/criterion.h>
#include <dirent.h>
#include <errno.h>
#include <sys/resource.h>
#include <sys/stat.h>

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

static int ends[2], fds[SKV_FDS_PER_MESSAGE];
static uint32_t count, before;
static char message[16];

static void open_pair(void)
{
    cr_assert_eq(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
    before = open_fds(getpid());
}

static ssize_t receive(uint32_t room)
{
    return skv_receive_fds(ends[1], message, sizeof message, fds, room, &count, 0);
}

/* `text` and `sent` times the first end. */
static void send_copies(const char *text, uint32_t sent)
{
    int copies[SKV_FDS_PER_MESSAGE];
    for (uint32_t i = 0; i < sent; i++)
        copies[i] = ends[0];
    cr_assert_eq(skv_send_fds(ends[0], text, strlen(text), copies, sent, 0), 0);
}

static void expect_refused(uint32_t room, int error)
{
    cr_expect_eq(receive(room), -1);
    cr_expect_eq(errno, error, "%s", strerror(errno));
    cr_expect_eq(count, 0);
    cr_expect_eq(open_fds(getpid()), before, "of %u", room);
}

Test(fdpass, a_message_arrives_with_all_its_descriptors_in_order_and_close_on_exec)
{
    struct stat sent, got;
    int mine[3] = {open("/dev/null", O_RDONLY), open("/", O_RDONLY), open("/dev/zero", O_RDONLY)};
    open_pair();
    cr_assert_eq(skv_send_fds(ends[0], "three", 5, mine, 3, 0), 0);
    cr_assert_eq(receive(3), 5);
    cr_expect_eq(memcmp(message, "three", 5), 0);
    cr_assert_eq(count, 3);
    for (uint32_t i = 0; i < 3; i++) {
        cr_assert(fstat(mine[i], &sent) == 0 && fstat(fds[i], &got) == 0);
        cr_expect_eq(sent.st_ino, got.st_ino);
        cr_expect_eq(fcntl(fds[i], F_GETFD), FD_CLOEXEC);
    }
    send_copies("none", 0);
    cr_assert_eq(receive(3), 4);
    cr_expect_eq(count, 0);
    send_copies("all", SKV_FDS_PER_MESSAGE);
    cr_assert_eq(receive(SKV_FDS_PER_MESSAGE), 3);
    cr_expect_eq(count, SKV_FDS_PER_MESSAGE);
}

Test(fdpass, more_descriptors_than_there_is_room_for_are_refused_and_none_is_left)
{
    open_pair();
    for (uint32_t room = 1; room < 6; room++)
        for (uint32_t more = 1; more < 4; more++) {
            send_copies("hello", room + more);
            expect_refused(room, EPROTO);
        }
    send_copies("hello", SKV_FDS_PER_MESSAGE);
    expect_refused(SKV_FDS_PER_MESSAGE - 1, EPROTO);
    send_copies("hello", 2);
    cr_expect_eq(receive(2), 5, "the next one is taken");
}

Test(fdpass, descriptors_beyond_the_limit_of_open_files_are_refused_and_none_is_left)
{
    open_pair();
    send_copies("hello", 100);
    struct rlimit limit = {.rlim_cur = before + 50, .rlim_max = before + 50};
    cr_assert_eq(setrlimit(RLIMIT_NOFILE, &limit), 0);
    expect_refused(SKV_FDS_PER_MESSAGE, EPROTO);
}

Test(fdpass, a_message_that_is_too_long_is_refused_and_its_descriptors_closed)
{
    open_pair();
    send_copies("longer than sixteen bytes", 2);
    expect_refused(2, EMSGSIZE);
    cr_expect_eq(memcmp(message, "longer than sixt", 16), 0, "its beginning is there");
}

Test(fdpass, an_empty_message_with_descriptors_is_refused_and_leaves_none)
{
    open_pair();
    raw_send(ends[0], "", 0, ends, 2);
    expect_refused(2, EPROTO);
}

Test(fdpass, the_end_and_nothing_yet_are_told_apart)
{
    open_pair();
    cr_expect_eq(skv_receive_fds(ends[1], message, sizeof message, fds, 2, &count, MSG_DONTWAIT),
                 -1);
    cr_expect_eq(errno, EAGAIN);
    close(ends[0]);
    cr_expect_eq(receive(2), 0);
    cr_expect_eq(count, 0);
    cr_expect_eq(skv_send_fds(ends[1], "hello", 5, NULL, 0, 0), -1, "and no SIGPIPE");
    cr_expect_eq(errno, EPIPE);
}

Test(fdpass, empty_handshakes_with_descriptors_leave_none_in_the_daemon)
{
    struct rig rig;
    rig_init(&rig);
    rig_start(&rig, (const char *const[]){NULL});
    int waiting = raw_connect(&rig);
    close(waiting);
    for (int i = 0; i < 64; i++) {
        char answer[1024];
        int socket = raw_connect(&rig), copies[7];
        for (int k = 0; k < 7; k++)
            copies[k] = socket;
        raw_send(socket, "", 0, copies, 7);
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
