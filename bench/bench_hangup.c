/* How long after a worker's hang-up its leases are fenced: what "within 10 ms of the hang-up"
 * means, without the teardown of a killed process before it. Starts a daemon of its own on the host
 * backend, with its defaults; each round is a process with two sessions: one with a batch open,
 * which shuts its socket down at a known time, and one that looks. Until the daemon ends the first
 * one's socket, nothing disturbs it; then the other one asks STATS for the fence.
 *
 * seen    till the daemon's end of the socket, in the turn that fences
 * fenced  till a STATS says so, its round trip included: at most this
 *
 * Once with nobody else there, once while another process appends and the daemon stores.
 *
 * usage: bench_hangup [--rounds N] [--sidekvd PATH] */
#include <getopt.h>

#include "clock.h"
#include "daemon_watch.h"
#include "raw_client.h"

#define TOKENS 1024u /* that the appender adds at a time */
#define USERS  64u   /* of the appender */

static const struct skv_geometry tiny = {
    .layers = 2, .heads = 2, .head_dim = 64, .page_tokens = 32};
static const struct skv_id model = {.lo = 77}; /* raw_hello()'s */
static const char *const daemon_options[] = {"--pool-bytes", "256M", "--tail-ms", "100", NULL};
static struct rig rig;

static void die(const char *what, int status)
{
    fprintf(stderr, "bench_hangup: %s: %s\n", what, skv_strerror(status));
    rig_fini(&rig);
    exit(1);
}

static int connect_to(struct skv **skv)
{
    return rig_connect(&rig, (struct skv_options){.geometry = tiny, .model = model}, skv);
}

/* One hang-up, ns; in a process of its own, with which the fenced session ends. */
struct sample {
    uint64_t seen, fenced;
};

static bool hang_up(uint64_t user, struct sample *sample)
{
    struct raw raw;
    struct skv *other;
    struct skv_stats before, after;
    struct wire_cqe cqe;
    char byte;
    if (connect_to(&other) || !raw_open(&raw, &rig, &tiny))
        return false;
    raw.slots[0].requests[0] =
        (struct wire_request){.user = {user}, .history = 64, .max_cached = UINT32_MAX};
    raw_submit(&raw, &(struct wire_sqe){.opcode = WIRE_ACQUIRE, .count = 1});
    if (!raw_completion(&raw, &cqe) || skv_stats(other, &before))
        return false;
    usleep(2000); /* the daemon goes to sleep, if it can */
    uint64_t begin = skv_now_ns();
    shutdown(raw.socket, SHUT_WR);
    while (recv(raw.socket, &byte, sizeof byte, MSG_DONTWAIT) != 0)
        ;
    sample->seen = skv_now_ns() - begin;
    do
        if (skv_stats(other, &after))
            return false;
    while (after.fenced_leases == before.fenced_leases);
    sample->fenced = skv_now_ns() - begin;
    return true;
}

static int by_seen(const void *a, const void *b)
{
    const struct sample *x = a, *y = b;
    return x->seen < y->seen ? -1 : x->seen > y->seen;
}

static int by_fenced(const void *a, const void *b)
{
    const struct sample *x = a, *y = b;
    return x->fenced < y->fenced ? -1 : x->fenced > y->fenced;
}

static void report(const char *load, uint32_t rounds, struct sample *samples)
{
    const struct sample *p50 = samples + rounds / 2, *p99 = samples + (uint64_t)rounds * 99 / 100,
                        *most = samples + rounds - 1;
    qsort(samples, rounds, sizeof *samples, by_seen);
    printf("%-24s seen   p50 %8.3f ms  p99 %8.3f  most %8.3f\n", load, (double)p50->seen / 1e6,
           (double)p99->seen / 1e6, (double)most->seen / 1e6);
    qsort(samples, rounds, sizeof *samples, by_fenced);
    uint32_t late = 0;
    for (uint32_t i = 0; i < rounds; i++)
        late += samples[i].fenced > 10000000;
    printf("%-24s fenced p50 %8.3f ms  p99 %8.3f  most %8.3f   %u of %u after 10 ms\n", load,
           (double)p50->fenced / 1e6, (double)p99->fenced / 1e6, (double)most->fenced / 1e6, late,
           rounds);
    fflush(stdout);
}

static void measure(const char *load, uint32_t rounds, struct sample *samples)
{
    for (uint32_t i = 0; i < rounds; i++) {
        int status;
        pid_t pid = fork();
        if (pid == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            _exit(!hang_up(i % 100 + 1, &samples[i]));
        }
        if (waitpid(pid, &status, 0) != pid || status)
            die("a hang-up", SKV_ELOST);
    }
    report(load, rounds, samples);
}

/* Another process, whose users get a new history each time; nobody computes anything. */
static pid_t start_appender(void)
{
    static uint64_t tokens[TOKENS];
    pid_t pid = fork();
    if (pid)
        return pid;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    struct skv *skv;
    int status = connect_to(&skv);
    for (uint64_t n = 0; !status; n++) {
        static struct skv_batch batch;
        for (uint32_t i = 0; i < TOKENS; i++)
            tokens[i] = n * TOKENS + i;
        struct skv_request request = {.user = skv_user_integer(1000 + n % USERS),
                                      .tokens = tokens,
                                      .history = TOKENS,
                                      .max_cached = UINT32_MAX};
        status = skv_acquire(skv, 0, &request, 1, &batch);
        if (!status)
            status = skv_commit(skv, &batch, NULL);
    }
    fprintf(stderr, "bench_hangup: appending: %s\n", skv_strerror(status));
    _exit(1);
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        {"rounds", 1, NULL, 'r'}, {"sidekvd", 1, NULL, 's'}, {NULL, 0, NULL, 0}};
    uint32_t rounds = 2000;
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        if (c == 'r')
            rounds = (uint32_t)strtoul(optarg, NULL, 10);
        if (c == 's')
            setenv("SIDEKVD", optarg, 1);
        if (c == '?' || !rounds) {
            fprintf(stderr, "usage: bench_hangup [--rounds N] [--sidekvd PATH]\n");
            return 2;
        }
    }
    struct sample *samples = mmap(NULL, rounds * sizeof *samples, PROT_READ | PROT_WRITE,
                                  MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (samples == MAP_FAILED)
        die("samples", SKV_ENOMEM);
    printf("bench_hangup: %ld cores, %u hang-ups each with a batch open; target: 10 ms\n",
           sysconf(_SC_NPROCESSORS_ONLN), rounds);
    fflush(stdout);
    rig_init(&rig);
    rig_start(&rig, daemon_options);
    watch_start(&rig);
    measure("nobody else", rounds, samples);
    pid_t appender = start_appender();
    usleep(300000);
    measure("another one appends", rounds, samples);
    int status;
    if (waitpid(appender, &status, WNOHANG) != 0)
        die("the appender ended", SKV_ELOST);
    kill(appender, SIGKILL);
    waitpid(appender, NULL, 0);
    rig_stop(&rig, SIGKILL);
    rig_fini(&rig);
    return 0;
}
