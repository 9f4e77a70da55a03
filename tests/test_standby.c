/* The standby: a daemon that waits beside the one that serves, its device open. It takes over from
 * a killed one, has nothing till then, and whatever becomes of it the daemon that serves does not
 * notice. That it takes over under load, again and again: test_restart.
 *
 * RESTART_PROTECT: all of it under sidekvd --protect. */
#include <sys/resource.h>
#include <sys/stat.h>

#include "restart_rig.h"

TestSuite(standby, .init = set_up, .fini = tear_down, .timeout = 300);

#define ON_EVERY_BACKEND(claim) TEST_ON_EVERY_BACKEND(standby, claim, .timeout = 300)

ON_EVERY_BACKEND(a_standby_that_dies_is_replaced_and_nobody_notices)
{
    stage(backend);
    standby = "on";
    start();
    fill();
    uint32_t daemon = skv_server(skv)->pid;
    pid_t waiting = await_standby(0);
    for (int round = 0; round < 4; round++) {
        cr_expect_eq(memfds_of(waiting), 0, "it has something already");
        kill(waiting, round % 2 ? SIGTERM : SIGKILL);
        for (uint32_t u = 0; u < USERS; u++) {
            serve(u, known[u].committed + 1);
            cr_assert_eq(known[u].perhaps, 0, "a commit was lost");
        }
        waiting = await_standby(waiting);
        cr_assert_eq(skv_server(skv)->pid, daemon);
    }
    kill((pid_t)daemon, SIGKILL);
    await_new_daemon(daemon);
    cr_expect_eq(skv_server(skv)->pid, (uint32_t)waiting);
    check_all(skv_now_ns());
    cr_expect(nothing_leaks());
}

ON_EVERY_BACKEND(killed_together_with_its_standby)
{
    stage(backend);
    standby = "on";
    start();
    fill();
    for (int round = 0; round < 6; round++) {
        pid_t daemon = (pid_t)skv_server(skv)->pid, waiting = await_standby(0);
        kill(round % 2 ? waiting : daemon, SIGKILL);
        usleep(round / 2 * 500);
        kill(round % 2 ? daemon : waiting, SIGKILL);
        await_new_daemon((uint32_t)daemon);
        cr_expect_neq(skv_server(skv)->pid, (uint32_t)waiting);
        check_all_and_append();
    }
    cr_expect(nothing_leaks());
}

ON_EVERY_BACKEND(a_keeper_told_to_end_leaves_no_standby)
{
    stage(backend);
    standby = "on";
    start();
    fill();
    pid_t waiting = await_standby(0);
    int status;
    kill(rig.daemon, SIGTERM);
    cr_assert_eq(waitpid(rig.daemon, &status, 0), rig.daemon);
    rig.daemon = 0;
    cr_expect(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    cr_expect(kill(waiting, 0) != 0, "it was left behind");
}

/* As a device may, that fails while nobody uses it. The host's: there is no address space left. */
Test(standby, a_standby_that_cannot_take_the_pool_leaves_it_to_another)
{
    struct backend host = {"host"};
    char path[64];
    unsigned long long pages = 0;
    stage(&host);
    standby = "on";
    start();
    fill();
    uint32_t before = skv_server(skv)->pid;
    pid_t waiting = await_standby(0);
    poll(NULL, 0, 1100); /* beyond DEVICE_OLD_NS */
    snprintf(path, sizeof path, "/proc/%d/statm", (int)waiting);
    FILE *file = fopen(path, "re");
    cr_assert(file && fscanf(file, "%llu", &pages) == 1);
    fclose(file);
    struct rlimit limit = {.rlim_cur = pages * 4096 + (8u << 20), .rlim_max = RLIM_INFINITY};
    cr_assert_eq(prlimit(waiting, RLIMIT_AS, &limit, NULL), 0);
    kill((pid_t)before, SIGKILL);
    await_new_daemon(before);
    cr_expect_neq(skv_server(skv)->pid, (uint32_t)waiting);
    check_all(skv_now_ns());
    cr_expect(nothing_leaks());
}

/* Its device fails, say. */
ON_EVERY_BACKEND(a_standby_that_cannot_be_started_harms_nobody)
{
    stage(backend);
    char command[256], extra[128];
    static const char *const options[] = {"--pool-bytes", "256M", "--tail-ms", "0",
                                          "--standby",    "on",   NULL};
    start_extensible(options, "", extra, sizeof extra);
    uint32_t before = skv_server(skv)->pid;
    struct skv_stats stats;
    pid_t waiting = await_standby(0);
    snprintf(command, sizeof command, "echo --device cuda:99 >%s", extra);
    cr_assert_eq(system(command), 0);
    kill(waiting, SIGKILL);
    for (stats.standby = 1; stats.standby; poll(NULL, 0, 1)) /* till the keeper knows */
        cr_assert_eq(skv_stats(skv, &stats), 0);
    for (int i = 0; i < 300; i++, poll(NULL, 0, 1)) { /* others are started, and die */
        uint32_t user = (uint32_t)i % USERS;
        serve(user, known[user].committed < MOST ? known[user].committed + 1 : MOST);
        cr_assert_eq(known[user].perhaps, 0, "a commit was lost");
    }
    cr_assert_eq(skv_stats(skv, &stats), 0);
    cr_expect_eq(stats.standby, 0);
    snprintf(command, sizeof command, ": >%s", extra);
    cr_assert_eq(system(command), 0);
    kill((pid_t)before, SIGKILL); /* in a pause, most likely */
    await_new_daemon(before);
    check_all(skv_now_ns());
    await_standby(0);
    cr_expect(nothing_leaks());
}

static bool runs_installed(const char *program)
{
    char path[64];
    struct stat runs, installed;
    snprintf(path, sizeof path, "/proc/%u/exe", skv_server(skv)->pid);
    return stat(path, &runs) == 0 && stat(program, &installed) == 0 &&
           runs.st_ino == installed.st_ino && runs.st_dev == installed.st_dev;
}

ON_EVERY_BACKEND(whoever_takes_over_is_the_program_that_is_installed)
{
    stage(backend);
    char path[512], program[128], command[1200];
    static const char *const options[] = {"--pool-bytes", "256M", "--tail-ms", "0",
                                          "--standby",    "on",   NULL};
    struct skv_options admins = {.admin = true, .timeout_ms = 20000};
    rig_program(path, sizeof path); /* SIDEKVD: the keeper */
    *strrchr(path, '/') = 0;
    snprintf(program, sizeof program, "%s/sidekvd", rig.directory);
    snprintf(command, sizeof command, "cp %s/sidekv-keeper %s/sidekvd %s", path, path,
             rig.directory);
    cr_assert_eq(system(command), 0);
    snprintf(path, sizeof path, "%s/sidekv-keeper", rig.directory);
    setenv("SIDEKVD", path, 1);
    start_with(options);
    fill();
    for (int round = 0; round < 3; round++) {
        uint32_t before = skv_server(skv)->pid;
        pid_t waiting = await_standby(0);
        struct skv *admin;
        snprintf(command, sizeof command, "cp %s %s.new && mv %s.new %s", program, program, program,
                 program);
        cr_assert_eq(system(command), 0);
        cr_expect_not(runs_installed(program));
        cr_assert_eq(rig_connect(&rig, admins, &admin), 0);
        if (round == 1)
            cr_assert_eq(skv_restart(admin), 0);
        else
            kill((pid_t)before, SIGKILL);
        await_new_daemon(before);
        skv_close(admin);
        cr_expect_neq(skv_server(skv)->pid, (uint32_t)waiting);
        cr_expect(runs_installed(program), "round %d", round);
        cr_expect(kill(waiting, 0) != 0, "it was left behind");
        check_all(skv_now_ns());
    }
}
