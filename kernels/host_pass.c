/* The runner's host backend: an arena, a few threads that live as long as the runner, and the
 * phases of a pass.
 *
 * The thread that waits is one of the threads: launch() copies what it was given and wakes the
 * others, if there are any; wait() runs its share of the pass, and all of it where there is one
 * thread only. So a short pass costs no thread's sleep and waking. All threads run the same pass,
 * phase by phase, with a barrier after each; inside a phase they take tasks from a counter:
 *
 *   rows 0       embed, project layer 0              a task: 48 rows of the batch
 *   attend l     append K and V, attention           a task: a sequence's head, up to 192 rows
 *   rows l + 1   output l, project l + 1 (or head)
 *
 * Tasks write disjoint memory and a row's bits depend on that row alone (host_math.h), so the
 * number of threads and the order of tasks show in nothing.
 *
 * When the waiter's time is up, between two tasks or before a gate, it leaves and remembers the
 * phase; the next wait() goes on there. Meanwhile the others wait at a barrier.
 *
 * Gates: pages are touched in the attend phases only, and attend l of a gated pass starts when gate
 * l is open. Only the opening ends that wait: if the daemon is lost, the library's watcher opens
 * it. close() ends a pass in flight first.
 *
 * In the last layer history rows need no output: only their K and V are made, unless debug() asks
 * for the block's rows. */
#include "host_math.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "clock.h"
#include "device.h"
#include "log.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif

struct attend_task {
    uint32_t sequence, head, row0, rows; /* row0: local */
};

struct pass {
    uint32_t count, rows, tasks;
    bool gated;
    bool every_row; /* debug: history rows of the last layer too */
    uint32_t targets;
};

struct host {
    struct hstu_runner_options options;
    struct hstu_model model;
    const struct host_math *math;
    struct host_model *weights;
    uint32_t threads;
    uint32_t user_pages; /* room for one sequence's page list */

    /* The arena: the pass's inputs, activations and results. */
    struct hstu_sequence *sequences; /* [max_batch], pointing into tokens and pages */
    uint32_t *first_row;             /* [max_batch] */
    uint64_t *tokens;                /* [max_rows] */
    uint32_t *pages;                 /* [max_batch * user_pages] */
    uint32_t *position;              /* [max_rows] */
    uint32_t *target;                /* [max_rows] its row of logits, UINT32_MAX for history */
    bool *is_target;                 /* [max_rows] */
    struct attend_task *tasks;       /* [max_tasks] */
    float *logits;                   /* [max_rows][head_out] */
    struct host_rows at;
    uint64_t arena_bytes;
    struct pass pass; /* written by launch, then read-only */

    _Atomic uint32_t taken[2 * SKV_MAX_LAYERS + 1]; /* tasks taken, a counter a phase */
    pthread_barrier_t phase;

    bool running; /* launched, not waited for to the end */

    pthread_mutex_t lock; /* of launches, closing */
    pthread_cond_t wake;  /* the helpers: a launch, or closing */
    uint64_t launches;
    bool closing;

    struct worker {
        struct host *host;
        struct host_scratch scratch;
        pthread_t thread;
        bool started;
        uint32_t phase; /* of the running pass: 2 l is rows l, 2 l + 1 attend l */
    } * workers;        /* [threads]; the first is whoever waits, the others are helpers */
};

/* ---- a pass, as every thread runs it ---- */

static void barrier(struct host *h)
{
    if (h->threads > 1)
        pthread_barrier_wait(&h->phase);
}

static bool take(struct host *h, uint32_t phase, uint32_t tasks, uint32_t *task)
{
    /* Relaxed: tasks are independent, and the barriers order the phases. */
    *task = atomic_fetch_add_explicit(&h->taken[phase], 1, memory_order_relaxed);
    return *task < tasks;
}

static void head_rows(struct host *h, uint32_t row0, uint32_t rows, struct host_scratch *scratch)
{
    const struct hstu_model *m = &h->model;
    for (uint32_t r = row0, end = row0 + rows; r < end;) {
        uint32_t run = 0; /* of rows that are targets: their logits follow one another */
        while (r + run < end && h->is_target[r + run])
            run++;
        if (run)
            h->math->head(h->weights, h->at.x + (uint64_t)r * m->embed, run,
                          h->logits + (uint64_t)h->target[r] * m->head_out, scratch);
        r += run + 1;
    }
}

/* Rows [row0, row0 + rows): finish layer `layer` - 1, begin layer `layer`. */
static void row_task(struct host *h, uint32_t layer, uint32_t row0, uint32_t rows,
                     struct host_scratch *scratch)
{
    const uint32_t E = h->model.embed, HD = h->weights->width, L = h->model.geometry.layers;
    uint16_t *x = h->at.x + (uint64_t)row0 * E, *m = h->at.m + (uint64_t)row0 * 4 * HD;
    const bool *wanted = h->pass.every_row ? NULL : h->is_target + row0;

    if (layer == 0)
        h->math->embed(h->options.weights, h->tokens + row0, h->position + row0, rows, x);
    else
        h->math->output(h->weights, layer - 1, m, h->at.o + (uint64_t)row0 * HD, x, rows,
                        layer == L ? wanted : NULL, scratch);
    if (layer < L)
        h->math->project(h->weights, layer, x, m, rows, layer == L - 1 ? wanted : NULL, scratch);
    else
        head_rows(h, row0, rows, scratch);
}

/* Writes K and V of one head of new history rows [row0, end) to their pages. */
static void append(struct host *h, const struct hstu_sequence *q, uint32_t layer, uint32_t head,
                   const uint16_t *m, uint32_t row0, uint32_t end)
{
    const struct skv_geometry *g = &h->model.geometry;
    const uint32_t D = g->head_dim, HD = h->weights->width;
    for (uint32_t r = row0; r < end; r++) {
        const uint32_t token = q->cached + r, slot = token % g->page_tokens;
        const uint16_t *row = m + (uint64_t)r * 4 * HD + head * D;
        uint16_t *page = (uint16_t *)h->options.pool_append_base +
                         q->pages[token / g->page_tokens] * (skv_page_bytes(g) / 2);
        memcpy(page + hstu_page_offset(g, layer, 0, head, slot), row + 3 * HD, D * sizeof *row);
        memcpy(page + hstu_page_offset(g, layer, 1, head, slot), row + HD, D * sizeof *row);
    }
}

static void attend_task(struct host *h, uint32_t layer, const struct attend_task *task,
                        struct host_scratch *scratch)
{
    const struct hstu_sequence *q = &h->sequences[task->sequence];
    const uint32_t HD = h->weights->width, n = q->history - q->cached;
    const uint64_t first = h->first_row[task->sequence];
    struct host_attend t = {
        .sequence = q,
        .layer = layer,
        .head = task->head,
        .row0 = task->row0,
        .rows = task->rows,
        .pool = h->options.pool_base,
        .m = h->at.m + first * 4 * HD,
        .o = h->at.o + first * HD,
    };
    const uint32_t end = t.row0 + t.rows;
    if (q->append)
        append(h, q, layer, t.head, t.m, t.row0, end < n ? end : n);
    if (layer == h->model.geometry.layers - 1 && !h->pass.every_row && t.row0 < n) {
        t.row0 = end < n ? end : n;
        t.rows = end - t.row0;
    }
    if (t.rows)
        h->math->attend(h->weights, &t, scratch);
}

/* One task of a phase. */
static void run_task(struct host *h, uint32_t phase, uint32_t task, struct host_scratch *scratch)
{
    if (phase % 2) {
        attend_task(h, phase / 2, &h->tasks[task], scratch);
        return;
    }
    const uint32_t row0 = task * HOST_BLOCK_ROWS, left = h->pass.rows - row0;
    row_task(h, phase / 2, row0, left < HOST_BLOCK_ROWS ? left : HOST_BLOCK_ROWS, scratch);
}

static bool time_is_up(uint64_t deadline_ns)
{
    return deadline_ns != UINT64_MAX && skv_now_ns() >= deadline_ns;
}

/* Waits for what opens `phase`: a gate, if it is to touch pages. False: the deadline came first. */
static bool may_enter(struct host *h, uint32_t phase, uint64_t deadline_ns)
{
    const uint32_t layer = phase / 2;
    if (!h->pass.gated || phase % 2 == 0 || layer == h->model.geometry.layers)
        return true;
    for (uint64_t now = skv_now_ns();; now = skv_now_ns()) {
        uint64_t left_ms = deadline_ns > now ? (deadline_ns - now) / 1000000u + 1 : 0;
        if (skv_gate_wait(&h->options.gate_row[layer], left_ms < 1000 ? (uint32_t)left_ms : 1000) ==
            0)
            return true;
        if (left_ms == 0)
            return false;
        skv_debug("layer %u still waits for its gate", layer);
    }
}

/* Runs the pass from me->phase on. False: the deadline came first. Only the waiter has one, and
 * only the waiter waits for gates: the barrier behind holds back the others. */
static bool run_pass(struct host *h, struct worker *me, uint64_t deadline_ns)
{
    const uint32_t last = 2 * h->model.geometry.layers;
    const uint32_t blocks = (h->pass.rows + HOST_BLOCK_ROWS - 1) / HOST_BLOCK_ROWS;
    for (; me->phase <= last; me->phase++) {
        uint32_t tasks = me->phase % 2 ? h->pass.tasks : blocks, task;
        while (take(h, me->phase, tasks, &task)) {
            run_task(h, me->phase, task, &me->scratch);
            if (time_is_up(deadline_ns))
                return false;
        }
        if (me == h->workers && !may_enter(h, me->phase + 1, deadline_ns))
            return false;
        barrier(h);
    }
    return true;
}

static void *helper_main(void *argument)
{
    struct worker *me = argument;
    struct host *h = me->host;
    uint64_t seen = 0;
    pthread_mutex_lock(&h->lock);
    for (;;) {
        while (!h->closing && h->launches == seen)
            pthread_cond_wait(&h->wake, &h->lock);
        if (h->launches == seen)
            break;
        seen = h->launches;
        pthread_mutex_unlock(&h->lock);
        me->phase = 0;
        run_pass(h, me, UINT64_MAX);
        pthread_mutex_lock(&h->lock);
    }
    pthread_mutex_unlock(&h->lock);
    return NULL;
}

/* ---- launch and wait ---- */

/* Copies the sequences and derives what the tasks read. The runner has checked all of it. */
static void take_batch(struct host *h, const struct hstu_sequence *sequences, uint32_t count)
{
    const struct skv_geometry *g = &h->model.geometry;
    struct pass *p = &h->pass;
    *p = (struct pass){.count = count};
    uint32_t *pages = h->pages;
    for (uint32_t b = 0; b < count; b++) {
        struct hstu_sequence *q = &h->sequences[b];
        *q = sequences[b];
        const uint32_t n = q->history - q->cached, rows = n + q->targets;
        const uint32_t covered = q->append ? q->history : q->cached;
        const uint32_t page_count = (covered + g->page_tokens - 1) / g->page_tokens;
        h->first_row[b] = p->rows;
        if (page_count)
            memcpy(pages, q->pages, page_count * sizeof *pages);
        q->pages = pages;
        pages += page_count;
        if (rows)
            memcpy(h->tokens + p->rows, q->tokens, rows * sizeof *q->tokens);
        q->tokens = h->tokens + p->rows;
        for (uint32_t i = 0; i < rows; i++) {
            uint32_t r = p->rows + i;
            h->position[r] = hstu_position(i, q->cached, q->history, h->model.position_buckets);
            h->is_target[r] = i >= n;
            h->target[r] = i >= n ? p->targets++ : UINT32_MAX;
        }
        for (uint32_t row0 = 0; row0 < rows; row0 += HOST_QUERY_ROWS)
            for (uint32_t head = 0; head < g->heads; head++)
                h->tasks[p->tasks++] = (struct attend_task){
                    b, head, row0, rows - row0 < HOST_QUERY_ROWS ? rows - row0 : HOST_QUERY_ROWS};
        p->rows += rows;
    }
}

/* Maps what the pass appends to: one call a page instead of a fault for every 4 KiB of it. Only a
 * hint: where it fails, the appends fault. */
static void map_appends(const struct host *h)
{
    const struct skv_geometry *g = &h->model.geometry;
    const uintptr_t bytes = skv_page_bytes(g), unit = (uintptr_t)sysconf(_SC_PAGESIZE);
    for (uint32_t b = 0; b < h->pass.count; b++) {
        const struct hstu_sequence *q = &h->sequences[b];
        const uint32_t end = (q->history + g->page_tokens - 1) / g->page_tokens;
        for (uint32_t p = q->cached / g->page_tokens; q->append && p < end; p++) {
            uintptr_t from = (uintptr_t)h->options.pool_append_base + q->pages[p] * bytes;
            madvise((void *)(from & -unit), bytes + from % unit, MADV_POPULATE_WRITE);
        }
    }
}

static int start(struct host *h, const struct hstu_sequence *sequences, uint32_t count, bool gated,
                 bool every_row)
{
    if (h->running)
        return SKV_EBUSY;
    take_batch(h, sequences, count);
    h->pass.gated = gated;
    h->pass.every_row = every_row;
    map_appends(h);
    for (uint32_t i = 0; i < 2 * h->model.geometry.layers + 1; i++)
        atomic_store_explicit(&h->taken[i], 0, memory_order_relaxed);
    h->workers[0].phase = 0;
    h->running = true;
    pthread_mutex_lock(&h->lock);
    h->launches++;
    pthread_cond_broadcast(&h->wake);
    pthread_mutex_unlock(&h->lock);
    return 0;
}

static int host_launch(void *state, const struct hstu_sequence *sequences, uint32_t count,
                       bool gated)
{
    return start(state, sequences, count, gated, false);
}

static int host_wait(void *state, float *logits, uint32_t timeout_ms)
{
    struct host *h = state;
    if (!h->running)
        return SKV_EINVAL;
    if (!run_pass(h, h->workers, skv_now_ns() + timeout_ms * UINT64_C(1000000)))
        return SKV_ETIMEDOUT;
    h->running = false;
    if (logits)
        memcpy(logits, h->logits, (uint64_t)h->pass.targets * h->model.head_out * sizeof *logits);
    return 0;
}

static int host_debug(void *state, const struct hstu_sequence *sequences, uint32_t count,
                      float *block_out)
{
    struct host *h = state;
    int status = start(h, sequences, count, false, true);
    if (status != 0)
        return status;
    while ((status = host_wait(h, NULL, 60000)) == SKV_ETIMEDOUT)
        ;
    for (uint64_t i = 0; status == 0 && i < (uint64_t)h->pass.rows * h->model.embed; i++)
        block_out[i] = bf16_to_float(h->at.x[i]);
    return status;
}

/* ---- open and close ---- */

static void host_close(void *state)
{
    struct host *h = state;
    if (!h)
        return;
    if (h->running)
        run_pass(h, h->workers, UINT64_MAX);
    pthread_mutex_lock(&h->lock);
    h->closing = true;
    pthread_cond_broadcast(&h->wake);
    pthread_mutex_unlock(&h->lock);
    for (uint32_t i = 0; h->workers && i < h->threads; i++) {
        if (h->workers[i].started)
            pthread_join(h->workers[i].thread, NULL);
        host_scratch_close(&h->workers[i].scratch);
    }
    pthread_barrier_destroy(&h->phase);
    pthread_cond_destroy(&h->wake);
    pthread_mutex_destroy(&h->lock);
    host_model_close(h->weights);
    free(h->workers);
    free(h->sequences);
    free(h->first_row);
    free(h->tokens);
    free(h->pages);
    free(h->position);
    free(h->target);
    free(h->is_target);
    free(h->tasks);
    free(h->logits);
    free(h->at.x);
    free(h->at.m);
    free(h->at.o);
    free(h);
}

static void *room(struct host *h, uint64_t count, uint64_t size)
{
    h->arena_bytes += count * size;
    return calloc(count, size);
}

static int arena_open(struct host *h)
{
    const struct hstu_model *m = &h->model;
    const uint64_t rows = h->options.max_rows, batch = h->options.max_batch;
    const uint64_t HD = (uint64_t)m->geometry.heads * m->geometry.head_dim;
    const uint64_t tasks = (rows / HOST_QUERY_ROWS + batch) * m->geometry.heads;
    h->user_pages = SKV_MAX_TOKENS / m->geometry.page_tokens;
    h->sequences = room(h, batch, sizeof *h->sequences);
    h->first_row = room(h, batch, sizeof *h->first_row);
    h->tokens = room(h, rows, sizeof *h->tokens);
    h->pages = room(h, batch * h->user_pages, sizeof *h->pages);
    h->position = room(h, rows, sizeof *h->position);
    h->target = room(h, rows, sizeof *h->target);
    h->is_target = room(h, rows, sizeof *h->is_target);
    h->tasks = room(h, tasks, sizeof *h->tasks);
    h->logits = room(h, rows * m->head_out, sizeof *h->logits);
    h->at.x = room(h, rows * m->embed, sizeof *h->at.x);
    h->at.m = room(h, rows * 4 * HD, sizeof *h->at.m);
    h->at.o = room(h, rows * HD, sizeof *h->at.o);
    bool all = h->sequences && h->first_row && h->tokens && h->pages && h->position && h->target &&
               h->is_target && h->tasks && h->logits && h->at.x && h->at.m && h->at.o;
    return all ? 0 : SKV_ENOMEM;
}

static int workers_open(struct host *h)
{
    h->workers = calloc(h->threads, sizeof *h->workers);
    if (!h->workers)
        return SKV_ENOMEM;
    for (uint32_t i = 0; i < h->threads; i++) {
        struct worker *w = &h->workers[i];
        w->host = h;
        if (host_scratch_open(&h->model, &w->scratch) != 0)
            return SKV_ENOMEM;
        h->arena_bytes += w->scratch.bytes;
        if (i == 0)
            continue;
        int error = pthread_create(&w->thread, NULL, helper_main, w);
        if (error) {
            skv_error("pthread_create: %s", strerror(error));
            return SKV_ENOMEM;
        }
        w->started = true;
    }
    return 0;
}

static int host_open(const struct hstu_runner_options *options, void **state)
{
    const struct host_math *math = host_math_choose();
    if (!math)
        return SKV_ENOTSUP;
    struct host *h = calloc(1, sizeof *h);
    if (!h)
        return SKV_ENOMEM;
    h->options = *options;
    if (!options->pool_append_base)
        h->options.pool_append_base = options->pool_base;
    h->model = options->weights->model;
    h->math = math;
    h->threads = options->threads ? options->threads : 1;
    pthread_barrier_init(&h->phase, NULL, h->threads);
    pthread_mutex_init(&h->lock, NULL);
    pthread_cond_init(&h->wake, NULL);

    int status = arena_open(h);
    if (status == 0)
        status = host_model_open(options->weights, math->pair, &h->weights);
    if (status == 0)
        status = workers_open(h);
    if (status != 0) {
        skv_error("host runner: %s", skv_strerror(status));
        host_close(h);
        return status;
    }
    *state = h;
    return 0;
}

static void host_footprint(const void *state, struct hstu_footprint *out)
{
    const struct host *h = state;
    *out =
        (struct hstu_footprint){.weights_bytes = h->weights->bytes, .arena_bytes = h->arena_bytes};
}

const struct hstu_backend hstu_backend_host = {
    .name = "host",
    .open = host_open,
    .close = host_close,
    .launch = host_launch,
    .wait = host_wait,
    .debug = host_debug,
    .footprint = host_footprint,
};
