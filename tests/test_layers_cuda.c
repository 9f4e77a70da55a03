/* Whole passes on CUDA against the reference, and the runner's own promises: what it appends, what
 * it refuses, graphs of several sizes in one arena. Most that compute run with the device's own
 * attention path and with the portable one, all with the one that HSTU_KERNELS names, if it does;
 * one also without cuBLASLt. Activations start as NaN (poisoned arena), free pages and slots past
 * the valid ones hold NaN. */
#include "layers_rig.h"

#include <stdio.h>

#include "device.h"

/* Of rows x [rows][columns] those of candidates, moved to the front. Returns how many values. */
static uint64_t keep_candidates(const struct hstu_sequence *s, uint32_t count, uint64_t columns,
                                float *x)
{
    uint64_t row = 0, kept = 0;
    for (uint32_t b = 0; b < count; b++) {
        row += s[b].history - s[b].cached;
        memmove(x + kept * columns, x + row * columns, s[b].targets * columns * sizeof *x);
        row += s[b].targets;
        kept += s[b].targets;
    }
    return kept * columns;
}

/* A pass as a worker runs it: the last layer computes what candidates need and no more. Everything
 * on the device but weights and pages is NaN before. Out: the candidates' rows; their logits,
 * unless NULL. */
static void serve(struct hstu_cuda *c, const struct hstu_sequence *s, uint32_t count,
                  float *candidates, float *logits)
{
    cr_assert_not(c->every_row);
    cr_assert_eq(hstu_cuda_poison(c), SKV_OK);
    cr_assert_eq(hstu_backend_cuda.launch(c, s, count, false), SKV_OK);
    cr_assert_eq(hstu_backend_cuda.wait(c, logits, 10000), SKV_OK);
    const uint64_t elements = (uint64_t)c->rows * c->model.embed;
    uint16_t *x = to_host(c->arena.x, elements * 2 + 2);
    for (uint64_t i = 0; i < elements; i++)
        candidates[i] = bf16_to_float(x[i]);
    keep_candidates(s, count, c->model.embed, candidates);
    free(x);
}

/* Every row; logits of a pass as a worker runs it. */
static void run(struct rig *r, const struct hstu_sequence *s, uint32_t count, float *out,
                float *logits)
{
    if (logits)
        serve(r->runner, s, count, out, logits);
    cr_assert_eq(hstu_backend_cuda.debug(r->runner, s, count, out), SKV_OK);
}

static void check_distance(const struct hstu_cuda *c, struct distance d, const char *name,
                           const char *what)
{
    printf("%s, %s, %s, %s: max %.2f mean %.2f of the limit\n", name, c->path->name,
           hstu_cuda_products(c), what, d.max, d.mean);
    cr_assert(d.max <= 1 && d.mean <= 1, "%s, %s, %s: max %.2f mean %.2f of the limit", name,
              c->path->name, what, d.max, d.mean);
}

/* Block output, logits and appended pages of one batch, within the tolerance: every row, and as a
 * worker runs it. */
static void check_pass(struct rig *r, const struct hstu_sequence *s, uint32_t count,
                       const char *name)
{
    const uint64_t elements = (uint64_t)rows_of_all(s, count) * r->model.embed;
    const uint64_t pool_elements = POOL_PAGES * r->page_elements;
    float *x = malloc(elements * 4 + 4), *r32 = malloc(elements * 4 + 4);
    float *r16 = malloc(elements * 4 + 4), *served = malloc(elements * 4 + 4);
    const uint64_t outputs = MAX_ROWS * (uint64_t)r->model.head_out;
    float *scores = calloc(outputs, 4), *scores32 = calloc(outputs, 4);
    uint16_t *appended = malloc(pool_elements * 2), *served_pool = malloc(pool_elements * 2);
    uint16_t *pool32 = malloc(pool_elements * 2), *pool16 = malloc(pool_elements * 2);
    memcpy(pool32, r->pool, pool_elements * 2);
    cr_assert_eq(hstu_reference_pass(r->weights, s, count, pool32, false, r32, scores32), SKV_OK);
    memcpy(pool16, r->pool, pool_elements * 2);
    cr_assert_eq(hstu_reference_pass(r->weights, s, count, pool16, true, r16, NULL), SKV_OK);
    serve(r->runner, s, count, served, scores);
    CUDA(cudaMemcpy(served_pool, r->on_pool, pool_elements * 2, cudaMemcpyDeviceToHost));
    CUDA(cudaMemcpy(r->on_pool, r->pool, pool_elements * 2, cudaMemcpyHostToDevice));
    run(r, s, count, x, NULL);
    check_distance(r->runner, distance_of(x, r32, r16, elements, 0), name, "every row");
    keep_candidates(s, count, r->model.embed, r32);
    const uint64_t kept = keep_candidates(s, count, r->model.embed, r16);
    check_distance(r->runner, distance_of(served, r32, r16, kept, 0), name, "candidates");
    for (uint32_t i = 0; i < r->runner->candidates * r->model.head_out; i++)
        cr_assert_float_eq(scores[i], scores32[i], 0.05f, "%s: logit %u: %f, not %f", name, i,
                           scores[i], scores32[i]);
    /* What was appended is as near as everything else; every other byte is as it was. */
    float *kv = malloc(pool_elements * 12 + 12), *kv32 = kv + pool_elements;
    float *kv16 = kv32 + pool_elements;
    uint64_t written = 0;
    CUDA(cudaMemcpy(appended, r->on_pool, pool_elements * 2, cudaMemcpyDeviceToHost));
    for (uint64_t i = 0; i < pool_elements; i++) {
        if (pool16[i] == r->pool[i] && pool32[i] == r->pool[i]) {
            cr_assert_eq(appended[i], r->pool[i], "%s: page element %lu", name, (unsigned long)i);
            continue;
        }
        kv[written] = bf16_to_float(appended[i]);
        kv32[written] = bf16_to_float(pool32[i]);
        kv16[written++] = bf16_to_float(pool16[i]);
    }
    check_distance(r->runner, distance_of(kv, kv32, kv16, written, 0), name, "appended");
    cr_assert_eq(memcmp(served_pool, appended, pool_elements * 2), 0, "%s: pages differ", name);
    memcpy(r->pool, appended, pool_elements * 2);
    free(x), free(r32), free(r16), free(served), free(scores), free(scores32), free(appended);
    free(pool32), free(pool16), free(served_pool), free(kv);
}

static void check_model(struct hstu_model model, const char *kernels)
{
    const uint32_t S = model.geometry.page_tokens;
    char name[64];
    struct rig *r = rig_open(model, kernels);
    struct hstu_sequence s[] = {sequence(r, 0, 37, 0, 37, true),
                                sequence(r, 1, 0, 0, 5, false),
                                sequence(r, 2, 2 * S + 1, S, 3, true),
                                sequence(r, 3, S, S, 11, false),
                                sequence(r, 4, 3 * S + 5, S + 1, 0, true),
                                sequence(r, 5, 70, 2 * S - 1 < 70 ? 2 * S - 1 : 69, 1, true)};
    for (size_t b = 0; b < sizeof s / sizeof *s; b++)
        prefill(r, &s[b]);
    snprintf(name, sizeof name, "%u heads, D %u S %u g %u", model.geometry.heads,
             model.geometry.head_dim, S, model.group);
    check_pass(r, s, sizeof s / sizeof *s, name);
    rig_close(r);
}

Test(layers_cuda, a_pass_equals_the_reference_at_every_head_dim_page_size_and_group, .timeout = 120)
{
    NEED_GPU();
    for (int k = 0; k < 2; k++)
        for (uint32_t D = 64; D <= 256; D *= 2)
            for (uint32_t S = 16; S <= 128; S *= 2) {
                struct hstu_model model = small_model(D, S);
                model.group = 1 + S / 16 % 3;
                check_model(model, both[k]);
            }
}

/* The last layer is the first one too, or comes after several. */
Test(layers_cuda, a_pass_equals_the_reference_at_other_numbers_of_layers)
{
    NEED_GPU();
    for (int k = 0; k < 2; k++)
        for (uint32_t layers = 1; layers <= 3; layers += 2) {
            struct hstu_model model = small_model(128, 32);
            model.geometry.layers = layers;
            check_model(model, both[k]);
        }
}

Test(layers_cuda, a_pass_without_candidates_appends)
{
    NEED_GPU();
    for (int k = 0; k < 2; k++) {
        struct rig *r = rig_open(small_model(128, 32), both[k]);
        struct hstu_sequence s[2] = {sequence(r, 0, 100, 30, 0, true),
                                     sequence(r, 1, 200, 0, 0, true)};
        prefill(r, &s[0]);
        check_pass(r, s, 2, "no candidates");
        rig_close(r);
    }
}

/* Outputs for which Hopper's head has no room. */
Test(layers_cuda, a_pass_with_many_outputs_equals_the_reference)
{
    NEED_GPU();
    struct hstu_model model = small_model(64, 32);
    model.head_out = HSTU_HEAD_SM90_OUTPUTS + 1;
    check_model(model, NULL);
}

/* The gate shares rows of more than 1024, 2048 and 4096 columns out in ways of their own. */
Test(layers_cuda, a_pass_equals_the_reference_with_many_heads, .timeout = 120)
{
    static const uint32_t heads[] = {6, 9, 17};
    NEED_GPU();
    for (int k = 0; k < 2; k++)
        for (size_t i = 0; i < sizeof heads / sizeof *heads; i++) {
            struct hstu_model model = small_model(256, 32);
            model.geometry.heads = heads[i];
            check_model(model, both[k]);
        }
}

Test(layers_cuda, products_by_cublaslt_equal_the_reference)
{
    NEED_GPU();
    setenv("HSTU_PRODUCTS", "cublaslt", 1);
    check_model(small_model(128, 32), NULL);
}

Test(layers_cuda, products_without_cublaslt_equal_the_reference)
{
    NEED_GPU();
    setenv("HSTU_PRODUCTS", "cublaslt", 1);
    setenv("HSTU_CUBLASLT", "none", 1);
    check_model(small_model(128, 32), NULL);
}

Test(layers_cuda, a_variance_near_eps_shows_a_wrong_scaling_length)
{
    NEED_GPU();
    struct hstu_model model = small_model(64, 32);
    model.scaling_length = 65536; /* o is small: var(o) is of eps's order */
    check_model(model, NULL);
}

Test(layers_cuda, what_was_cached_equals_what_is_computed_anew)
{
    NEED_GPU();
    for (int k = 0; k < 2; k++) {
        struct rig *r = rig_open(small_model(128, 32), both[k]);
        const uint32_t E = r->model.embed, h = 300, T = 20;
        struct hstu_sequence whole = sequence(r, 0, h, 0, T, true);
        float *full = malloc((h + T) * E * 4), *part = malloc((h + T) * E * 4);
        float *r32 = malloc((h + T) * E * 4), *r16 = malloc((h + T) * E * 4);
        uint16_t *pool = malloc(POOL_PAGES * r->page_elements * 2);
        memcpy(pool, r->pool, POOL_PAGES * r->page_elements * 2);
        cr_assert_eq(hstu_reference_pass(r->weights, &whole, 1, pool, false, r32, NULL), SKV_OK);
        cr_assert_eq(hstu_reference_pass(r->weights, &whole, 1, pool, true, r16, NULL), SKV_OK);
        run(r, &whole, 1, full, NULL); /* appends all of it */
        const uint32_t splits[] = {1, 31, 32, 33, 150, 299, 300};
        for (size_t i = 0; i < sizeof splits / sizeof *splits; i++) {
            struct hstu_sequence rest = whole;
            rest.cached = splits[i];
            rest.tokens += splits[i];
            rest.append = false;
            run(r, &rest, 1, part, NULL);
            CHECK_NEAR(distance_of(part, r32 + splits[i] * E, r16 + splits[i] * E,
                                   (uint64_t)rows_of(&rest) * E, 0));
        }
        free(full), free(part), free(r32), free(r16), free(pool);
        rig_close(r);
    }
}

Test(layers_cuda, prefill_in_chunks_equals_one_shot)
{
    NEED_GPU();
    struct rig *r = rig_open(small_model(64, 16), NULL);
    const uint32_t E = r->model.embed, chunks[] = {1, 15, 17, 64, 100};
    struct hstu_sequence s = sequence(r, 0, 197, 0, 9, false), piece = s;
    float *x = malloc(256 * E * 4), *r32 = malloc(256 * E * 4), *r16 = malloc(256 * E * 4);
    cr_assert_eq(hstu_reference_pass(r->weights, &s, 1, NULL, false, r32, NULL), SKV_OK);
    cr_assert_eq(hstu_reference_pass(r->weights, &s, 1, NULL, true, r16, NULL), SKV_OK);
    piece.history = 0;
    for (size_t i = 0; i < 5; i++) {
        piece.cached = piece.history;
        piece.history += chunks[i];
        piece.tokens = s.tokens + piece.cached;
        piece.targets = i == 4 ? s.targets : 0;
        piece.append = true;
        run(r, &piece, 1, x, NULL);
        CHECK_NEAR(distance_of(x, r32 + piece.cached * E, r16 + piece.cached * E,
                               (uint64_t)rows_of(&piece) * E, 0));
    }
    cr_assert_eq(piece.history, s.history);
    free(x), free(r32), free(r16);
    rig_close(r);
}

Test(layers_cuda, batch_mates_and_padding_change_no_bit_within_a_size)
{
    NEED_GPU();
    for (int k = 0; k < 2; k++) {
        struct rig *r = rig_open(small_model(128, 32), both[k]);
        const uint64_t E = r->model.embed;
        struct hstu_sequence mine = sequence(r, 0, 130, 64, 10, false);
        struct hstu_sequence mates[3] = {sequence(r, 1, 200, 0, 40, false),
                                         sequence(r, 2, 90, 70, 10, false),
                                         sequence(r, 3, 17, 0, 3, false)};
        float *x = malloc(MAX_ROWS * E * 4), *y = malloc(MAX_ROWS * E * 4);
        float scores[30], others[256];
        prefill(r, &mine);
        prefill(r, &mates[1]);
        /* 76 rows of mine, 240, 30 and 20 of others: 316 to 366 rows, all in the graph of 384... */
        struct hstu_sequence one[2] = {mine, mates[0]},
                             two[4] = {mine, mates[1], mates[2], mates[0]};
        struct hstu_sequence three[2] = {mates[0], mine};
        run(r, one, 2, x, others);
        memcpy(scores, others, sizeof scores);
        uint32_t size, again, index;
        size = hstu_cuda_graph_rows(rows_of_all(one, 2), &index);
        two[3].targets = 0, two[3].history = 180;
        again = hstu_cuda_graph_rows(rows_of_all(two, 4), &index);
        cr_assert_eq(size, again, "the test's own sizes: %u %u", size, again);
        cr_assert_eq(hstu_cuda_poison(r->runner), SKV_OK);
        run(r, two, 4, y, others);
        cr_expect_eq(memcmp(x, y, rows_of(&mine) * E * 4), 0, "other mates");
        cr_expect_eq(memcmp(scores, others, sizeof scores), 0, "other mates' scores");
        run(r, three, 2, y, NULL);
        cr_expect_eq(memcmp(x, y + rows_of(&mates[0]) * E, rows_of(&mine) * E * 4), 0,
                     "another place in the batch");
        /* A mate whose cached rows are NaN, so that all its outputs are. */
        for (uint32_t i = 0; i < 3; i++)
            CUDA(cudaMemset((uint16_t *)r->on_pool + mates[1].pages[i] * r->page_elements, 0xff,
                            r->page_elements * 2));
        run(r, two, 4, y, NULL);
        cr_expect_eq(memcmp(x, y, rows_of(&mine) * E * 4), 0, "a mate of NaN");
        cr_expect(isnan(y[rows_of(&mine) * E]), "the mate is NaN");
        free(x), free(y);
        rig_close(r);
    }
}

Test(layers_cuda, permuting_candidates_permutes_their_outputs)
{
    NEED_GPU();
    struct rig *r = rig_open(small_model(256, 32), NULL);
    const uint64_t E = r->model.embed;
    struct hstu_sequence s = sequence(r, 0, 50, 0, 40, false), t = s;
    uint64_t tokens[90];
    float *x = malloc(90 * E * 4), *y = malloc(90 * E * 4);
    float *r32 = malloc(90 * E * 4), *r16 = malloc(90 * E * 4);
    memcpy(tokens, s.tokens, sizeof tokens);
    for (uint32_t i = 0; i < 40; i++)
        tokens[50 + i] = s.tokens[50 + 39 - i];
    t.tokens = tokens;
    cr_assert_eq(hstu_reference_pass(r->weights, &s, 1, NULL, false, r32, NULL), SKV_OK);
    cr_assert_eq(hstu_reference_pass(r->weights, &s, 1, NULL, true, r16, NULL), SKV_OK);
    run(r, &s, 1, x, NULL);
    run(r, &t, 1, y, NULL);
    for (uint32_t i = 0; i < 40; i++)
        memcpy(x + (50 + i) * E, y + (50 + 39 - i) * E, E * 4);
    CHECK_NEAR(distance_of(x, r32, r16, 90 * E, 0));
    free(x), free(y), free(r32), free(r16);
    rig_close(r);
}

Test(layers_cuda, sizes_one_after_another_share_a_poisoned_arena)
{
    NEED_GPU();
    struct rig *r = rig_open(small_model(64, 32), NULL);
    struct hstu_sequence large[2] = {sequence(r, 0, 700, 0, 37, false),
                                     sequence(r, 1, 300, 100, 5, false)};
    struct hstu_sequence small = sequence(r, 2, 40, 0, 3, true);
    prefill(r, &large[1]);
    check_pass(r, large, 2, "large");
    check_pass(r, &small, 1, "small after large");
    check_pass(r, large, 2, "large after small");
    struct hstu_footprint footprint;
    hstu_backend_cuda.footprint(r->runner, &footprint);
    cr_expect_eq(footprint.graphs, 2);
    rig_close(r);
}

Test(layers_cuda, an_empty_batch_is_fine_and_a_wrong_one_is_refused)
{
    NEED_GPU();
    struct rig *r = rig_open(small_model(64, 32), NULL);
    struct hstu_sequence s = sequence(r, 0, 40, 32, 3, false), bad = s;
    const uint32_t foreign[2] = {POOL_PAGES, 0};
    float logits[9];
    cr_expect_eq(hstu_backend_cuda.launch(r->runner, NULL, 0, false), SKV_OK);
    cr_expect_eq(hstu_backend_cuda.wait(r->runner, NULL, 1000), SKV_OK);
    bad.pages = foreign;
    cr_expect_eq(hstu_backend_cuda.launch(r->runner, &bad, 1, false), SKV_EINVAL);
    bad = s, bad.cached = 41;
    cr_expect_eq(hstu_backend_cuda.launch(r->runner, &bad, 1, false), SKV_EINVAL);
    bad = s, bad.targets = MAX_ROWS;
    cr_expect_eq(hstu_backend_cuda.launch(r->runner, &bad, 1, false), SKV_EINVAL);
    cr_expect_eq(hstu_backend_cuda.wait(r->runner, NULL, 0), SKV_EINVAL);
    prefill(r, &s);
    cr_expect_eq(hstu_backend_cuda.launch(r->runner, &s, 1, false), SKV_OK);
    cr_expect_eq(hstu_backend_cuda.launch(r->runner, &s, 1, false), SKV_EBUSY);
    cr_expect_eq(hstu_backend_cuda.wait(r->runner, logits, 10000), SKV_OK);
    rig_close(r);
}

/* ---- large shapes, against the plain CUDA reference ---- */

Test(layers_cuda, the_cuda_reference_equals_the_c_reference)
{
    NEED_GPU();
    struct rig *r = rig_open(small_model(128, 32), NULL);
    struct hstu_sequence s[2] = {sequence(r, 0, 100, 70, 9, false),
                                 sequence(r, 1, 33, 0, 4, false)};
    const uint64_t elements = rows_of_all(s, 2) * (uint64_t)r->model.embed;
    float *a = malloc(elements * 4), *b = malloc(elements * 4), *c = malloc(elements * 4);
    prefill(r, &s[0]);
    for (int rounded = 0; rounded < 2; rounded++) {
        cr_assert_eq(cuda_reference_pass(r->runner, s, 2, rounded, a, NULL), SKV_OK);
        cr_assert_eq(hstu_reference_pass(r->weights, s, 2, r->pool, rounded, b, NULL), SKV_OK);
        cr_assert_eq(hstu_reference_pass(r->weights, s, 2, r->pool, !rounded, c, NULL), SKV_OK);
        struct distance d = distance_of(a, b, c, elements, 0);
        /* fp32: far closer than rounding; rounded: single flips of the last bit remain. */
        cr_expect(d.mean <= (rounded ? 0.25 : 0.01), "rounded %d: mean %.4f", rounded, d.mean);
        cr_expect(d.max <= (rounded ? 0.8 : 0.05), "rounded %d: max %.4f", rounded, d.max);
    }
    free(a), free(b), free(c);
    rig_close(r);
}

enum { REPEATS = 8 };

/* The same batch again, SIDEKV_TEST_REPEATS times or REPEATS, everything on the device but weights
 * and pages NaN before: the same bits as in x. What kernels hand over too early shows here, and
 * seldom: 16 bytes of 34,816 rows in every fourth pass, once. */
static void check_repeats(struct hstu_cuda *c, const struct hstu_sequence *s, uint32_t batch,
                          const float *x, uint64_t elements)
{
    const char *wanted = getenv("SIDEKV_TEST_REPEATS");
    const uint64_t columns = c->model.embed;
    float *again = malloc(elements * 4);
    for (int left = wanted ? atoi(wanted) : REPEATS; left > 0; left--) {
        uint64_t others = 0, rows[2] = {UINT64_MAX, 0}, at[2] = {UINT64_MAX, 0};
        cr_assert_eq(hstu_cuda_poison(c), SKV_OK);
        cr_assert_eq(hstu_backend_cuda.debug(c, s, batch, again), SKV_OK);
        if (memcmp(again, x, elements * 4) == 0)
            continue;
        for (uint64_t i = 0; i < elements; i++) {
            const uint64_t row = i / columns, column = i % columns;
            if (memcmp(&again[i], &x[i], 4) == 0)
                continue;
            others++;
            rows[0] = row < rows[0] ? row : rows[0];
            rows[1] = row;
            at[0] = column < at[0] ? column : at[0];
            at[1] = column > at[1] ? column : at[1];
        }
        cr_expect_eq(others, 0,
                     "%s, batch %u, history %u: %llu values differ from the run before, in rows "
                     "%llu to %llu, columns %llu to %llu",
                     c->path->name, batch, s->history, (unsigned long long)others,
                     (unsigned long long)rows[0], (unsigned long long)rows[1],
                     (unsigned long long)at[0], (unsigned long long)at[1]);
    }
    free(again);
}

/* Some of the logits, of rows as they came from the block: the head alone. */
static void check_logits(const struct hstu_cuda *c, const float *rows, const float *logits,
                         uint32_t count)
{
    cr_assert_eq(c->model.head_out, 1);
    for (uint32_t i = 0; i < count; i += count / 16 + 1) {
        float want;
        cr_assert_eq(hstu_reference_head(c->weights, rows + (uint64_t)i * c->model.embed, 1, &want),
                     SKV_OK);
        cr_expect(fabsf(logits[i] - want) <= 2e-3f * fmaxf(fabsf(want), 1),
                  "%s: logit %u: %f, not %f", c->path->name, i, logits[i], want);
    }
}

/* One cell: history, new tokens and 256 candidates for `batch` users, cached pages random, every
 * other page NaN. Returns the worst distance of both runners. */
static double check_cell(struct hstu_cuda *runner[2], uint32_t batch, uint32_t h, uint32_t n,
                         const uint32_t *list, const uint64_t *tokens)
{
    const struct hstu_cuda *c = runner[0];
    const uint64_t page_bytes = skv_page_bytes(&c->model.geometry);
    const uint64_t elements = UINT64_C(1) * batch * (n + 256) * c->model.embed;
    float *x = malloc(elements * 4), *r32 = malloc(elements * 4), *r16 = malloc(elements * 4);
    float *served = malloc(elements * 4), *again = malloc(elements * 4);
    static float logits[8 * 256], logits_again[8 * 256];
    struct hstu_sequence s[8];
    double worst = 0;
    CUDA(cudaMemset(c->pool, 0xff, c->pool_pages * page_bytes));
    for (uint32_t b = 0; b < batch; b++) {
        s[b] = (struct hstu_sequence){.history = h,
                                      .cached = h - n,
                                      .targets = 256,
                                      .pages = list + b * 128,
                                      .tokens = tokens + b * 13};
        for (uint32_t i = 0; i < (h - n) / 32; i++)
            cr_assert_eq(cuda_fill_random((char *)c->pool + s[b].pages[i] * page_bytes,
                                          page_bytes / 2, s[b].pages[i], -0.3f, 1.2f),
                         SKV_OK);
    }
    cr_assert_eq(cuda_reference_pass(c, s, batch, false, r32, NULL), SKV_OK);
    cr_assert_eq(cuda_reference_pass(c, s, batch, true, r16, NULL), SKV_OK);
    for (int k = 0; k < 2; k++) {
        cr_assert_eq(hstu_backend_cuda.debug(runner[k], s, batch, x), SKV_OK);
        struct distance d = distance_of(x, r32, r16, elements, 0);
        cr_expect(d.max <= 1 && d.mean <= 1,
                  "%s: batch %u, history %u, new %u: max %.2f mean %.2f of the limit",
                  runner[k]->path->name, batch, h, n, d.max, d.mean);
        worst = fmax(worst, fmax(d.max, d.mean));
        check_repeats(runner[k], s, batch, x, elements);
    }
    keep_candidates(s, batch, c->model.embed, r32);
    const uint64_t kept = keep_candidates(s, batch, c->model.embed, r16);
    for (int k = 0; k < 2; k++) {
        serve(runner[k], s, batch, served, logits);
        check_logits(runner[k], served, logits, batch * 256);
        struct distance d = distance_of(served, r32, r16, kept, 0);
        cr_expect(d.max <= 1 && d.mean <= 1,
                  "%s: candidates of batch %u, history %u, new %u: max %.2f mean %.2f of the limit",
                  runner[k]->path->name, batch, h, n, d.max, d.mean);
        worst = fmax(worst, fmax(d.max, d.mean));
        for (int i = 0; i < 2; i++) {
            serve(runner[k], s, batch, again, logits_again);
            cr_expect_eq(memcmp(again, served, kept * 4) |
                             memcmp(logits_again, logits, batch * 256 * sizeof *logits),
                         0,
                         "%s: candidates of batch %u, history %u, new %u: not the same bits again",
                         runner[k]->path->name, batch, h, n);
        }
    }
    free(x), free(r32), free(r16), free(served), free(again);
    return worst;
}

/* Cells of bench_block's grid with two layers; every cell with SIDEKV_TEST_GRID=1. */
Test(layers_cuda, large_passes_equal_the_reference, .timeout = 300)
{
    NEED_GPU();
    const bool all = getenv("SIDEKV_TEST_GRID") != NULL;
    const uint32_t some[][3] = {{1, 4096, 128}, {1, 1024, 1024}, {2, 256, 256},
                                {2, 4096, 512}, {8, 512, 128},   {8, 512, 512}};
    const uint32_t pages = 8 * 128 + 64;
    struct hstu_model model;
    struct hstu_weights *weights;
    struct skv_device *device;
    struct hstu_cuda *runner[2];
    uint32_t list[8 * 128 + 64];
    uint64_t tokens[5000];
    void *pool;
    double worst = 0;
    cr_assert_eq(hstu_model_named("bench", &model), SKV_OK);
    model.geometry.layers = 2;
    model.embedding_rows = 4096;
    cr_assert_eq(hstu_weights_random(&model, 1, &weights), SKV_OK);
    cr_assert_eq(skv_device_open("cuda", &device), SKV_OK);
    pool = on_device(NULL, pages * skv_page_bytes(&model.geometry));
    for (uint32_t i = 0; i < 5000; i++)
        tokens[i] = i * 7919u;
    for (uint32_t i = 0; i < pages; i++)
        list[i] = i * 577u % pages; /* 577 is prime to 1088 */
    for (int k = 0; k < 2; k++) {
        struct hstu_runner_options options = {.weights = weights,
                                              .device = device,
                                              .pool_base = pool,
                                              .pool_pages = pages,
                                              .max_rows = 8 * 4352,
                                              .max_batch = 8};
        void *state;
        choose_kernels(both[k]);
        cr_assert_eq(hstu_backend_cuda.open(&options, &state), SKV_OK);
        runner[k] = state;
        cr_assert_eq(hstu_cuda_poison(runner[k]), SKV_OK);
    }
    for (uint32_t batch = 1; batch <= 8; batch *= 2)
        for (uint32_t h = 128; h <= 4096; h *= 2)
            for (uint32_t n = 128; n <= h; n *= 2) {
                bool wanted = all;
                for (size_t i = 0; i < sizeof some / sizeof *some; i++)
                    wanted |= some[i][0] == batch && some[i][1] == h && some[i][2] == n;
                if (wanted)
                    worst = fmax(worst, check_cell(runner, batch, h, n, list, tokens));
            }
    printf("large passes, both paths: at most %.2f of the limit\n", worst);
    for (int k = 0; k < 2; k++)
        hstu_backend_cuda.close(runner[k]);
    cudaFree(pool);
    skv_device_close(device);
    hstu_weights_close(weights);
}
