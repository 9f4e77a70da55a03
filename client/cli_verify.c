/* Recomputes and compares. The private pages are an allocation of the worker's own, laid out like
 * the pool, so that the recomputation writes its K and V there by the ordinary append, and a page
 * of one can be held against a page of the other. Pages of both come to the host through a stream,
 * a few at a time. */
#include "cli_verify.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"
#include "layers.h"
#include "log.h"

#define COMPARE_BYTES   (UINT64_C(4) << 20) /* of pages on the host at a time, of each kind */
#define COPY_TIMEOUT_MS 30000u

struct replay_verify {
    struct replay_verify_options options;
    struct skv_geometry geometry;
    bool exact; /* the host: any bit that differs is wrong */
    struct hstu_runner *runner;
    struct skv_stream *stream;
    void *pages;            /* device: private pages, [page_count] */
    uint32_t page_count;    /* of a whole history */
    uint32_t *page_ids;     /* 0, 1, 2, ... */
    uint32_t compare_pages; /* pages compared at a time */
    uint16_t *host;         /* pinned: [2][compare_pages] */
    uint64_t *tokens;       /* [history + candidates] */
    float *logits;          /* [candidates][head_out] */
};

int replay_verify_open(const struct replay_verify_options *options, struct replay_verify **out)
{
    const struct hstu_model *model = &options->weights->model;
    const struct skv_geometry *g = &model->geometry;
    struct replay_verify *v = calloc(1, sizeof *v);
    if (!v)
        return SKV_ENOMEM;
    v->options = *options;
    v->geometry = *g;
    v->exact = skv_device_info(options->device)->kind == SKV_DEVICE_HOST;
    v->page_count = (options->history + g->page_tokens - 1) / g->page_tokens;
    v->compare_pages = (uint32_t)(COMPARE_BYTES / skv_page_bytes(g));
    if (v->compare_pages == 0)
        v->compare_pages = 1;

    int rc = SKV_ENOMEM;
    v->page_ids = calloc(v->page_count, sizeof *v->page_ids);
    v->tokens = calloc(options->history + options->candidates, sizeof *v->tokens);
    v->logits = calloc((size_t)options->candidates * model->head_out, sizeof *v->logits);
    if (!v->page_ids || !v->tokens || !v->logits)
        goto fail;
    for (uint32_t i = 0; i < v->page_count; i++)
        v->page_ids[i] = i;
    rc = skv_device_alloc(options->device, v->page_count * skv_page_bytes(g), &v->pages);
    if (rc)
        goto fail;
    void *host = NULL;
    rc = skv_pinned_alloc(options->device, 2 * v->compare_pages * skv_page_bytes(g), &host);
    if (rc)
        goto fail;
    v->host = host;
    rc = skv_stream_open(options->device, &v->stream);
    if (rc)
        goto fail;
    rc = hstu_runner_open(
        &(struct hstu_runner_options){.weights = options->weights,
                                      .device = options->device,
                                      .pool_base = v->pages,
                                      .pool_pages = v->page_count,
                                      .max_rows = options->history + options->candidates,
                                      .max_batch = 1,
                                      .threads = options->threads},
        &v->runner);
    if (rc)
        goto fail;
    *out = v;
    return 0;
fail:
    replay_verify_close(v);
    return rc;
}

void replay_verify_close(struct replay_verify *v)
{
    if (!v)
        return;
    hstu_runner_close(v->runner);
    if (v->stream)
        skv_stream_close(v->stream);
    if (v->host)
        skv_pinned_free(v->options.device, v->host);
    if (v->pages)
        skv_device_free(v->options.device, v->pages);
    free(v->page_ids);
    free(v->tokens);
    free(v->logits);
    free(v);
}

/* ---- scores ---- */

static void compare_logits(const struct replay_verify *v, const struct replay_served *served,
                           struct work_result *result)
{
    uint32_t count = served->targets * v->options.weights->model.head_out;
    for (uint32_t i = 0; i < count; i++) {
        float cached = served->logits[i], fresh = v->logits[i];
        float difference = fabsf(cached - fresh);
        bool wrong = v->exact ? memcmp(&cached, &fresh, sizeof cached) != 0
                              : difference > WORK_CUDA_LOGIT_TOLERANCE;
        if (!isfinite(cached) || !isfinite(fresh))
            wrong = true;
        else if (difference > result->max_abs_diff)
            result->max_abs_diff = difference;
        result->scores_wrong += wrong;
    }
    result->scores_checked += count;
}

/* ---- rows ---- */

/* One row: K or V of one token in one layer, all heads. */
static void compare_row(const struct replay_verify *v, const uint16_t *cached,
                        const uint16_t *fresh, uint32_t layer, uint32_t kv, uint32_t slot,
                        struct work_result *result)
{
    const struct skv_geometry *g = &v->geometry;
    float largest = 0, difference = 0;
    bool same = true, finite = true;
    for (uint32_t head = 0; head < g->heads; head++) {
        uint64_t at = hstu_page_offset(g, layer, kv, head, slot);
        if (memcmp(cached + at, fresh + at, g->head_dim * sizeof *cached) == 0 && v->exact)
            continue;
        for (uint32_t d = 0; d < g->head_dim; d++) {
            float a = bf16_to_float(cached[at + d]), b = bf16_to_float(fresh[at + d]);
            same = same && cached[at + d] == fresh[at + d];
            finite = finite && isfinite(a) && isfinite(b);
            largest = fmaxf(largest, fabsf(b));
            difference = fmaxf(difference, fabsf(a - b));
        }
    }
    bool wrong = !finite || (v->exact ? !same : difference > WORK_CUDA_ROW_TOLERANCE * largest);
    result->rows_wrong += wrong;
    if (finite && difference > 0) {
        float relative = largest > 0 ? difference / largest : INFINITY;
        result->max_row_diff = fmaxf(result->max_row_diff, relative);
    }
}

static void compare_page(const struct replay_verify *v, const uint16_t *cached,
                         const uint16_t *fresh, uint32_t slots, struct work_result *result)
{
    const struct skv_geometry *g = &v->geometry;
    result->rows_checked += 2 * g->layers * slots;
    if (v->exact && slots == g->page_tokens && memcmp(cached, fresh, skv_page_bytes(g)) == 0)
        return; /* the same bits; were any not finite, the scores would tell */
    for (uint32_t layer = 0; layer < g->layers; layer++)
        for (uint32_t kv = 0; kv < 2; kv++)
            for (uint32_t slot = 0; slot < slots; slot++)
                compare_row(v, cached, fresh, layer, kv, slot, result);
}

/* `count` pages of the served request from page `first` of its list on, and of the private ones,
 * onto the host. */
static int fetch_pages(struct replay_verify *v, const struct replay_served *served, uint32_t first,
                       uint32_t count)
{
    const uint64_t bytes = skv_page_bytes(&v->geometry);
    char *host = (char *)v->host;
    struct skv_copy copies[2];
    uint64_t mark;
    int rc = 0;
    for (uint32_t i = 0; !rc && i < count; i++) {
        copies[0] =
            (struct skv_copy){.dst = host + i * bytes,
                              .src = (const char *)served->pool + served->pages[first + i] * bytes,
                              .bytes = bytes};
        copies[1] = (struct skv_copy){.dst = host + (v->compare_pages + i) * bytes,
                                      .src = (const char *)v->pages + (first + i) * bytes,
                                      .bytes = bytes};
        rc = skv_stream_copy(v->stream, SKV_TO_HOST, copies, 2);
    }
    if (!rc)
        rc = skv_stream_mark(v->stream, &mark);
    if (!rc)
        rc = skv_stream_wait(v->stream, mark, COPY_TIMEOUT_MS);
    return rc;
}

static int compare_rows(struct replay_verify *v, const struct replay_served *served,
                        struct work_result *result)
{
    const uint32_t S = v->geometry.page_tokens, pages = (served->cached + S - 1) / S;
    const uint64_t elements = skv_page_bytes(&v->geometry) / sizeof *v->host;
    for (uint32_t first = 0; first < pages; first += v->compare_pages) {
        uint32_t count = pages - first < v->compare_pages ? pages - first : v->compare_pages;
        int rc = fetch_pages(v, served, first, count);
        if (rc)
            return rc;
        for (uint32_t i = 0; i < count; i++) {
            uint32_t left = served->cached - (first + i) * S;
            compare_page(v, v->host + i * elements, v->host + (v->compare_pages + i) * elements,
                         left < S ? left : S, result);
        }
    }
    return 0;
}

int replay_verify_check(struct replay_verify *v, const struct replay_served *served,
                        struct work_result *result)
{
    memcpy(v->tokens, served->tokens, (served->history + served->targets) * sizeof *served->tokens);
    if (served->flip && served->cached > 0) {
        v->tokens[served->cached / 2] ^= 1;
        result->flags |= WORK_FLIPPED;
    }
    struct hstu_sequence sequence = {.history = served->history,
                                     .targets = served->targets,
                                     .append = true,
                                     .pages = v->page_ids,
                                     .tokens = v->tokens};
    int rc = hstu_runner_launch(v->runner, &sequence, 1, false);
    if (!rc)
        rc = hstu_runner_wait(v->runner, v->logits, WORK_PASS_TIMEOUT_MS);
    if (rc)
        return rc;
    compare_logits(v, served, result);
    return compare_rows(v, served, result);
}
