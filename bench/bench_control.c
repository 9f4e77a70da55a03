/* The control path: what a worker waits for besides its own computing. Starts a daemon of its own
 * on the host backend, pins both sides to a core each (where there are two), spins on both, and
 * times
 *
 *   acquire+commit   one resident user, nothing appended: one command to lease its pages, one to
 *                    end the lease
 *   batch of 8       the same for 8 users in one command
 *   +offload         the first again while another session appends and the daemon stores
 *   lookup           a LOOKUP round trip over random users of which only records are known, at
 *                    --users 1,000 and 10,000,000
 *
 * usage: bench_control [--history TOKENS] [--rounds N] [--users N] [--sidekvd PATH] */
#include <errno.h>
#include <getopt.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "clock.h"
#include "sidekv.h"
#include "store.h"

static const struct skv_geometry tiny = {
    .layers = 2, .heads = 2, .head_dim = 64, .page_tokens = 32};
static const struct skv_id model = {.lo = 0x5eed, .hi = 1};
static char directory[] = "/tmp/bench_control.XXXXXX", socket_path[64], store_path[64];
static const char *program = "build/bin/sidekvd";
static uint64_t *samples;
static uint32_t rounds = 200000, history = 256;

static void die(const char *what, int status)
{
    fprintf(stderr, "bench_control: %s: %s\n", what, skv_strerror(status));
    exit(1);
}

static void pin(int core)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    if (sched_setaffinity(0, sizeof set, &set))
        fprintf(stderr, "cannot pin to core %d: %s\n", core, strerror(errno));
}

static pid_t start(const char *max_users)
{
    pid_t child = fork();
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* nothing of it stays behind */
        pin(1);
        setenv("SIDEKV_LOG", "warn", 1);
        execl(program, program, "--socket", socket_path, "--store", store_path, "--device", "host",
              "--pool-bytes", "256M", "--spin-us", "1000000", "--tail-ms", "100", "--store-bytes",
              "8G", "--max-users", max_users, NULL);
        perror(program);
        _exit(127);
    }
    return child;
}

static void stop(pid_t child)
{
    kill(child, SIGTERM);
    waitpid(child, NULL, 0);
}

static struct skv *connect_to(pid_t child)
{
    struct skv_options options = {.socket = socket_path,
                                  .geometry = tiny,
                                  .model = model,
                                  .rows = 2,
                                  .spin_us = 1000000,
                                  .no_spin_default = true};
    struct skv *skv;
    int status = SKV_ELOST;
    for (int i = 0; i < 600 && access(socket_path, F_OK); i++) {
        if (waitpid(child, NULL, WNOHANG) == child)
            die("the daemon ended at its start", SKV_ELOST);
        usleep(100000);
    }
    for (int i = 0; i < 50 && (status = skv_open(&options, &skv)) == SKV_ELOST; i++)
        usleep(100000);
    if (status)
        die("connecting", status);
    return skv;
}

static int by_value(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static double percentile(uint32_t count, double share)
{
    return (double)samples[(uint32_t)(share * (count - 1))] / 1000;
}

static void report(const char *what, uint32_t count, const char *target)
{
    qsort(samples, count, sizeof *samples, by_value);
    printf("%-34s p50 %7.2f us  p90 %7.2f  p99 %7.2f  p99.9 %8.2f   target %s\n", what,
           percentile(count, 0.5), percentile(count, 0.9), percentile(count, 0.99),
           percentile(count, 0.999), target);
    fflush(stdout);
}

static uint64_t tokens[SKV_MAX_TOKENS];

static struct skv_request request_of(uint64_t user, uint32_t length, uint64_t *hashes)
{
    struct skv_id id = skv_user_integer(user);
    if (hashes)
        skv_chain_hashes(model, id, tiny.page_tokens, tokens, length, 0, hashes);
    return (struct skv_request){.user = id,
                                .tokens = tokens,
                                .hashes = hashes,
                                .history = length,
                                .max_cached = UINT32_MAX};
}

/* Appends a user's history; no one computes anything: the pages keep what they hold. */
static void fill(struct skv *skv, uint32_t row, uint64_t user, uint32_t length)
{
    static struct skv_batch batch;
    struct skv_request request = request_of(user, length, NULL);
    int status = skv_acquire(skv, row, &request, 1, &batch);
    if (!status)
        status = skv_commit(skv, &batch, NULL);
    if (status)
        die("filling", status);
}

static void time_batches(struct skv *skv, uint32_t users, const char *what, const char *target)
{
    static struct skv_batch batch;
    static uint64_t hashes[SKV_MAX_BATCH][SKV_MAX_USER_PAGES];
    struct skv_request requests[SKV_MAX_BATCH];
    for (uint32_t i = 0; i < users; i++)
        requests[i] = request_of(1 + i, history, hashes[i]);
    for (uint32_t i = 0; i < rounds + 1000; i++) {
        uint64_t begin = skv_now_ns();
        int status = skv_acquire(skv, 0, requests, users, &batch);
        if (status || batch.grants[users - 1].cached != history)
            die("a resident user was not hit", status);
        if ((status = skv_commit(skv, &batch, NULL)))
            die("commit", status);
        if (i >= 1000)
            samples[i - 1000] = skv_now_ns() - begin;
    }
    report(what, rounds, target);
}

/* Another process that appends to new users, so that the daemon stores pages all the time. */
static pid_t start_appender(pid_t daemon)
{
    pid_t child = fork();
    if (child)
        return child;
    pin(0);
    struct skv *skv = connect_to(daemon);
    for (uint64_t user = 1000000; getppid() != 1; user++) {
        fill(skv, 0, user % 2000 + 1000000 + user / 2000 * 10000, 1024);
        usleep(500);
    }
    _exit(0);
}

static void time_lookups(struct skv *skv, uint32_t users, const char *what, const char *target)
{
    uint64_t random = 88172645463325252u;
    struct skv_user_info info;
    for (uint32_t i = 0; i < rounds + 1000; i++) {
        random ^= random << 13, random ^= random >> 7, random ^= random << 17;
        struct skv_id user = skv_user_integer(random % users);
        uint64_t begin = skv_now_ns();
        int status = skv_lookup(skv, (struct skv_id){0}, user, &info);
        if (status)
            die("lookup", status);
        if (i >= 1000)
            samples[i - 1000] = skv_now_ns() - begin;
    }
    report(what, rounds, target);
}

/* A store of `users` records and no pages, as the daemon would find it at its start. */
static void make_records(uint32_t users)
{
    struct skv_store *store;
    int status = skv_store_open(&(struct skv_store_options){.path = store_path,
                                                            .geometry = tiny,
                                                            .map_bytes = UINT64_C(8) << 30},
                                &store);
    if (status)
        die("making a store", status);
    for (uint32_t i = 0; i < users && !status; i++) {
        if (i % 100000 == 0 && i)
            fprintf(stderr, "\r%u of %u records", i, users);
        if (i % 100000 == 0 && !(status = i ? skv_store_commit(store) : 0))
            status = skv_store_begin(store);
        struct skv_record record = {.model = model,
                                    .user = skv_user_integer(i),
                                    .generation = 1,
                                    .last_use_s = i,
                                    .tokens = 32};
        uint64_t hash = record.hash_full = record.hash_tail = i;
        status = status ? status : skv_store_put_record(store, &record, &hash);
    }
    status = status ? status : skv_store_put_generation(store, 2);
    status = status ? status : skv_store_commit(store);
    if (status)
        die("writing records", status);
    fprintf(stderr, "\r                              \r");
    skv_store_close(store);
}

static void remove_directory(void)
{
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", directory);
    if (system(command))
        fprintf(stderr, "%s is left\n", directory);
}

int main(int argc, char **argv)
{
    static const struct option options[] = {{"history", 1, NULL, 'h'},
                                            {"rounds", 1, NULL, 'r'},
                                            {"users", 1, NULL, 'u'},
                                            {"sidekvd", 1, NULL, 's'},
                                            {NULL, 0, NULL, 0}};
    uint32_t users = 10000000;
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        uint32_t value = c != '?' && c != 's' ? (uint32_t)strtoul(optarg, NULL, 10) : 1;
        if (c == '?' || !value) {
            fprintf(stderr, "usage: bench_control [--history TOKENS] [--rounds N] [--users N] "
                            "[--sidekvd PATH]\n");
            return 2;
        }
        *(c == 'h' ? &history : c == 'r' ? &rounds : &users) = c == 's' ? users : value;
        program = c == 's' ? optarg : program;
    }
    samples = malloc((rounds + 1) * sizeof *samples);
    if (!mkdtemp(directory) || !samples)
        die("a temporary directory", SKV_EIO);
    atexit(remove_directory);
    snprintf(socket_path, sizeof socket_path, "%s/socket", directory);
    snprintf(store_path, sizeof store_path, "%s/store", directory);
    for (uint32_t i = 0; i < SKV_MAX_TOKENS; i++)
        tokens[i] = i * 2654435761u;
    printf(
        "bench_control: %ld cores, %u tokens a user (%u pages), %u rounds, both sides spinning\n",
        sysconf(_SC_NPROCESSORS_ONLN), history, (history + 31) / 32, rounds);
    pin(0);

    pid_t daemon = start("16777216");
    struct skv *skv = connect_to(daemon);
    for (uint64_t user = 1; user <= 8; user++)
        fill(skv, 1, user, history);
    skv_flush(skv);
    time_batches(skv, 1, "acquire+commit, 1 resident user", "p50 <= 3, p99 <= 15");
    time_batches(skv, 8, "acquire+commit, batch of 8", "p50 <= 6");
    pid_t appender = start_appender(daemon);
    usleep(300000);
    rounds /= 10;
    time_batches(skv, 1, "acquire+commit, 1 user, +offload", "(information)");
    rounds *= 10;
    kill(appender, SIGKILL);
    waitpid(appender, NULL, 0);
    skv_close(skv);
    stop(daemon);

    const uint32_t counts[2] = {1000, users};
    double p50[2];
    for (int i = 0; i < 2; i++) {
        remove_directory();
        if (mkdir(directory, 0700))
            die("a temporary directory", SKV_EIO);
        make_records(counts[i]);
        daemon = start("16777216");
        skv = connect_to(daemon);
        char what[64];
        snprintf(what, sizeof what, "lookup, %u users", counts[i]);
        time_lookups(skv, counts[i], what, i ? "p50 <= 1.5 x the line above" : "-");
        p50[i] = percentile(rounds, 0.5);
        skv_close(skv);
        stop(daemon);
    }
    printf("lookup at %u users: %.2f x that at %u\n", counts[1], p50[1] / p50[0], counts[0]);
    return 0;
}
