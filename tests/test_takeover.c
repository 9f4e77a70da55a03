/* SIGTERM in the middle of a hot restart, whoever gets it: what was committed is stored before all
 * ends, or another daemon serves it on. Each process is stopped where common/failpoint.h has a
 * name for it, told, and let go. The daemon of before had a store that refused, so that what is
 * stored at the end was stored by the one that took over. On the host. */
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "failpoint_plan.h"
#include "restart_rig.h"

static struct failpoint_plan *plan;
static struct skv *admin; /* it comes while the daemon may have files */

/* As restart_rig.h's, of the programs that obey a plan. Who is left by a parent that ends becomes
 * this process' child. */
static void set_up_plan(void)
{
    char keeper[512], obedient[544], *bin;
    set_up();
    rig_program(keeper, sizeof keeper);
    bin = strstr(keeper, "/bin/sidekv-keeper");
    cr_assert(bin);
    *bin = 0;
    snprintf(obedient, sizeof obedient, "%s/tests/bin/sidekv-keeper", keeper);
    setenv("SIDEKVD", obedient, 1);
    cr_assert_eq(prctl(PR_SET_CHILD_SUBREAPER, 1), 0);
    rig_child = rig_may_be_limited;
}

TestSuite(takeover, .init = set_up_plan, .fini = tear_down, .timeout = 300);

static void stage_plan(void)
{
    char path[128];
    stage(&backends[0]);
    snprintf(path, sizeof path, "%s/points", rig.directory);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    cr_assert(fd >= 0 && ftruncate(fd, sizeof *plan) == 0);
    plan = mmap(NULL, sizeof *plan, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    cr_assert_neq(plan, MAP_FAILED);
    close(fd);
    plan->signal = SIGSTOP;
    setenv(FAILPOINTS_FILE, path, 1);
}

/* ---- states of processes ---- */

/* The rest of the line of /proc/PID/status that begins so; "": there is none. */
static const char *status_of(pid_t pid, const char *name, char line[256])
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/status", (int)pid);
    FILE *file = fopen(path, "re");
    bool found = false;
    while (file && !found && fgets(line, 256, file))
        found = strncmp(line, name, strlen(name)) == 0;
    if (file)
        fclose(file);
    return found ? line + strlen(name) : "";
}

static bool is_stopped(pid_t pid)
{
    char line[256];
    return strstr(status_of(pid, "State:", line), "T (stopped)") != NULL;
}

/* SIGTERM has come to a process, which has not taken it: it is stopped, or busy. */
static bool is_told(pid_t pid)
{
    char line[256];
    return strtoull(status_of(pid, "ShdPnd:", line), NULL, 16) >> (SIGTERM - 1) & 1;
}

static void await_told(pid_t pid, bool told)
{
    for (int i = 0; i < 20000 && is_told(pid) != told; i++)
        poll(NULL, 0, 1);
}

/* Whoever comes to the point first stops there. */
static void arm(enum skv_failpoint point)
{
    plan->died = 0;
    plan->countdown = 1;
    __atomic_store_n(&plan->armed, (uint32_t)point + 1, __ATOMIC_SEQ_CST);
}

static pid_t await_stopped(void)
{
    pid_t pid = 0;
    for (int i = 0; i < 20000 && !(pid && is_stopped(pid)); i++, poll(NULL, 0, 1))
        pid = __atomic_load_n(&plan->died, __ATOMIC_ACQUIRE);
    cr_assert(pid && is_stopped(pid), "nobody comes to the point");
    __atomic_store_n(&plan->armed, 0, __ATOMIC_SEQ_CST);
    return pid;
}

/* The keeper's child that is not the daemon of before; 0: there is none. */
static pid_t other_child(pid_t before)
{
    pid_t pids[4] = {0};
    uint32_t count = children(rig.daemon, pids);
    for (uint32_t i = 0; i < count; i++)
        if (pids[i] != before)
            return pids[i];
    return 0;
}

/* ---- what is lost, what is left ---- */

/* Half of every user is stored, and the other half cannot be. */
static void fill_beyond_the_store(void)
{
    struct skv_user_info info;
    for (uint32_t u = 0; u < USERS; u++)
        serve(u, 20 + u);
    cr_assert_eq(skv_flush(skv), 0);
    rig_limit((pid_t)skv_server(skv)->pid, true);
    for (uint32_t u = 0; u < USERS; u++) {
        serve(u, 60 + u * 2);
        cr_assert_eq(skv_lookup(skv, (struct skv_id){0}, skv_user_integer(u), &info), 0);
        cr_assert(info.committed == 60 + u * 2 && info.stored < info.committed);
    }
}

static void start_filled(bool with_standby)
{
    stage_plan();
    standby = with_standby ? "on" : "off";
    start();
    cr_assert_eq(rig_connect(&rig, (struct skv_options){.admin = true}, &admin), 0);
    fill_beyond_the_store();
}

/* In order, with its socket, and all that it started. */
static void expect_end(void)
{
    int status = -1, left = 0;
    cr_assert_eq(waitpid(rig.daemon, &status, 0), rig.daemon);
    rig.daemon = 0;
    cr_expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "wait status %#x", (unsigned)status);
    cr_expect_neq(access(rig.socket, F_OK), 0, "the socket's file is left");
    for (int i = 0; i < 20000 && left >= 0; i++, poll(NULL, 0, left == 0))
        left = waitpid(-1, NULL, WNOHANG);
    cr_expect(left < 0 && errno == ECHILD, "a process is left");
}

/* The next start finds every user in the store, byte for byte. */
static void expect_stored(void)
{
    struct skv_user_info info;
    struct skv_batch batch;
    page_bytes_close(&bytes);
    skv_close(skv);
    skv_close(admin);
    start();
    for (uint32_t u = 0; u < USERS; u++) {
        cr_assert_eq(skv_lookup(skv, (struct skv_id){0}, skv_user_integer(u), &info), 0);
        cr_expect_eq(info.stored, known[u].committed, "user %u: %u of %u", u, info.stored,
                     known[u].committed);
        cr_assert_eq(acquire(skv, u, known[u].committed, SKV_REQUEST_READ, &batch), 0);
        cr_expect_eq(batch.grants[0].cached, known[u].committed);
        for (uint32_t layer = 0; batch.gated && layer < geometry.layers; layer++)
            cr_assert_eq(skv_gate_wait(&skv_gate_row(skv, 0)[layer], 20000), 0);
        check_rows(&batch.grants[0], u);
        cr_assert_eq(skv_release(skv, &batch), 0);
    }
}

/* ---- the moments ---- */

enum { KEEPER = 1, NEXT = 2 }; /* who is told: the keeper; whoever takes over */

struct moment {
    char name[24];
    enum skv_failpoint point;
    bool standby;
};

/* Of the keeper: the daemon is gone, the next one is not given anything, or some of it. Of that
 * one: from the pool's adoption to the store's last user. */
#define MOMENTS(X)                                                                                 \
    X(keeper_reaped, true)                                                                         \
    X(keeper_started, false)                                                                       \
    X(keeper_giving, false)                                                                        \
    X(keeper_giving, true)                                                                         \
    X(adopt_placed, false)                                                                         \
    X(start_numbered, false)                                                                       \
    X(start_opened, false)                                                                         \
    X(adopt_user, true)                                                                            \
    X(start_listening, false)

static struct moment moments[] = {
#define X(name, standby) {#name, FAIL_##name, standby},
    MOMENTS(X)
#undef X
};

#define GIVEN 2 /* the first of them in which the next daemon is somebody */
#define ALL   (sizeof moments / sizeof *moments)

#define AT_MOMENTS(claim, first, end)                                                              \
    ParameterizedTestParameters(takeover, claim)                                                   \
    {                                                                                              \
        return cr_make_param_array(struct moment, moments + (first), (end) - (first));             \
    }                                                                                              \
    ParameterizedTest(struct moment *moment, takeover, claim, .timeout = 300)

/* Who is stopped, and who was to take over. */
struct told {
    pid_t stopped, next;
};

/* The daemon is killed, and at the moment SIGTERM comes. Follow with SIGCONT to who is stopped. */
static struct told tell_at(const struct moment *moment, unsigned told)
{
    start_filled(moment->standby);
    pid_t before = (pid_t)skv_server(skv)->pid;
    pid_t waiting = moment->standby ? await_standby(0) : 0;
    arm(moment->point);
    kill(before, SIGKILL);
    pid_t stopped = await_stopped(), next = stopped;
    if (stopped == rig.daemon)
        next = waiting ? waiting : other_child(before);
    cr_assert(next && next != before, "%s", moment->name);
    if (told & NEXT)
        kill(next, SIGTERM);
    if (told & KEEPER)
        kill(rig.daemon, SIGTERM);
    if (stopped != rig.daemon)
        await_told(next, true);
    return (struct told){.stopped = stopped, .next = next};
}

/* Told while it has nothing, it ends. */
static void await_its_end(pid_t pid)
{
    char line[256];
    for (int i = 0; i < 20000 && !strstr(status_of(pid, "State:", line), "Z"); i++)
        poll(NULL, 0, 1);
}

AT_MOMENTS(the_keeper_told_to_end_has_all_stored, 0, ALL)
{
    struct told told = tell_at(moment, KEEPER);
    kill(told.stopped, SIGCONT);
    expect_end();
    expect_stored();
}

AT_MOMENTS(all_told_to_end_while_one_has_nothing_store_all, 0, GIVEN)
{
    struct told told = tell_at(moment, KEEPER | NEXT);
    await_its_end(told.next);
    kill(told.stopped, SIGCONT);
    expect_end();
    expect_stored();
}

AT_MOMENTS(the_next_one_told_to_end_while_it_has_nothing_is_replaced, 0, GIVEN)
{
    struct told told = tell_at(moment, NEXT);
    await_its_end(told.next);
    kill(told.stopped, SIGCONT);
    await_new_daemon(skv_server(skv)->pid);
    cr_expect_neq(skv_server(skv)->pid, (uint32_t)told.next);
    check_all_and_append();
    kill(rig.daemon, SIGTERM);
    expect_end();
    expect_stored();
}

AT_MOMENTS(whoever_takes_over_told_to_end_stores_all, GIVEN, ALL)
{
    struct told told = tell_at(moment, NEXT);
    kill(told.stopped, SIGCONT);
    expect_end();
    expect_stored();
}

/* A daemon takes long to die, as one with a GPU does. */
static void tell_while_it_dies(bool with_standby)
{
    start_filled(with_standby);
    if (with_standby)
        await_standby(0);
    pid_t before = (pid_t)skv_server(skv)->pid;
    kill_slowly(rig.daemon, before);
    kill(rig.daemon, SIGTERM);
    await_told(rig.daemon, false);
    let_die(before);
    expect_end();
    expect_stored();
}

Test(takeover, the_keeper_told_to_end_while_the_daemon_dies)
{
    tell_while_it_dies(false);
}

Test(takeover, the_keeper_told_to_end_while_the_daemon_dies_and_another_waits)
{
    tell_while_it_dies(true);
}

/* Before sidekvd's first line: a shell that becomes it once it has read one from a pipe. */
Test(takeover, the_keeper_told_to_end_when_the_next_one_has_hardly_begun)
{
    char path[512], script[2400], held[128];
    pid_t next = 0;
    stage_plan();
    rig_program(path, sizeof path); /* the keeper */
    *strrchr(path, '/') = 0;
    snprintf(held, sizeof held, "%s/held", rig.directory);
    snprintf(script, sizeof script,
             "cp %s/sidekv-keeper %s/keeper && cat >%s/sidekvd <<END && chmod +x %s/sidekvd\n"
             "#!/bin/sh\n[ ! -p %s ] || read line <%s\nexec %s/sidekvd \"\\$@\"\nEND\n",
             path, rig.directory, rig.directory, rig.directory, held, held, path);
    cr_assert_eq(system(script), 0);
    snprintf(path, sizeof path, "%s/keeper", rig.directory);
    setenv("SIDEKVD", path, 1);
    start();
    fill_beyond_the_store();
    pid_t before = (pid_t)skv_server(skv)->pid;
    cr_assert_eq(mkfifo(held, 0600), 0);
    kill(before, SIGKILL);
    for (int i = 0; i < 20000 && (kill(before, 0) == 0 || !next); i++, poll(NULL, 0, 1))
        next = other_child(before);
    cr_assert(next && kill(before, 0) != 0);
    kill(rig.daemon, SIGTERM);
    for (int i = 0; i < 2000 && !is_told(next) && kill(next, 0) == 0; i++)
        poll(NULL, 0, 1);
    int line = open(held, O_RDWR | O_CLOEXEC);
    cr_assert_eq(write(line, "\n", 1), 1);
    expect_end();
    close(line);
    unlink(held);
    expect_stored();
}

/* ---- a planned restart ---- */

/* It has said goodbye. */
Test(takeover, the_keeper_told_to_end_while_the_daemon_ends_for_a_restart)
{
    start_filled(false);
    arm(FAIL_stop_stored);
    cr_assert_eq(skv_restart(admin), 0);
    pid_t stopped = await_stopped();
    kill(rig.daemon, SIGTERM);
    await_told(stopped, true);
    kill(stopped, SIGCONT);
    expect_end();
    expect_stored();
}

/* It waits for a batch, and its store refuses: the restart would not wait for that. */
Test(takeover, a_daemon_told_to_end_instead_of_restarting_stores_all)
{
    struct skv_batch batch;
    start_filled(false);
    pid_t daemon = (pid_t)skv_server(skv)->pid;
    cr_assert_eq(acquire(skv, 0, known[0].committed, SKV_REQUEST_READ, &batch), 0);
    cr_assert_eq(skv_restart(admin), 0);
    kill(daemon, SIGTERM);
    await_told(daemon, false);
    skv_release(skv, &batch);
    poll(NULL, 0, 300); /* it would have ended */
    cr_expect_eq(kill(daemon, 0), 0);
    cr_expect_eq(waitpid(rig.daemon, NULL, WNOHANG), 0, "it did not wait for its store");
    rig_limit(daemon, false);
    expect_end();
    expect_stored();
}
