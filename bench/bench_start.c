/* How long a start takes with a full store: from exec of sidekvd to the first store hit that a
 * client could compute on (acquired, its gates open). On a GPU the daemon's context is part of it,
 * the client's is not: that has one before. Builds a store of
 * --users users with --pages pages each (4 KiB, so that what counts is how many there are), then
 * starts a daemon on it --runs times with the file in the page cache, and as often after it was
 * dropped from there. The parts are the daemon's own words: the check by the child process, the
 * scan of the users. Every start also meets a killed daemon's store, since the one before was.
 *
 * usage: bench_start [--device NAME] [--users N] [--pages N] [--runs N] [--directory DIR]
 * [--sidekvd PATH]   NAME: host (default), cuda or cuda:N */
#include <fcntl.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

#include "clock.h"
#include "device.h"
#include "hash.h"
#include "store.h"

#define BOUND_MS 1000.0 /* issue 4, promise 2: with 100,000 users */

static const struct skv_geometry geometry = {
    .layers = 1, .heads = 1, .head_dim = 64, .page_tokens = 16};
static const struct skv_id model = {.lo = 0x5eed};
static char directory[200], socket_path[256], store_path[256];
static const char *program = "build/bin/sidekvd", *base = "/tmp", *device = "host";
static uint32_t users = 100000, pages = 3, runs = 5;
static uint64_t map_bytes;

static void remove_directory(void)
{
    char command[300];
    snprintf(command, sizeof command, "rm -rf '%s'", directory);
    if (system(command))
        fprintf(stderr, "%s is left\n", directory);
}

static void must(int status, const char *what)
{
    if (status == 0)
        return;
    fprintf(stderr, "bench_start: %s: %s\n", what, skv_strerror(status));
    exit(1);
}

/* User i's history: what it holds does not matter, only that its hashes are right. */
static uint32_t history(uint32_t user, uint64_t *tokens)
{
    uint32_t count = pages * geometry.page_tokens;
    for (uint32_t i = 0; i < count; i++)
        tokens[i] = user * UINT64_C(1000003) + i + 1;
    return count;
}

static void put_user(struct skv_store *store, uint32_t user)
{
    static uint64_t tokens[SKV_MAX_TOKENS], hashes[SKV_MAX_USER_PAGES], page[4096 / 8 + 8];
    struct skv_record record = {.model = model,
                                .user = skv_user_integer(user),
                                .generation = 1,
                                .last_use_s = user,
                                .tokens = history(user, tokens)};
    skv_chain_hashes(model, record.user, geometry.page_tokens, tokens, record.tokens, 0, hashes);
    record.hash_full = record.hash_tail = hashes[pages - 1];
    for (uint32_t index = 0; index < pages; index++)
        must(
            skv_store_put_page(store, &record, index, geometry.page_tokens, 1, hashes[index], page),
            "putting a page");
    must(skv_store_put_record(store, &record, hashes), "putting a record");
}

/* In an order that leaves the trees as random inserts do. */
static void make_store(void)
{
    struct skv_store *store;
    must(skv_store_open(&(struct skv_store_options){.path = store_path,
                                                    .geometry = geometry,
                                                    .map_bytes = map_bytes},
                        &store),
         "making a store");
    for (uint32_t done = 0; done < users;) {
        must(skv_store_begin(store), "begin");
        for (uint32_t i = 0; i < 256 && done < users; i++, done++)
            put_user(store, (uint32_t)(done * UINT64_C(2654435761) % users));
        must(skv_store_commit(store), "commit");
        if (done % 25600 == 0)
            fprintf(stderr, "\r%u of %u users stored", done, users);
    }
    fprintf(stderr, "\r                                  \r");
    skv_store_close(store);
}

struct start {
    double check_ms, scan_ms, listen_ms, hit_ms;
};

/* The daemon's log, line by line, until it listens. */
static void read_parts(int fd, uint64_t began_ns, struct start *start)
{
    FILE *log = fdopen(fd, "r");
    char line[512];
    const char *at;
    while (log && fgets(line, sizeof line, log)) {
        if ((at = strstr(line, "checked in ")))
            start->check_ms = strtod(at + strlen("checked in "), NULL);
        if ((at = strstr(line, "read in ")))
            start->scan_ms = strtod(at + strlen("read in "), NULL);
        if (strstr(line, " pages of ")) {
            start->listen_ms = (double)(skv_now_ns() - began_ns) / 1e6;
            break;
        }
    }
    if (start->listen_ms == 0)
        must(SKV_ELOST, "the daemon did not start");
    /* not closed: the daemon may go on talking */
}

static pid_t exec_daemon(int log)
{
    pid_t child = fork();
    if (child)
        return child;
    char map[32];
    snprintf(map, sizeof map, "%llu", (unsigned long long)map_bytes);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    setenv("SIDEKV_LOG", "info", 1);
    dup2(log, STDERR_FILENO);
    execl(program, program, "--socket", socket_path, "--store", store_path, "--device", device,
          "--layers", "1", "--heads", "1", "--head-dim", "64", "--page-tokens", "16",
          "--pool-bytes", "64M", "--store-bytes", map, NULL);
    perror(program);
    _exit(127);
}

static struct start time_start(uint32_t user)
{
    static uint64_t tokens[SKV_MAX_TOKENS];
    struct start start = {0};
    struct skv *skv;
    struct skv_batch batch;
    int ends[2];
    if (pipe(ends))
        must(SKV_EIO, "pipe");
    struct skv_request request = {.user = skv_user_integer(user),
                                  .tokens = tokens,
                                  .history = history(user, tokens),
                                  .max_cached = UINT32_MAX,
                                  .flags = SKV_REQUEST_READ};
    uint64_t began_ns = skv_now_ns();
    pid_t daemon = exec_daemon(ends[1]);
    close(ends[1]);
    read_parts(ends[0], began_ns, &start);
    must(skv_open(
             &(struct skv_options){
                 .socket = socket_path, .geometry = geometry, .model = model, .timeout_ms = 60000},
             &skv),
         "connecting");
    must(skv_acquire(skv, 0, &request, 1, &batch), "acquire");
    while (!__atomic_load_n(skv_gate_row(skv, 0), __ATOMIC_ACQUIRE))
        skv_relax();
    start.hit_ms = (double)(skv_now_ns() - began_ns) / 1e6;
    must(skv_batch_status(skv, &batch), "onboard");
    if (batch.grants[0].cached != request.history)
        must(SKV_ENOENT, "the user is not in the store");
    must(skv_release(skv, &batch), "release");
    kill(daemon, SIGKILL);
    waitpid(daemon, NULL, 0);
    skv_close(skv);
    return start;
}

static int by_hit(const void *left, const void *right)
{
    const struct start *a = left, *b = right;
    return a->hit_ms < b->hit_ms ? -1 : a->hit_ms > b->hit_ms;
}

/* Clean pages of the file leave the page cache. */
static void drop_cache(void)
{
    char path[300];
    snprintf(path, sizeof path, "%s/data.mdb", store_path);
    int fd = open(path, O_RDWR);
    if (fd < 0 || fsync(fd) || posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED))
        fprintf(stderr, "%s stays in the page cache\n", path);
    if (fd >= 0)
        close(fd);
}

static void report(const char *what, bool cold)
{
    struct start starts[100];
    for (uint32_t i = 0; i < runs; i++) {
        if (cold)
            drop_cache();
        starts[i] = time_start((uint32_t)(i * UINT64_C(40503) % users));
    }
    qsort(starts, runs, sizeof *starts, by_hit);
    const struct start *median = &starts[runs / 2], *most = &starts[runs - 1];
    printf("%-22s %8.0f %8.0f %8.0f %10.0f %10.0f %10.0f\n", what, median->check_ms,
           median->scan_ms, median->listen_ms, median->hit_ms, most->hit_ms, BOUND_MS);
}

int main(int argc, char **argv)
{
    static const struct option options[] = {{"users", 1, NULL, 'u'},
                                            {"pages", 1, NULL, 'p'},
                                            {"runs", 1, NULL, 'r'},
                                            {"directory", 1, NULL, 'd'},
                                            {"sidekvd", 1, NULL, 's'},
                                            {"device", 1, NULL, 'D'},
                                            {0}};
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        if (option == 'u')
            users = (uint32_t)strtoul(optarg, NULL, 10);
        else if (option == 'p')
            pages = (uint32_t)strtoul(optarg, NULL, 10);
        else if (option == 'r')
            runs = (uint32_t)strtoul(optarg, NULL, 10);
        else if (option == 'd')
            base = optarg;
        else if (option == 's')
            program = optarg;
        else if (option == 'D')
            device = optarg;
        else
            return 2;
    }
    if (!users || !pages || pages > SKV_MAX_USER_PAGES || !runs || runs > 100) {
        fprintf(stderr, "bench_start: users, pages and up to 100 runs\n");
        return 2;
    }
    struct utsname machine;
    struct skv_device *own; /* as a worker that waits for the next daemon has it */
    uname(&machine);
    must(skv_device_open(device, &own), device);
    map_bytes = users * (uint64_t)pages * 8192 * 5 / 4 + (UINT64_C(256) << 20);
    snprintf(directory, sizeof directory, "%s/bench_start.XXXXXX", base);
    if (!mkdtemp(directory))
        must(SKV_EIO, directory);
    atexit(remove_directory);
    snprintf(socket_path, sizeof socket_path, "%s/socket", directory);
    snprintf(store_path, sizeof store_path, "%s/store", directory);
    uint64_t began_ns = skv_now_ns();
    make_store();
    printf("bench_start: device %s, %s %s, %ld cores; %u users of %u pages, stored in %.1f s; %u "
           "starts each, "
           "ms, each after a kill -9\n",
           skv_device_info(own)->name, machine.sysname, machine.release,
           sysconf(_SC_NPROCESSORS_ONLN), users, pages, (double)(skv_now_ns() - began_ns) / 1e9,
           runs);
    printf("%-22s %8s %8s %8s %10s %10s %10s\n", "", "check", "scan", "listens", "first hit",
           "most", "bound");
    report("in the page cache", false);
    report("dropped from it", true);
    skv_device_close(own);
    return 0;
}
