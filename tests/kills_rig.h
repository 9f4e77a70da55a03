/* A rig of prove_kills, seen from the prover: a keeper, a daemon, the workers, and the prover's own
 * session, with which it looks at every user between two deaths. What is proved is a line; its
 * first failure ends the rig. */
#ifndef SKV_KILLS_RIG_H
#define SKV_KILLS_RIG_H

#include <dirent.h>
#include <time.h>

#include "kills_load.h"
#include "prove.h"

#define RIGS     2u
#define POOL     "8M"  /* 256 pages; all users have some 400 */
#define GUARDED  "16M" /* a protected pool: 8 extents, one for each session to append to */
#define LEASE_MS 30u
#define SLOW_NS  UINT64_C(3000000000) /* worth a line */
#define TIMES    8192u

enum line {
    WORKER_RANDOM,
    WORKER_POINT,
    WORKER_STOPPED,
    LEAKS,
    DAEMON_ALONE,
    DAEMON_RANDOM,
    DAEMON_POINT,
    DAEMON_EARLY,
    KEEPER,
    UNDER_MPS,
    LINES
};
static const struct {
    unsigned promise;
    const char *what;
    uint32_t host, gpu; /* how often at scale 1 */
} lines[LINES] = {
    [WORKER_RANDOM] = {1, "workers killed at random: nothing lost, not a byte", 4500, 240},
    [WORKER_POINT] = {1, "workers killed at failpoints of the library", 500, 160},
    [WORKER_STOPPED] = {1, "workers stopped with a batch beyond --lease-ms, let go", 500, 60},
    [LEAKS] = {1, "quiet moments: no page leaked; fds, memory at the end"},
    [DAEMON_ALONE] = {2, "daemon killed, no keeper: what was stored is there", 300, 200},
    [DAEMON_RANDOM] = {3, "daemon killed under its keeper at random: all committed", 300, 200},
    [DAEMON_POINT] = {3, "daemon killed under its keeper at failpoints", 400, 200},
    [DAEMON_EARLY] = {3, "daemon killed while it awaits its store, half at failpoints"},
    [KEEPER] = {3, "keeper killed: served on; anew from the store: stored", 200, 200},
    [UNDER_MPS] = {9, "workers killed under MPS: reported, nothing is promised", 20, 20},
};

/* What takes another time where each process has to make a context first, 0.2 to 0.4 s. */
static const struct pace {
    uint32_t workers;
    uint32_t lock_ms;                         /* a look waits this long for a worker's lock */
    uint32_t load_ms, connect_ms, restart_ms; /* till a failpoint is come to */
    uint32_t look_every;                      /* deaths of workers */
    uint32_t files; /* that a daemon may have open more than before: its driver's own */
    bool awaits;    /* a worker has mostly served before it is killed */
} host_pace = {.workers = WORKERS,
               .lock_ms = 3,
               .load_ms = 20,
               .connect_ms = 20,
               .restart_ms = 1000,
               .look_every = 50},
  gpu_pace = {.workers = 3,
              .lock_ms = 20,
              .load_ms = 200,
              .connect_ms = 1500,
              .restart_ms = 5000,
              .look_every = 1,
              .files = 16,
              .awaits = true},
  *pace = &host_pace;

struct times {
    uint32_t count;
    float ms[TIMES];
};

static struct tally { /* of a rig */
    uint64_t done[LINES], failed[LINES], died[SKV_FAILPOINTS], reached[SKV_FAILPOINTS];
    char directory[64];
    uint64_t looks, locked, short_hits, unfenced;
    struct times fence, back;    /* kill to fence; daemon's death to the next answer */
    struct times hit, store_hit; /* its death to the first pool hit; exec to the first store hit */
    bool mps;                    /* the daemon says that it runs under it */
    struct board load;
} * tallies, *tally;

static struct rig rig;
static struct skv *skv; /* the prover's own session */
static int board_fd;
static bool kept; /* a keeper runs: rig.daemon is its pid */
static uint32_t daemon_pid;
static char hold[128]; /* while there is such a file, no store passes its check */
static bool holding;
static enum line line;                          /* what is being proved now */
static uint64_t awaits_hit_ns, awaits_store_ns; /* since when; 0: had */

static void took(struct times *times, double ms)
{
    if (times->count < TIMES)
        times->ms[times->count++] = (float)ms;
}

static double ms_since(uint64_t ns)
{
    return (double)(skv_now_ns() - ns) / 1e6;
}

static void begin(enum line what, const char *deed)
{
    line = what;
    if (skv_lost(skv) || skv_server(skv)->pid != daemon_pid)
        wrong("the daemon ended by itself");
    snprintf(board->deed, sizeof board->deed, "kill %llu (%s)",
             (unsigned long long)tally->done[what] + 1, deed);
}

static void end_orphans(int signal);

static void end(void)
{
    tally->done[line]++;
    tally->failed[line] += load32(&board->failures) != 0;
    if (!load32(&board->failures))
        return;
    char command[160];
    fflush(stdout);
    snprintf(command, sizeof command, "tail -n 25 %s/log | cut -c 1-200", rig.directory);
    if (system(command))
        printf("kills: no log\n");
    rig_fini(&rig);
    end_orphans(SIGKILL);
    tally->load = *board;
    _exit(1); /* the rig's first failure is its last: the rest would follow from it */
}

/* ---- workers ---- */

static void spawn(uint32_t me)
{
    struct slot *slot = &board->workers[me];
    uint64_t seed = random_state ^ skv_now_ns() << 20;
    *slot = (struct slot){0};
    pid_t pid = fork();
    if (pid == 0)
        exec_worker(board_fd, me, seed);
    slot->pid = pid; /* the slot is shared: not the child's 0 */
}

/* A worker is dead and reaped: its locks are free, another takes its place. */
static void bury(uint32_t me)
{
    unlock_all(me);
    spawn(me);
}

/* Lets stopped workers go that are due, or all; finds those that died by themselves. */
static void tend(bool all)
{
    for (uint32_t w = 0; w < pace->workers; w++) {
        struct slot *slot = &board->workers[w];
        if (slot->resume_ns && (all || skv_now_ns() >= slot->resume_ns)) {
            slot->resume_ns = 0;
            kill(slot->pid, SIGCONT);
        }
        int status;
        if (waitpid(slot->pid, &status, WNOHANG) != slot->pid)
            continue;
        if (!WIFSIGNALED(status) ||
            WTERMSIG(status) != SIGKILL) /* a failpoint's, maybe a late one */
            wrong("worker %u ended by itself: wait status %d", w, status);
        bury(w);
    }
}

static void rest(uint32_t us)
{
    uint64_t until = skv_now_ns() + us * UINT64_C(1000);
    do {
        tend(false);
        nap(us < 1000 ? us : 1000);
    } while (skv_now_ns() < until);
}

/* ---- looking ---- */

/* Bytes from the pool, or from the store, were compared: the first since a death? */
static void note_hit(const struct skv_grant *grant)
{
    if (awaits_hit_ns && grant->gpu_tokens) {
        took(&tally->hit, ms_since(awaits_hit_ns));
        awaits_hit_ns = 0;
    }
    if (awaits_store_ns && grant->cached > grant->gpu_tokens) {
        took(&tally->store_hit, ms_since(awaits_store_ns));
        awaits_store_ns = 0;
    }
}

/* Compares a user with the ledger. strict: nothing else goes on, so all of it must be served. */
static void look(uint32_t u, bool strict)
{
    struct user *user = &board->users[u];
    struct skv_id id = skv_user_integer(u);
    uint64_t until = skv_now_ns() + (strict ? WAIT_MS : pace->lock_ms) * UINT64_C(1000000);
    while (!try_lock(u, WORKERS)) {
        if (skv_now_ns() > until) {
            if (strict)
                wrong("user %u stays locked by %u", u, load32(&user->lock));
            tally->locked++;
            return;
        }
        rest(50);
    }
    tally->looks++;
    struct skv_user_info info = {0};
    uint32_t committed;
    uint64_t lost = drops(), least = load64(&user->least);
    uint64_t stored = load64(&user->stored); /* first: a FLUSH may be answered meanwhile */
    if (!holding)                            /* else what is known is less, and as right */
        know_all(skv, u, &committed);
    int status = skv_lookup(skv, model, id, &info);
    bool less = holding && (info.committed < tokens_of(least) || info.stored < tokens_of(stored));
    if (status && status != SKV_ENOENT) {
        wrong("looking up user %u: %s", u, skv_strerror(status));
    } else if ((!less && !may_have(user, info.committed)) || info.committed > user->most ||
               (!less && info.stored < tokens_of(stored))) {
        wrong("user %u has %u tokens (%u in the pool, %u stored), committed were %u to %u, stored "
              "%u, cut to %d; %s",
              u, info.committed, info.resident, info.stored, tokens_of(least), user->most,
              tokens_of(stored), (int)user->cutting - 1, state_of(skv));
    } else if (info.committed) {
        struct skv_request request = {.user = id,
                                      .tokens = tokens_of_user(u),
                                      .history = info.committed,
                                      .max_cached = UINT32_MAX,
                                      .flags = SKV_REQUEST_READ};
        struct skv_batch batch;
        status = skv_acquire(skv, 0, &request, 1, &batch);
        if (!status)
            status = pass(skv, &batch);
        if (status)
            wrong("acquiring user %u: %s", u, skv_strerror(status));
        else
            check_rows(&batch.grants[0], u, user->editions);
        if (!status && strict && batch.grants[0].cached < info.committed)
            wrong("user %u: %u of %u tokens are served", u, batch.grants[0].cached, info.committed);
        if (!status)
            note_hit(&batch.grants[0]);
        tally->short_hits += !status && batch.grants[0].cached < info.committed;
        if (batch.count)
            skv_release(skv, &batch);
        if (!less)
            __atomic_store_n(&user->drops, lost, __ATOMIC_SEQ_CST);
        if (settled(user)) /* else what is there now is about to go */
            grow(&user->least, high(least), info.committed);
        if (!(high(stored) & 1))
            grow(&user->stored, high(stored), info.stored);
    }
    unlock(u);
}

static void look_at_all(bool strict)
{
    for (uint32_t u = 0; u < USERS; u++)
        look(u, strict);
}

/* Files that a process has open. */
static uint32_t open_files(pid_t pid)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd", (int)pid);
    DIR *directory = opendir(path);
    uint32_t count = 0;
    while (directory && readdir(directory))
        count++;
    if (directory)
        closedir(directory);
    return count;
}

static uint64_t private_kib(pid_t pid)
{
    char path[64], text[128];
    unsigned long long kib = 0;
    snprintf(path, sizeof path, "/proc/%d/status", (int)pid);
    FILE *file = fopen(path, "re");
    while (file && fgets(text, sizeof text, file))
        if (sscanf(text, "RssAnon: %llu", &kib) == 1)
            break;
    if (file)
        fclose(file);
    return kib;
}

static void park(void)
{
    __atomic_store_n(&board->pause, 1, __ATOMIC_SEQ_CST);
    tend(true);
    uint64_t until = skv_now_ns() + WAIT_MS * UINT64_C(1000000);
    for (uint32_t w = 0; w < pace->workers; w++)
        while (!load32(&board->workers[w].parked) && !load32(&board->failures)) {
            rest(200);
            if (skv_now_ns() > until)
                wrong("worker %u does not come to rest, phase %u", w, board->workers[w].phase);
        }
}

static void go_on(void)
{
    __atomic_store_n(&board->pause, 0, __ATOMIC_SEQ_CST);
}

/* Pages in use less those of the users that the daemon lists: 0 when nothing else holds any. */
static int64_t pages_astray(void)
{
    struct skv_stats stats;
    struct skv_user_info infos[USERS];
    uint64_t cursor = 0;
    int64_t listed = 0;
    do {
        int count = skv_list(skv, &cursor, infos, USERS);
        for (int i = 0; i < count; i++)
            listed += (infos[i].resident + S - 1) / S + infos[i].leases * 1000;
    } while (cursor);
    if (skv_stats(skv, &stats))
        return INT64_MAX;
    return (int64_t)(stats.pool_pages - stats.pool_pages_free) - listed;
}

/* With all workers at rest: every user exactly, and no page is held by nobody. */
static void quiet(void)
{
    uint64_t until = skv_now_ns() + WAIT_MS * UINT64_C(1000000);
    int64_t astray;
    park();
    line = LEAKS;
    while ((astray = pages_astray()) != 0 && skv_now_ns() < until)
        rest(2000);
    if (astray)
        wrong("%lld pages are in use and nobody's", (long long)astray);
    look_at_all(true);
    end();
}

/* ---- daemon and keeper ---- */

static void start(void)
{
    /* Tails unstored for long in one rig, hardly ever in the other; one has a standby; and one, by
     * the seed, a protected pool. */
    bool protect = board->rig == board->seed % RIGS;
    const char *const options[] = {protect ? "--protect" : "--trust",
                                   "--pool-bytes",
                                   protect ? GUARDED : POOL,
                                   "--lease-ms",
                                   "30",
                                   "--tail-ms",
                                   board->rig ? "100" : "2",
                                   "--standby",
                                   board->rig ? "on" : "off",
                                   NULL};
    char program[512], *end_of;
    ssize_t length = readlink("/proc/self/exe", program, sizeof program - 32);
    program[length > 0 ? length : 0] = 0;
    end_of = strrchr(program, '/');
    strcpy(end_of ? end_of : program, kept ? "/bin/sidekv-keeper" : "/bin/sidekvd");
    setenv("SIDEKVD", program, 1);
    awaits_store_ns = kept ? 0 : skv_now_ns();
    rig_start(&rig, options);
    __atomic_store_n(&board->away, 0, __ATOMIC_SEQ_CST);
}

static void open_session(void)
{
    int status = SKV_ELOST;
    for (uint32_t i = 0; i < 20 && status == SKV_ELOST; i++)
        status = open_worker(&rig, 1, &skv);
    if (status) {
        wrong("the prover cannot connect: %s", skv_strerror(status));
        end();
    }
    daemon_pid = skv_server(skv)->pid;
}

static void close_session(void)
{
    page_bytes_close(&bytes);
    skv_close(skv);
}

/* Waits for the daemon after the one that died, and after one that died at a failpoint since. */
static void await_daemon(uint64_t since_ns)
{
    uint64_t until = skv_now_ns() + WAIT_MS * UINT64_C(1000000);
    while (skv_ping(skv, NULL) || skv_server(skv)->pid == daemon_pid ||
           (int32_t)skv_server(skv)->pid == plan->died) {
        tend(false);
        if (skv_lost(skv))
            skv_reconnect(skv, 1000);
        if (skv_now_ns() > until) {
            wrong("no daemon came back");
            end();
        }
    }
    daemon_pid = skv_server(skv)->pid;
    took(&tally->back, ms_since(since_ns));
    if (skv_now_ns() - since_ns > SLOW_NS)
        printf("kills: rig %u, %s: %.1f s till the daemon was back\n", board->rig, board->deed,
               (double)(skv_now_ns() - since_ns) / 1e9);
}

/* All sessions have ended with their daemon, and the next one has only the store. */
static void forget_unstored(void)
{
    uint32_t life = load32(&board->life) + 1;
    __atomic_store_n(&board->life, life, __ATOMIC_SEQ_CST);
    for (uint32_t u = 0; u < USERS; u++) {
        struct user *user = &board->users[u];
        __atomic_store_n(&user->least, pack(life, tokens_of(load64(&user->stored))),
                         __ATOMIC_SEQ_CST);
    }
}

/* The pids of a process' children, as text. Are there any? */
static bool children(pid_t parent, char *text, size_t size)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/task/%d/children", (int)parent, (int)parent);
    FILE *file = fopen(path, "re");
    if (!file || !fgets(text, (int)size, file))
        text[0] = 0;
    if (file)
        fclose(file);
    return text[0];
}

/* Ends every daemon of a keeper that is gone: the prover has inherited them. */
static void end_orphans(int signal)
{
    char text[512];
    children(getpid(), text, sizeof text);
    for (char *at = text; *at;) {
        pid_t pid = (pid_t)strtol(at, &at, 10);
        bool ours = pid <= 0;
        for (uint32_t w = 0; w < pace->workers; w++)
            ours = ours || board->workers[w].pid == pid;
        if (!ours && !kill(pid, signal))
            waitpid(pid, NULL, 0);
        at += strspn(at, " \n");
    }
}

/* Kills whoever waits beside the daemon, if somebody does. */
static void kill_standby(void)
{
    char text[512];
    children(rig.daemon, text, sizeof text);
    for (char *at = text, *end; *at; at = end + strspn(end, " \n")) {
        pid_t pid = (pid_t)strtol(at, &end, 10);
        if (end == at)
            break;
        if (pid != (pid_t)daemon_pid)
            kill(pid, SIGKILL);
    }
}

#endif
