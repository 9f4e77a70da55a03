/* One cache, several workers, layers and copies at once. Starts a daemon of its own, fills users,
 * and times, on --device auto|host|cuda:
 *
 *   overlap    onboard alone, compute alone, and both in one gated pass; bound: longer +
 *              shorter / L + 0.4 ms
 *   sharing    the same GPU hit in the process that filled the cache and in another one (the first
 *              idle): the ratio
 *   footprint  what a worker costs
 *
 * Compute: `--users` sequences of `--history` tokens, of which --new are new, and 256 candidates
 * each.
 *
 * usage: bench_share [--model bench|kuairand|tiny] [--device NAME] [--users N] [--history N]
 *                    [--rounds N] [--store DIR] [--sidekvd PATH] */
#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "clock.h"
#include "device.h"
#include "hstu.h"

#define TARGETS 256u

static const char *model_name = "bench", *device = "auto", *program = "build/bin/sidekvd",
                  *store_root = "/tmp";
static uint32_t users = 8, history = 4096, rounds = 20;
static char directory[512], socket_path[600], store_path[600];
static struct hstu_model model;

static void die(const char *what, int status)
{
    fprintf(stderr, "bench_share: %s: %s\n", what, skv_strerror(status));
    exit(1);
}

static void must(const char *what, int status)
{
    if (status)
        die(what, status);
}

struct worker {
    struct hstu_weights *weights;
    struct skv *skv;
    struct hstu_runner *runner;
    uint64_t *tokens; /* [users][history + TARGETS] */
    float *logits;
};

static uint64_t *tokens_of(const struct worker *w, uint32_t user)
{
    return w->tokens + (size_t)user * (history + TARGETS);
}

static void worker_open(struct worker *w)
{
    must("weights", hstu_weights_random(&model, 1, &w->weights));
    struct skv_options options = {.socket = socket_path,
                                  .geometry = model.geometry,
                                  .model = hstu_fingerprint(w->weights),
                                  .rows = 2,
                                  .timeout_ms = 60000,
                                  .spin_us = 1000};
    int status = SKV_ELOST;
    for (int i = 0; i < 300 && (status = skv_open(&options, &w->skv)) == SKV_ELOST; i++)
        usleep(100000);
    must("connecting", status);
    uint32_t rows = users * (history / 2 + TARGETS), one = history + TARGETS;
    must("the runner",
         hstu_runner_open(
             &(struct hstu_runner_options){.weights = w->weights,
                                           .device = skv_session_device(w->skv),
                                           .pool_base = skv_pool_base(w->skv),
                                           .pool_append_base = skv_pool_append_base(w->skv),
                                           .pool_pages = skv_pool_pages(w->skv),
                                           .max_rows = rows > one ? rows : one,
                                           .max_batch = users,
                                           .gate_row = skv_gate_row(w->skv, 0),
                                           .threads = 1},
             &w->runner));
    w->tokens = malloc((size_t)users * (history + TARGETS) * sizeof *w->tokens);
    w->logits = malloc((size_t)users * TARGETS * model.head_out * sizeof *w->logits);
    if (!w->tokens || !w->logits)
        die("tokens", SKV_ENOMEM);
    for (size_t i = 0; i < (size_t)users * (history + TARGETS); i++)
        w->tokens[i] = i * UINT64_C(0x9e3779b97f4a7c15) >> 20;
}

static void worker_close(struct worker *w)
{
    hstu_runner_close(w->runner);
    skv_close(w->skv);
    hstu_weights_close(w->weights);
    free(w->tokens);
    free(w->logits);
}

/* Appends every user's whole history, a user a pass. */
static void fill(struct worker *w)
{
    static struct skv_batch batch;
    for (uint32_t user = 0; user < users; user++) {
        struct skv_request request = {.user = skv_user_integer(user + 1),
                                      .tokens = tokens_of(w, user),
                                      .history = history,
                                      .max_cached = UINT32_MAX};
        must("acquire", skv_acquire(w->skv, 0, &request, 1, &batch));
        const struct skv_grant *grant = &batch.grants[0];
        if (!(grant->flags & SKV_GRANT_APPEND))
            die("filling: no pages to append to; raise the pool", SKV_EFULL);
        struct hstu_sequence sequence = {.history = history,
                                         .cached = grant->cached,
                                         .append = true,
                                         .pages = grant->pages,
                                         .tokens = tokens_of(w, user) + grant->cached};
        must("launch", hstu_runner_launch(w->runner, &sequence, 1, batch.gated));
        must("wait", hstu_runner_wait(w->runner, NULL, 60000));
        must("commit", skv_commit(w->skv, &batch, NULL));
    }
    must("flush", skv_flush(w->skv));
}

enum { ACQUIRE = 1, COMPUTE = 2, EVICT = 4 };

struct times {
    double acquire_us, launch_us, gates_ms,
        done_ms; /* from the acquire's begin, but for the launch itself */
};

/* One batch: all users, `fresh` tokens of each not taken from the cache. */
static struct times run(struct worker *w, uint32_t fresh, int what)
{
    static struct skv_batch batch;
    struct skv_request requests[SKV_MAX_BATCH];
    struct hstu_sequence sequences[SKV_MAX_BATCH];
    struct times t = {0};
    for (uint32_t i = 0; i < users; i++) {
        int status = SKV_OK;
        while (what & EVICT && (status = skv_evict(w->skv, (struct skv_id){0},
                                                   skv_user_integer(i + 1))) == SKV_EBUSY)
            usleep(1000);
        must("evict", status);
        requests[i] = (struct skv_request){.user = skv_user_integer(i + 1),
                                           .tokens = tokens_of(w, i),
                                           .history = history,
                                           .max_cached = history - fresh,
                                           .flags = SKV_REQUEST_READ};
    }
    uint64_t begin = skv_now_ns();
    must("acquire", skv_acquire(w->skv, 0, requests, users, &batch));
    t.acquire_us = (double)(skv_now_ns() - begin) / 1e3;
    for (uint32_t i = 0; i < users; i++) {
        if (batch.grants[i].cached != history - fresh)
            die("a cached user was not hit", batch.grants[i].status);
        sequences[i] = (struct hstu_sequence){.history = history,
                                              .cached = history - fresh,
                                              .targets = TARGETS,
                                              .pages = batch.grants[i].pages,
                                              .tokens = tokens_of(w, i) + history - fresh};
    }
    if (what & COMPUTE) {
        uint64_t launch = skv_now_ns();
        must("launch", hstu_runner_launch(w->runner, sequences, users, batch.gated));
        t.launch_us = (double)(skv_now_ns() - launch) / 1e3;
    }
    uint32_t *last = skv_gate_row(w->skv, 0) + model.geometry.layers - 1;
    if (!(what & COMPUTE)) {
        must("gates", skv_gate_wait(last, 60000));
        t.gates_ms = (double)(skv_now_ns() - begin) / 1e6;
    } else {
        must("wait", hstu_runner_wait(w->runner, w->logits, 60000));
    }
    t.done_ms = (double)(skv_now_ns() - begin) / 1e6;
    must("the batch", skv_batch_status(w->skv, &batch));
    must("release", skv_release(w->skv, &batch));
    return t;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* Median over the rounds of one field of the times (its offset); the first two rounds are not
 * counted. */
static double median(struct worker *w, uint32_t fresh, int what, size_t field)
{
    double *values = malloc(rounds * sizeof *values);
    if (!values)
        die("samples", SKV_ENOMEM);
    for (uint32_t i = 0; i < rounds + 2; i++) {
        struct times t = run(w, fresh, what);
        if (i >= 2)
            memcpy(&values[i - 2], (const char *)&t + field, sizeof *values);
    }
    qsort(values, rounds, sizeof *values, by_value);
    double middle = values[rounds / 2];
    free(values);
    return middle;
}
#define MEDIAN(w, fresh, what, field) median(w, fresh, what, offsetof(struct times, field))

static void overlap(struct worker *w, uint32_t fresh)
{
    double gib = (double)users * (history - fresh) / model.geometry.page_tokens *
                 (double)skv_page_bytes(&model.geometry) / (1 << 30);
    double first = run(w, fresh, ACQUIRE | EVICT).gates_ms;
    double copy = MEDIAN(w, fresh, ACQUIRE | EVICT, gates_ms);
    double compute = MEDIAN(w, fresh, COMPUTE, done_ms);
    double both = MEDIAN(w, fresh, COMPUTE | EVICT, done_ms);
    double longer = copy > compute ? copy : compute, shorter = copy + compute - longer;
    double bound = longer + shorter / model.geometry.layers + 0.4;
    printf("overlap, %u x %u with %u new: onboard alone %.3f ms (%.3f GiB, %.1f GB/s; first time "
           "%.3f ms), compute "
           "alone %.3f ms, both %.3f ms; bound %.3f ms: %s\n",
           users, history, fresh, copy, gib, gib * 1.073741824 / copy * 1e3, first, compute, both,
           bound, both <= bound ? "met" : "NOT met");
    fflush(stdout);
}

static void hits(struct worker *w, const char *who, double *done)
{
    *done = MEDIAN(w, 128, COMPUTE, done_ms);
    printf("%s: GPU hit of %u x %u with 128 new: %.3f ms; acquire %.1f us, launch %.1f us\n", who,
           users, history, *done, MEDIAN(w, 128, COMPUTE, acquire_us),
           MEDIAN(w, 128, COMPUTE, launch_us));
    struct hstu_footprint f;
    hstu_runner_footprint(w->runner, &f);
    printf("%s: footprint: context %.0f MiB, weights %.0f, arena %.0f, graphs %.0f (%u)\n", who,
           (double)f.context_bytes / (1 << 20), (double)f.weights_bytes / (1 << 20),
           (double)f.arena_bytes / (1 << 20), (double)f.graphs_bytes / (1 << 20), f.graphs);
    fflush(stdout);
}

static pid_t start_daemon(void)
{
    pid_t child = fork();
    if (child)
        return child;
    char layers[16], heads[16], dim[16], tokens[16], pool[32];
    /* Of a protected pool one of two sessions may own a third, and the first fills all users. */
    uint64_t pages = (uint64_t)users * (history / model.geometry.page_tokens) * 4 + 64;
    snprintf(layers, sizeof layers, "%u", model.geometry.layers);
    snprintf(heads, sizeof heads, "%u", model.geometry.heads);
    snprintf(dim, sizeof dim, "%u", model.geometry.head_dim);
    snprintf(tokens, sizeof tokens, "%u", model.geometry.page_tokens);
    snprintf(pool, sizeof pool, "%llu",
             (unsigned long long)(pages * skv_page_bytes(&model.geometry)));
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    setenv("SIDEKV_LOG", "warn", 1);
    execl(program, program, "--socket", socket_path, "--store", store_path, "--device", device,
          "--layers", layers, "--heads", heads, "--head-dim", dim, "--page-tokens", tokens,
          "--pool-bytes", pool, "--store-bytes", "8G", "--tail-ms", "10", NULL);
    perror(program);
    _exit(127);
}

/* What of the store can be pinned has been. */
static void wait_for_pinner(struct worker *w)
{
    struct skv_stats stats = {0};
    uint64_t before = 1;
    for (int i = 0; i < 60 && (before != stats.pinned_bytes || i < 5); i++) {
        before = stats.pinned_bytes;
        usleep(500000);
        must("stats", skv_stats(w->skv, &stats));
    }
    printf("store: %.3f GiB used, %.3f GiB pinned\n", (double)stats.store_bytes / (1 << 30),
           (double)stats.pinned_bytes / (1 << 30));
}

static int second_worker(void)
{
    struct worker w = {0};
    worker_open(&w);
    double done;
    hits(&w, "second worker", &done);
    worker_close(&w);
    fprintf(stderr, "%.6f\n", done); /* the first reads it */
    return 0;
}

static double run_second(char **argv)
{
    int out[2];
    double done = 0;
    if (pipe(out))
        die("pipe", SKV_EIO);
    pid_t child = fork();
    if (child == 0) {
        dup2(out[1], STDERR_FILENO);
        setenv("BENCH_SHARE_DIRECTORY", directory, 1);
        execv("/proc/self/exe", argv);
        _exit(127);
    }
    close(out[1]);
    FILE *in = fdopen(out[0], "r");
    char line[256];
    while (in && fgets(line, sizeof line, in))
        done = strtod(line, NULL);
    if (in)
        fclose(in);
    waitpid(child, NULL, 0);
    return done;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {{"model", 1, NULL, 'm'},   {"device", 1, NULL, 'd'},
                                            {"users", 1, NULL, 'u'},   {"history", 1, NULL, 'h'},
                                            {"rounds", 1, NULL, 'r'},  {"store", 1, NULL, 's'},
                                            {"sidekvd", 1, NULL, 'p'}, {NULL, 0, NULL, 0}};
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        uint32_t *number = c == 'u' ? &users : c == 'h' ? &history : c == 'r' ? &rounds : NULL;
        const char **text = c == 'm'   ? &model_name
                            : c == 'd' ? &device
                            : c == 's' ? &store_root
                                       : &program;
        if (c == '?' || (number && !(*number = (uint32_t)strtoul(optarg, NULL, 10)))) {
            fprintf(stderr, "usage: bench_share [--model NAME] [--device NAME] [--users N] "
                            "[--history N] [--rounds N] "
                            "[--store DIR] [--sidekvd PATH]\n");
            return 2;
        }
        if (!number)
            *text = optarg;
    }
    must("the model", hstu_model_named(model_name, &model));
    if (users > SKV_MAX_BATCH || history > hstu_model_history(model_name))
        die("more users or history than there may be", SKV_EINVAL);
    const char *given = getenv("BENCH_SHARE_DIRECTORY");
    snprintf(directory, sizeof directory, "%s", given ? given : store_root);
    if (!given)
        snprintf(directory, sizeof directory, "%s/bench_share.XXXXXX", store_root);
    if (!given && !mkdtemp(directory))
        die("a temporary directory", SKV_EIO);
    snprintf(socket_path, sizeof socket_path, "%s/socket", directory);
    snprintf(store_path, sizeof store_path, "%s/store", directory);
    if (given)
        return second_worker();

    pid_t daemon = start_daemon();
    struct worker w = {0};
    worker_open(&w);
    const struct skv_server *server = skv_server(w.skv);
    printf("bench_share: %s, model %s, %u users x %u tokens, %u candidates, medians of %u\n",
           server->device, model_name, users, history, TARGETS, rounds);
    fill(&w);
    wait_for_pinner(&w);
    overlap(&w, history / 2);
    overlap(&w, 128);
    double first, second;
    hits(&w, "first worker", &first);
    second = run_second(argv);
    printf("sharing: the second worker's hit costs %.3f of the first's\n", second / first);
    worker_close(&w);
    kill(daemon, SIGTERM);
    waitpid(daemon, NULL, 0);
    char command[600];
    snprintf(command, sizeof command, "rm -rf '%s'", directory);
    return system(command) != 0;
}
