/* The fast host layers as the runner drives them: cached scores equal uncached ones bit for bit,
 * whatever the split, chunks, mates, pages, threads and gates. The numbers themselves are held to
 * the reference in test_reference.c. */
#include "host_rig.h"

#include <pthread.h>
#include <unistd.h>

static void assert_scores_same(struct rig *rig, const struct user *u, uint32_t cached,
                               const float *want, const char *what)
{
    struct hstu_sequence q = user_sequence(u, cached, false);
    float *got = logits_new(rig, u->targets);
    rig_run(rig, &q, 1, got);
    cr_assert_eq(memcmp(got, want, logits_bytes(rig, u->targets)), 0,
                 "%s: h %u, c %u, T %u: cached scores differ", what, u->history, cached,
                 u->targets);
    free(got);
}

Test(host, cached_equals_uncached_for_every_split)
{
    const uint32_t dims[] = {64, 128, 256};
    for (int i = 0; i < 3; i++) {
        struct hstu_model model = small_model(2, dims[i], i ? 32 : 16, 1);
        struct rig rig;
        rig_open(&rig, &model, 32, 200, 1);
        struct user u = user_new(&rig, 1, i ? 70 : 131, 7, 1, 3);
        float *want = uncached(&rig, &u);
        rig_append(&rig, &u, 0, u.history);
        for (uint32_t c = 0; c <= u.history; c++)
            assert_scores_same(&rig, &u, c, want, "split");
        free(want);
        user_free(&u);
        rig_close(&rig);
    }
}

Test(host, every_page_and_head_size_and_tail_gives_the_same_scores)
{
    for (uint32_t D = 64; D <= 256; D *= 2)
        for (uint32_t S = 16; S <= 128; S *= 2) {
            struct hstu_model model = small_model(2, D, S, 1);
            struct rig rig;
            rig_open(&rig, &model, 16, 400, 1);
            struct user u = user_new(&rig, D + S, 2 * S + 9, 5, 0, 2);
            float *want = uncached(&rig, &u);
            const uint32_t splits[] = {S, S + 1, 2 * S - 1, 2 * S, 2 * S + 8};
            for (int i = 0; i < 5; i++) {
                memset(rig.pool, 0xff, rig.pool_pages * rig.page_values * 2);
                rig_append(&rig, &u, 0, splits[i]); /* NaN past the tail */
                assert_scores_same(&rig, &u, splits[i], want, "tail");
            }
            free(want);
            user_free(&u);
            rig_close(&rig);
        }
}

Test(host, odd_lengths_of_new_cached_and_candidates_all_agree)
{
    const uint32_t lengths[] = {0, 1, 37, 1111};
    for (uint32_t g = 1; g <= 3; g++) {
        struct hstu_model model = small_model(2, 64, 32, g);
        struct rig rig;
        rig_open(&rig, &model, 150, 3333, 1);
        for (int a = 0; a < 4; a++)
            for (int b = 0; b < 4; b++)
                for (int t = 0; t < 4; t++) {
                    if (g > 1 && (a == 3) + (b == 3) + (t == 3) > 1)
                        continue; /* the long ones once */
                    struct user u = user_new(&rig, a * 16 + b * 4 + t, lengths[a] + lengths[b],
                                             lengths[t], 3, 2);
                    float *want = uncached(&rig, &u);
                    rig_append(&rig, &u, 0, lengths[a]);
                    assert_scores_same(&rig, &u, lengths[a], want, "lengths");
                    free(want);
                    user_free(&u);
                }
        rig_close(&rig);
    }
}

Test(host, any_chunking_writes_the_same_pages)
{
    struct hstu_model model = small_model(3, 64, 32, 1);
    struct rig rig;
    rig_open(&rig, &model, 64, 700, 1);
    struct user u = user_new(&rig, 2, 600, 9, 1, 3);
    float *want = uncached(&rig, &u);
    const size_t bytes = rig.pool_pages * rig.page_values * sizeof *rig.pool;
    uint16_t *pages = malloc(bytes);
    rig_append(&rig, &u, 0, u.history);
    memcpy(pages, rig.pool, bytes);
    for (uint64_t round = 0; round < 8; round++) {
        memset(rig.pool, 0xff, bytes);
        for (uint32_t c = 0; c < u.history;) {
            uint32_t step = 1 + (uint32_t)(test_mix(round * 7919 + c) % (round < 4 ? 40 : 300));
            uint32_t end = c + step < u.history ? c + step : u.history;
            rig_append(&rig, &u, c, end);
            c = end;
        }
        cr_assert_eq(memcmp(pages, rig.pool, bytes), 0, "round %d", (int)round);
    }
    assert_scores_same(&rig, &u, u.history, want, "chunks");
    free(pages);
    free(want);
    user_free(&u);
    rig_close(&rig);
}

Test(host, batch_mates_even_all_nan_change_nothing)
{
    struct hstu_model model = small_model(2, 64, 32, 1);
    struct rig rig;
    rig_open(&rig, &model, 64, 1000, 1);
    struct user u = user_new(&rig, 3, 150, 11, 0, 3);
    struct user mate = user_new(&rig, 4, 90, 13, 1, 3);
    struct user broken = user_new(&rig, 5, 77, 5, 2, 3);
    float *want = uncached(&rig, &u), *got = logits_new(&rig, 29);
    float *mates = uncached(&rig, &mate);
    /* A token whose embedding is NaN; no other user may have it. */
    for (uint32_t i = 0; i < broken.history + broken.targets; i++)
        broken.tokens[i] = 999;
    uint32_t row = hstu_token_row(&model, 999);
    for (uint32_t i = 0; i < u.history + u.targets; i++)
        cr_assert_neq(hstu_token_row(&model, u.tokens[i]), row);
    for (uint32_t i = 0; i < mate.history + mate.targets; i++)
        if (hstu_token_row(&model, mate.tokens[i]) == row)
            mate.tokens[i] = u.tokens[0];
    free(mates);
    mates = uncached(&rig, &mate);
    memset(rig.weights->embedding + (uint64_t)row * model.embed, 0xff, model.embed * 2);

    rig_append(&rig, &u, 0, 100);
    rig_append(&rig, &mate, 0, 90);
    struct hstu_sequence batch[] = {user_sequence(&broken, 0, true), user_sequence(&u, 100, true),
                                    user_sequence(&mate, 89, false)};
    rig_run(&rig, batch, 3, got);
    cr_assert_eq(memcmp(got + 5 * 3, want, logits_bytes(&rig, 11)), 0);
    cr_assert_eq(memcmp(got + 16 * 3, mates, logits_bytes(&rig, 13)), 0);
    struct hstu_sequence turned[] = {batch[2], batch[1], batch[0]};
    rig_run(&rig, turned, 3, got);
    cr_assert_eq(memcmp(got, mates, logits_bytes(&rig, 13)), 0);
    cr_assert_eq(memcmp(got + 13 * 3, want, logits_bytes(&rig, 11)), 0);
    /* One user twice in a batch: the second reads, both agree. */
    struct hstu_sequence twice[] = {user_sequence(&u, 100, true), user_sequence(&u, 100, false)};
    rig_run(&rig, twice, 2, got);
    cr_assert_eq(memcmp(got, want, logits_bytes(&rig, 11)), 0);
    cr_assert_eq(memcmp(got + 11 * 3, want, logits_bytes(&rig, 11)), 0);
    free(want);
    free(mates);
    free(got);
    user_free(&u);
    user_free(&mate);
    user_free(&broken);
    rig_close(&rig);
}

Test(host, where_pages_lie_and_what_is_in_free_ones_does_not_matter)
{
    struct hstu_model model = small_model(2, 128, 32, 2);
    struct rig rig;
    rig_open(&rig, &model, 64, 400, 1);
    struct user u = user_new(&rig, 6, 200, 6, 0, 1), v = u;
    uint32_t moved[7] = {63, 8, 41, 9, 62, 20, 30};
    v.pages = moved;
    float *want = uncached(&rig, &u);
    rig_append(&rig, &u, 0, 199);
    assert_scores_same(&rig, &u, 199, want, "NaN in free pages");
    for (int i = 0; i < 7; i++)
        memcpy(rig.pool + moved[i] * rig.page_values, rig.pool + u.pages[i] * rig.page_values,
               rig.page_values * 2);
    for (int i = 0; i < 7; i++)
        memset(rig.pool + u.pages[i] * rig.page_values, 0x55, rig.page_values * 2);
    assert_scores_same(&rig, &v, 199, want, "moved pages");
    free(want);
    user_free(&u);
    rig_close(&rig);
}

Test(host, permuted_candidates_permute_their_scores)
{
    struct hstu_model model = small_model(2, 64, 32, 1);
    struct rig rig;
    rig_open(&rig, &model, 32, 400, 1);
    struct user u = user_new(&rig, 8, 100, 20, 0, 1);
    float *want = uncached(&rig, &u);
    for (uint32_t i = 0; i < 10; i++) {
        uint64_t t = u.tokens[100 + i];
        u.tokens[100 + i] = u.tokens[119 - i];
        u.tokens[119 - i] = t;
    }
    float *got = uncached(&rig, &u);
    for (uint32_t i = 0; i < 20; i++)
        cr_assert_eq(memcmp(got + i * 3, want + (19 - i) * 3, 12), 0);
    free(want);
    free(got);
    user_free(&u);
    rig_close(&rig);
}

/* One layer, so that a row sees exactly what the mask lets it see. */
Test(host, a_token_reaches_exactly_the_rows_that_the_mask_allows)
{
    const uint32_t h = 9, T = 7, rows = h + T;
    for (uint32_t g = 1; g <= 3; g++) {
        struct hstu_model model = small_model(1, 64, 16, g);
        struct rig rig;
        rig_open(&rig, &model, 4, 64, 1);
        struct user u = user_new(&rig, 9, h, T, 0, 1);
        float *before = malloc(rows * 64 * sizeof *before), *after = malloc(rows * 64 * 4);
        struct hstu_sequence q = user_sequence(&u, 0, false);
        cr_assert_eq(hstu_runner_debug(rig.runner, &q, 1, before), 0);
        for (uint32_t j = 0; j < rows; j++) {
            uint64_t token = u.tokens[j];
            u.tokens[j] = token + 1;
            cr_assert_neq(hstu_token_row(&model, token), hstu_token_row(&model, token + 1));
            cr_assert_eq(hstu_runner_debug(rig.runner, &q, 1, after), 0);
            u.tokens[j] = token;
            for (uint32_t r = 0; r < rows; r++)
                cr_assert_eq(memcmp(before + r * 64, after + r * 64, 256) != 0,
                             hstu_allowed(r, j, h, g), "g %u: token %u, row %u", g, j, r);
        }
        free(before);
        free(after);
        user_free(&u);
        rig_close(&rig);
    }
}

Test(host, any_number_of_threads_gives_the_same_bits)
{
    struct hstu_model model = small_model(2, 64, 32, 1);
    float *want = NULL;
    for (uint32_t threads = 1; threads <= 5; threads += 2) {
        struct rig rig;
        rig_open(&rig, &model, 64, 1600, threads);
        struct user u = user_new(&rig, 10, 700, 40, 0, 2);
        struct user v = user_new(&rig, 11, 300, 40, 1, 2);
        struct hstu_sequence batch[] = {user_sequence(&u, 0, true), user_sequence(&v, 0, false)};
        float *got = logits_new(&rig, 80);
        for (int i = 0; i < 5; i++) {
            rig_run(&rig, batch, 2, got);
            if (!want) {
                want = got;
                got = logits_new(&rig, 80);
                continue;
            }
            cr_assert_eq(memcmp(got, want, logits_bytes(&rig, 80)), 0, "%u threads", threads);
        }
        assert_scores_same(&rig, &u, 650, want, "threads");
        free(got);
        user_free(&u);
        user_free(&v);
        rig_close(&rig);
    }
    free(want);
}

Test(host, one_flipped_cached_token_changes_the_scores)
{
    struct hstu_model model;
    cr_assert_eq(hstu_model_named("tiny", &model), 0);
    struct rig rig;
    rig_open(&rig, &model, 64, 1700, 1);
    struct user u = user_new(&rig, 12, 1600, 16, 0, 1);
    float *want = uncached(&rig, &u), *got = logits_new(&rig, 16);
    const uint32_t flipped[] = {0, 1, 31, 32, 800, 1599};
    for (int i = 0; i < 6; i++) {
        uint64_t token = u.tokens[flipped[i]];
        u.tokens[flipped[i]] = token ^ 1;
        rig_append(&rig, &u, 0, u.history); /* the cache is of another history */
        u.tokens[flipped[i]] = token;
        struct hstu_sequence q = user_sequence(&u, 1600, false);
        rig_run(&rig, &q, 1, got);
        uint32_t changed = 0;
        for (uint32_t t = 0; t < 16; t++)
            changed += got[t] != want[t];
        cr_expect_eq(changed, 16, "token %u: only %u of 16 scores moved", flipped[i], changed);
    }
    free(want);
    free(got);
    user_free(&u);
    rig_close(&rig);
}

/* Golden case E: where rows go, and what may be read. */
Test(host, rows_are_appended_to_their_slots_and_nothing_else_is_touched)
{
    struct hstu_model model = small_model(2, 64, 32, 1);
    struct rig rig;
    rig_open(&rig, &model, 12, 64, 1);
    struct user a = user_new(&rig, 13, 47, 3, 0, 1), b = user_new(&rig, 14, 5, 4, 0, 1);
    uint32_t pages_a[] = {9, 4}, pages_b[] = {2};
    memcpy(a.pages, pages_a, sizeof pages_a);
    memcpy(b.pages, pages_b, sizeof pages_b);
    float *want_a = uncached(&rig, &a), *want_b = uncached(&rig, &b), got[7 * 3];
    rig_append(&rig, &a, 0, 40);
    const size_t values = rig.pool_pages * rig.page_values;
    uint16_t *before = malloc(values * 2);
    memcpy(before, rig.pool, values * 2);

    struct hstu_sequence batch[] = {user_sequence(&a, 40, true), user_sequence(&b, 0, true)};
    rig_run(&rig, batch, 2, got);
    cr_assert_eq(memcmp(got, want_a, 3 * 12), 0);
    cr_assert_eq(memcmp(got + 9, want_b, 4 * 12), 0);
    for (uint64_t i = 0; i < values; i++) {
        uint64_t page = i / rig.page_values, slot = i / 64 % 32;
        bool appended = (page == 4 && slot >= 8 && slot <= 14) || (page == 2 && slot <= 4);
        if (appended)
            cr_assert_neq(rig.pool[i], 0xffff, "page %d slot %d was not written", (int)page,
                          (int)slot);
        else
            cr_assert_eq(rig.pool[i], before[i], "page %d slot %d was touched", (int)page,
                         (int)slot);
    }
    free(before);
    free(want_a);
    free(want_b);
    user_free(&a);
    user_free(&b);
    rig_close(&rig);
}

/* ---- gates ---- */

struct onboard {
    struct rig *rig;
    const uint16_t *from; /* the pages as they should be */
};

/* Copies whole slices, tail page included, layer by layer, late; then opens the layer's gate. */
static void *onboard_late(void *argument)
{
    struct onboard *o = argument;
    const struct skv_geometry *g = &o->rig->weights->model.geometry;
    const uint64_t slice = skv_slice_bytes(g);
    for (uint32_t l = 0; l < g->layers; l++) {
        usleep(30000);
        for (uint64_t p = 0; p < o->rig->pool_pages; p++)
            memcpy((char *)(o->rig->pool + p * o->rig->page_values) + l * slice,
                   (const char *)(o->from + p * o->rig->page_values) + l * slice, slice);
        skv_gate_store(&o->rig->gates[l], 1);
    }
    return NULL;
}

Test(host, a_gated_pass_touches_a_layer_only_after_its_gate_opens)
{
    for (uint32_t threads = 1; threads <= 3; threads += 2) {
        struct hstu_model model = small_model(3, 64, 32, 1);
        struct rig rig;
        rig_open(&rig, &model, 8, 300, threads);
        struct user u = user_new(&rig, 15, 200, 9, 0, 1);
        const size_t bytes = rig.pool_pages * rig.page_values * 2;
        uint16_t *onboarded = malloc(bytes), *complete = malloc(bytes);
        float *want = uncached(&rig, &u), *got = logits_new(&rig, 9);
        rig_append(&rig, &u, 0, 170);
        memcpy(onboarded, rig.pool, bytes);
        rig_append(&rig, &u, 170, 200);
        memcpy(complete, rig.pool, bytes);
        memset(rig.pool, 0xff, bytes);

        struct hstu_sequence q = user_sequence(&u, 170, true);
        cr_assert_eq(hstu_runner_launch(rig.runner, &q, 1, true), 0);
        cr_assert_eq(hstu_runner_wait(rig.runner, got, 20), SKV_ETIMEDOUT);
        cr_assert_eq(hstu_runner_launch(rig.runner, &q, 1, true), SKV_EBUSY);
        struct onboard o = {&rig, onboarded};
        pthread_t thread;
        cr_assert_eq(pthread_create(&thread, NULL, onboard_late, &o), 0);
        cr_assert_eq(hstu_runner_wait(rig.runner, got, 60000), 0);
        pthread_join(thread, NULL);
        cr_assert_eq(memcmp(got, want, logits_bytes(&rig, 9)), 0);
        cr_assert_eq(memcmp(rig.pool, complete, bytes), 0, "appends were overwritten");
        free(onboarded);
        free(complete);
        free(want);
        free(got);
        user_free(&u);
        rig_close(&rig);
    }
}

/* A wait that has no time runs a task, then goes on where it left. */
Test(host, a_pass_in_many_waits_gives_the_same_bits)
{
    for (uint32_t threads = 1; threads <= 3; threads += 2) {
        struct hstu_model model = small_model(3, 64, 32, 1);
        struct rig rig;
        rig_open(&rig, &model, 8, 300, threads);
        struct user u = user_new(&rig, 18, 200, 9, 0, 1);
        float *want = uncached(&rig, &u), *got = logits_new(&rig, 9);
        rig_append(&rig, &u, 0, 40);
        struct hstu_sequence q = user_sequence(&u, 40, true);
        uint32_t waits = 1;
        int status;
        cr_assert_eq(hstu_runner_launch(rig.runner, &q, 1, false), 0);
        while ((status = hstu_runner_wait(rig.runner, got, 0)) == SKV_ETIMEDOUT)
            waits++;
        cr_assert_eq(status, 0);
        if (threads == 1)
            cr_assert_gt(waits, model.geometry.layers * 2);
        cr_assert_eq(memcmp(got, want, logits_bytes(&rig, 9)), 0);
        free(want);
        free(got);
        user_free(&u);
        rig_close(&rig);
    }
}

Test(host, close_waits_for_a_gated_pass_in_flight)
{
    struct hstu_model model = small_model(1, 64, 32, 1);
    struct rig rig;
    rig_open(&rig, &model, 4, 64, 1);
    struct user u = user_new(&rig, 16, 20, 2, 0, 1);
    struct hstu_sequence q = user_sequence(&u, 0, true);
    struct onboard o = {&rig, calloc(rig.pool_pages * rig.page_values, 2)};
    pthread_t thread;
    cr_assert_eq(hstu_runner_launch(rig.runner, &q, 1, true), 0);
    cr_assert_eq(pthread_create(&thread, NULL, onboard_late, &o), 0);
    hstu_runner_close(rig.runner);
    rig.runner = NULL;
    cr_assert_eq(rig.gates[0], 1);
    pthread_join(thread, NULL);
    free((void *)o.from);
    user_free(&u);
    rig_close(&rig);
}

/* ---- refusals ---- */

Test(runner, refuses_what_does_not_fit_and_launches_nothing)
{
    struct hstu_model model = small_model(1, 64, 32, 1);
    struct rig rig;
    rig_open(&rig, &model, 4, 100, 1);
    struct user u = user_new(&rig, 17, 64, 4, 0, 1);
    struct hstu_sequence good = user_sequence(&u, 32, true), bad = good;
    float logits[12];

    bad.cached = 65;
    cr_expect_eq(hstu_runner_launch(rig.runner, &bad, 1, false), SKV_EINVAL);
    bad = good;
    bad.history = SKV_MAX_TOKENS + 1;
    cr_expect_eq(hstu_runner_launch(rig.runner, &bad, 1, false), SKV_EINVAL);
    bad = good;
    bad.targets = 69; /* 101 rows */
    cr_expect_eq(hstu_runner_launch(rig.runner, &bad, 1, false), SKV_EINVAL);
    bad.targets = UINT32_MAX;
    cr_expect_eq(hstu_runner_launch(rig.runner, &bad, 1, false), SKV_EINVAL);
    bad = good;
    bad.tokens = NULL;
    cr_expect_eq(hstu_runner_launch(rig.runner, &bad, 1, false), SKV_EINVAL);
    bad = good;
    bad.pages = NULL;
    cr_expect_eq(hstu_runner_launch(rig.runner, &bad, 1, false), SKV_EINVAL);
    uint32_t outside[] = {0, 4};
    bad = good;
    bad.pages = outside;
    cr_expect_eq(hstu_runner_launch(rig.runner, &bad, 1, false), SKV_EINVAL);
    bad.append = false; /* the bad page is not used then */
    cr_expect_eq(hstu_runner_launch(rig.runner, &bad, 1, false), 0);
    cr_expect_eq(hstu_runner_wait(rig.runner, NULL, 60000), 0);
    struct hstu_sequence many[9];
    for (int i = 0; i < 9; i++)
        many[i] = (struct hstu_sequence){0};
    cr_expect_eq(hstu_runner_launch(rig.runner, many, 9, false), SKV_EINVAL);
    cr_expect_eq(hstu_runner_launch(rig.runner, many, 8, false), 0, "empty sequences are fine");
    cr_expect_eq(hstu_runner_wait(rig.runner, logits, 60000), 0);
    cr_expect_eq(hstu_runner_wait(rig.runner, logits, 60000), SKV_EINVAL, "nothing to wait for");
    user_free(&u);
    rig_close(&rig);
}

Test(runner, without_a_pool_or_gates_refuses_caches_and_gated_passes)
{
    struct hstu_model model = small_model(1, 64, 32, 1);
    struct rig rig;
    rig_open(&rig, &model, 4, 100, 1);
    struct hstu_runner_options options = {
        .weights = rig.weights, .device = rig.device, .max_rows = 100, .max_batch = 1};
    struct hstu_runner *runner;
    cr_assert_eq(hstu_runner_open(&options, &runner), 0);
    struct user u = user_new(&rig, 18, 64, 4, 0, 1);
    struct hstu_sequence q = user_sequence(&u, 0, false);
    float logits[12], want[12];
    cr_expect_eq(hstu_runner_launch(runner, &q, 1, true), SKV_EINVAL);
    cr_expect_eq(hstu_runner_launch(runner, &q, 1, false), 0);
    cr_expect_eq(hstu_runner_wait(runner, logits, 60000), 0);
    rig_run(&rig, &q, 1, want);
    cr_expect_eq(memcmp(logits, want, sizeof want), 0);
    q = user_sequence(&u, 1, false);
    cr_expect_eq(hstu_runner_launch(runner, &q, 1, false), SKV_EINVAL);
    q = user_sequence(&u, 0, true);
    cr_expect_eq(hstu_runner_launch(runner, &q, 1, false), SKV_EINVAL);
    struct hstu_footprint footprint;
    hstu_runner_footprint(runner, &footprint);
    cr_expect_gt(footprint.weights_bytes, 0);
    cr_expect_gt(footprint.arena_bytes, 0);
    hstu_runner_close(runner);
    options.max_batch = SKV_MAX_BATCH + 1;
    cr_expect_eq(hstu_runner_open(&options, &runner), SKV_EINVAL);
    options.max_batch = 1;
    options.max_rows = 0;
    cr_expect_eq(hstu_runner_open(&options, &runner), SKV_EINVAL);
    options.max_rows = 1;
    options.device = NULL;
    cr_expect_eq(hstu_runner_open(&options, &runner), SKV_EINVAL);
    user_free(&u);
    rig_close(&rig);
}
