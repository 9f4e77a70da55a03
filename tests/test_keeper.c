/* What the keeper holds, and what a daemon takes of it, when the other one is broken: nothing is
 * lost that was whole, nothing kept that makes no sense, and no descriptor stays behind. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include "daemon.h"
#include "fdpass.h"
#include "fuzz_input.h"
#include "keeper_held.h"

#define EXTENT_BYTES (UINT64_C(2) << 20)

static struct held held;
static int keeper = -1, daemon_end = -1, any = -1; /* the socket's two ends; any fd */
static struct heard heard;
static uint32_t before; /* fds */

static void set_up(void)
{
    int ends[2];
    unsetenv("NOTIFY_SOCKET");
    setenv("SIDEKV_LOG", "error", 0);
    skv_held_open(&held);
    any = eventfd(0, EFD_CLOEXEC);
    cr_assert_eq(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
    keeper = ends[0];
    daemon_end = ends[1];
    before = fuzz_count_fds();
}

TestSuite(keeper, .init = set_up, .timeout = 60);

static void say_bytes(int socket, enum keeper_kind kind, uint64_t id, uint64_t extent_bytes,
                      uint32_t count)
{
    struct keeper_message m = {
        .magic = KEEPER_MAGIC, .kind = kind, .id = id, .extent_bytes = extent_bytes};
    int fds[SKV_FDS_PER_MESSAGE];
    for (uint32_t i = 0; i < count; i++)
        fds[i] = any;
    cr_assert_eq(skv_send_fds(socket, &m, sizeof m, fds, count, 0), 0);
}

static void say(int socket, enum keeper_kind kind, uint64_t id, uint32_t count)
{
    say_bytes(socket, kind, id, EXTENT_BYTES, count);
}

/* A pool of two extents and a worker, whole. */
static void hand_over(void)
{
    say(daemon_end, KEEPER_FRESH, 0, 0);
    say(daemon_end, KEEPER_POOL, 0, 2);
    say(daemon_end, KEEPER_TABLE, 0, 1);
    say(daemon_end, KEEPER_SESSION_TABLE, 0, 1);
    say(daemon_end, KEEPER_WHOLE, 0, 0);
    say(daemon_end, KEEPER_WORKER, 7, 1);
    cr_assert(skv_held_listen(&held, keeper, &heard));
    cr_assert(held.whole && held.extents == 2 && held.worker_count == 1);
    cr_assert_eq(fuzz_count_fds(), before + 5);
}

static void expect_dropped(const char *what)
{
    cr_expect(skv_held_listen(&held, keeper, &heard), "%s", what);
    cr_expect(!held.whole && !held.extents && !held.worker_count, "%s", what);
    cr_expect_eq(fuzz_count_fds(), before, "%s leaves descriptors", what);
}

Test(keeper, what_makes_no_sense_drops_all_and_leaves_no_descriptor)
{
    static const struct {
        const char *what;
        enum keeper_kind kind;
        uint64_t extent_bytes;
        uint32_t fds;
    } bad[] = {{"a beginning with fds", KEEPER_FRESH, EXTENT_BYTES, 1},
               {"extents after the table", KEEPER_POOL, EXTENT_BYTES, 1},
               {"extents of another size", KEEPER_POOL, 2 * EXTENT_BYTES, 1},
               {"no extents", KEEPER_POOL, EXTENT_BYTES, 0},
               {"a second table", KEEPER_TABLE, EXTENT_BYTES, 1},
               {"no table", KEEPER_TABLE, EXTENT_BYTES, 0},
               {"a second session table", KEEPER_SESSION_TABLE, EXTENT_BYTES, 1},
               {"an end with fds", KEEPER_WHOLE, EXTENT_BYTES, 1},
               {"a worker with two pidfds", KEEPER_WORKER, EXTENT_BYTES, 2},
               {"a worker that is gone with one", KEEPER_GONE, EXTENT_BYTES, 1},
               {"no sign of life", KEEPER_LIFE, EXTENT_BYTES, 0}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        hand_over();
        say_bytes(daemon_end, bad[i].kind, 9, bad[i].extent_bytes, bad[i].fds);
        expect_dropped(bad[i].what);
    }
    hand_over();
    cr_assert_eq(send(daemon_end, "what?", 5, 0), 5);
    expect_dropped("another message");
}

Test(keeper, a_message_of_a_later_release_is_ignored_and_leaves_no_descriptor)
{
    hand_over();
    say(daemon_end, KEEPER_SERVES + 1, 0, 3);
    cr_expect(skv_held_listen(&held, keeper, &heard));
    cr_expect(held.whole && !heard.serves);
    cr_expect_eq(fuzz_count_fds(), before + 5);
}

Test(keeper, a_worker_said_twice_is_held_once)
{
    hand_over();
    say(daemon_end, KEEPER_WORKER, 7, 1);
    cr_expect(skv_held_listen(&held, keeper, &heard));
    cr_expect_eq(held.worker_count, 1);
    cr_expect_eq(fuzz_count_fds(), before + 5);
    say(daemon_end, KEEPER_GONE, 7, 0);
    cr_expect(skv_held_listen(&held, keeper, &heard));
    cr_expect_eq(held.worker_count, 0);
}

Test(keeper, a_daemon_that_talks_without_end_leaves_time_for_others)
{
    struct pollfd more = {.fd = keeper, .events = POLLIN};
    for (uint32_t i = 0; i < HELD_TURN + 3; i++)
        say(daemon_end, KEEPER_GONE, 1, 0);
    cr_expect(skv_held_listen(&held, keeper, &heard));
    cr_expect_eq(poll(&more, 1, 0), 1, "all was heard in one turn");
    cr_expect(skv_held_listen(&held, keeper, &heard));
    cr_expect_eq(poll(&more, 1, 0), 0);
}

/* The kernel tells of what it did not read before it gives what it said. */
Test(keeper, what_a_daemon_said_last_is_heard_though_it_left_a_message_unread)
{
    hand_over();
    say(keeper, KEEPER_STANDBY, 1, 0);
    say(daemon_end, KEEPER_FRESH, 0, 0); /* its pool is not to be trusted */
    close(daemon_end);
    cr_expect(!skv_held_listen(&held, keeper, &heard));
    cr_expect(!held.whole && !held.extents);
    cr_expect_eq(fuzz_count_fds(), before - 1);
}

Test(keeper, what_is_not_whole_is_given_to_nobody)
{
    hand_over();
    held.whole = false;
    cr_assert_eq(skv_held_give(&held, keeper), 0);
    cr_expect_eq(fuzz_count_fds(), before);
    struct keeper_message m;
    cr_expect_eq(recv(daemon_end, &m, sizeof m, 0), sizeof m);
    cr_expect_eq(m.kind, KEEPER_END);
}

/* It did not read in time: a part alone would have it wait for the rest for ever. */
Test(keeper, whoever_took_a_part_in_time_hears_the_end)
{
    char message[sizeof(struct keeper_message)];
    hand_over();
    for (uint64_t id = 8; id < KEEPER_SESSIONS; id++) {
        say(daemon_end, KEEPER_WORKER, id, 1);
        cr_assert(skv_held_listen(&held, keeper, &heard));
    }
    setsockopt(keeper, SOL_SOCKET, SO_SNDTIMEO, &(struct timeval){.tv_usec = 1000},
               sizeof(struct timeval));
    cr_expect_eq(skv_held_give(&held, keeper), -1);
    cr_expect_eq(errno, EAGAIN);
    cr_expect(held.whole, "the next one gets all of it");
    ssize_t got;
    while ((got = recv(daemon_end, message, sizeof message, 0)) > 0)
        ;
    cr_expect_eq(got, 0);
}

/* ---- what the manager kept ---- */

/* Starts a keeper, which finds these in the manager's store. In a child: they begin at 3. */
static void find(const char *names, const char *count, bool whole)
{
    pid_t child = fork();
    if (child == 0) {
        char number[16];
        uint32_t given = 1;
        for (const char *c = names; *c; c++)
            given += *c == ':';
        int high = fcntl(any, F_DUPFD, 100);
        for (int fd = 3; fd < 100; fd++)
            close(fd);
        for (uint32_t i = 0; i < given; i++)
            dup2(high, 3 + (int)i);
        close(high);
        snprintf(number, sizeof number, "%d", (int)getpid());
        setenv("LISTEN_PID", number, 1);
        setenv("LISTEN_FDS", count, 1);
        setenv("LISTEN_FDNAMES", names, 1);
        skv_held_open(&held);
        uint32_t left = 0;
        for (int fd = 3; fd < 100; fd++)
            left += fcntl(fd, F_GETFD) >= 0;
        _exit(held.whole != whole || left != (whole ? given : 0));
    }
    int status;
    cr_assert_eq(waitpid(child, &status, 0), child);
    cr_expect_eq(status, 0, "%s", names);
}

Test(keeper, copies_that_do_not_belong_together_are_let_go)
{
    find("pool-0:pool-1:table-2097152:sessions:worker-7", "5", true);
    find("sessions:worker-18446744073709551615:table-0:pool-0", "4", true);
    find("pool-0:pool-1:pool-1:table-2097152:sessions", "5", false);
    find("pool-0:table-2097152:table-4096:sessions", "4", false);
    find("pool-0:table-2097152:sessions:sessions", "4", false);
    find("pool-1:table-2097152:sessions", "3", false);
    find("pool-0x:table-2097152:sessions", "3", false);
    find("pool-00:table-2097152:sessions", "3", false);
    find("pool-8192:table-2097152:sessions", "3", false);
    find("pool-0:table--1:sessions", "3", false);
    find("pool-0:table-2097152:sessions", "4294967295", true);
}

/* ---- the daemon's side ---- */

static struct daemon taker;

static int take(void)
{
    taker.kept = (struct kept){.socket = daemon_end, .life = -1, .table_fd = -1, .sessions_fd = -1};
    taker.device_bell = taker.signals = -1;
    shutdown(keeper, SHUT_WR);
    return skv_kept_take(&taker);
}

static void expect_nothing_left(void)
{
    skv_kept_close(&taker); /* its end of the socket, too */
    cr_expect_eq(fuzz_count_fds(), before - 1);
}

Test(keeper, a_daemon_refuses_tables_that_come_twice_and_leaves_no_descriptor)
{
    say(keeper, KEEPER_POOL, 0, 2);
    say(keeper, KEEPER_TABLE, 0, 1);
    say(keeper, KEEPER_TABLE, 0, 1);
    cr_expect_eq(take(), SKV_EPROTO);
    expect_nothing_left();
}

Test(keeper, what_comes_to_a_daemon_without_a_pool_is_let_go)
{
    say(keeper, KEEPER_TABLE, 0, 1);
    say(keeper, KEEPER_SESSION_TABLE, 0, 1);
    say(keeper, KEEPER_WORKER, 7, 1);
    say(keeper, KEEPER_END, 0, 0);
    cr_expect_eq(take(), 0);
    cr_expect_eq(taker.kept.worker_count, 0);
    cr_expect_eq(fuzz_count_fds(), before);
    expect_nothing_left();
}

/* A file of these bytes, then zeroes. */
static int file_of(const void *bytes, size_t count, uint64_t size)
{
    int fd = fuzz_memory(size, 0);
    cr_assert_eq(write(fd, bytes, count), (ssize_t)count);
    return fd;
}

/* Is a pool taken whose table is of this version? */
static bool taken(uint32_t version)
{
    const struct skv_geometry geometry = {
        .layers = 2, .heads = 1, .head_dim = 64, .page_tokens = 16};
    const uint64_t pages = 2 * EXTENT_BYTES / skv_page_bytes(&geometry);
    const struct wire_table table = {.magic = WIRE_MAGIC,
                                     .version = version,
                                     .geometry = geometry,
                                     .pages = pages,
                                     .pool_id = 4711};
    static const struct keeper_sessions sessions = {.magic = KEEPER_MAGIC, .pool_id = 4711};
    struct keeper_message m = {.magic = KEEPER_MAGIC, .extent_bytes = EXTENT_BYTES};
    int fd = file_of(&table, sizeof table, sizeof table + pages * sizeof *table.entries);
    say(keeper, KEEPER_POOL, 0, 2);
    m.kind = KEEPER_TABLE;
    cr_assert_eq(skv_send_fds(keeper, &m, sizeof m, &fd, 1, 0), 0);
    close(fd);
    fd = file_of(&sessions, sizeof sessions, sizeof sessions);
    m.kind = KEEPER_SESSION_TABLE;
    cr_assert_eq(skv_send_fds(keeper, &m, sizeof m, &fd, 1, 0), 0);
    close(fd);
    say(keeper, KEEPER_END, 0, 0);
    taker.options = (struct options){.geometry = geometry, .export = SKV_EXPORT_FD};
    cr_assert_eq(take(), 0);
    return taker.kept.handles.extents == 2;
}

/* What release 1 of the wire left is as it is now. */
Test(keeper, a_pool_outlives_a_change_of_the_wire)
{
    cr_expect(taken(1));
    cr_expect_neq(WIRE_VERSION, 1);
}

Test(keeper, a_pool_with_a_table_of_another_version_is_let_go)
{
    cr_expect(!taken(WIRE_TABLE_VERSION + 1));
    expect_nothing_left();
}
