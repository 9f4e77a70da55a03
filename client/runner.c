/* libsidekv-hstu's front: checks what it is told, picks the backend of the device's kind, forwards.
 * A batch is checked whole before anything of it is launched. */
#include "hstu.h"

#include <stdlib.h>

#include "device.h"
#include "layers.h"
#include "log.h"

struct hstu_runner {
    const struct hstu_backend *backend;
    void *state;
    struct skv_geometry geometry;
    bool has_pool, has_gates;
    uint64_t pool_pages;
    uint32_t max_rows, max_batch;
};

static const struct hstu_backend *const backends[] = {
    [SKV_DEVICE_HOST] = &hstu_backend_host,
    [SKV_DEVICE_CUDA] = &hstu_backend_cuda,
};

int hstu_runner_open(const struct hstu_runner_options *options, struct hstu_runner **out)
{
    const struct hstu_runner_options *o = options;
    if (!o->weights || !o->device || hstu_model_check(&o->weights->model) != 0)
        return SKV_EINVAL;
    if (o->max_rows == 0 || o->max_batch == 0 || o->max_batch > SKV_MAX_BATCH)
        return SKV_EINVAL;
    if ((o->pool_base == NULL) != (o->pool_pages == 0))
        return SKV_EINVAL;

    struct hstu_runner *r = calloc(1, sizeof *r);
    if (!r)
        return SKV_ENOMEM;
    *r = (struct hstu_runner){
        .backend = backends[skv_device_info(o->device)->kind],
        .geometry = o->weights->model.geometry,
        .has_pool = o->pool_base != NULL,
        .has_gates = o->gate_row != NULL,
        .pool_pages = o->pool_pages,
        .max_rows = o->max_rows,
        .max_batch = o->max_batch,
    };
    int status = r->backend->open(o, &r->state);
    if (status != 0) {
        free(r);
        return status;
    }
    *out = r;
    return 0;
}

void hstu_runner_close(struct hstu_runner *runner)
{
    if (!runner)
        return;
    runner->backend->close(runner->state);
    free(runner);
}

/* 0, or SKV_EINVAL with the reason logged. */
static int check_sequence(const struct hstu_runner *r, uint32_t index,
                          const struct hstu_sequence *q)
{
    const char *wrong = NULL;
    if (q->history > SKV_MAX_TOKENS)
        wrong = "a history beyond SKV_MAX_TOKENS";
    else if (q->cached > q->history)
        wrong = "more cached tokens than history";
    else if (!r->has_pool && (q->cached || q->append))
        wrong = "cached tokens or an append, but the runner has no pool";
    else if (q->history - q->cached + (uint64_t)q->targets && !q->tokens)
        wrong = "no tokens";
    if (wrong) {
        skv_error("runner: sequence %u has %s", index, wrong);
        return SKV_EINVAL;
    }

    const uint32_t covered = q->append ? q->history : q->cached;
    const uint32_t count = (covered + r->geometry.page_tokens - 1) / r->geometry.page_tokens;
    if (count && !q->pages) {
        skv_error("runner: sequence %u has no page list", index);
        return SKV_EINVAL;
    }
    for (uint32_t i = 0; i < count; i++)
        if (q->pages[i] >= r->pool_pages) {
            skv_error("runner: sequence %u names page %u, the pool has %llu", index, q->pages[i],
                      (unsigned long long)r->pool_pages);
            return SKV_EINVAL;
        }
    return 0;
}

static int check_batch(const struct hstu_runner *r, const struct hstu_sequence *sequences,
                       uint32_t count, bool gated)
{
    uint64_t rows = 0;
    if (count > r->max_batch || (gated && !r->has_gates)) {
        skv_error(gated && !r->has_gates ? "runner: a gated pass, but no gate row"
                                         : "runner: more sequences than max_batch");
        return SKV_EINVAL;
    }
    for (uint32_t i = 0; i < count; i++) {
        if (check_sequence(r, i, &sequences[i]) != 0)
            return SKV_EINVAL;
        rows += sequences[i].history - sequences[i].cached + (uint64_t)sequences[i].targets;
    }
    if (rows > r->max_rows) {
        skv_error("runner: %llu rows, at most %u", (unsigned long long)rows, r->max_rows);
        return SKV_EINVAL;
    }
    return 0;
}

int hstu_runner_launch(struct hstu_runner *runner, const struct hstu_sequence *sequences,
                       uint32_t count, bool gated)
{
    int status = check_batch(runner, sequences, count, gated);
    return status ? status : runner->backend->launch(runner->state, sequences, count, gated);
}

int hstu_runner_wait(struct hstu_runner *runner, float *logits, uint32_t timeout_ms)
{
    return runner->backend->wait(runner->state, logits, timeout_ms);
}

int hstu_runner_debug(struct hstu_runner *runner, const struct hstu_sequence *sequences,
                      uint32_t count, float *block_out)
{
    int status = check_batch(runner, sequences, count, false);
    return status ? status : runner->backend->debug(runner->state, sequences, count, block_out);
}

void hstu_runner_footprint(const struct hstu_runner *runner, struct hstu_footprint *out)
{
    runner->backend->footprint(runner->state, out);
}
