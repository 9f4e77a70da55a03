/* The reference against golden numbers of an independent fp64 program (attention A, and A' of bf16
 * inputs; positions C; addresses E), and the fast host version against both, by one tolerance: let
 * R32 be the fp32 reference, R16 the one rounded to bf16 where layers.h says, A the kernel; max and
 * mean of |A - R32| at most twice those of |R16 - R32|. */
#include "host_rig.h"

#include <math.h>

#include "host_math.h"

static double gen(uint32_t a, uint32_t b, uint32_t c, uint32_t salt)
{
    return ((131 * a + 37 * b + 17 * c + 7919 * salt) % 1009) * 2.0 / 1008 - 1;
}

static float to_bf16(float x)
{
    return bf16_to_float(bf16_from_float(x));
}

/* One sequence's q, k, v of all tokens, absolute, and the same through pages. */
struct sequence {
    struct hstu_model model; /* what attention needs of it */
    uint32_t h, c, T;
    float *q, *k, *v; /* [h + T][HD] */
    uint16_t *pool;
    uint32_t pages[64];
    float *o, *magnitude; /* [n + T][HD], [n + T] */
};

static struct sequence sequence_new(uint32_t D, uint32_t S, uint32_t N, uint32_t g, uint32_t h,
                                    uint32_t c, uint32_t T)
{
    const uint32_t tokens = h + T, HD = 2 * D;
    struct sequence s = {.model = small_model(1, D, S, g), .h = h, .c = c, .T = T};
    s.model.scaling_length = N;
    s.q = malloc(tokens * HD * sizeof(float));
    s.k = malloc(tokens * HD * sizeof(float));
    s.v = malloc(tokens * HD * sizeof(float));
    s.o = malloc(tokens * HD * sizeof(float));
    s.magnitude = calloc(tokens, sizeof(float));
    return s;
}

static void sequence_free(struct sequence *s)
{
    free(s->q);
    free(s->k);
    free(s->v);
    free(s->o);
    free(s->magnitude);
    free(s->pool);
}

/* Puts the cached tokens into pages, everything else in the pool NaN. */
static void sequence_page(struct sequence *s)
{
    const struct skv_geometry *g = &s->model.geometry;
    const uint32_t count = (s->c + g->page_tokens - 1) / g->page_tokens, D = g->head_dim;
    const uint64_t page = skv_page_bytes(g) / 2;
    cr_assert_leq(count, 64);
    s->pool = malloc((2 * count + 1) * page * 2);
    memset(s->pool, 0xff, (2 * count + 1) * page * 2);
    for (uint32_t i = 0; i < count; i++)
        s->pages[i] = 2 * (count - 1 - i) + 1;
    for (uint32_t t = 0; t < s->c; t++)
        for (uint32_t i = 0; i < 2 * D; i++) {
            uint16_t *at = s->pool + s->pages[t / g->page_tokens] * page + i % D;
            at[hstu_page_offset(g, 0, 0, i / D, t % g->page_tokens)] =
                bf16_from_float(s->k[t * 2 * D + i]);
            at[hstu_page_offset(g, 0, 1, i / D, t % g->page_tokens)] =
                bf16_from_float(s->v[t * 2 * D + i]);
        }
}

static void run_reference(struct sequence *s, bool rounded)
{
    const uint32_t D = s->model.geometry.head_dim, HD = 2 * D;
    struct hstu_attention_case c = {.geometry = s->model.geometry,
                                    .scaling_length = s->model.scaling_length,
                                    .group = s->model.group,
                                    .history = s->h,
                                    .cached = s->c,
                                    .targets = s->T,
                                    .pool = s->pool,
                                    .pages = s->pages,
                                    .q = s->q + s->c * HD,
                                    .k = s->k + s->c * HD,
                                    .v = s->v + s->c * HD,
                                    .stride = HD,
                                    .out = s->o,
                                    .out_stride = HD,
                                    .magnitude = s->magnitude,
                                    .rounded = rounded};
    for (uint32_t head = 0; head < 2; head++)
        hstu_reference_attention(&c, head);
}

static void run_fast(struct sequence *s, const struct host_math *math)
{
    const uint32_t D = s->model.geometry.head_dim, HD = 2 * D, rows = s->h - s->c + s->T;
    struct host_model model = {
        .model = s->model, .width = HD, .page_values = skv_page_bytes(&s->model.geometry) / 2};
    struct hstu_sequence q = {.history = s->h, .cached = s->c, .targets = s->T, .pages = s->pages};
    struct host_scratch scratch;
    cr_assert_eq(host_scratch_open(&s->model, &scratch), 0);
    uint16_t *m = malloc((uint64_t)rows * 4 * HD * 2);
    memset(m, 0xff, (uint64_t)rows * 4 * HD * 2);
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t i = 0; i < HD; i++) {
            const uint64_t from = (uint64_t)(s->c + r) * HD + i, to = (uint64_t)r * 4 * HD + i;
            m[to + HD] = bf16_from_float(s->v[from]);
            m[to + 2 * HD] = bf16_from_float(s->q[from]);
            m[to + 3 * HD] = bf16_from_float(s->k[from]);
        }
    memset(s->o, 0xff, (uint64_t)rows * HD * sizeof(float));
    for (uint32_t head = 0; head < 2; head++)
        for (uint32_t row0 = 0; row0 < rows; row0 += HOST_QUERY_ROWS) {
            struct host_attend task = {.sequence = &q,
                                       .head = head,
                                       .row0 = row0,
                                       .rows = rows - row0 < HOST_QUERY_ROWS ? rows - row0
                                                                             : HOST_QUERY_ROWS,
                                       .pool = s->pool,
                                       .m = m,
                                       .o = s->o};
            math->attend(&model, &task, &scratch);
        }
    free(m);
    host_scratch_close(&scratch);
}

/* ---- golden cases ---- */

static void assert_near(double got, double want, double tolerance, const char *what)
{
    cr_assert(fabs(got - want) <= tolerance, "%s: %.9f, not %.9f", what, got, want);
}

static void sums(const struct sequence *s, double *sum, double *absolute)
{
    *sum = *absolute = 0;
    const uint32_t count = (s->h - s->c + s->T) * 2 * s->model.geometry.head_dim;
    for (uint32_t i = 0; i < count; i++) {
        *sum += s->o[i];
        *absolute += fabs((double)s->o[i]);
    }
}

Test(golden, the_generator_is_right)
{
    assert_near(gen(0, 0, 0, 1), .698412698413, 1e-12, "gen(0,0,0,1)");
    assert_near(gen(3, 1, 5, 2), -.585317460317, 1e-12, "gen(3,1,5,2)");
}

/* Sequence b of case A (bf16 false) or A' (bf16 true). */
static struct sequence golden(uint32_t b, uint32_t D, uint32_t g, bool bf16)
{
    struct sequence s =
        b ? sequence_new(D, 32, 64, g, 5, 0, 4) : sequence_new(D, 32, 64, g, 47, bf16 ? 40 : 0, 3);
    for (uint32_t t = 0; t < s.h + s.T; t++)
        for (uint32_t i = 0; i < 2; i++)
            for (uint32_t d = 0; d < D; d++) {
                const uint32_t at = (t * 2 + i) * D + d;
                double q = gen(t, i, d, 100 * b + 1);
                s.q[at] = bf16 ? to_bf16((float)(8 * q)) : (float)q;
                s.k[at] = (float)gen(t, i, d, 100 * b + 2);
                s.v[at] = (float)gen(t, i, d, 100 * b + 3);
                s.k[at] = bf16 ? to_bf16(s.k[at]) : s.k[at];
                s.v[at] = bf16 ? to_bf16(s.v[at]) : s.v[at];
            }
    if (bf16)
        sequence_page(&s);
    return s;
}

/* Case A has fp32 inputs and 40 cached tokens: here nothing is cached, so that no K or V is
 * rounded, and the rows from 40 on are looked at. */
static void case_a(uint32_t b, uint32_t g, double sum, double absolute, const double at[4])
{
    struct sequence s = golden(b, 32, g, false);
    run_reference(&s, false);
    if (b == 0) {
        memmove(s.o, s.o + 40 * 64, 10 * 64 * sizeof *s.o);
        s.c = 40;
    }
    double got_sum, got_absolute;
    sums(&s, &got_sum, &got_absolute);
    assert_near(got_sum, sum, 1e-5, "A sum");
    assert_near(got_absolute, absolute, 1e-5, "A sum of abs");
    const uint32_t candidate = b ? 5 : 7, last = b ? 8 : 9;
    const uint32_t where[4] = {0, 32 + 5, candidate * 64, last * 64 + 32 + 31};
    for (int i = 0; i < 4; i++)
        if (!isnan(at[i]))
            assert_near(s.o[where[i]], at[i], 1e-6, "A value");
    sequence_free(&s);
}

Test(golden, reference_attention_is_case_a)
{
    case_a(0, 1, -4.078100670001, 59.721137842402,
           (double[]){.062411236444, -.023518704646, .147419152867, .059444309491});
    case_a(0, 2, -4.100226529016, 59.734465623988, (double[]){NAN, NAN, NAN, NAN});
    case_a(1, 1, 1.357972306131, 5.043130787289,
           (double[]){-.000503731722, .000022334749, -.006423030397, -.034328228227});
    case_a(1, 2, 1.281517009929, 5.067659665818, (double[]){NAN, NAN, NAN, -.037140632734});
}

struct prime {
    uint32_t D, b;
    double absolute, absolute2; /* g = 1, 2 */
    double at[4], last2;        /* last2: the last of `at` with g = 2 */
};
static const struct prime primes[] = {
    {64,
     0,
     1299.726215634,
     1299.727309728,
     {1.289679877, -.652218514, 1.695531440, .688580442},
     .688580442},
    {64,
     1,
     88.747186597,
     88.754704069,
     {-.017543951, .000462352, -.078950315, -.233237007},
     -.234320069},
    {128,
     0,
     3676.284050418,
     3676.284285564,
     {2.021179422, -.621524329, 2.555308518, .909204262},
     .909204262},
    {128,
     1,
     256.996913737,
     256.999533524,
     {-.026395070, .000699628, -.108575461, -.305424107},
     -.305722327},
    {256,
     0,
     10342.698323058,
     10342.698614989,
     {2.855279865, -.755849006, 3.754849523, 1.302396644},
     1.302396644},
    {256,
     1,
     741.201261626,
     741.201669080,
     {-.042886167, .001016029, -.145347914, -.428225658},
     -.428258365},
};

/* `relative` to the sum of abs; values to the same share of their row's size (about 4). */
static void assert_prime(const struct sequence *s, const struct prime *p, double relative)
{
    double sum, absolute;
    sums(s, &sum, &absolute);
    const bool two = s->model.group == 2;
    const uint32_t HD = 2 * p->D, candidate = p->b ? 5 : 7, last = p->b ? 8 : 9;
    const uint32_t where[4] = {0, p->D + 5, candidate * HD, last * HD + p->D + 31};
    assert_near(absolute, two ? p->absolute2 : p->absolute, relative * p->absolute,
                "A' sum of abs");
    for (int i = 0; i < 4; i++)
        assert_near(s->o[where[i]], two && i == 3 ? p->last2 : p->at[i], 4 * relative, "A' value");
}

Test(golden, reference_and_fast_attention_are_case_a_prime)
{
    const struct host_math *const table[] = {&host_math_avx512bf16, &host_math_avx512,
                                             &host_math_avx2, &host_math_portable};
    for (size_t i = 0; i < sizeof primes / sizeof *primes; i++)
        for (uint32_t g = 1; g <= 2; g++) {
            struct sequence s = golden(primes[i].b, primes[i].D, g, true);
            run_reference(&s, false);
            assert_prime(&s, &primes[i], 1e-6);
            run_reference(&s, true);
            assert_prime(&s, &primes[i], 0x1p-9);
            for (size_t j = 0; j < sizeof table / sizeof *table; j++)
                if (table[j]->supported()) {
                    run_fast(&s, table[j]);
                    assert_prime(&s, &primes[i], 0x1p-9); /* p is rounded to bf16 */
                }
            sequence_free(&s);
        }
}

Test(golden, positions_are_case_c)
{
    const uint32_t first[] = {5, 6, 7, 8, 9, 9};
    for (uint32_t i = 0; i < 6; i++)
        cr_assert_eq(hstu_position(i, 5, 9, 16), first[i]); /* start 5, q 6, T 2: h = 9 */
    for (uint32_t i = 0; i < 20; i++)
        cr_assert_eq(hstu_position(i, 0, 17, 16), i < 15 ? i : 15);
}

Test(golden, addresses_are_case_e)
{
    /* [layer][K|V][head][token][dim] */
    const struct skv_geometry g = {.layers = 2, .heads = 2, .head_dim = 64, .page_tokens = 32};
    cr_assert_eq(hstu_page_offset(&g, 0, 0, 0, 8), 8 * 64);
    cr_assert_eq(hstu_page_offset(&g, 0, 0, 1, 14), (32 + 14) * 64);
    cr_assert_eq(hstu_page_offset(&g, 0, 1, 0, 0), 2 * 32 * 64);
    cr_assert_eq(hstu_page_offset(&g, 1, 1, 1, 31), 8 * 32 * 64 - 64);
    cr_assert_eq(skv_page_bytes(&g), 8 * 32 * 64 * 2);
}

Test(golden, the_mask_is_the_one_of_the_book)
{
    /* h = 3, g = 2, T = 5: rows 3..7; a candidate's group up to itself */
    static const char *const want[] = {"x.......", "xx......", "xxx.....", "xxxx....",
                                       "xxxxx...", "xxx..x..", "xxx..xx.", "xxx....x"};
    for (uint32_t r = 0; r < 8; r++)
        for (uint32_t j = 0; j < 8; j++)
            cr_assert_eq(hstu_allowed(r, j, 3, 2), want[r][j] == 'x', "row %u, key %u", r, j);
}

/* ---- tolerance ---- */

struct difference {
    double most, mean;
};

static struct difference difference(const float *a, const float *b, uint64_t count)
{
    struct difference d = {0};
    for (uint64_t i = 0; i < count; i++) {
        double x = fabs((double)a[i] - b[i]);
        cr_assert(x == x, "NaN at %llu", (unsigned long long)i);
        d.most = x > d.most ? x : d.most;
        d.mean += x / (double)count;
    }
    return d;
}

static void assert_within(const float *a, const float *r16, const float *r32, uint64_t count,
                          const char *what)
{
    struct difference allowed = difference(r16, r32, count), got = difference(a, r32, count);
    cr_assert(got.most <= 2 * allowed.most && got.mean <= 2 * allowed.mean,
              "%s: max %g of %g, mean %g of %g", what, got.most, 2 * allowed.most, got.mean,
              2 * allowed.mean);
}

static float uniform(uint64_t *state, float low, float high)
{
    *state = test_mix(*state);
    return low + (high - low) * (float)(*state >> 40) * 0x1p-24f;
}

/* scores: 0 mixed, 1 large and positive, 2 all in about [-10, -4] */
static void fill_scores(struct sequence *s, int scores, uint64_t seed)
{
    const uint32_t D = s->model.geometry.head_dim;
    const float middle = sqrtf(7.0f / sqrtf((float)D));
    for (uint64_t i = 0; i < (uint64_t)(s->h + s->T) * 2 * D; i++) {
        s->q[i] = scores == 0   ? uniform(&seed, -3, 3)
                  : scores == 1 ? uniform(&seed, 0, 4)
                                : middle * uniform(&seed, .7f, 1.3f);
        s->k[i] = scores == 0   ? uniform(&seed, -3, 3)
                  : scores == 1 ? uniform(&seed, 0, 4)
                                : -middle * uniform(&seed, .7f, 1.3f);
        s->q[i] = to_bf16(s->q[i]);
        s->k[i] = to_bf16(s->k[i]);
        s->v[i] = to_bf16(uniform(&seed, -1, 2));
    }
    sequence_page(s);
}

Test(tolerance, fast_attention_stays_within_for_every_score_range_size_and_instruction_set)
{
    const struct host_math *const table[] = {&host_math_avx512bf16, &host_math_avx512,
                                             &host_math_avx2, &host_math_portable};
    for (int scores = 0; scores < 3; scores++)
        for (uint32_t D = 64; D <= 256; D *= 2)
            for (uint32_t S = 16; S <= 128; S *= 2) {
                struct sequence s = sequence_new(D, S, 200, 1 + D / 128, 2 * S + 37, 2 * S - 1, 9);
                fill_scores(&s, scores, D * S);
                const uint64_t count = (s.h - s.c + s.T) * 2 * D;
                float *r32 = malloc(count * 4), *r16 = malloc(count * 4);
                run_reference(&s, false);
                memcpy(r32, s.o, count * 4);
                run_reference(&s, true);
                memcpy(r16, s.o, count * 4);
                for (size_t i = 0; i < sizeof table / sizeof *table; i++)
                    if (table[i]->supported()) {
                        run_fast(&s, table[i]);
                        assert_within(s.o, r16, r32, count, table[i]->name);
                    }
                free(r32);
                free(r16);
                sequence_free(&s);
            }
}

/* A batch of three users, one cached, one fresh, one with neither history nor page, through the
 * runner; block rows, scores and appended pages. */
static void check_pass(uint32_t D, uint32_t g, uint32_t N)
{
    struct hstu_model model = small_model(2, D, 32, g);
    model.scaling_length = N;
    struct rig rig;
    rig_open(&rig, &model, 24, 400, 1);
    struct user u = user_new(&rig, D + g, 141, 9, 0, 2), v = user_new(&rig, N, 37, 4, 1, 2),
                w = user_new(&rig, 99, 0, 5, 0, 1);
    rig_append(&rig, &u, 0, 101);
    const uint64_t values = rig.pool_pages * rig.page_values;
    uint16_t *pool32 = malloc(values * 2), *pool16 = malloc(values * 2);
    memcpy(pool32, rig.pool, values * 2);
    memcpy(pool16, rig.pool, values * 2);

    struct hstu_sequence batch[] = {user_sequence(&u, 101, true), user_sequence(&v, 0, true),
                                    user_sequence(&w, 0, false)};
    const uint32_t rows = 40 + 9 + 37 + 4 + 5, T = 18;
    float *out[3], *logits[3];
    for (int i = 0; i < 3; i++) {
        out[i] = malloc(rows * model.embed * sizeof(float));
        logits[i] = logits_new(&rig, T);
    }
    cr_assert_eq(hstu_reference_pass(rig.weights, batch, 3, pool32, false, out[0], logits[0]), 0);
    cr_assert_eq(hstu_reference_pass(rig.weights, batch, 3, pool16, true, out[1], logits[1]), 0);
    cr_assert_eq(hstu_runner_debug(rig.runner, batch, 3, out[2]), 0);
    rig_run(&rig, batch, 3, logits[2]);
    assert_within(out[2], out[1], out[0], rows * model.embed, "block");
    assert_within(logits[2], logits[1], logits[0], T * model.head_out, "logits");

    uint64_t appended = 0;
    struct difference d16 = {0}, dfast = {0};
    for (uint64_t i = 0; i < values; i++) {
        cr_assert_eq(rig.pool[i] == 0xffff, pool32[i] == 0xffff, "value %d", (int)i);
        if (pool32[i] == 0xffff)
            continue;
        appended++;
        float a = bf16_to_float(rig.pool[i]), b = bf16_to_float(pool16[i]);
        float r = bf16_to_float(pool32[i]);
        d16.most = fmax(d16.most, fabsf(b - r));
        dfast.most = fmax(dfast.most, fabsf(a - r));
        d16.mean += fabsf(b - r);
        dfast.mean += fabsf(a - r);
    }
    cr_assert_eq(appended, (141 + 37) * 2 * 2 * 2 * D);
    cr_assert(dfast.most <= 2 * d16.most && dfast.mean <= 2 * d16.mean, "pages: max %g of %g",
              dfast.most, 2 * d16.most);
    for (int i = 0; i < 3; i++) {
        free(out[i]);
        free(logits[i]);
    }
    free(pool32);
    free(pool16);
    user_free(&u);
    user_free(&v);
    user_free(&w);
    rig_close(&rig);
}

Test(tolerance, a_fast_pass_stays_within_for_every_head_dim_and_group)
{
    for (uint32_t D = 64; D <= 256; D *= 2)
        for (uint32_t g = 1; g <= 3; g++)
            check_pass(D, g, 256);
}

/* With a large N the variance of o is far below eps, with a small one far above; near it a wrong N
 * or eps shows. */
Test(tolerance, a_fast_pass_stays_within_where_the_variance_of_o_is_near_eps)
{
    for (uint32_t N = 16; N <= 65536; N *= 16)
        check_pass(64, 1, N);
}

Test(tolerance, every_instruction_set_stays_within_and_is_its_own_cache)
{
    const char *const names[] = {"avx512bf16", "avx512", "avx2", "portable"};
    for (int i = 0; i < 4; i++) {
        setenv("HSTU_HOST_MATH", names[i], 1);
        if (!host_math_choose())
            continue; /* this CPU lacks it */
        check_pass(64, 1, 256);
        struct hstu_model model = small_model(2, 64, 32, 2);
        struct rig rig;
        rig_open(&rig, &model, 24, 400, 1);
        struct user u = user_new(&rig, 20, 150, 11, 0, 2);
        float *want = uncached(&rig, &u), *got = logits_new(&rig, 11);
        rig_append(&rig, &u, 0, 150);
        for (uint32_t c = 0; c <= 150; c += 5) {
            struct hstu_sequence q = user_sequence(&u, c, false);
            rig_run(&rig, &q, 1, got);
            cr_assert_eq(memcmp(got, want, logits_bytes(&rig, 11)), 0, "%s, c %u", names[i], c);
        }
        free(want);
        free(got);
        user_free(&u);
        rig_close(&rig);
    }
    setenv("HSTU_HOST_MATH", "abacus", 1);
    cr_assert_null(host_math_choose());
}
