/* Hot restart, on every backend that is here: a real keeper, a real daemon, and workers that write
 * bytes of their own into every token's rows and know them again. Whatever is killed, what was
 * committed is in the pool afterwards, byte for byte, and nothing else is.
 *
 * RESTART_KILLS: how often the daemon is killed under load (default 50). RESTART_PROTECT: all of it
 * under sidekvd --protect. */
#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include "restart_rig.h"

TestSuite(restart, .init = set_up, .fini = tear_down, .timeout = 300);

#define ON_EVERY_BACKEND(claim) TEST_ON_EVERY_BACKEND(restart, claim, .timeout = 300)

/* ---- the daemon killed ---- */

static struct {
    pthread_t thread;
    pid_t victim;
    uint32_t after_us;
    uint64_t killed_ns;
    uint32_t done;
} killer;

static void *kill_later(void *unused)
{
    usleep(killer.after_us);
    killer.killed_ns = skv_now_ns();
    kill(killer.victim, SIGKILL);
    __atomic_store_n(&killer.done, 1, __ATOMIC_RELEASE);
    return unused;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

struct times {
    uint32_t count;
    double *ms;
};

static void print_times(const char *what, struct times *times)
{
    qsort(times->ms, times->count, sizeof *times->ms, compare);
    if (times->count)
        printf("restart: %u kills%s; from kill to first pool hit p50 %.1f ms, most %.1f ms\n",
               times->count, what, times->ms[times->count / 2], times->ms[times->count - 1]);
    free(times->ms);
}

/* Under load. Where there is to be a standby, most kills come when it waits. */
static void kill_again_and_again(void)
{
    const char *given = getenv("RESTART_KILLS");
    uint32_t kills = given ? (uint32_t)atoi(given) : 50, seed = 1;
    bool has_standby = strcmp(standby, "on") == 0;
    struct times at_once = {.ms = calloc(kills, sizeof(double))},
                 later = {.ms = calloc(kills, sizeof(double))};
    start();
    void *base = skv_pool_base(skv);
    fill();
    for (uint32_t k = 0; k < kills; k++) {
        pid_t next = has_standby && k % 4 < 3 ? await_standby(0) : 0;
        killer.victim = (pid_t)skv_server(skv)->pid;
        killer.after_us = (uint32_t)rand_r(&seed) % 30000;
        killer.done = 0;
        cr_assert_eq(pthread_create(&killer.thread, NULL, kill_later, NULL), 0);
        while (!__atomic_load_n(&killer.done, __ATOMIC_ACQUIRE)) {
            uint32_t user = (uint32_t)rand_r(&seed) % USERS;
            uint32_t history = known[user].committed + (uint32_t)rand_r(&seed) % 24;
            if (history > MOST) {
                /* ENOENT: done, the answer was lost, and the next daemon was asked again */
                int status = skv_forget(skv, (struct skv_id){0}, skv_user_integer(user));
                if (status == SKV_EAGAIN)
                    continue; /* a slow machine: its store is not there yet */
                cr_assert(status == 0 || status == SKV_ENOENT, "%s", skv_strerror(status));
                known[user].committed = known[user].perhaps = 0;
                continue;
            }
            serve(user, history ? history : 1);
        }
        pthread_join(killer.thread, NULL);
        while (skv_server(skv)->pid == (uint32_t)killer.victim) /* or it hangs */
            skv_ping(skv, NULL);
        struct times *times = next ? &at_once : &later;
        times->ms[times->count++] = check_all(killer.killed_ns);
        cr_assert_eq(skv_pool_base(skv), base);
        if (next)
            cr_assert_eq(skv_server(skv)->pid, (uint32_t)next, "another one than waited");
    }
    cr_expect(nothing_leaks());
    print_times(" with a standby waiting", &at_once);
    print_times(has_standby ? " before the standby waited" : " without a standby", &later);
}

ON_EVERY_BACKEND(whoever_kills_the_daemon_the_pool_is_served_on)
{
    stage(backend);
    kill_again_and_again();
}

ON_EVERY_BACKEND(whoever_kills_the_daemon_the_standby_takes_over)
{
    stage(backend);
    standby = "on";
    kill_again_and_again();
}

ON_EVERY_BACKEND(a_planned_one_fails_no_request)
{
    stage(backend);
    standby = "on"; /* which is not to be the next one: it may be of another release */
    start();
    fill();
    struct skv_options options = {.admin = true, .timeout_ms = 20000};
    for (int round = 0; round < 5; round++) {
        struct skv *admin;
        uint32_t before = skv_server(skv)->pid;
        pid_t waiting = round ? await_standby(0) : 0;
        cr_assert_eq(rig_connect(&rig, options, &admin), 0);
        cr_assert_eq(skv_restart(admin), 0);
        uint64_t begin = skv_now_ns();
        for (uint32_t i = 0; i < 2000 && skv_server(skv)->pid == before; i++) {
            uint32_t user = i % USERS;
            serve(user, known[user].committed < MOST ? known[user].committed + 1 : MOST);
            cr_assert_eq(known[user].perhaps, 0, "a commit was lost");
        }
        cr_assert_neq(skv_server(skv)->pid, before);
        cr_expect_neq(skv_server(skv)->pid, (uint32_t)waiting);
        skv_close(admin);
        printf("restart: planned, first request answered after %.1f ms\n", check_all(begin));
    }
    cr_expect(nothing_leaks());
}

/* ---- before the store is there ---- */

static char hold[128]; /* while there is such a file, the store's check takes */

static void hold_checks(void)
{
    snprintf(hold, sizeof hold, "%s/hold", rig.directory);
    setenv("SIDEKV_TEST_CHECK", hold, 1);
}

/* The daemon is killed; the next one serves, and its store is not there. */
static void kill_and_hold(void)
{
    FILE *file = fopen(hold, "we");
    cr_assert(file && fclose(file) == 0);
    uint32_t before = skv_server(skv)->pid;
    kill((pid_t)before, SIGKILL);
    await_new_daemon(before);
    cr_assert(store_awaited());
}

static uint32_t stored_tokens(uint32_t user)
{
    struct skv_user_info info = {0};
    int status = skv_lookup(skv, (struct skv_id){0}, skv_user_integer(user), &info);
    cr_assert(status == 0 || status == SKV_ENOENT, "%s", skv_strerror(status));
    return info.stored;
}

/* One who asks an admin's question of its own, and waits for the answer. */
struct asker {
    pthread_t thread;
    uint32_t user; /* to be forgotten; USERS: a FLUSH */
    int status;
};

static void *ask(void *context)
{
    struct asker *asker = context;
    struct skv_options options = {.admin = true, .timeout_ms = 20000};
    struct skv *admin;
    asker->status = rig_connect(&rig, options, &admin);
    if (asker->status)
        return NULL;
    do
        asker->status = asker->user == USERS
                            ? skv_flush(admin)
                            : skv_forget(admin, (struct skv_id){0}, skv_user_integer(asker->user));
    while (asker->status == SKV_EAGAIN);
    skv_close(admin);
    return NULL;
}

ON_EVERY_BACKEND(pool_hits_come_before_the_store_and_store_hits_with_it)
{
    stage(backend);
    struct skv_batch batch;
    hold_checks();
    start();
    fill();
    cr_assert_eq(skv_flush(skv), 0);
    cr_assert_eq(skv_evict(skv, (struct skv_id){0}, skv_user_integer(3)), 0);
    serve(7, known[7].committed + 10); /* stored or not */
    kill_and_hold();

    uint32_t evicted = known[3].committed, longest = known[9].committed + 20;
    known[3].committed = 0;
    check_all(skv_now_ns());
    cr_assert_eq(acquire(skv, 3, evicted, 0, &batch), 0);
    cr_expect_eq(batch.grants[0].cached, 0);
    cr_expect_not(batch.grants[0].flags & SKV_GRANT_APPEND, "the store may have it");
    cr_assert_eq(skv_commit(skv, &batch, NULL), 0);
    cr_assert_eq(acquire(skv, 9, longest, 0, &batch), 0);
    cr_expect_eq(batch.grants[0].cached, known[9].committed);
    cr_expect_not(batch.grants[0].flags & SKV_GRANT_APPEND);
    check_rows(&batch.grants[0], 9);
    cr_assert_eq(skv_commit(skv, &batch, NULL), 0);
    cr_expect_eq(stored_tokens(3), 0);
    cr_expect_eq(skv_forget(skv, (struct skv_id){0}, skv_user_integer(7)), SKV_EAGAIN);
    cr_expect_eq(skv_evict(skv, (struct skv_id){0}, skv_user_integer(8)), SKV_EAGAIN);
    struct asker askers[2] = {{.user = USERS}, {.user = 7}};
    for (int i = 0; i < 2; i++)
        cr_assert_eq(pthread_create(&askers[i].thread, NULL, ask, &askers[i]), 0);
    poll(NULL, 0, 300); /* both have asked, most likely */
    cr_assert(store_awaited());
    cr_assert_eq(unlink(hold), 0);
    for (int i = 0; i < 2; i++)
        pthread_join(askers[i].thread, NULL);
    cr_expect_eq(askers[0].status, 0, "FLUSH");
    cr_expect_eq(askers[1].status, 0, "FORGET");
    await_store();

    known[3].committed = evicted;
    known[7].committed = 0;
    cr_assert_eq(acquire(skv, 3, evicted, 0, &batch), 0);
    cr_expect_eq(batch.grants[0].cached, evicted);
    cr_expect(batch.grants[0].flags & SKV_GRANT_STORE);
    for (uint32_t layer = 0; batch.gated && layer < geometry.layers; layer++)
        cr_assert_eq(skv_gate_wait(&skv_gate_row(skv, 0)[layer], 20000), 0);
    check_rows(&batch.grants[0], 3);
    cr_assert_eq(skv_release(skv, &batch), 0);
    for (uint32_t u = 0; u < USERS; u++)
        cr_expect_eq(stored_tokens(u), known[u].committed, "user %u", u);
    serve(9, longest);
    cr_expect_eq(known[9].committed, longest);
    check_all(skv_now_ns());
    cr_expect(nothing_leaks());
    kill_and_hold(); /* what was forgotten is so for the next one too */
    cr_expect_eq(stored_tokens(7), 0);
    cr_assert_eq(unlink(hold), 0);
    await_store();
    cr_expect_eq(stored_tokens(7), 0);
    check_all(skv_now_ns());
}

ON_EVERY_BACKEND(a_daemon_may_end_before_its_store_is_there)
{
    stage(backend);
    struct skv_options options = {.admin = true, .timeout_ms = 20000};
    struct skv *admin;
    hold_checks();
    start();
    fill();
    for (int round = 0; round < 3; round++) {
        kill_and_hold();
        check_all(skv_now_ns());
        uint32_t before = skv_server(skv)->pid;
        cr_assert_eq(rig_connect(&rig, options, &admin), 0);
        cr_assert_eq(skv_restart(admin), 0);
        skv_close(admin);
        await_new_daemon(before);
        cr_assert(store_awaited());
        check_all(skv_now_ns());
    }
    kill(rig.daemon, SIGTERM); /* to end for good: it waits for its store, and stores the rest */
    poll(NULL, 0, 50);
    cr_assert_eq(unlink(hold), 0);
    int status;
    cr_assert_eq(waitpid(rig.daemon, &status, 0), rig.daemon);
    cr_expect(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    rig.daemon = 0;
    page_bytes_close(&bytes);
    skv_close(skv);
    start();
    for (uint32_t u = 0; u < USERS; u++)
        cr_expect_eq(stored_tokens(u), known[u].committed, "user %u", u);
}

ON_EVERY_BACKEND(a_store_that_proves_damaged_is_filled_from_the_pool)
{
    stage(backend);
    setenv("SIDEKV_TEST_CHECK", "crash", 1);
    start();
    fill();
    cr_assert_eq(skv_flush(skv), 0);
    uint32_t before = skv_server(skv)->pid;
    kill((pid_t)before, SIGKILL);
    await_new_daemon(before);
    check_all(skv_now_ns());
    await_store();
    struct skv_stats stats;
    cr_assert_eq(skv_stats(skv, &stats), 0);
    cr_expect_eq(stats.store_cold_starts, 1);
    cr_assert_eq(skv_flush(skv), 0);
    for (uint32_t u = 0; u < USERS; u++)
        cr_expect_eq(stored_tokens(u), known[u].committed, "user %u", u);
    check_all(skv_now_ns());
    cr_expect(nothing_leaks());
}

/* User 0 is cut behind its stored tail, whose new generation the store refuses; then it falls back
 * to what is stored. */
ON_EVERY_BACKEND(a_stored_tail_is_kept_while_the_store_refuses)
{
    const char *const options[] = {"--pool-bytes", "2M",    "--tail-ms", "0",
                                   "--standby",    standby, NULL};
    const uint32_t stored = S + 7;
    struct skv_user_info info = {.resident = 1};
    struct skv_batch batch;
    stage(backend);
    rig_child = rig_may_be_limited;
    start_with(options);
    rig_child = NULL;
    serve(0, stored);
    cr_assert_eq(skv_flush(skv), 0);
    cr_assert_eq(stored_tokens(0), stored);
    uint32_t before = skv_server(skv)->pid;
    rig_limit((pid_t)before, true);
    serve(0, 3 * S + 4);
    tokens[0][2 * S + 3]++;
    cr_assert_eq(acquire(skv, 0, 3 * S + 6, 0, &batch), 0);
    cr_assert_eq(batch.grants[0].cached, 2 * S);
    cr_assert_eq(skv_release(skv, &batch), 0);
    /* Till it is evicted, which it is not while an offload of it is in flight. */
    for (uint32_t i = 0; i < 5000 && info.resident; i++) {
        const uint32_t u = 1 + i % (USERS - 1);
        known[u].committed = known[u].perhaps = 0; /* what is evicted is lost */
        serve(u, MOST);
        cr_assert_eq(skv_lookup(skv, (struct skv_id){0}, skv_user_integer(0), &info), 0);
        if (i >= USERS)
            poll(NULL, 0, 1);
    }
    cr_assert_eq(info.committed, stored, "committed %u, resident %d", info.committed,
                 (int)info.resident);
    cr_assert_eq(acquire(skv, 0, stored, SKV_REQUEST_READ, &batch), 0);
    cr_assert_eq(batch.grants[0].cached, stored);
    for (uint32_t layer = 0; layer < geometry.layers; layer++)
        cr_assert_eq(skv_gate_wait(&skv_gate_row(skv, 0)[layer], 20000), 0);
    check_rows(&batch.grants[0], 0);
    cr_assert_eq(skv_release(skv, &batch), 0);
    cr_assert_eq(skv_flush(skv), SKV_ENOSPC);
    known[0].committed = stored;
    serve(0, 2 * S);
    cr_expect_eq(known[0].committed, stored, "it is not appended to");
    kill((pid_t)before, SIGKILL);
    await_new_daemon(before);
    await_store();
    cr_expect_eq(stored_tokens(0), stored);
    for (int i = 0; i < 20000 && known[0].committed < 2 * S; i++, poll(NULL, 0, 1))
        serve(0, 2 * S);
    cr_assert_eq(skv_flush(skv), 0);
    cr_expect_eq(stored_tokens(0), 2 * S);
}

/* ---- workers ---- */

/* A worker in a process of its own, told what to do by the test; forked before the test has opened
 * the device, which does not cross a fork. */
struct other {
    uint32_t step; /* that it has come to */
    uint32_t go;   /* step that it may take */
    int commit;    /* what its commit returned */
    uint32_t pages[MOST / S], count, cached;
};

static struct other *other;

static void reach(uint32_t step)
{
    __atomic_store_n(&other->step, step, __ATOMIC_RELEASE);
    while (__atomic_load_n(&other->go, __ATOMIC_ACQUIRE) < step)
        usleep(200);
}

static void await(uint32_t step)
{
    for (int i = 0; i < 200000 && __atomic_load_n(&other->step, __ATOMIC_ACQUIRE) < step; i++)
        usleep(200);
    cr_assert_eq(other->step, step);
}

/* Connects, leases user 0 for appending `history` tokens, waits, scribbles over what it may write,
 * commits; a step each. */
static pid_t fork_other(uint32_t history)
{
    other = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pid_t pid = fork();
    if (pid)
        return pid;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    struct skv *mine;
    struct page_bytes own;
    struct skv_batch batch;
    reach(1);
    if (connect_worker(&mine, &own) || acquire(mine, 0, history, 0, &batch))
        _exit(9);
    const struct skv_grant *grant = &batch.grants[0];
    other->cached = grant->cached;
    other->count = grant->page_count;
    memcpy(other->pages, grant->pages, grant->page_count * sizeof *grant->pages);
    reach(2);
    /* the arena may be gone: its own copy */
    write_rows(&own, other->pages, 3, other->cached, history);
    other->commit = skv_commit(mine, &batch, NULL);
    reach(3);
    _exit(0);
}

/* Lets it go on to the next step. */
static void let_go(uint32_t step)
{
    __atomic_store_n(&other->go, step, __ATOMIC_RELEASE);
}

ON_EVERY_BACKEND(a_worker_stopped_across_it_harms_nobody)
{
    stage(backend);
    pid_t pid = fork_other(100);
    start();
    fill();
    serve(0, 40); /* a page and a tail of 8 */
    let_go(1);
    await(2);
    cr_assert_eq(other->cached, protect ? 32 : 40); /* not its extent */
    kill(pid, SIGSTOP);
    uint32_t before = skv_server(skv)->pid;
    kill((pid_t)before, SIGKILL);
    await_new_daemon(before);
    check_all(skv_now_ns());

    await_store();
    struct skv_batch batch;
    cr_assert_eq(acquire(skv, 0, 120, 0, &batch), 0);
    const struct skv_grant *grant = &batch.grants[0];
    cr_expect(grant->flags & SKV_GRANT_APPEND);
    cr_expect_eq(grant->cached, 32, "its tail may be written by the one that is stopped");
    for (uint32_t i = 1; i < grant->page_count; i++)
        for (uint32_t o = 1; o < other->count; o++)
            cr_expect_neq(grant->pages[i], other->pages[o], "a page of the stopped worker");
    write_rows(&bytes, grant->pages, 0, grant->cached, 120);
    cr_assert_eq(skv_commit(skv, &batch, NULL), 0);
    known[0].committed = 120;
    for (uint32_t u = 1; u < USERS; u++) /* everybody gets new pages meanwhile */
        serve(u, 150);

    kill(pid, SIGCONT);
    let_go(2);
    await(3);
    cr_expect_eq(other->commit, SKV_ELOST);
    check_all(skv_now_ns());
    let_go(3);
    waitpid(pid, NULL, 0);
    cr_expect(nothing_leaks());
    check_all(skv_now_ns());
}

/* A device whose mover takes long to start, and a worker that takes long to come. */
ON_EVERY_BACKEND(the_store_comes_behind_the_workers_where_it_would_hold_them_up)
{
    stage(backend);
    setenv("SIDEKV_TEST_WORKERS_FIRST_MS", "100000", 1);
    pid_t pid = fork_other(100);
    struct skv_options options = {.admin = true, .timeout_ms = 20000};
    struct skv *admin;
    start();
    fill();
    let_go(1);
    await(2);
    kill(pid, SIGSTOP);
    for (int planned = 0; planned < 2; planned++) {
        uint32_t before = skv_server(skv)->pid;
        cr_assert_eq(rig_connect(&rig, options, &admin), 0);
        if (planned)
            cr_assert_eq(skv_restart(admin), 0);
        else
            kill((pid_t)before, SIGKILL);
        skv_close(admin);
        await_new_daemon(before);
        check_all(skv_now_ns());
        cr_assert(store_awaited());
    }
    kill(pid, SIGCONT);
    let_go(2);
    await(3);
    cr_expect_eq(other->commit, SKV_ELOST);
    let_go(3);
    waitpid(pid, NULL, 0);
    await_store(); /* 20 s at most */
    check_all(skv_now_ns());
}

ON_EVERY_BACKEND(a_worker_killed_together_with_the_daemon)
{
    stage(backend);
    pid_t pid = fork_other(100);
    start();
    fill();
    serve(0, 40);
    let_go(1);
    await(2);
    uint32_t before = skv_server(skv)->pid;
    kill((pid_t)before, SIGKILL);
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    await_new_daemon(before);
    check_all(skv_now_ns());
    cr_expect(nothing_leaks());
    await_store();
    serve(0, 90);
    cr_expect_eq(known[0].committed, 90);
    check_all(skv_now_ns());
}

ON_EVERY_BACKEND(an_open_batch_is_answered_and_its_commit_lost)
{
    stage(backend);
    start();
    fill();
    struct skv_batch batch;
    cr_assert_eq(acquire(skv, 7, MOST, 0, &batch), 0);
    uint32_t before = skv_server(skv)->pid;
    kill((pid_t)before, SIGKILL);
    while (!skv_lost(skv))
        poll(NULL, 0, 1);
    check_rows(&batch.grants[0], 7); /* the pass goes on */
    cr_expect_eq(skv_ping(skv, NULL), SKV_ELOST, "a batch is open");
    cr_expect_eq(skv_commit(skv, &batch, NULL), SKV_ELOST);
    cr_expect_eq(skv_ping(skv, NULL), 0);
    check_all(skv_now_ns());
    cr_expect(nothing_leaks());
}

/* ---- a daemon that takes long to die ---- */

ON_EVERY_BACKEND(the_next_one_waits_until_it_is_gone)
{
    stage(backend);
    start();
    fill();
    for (int round = 0; round < 3; round++) {
        pid_t before = (pid_t)skv_server(skv)->pid, next = kill_slowly(rig.daemon, before);
        if (round == 2)
            kill(next, SIGKILL); /* another one is started */
        let_die(before);
        await_new_daemon((uint32_t)before);
        cr_expect_eq(skv_server(skv)->pid == (uint32_t)next, round < 2);
        check_all_and_append();
    }
    cr_expect(nothing_leaks());
}

ON_EVERY_BACKEND(the_next_one_stores_all_when_the_keeper_is_to_end)
{
    stage(backend);
    start();
    fill();
    pid_t before = (pid_t)skv_server(skv)->pid, next = kill_slowly(rig.daemon, before);
    int status;
    kill(rig.daemon, SIGTERM);
    poll(NULL, 0, 50);
    cr_expect_eq(waitpid(rig.daemon, &status, WNOHANG), 0, "it waits for its daemon to be gone");
    let_die(before);
    cr_assert_eq(waitpid(rig.daemon, &status, 0), rig.daemon);
    rig.daemon = 0;
    cr_expect(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    cr_expect(kill(next, 0) != 0, "it was left behind");
    page_bytes_close(&bytes);
    skv_close(skv);
    start();
    for (uint32_t u = 0; u < USERS; u++)
        cr_expect_eq(stored_tokens(u), known[u].committed, "user %u", u);
}

/* Whoever there is of them: the daemon, the next one that waits, the one after that. */
ON_EVERY_BACKEND(killed_again_before_it_serves)
{
    stage(backend);
    start();
    fill();
    for (int round = 0; round < 12; round++) {
        pid_t before = (pid_t)skv_server(skv)->pid, pids[4] = {before};
        uint32_t count = 1;
        for (int again = 0; again < 4; again++) {
            for (uint32_t i = 0; i < count; i++)
                kill(pids[i], SIGKILL);
            poll(NULL, 0, round);
            if (again < 3)
                count = children(rig.daemon, pids);
        }
        for (uint32_t i = 0; i < count; i++)
            while (kill(pids[i], 0) == 0)
                poll(NULL, 0, 1);
        await_new_daemon((uint32_t)before);
        check_all_and_append();
    }
    cr_expect(nothing_leaks());
}

/* ---- the keeper ---- */

static int pidfd_of(pid_t pid)
{
    int fd = (int)syscall(SYS_pidfd_open, pid, 0);
    cr_assert_geq(fd, 0);
    return fd;
}

/* Whoever its parent is by now. */
static bool ends(int pidfd)
{
    struct pollfd end = {.fd = pidfd, .events = POLLIN};
    bool ended = poll(&end, 1, 20000) == 1;
    close(pidfd);
    return ended;
}

ON_EVERY_BACKEND(without_its_keeper_the_daemon_goes_on)
{
    stage(backend);
    standby = "on";
    start();
    fill();
    pid_t daemon = (pid_t)skv_server(skv)->pid;
    int waiting = pidfd_of(await_standby(0));
    kill(rig.daemon, SIGKILL);
    waitpid(rig.daemon, NULL, 0);
    rig.daemon = 0;
    cr_expect(ends(waiting), "it waits on, for nobody");
    for (uint32_t u = 0; u < USERS; u++)
        serve(u, 140);
    check_all(skv_now_ns());
    struct skv_options options = {.admin = true};
    struct skv *admin;
    cr_assert_eq(rig_connect(&rig, options, &admin), 0);
    cr_expect_eq(skv_restart(admin), SKV_ENOTSUP);
    skv_close(admin);
    struct skv_stats stats;
    cr_assert_eq(skv_stats(skv, &stats), 0);
    cr_expect_eq(stats.standby, 0);
    kill(daemon, SIGKILL);
    while (!skv_lost(skv))
        poll(NULL, 0, 1);
}

ON_EVERY_BACKEND(a_pool_that_becomes_protected_is_mapped_anew)
{
    stage(backend);
    char command[256], extra[128];
    static const char *const options[] = {"--pool-bytes", "256M", "--tail-ms", "0",
                                          "--standby",    "off",  NULL};
    start_extensible(options, "--trust", extra, sizeof extra);
    void *base = skv_pool_base(skv);
    cr_expect_eq(skv_pool_append_base(skv), base);
    uint32_t before = skv_server(skv)->pid;
    snprintf(command, sizeof command, "echo --protect >%s", extra);
    cr_assert_eq(system(command), 0);
    kill((pid_t)before, SIGKILL);
    await_new_daemon(before);
    cr_expect(skv_lost(skv), "its caller must hear of the new address");
    cr_assert_eq(skv_reconnect(skv, 20000), 0);
    cr_expect(skv_server(skv)->protect);
    cr_expect_eq(skv_pool_base(skv), base);
    cr_expect_neq(skv_pool_append_base(skv), base);
    check_all(skv_now_ns());
    await_store();
    serve(7, MOST);
    cr_expect_eq(known[7].committed, MOST);
    check_all(skv_now_ns());
    cr_expect(nothing_leaks());
}

/* Of a pool made under --trust, which has an extent in 64 MiB, once nobody says so any more. */
static bool becomes_protected(const char *pool_bytes)
{
    char command[256], extra[128];
    const char *const options[] = {"--pool-bytes", pool_bytes, "--tail-ms", "0",
                                   "--standby",    "off",      NULL};
    start_extensible(options, "--trust", extra, sizeof extra);
    cr_expect_not(skv_server(skv)->protect);
    uint32_t before = skv_server(skv)->pid;
    snprintf(command, sizeof command, ": >%s", extra);
    cr_assert_eq(system(command), 0);
    kill((pid_t)before, SIGKILL);
    await_new_daemon(before);
    if (skv_lost(skv)) /* mapped anew */
        cr_assert_eq(skv_reconnect(skv, 20000), 0);
    check_all(skv_now_ns());
    return skv_server(skv)->protect;
}

ON_EVERY_BACKEND(a_trusted_pool_with_extents_enough_becomes_protected)
{
    stage(backend);
    cr_expect(becomes_protected("1G"));
}

ON_EVERY_BACKEND(a_trusted_pool_of_few_extents_stays_one)
{
    stage(backend);
    cr_expect_not(becomes_protected("960M"));
}

ON_EVERY_BACKEND(another_geometry_starts_afresh)
{
    stage(backend);
    char command[256], extra[128];
    static const char *const options[] = {"--store", "none", "--pool-bytes", "16M", "--standby",
                                          "off",     NULL};
    start_extensible(options, "", extra, sizeof extra);
    uint32_t before = skv_server(skv)->pid;
    snprintf(command, sizeof command, "echo --page-tokens 16 >%s", extra);
    cr_assert_eq(system(command), 0);
    kill((pid_t)before, SIGKILL);
    while (!skv_lost(skv))
        poll(NULL, 0, 1);
    cr_expect_eq(skv_reconnect(skv, 20000), SKV_EGEOMETRY);
    page_bytes_close(&bytes);
    skv_close(skv);
    struct skv_options other_geometry = {
        .geometry = geometry, .model = {.lo = 5}, .rows = 1, .timeout_ms = 20000};
    other_geometry.geometry.page_tokens = 16;
    cr_assert_eq(rig_connect(&rig, other_geometry, &skv), 0);
    struct skv_stats stats;
    cr_assert_eq(skv_stats(skv, &stats), 0);
    cr_expect_eq(stats.pool_pages_free, stats.pool_pages);
    cr_expect_eq(stats.users_resident, 0);
}
