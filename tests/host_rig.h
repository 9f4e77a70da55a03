/* What the tests of the host layers share: a small model, a runner on a poisoned pool, and users
 * whose pages lie scattered in it. */
#ifndef HOST_RIG_H
#define HOST_RIG_H

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"
#include "hstu.h"
#include "layers.h"

struct rig {
    struct hstu_weights *weights;
    struct skv_device *device;
    struct hstu_runner *runner;
    uint16_t *pool;
    uint64_t pool_pages, page_values; /* values: uint16_t */
    uint32_t gates[SKV_MAX_LAYERS + 1];
};

/* The head has odd widths, so that padding columns are met. */
static inline struct hstu_model small_model(uint32_t layers, uint32_t head_dim,
                                            uint32_t page_tokens, uint32_t group)
{
    return (struct hstu_model){.geometry = {.layers = layers,
                                            .heads = 2,
                                            .head_dim = head_dim,
                                            .page_tokens = page_tokens},
                               .embed = 64,
                               .scaling_length = 256,
                               .group = group,
                               .position_buckets = 4096,
                               .embedding_rows = 1024,
                               .head_hidden = 70,
                               .head_out = 3,
                               .eps = 1e-5f};
}

static inline uint64_t test_mix(uint64_t x)
{
    x = (x + UINT64_C(0x9e3779b97f4a7c15)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 29)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 32);
}

static inline void rig_open(struct rig *rig, const struct hstu_model *model, uint64_t pool_pages,
                            uint32_t max_rows, uint32_t threads)
{
    *rig =
        (struct rig){.pool_pages = pool_pages, .page_values = skv_page_bytes(&model->geometry) / 2};
    cr_assert_eq(hstu_weights_random(model, 7, &rig->weights), 0);
    cr_assert_eq(skv_device_open("host", &rig->device), 0);
    rig->pool = malloc(pool_pages * rig->page_values * sizeof *rig->pool);
    memset(rig->pool, 0xff, pool_pages * rig->page_values * sizeof *rig->pool); /* NaN */
    struct hstu_runner_options options = {.weights = rig->weights,
                                          .device = rig->device,
                                          .pool_base = rig->pool,
                                          .pool_pages = pool_pages,
                                          .max_rows = max_rows,
                                          .max_batch = 8,
                                          .gate_row = rig->gates,
                                          .threads = threads};
    cr_assert_eq(hstu_runner_open(&options, &rig->runner), 0);
}

static inline void rig_close(struct rig *rig)
{
    hstu_runner_close(rig->runner);
    skv_device_close(rig->device);
    hstu_weights_close(rig->weights);
    free(rig->pool);
}

/* A user: tokens of history and candidates, and a page list that no order explains. */
struct user {
    uint32_t history, targets;
    uint64_t *tokens; /* [history + targets] */
    uint32_t *pages;  /* [ceil(history / S)] */
};

/* Takes pages first, first + stride, ... backwards; users with the same stride and another first
 * are interleaved. */
static inline struct user user_new(const struct rig *rig, uint64_t seed, uint32_t history,
                                   uint32_t targets, uint32_t first, uint32_t stride)
{
    const uint32_t S = rig->weights->model.geometry.page_tokens, count = (history + S - 1) / S;
    struct user u = {.history = history,
                     .targets = targets,
                     .tokens = malloc((history + targets + 1) * sizeof *u.tokens),
                     .pages = malloc((count + 1) * sizeof *u.pages)};
    for (uint32_t i = 0; i < history + targets; i++)
        u.tokens[i] = test_mix(seed * 1000003 + i);
    for (uint32_t i = 0; i < count; i++) {
        u.pages[i] = first + (count - 1 - i) * stride;
        cr_assert_lt(u.pages[i], rig->pool_pages);
    }
    return u;
}

static inline void user_free(struct user *u)
{
    free(u->tokens);
    free(u->pages);
}

/* The user's request with `cached` tokens cached. */
static inline struct hstu_sequence user_sequence(const struct user *u, uint32_t cached, bool append)
{
    return (struct hstu_sequence){.history = u->history,
                                  .cached = cached,
                                  .targets = u->targets,
                                  .append = append,
                                  .pages = u->pages,
                                  .tokens = u->tokens + cached};
}

static inline void rig_run(struct rig *rig, const struct hstu_sequence *sequences, uint32_t count,
                           float *logits)
{
    cr_assert_eq(hstu_runner_launch(rig->runner, sequences, count, false), 0);
    cr_assert_eq(hstu_runner_wait(rig->runner, logits, 60000), 0);
}

/* Brings tokens [from, to) of a user into its pages, with no candidates. */
static inline void rig_append(struct rig *rig, const struct user *u, uint32_t from, uint32_t to)
{
    struct hstu_sequence q = {.history = to,
                              .cached = from,
                              .append = true,
                              .pages = u->pages,
                              .tokens = u->tokens + from};
    rig_run(rig, &q, 1, NULL);
}

static inline float *logits_new(const struct rig *rig, uint32_t targets)
{
    float *logits = malloc((targets * rig->weights->model.head_out + 1) * sizeof *logits);
    memset(logits, 0xff, targets * rig->weights->model.head_out * sizeof *logits);
    return logits;
}

static inline size_t logits_bytes(const struct rig *rig, uint32_t targets)
{
    return (size_t)targets * rig->weights->model.head_out * sizeof(float);
}

/* The user's scores without any cache. */
static inline float *uncached(struct rig *rig, const struct user *u)
{
    struct hstu_sequence q = user_sequence(u, 0, false);
    float *logits = logits_new(rig, u->targets);
    rig_run(rig, &q, 1, logits);
    for (uint32_t i = 0; i < u->targets * rig->weights->model.head_out; i++)
        cr_assert(logits[i] == logits[i], "a score is NaN");
    return logits;
}

#endif
