/* A CUDA runner of a small model for a test: its pool, tokens and page ids, NaN wherever nothing
 * was written, prefixes by the reference. */
#ifndef LAYERS_RIG_H
#define LAYERS_RIG_H

#include "cuda_bed.h"

#include <stdio.h>

#include "device.h"

enum { MAX_SEQUENCES = 8, POOL_PAGES = 256, MAX_ROWS = 4608 };

struct rig {
    struct hstu_model model;
    struct hstu_weights *weights;
    struct skv_device *device;
    struct hstu_cuda *runner;
    uint64_t page_elements;
    uint16_t *pool; /* on the host */
    void *on_pool;
    uint32_t *gates;
    uint64_t tokens[65536];
    uint32_t pages[POOL_PAGES];
    uint32_t pages_used;
};

static inline struct hstu_model small_model(uint32_t head_dim, uint32_t page_tokens)
{
    return (struct hstu_model){
        .geometry = {.layers = 2, .heads = 2, .head_dim = head_dim, .page_tokens = page_tokens},
        .embed = 192,
        .scaling_length = 512,
        .group = 1,
        .position_buckets = 1024,
        .embedding_rows = 4096,
        .head_hidden = 100,
        .head_out = 3,
        .eps = 1e-5f};
}

/* NULL: the path that HSTU_KERNELS named when the test began, or else the device's own. */
static inline void choose_kernels(const char *kernels)
{
    static bool known;
    static char named[32];
    const char *name = getenv("HSTU_KERNELS");
    if (!known)
        snprintf(named, sizeof named, "%s", name ? name : "");
    known = true;
    name = kernels ? kernels : named;
    *name ? setenv("HSTU_KERNELS", name, 1) : unsetenv("HSTU_KERNELS");
}

static inline struct rig *rig_open(struct hstu_model model, const char *kernels)
{
    struct rig *r = calloc(1, sizeof *r);
    r->model = model;
    choose_kernels(kernels);
    cr_assert_eq(hstu_weights_random(&model, 42, &r->weights), SKV_OK);
    cr_assert_eq(skv_device_open("cuda", &r->device), SKV_OK);
    CUDA(cudaSetDevice(skv_device_info(r->device)->ordinal));
    r->page_elements = skv_page_bytes(&model.geometry) / 2;
    r->pool = malloc(POOL_PAGES * r->page_elements * 2);
    memset(r->pool, 0xff, POOL_PAGES * r->page_elements * 2);
    r->on_pool = on_device(r->pool, POOL_PAGES * r->page_elements * 2);
    cr_assert_eq(skv_pinned_alloc(r->device, 4096, (void **)&r->gates), SKV_OK);
    uint64_t x = 88172645463325252u;
    for (size_t i = 0; i < sizeof r->tokens / sizeof *r->tokens; i++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        r->tokens[i] = x;
    }
    for (uint32_t i = 0; i < POOL_PAGES; i++)
        r->pages[i] = (i * 101 + 7) % POOL_PAGES; /* odd: a permutation */
    struct hstu_runner_options options = {.weights = r->weights,
                                          .device = r->device,
                                          .pool_base = r->on_pool,
                                          .pool_pages = POOL_PAGES,
                                          .max_rows = MAX_ROWS,
                                          .max_batch = MAX_SEQUENCES,
                                          .gate_row = r->gates};
    void *state;
    cr_assert_eq(hstu_backend_cuda.open(&options, &state), SKV_OK);
    r->runner = state;
    cr_assert_eq(hstu_cuda_poison(r->runner), SKV_OK);
    return r;
}

static inline void rig_close(struct rig *r)
{
    hstu_backend_cuda.close(r->runner);
    cudaFree(r->on_pool);
    skv_pinned_free(r->device, r->gates);
    skv_device_close(r->device);
    hstu_weights_close(r->weights);
    free(r->pool);
    free(r);
}

static inline uint32_t rows_of(const struct hstu_sequence *s)
{
    return s->history - s->cached + s->targets;
}

static inline uint32_t rows_of_all(const struct hstu_sequence *s, uint32_t count)
{
    uint32_t rows = 0;
    for (uint32_t b = 0; b < count; b++)
        rows += rows_of(&s[b]);
    return rows;
}

/* User `user`'s tokens lie at tokens[4096 * user]: h of history, then candidates. */
static inline struct hstu_sequence sequence(struct rig *r, uint32_t user, uint32_t history,
                                            uint32_t cached, uint32_t targets, bool append)
{
    const uint32_t S = r->model.geometry.page_tokens;
    uint32_t *pages = r->pages + r->pages_used;
    r->pages_used += (history + S - 1) / S;
    cr_assert_leq(r->pages_used, POOL_PAGES);
    return (struct hstu_sequence){.history = history,
                                  .cached = cached,
                                  .targets = targets,
                                  .append = append,
                                  .pages = pages,
                                  .tokens = r->tokens + 4096 * user + cached};
}

/* Writes the cached prefix of a sequence to its pages, on host and device, by the reference. */
static inline void prefill(struct rig *r, const struct hstu_sequence *s)
{
    struct hstu_sequence before = *s;
    before.tokens = s->tokens - s->cached;
    before.history = s->cached;
    before.cached = before.targets = 0;
    before.append = true;
    if (!s->cached)
        return;
    cr_assert_eq(hstu_reference_pass(r->weights, &before, 1, r->pool, true, NULL, NULL), SKV_OK);
    CUDA(
        cudaMemcpy(r->on_pool, r->pool, POOL_PAGES * r->page_elements * 2, cudaMemcpyHostToDevice));
}

/* The paths that most tests run with, as choose_kernels() takes them. */
static const char *const both[] = {"portable", NULL};

#endif
