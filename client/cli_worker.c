/* A worker of replay: a session, a runner, and jobs one at a time.
 *
 *   a job:  acquire -> strip cached tokens -> pass -> batch status -> scores, top-k
 *           -> (verify, while the pages are leased) -> commit -> report
 *
 * What can go wrong makes a shorter hit, never a wrong answer: a page that does not load throws the
 * pass away and acquires again; a lost daemon is reconnected to, and until it is back requests are
 * served without cache. Only what cannot get better ends the worker: a device that failed, a daemon
 * of another geometry. */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cli_verify.h"
#include "clock.h"
#include "device.h"
#include "hash.h"
#include "log.h"

#define CONNECT_TRIES      30    /* a second apart: a daemon that is being restarted */
#define RECONNECT_MS       3000u /* the first time; then requests are served without cache, */
#define RECONNECT_SOON_MS  100u  /* and now and then one tries this long: */
#define RECONNECT_PAUSE_NS UINT64_C(2000000000)
#define CACHED_TRIES       5    /* passes thrown away before one without cache */
#define BUSY_TRIES         1000 /* a millisecond apart: the row is still owned by a late batch */

struct worker {
    const struct work_header *header;
    struct hstu_model model;
    struct hstu_weights *weights;
    struct skv *skv;           /* NULL: no cache */
    struct skv_device *device; /* the session's, or own_device */
    struct skv_device *own_device;
    struct hstu_runner *runner;
    void *pool_base, *append_base; /* what the runner was opened with */
    uint64_t pool_pages;
    struct replay_verify *verify; /* NULL: none wanted */
    uint32_t batch, max_rows, targets;
    bool lost_before;  /* the last reconnect failed */
    uint64_t retry_ns; /* then: not before this */

    uint64_t *tokens; /* [batch][history + targets] histories, each followed by its candidates */
    float *logits;    /* [batch][targets][head_out] */
    struct skv_request requests[SKV_MAX_BATCH];
    struct skv_batch grants;
    struct hstu_sequence sequences[SKV_MAX_BATCH];
};

/* ---- life ---- */

static const struct work_header *map_header(void)
{
    struct stat file;
    if (fstat(WORK_MEMORY_FD, &file) != 0 || file.st_size < (off_t)sizeof(struct work_header))
        return NULL;
    void *memory = mmap(NULL, (size_t)file.st_size, PROT_READ, MAP_SHARED, WORK_MEMORY_FD, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

/* A daemon may be about to come: it was restarted, or is still opening its pool. */
static int open_session(struct worker *w)
{
    struct skv_options options = {.socket = w->header->socket,
                                  .geometry = w->model.geometry,
                                  .model = hstu_fingerprint(w->weights),
                                  .rows = 1};
    for (int tries = 1;; tries++) {
        int rc = skv_open(&options, &w->skv);
        bool passes = rc == SKV_ELOST || rc == SKV_EAGAIN || rc == SKV_EFULL || rc == SKV_ETIMEDOUT;
        if (!passes || tries == CONNECT_TRIES)
            return rc;
        poll(NULL, 0, 1000);
    }
}

static int open_runner(struct worker *w)
{
    hstu_runner_close(w->runner);
    w->runner = NULL;
    w->pool_base = w->skv ? skv_pool_base(w->skv) : NULL;
    w->append_base = w->skv ? skv_pool_append_base(w->skv) : NULL;
    w->pool_pages = w->skv ? skv_pool_pages(w->skv) : 0;
    struct hstu_runner_options options = {.weights = w->weights,
                                          .device = w->device,
                                          .pool_base = w->pool_base,
                                          .pool_append_base = w->append_base,
                                          .pool_pages = w->pool_pages,
                                          .max_rows = w->max_rows,
                                          .max_batch = w->batch,
                                          .gate_row = w->skv ? skv_gate_row(w->skv, 0) : NULL,
                                          .threads = w->header->threads};
    return hstu_runner_open(&options, &w->runner);
}

static int open_worker(struct worker *w)
{
    const struct work_header *header = w->header;
    int rc = hstu_model_named(header->model, &w->model);
    if (!rc)
        rc = hstu_weights_random(&w->model, header->seed, &w->weights);
    if (rc)
        return rc;
    if (header->socket[0]) {
        rc = open_session(w);
        w->device = rc ? NULL : skv_session_device(w->skv);
    } else {
        rc = skv_device_open(header->device, &w->own_device);
        w->device = w->own_device;
    }
    if (rc)
        return rc;

    bool cuda = skv_device_info(w->device)->kind == SKV_DEVICE_CUDA;
    w->batch = header->batch ? header->batch : cuda ? WORK_CUDA_BATCH : 1;
    w->targets = header->candidates;
    w->max_rows = header->history + header->candidates;
    w->tokens = calloc((size_t)w->batch * w->max_rows, sizeof *w->tokens);
    w->logits = calloc((size_t)w->batch * w->targets * w->model.head_out, sizeof *w->logits);
    if (!w->tokens || !w->logits)
        return SKV_ENOMEM;
    rc = open_runner(w);
    if (!rc && header->verify)
        rc = replay_verify_open(&(struct replay_verify_options){.weights = w->weights,
                                                                .device = w->device,
                                                                .history = header->history,
                                                                .candidates = header->candidates,
                                                                .threads = header->threads},
                                &w->verify);
    return rc;
}

static void close_worker(struct worker *w)
{
    replay_verify_close(w->verify);
    hstu_runner_close(w->runner);
    skv_close(w->skv);
    if (w->own_device)
        skv_device_close(w->own_device);
    hstu_weights_close(w->weights);
    free(w->tokens);
    free(w->logits);
}

/* ---- a request's input ---- */

/* Different items for every request, the same for the same request and seed; never one twice
 * (Floyd's sampling). */
static void choose_candidates(const struct worker *w, uint64_t request, uint64_t *tokens)
{
    const uint64_t *items = work_items(w->header);
    uint64_t random = w->header->seed ^ (request + 1) * UINT64_C(0xd1342543de82ef95);
    uint64_t top = w->header->item_count - w->targets;
    for (uint32_t i = 0; i < w->targets; i++, top++) {
        uint64_t token = replay_item_token(items[replay_random_below(&random, top + 1)]);
        for (uint32_t j = 0; j < i; j++)
            if (tokens[j] == token)
                token = replay_item_token(items[top]);
        tokens[i] = token;
    }
}

static uint64_t *tokens_of(const struct worker *w, uint32_t index)
{
    return w->tokens + (size_t)index * w->max_rows;
}

static void prepare(struct worker *w, const struct work_job *job)
{
    for (uint32_t i = 0; i < job->count; i++) {
        const struct work_item *item = &job->items[i];
        uint64_t *tokens = tokens_of(w, i);
        memcpy(tokens, work_tokens(w->header) + item->first_token, item->history * sizeof *tokens);
        choose_candidates(w, item->request, tokens + item->history);
        w->requests[i] = (struct skv_request){.user = skv_user_integer(item->user),
                                              .tokens = tokens,
                                              .history = item->history,
                                              .max_cached = UINT32_MAX};
    }
}

/* ---- a pass ---- */

/* `cached`: as the grants say; else everything is computed and nothing appended. */
static void plan_pass(struct worker *w, const struct work_job *job, bool cached)
{
    for (uint32_t i = 0; i < job->count; i++) {
        struct hstu_sequence *q = &w->sequences[i];
        *q = (struct hstu_sequence){.history = job->items[i].history, .targets = w->targets};
        const struct skv_grant *grant = &w->grants.grants[i];
        if (cached && grant->status == 0) {
            q->cached = grant->cached;
            q->append = grant->flags & SKV_GRANT_APPEND;
            q->pages = grant->pages;
        }
        q->tokens = tokens_of(w, i) + q->cached;
    }
}

static uint64_t cpu_ns(void)
{
    struct timespec used;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used);
    return (uint64_t)used.tv_sec * 1000000000u + (uint64_t)used.tv_nsec;
}

/* Launches as many sequences at a time as fit. */
static int run_pass(struct worker *w, uint32_t count, bool gated, struct work_done *done)
{
    float *logits = w->logits;
    for (uint32_t first = 0, next; first < count; first = next) {
        uint32_t rows = 0;
        for (next = first; next < count; next++) {
            const struct hstu_sequence *q = &w->sequences[next];
            uint32_t more = q->history - q->cached + q->targets;
            if (next > first && rows + more > w->max_rows)
                break;
            rows += more;
        }
        uint64_t start_cpu = cpu_ns(), start = skv_now_ns();
        int rc = hstu_runner_launch(w->runner, w->sequences + first, next - first, gated);
        uint64_t launched = skv_now_ns();
        if (!rc)
            rc = hstu_runner_wait(w->runner, logits, WORK_PASS_TIMEOUT_MS);
        done->launch_ns += launched - start;
        done->wait_ns += skv_now_ns() - launched;
        done->cpu_ns += cpu_ns() - start_cpu;
        if (rc)
            return rc;
        logits += (size_t)(next - first) * w->targets * w->model.head_out;
    }
    return 0;
}

/* ---- with the cache ---- */

/* After the daemon was lost. SKV_ELOST: not back yet. */
static int reconnect(struct worker *w, struct work_done *done)
{
    if (w->lost_before && skv_now_ns() < w->retry_ns)
        return SKV_ELOST;
    int rc = skv_reconnect(w->skv, w->lost_before ? RECONNECT_SOON_MS : RECONNECT_MS);
    w->lost_before = rc != 0;
    w->retry_ns = skv_now_ns() + RECONNECT_PAUSE_NS;
    if (rc)
        return rc == SKV_EAGAIN || rc == SKV_EFULL || rc == SKV_ETIMEDOUT ? SKV_ELOST : rc;
    done->reconnects++;
    if (skv_pool_base(w->skv) == w->pool_base && skv_pool_append_base(w->skv) == w->append_base &&
        skv_pool_pages(w->skv) == w->pool_pages)
        return 0;
    return open_runner(w); /* the new pool has another place or size */
}

static int acquire(struct worker *w, const struct work_job *job, struct work_done *done)
{
    for (int tries = 0;; tries++) {
        if (skv_lost(w->skv)) {
            int rc = reconnect(w, done);
            if (rc)
                return rc;
        }
        uint64_t start = skv_now_ns();
        int rc = skv_acquire(w->skv, 0, w->requests, job->count, &w->grants);
        done->acquire_ns = skv_now_ns() - start;
        if (rc == SKV_EBUSY && tries < BUSY_TRIES)
            poll(NULL, 0, 1);
        else if ((rc != SKV_ELOST && rc != SKV_ETIMEDOUT) || tries >= CACHED_TRIES)
            return rc == SKV_ETIMEDOUT ? SKV_ELOST : rc;
    }
}

/* One try: SKV_ELOAD or SKV_ELOST say that the pass is worth nothing; both may be tried again. On
 * success the leases are held. */
static int try_cached(struct worker *w, const struct work_job *job, struct work_done *done)
{
    int rc = acquire(w, job, done);
    if (rc)
        return rc;
    plan_pass(w, job, true);
    rc = run_pass(w, job->count, w->grants.gated, done);
    if (rc == 0)
        rc = skv_batch_status(w->skv, &w->grants);
    if (rc == 0)
        return 0;
    if (rc == SKV_ETIMEDOUT)
        return rc; /* it still runs: its pages must stay leased until this worker has ended */
    done->reloads++;
    skv_release(w->skv, &w->grants);
    return rc;
}

/* Scores the job's requests, with the cache if it can be had. *leased: commit must follow. */
static int score(struct worker *w, const struct work_job *job, struct work_done *done, bool *leased)
{
    *leased = false;
    for (int tries = 0; w->skv && tries < CACHED_TRIES; tries++) {
        int rc = try_cached(w, job, done);
        if (rc == 0) {
            *leased = true;
            return 0;
        }
        if (rc == SKV_ELOST && w->lost_before)
            break;
        if (rc != SKV_ELOAD && rc != SKV_ELOST)
            return rc;
        for (uint32_t i = 0; tries + 2 == CACHED_TRIES && i < job->count; i++)
            w->requests[i].flags |= SKV_REQUEST_NO_ONBOARD;
    }
    plan_pass(w, job, false);
    return run_pass(w, job->count, false, done);
}

static void commit(struct worker *w, struct work_done *done)
{
    struct skv_committed results[SKV_MAX_BATCH];
    uint64_t start = skv_now_ns();
    int rc = skv_commit(w->skv, &w->grants, results);
    done->commit_ns = skv_now_ns() - start;
    for (uint32_t i = 0; rc == 0 && i < w->grants.count; i++)
        if (w->grants.grants[i].status == 0 && results[i].status == SKV_ESTALE)
            done->stale++;
    if (rc && rc != SKV_ELOST)
        skv_warn("commit: %s", skv_strerror(rc));
}

/* ---- a job ---- */

static const float *logits_of(const struct worker *w, uint32_t index)
{
    return w->logits + (size_t)index * w->targets * w->model.head_out;
}

/* The best `top` candidates by output 0, best first; equal ones in candidate order. */
static void rank(const struct worker *w, uint32_t index, const struct work_item *item,
                 struct work_result *result)
{
    const uint64_t *candidates = tokens_of(w, index) + item->history;
    const float *logits = logits_of(w, index);
    for (uint32_t c = 0; c < w->targets; c++) {
        float score = hstu_sigmoid(logits[(size_t)c * w->model.head_out]);
        uint32_t at = result->top_count;
        while (at > 0 && result->top[at - 1].score < score)
            at--;
        if (at >= w->header->top)
            continue;
        if (result->top_count < w->header->top)
            result->top_count++;
        memmove(&result->top[at + 1], &result->top[at],
                (result->top_count - 1 - at) * sizeof *result->top);
        result->top[at] =
            (struct work_score){.item = candidates[c] & (REPLAY_ITEM_LIMIT - 1), .score = score};
    }
}

static void report(struct worker *w, const struct work_job *job, bool leased,
                   struct work_done *done)
{
    for (uint32_t i = 0; i < job->count; i++) {
        const struct hstu_sequence *q = &w->sequences[i];
        struct work_result *result = &done->results[i];
        *result = (struct work_result){.request = job->items[i].request, .cached = q->cached};
        result->gpu_tokens = leased && q->cached ? w->grants.grants[i].gpu_tokens : 0;
        result->digest = skv_checksum(logits_of(w, i),
                                      (size_t)w->targets * w->model.head_out * sizeof *w->logits);
        if (w->skv && !leased)
            result->flags |= WORK_UNCACHED;
        else if (w->skv && !q->append && q->cached < q->history)
            result->flags |= WORK_NO_APPEND;
        rank(w, i, &job->items[i], result);
    }
}

static int verify(struct worker *w, const struct work_job *job, struct work_done *done)
{
    for (uint32_t i = 0; i < job->count; i++) {
        const struct work_item *item = &job->items[i];
        if (!(item->flags & WORK_VERIFY))
            continue;
        const struct hstu_sequence *q = &w->sequences[i];
        struct replay_served served = {.tokens = tokens_of(w, i),
                                       .history = q->history,
                                       .targets = q->targets,
                                       .cached = q->cached,
                                       .pages = q->pages,
                                       .pool = w->pool_base,
                                       .logits = logits_of(w, i),
                                       .flip = item->flags & WORK_FLIP};
        int rc = replay_verify_check(w->verify, &served, &done->results[i]);
        if (rc)
            return rc;
    }
    return 0;
}

static int serve(struct worker *w, const struct work_job *job, struct work_done *done)
{
    bool leased;
    uint64_t start = skv_now_ns();
    *done = (struct work_done){.kind = WORK_DONE, .count = job->count};
    prepare(w, job);
    int rc = score(w, job, done, &leased);
    if (rc)
        return rc;
    report(w, job, leased, done);
    uint64_t answered = skv_now_ns();
    done->latency_ns = answered - start;
    rc = verify(w, job, done);
    done->verify_ns = skv_now_ns() - answered;
    if (leased)
        commit(w, done);
    return rc;
}

static bool tell(const void *message, size_t bytes)
{
    return send(WORK_SOCKET_FD, message, bytes, MSG_NOSIGNAL) == (ssize_t)bytes;
}

static int serve_jobs(struct worker *w)
{
    static struct work_job job;
    static struct work_done done;
    for (;;) {
        ssize_t got = recv(WORK_SOCKET_FD, &job, sizeof job, 0);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return 0;
        int rc = serve(w, &job, &done);
        if (rc)
            return rc;
        if (!tell(&done, work_done_bytes(done.count)))
            return 0; /* the dispatcher is gone */
    }
}

static void say_ready(const struct worker *w)
{
    const struct skv_device_info *info = skv_device_info(w->device);
    struct work_ready ready = {
        .kind = WORK_READY, .batch = w->batch, .cuda = info->kind == SKV_DEVICE_CUDA};
    memcpy(ready.device, info->name, sizeof ready.device);
    tell(&ready, sizeof ready);
}

static void say_bye(const struct worker *w)
{
    struct hstu_footprint took = {0};
    struct rusage usage;
    hstu_runner_footprint(w->runner, &took);
    getrusage(RUSAGE_SELF, &usage);
    struct work_bye bye = {.kind = WORK_BYE,
                           .graphs = took.graphs,
                           .context_bytes = took.context_bytes,
                           .weights_bytes = took.weights_bytes,
                           .arena_bytes = took.arena_bytes,
                           .graphs_bytes = took.graphs_bytes,
                           .resident_bytes = (uint64_t)usage.ru_maxrss * 1024};
    tell(&bye, sizeof bye);
}

int replay_worker(void)
{
    static struct worker w;
    skv_log_init("sidekv replay worker", SKV_LOG_WARN);
    prctl(PR_SET_NAME, "sidekv-worker");
    w.header = map_header();
    if (!w.header) {
        skv_error("not started by sidekv replay");
        return 2;
    }
    int rc = open_worker(&w);
    if (!rc) {
        say_ready(&w);
        rc = serve_jobs(&w);
    }
    if (rc)
        skv_error("%s", skv_strerror(rc));
    else
        say_bye(&w);
    close_worker(&w);
    return rc ? 1 : 0;
}
