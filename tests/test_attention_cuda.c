/* Attention alone, every path that runs on this GPU against the reference: golden numbers, shapes,
 * score ranges, the split, far addresses, and the bitwise properties. Everything that must not be
 * read holds NaN: u, padding rows, free pages, slots past c, other layers. */
#include "cuda_bed.h"

#define NAN16 0xffffu

/* kind 0: Q, 1: K, 2: V, of absolute token t, head i, dim d of sequence b. */
typedef float generator(uint32_t kind, uint32_t b, uint32_t t, uint32_t i, uint32_t d,
                        uint32_t head_dim);

/* One batch on host and device. */
struct bed {
    struct skv_geometry geometry;
    uint32_t layer, group, scaling_length;
    const struct hstu_sequence *sequences;
    uint32_t count, rows, graph_rows;
    uint64_t pool_pages, page_elements;
    uint16_t *m;         /* [graph_rows][4HD] */
    uint16_t *pool;      /* [host_pages], the last ones of the device's pool */
    uint64_t first_page; /* device page of host page 0 */
    uint64_t host_pages;
    void *on_m, *on_pool;
    bool pool_kept; /* on_pool belongs to someone else */
};

static uint32_t width(const struct bed *bed)
{
    return bed->geometry.heads * bed->geometry.head_dim;
}

static uint32_t rows_of(const struct hstu_sequence *s)
{
    return s->history - s->cached + s->targets;
}

/* The page lists of the sequences must lie in [first_page, first_page + host_pages). */
static void bed_open(struct bed *bed, generator *gen)
{
    const struct skv_geometry *g = &bed->geometry;
    const uint32_t HD = width(bed), D = g->head_dim;
    const uint32_t part_of[3] = {2, 3, 1}; /* Q, K, V in u|v|q|k */
    bed->rows = 0;
    for (uint32_t b = 0; b < bed->count; b++)
        bed->rows += rows_of(&bed->sequences[b]);
    uint32_t index;
    if (!bed->graph_rows)
        bed->graph_rows = hstu_cuda_graph_rows(bed->rows, &index);
    bed->page_elements = skv_page_bytes(g) / 2;
    bed->m = malloc((uint64_t)bed->graph_rows * 4 * HD * 2);
    bed->pool = malloc(bed->host_pages * bed->page_elements * 2 + 1);
    memset(bed->m, 0xff, (uint64_t)bed->graph_rows * 4 * HD * 2);
    memset(bed->pool, 0xff, bed->host_pages * bed->page_elements * 2);
    uint64_t first = 0;
    for (uint32_t b = 0; b < bed->count; first += rows_of(&bed->sequences[b++])) {
        const struct hstu_sequence *s = &bed->sequences[b];
        for (uint32_t t = 0; t < s->history + s->targets; t++)
            for (uint32_t i = 0; i < g->heads; i++)
                for (uint32_t kind = t < s->cached ? 1 : 0; kind < 3; kind++) {
                    uint16_t *to =
                        t < s->cached
                            ? bed->pool +
                                  (s->pages[t / g->page_tokens] - bed->first_page) *
                                      bed->page_elements +
                                  hstu_page_offset(g, bed->layer, kind - 1, i, t % g->page_tokens)
                            : bed->m + (first + t - s->cached) * 4 * HD + part_of[kind] * HD +
                                  i * D;
                    for (uint32_t d = 0; d < D; d++)
                        to[d] = bf16_from_float(gen(kind, b, t, i, d, D));
                }
    }
    bed->on_m = on_device(bed->m, (uint64_t)bed->graph_rows * 4 * HD * 2);
    if (!bed->pool_kept)
        bed->on_pool = on_device(NULL, bed->pool_pages * bed->page_elements * 2);
    CUDA(cudaMemcpy((uint16_t *)bed->on_pool + bed->first_page * bed->page_elements, bed->pool,
                    bed->host_pages * bed->page_elements * 2, cudaMemcpyHostToDevice));
}

static void bed_close(struct bed *bed)
{
    cudaFree(bed->on_m);
    if (!bed->pool_kept)
        cudaFree(bed->on_pool);
    free(bed->m);
    free(bed->pool);
}

/* o [rows][HD], after the sum of slices in order and the division by N. */
static void bed_run(const struct bed *bed, const struct hstu_attention_path *path, float *o)
{
    const struct skv_geometry *g = &bed->geometry;
    const uint32_t HD = width(bed), rows = bed->graph_rows;
    const uint32_t planes = hstu_plan_slices(rows);
    struct hstu_counts counts = {0};
    uint32_t *pages = malloc(1 << 20), page_count = 0;
    uint32_t *sequence = malloc(rows * 4);
    uint8_t *slices = malloc(rows);
    memset(sequence, 0xff, rows * 4);
    uint32_t row = 0;
    for (uint32_t b = 0; b < bed->count; b++) {
        const struct hstu_sequence *s = &bed->sequences[b];
        counts.layout.row_start[b] = row;
        counts.layout.page_start[b] = page_count;
        counts.layout.history[b] = s->history;
        counts.layout.cached[b] = s->cached;
        for (uint32_t i = 0; i < hstu_pages_listed(s, g->page_tokens); i++)
            pages[page_count++] = s->pages[i];
        for (uint32_t i = 0; i < rows_of(s); i++)
            sequence[row++] = b;
        counts.layout.row_start[b + 1] = row;
        counts.layout.page_start[b + 1] = page_count;
    }
    int sms = 0;
    CUDA(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
    uint32_t capacity = hstu_plan_capacity(path, g, rows, bed->count);
    struct hstu_work *work = calloc(capacity, sizeof *work);
    const struct hstu_plan_args plan = {.path = path,
                                        .geometry = g,
                                        .group = bed->group,
                                        .rows = rows,
                                        .sm_count = (uint32_t)sms,
                                        .max_slices = planes,
                                        .sequences = bed->sequences,
                                        .count = bed->count};
    cr_assert(hstu_plan(&plan, work, capacity, slices, &counts.layout.work));
    struct hstu_counts *on_counts = on_device(&counts, sizeof counts);
    uint64_t plane = (uint64_t)rows * HD;
    float *partial = malloc(planes * plane * 4);
    struct hstu_attention_args args = {
        .geometry = *g,
        .layer = bed->layer,
        .rows = rows,
        .group = bed->group,
        .inverse_n = 1.0f / (float)bed->scaling_length,
        .m = bed->on_m,
        .pool = bed->on_pool,
        .pool_pages = bed->pool_pages,
        .batch = {.row_start = on_counts->layout.row_start,
                  .history = on_counts->layout.history,
                  .cached = on_counts->layout.cached,
                  .page_start = on_counts->layout.page_start,
                  .pages = on_device(pages, page_count * 4),
                  .row_sequence = on_device(sequence, rows * 4),
                  .slices = on_device(slices, rows),
                  .work = on_device(work, counts.layout.work * sizeof *work),
                  .work_room = counts.layout.work,
                  .work_count = &on_counts->layout.work,
                  .target_start = on_counts->target_start,
                  .next = on_counts->next},
        .partial = on_device(NULL, planes * plane * 4),
        .max_slices = planes,
        .rounded = hstu_sums_rounded(path, planes),
        .sm_count = (uint32_t)sms};
    CUDA(cudaMemset(args.partial, 0xff, planes * plane * 4));
    cudaStream_t stream;
    CUDA(cudaStreamCreate(&stream));
    if (path->unit_items == 2) {
        void *units = on_device(NULL, hstu_units_bytes(counts.layout.work, (uint32_t)sms));
        struct hstu_prepare_args prepare = {.units = {hstu_units_of(&args, units)}};
        args.units = units;
        cr_assert_eq(hstu_launch_prepare(&prepare, stream), SKV_OK);
    }
    cr_assert_eq(path->launch(&args, stream), SKV_OK);
    CUDA(cudaStreamSynchronize(stream));
    CUDA(cudaStreamDestroy(stream));
    CUDA(cudaMemcpy(partial, args.partial, planes * plane * 4, cudaMemcpyDeviceToHost));
    for (uint32_t r = 0; r < bed->rows; r++)
        for (uint32_t i = 0; i < HD; i++) {
            const float *sums = partial + (uint64_t)r * HD;
            const bool rounded = args.rounded && slices[r] == 1;
            float sum = rounded ? bf16_to_float(((const uint16_t *)sums)[i]) : 0;
            for (uint32_t k = 0; !rounded && k < slices[r]; k++)
                sum += sums[k * plane + i];
            o[(uint64_t)r * HD + i] = sum * args.inverse_n;
        }
    cudaFree((void *)args.batch.pages);
    cudaFree((void *)args.batch.row_sequence);
    cudaFree((void *)args.batch.slices);
    cudaFree((void *)args.batch.work);
    cudaFree((void *)args.units);
    cudaFree(args.partial);
    cudaFree(on_counts);
    free(pages), free(slices), free(sequence), free(work), free(partial);
}

/* R32 or R16 by the plain CUDA reference. */
static void bed_reference(const struct bed *bed, bool rounded, float *o, float *magnitude)
{
    uint64_t bytes = (uint64_t)bed->rows * width(bed) * 4;
    float *on_o = on_device(NULL, bytes), *on_magnitude = on_device(NULL, 4);
    CUDA(cudaMemset(on_magnitude, 0, 4));
    cr_assert_eq(cuda_reference_attention(&bed->geometry, bed->layer, bed->group,
                                          bed->scaling_length, bed->sequences, bed->count,
                                          bed->on_m, bed->on_pool, rounded, on_o, on_magnitude),
                 SKV_OK);
    CUDA(cudaMemcpy(o, on_o, bytes, cudaMemcpyDeviceToHost));
    CUDA(cudaMemcpy(magnitude, on_magnitude, 4, cudaMemcpyDeviceToHost));
    cudaFree(on_o);
    cudaFree(on_magnitude);
}

/* R32 or R16 by the C reference. */
static void bed_reference_c(const struct bed *bed, bool rounded, float *o)
{
    const uint32_t HD = width(bed);
    float *wide = malloc((uint64_t)bed->rows * 4 * HD * 4);
    for (uint64_t i = 0; i < (uint64_t)bed->rows * 4 * HD; i++)
        wide[i] = bf16_to_float(bed->m[i]);
    uint64_t first = 0;
    for (uint32_t b = 0; b < bed->count; first += rows_of(&bed->sequences[b++])) {
        const float *m = wide + first * 4 * HD;
        struct hstu_attention_case c = {.geometry = bed->geometry,
                                        .scaling_length = bed->scaling_length,
                                        .group = bed->group,
                                        .layer = bed->layer,
                                        .history = bed->sequences[b].history,
                                        .cached = bed->sequences[b].cached,
                                        .targets = bed->sequences[b].targets,
                                        .pool = bed->pool - bed->first_page * bed->page_elements,
                                        .pages = bed->sequences[b].pages,
                                        .q = m + 2 * HD,
                                        .k = m + 3 * HD,
                                        .v = m + HD,
                                        .stride = 4 * HD,
                                        .out = o + first * HD,
                                        .out_stride = HD,
                                        .rounded = rounded};
        for (uint32_t head = 0; head < bed->geometry.heads; head++)
            hstu_reference_attention(&c, head);
    }
    free(wide);
}

/* The device's own path and the portable one, which may be the same. */
static uint32_t paths(const struct hstu_attention_path *out[2])
{
    out[0] = path_of_device();
    out[1] = &hstu_attention_portable;
    return out[0] == out[1] ? 1 : 2;
}

static void bed_check(const struct bed *bed)
{
    const struct hstu_attention_path *path[2];
    uint64_t elements = (uint64_t)bed->rows * width(bed);
    float *o = malloc(elements * 4), *r32 = malloc(elements * 4), *r16 = malloc(elements * 4);
    float magnitude;
    bed_reference(bed, false, r32, &magnitude);
    bed_reference(bed, true, r16, &magnitude);
    /* The allowance for an approximate tanh; the portable path has none. */
    double slack = ldexp(magnitude, -11) / (2.0 * bed->scaling_length);
    for (uint32_t p = paths(path); p-- > 0;) {
        bed_run(bed, path[p], o);
        struct distance d =
            distance_of(o, r32, r16, elements, path[p] == &hstu_attention_portable ? 0 : slack);
        cr_assert(d.max <= 1 && d.mean <= 1,
                  "%s: D %u S %u g %u, %u sequences, first h %u c %u T %u: max %.2f mean %.2f of "
                  "the limit",
                  path[p]->name, bed->geometry.head_dim, bed->geometry.page_tokens, bed->group,
                  bed->count, bed->sequences[0].history, bed->sequences[0].cached,
                  bed->sequences[0].targets, d.max, d.mean);
    }
    free(o), free(r32), free(r16);
}

/* ---- generators ---- */

static float gen(uint32_t a, uint32_t b, uint32_t c, uint32_t salt)
{
    return (float)((131 * a + 37 * b + 17 * c + 7919 * salt) % 1009) * (2.0f / 1008) - 1;
}

static float golden(uint32_t kind, uint32_t b, uint32_t t, uint32_t i, uint32_t d, uint32_t D)
{
    (void)D;
    double value =
        (double)((131 * t + 37 * i + 17 * d + 7919 * (100 * b + 1 + kind)) % 1009) * 2.0 / 1008 - 1;
    return (float)(kind == 0 ? 8 * value : value);
}

/* Uniform in [-1, 1), of all the arguments. */
static float noise(uint32_t kind, uint32_t b, uint32_t t, uint32_t i, uint32_t d)
{
    uint32_t x =
        kind * 0x9e3779b1u ^ b * 0x85ebca77u ^ t * 0xc2b2ae3du ^ i * 0x27d4eb2fu ^ d * 0x165667b1u;
    x = (x ^ x >> 15) * 0x2c1b3c6du;
    x = (x ^ x >> 12) * 0x297a2d39u;
    return (float)((x ^ x >> 15) >> 8) * (2.0f / 16777216) - 1;
}

static float mixed(uint32_t kind, uint32_t b, uint32_t t, uint32_t i, uint32_t d, uint32_t D)
{
    (void)D;
    return noise(kind, b, t, i, d) * (kind == 0 ? 4.0f : 1.0f);
}

static float positive(uint32_t kind, uint32_t b, uint32_t t, uint32_t i, uint32_t d, uint32_t D)
{
    (void)D;
    return kind == 2 ? noise(2, b, t, i, d) : 1.0f + noise(kind, b, t, i, d);
}

/* All scores in [-10, -4]: q is ones, k the same in every dim. */
static float negative(uint32_t kind, uint32_t b, uint32_t t, uint32_t i, uint32_t d, uint32_t D)
{
    if (kind == 0)
        return 1;
    if (kind == 2)
        return noise(2, b, t, i, d);
    return -(7.0f + 2.9f * noise(1, b, t, i, 0)) / sqrtf((float)D);
}

/* ---- the tests ---- */

static uint32_t all_pages[4096];

/* A permutation of 0 .. count - 1. */
static void shuffle_pages(uint32_t count, uint32_t seed)
{
    for (uint32_t i = 0; i < count; i++)
        all_pages[i] = i;
    for (uint32_t i = count; i > 1; i--) {
        seed = seed * 1664525u + 1013904223u;
        uint32_t j = (seed >> 8) % i, t = all_pages[j];
        all_pages[j] = all_pages[i - 1];
        all_pages[i - 1] = t;
    }
}

static const struct golden_row {
    uint32_t dim, group;
    double b0_sum, b0[4], b1_sum, b1[4];
} goldens[] = {
    {64,
     1,
     1299.726215634,
     {1.289679877, -.652218514, 1.695531440, .688580442},
     88.747186597,
     {-.017543951, .000462352, -.078950315, -.233237007}},
    {64,
     2,
     1299.727309728,
     {1.289679877, -.652218514, 1.695531440, .688580442},
     88.754704069,
     {-.017543951, .000462352, -.078950315, -.234320069}},
    {128,
     1,
     3676.284050418,
     {2.021179422, -.621524329, 2.555308518, .909204262},
     256.996913737,
     {-.026395070, .000699628, -.108575461, -.305424107}},
    {128,
     2,
     3676.284285564,
     {2.021179422, -.621524329, 2.555308518, .909204262},
     256.999533524,
     {-.026395070, .000699628, -.108575461, -.305722327}},
    {256,
     1,
     10342.698323058,
     {2.855279865, -.755849006, 3.754849523, 1.302396644},
     741.201261626,
     {-.042886167, .001016029, -.145347914, -.428225658}},
    {256,
     2,
     10342.698614989,
     {2.855279865, -.755849006, 3.754849523, 1.302396644},
     741.201669080,
     {-.042886167, .001016029, -.145347914, -.428258365}},
};

/* Sums to `sum_tolerance` (relative), single outputs to `tolerance` (of the largest). */
static void check_golden(const struct golden_row *row, const float *o, double sum_tolerance,
                         double tolerance, const char *who)
{
    const uint32_t D = row->dim, HD = 2 * D;
    const uint32_t at0[4] = {0, D + 5, 7 * HD, 9 * HD + D + 31};
    const uint32_t at1[4] = {0, D + 5, 5 * HD, 8 * HD + D + 31};
    double sum0 = 0, sum1 = 0;
    for (uint32_t i = 0; i < 10 * HD; i++)
        sum0 += fabs(o[i]);
    for (uint32_t i = 0; i < 9 * HD; i++)
        sum1 += fabs(o[10 * HD + i]);
    cr_expect_float_eq(sum0, row->b0_sum, sum_tolerance * row->b0_sum, "%s D %u g %u: %f", who, D,
                       row->group, sum0);
    cr_expect_float_eq(sum1, row->b1_sum, sum_tolerance * row->b1_sum, "%s D %u g %u: %f", who, D,
                       row->group, sum1);
    for (int i = 0; i < 4; i++) {
        cr_expect_float_eq(o[at0[i]], row->b0[i], tolerance * row->b0[2], "%s D %u g %u b0[%d] %f",
                           who, D, row->group, i, o[at0[i]]);
        cr_expect_float_eq(o[10 * HD + at1[i]], row->b1[i], -tolerance * row->b1[3],
                           "%s D %u g %u b1[%d] %f", who, D, row->group, i, o[10 * HD + at1[i]]);
    }
}

Test(attention_cuda, golden_numbers_at_every_head_dim_and_page_size)
{
    NEED_GPU();
    cr_assert_float_eq(gen(0, 0, 0, 1), .698412698413, 1e-6);
    cr_assert_float_eq(gen(3, 1, 5, 2), -.585317460317, 1e-6);
    for (size_t k = 0; k < sizeof goldens / sizeof *goldens; k++)
        for (uint32_t S = 16; S <= 128; S *= 2) {
            const uint32_t pages[] = {9, 4, 1};
            struct hstu_sequence s[2] = {
                {.history = 47, .cached = 40, .targets = 3, .pages = pages},
                {.history = 5, .cached = 0, .targets = 4}};
            struct bed bed = {.geometry = {2, 2, goldens[k].dim, S},
                              .layer = 1,
                              .group = goldens[k].group,
                              .scaling_length = 64,
                              .sequences = s,
                              .count = 2,
                              .pool_pages = 12,
                              .host_pages = 12};
            float o[19 * 512], unused;
            const struct hstu_attention_path *path[2];
            bed_open(&bed, golden);
            bed_reference_c(&bed, false, o);
            check_golden(&goldens[k], o, 1e-6, 1e-6, "C reference");
            bed_reference(&bed, false, o, &unused);
            check_golden(&goldens[k], o, 1e-5, 1e-5, "CUDA reference");
            for (uint32_t p = paths(path); p-- > 0;) {
                bed_run(&bed, path[p], o);
                check_golden(&goldens[k], o, 2e-3, 4e-3, path[p]->name);
            }
            bed_check(&bed);
            bed_close(&bed);
        }
}

/* Sequences whose lengths sit on every border, all in one batch. */
static void check_borders(uint32_t D, uint32_t S, uint32_t group, generator *gen_)
{
    const uint32_t lengths[][3] = {/* h, c, T */
                                   {0, 0, 37},
                                   {37, 0, 0},
                                   {37, 37, 37},
                                   {2 * S, 2 * S, 1},
                                   {2 * S + 1, 2 * S + 1, 64},
                                   {3 * S - 1, 3 * S - 1, 0},
                                   {150, 3 * S < 150 ? 3 * S : 150, 7},
                                   {131, S + 1, 65},
                                   {1, 0, 0},
                                   {1, 1, 2}};
    enum { COUNT = sizeof lengths / sizeof *lengths };
    struct hstu_sequence s[COUNT];
    uint32_t used = 0;
    shuffle_pages(128, D + S + group);
    for (uint32_t b = 0; b < COUNT; b++) {
        s[b] = (struct hstu_sequence){.history = lengths[b][0],
                                      .cached = lengths[b][1],
                                      .targets = lengths[b][2],
                                      .pages = all_pages + used};
        used += (lengths[b][1] + S - 1) / S;
    }
    cr_assert_leq(used, 128);
    struct bed bed = {.geometry = {2, 2, D, S},
                      .layer = 1,
                      .group = group,
                      .scaling_length = 128,
                      .sequences = s,
                      .count = COUNT,
                      .pool_pages = 128,
                      .host_pages = 128};
    bed_open(&bed, gen_);
    bed_check(&bed);
    bed_close(&bed);
}

Test(attention_cuda, every_head_dim_page_size_and_group_on_border_lengths)
{
    NEED_GPU();
    for (uint32_t D = 64; D <= 256; D *= 2)
        for (uint32_t S = 16; S <= 128; S *= 2)
            for (uint32_t group = 1; group <= 3; group++)
                check_borders(D, S, group, mixed);
}

Test(attention_cuda, scores_of_every_range)
{
    NEED_GPU();
    for (uint32_t D = 64; D <= 256; D *= 2) {
        check_borders(D, 32, 1, positive);
        check_borders(D, 32, 1, negative);
    }
}

Test(attention_cuda, long_sequences_and_the_split)
{
    NEED_GPU();
    const uint32_t lengths[][3] = {
        {1111, 0, 1111}, {1111, 1111, 37}, {1111, 1074, 37}, {4096, 3968, 256}, {3001, 2049, 100}};
    for (uint32_t D = 64; D <= 256; D *= 2)
        for (size_t k = 0; k < sizeof lengths / sizeof *lengths; k++)
            for (uint32_t group = 1; group <= (k == 0 ? 3 : 1); group++) {
                shuffle_pages(200, (uint32_t)k);
                struct hstu_sequence s = {.history = lengths[k][0],
                                          .cached = lengths[k][1],
                                          .targets = lengths[k][2],
                                          .pages = all_pages};
                struct bed bed = {.geometry = {1, 2, D, 32},
                                  .group = group,
                                  .scaling_length = 4352,
                                  .sequences = &s,
                                  .count = 1,
                                  .pool_pages = 200,
                                  .host_pages = 200};
                bed_open(&bed, mixed);
                bed_check(&bed);
                bed_close(&bed);
            }
}

Test(attention_cuda, pages_at_the_end_of_a_pool_beyond_8_gib)
{
    NEED_GPU();
    const struct skv_geometry g = {8, 4, 256, 32}; /* 1 MiB a page */
    const uint64_t pool_pages = 9 * 1024 + 100;
    size_t free_bytes, total;
    CUDA(cudaMemGetInfo(&free_bytes, &total));
    if (free_bytes < pool_pages * skv_page_bytes(&g) + (UINT64_C(2) << 30))
        cr_skip_test("not enough device memory");
    uint32_t pages[20];
    for (uint32_t i = 0; i < 20; i++)
        pages[i] = (uint32_t)pool_pages - 1 - i;
    struct hstu_sequence s = {.history = 640, .cached = 600, .targets = 30, .pages = pages};
    struct bed bed = {.geometry = g,
                      .layer = 7,
                      .group = 1,
                      .scaling_length = 4352,
                      .sequences = &s,
                      .count = 1,
                      .pool_pages = pool_pages,
                      .first_page = pool_pages - 20,
                      .host_pages = 20};
    bed_open(&bed, mixed);
    bed_check(&bed);
    bed_close(&bed);
}

/* Runs sequence 0 of `a` and of `b`; their outputs must have the same bits. */
static void check_same(struct bed *a, struct bed *b, generator *gen_)
{
    const struct hstu_attention_path *path[2];
    bed_open(a, gen_);
    bed_open(b, gen_);
    uint64_t bytes = (uint64_t)rows_of(&a->sequences[0]) * width(a) * 4;
    float *x = malloc((uint64_t)a->rows * width(a) * 4),
          *y = malloc((uint64_t)b->rows * width(b) * 4);
    for (uint32_t p = paths(path); p-- > 0;) {
        bed_run(a, path[p], x);
        bed_run(b, path[p], y);
        cr_expect_eq(memcmp(x, y, bytes), 0, "%s", path[p]->name);
    }
    free(x), free(y);
    bed_close(a);
    bed_close(b);
}

Test(attention_cuda, permuting_pages_changes_no_bit)
{
    NEED_GPU();
    uint32_t ascending[64], shuffled[64];
    shuffle_pages(64, 5);
    for (uint32_t i = 0; i < 64; i++) {
        ascending[i] = i;
        shuffled[i] = all_pages[i];
    }
    struct hstu_sequence s = {.history = 2000, .cached = 1950, .targets = 60, .pages = ascending};
    struct hstu_sequence t = s;
    t.pages = shuffled;
    struct bed a = {.geometry = {2, 2, 128, 32},
                    .layer = 1,
                    .group = 1,
                    .scaling_length = 2048,
                    .sequences = &s,
                    .count = 1,
                    .pool_pages = 64,
                    .host_pages = 64};
    struct bed b = a;
    b.sequences = &t;
    check_same(&a, &b, mixed);
}

Test(attention_cuda, batch_mates_change_no_bit)
{
    NEED_GPU();
    shuffle_pages(300, 9);
    struct hstu_sequence s[3] = {
        {.history = 1500, .cached = 1400, .targets = 60, .pages = all_pages},
        {.history = 200, .cached = 0, .targets = 40},
        {.history = 300, .cached = 290, .targets = 5, .pages = all_pages + 50}};
    struct hstu_sequence t[2] = {
        s[0], {.history = 4000, .cached = 3800, .targets = 17, .pages = all_pages + 60}};
    struct bed a = {.geometry = {2, 2, 256, 32},
                    .layer = 0,
                    .group = 1,
                    .scaling_length = 2048,
                    .sequences = s,
                    .count = 3,
                    .graph_rows = 512,
                    .pool_pages = 300,
                    .host_pages = 300};
    struct bed b = a;
    b.sequences = t;
    b.count = 2;
    check_same(&a, &b, mixed);
}
