/* The deaths of prove_kills: of workers, daemons and keepers, at random and at failpoints. After
 * one the prover looks at every user. */
#ifndef SKV_KILLS_DEATHS_H
#define SKV_KILLS_DEATHS_H

#include "kills_rig.h"

#define FENCE_NS UINT64_C(50000000) /* a fence that takes longer is not measured */

/* ---- workers ---- */

/* Has the worker serve first: where a start takes long, it would else die in it. */
static void await_served(uint32_t me)
{
    struct slot *slot = &board->workers[me];
    uint64_t until = skv_now_ns() + WAIT_MS * UINT64_C(1000000);
    while (!load32(&slot->served) && !load32(&board->failures)) {
        rest(1000);
        if (skv_now_ns() > until)
            wrong("worker %u does not serve", me);
    }
}

static void kill_worker(enum line what)
{
    uint32_t me = chance(pace->workers);
    struct slot *slot = &board->workers[me];
    struct skv_stats before, now;
    begin(what, "a worker");
    if (pace->awaits && chance(8))
        await_served(me);
    bool measure = !slot->resume_ns && load32(&slot->phase) == OPEN && !skv_stats(skv, &before);
    bool fenced = false;
    double fence_ms = 0;
    uint64_t killed_ns = skv_now_ns();
    kill(slot->pid, SIGKILL);
    while (measure && !fenced && skv_now_ns() - killed_ns < FENCE_NS && !skv_stats(skv, &now)) {
        fenced = now.fenced_leases > before.fenced_leases;
        fence_ms = ms_since(killed_ns);
    }
    waitpid(slot->pid, NULL, 0);
    if (measure && load32(&slot->phase) == OPEN) {
        if (fenced)
            took(&tally->fence, fence_ms);
        tally->unfenced += !fenced; /* its COMMIT had been done, most of the time */
    }
    bury(me);
    end();
}

/* Stops one that has a batch open, and takes its users away from it; it is let go later. */
static void stop_worker(uint32_t hold_ms)
{
    uint32_t me = chance(pace->workers);
    struct slot *slot = &board->workers[me];
    begin(WORKER_STOPPED, "a worker stopped");
    for (uint32_t i = 0; i < 2000 && load32(&slot->phase) != OPEN; i++)
        nap(20);
    if (slot->resume_ns || load32(&slot->phase) != OPEN)
        return;
    int status;
    kill(slot->pid, SIGSTOP);
    if (waitpid(slot->pid, &status, WUNTRACED) != slot->pid || !WIFSTOPPED(status)) {
        wrong("a worker did not stop");
        end();
    }
    if (!exchange32(&slot->phase, OPEN, ROBBED)) { /* it had just ended its batch */
        kill(slot->pid, SIGCONT);
        return;
    }
    for (uint32_t u = 0; u < USERS; u++)
        if (load32(&board->users[u].lock) == me + 1)
            __atomic_store_n(&board->robbed, u + 1, __ATOMIC_SEQ_CST);
    unlock_all(me);
    slot->resume_ns = skv_now_ns() + hold_ms * UINT64_C(1000000);
    end();
}

/* ---- the keeper ---- */

/* The keeper has died: its daemon serves on, is ended, and all starts anew from the store. */
static void bury_keeper(bool serves)
{
    waitpid(rig.daemon, NULL, 0);
    rig.daemon = 0;
    bool gently = serves && chance(2);
    if (serves) {
        if (skv_ping(skv, NULL))
            wrong("a daemon whose keeper died does not answer");
        for (uint32_t i = 0; i < 20; i++)
            look(chance(USERS), false);
    }
    if (gently)
        park();
    __atomic_store_n(&board->away, 1, __ATOMIC_SEQ_CST);
    end_orphans(gently ? SIGTERM : SIGKILL);
    if (!gently)
        forget_unstored();
    start();
    close_session();
    open_session();
    go_on();
    look_at_all(false);
}

static void kill_keeper(void)
{
    begin(KEEPER, "the keeper");
    rest(chance(10000));
    kill(rig.daemon, SIGKILL);
    bury_keeper(true);
    end();
}

/* ---- failpoints ---- */

static bool is_keepers(enum skv_failpoint point)
{
    return point >= FAIL_keeper_part && point < FAIL_client_unsubmitted;
}

static bool is_clients(enum skv_failpoint point)
{
    return point >= FAIL_client_unsubmitted;
}

static const char *const names[] = {
#define X(name, text) #name,
    SKV_DAEMON_POINTS(X) SKV_KEEPER_POINTS(X) SKV_CLIENT_POINTS(X)
#undef X
};

static void arm(enum skv_failpoint point, uint32_t countdown)
{
    __atomic_store_n(&plan->died, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&plan->countdown, (int32_t)countdown, __ATOMIC_SEQ_CST);
    __atomic_store_n(&plan->armed, (uint32_t)point + 1, __ATOMIC_SEQ_CST);
}

static bool has_died(void)
{
    return __atomic_load_n(&plan->died, __ATOMIC_ACQUIRE) != 0;
}

static bool await_death(uint32_t ms)
{
    uint64_t until = skv_now_ns() + ms * UINT64_C(1000000);
    while (!has_died() && skv_now_ns() < until)
        rest(200);
    return has_died();
}

/* Nobody dies there any more. Did somebody? */
static bool disarm(enum skv_failpoint point)
{
    __atomic_store_n(&plan->armed, 0, __ATOMIC_SEQ_CST);
    tally->died[point] += has_died();
    return has_died();
}

/* No store passes its check from now on, or those that wait do. */
static void hold_checks(bool on)
{
    int fd = on ? open(hold, O_WRONLY | O_CREAT | O_CLOEXEC, 0600) : -1;
    if (on ? fd < 0 || close(fd) : unlink(hold))
        abort();
    holding = on;
}

/* The daemon has just been killed under its keeper: the next one is used, and often killed, before
 * its store is there. */
static void kill_early(void)
{
    enum skv_failpoint point = chance(FAIL_hello_pidfd + 8);
    bool aims = chance(2), again = chance(3);
    if (again)
        begin(DAEMON_EARLY, aims ? names[point] : "at random, awaiting its store");
    for (uint32_t i = 0; i < 10; i++)
        look(chance(USERS), false);
    if (again && aims)
        arm(point, 1 + chance(6));
    for (uint64_t until = skv_now_ns() + chance(20000) * UINT64_C(1000);
         skv_now_ns() < until && !(again && aims && has_died());)
        rest(200);
    if (!again)
        return;
    uint64_t killed_ns = skv_now_ns();
    kill((pid_t)daemon_pid, SIGKILL);
    if (aims)
        disarm(point);
    awaits_hit_ns = killed_ns;
    await_daemon(killed_ns);
    for (uint32_t i = 0; i < 10; i++)
        look(chance(USERS), false);
    end();
}

/* Kills the daemon: at a random instant, or without a keeper half the time at a point that its
 * threads come to under load. */
static void kill_daemon(enum line what)
{
    enum skv_failpoint point = chance(FAIL_hello_pidfd);
    bool aims = !kept && chance(2);
    char deed[64];
    snprintf(deed, sizeof deed, "the daemon%s%s", aims ? " at " : "", aims ? names[point] : "");
    begin(what, deed);
    if (aims) {
        arm(point, 1 + chance(6));
        await_death(pace->load_ms + pace->load_ms / 2);
    } else {
        rest(chance(20000));
    }
    if (kept && !chance(4)) {
        kill_standby();
        rest(chance(2) * chance(5000));
    }
    bool early = kept && chance(3);
    if (early)
        hold_checks(true);
    uint64_t killed_ns = skv_now_ns();
    kill((pid_t)daemon_pid, SIGKILL);
    if (!kept) {
        waitpid(rig.daemon, NULL, 0);
        if (aims)
            disarm(point);
        forget_unstored();
        start();
    }
    awaits_hit_ns = kept ? killed_ns : 0;
    await_daemon(killed_ns);
    if (early) {
        kill_early();
        line = what;
        hold_checks(false);
    }
    look_at_all(false);
    end();
}

/* Has somebody die at a point under the load; or, where that does not come to it, when a worker
 * dies and another connects; or when the daemon dies, where only the next one comes to it at once.
 * Whoever it was is buried. false: the point was not reached. */
static bool strike(enum skv_failpoint point, enum line what)
{
    char deed[64];
    bool killed = false;
    snprintf(deed, sizeof deed, "at %s", names[point]);
    begin(what, deed);
    /* of what happens all the time, not always the first */
    arm(point, plan->reached[point] < 20000 ? 1 : 1 + chance(20));
    bool at_start = point >= FAIL_settle_one && point <= FAIL_start_listening;
    if (at_start) {
        rest(chance(20000));
    } else if (!await_death(pace->load_ms)) {
        uint32_t me = chance(pace->workers);
        kill(board->workers[me].pid, SIGKILL);
        waitpid(board->workers[me].pid, NULL, 0);
        bury(me);
    }
    if (at_start || !await_death(pace->connect_ms)) {
        killed = true;
        kill((pid_t)daemon_pid, SIGKILL);
        await_death(pace->restart_ms);
    }
    uint64_t died_ns = skv_now_ns();
    bool reached = disarm(point);
    if (reached && is_keepers(point))
        bury_keeper(!killed);
    else if (killed || (uint32_t)plan->died == daemon_pid)
        await_daemon(died_ns);
    tend(false);
    look_at_all(false);
    if (reached)
        end();
    return reached;
}

/* The same for points that only an end and a start from the store come to. */
static bool strike_anew(enum skv_failpoint point, enum line what)
{
    char deed[64];
    bool stop = point == FAIL_stop_stored;
    snprintf(deed, sizeof deed, "at %s", names[point]);
    begin(what, deed);
    if (stop)
        park();
    __atomic_store_n(&board->away, 1, __ATOMIC_SEQ_CST);
    kill(rig.daemon, SIGKILL);
    waitpid(rig.daemon, NULL, 0);
    rig.daemon = 0;
    arm(point, 1);
    end_orphans(stop ? SIGTERM : SIGKILL);
    if (!stop)
        forget_unstored();
    start();
    if (!await_death(WAIT_MS))
        wrong("not reached");
    disarm(point);
    close_session();
    open_session();
    go_on();
    if (is_keepers(point))
        bury_keeper(true);
    look_at_all(false);
    end();
    return true;
}

static bool strike_any(enum skv_failpoint point)
{
    enum line what = is_keepers(point) ? KEEPER : is_clients(point) ? WORKER_POINT : DAEMON_POINT;
    bool anew = point == FAIL_start_handing || point == FAIL_start_whole ||
                point == FAIL_stop_stored || point == FAIL_keeper_part ||
                point == FAIL_keeper_unwhole;
    return anew ? strike_anew(point, what) : strike(point, what);
}

#endif
