/* A worker in one file: ranks candidates for one user out of the shared cache. Start a daemon, run
 * this twice: the second process finds what the first one committed.
 *
 *   cc -o worker worker_example.c $(pkg-config --cflags --libs libsidekv-hstu)
 *   sidekvd --socket /tmp/s --store none &
 *   until sidekv --socket /tmp/s ping 2>/dev/null; do sleep 0.1; done
 *   ./worker /tmp/s 4711
 *   ./worker /tmp/s 4711
 *
 * Happy path: acquire, launch, wait, status, answer, commit. A page that does not load, or a daemon
 * that is lost, makes another try with a shorter hit; a batch ends (commit or release) only after
 * its pass has ended. */
#include <hstu.h>
#include <stdio.h>
#include <stdlib.h>

enum { HISTORY = 1000, CANDIDATES = 16, SEED = 1, ROW = 0, TRIES = 5 };

struct worker {
    struct hstu_weights *weights;
    struct skv *skv;
    struct hstu_runner *runner;
    void *pool, *pool_append; /* that the runner was opened on */
    uint64_t pool_pages;
};

/* A runner on the session's pool, or a new one where a reconnect moved the pool. */
static int open_runner(struct worker *w)
{
    if (w->runner && skv_pool_base(w->skv) == w->pool &&
        skv_pool_append_base(w->skv) == w->pool_append && skv_pool_pages(w->skv) == w->pool_pages)
        return SKV_OK; /* captured graphs are still good */
    hstu_runner_close(w->runner);
    w->runner = NULL;
    w->pool = skv_pool_base(w->skv);
    w->pool_append = skv_pool_append_base(w->skv);
    w->pool_pages = skv_pool_pages(w->skv);
    return hstu_runner_open(&(struct hstu_runner_options){.weights = w->weights,
                                                          .device = skv_session_device(w->skv),
                                                          .pool_base = w->pool,
                                                          .pool_append_base = w->pool_append,
                                                          .pool_pages = w->pool_pages,
                                                          .max_rows = HISTORY + CANDIDATES,
                                                          .max_batch = 1,
                                                          .gate_row = skv_gate_row(w->skv, ROW)},
                            &w->runner);
}

static int open_worker(struct worker *w, const char *socket)
{
    struct hstu_model model;
    int rc = hstu_model_named("tiny", &model);
    if (!rc)
        rc = hstu_weights_random(&model, SEED, &w->weights);
    if (!rc)
        rc = skv_open(&(struct skv_options){.socket = socket,
                                            .geometry = model.geometry,
                                            .model = hstu_fingerprint(w->weights)},
                      &w->skv);
    return rc ? rc : open_runner(w);
}

static void close_worker(struct worker *w)
{
    hstu_runner_close(w->runner); /* before its session */
    skv_close(w->skv);
    hstu_weights_close(w->weights);
}

/* One pass over tokens [cached, h) and the candidates. On 0 the batch is open: commit it. */
static int pass(struct worker *w, const uint64_t *tokens, struct skv_batch *batch, float *logits)
{
    const struct skv_grant *grant = &batch->grants[0];
    struct hstu_sequence sequence = {.history = HISTORY,
                                     .cached = grant->cached,
                                     .targets = CANDIDATES,
                                     .append = grant->flags & SKV_GRANT_APPEND,
                                     .pages = grant->pages,
                                     .tokens = tokens + grant->cached};
    int rc = hstu_runner_launch(w->runner, &sequence, 1, batch->gated);
    if (!rc)
        do
            rc = hstu_runner_wait(w->runner, logits, 1000);
        while (rc == SKV_ETIMEDOUT); /* still running: nothing may end before it has */
    if (!rc)
        rc = skv_batch_status(w->skv, batch); /* SKV_ELOAD, SKV_ELOST: the logits are worthless */
    if (rc)
        skv_release(w->skv, batch);
    return rc;
}

static int rank(struct worker *w, uint64_t user, const uint64_t *tokens, float *logits)
{
    struct skv_request request = {.user = skv_user_integer(user),
                                  .tokens = tokens,
                                  .history = HISTORY,
                                  .max_cached = UINT32_MAX};
    struct skv_batch batch;
    int rc = SKV_ELOST;
    for (int i = 0; i < TRIES && (rc == SKV_ELOST || rc == SKV_ELOAD); i++) {
        rc = SKV_OK;
        if (skv_lost(w->skv) && !(rc = skv_reconnect(w->skv, 10000)))
            rc = open_runner(w);
        if (!rc)
            rc = skv_acquire(w->skv, ROW, &request, 1, &batch);
        if (!rc)
            rc = pass(w, tokens, &batch, logits);
    }
    if (rc)
        return rc;
    struct skv_grant grant = batch.grants[0];
    struct skv_committed result; /* a real worker answers its caller first */
    rc = skv_commit(w->skv, &batch, &result);
    printf("user %llu: %u of %d tokens cached, %u of them in the pool before; %u committed, %u "
           "stored\n",
           (unsigned long long)user, grant.cached, HISTORY, grant.gpu_tokens,
           rc ? 0 : result.committed, rc ? 0 : result.stored);
    return rc == SKV_ELOST ? SKV_OK : rc; /* the scores are good all the same */
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: worker SOCKET USER\n");
        return 2;
    }
    uint64_t user = strtoull(argv[2], NULL, 10), tokens[HISTORY + CANDIDATES];
    for (int i = 0; i < HISTORY + CANDIDATES; i++) /* any u64 is a token; the last are candidates */
        tokens[i] = i < HISTORY ? user * 31 + (uint64_t)i : (uint64_t)(1000000 + i);
    struct worker w = {0};
    float logits[CANDIDATES];
    int rc = open_worker(&w, argv[1]);
    if (!rc)
        rc = rank(&w, user, tokens, logits);
    for (int i = 0; !rc && i < 4; i++)
        printf("candidate %d: %.6f\n", i, (double)hstu_sigmoid(logits[i]));
    if (rc)
        fprintf(stderr, "worker: %s\n", skv_strerror(rc));
    close_worker(&w);
    return rc != 0;
}
