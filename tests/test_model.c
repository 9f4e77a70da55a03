/* Models, seeded weights and fingerprints: the same everywhere, of order one, and never two models
 * under one fingerprint. */
#include "host_rig.h"

#include <getopt.h>
#include <math.h>

#include "hash.h"
#include "options.h"

Test(model, the_named_models_pass_their_own_check)
{
    const char *const names[] = {"tiny", "kuairand", "bench"};
    const uint32_t history[] = {8192, 8192, 4096};
    struct hstu_model m;
    for (int i = 0; i < 3; i++) {
        cr_assert_eq(hstu_model_named(names[i], &m), 0);
        cr_assert_eq(hstu_model_check(&m), 0);
        cr_assert_eq(hstu_model_history(names[i]), history[i]);
    }
    cr_assert_eq(skv_page_bytes(&m.geometry), 1 << 20, "bench: 1 MiB a page");
    cr_assert_eq(hstu_model_named("huge", &m), SKV_ENOENT);
    cr_assert_eq(hstu_model_history("huge"), 0);
}

Test(model, the_daemon_means_the_same_geometry_by_a_name)
{
    static char *const names[] = {"tiny", "kuairand", "bench", "huge"};
    for (int i = 0; i < 4; i++) {
        struct hstu_model m;
        struct options options;
        bool known = hstu_model_named(names[i], &m) == 0;
        optind = 0; /* a new vector: start anew */
        int parsed = options_parse(3, (char *[]){"sidekvd", "--model", names[i], NULL}, &options);
        cr_assert_eq(parsed, known ? -1 : 2, "%s", names[i]);
        cr_assert(!known || memcmp(&options.geometry, &m.geometry, sizeof m.geometry) == 0, "%s",
                  names[i]);
    }
}

Test(model, a_field_out_of_range_is_refused)
{
    struct hstu_model good, bad;
    cr_assert_eq(hstu_model_named("tiny", &good), 0);
#define REFUSED(field, value)                                                                      \
    bad = good;                                                                                    \
    bad.field = value;                                                                             \
    cr_expect_eq(hstu_model_check(&bad), SKV_EINVAL, #field " " #value)
    REFUSED(geometry.layers, 0);
    REFUSED(geometry.layers, SKV_MAX_LAYERS + 1);
    REFUSED(geometry.heads, 0);
    REFUSED(geometry.head_dim, 32);
    REFUSED(geometry.page_tokens, 24);
    REFUSED(embed, 0);
    REFUSED(embed, 100);
    REFUSED(embed, 4096);
    REFUSED(scaling_length, 0);
    REFUSED(group, 0);
    REFUSED(position_buckets, 0);
    REFUSED(embedding_rows, 0);
    REFUSED(embedding_rows, 1000);
    REFUSED(head_hidden, 0);
    REFUSED(head_out, 0);
    REFUSED(eps, 0);
    REFUSED(eps, NAN);
    REFUSED(eps, INFINITY);
    struct hstu_weights *weights;
    cr_expect_eq(hstu_weights_random(&bad, 1, &weights), SKV_EINVAL);
}

/* Pinned: a change here is a change of every cache in the field. */
Test(model, tiny_with_seed_1_has_the_same_bits_on_any_machine)
{
    struct hstu_model m;
    struct hstu_weights *w;
    cr_assert_eq(hstu_model_named("tiny", &m), 0);
    cr_assert_eq(hstu_weights_random(&m, 1, &w), 0);
    struct skv_id id = hstu_fingerprint(w);
    cr_expect_eq(id.lo, UINT64_C(0x50907340056f34be), "lo 0x%016llx", (unsigned long long)id.lo);
    cr_expect_eq(id.hi, UINT64_C(0x017aeb23c49cf8d3), "hi 0x%016llx", (unsigned long long)id.hi);
    cr_expect_eq(hstu_token_row(&m, 0), 52655, "%u", hstu_token_row(&m, 0));
    cr_expect_eq(hstu_token_row(&m, UINT64_MAX), 11296, "%u", hstu_token_row(&m, UINT64_MAX));
    hstu_weights_close(w);
}

Test(model, every_field_and_every_weight_is_in_the_fingerprint)
{
    struct hstu_model m = small_model(2, 64, 32, 1);
    struct hstu_weights *w;
    cr_assert_eq(hstu_weights_random(&m, 1, &w), 0);
    const struct skv_id id = hstu_fingerprint(w);
#define MATTERS(field, value)                                                                      \
    w->model = m;                                                                                  \
    w->model.field = value;                                                                        \
    cr_expect(!skv_id_equal(id, hstu_fingerprint(w)), #field)
    MATTERS(geometry.layers, 1);
    MATTERS(geometry.heads, 1);
    MATTERS(geometry.head_dim, 128);
    MATTERS(geometry.page_tokens, 16);
    MATTERS(embed, 128);
    MATTERS(scaling_length, 8193);
    MATTERS(group, 2);
    MATTERS(position_buckets, 7);
    MATTERS(embedding_rows, 2);
    MATTERS(head_hidden, 7);
    MATTERS(head_out, 7);
    MATTERS(eps, 1e-6f);
    w->model = m;
    cr_expect(skv_id_equal(id, hstu_fingerprint(w)));
    w->layer[1].projection[63] ^= 1;
    cr_expect(!skv_id_equal(id, hstu_fingerprint(w)));
    w->layer[1].projection[63] ^= 1;
    w->head2_bias[2] ^= 1;
    cr_expect(!skv_id_equal(id, hstu_fingerprint(w)));
    hstu_weights_close(w);
    cr_assert_eq(hstu_weights_random(&m, 2, &w), 0);
    cr_expect(!skv_id_equal(id, hstu_fingerprint(w)), "seed");
    hstu_weights_close(w);
}

static double deviation(const float *x, uint64_t count)
{
    double mean = 0, square = 0;
    for (uint64_t i = 0; i < count; i++)
        mean += x[i] / (double)count;
    for (uint64_t i = 0; i < count; i++)
        square += (x[i] - mean) * (x[i] - mean) / (double)count;
    return sqrt(square);
}

Test(model, activations_stay_of_order_one_and_scores_differ_between_users_and_candidates)
{
    const char *const names[] = {"tiny", "kuairand", "bench"};
    for (int i = 0; i < 3; i++) {
        struct hstu_model m;
        struct rig rig;
        cr_assert_eq(hstu_model_named(names[i], &m), 0);
        rig_open(&rig, &m, 8, 300, 1);
        struct user u = user_new(&rig, 1, 120, 16, 0, 1), v = user_new(&rig, 2, 120, 16, 4, 1);
        memcpy(v.tokens + 120, u.tokens + 120, 16 * sizeof *v.tokens); /* the same candidates */
        struct hstu_sequence q = user_sequence(&u, 0, false);
        float *x = malloc(136 * m.embed * sizeof *x);
        cr_assert_eq(hstu_runner_debug(rig.runner, &q, 1, x), 0);
        double d = deviation(x, 136 * m.embed);
        cr_expect(d > 0.5 && d < 8, "%s: rows deviate by %g", names[i], d);

        float *a = uncached(&rig, &u), *b = uncached(&rig, &v);
        const uint32_t out = m.head_out;
        float first[16], between[16];
        for (uint32_t t = 0; t < 16; t++) {
            first[t] = a[t * out];
            between[t] = a[t * out] - b[t * out];
        }
        double candidates = deviation(first, 16), users = deviation(between, 16);
        cr_expect(candidates > 0.1 && candidates < 10, "%s: candidates by %g", names[i],
                  candidates);
        cr_expect(users > 0.05, "%s: users by %g", names[i], users);
        free(x);
        free(a);
        free(b);
        user_free(&u);
        user_free(&v);
        rig_close(&rig);
    }
}
