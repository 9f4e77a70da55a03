/* Promises 1 to 3: daemon, workers and keeper are killed at random instants and at every failpoint
 * (common/failpoint.h) under a load that knows every byte (kills_load.h), and what the ledger says
 * is there afterwards, no less, and no more.
 *
 * Two rigs side by side, each a process: a keeper, a daemon with a pool for half the users, four
 * workers. Full counts, over both: 5,000 workers killed and 500 stopped beyond --lease-ms, 1,000
 * daemons, 200 keepers. A rig goes through four acts: workers die, under one daemon whose fds and
 * memory are as before at the end; daemons die under the keeper; keepers die, and the next one
 * starts from the store; daemons without a keeper die. In one rig of the two a standby waits beside
 * the daemon, and is killed with it or just before, one time in four; in one, the other with the
 * next seed, the pool is protected.
 *
 * On a GPU (--device cuda, or PROVE_DEVICE=cuda) every process makes a context first, and kills are
 * fewer, at least 200 of each kind: three workers a rig, and all users are compared after each
 * death of a worker too. In parts of some minutes each, of the plain build:
 *
 *     build/tests/prove_kills --device cuda --seconds 500 --only workers --only keeper --only alone
 *     build/tests/prove_kills --device cuda --seconds 500 --only daemon
 *     build/tests/prove_kills --mps
 *
 * --mps starts an MPS control daemon of its own and kills 20 workers under it. What it did to the
 * others is reported; it counts for nothing, since nothing is promised there.
 * SIDEKV_TEST_COPY=1 goes the GPU's way, counts and all, on the host backend (page_bytes.h). */
#include <getopt.h>

#include "gpu.h"
#include "kills_deaths.h"
#include "kills_mps.h"

#define EVERY_POINT 0.1 /* from this scale on, each point must have killed */
#define GROWTH_KIB                                                                                 \
    65536u /* of heap kept for the next transaction: a leak would be of each death                 \
            */

enum act { WORKERS_DIE, DAEMONS_DIE, KEEPERS_DIE, ALONE, ACTS, MPS = ACTS };

static struct {
    const char *device;
    uint32_t acts;     /* a bit each */
    uint64_t until_ns; /* no more deaths then; 0: no end */
} options = {.device = "host"};

/* ---- acts ---- */

static uint32_t full(enum line what)
{
    return pace == &gpu_pace ? lines[what].gpu : lines[what].host;
}

static bool over(void)
{
    return options.until_ns && skv_now_ns() > options.until_ns;
}

/* How much of a count is left to this rig. */
static uint64_t left_of(enum line what, uint32_t count)
{
    uint64_t all = prove_times(count), mine = all / RIGS + (board->rig < all % RIGS);
    return mine > tally->done[what] && !over() ? mine - tally->done[what] : 0;
}

static uint64_t left(enum line what)
{
    return left_of(what, full(what));
}

/* Workers die, the daemon lives on and is no larger at the end. */
static void act_workers(void)
{
    rest(300000);
    quiet();
    uint32_t files = open_files((pid_t)daemon_pid), keeper_files = open_files(rig.daemon);
    uint64_t kib = private_kib((pid_t)daemon_pid), kills = 0;
    go_on();
    while (left(WORKER_RANDOM) + left(WORKER_STOPPED)) {
        rest(chance(4000));
        if (chance(10) < 9 && left(WORKER_RANDOM))
            kill_worker(WORKER_RANDOM);
        else if (left(WORKER_STOPPED))
            stop_worker(LEASE_MS + 5 + chance(60));
        if (++kills % pace->look_every == 0)
            look_at_all(false);
        if (kills % 400 == 0) {
            quiet();
            go_on();
        }
    }
    quiet();
    uint64_t now_kib = private_kib((pid_t)daemon_pid);
    printf("kills: rig %u: the daemon has %llu KiB of its own, had %llu\n", board->rig,
           (unsigned long long)now_kib, (unsigned long long)kib);
    if (open_files((pid_t)daemon_pid) > files + pace->files ||
        open_files(rig.daemon) != keeper_files)
        wrong("%u files are open in the daemon, were %u; %u in the keeper, were %u",
              open_files((pid_t)daemon_pid), files, open_files(rig.daemon), keeper_files);
    if (now_kib > kib + GROWTH_KIB)
        wrong("the daemon has grown by more than %u KiB", GROWTH_KIB);
    end();
    go_on();
}

/* Daemons die under the keeper, and whoever comes to a failpoint; workers are killed and stopped
 * meanwhile. */
static void act_daemons(void)
{
    uint32_t point = board->rig * SKV_FAILPOINTS / RIGS, missed = 0, kills = 0;
    while (left(DAEMON_RANDOM) + left(DAEMON_POINT) + left(WORKER_POINT)) {
        if (!chance(3))
            kill_worker(WORKER_RANDOM);
        point = (point + 1) % SKV_FAILPOINTS;
        uint64_t wanted = is_clients(point)   ? left(WORKER_POINT)
                          : is_keepers(point) ? left_of(KEEPER, full(KEEPER) / 2)
                                              : left(DAEMON_POINT);
        if (wanted && !strike_any(point))
            missed++;
        if (is_clients(point)) /* eight of them are to share five hundred */
            for (uint32_t i = 0; i < 6 && left(WORKER_POINT); i++)
                strike_any(FAIL_client_unsubmitted +
                           chance(SKV_FAILPOINTS - FAIL_client_unsubmitted));
        if (!chance(2)) /* it goes on when the next daemon has given pages to others */
            stop_worker(LEASE_MS + 70 + chance(200));
        if (left(DAEMON_RANDOM))
            kill_daemon(DAEMON_RANDOM);
        if (++kills % 20 == 0) {
            quiet();
            go_on();
        }
    }
    for (uint32_t tries = 0; tries < 20 && !over(); tries++) /* those that nobody has died at yet */
        for (uint32_t p = board->rig; p < SKV_FAILPOINTS && !board->failures; p += RIGS)
            if (!over() && !tallies[0].died[p] && !tallies[1].died[p] &&
                prove_scale() >= EVERY_POINT)
                strike_any(p);
    quiet();
    go_on();
    printf("kills: rig %u: %u times a point was not come to in time\n", board->rig, missed);
}

static void act_keepers(void)
{
    for (uint32_t kills = 0; left(KEEPER); kills++) {
        kill_keeper();
        if (kills % 10 == 9) {
            quiet();
            go_on();
        }
    }
}

static void act_alone(void)
{
    __atomic_store_n(&board->away, 1, __ATOMIC_SEQ_CST);
    kill(rig.daemon, SIGKILL);
    waitpid(rig.daemon, NULL, 0);
    end_orphans(SIGKILL);
    forget_unstored();
    kept = false;
    start();
    close_session();
    open_session();
    for (uint32_t kills = 0; left(DAEMON_ALONE); kills++) {
        kill_daemon(DAEMON_ALONE);
        if (kills % 20 == 19) {
            quiet();
            go_on();
        }
    }
    quiet();
}

/* As long as nobody but the killed is harmed. */
static void act_mps(void)
{
    tally->mps = skv_server(skv)->mps;
    while (tally->done[UNDER_MPS] < MPS_KILLS) {
        rest(chance(20000));
        kill_worker(UNDER_MPS);
        look_at_all(false);
    }
    quiet();
}

/* What was freed is kept for a while under ASan: 4 MiB of it, not 256, which looks like a leak. */
static void keep_little(void)
{
    const char *given = getenv("ASAN_OPTIONS");
    char text[512];
    snprintf(text, sizeof text, "%s:quarantine_size_mb=4", given ? given : "");
    setenv("ASAN_OPTIONS", text, 1);
}

static void open_board(uint32_t which)
{
    char path[128];
    board_fd = memfd_create("sidekv-board", MFD_CLOEXEC);
    snprintf(path, sizeof path, "%s/points", rig.directory);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (board_fd < 0 || ftruncate(board_fd, sizeof *board) || fd < 0 || ftruncate(fd, sizeof *plan))
        abort();
    close(fd);
    board = map_board(board_fd);
    plan = map_plan(path);
    setenv(FAILPOINTS_FILE, path, 1);
    memcpy(board->socket, rig.socket, sizeof board->socket);
    board->rig = which;
    board->seed = prove_seed();
    random_state = board->seed * 1000 + which;
}

static void play(uint32_t which)
{
    static void (*const acts[])(void) = {act_workers, act_daemons, act_keepers, act_alone, act_mps};
    struct skv_device *device; /* held, so that sessions come and go in one context */
    char path[128];
    tally = &tallies[which];
    rig_init(&rig);
    rig.device = options.device;
    rig_child = shut_files;
    memcpy(tally->directory, rig.directory, sizeof tally->directory);
    open_board(which);
    setenv("SIDEKV_TEST_NO_PAUSE", "1", 1);
    keep_little();
    snprintf(hold, sizeof hold, "%s/hold", rig.directory);
    setenv("SIDEKV_TEST_CHECK", hold, 1);
    snprintf(path, sizeof path, "%s/log", rig.directory);
    if (!freopen(path, "a", stderr))
        abort();
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    line = options.acts >> MPS & 1 ? UNDER_MPS : WORKER_RANDOM;
    int status = skv_device_open(options.device, &device);
    if (status) {
        wrong("device %s: %s", options.device, skv_strerror(status));
        end();
    }
    kept = true;
    start();
    open_session();
    printf("kills: rig %u: a %s pool\n", which, skv_server(skv)->protect ? "protected" : "trusted");
    for (uint32_t w = 0; w < pace->workers; w++)
        spawn(w);
    for (uint32_t act = 0; act < sizeof acts / sizeof *acts; act++) {
        uint64_t begun = skv_now_ns();
        if (!(options.acts >> act & 1))
            continue;
        acts[act]();
        printf("kills: rig %u: act %u took %.1f s\n", which, act + 1, ms_since(begun) / 1e3);
        fflush(stdout);
    }
    for (uint32_t w = 0; w < pace->workers; w++)
        kill(board->workers[w].pid, SIGKILL);
    close_session();
    skv_device_close(device);
    memcpy(tally->reached, plan->reached, sizeof tally->reached);
    tally->load = *board;
    rig_fini(&rig);
    end_orphans(SIGKILL);
    _exit(0);
}

/* ---- the report ---- */

static int compare(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return x < y ? -1 : x > y;
}

static void print_times(const char *what, size_t offset)
{
    static float all[RIGS * TIMES];
    uint32_t count = 0;
    for (uint32_t r = 0; r < RIGS; r++) {
        const struct times *times = (const void *)((const char *)&tallies[r] + offset);
        memcpy(all + count, times->ms, times->count * sizeof *all);
        count += times->count;
    }
    qsort(all, count, sizeof *all, compare);
    if (count)
        printf("kills: %s: %u times, p50 %.2f ms, p99 %.2f ms, most %.2f ms\n", what, count,
               all[count / 2], all[count * 99 / 100], all[count - 1]);
}

/* The acts whose lines these are. */
static const uint32_t proved_by[LINES] = {
    [WORKER_RANDOM] = 1u << WORKERS_DIE, [WORKER_STOPPED] = 1u << WORKERS_DIE,
    [LEAKS] = (1u << ACTS) - 1,          [WORKER_POINT] = 1u << DAEMONS_DIE,
    [DAEMON_RANDOM] = 1u << DAEMONS_DIE, [DAEMON_POINT] = 1u << DAEMONS_DIE,
    [DAEMON_EARLY] = 1u << DAEMONS_DIE,  [KEEPER] = 1u << KEEPERS_DIE,
    [DAEMON_ALONE] = 1u << ALONE,
};

static void report(const bool *finished)
{
    bool all_points = options.acts >> DAEMONS_DIE & 1 && prove_scale() >= EVERY_POINT && !over();
    uint64_t died[SKV_FAILPOINTS] = {0}, missing[LINES] = {0};
    for (uint32_t r = 0; r < RIGS; r++) {
        const struct board *b = &tallies[r].load;
        printf(
            "kills: rig %u: %llu batches, %llu tokens compared, %llu gated, %llu appends, %llu "
            "cuts, %llu flushes, %llu evictions, %llu stale, %llu loads failed, %llu short hits, "
            "%llu users short of dropped tokens; the prover compared %llu users, %llu times a "
            "worker had one\n",
            r, (unsigned long long)b->batches, (unsigned long long)b->tokens,
            (unsigned long long)b->gated, (unsigned long long)b->appends,
            (unsigned long long)b->cuts, (unsigned long long)b->flushes,
            (unsigned long long)b->evictions, (unsigned long long)b->stale,
            (unsigned long long)b->loads_failed, (unsigned long long)tallies[r].short_hits,
            (unsigned long long)b->dropped, (unsigned long long)tallies[r].looks,
            (unsigned long long)tallies[r].locked);
        for (uint32_t p = 0; p < SKV_FAILPOINTS; p++)
            died[p] += tallies[r].died[p];
    }
    print_times("from a worker's kill to the fence, its teardown included",
                offsetof(struct tally, fence));
    printf(
        "kills: %llu not seen fenced within 50 ms: the COMMIT was done, or the machine is slow\n",
        (unsigned long long)(tallies[0].unfenced + tallies[1].unfenced));
    print_times("the daemon answers again after its death", offsetof(struct tally, back));
    print_times("from a daemon's death under its keeper to the first pool hit, compared",
                offsetof(struct tally, hit));
    print_times("from exec of a daemon to the first store hit, compared",
                offsetof(struct tally, store_hit));
    printf("kills: deaths at failpoints:");
    for (uint32_t p = 0; p < SKV_FAILPOINTS; p++) {
        printf(" %s %llu", names[p], (unsigned long long)died[p]);
        missing[is_keepers(p) ? KEEPER : is_clients(p) ? WORKER_POINT : DAEMON_POINT] += !died[p];
    }
    printf("\n");
    for (enum line l = 0; l < LINES; l++) {
        uint64_t done = 0, failures = all_points ? missing[l] : 0;
        for (uint32_t r = 0; r < RIGS; r++) {
            done += tallies[r].done[l];
            failures += tallies[r].failed[l] + (!finished[r] && !tallies[r].load.failures);
        }
        if (done || proved_by[l] & options.acts)
            prove_line(lines[l].promise, lines[l].what, done, failures);
    }
}

/* Rig after rig: one that is harmed ends, one that hangs is ended. */
static int prove_mps(void)
{
    uint64_t harmed = 0, hung = 0, until = skv_now_ns() + MPS_ALL_MS * UINT64_C(1000000);
    struct tally *t = &tallies[0];
    if (mps_start()) {
        mps_stop();
        printf("kills: SKIPPED --mps: nvidia-cuda-mps-control does not start here\n");
        return 0;
    }
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    while (t->done[UNDER_MPS] < MPS_KILLS && harmed < MPS_KILLS && skv_now_ns() < until) {
        int status = 0;
        pid_t pid = fork();
        if (pid == 0)
            play(0);
        bool ended = mps_await(pid, MPS_RIG_MS, &status);
        hung += !ended;
        harmed += !ended || !WIFEXITED(status) || WEXITSTATUS(status);
        mps_end_all();
        mps_remove(t->directory);
    }
    mps_stop();
    printf("kills: MPS: %llu workers killed, the daemon %s under MPS; %llu times others were "
           "harmed (lines above), of these %llu hung\n",
           (unsigned long long)t->done[UNDER_MPS], t->mps ? "was" : "was NOT",
           (unsigned long long)harmed, (unsigned long long)hung);
    print_times("from a worker's kill to the fence, its teardown included",
                offsetof(struct tally, fence));
    prove_line(lines[UNDER_MPS].promise, lines[UNDER_MPS].what, t->done[UNDER_MPS], !t->mps);
    return prove_end();
}

static int prove_rigs(void)
{
    pid_t pids[RIGS];
    bool finished[RIGS];
    for (uint32_t r = 0; r < RIGS; r++)
        if ((pids[r] = fork()) == 0)
            play(r);
    for (uint32_t r = 0; r < RIGS; r++) {
        int status;
        finished[r] = waitpid(pids[r], &status, 0) == pids[r] && WIFEXITED(status) && !status;
    }
    report(finished);
    return prove_end();
}

static int usage(void)
{
    fprintf(stderr, "usage: prove_kills [--device host|cuda|cuda:N] [--only "
                    "workers|daemon|keeper|alone]... [--seconds N] [--mps]\n");
    return 2;
}

static bool read_options(int argc, char **argv)
{
    static const struct option names_of[] = {{"device", 1, NULL, 'd'},
                                             {"only", 1, NULL, 'o'},
                                             {"seconds", 1, NULL, 's'},
                                             {"mps", 0, NULL, 'm'},
                                             {NULL, 0, NULL, 0}};
    static const char *const act_names[ACTS] = {"workers", "daemon", "keeper", "alone"};
    if (getenv("PROVE_DEVICE"))
        options.device = getenv("PROVE_DEVICE");
    for (int option; (option = getopt_long(argc, argv, "", names_of, NULL)) != -1;) {
        uint32_t before = options.acts;
        if (option == 'd')
            options.device = optarg;
        else if (option == 's')
            options.until_ns = skv_now_ns() + strtoull(optarg, NULL, 10) * UINT64_C(1000000000);
        else if (option == 'm')
            options.acts = 1u << MPS;
        else if (option != 'o')
            return false;
        for (uint32_t act = 0; option == 'o' && act < ACTS; act++)
            if (strcmp(optarg, act_names[act]) == 0)
                options.acts |= 1u << act;
        if (option == 'o' && options.acts == before)
            return false;
    }
    if (!options.acts)
        options.acts = (1u << ACTS) - 1;
    if (options.acts >> MPS & 1 && strncmp(options.device, "cuda", 4))
        options.device = "cuda";
    return optind == argc;
}

int main(int argc, char **argv)
{
    if (argc == 5 && strcmp(argv[1], WORKER_ARGUMENT) == 0)
        be_worker(argv + 2);
    if (!read_options(argc, argv))
        return usage();
    bool cuda = strncmp(options.device, "cuda", 4) == 0;
    if (cuda && !has_gpu()) {
        printf("kills: SKIPPED --device %s: no GPU on this machine\n", options.device);
        return 0;
    }
    if (cuda || getenv("SIDEKV_TEST_COPY"))
        pace = &gpu_pace;
    tallies = mmap(NULL, RIGS * sizeof *tallies, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
                   -1, 0);
    if (tallies == MAP_FAILED)
        return 1;
    printf("kills: device %s, scale %g, seed %llu\n", options.device, prove_scale(),
           (unsigned long long)prove_seed());
    fflush(stdout);
    return options.acts >> MPS & 1 ? prove_mps() : prove_rigs();
}
