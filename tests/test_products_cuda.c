/* The two products of a layer with all that is fused to them (uvqk_sm90.cu, project_sm90.cu), every
 * shape of tiles, against the separate kernels: norm, product, activation; product, moments.
 * Results agree to a few flips of bf16's last bits, pages are exactly m, nothing else is written,
 * and moments are those of the rows as they were stored. */
#include <stdio.h>

#include "cuda_bed.h"

#define NEED_HOPPER()                                                                              \
    do {                                                                                           \
        int major_ = 0;                                                                            \
        NEED_GPU();                                                                                \
        CUDA(cudaDeviceGetAttribute(&major_, cudaDevAttrComputeCapabilityMajor, 0));               \
        if (major_ != 9)                                                                           \
            cr_skip_test("not a Hopper GPU");                                                      \
    } while (0)

/* Close, and mostly the same bits: norms are rounded at other places. */
static void check_close(const uint16_t *got, const uint16_t *want, uint64_t rows, uint64_t columns,
                        const char *what)
{
    double sum = 0, scale = 0;
    for (uint64_t i = 0; i < rows * columns; i++) {
        float x = bf16_to_float(got[i]), y = bf16_to_float(want[i]);
        cr_assert(fabsf(x - y) <= 0.03f * fmaxf(fabsf(y), 1.0f),
                  "%s: row %lu column %lu: %f, not %f", what, (unsigned long)(i / columns),
                  (unsigned long)(i % columns), x, y);
        sum += fabsf(x - y);
        scale += fabsf(y);
    }
    cr_expect(sum <= 0.004 * scale, "%s: off by %.5f of all", what, sum / scale);
}

static void check_moments(const struct hstu_moments *got, uint32_t parts, const uint16_t *x,
                          uint32_t rows, uint32_t columns, const char *what)
{
    const uint32_t width = columns / parts;
    for (uint64_t i = 0; i < (uint64_t)rows * parts; i++) {
        double mean = 0, square = 0;
        for (uint32_t k = 0; k < width; k++)
            mean += bf16_to_float(x[i * width + k]);
        mean /= width;
        for (uint32_t k = 0; k < width; k++)
            square += pow(bf16_to_float(x[i * width + k]) - mean, 2);
        const struct hstu_moments *m = &got[i % parts * rows + i / parts];
        cr_assert(fabs(m->mean - mean) <= 1e-4 * sqrt(square / width) &&
                      fabs(m->square - square) <= 1e-4 * square,
                  "%s: row %lu part %lu: %f %f, not %f %f", what, (unsigned long)(i / parts),
                  (unsigned long)(i % parts), m->mean, m->square, mean, square);
    }
}

/* What struct hstu_uvqk_args says of b and fold, on the CPU. */
static void fold_norm(uint16_t *b, const uint16_t *weight, const uint16_t *norm_bias,
                      const uint16_t *bias, uint32_t k, uint32_t n, struct hstu_fold *fold)
{
    for (uint32_t j = 0; j < n; j++)
        fold[j] = (struct hstu_fold){0, bf16_to_float(bias[j])};
    for (uint64_t i = 0; i < k; i++)
        for (uint32_t j = 0; j < n; j++) {
            float w = bf16_to_float(b[i * n + j]);
            b[i * n + j] = bf16_from_float(w * bf16_to_float(weight[i]));
            fold[j].sum += bf16_to_float(b[i * n + j]);
            fold[j].bias += w * bf16_to_float(norm_bias[i]);
        }
}

/* Where the pages in use begin, more than 4 GiB into the pool in most cases; what comes before is
 * not there. */
enum { FIRST_PAGE = 100003 };

/* Which row tiles somebody wants. */
enum wanted { SOME, NONE, ALL, WANTED_COUNT };

/* The list of struct hstu_wanted_tiles, and wanted[row]. Some: every third tile and the last. */
static uint32_t *wanted_on_device(enum wanted which, uint32_t rows, uint32_t tile_rows,
                                  bool *wanted)
{
    const uint32_t tiles = (rows + tile_rows - 1) / tile_rows;
    uint32_t *list = calloc(tiles + 2, 4);
    for (uint32_t t = 0; t < tiles; t++) {
        const bool is = which == ALL || (which == SOME && (t % 3 == 1 || t + 1 == tiles));
        if (is)
            list[++list[0]] = t;
        for (uint32_t r = t * tile_rows; r < rows && r < (t + 1) * tile_rows; r++)
            wanted[r] = is;
    }
    uint32_t *on = on_device(list, (tiles + 2) * 4);
    free(list);
    return on;
}

/* Of rows that nobody wants UVQK makes v and k alone: m's bits, and pages, as of all. */
static void check_uvqk_wanted(struct hstu_uvqk_args args, enum wanted which, const uint16_t *all,
                              void *pool, const uint16_t *page, uint64_t pool_bytes)
{
    const uint32_t rows = args.rows, n = args.n;
    bool *wanted = malloc(rows);
    args.wanted = args.slot; /* whichever, to ask how many rows a tile has */
    const uint32_t tile_rows = hstu_uvqk_sm90_listed_rows(&args);
    if (tile_rows == 0) /* no list is read */
        which = ALL;
    uint32_t *list = wanted_on_device(which, rows, tile_rows ? tile_rows : rows, wanted);
    CUDA(cudaMemset(args.m, 0xff, (uint64_t)rows * n * 2));
    CUDA(cudaMemset(pool, 0xff, pool_bytes));
    args.wanted = list;
    cr_assert_eq(hstu_launch_uvqk_sm90(&args, NULL), SKV_OK);
    CUDA(cudaDeviceSynchronize());
    uint16_t *m = to_host(args.m, (uint64_t)rows * n * 2), *pages = to_host(pool, pool_bytes);
    cr_expect_eq(memcmp(pages, page, pool_bytes), 0, "pages");
    for (uint64_t i = 0; i < (uint64_t)rows * n; i++) {
        const uint32_t row = (uint32_t)(i / n), part = i % n / (n / 4);
        if (part % 2 == 1 || wanted[row])
            cr_assert_eq(m[i], all[i], "row %u column %u", row, (uint32_t)(i % n));
        else
            cr_assert_eq(m[i], 0xffff, "row %u column %u: nobody wants it", row, (uint32_t)(i % n));
    }
    cudaFree(list);
    free(m), free(pages), free(wanted);
}

static void check_uvqk(uint32_t rows, uint32_t k, struct skv_geometry g, enum hstu_tiles tiles,
                       uint32_t sm_count)
{
    const uint32_t n = 4 * g.heads * g.head_dim, pages = rows / g.page_tokens + 2;
    const uint64_t elements = (uint64_t)rows * n, pool_bytes = pages * skv_page_bytes(&g);
    uint32_t *slot = malloc(rows * 4), *sequence = calloc(rows, 4);
    for (uint32_t r = 0; r < rows; r++) /* every third row has none; backwards through the pool */
        slot[r] = r % 3 == 2 ? UINT32_MAX : (FIRST_PAGE + pages) * g.page_tokens - 1 - r;
    const float most = 2.0f / sqrtf((float)k);
    void *x = random_on_device((uint64_t)rows * k, rows, -0.7f, 1.7f); /* the mean is not 0 */
    void *b = random_on_device((uint64_t)k * n, 2, -most, most);
    void *bias = random_on_device(n, 3, -1, 1);
    void *weight = random_on_device(k, 4, 0.5f, 1.5f);
    void *norm_bias = random_on_device(k, 5, -0.5f, 0.5f);
    void *normed = on_device(NULL, (uint64_t)rows * k * 2);
    void *on_slot = on_device(slot, rows * 4), *on_sequence = on_device(sequence, rows * 4);
    struct hstu_moments *moments = on_device(NULL, rows * sizeof *moments);
    uint16_t *folded = to_host(b, (uint64_t)k * n * 2), *host_bias = to_host(bias, n * 2);
    uint16_t *host_weight = to_host(weight, k * 2), *host_norm_bias = to_host(norm_bias, k * 2);
    struct hstu_fold *fold = malloc(n * sizeof *fold);
    fold_norm(folded, host_weight, host_norm_bias, host_bias, k, n, fold);
    void *on_folded = on_device(folded, (uint64_t)k * n * 2);
    void *on_fold = on_device(fold, n * sizeof *fold);
    void *m[2], *pool[2], *page0[2];
    for (int i = 0; i < 2; i++) {
        m[i] = on_device(NULL, elements * 2);
        pool[i] = on_device(NULL, pool_bytes);
        page0[i] = (void *)((uintptr_t)pool[i] - FIRST_PAGE * skv_page_bytes(&g));
        CUDA(cudaMemset(m[i], 0xff, elements * 2));
        CUDA(cudaMemset(pool[i], 0xff, pool_bytes));
    }
    struct hstu_norm_args norm = {.row_sequence = on_sequence,
                                  .x = x,
                                  .weight = weight,
                                  .bias = norm_bias,
                                  .out = normed,
                                  .rows = rows,
                                  .columns = k,
                                  .eps = 1e-5f};
    struct hstu_product_args product = {
        .a = normed, .b = b, .extra = bias, .out = m[0], .rows = rows, .n = n, .k = k};
    struct hstu_activate_args activate = {.row_sequence = on_sequence,
                                          .slot = on_slot,
                                          .m = m[0],
                                          .pool = page0[0],
                                          .geometry = g,
                                          .rows = rows,
                                          .layer = g.layers - 1};
    struct hstu_prepare_args prepare = {
        .row_sequence = on_sequence, .x = x, .out = moments, .rows = rows, .columns = k};
    struct hstu_uvqk_args fused = {.x = x,
                                   .b = on_folded,
                                   .moments = moments,
                                   .fold = on_fold,
                                   .m = m[1],
                                   .pool = page0[1],
                                   .slot = on_slot,
                                   .geometry = g,
                                   .layer = g.layers - 1,
                                   .rows = rows,
                                   .n = n,
                                   .k = k,
                                   .parts = 1,
                                   .sm_count = sm_count,
                                   .eps = 1e-5f,
                                   .tiles = tiles};
    cr_assert_eq(hstu_launch_norm(&norm, NULL), SKV_OK);
    cr_assert_eq(hstu_launch_product(HSTU_PRODUCT_BIAS, &product, NULL), SKV_OK);
    cr_assert_eq(hstu_launch_activate(&activate, NULL), SKV_OK);
    cr_assert_eq(hstu_launch_prepare(&prepare, NULL), SKV_OK);
    cr_assert_eq(hstu_launch_uvqk_sm90(&fused, NULL), SKV_OK);
    CUDA(cudaDeviceSynchronize());
    uint16_t *host_x = to_host(x, (uint64_t)rows * k * 2);
    struct hstu_moments *host_moments = (void *)to_host(moments, rows * sizeof *moments);
    check_moments(host_moments, 1, host_x, rows, k, "moments");
    uint16_t *host[2], *page = to_host(pool[1], pool_bytes);
    for (int i = 0; i < 2; i++)
        host[i] = to_host(m[i], elements * 2);
    check_close(host[1], host[0], rows, n, "m");
    /* The pages hold m's own bits, and nothing else changed. */
    uint64_t written = 0;
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t i = 0; slot[r] != UINT32_MAX && i < 2 * n / 4; i++) {
            uint32_t kv = i / (n / 4), at = i % (n / 4);
            uint64_t to =
                (slot[r] / g.page_tokens - FIRST_PAGE) * (skv_page_bytes(&g) / 2) +
                hstu_page_offset(&g, g.layers - 1, kv, at / g.head_dim, slot[r] % g.page_tokens) +
                at % g.head_dim;
            cr_assert_eq(page[to], host[1][(uint64_t)r * n + (kv ? 1 : 3) * (n / 4) + at]);
            written++;
        }
    for (uint64_t i = 0; i < pool_bytes / 2; i++)
        written -= page[i] != 0xffff;
    cr_expect_eq(written, 0, "only what has a slot is written");
    for (enum wanted which = SOME; which < WANTED_COUNT; which++)
        check_uvqk_wanted(fused, which, host[1], pool[1], page, pool_bytes);
    for (int i = 0; i < 2; i++) {
        cudaFree(m[i]), cudaFree(pool[i]);
        free(host[i]);
    }
    cudaFree(x), cudaFree(b), cudaFree(bias), cudaFree(weight), cudaFree(norm_bias);
    cudaFree(normed), cudaFree(on_slot), cudaFree(on_sequence), cudaFree(moments);
    cudaFree(on_folded), cudaFree(on_fold);
    free(slot), free(sequence), free(folded), free(host_bias), free(host_weight);
    free(host_norm_bias), free(fold), free(host_x), free(host_moments), free(page);
}

/* Rows that nobody wants stay as they are. */
static void check_project_wanted(struct hstu_project_args args, enum wanted which,
                                 const uint16_t *all, const uint16_t *before)
{
    const uint32_t rows = args.rows, n = args.n;
    bool *wanted = malloc(rows);
    args.wanted = (const uint32_t *)args.x; /* whichever, to ask how many rows a tile has */
    const uint32_t tile_rows = hstu_project_sm90_listed_rows(&args);
    if (tile_rows == 0) /* no list is read */
        which = ALL;
    uint32_t *list = wanted_on_device(which, rows, tile_rows ? tile_rows : rows, wanted);
    CUDA(cudaMemcpy(args.x, before, (uint64_t)rows * n * 2, cudaMemcpyHostToDevice));
    args.wanted = list;
    cr_assert_eq(hstu_launch_project_sm90(&args, NULL), SKV_OK);
    CUDA(cudaDeviceSynchronize());
    uint16_t *x = to_host(args.x, (uint64_t)rows * n * 2);
    for (uint64_t i = 0; i < (uint64_t)rows * n; i++)
        cr_assert_eq(x[i], (wanted[i / n] ? all : before)[i], "row %lu", (unsigned long)(i / n));
    cudaFree(list);
    free(x), free(wanted);
}

static void check_project(uint32_t rows, uint32_t k, uint32_t n, enum hstu_tiles tiles,
                          uint32_t sm_count)
{
    const uint64_t elements = (uint64_t)rows * n;
    const float most = 2.0f / sqrtf((float)k);
    char what[80];
    snprintf(what, sizeof what, "%u rows, k %u, n %u, tiles %d", rows, k, n, (int)tiles);
    void *y = random_on_device((uint64_t)rows * k, 7, -1, 1);
    void *b = random_on_device((uint64_t)k * n, 2, -most, most), *x[2];
    for (int i = 0; i < 2; i++)
        x[i] = random_on_device(elements, 9, -1, 3);
    uint16_t *before = to_host(x[1], elements * 2);
    struct hstu_moments *moments = on_device(NULL, (uint64_t)rows * (n / 64) * sizeof *moments);
    struct hstu_product_args product = {.a = y, .b = b, .out = x[0], .rows = rows, .n = n, .k = k};
    struct hstu_project_args fused = {.y = y,
                                      .b = b,
                                      .x = x[1],
                                      .moments = moments,
                                      .rows = rows,
                                      .n = n,
                                      .k = k,
                                      .sm_count = sm_count,
                                      .tiles = tiles};
    cr_assert_eq(hstu_launch_product(HSTU_PRODUCT_RESIDUAL, &product, NULL), SKV_OK);
    cr_assert_eq(hstu_launch_project_sm90(&fused, NULL), SKV_OK);
    CUDA(cudaDeviceSynchronize());
    const uint32_t parts = hstu_project_sm90_parts(&fused);
    uint16_t *want = to_host(x[0], elements * 2), *got = to_host(x[1], elements * 2);
    struct hstu_moments *new_moments =
        (void *)to_host(moments, (uint64_t)rows * parts * sizeof *moments);
    check_close(got, want, rows, n, what);
    check_moments(new_moments, parts, got, rows, n, what);
    for (enum wanted which = SOME; which < WANTED_COUNT; which++)
        check_project_wanted(fused, which, got, before);
    cudaFree(y), cudaFree(b), cudaFree(moments), cudaFree(x[0]), cudaFree(x[1]);
    free(want), free(got), free(new_moments), free(before);
}

/* Multiprocessors: fewer than a row of tiles has columns, and no divisor of them. */
static const uint32_t few[] = {2, 6, 10};

Test(products_cuda, uvqk_equals_norm_product_and_activation)
{
    NEED_HOPPER();
    for (enum hstu_tiles tiles = HSTU_TILES_ANY; tiles <= HSTU_TILES_128X128; tiles++) {
        check_uvqk(64, 64, (struct skv_geometry){1, 1, 64, 16}, tiles, 132);
        check_uvqk(320, 192, (struct skv_geometry){2, 2, 128, 32}, tiles, 132);
        check_uvqk(384, 1024, (struct skv_geometry){1, 4, 256, 32}, tiles, 132);
        check_uvqk(2304, 1024, (struct skv_geometry){1, 4, 256, 128}, tiles, 132);
        check_uvqk(5120, 512, (struct skv_geometry){2, 4, 128, 64}, tiles, 132);
        for (uint32_t s = 0; s < sizeof few / sizeof *few; s++)
            check_uvqk(1000, 128, (struct skv_geometry){1, 4, 128, 32}, tiles, few[s]);
    }
}

/* The row tiles that prepare lists, against their definition. */
static void check_list(const struct hstu_counts *counts, const uint32_t *list, uint32_t tile_rows)
{
    const struct hstu_layout *l = &counts->layout;
    const uint32_t rows = l->row_start[l->batch];
    uint32_t found = 0;
    for (uint32_t tile = 0; tile * tile_rows < rows; tile++) {
        bool wanted = false;
        for (uint32_t b = 0; b < l->batch; b++)
            for (uint32_t r = l->row_start[b]; r < l->row_start[b + 1]; r++)
                wanted |=
                    r / tile_rows == tile &&
                    (counts->every_row || r - l->row_start[b] >= l->history[b] - l->cached[b]);
        if (wanted)
            cr_assert_eq(list[1 + found++], tile, "tiles of %u rows", tile_rows);
    }
    cr_assert_eq(list[0], found, "tiles of %u rows", tile_rows);
}

Test(products_cuda, wanted_tiles_are_those_of_wanted_rows)
{
    NEED_GPU();
    enum { MOST = 65536 };
    static const uint32_t tile_rows[][2] = {{64, 192}, {128, 256}};
    uint32_t *on[2] = {on_device(NULL, MOST / 64 * 4 + 8), on_device(NULL, MOST / 64 * 4 + 8)};
    srand(5);
    for (int round = 0; round < 200; round++) {
        struct hstu_counts counts;
        memset(&counts, 0xff, sizeof counts); /* what lies behind the batch */
        struct hstu_layout *l = &counts.layout;
        l->batch = round % 2 ? SKV_MAX_BATCH : 1 + (uint32_t)rand() % SKV_MAX_BATCH;
        l->row_start[0] = 0;
        for (uint32_t b = 0; b < l->batch; b++) {
            const uint32_t most = round % 3 ? MOST / l->batch : 100, rows = (uint32_t)rand() % most;
            l->row_start[b + 1] = l->row_start[b] + rows;
            l->cached[b] = (uint32_t)rand() % MOST;
            l->history[b] = l->cached[b] + (rand() % 4 == 0 ? rows : (uint32_t)rand() % (rows + 1));
        }
        counts.every_row = round % 5 == 0;
        struct hstu_counts *on_counts = on_device(&counts, sizeof counts);
        for (int k = 0; k < 2; k++) {
            struct hstu_prepare_args prepare = {
                .counts = on_counts,
                .wanted = {{tile_rows[k][0], on[0]}, {tile_rows[k][1], on[1]}}};
            cr_assert_eq(hstu_launch_prepare(&prepare, NULL), SKV_OK);
            CUDA(cudaDeviceSynchronize());
            for (int i = 0; i < 2; i++) {
                uint32_t *list = (uint32_t *)to_host(on[i], MOST / 64 * 4 + 8);
                check_list(&counts, list, tile_rows[k][i]);
                free(list);
            }
        }
        cudaFree(on_counts);
    }
    cudaFree(on[0]), cudaFree(on[1]);
}

/* What is faster without what nobody wants, in the benchmark model's layers. */
Test(products_cuda, large_graphs_leave_out_what_nobody_wants)
{
    static const uint32_t list[1];
    struct hstu_uvqk_args uvqk = {
        .n = 4096, .k = 1024, .parts = 8, .sm_count = 132, .wanted = list};
    struct hstu_project_args project = {.n = 1024, .k = 1024, .sm_count = 132, .wanted = list};
    static const uint32_t both[] = {2304, 2560, 4096, 4352, 6144, 10240, 18432, 34816};
    for (uint32_t i = 0; i < sizeof both / sizeof *both; i++) {
        uvqk.rows = project.rows = both[i];
        cr_expect_gt(hstu_uvqk_sm90_listed_rows(&uvqk), 0, "UVQK of %u rows", both[i]);
        cr_expect_gt(hstu_project_sm90_listed_rows(&project), 0, "projection of %u rows", both[i]);
    }
    uvqk.rows = project.rows = 384;
    cr_expect_eq(hstu_uvqk_sm90_listed_rows(&uvqk), 0, "one round, whatever is left out");
    cr_expect_eq(hstu_project_sm90_listed_rows(&project), 0);
    uvqk.wanted = project.wanted = NULL;
    cr_expect_eq(hstu_uvqk_sm90_listed_rows(&uvqk), 0);
    cr_expect_eq(hstu_project_sm90_listed_rows(&project), 0);
}

/* The head on Hopper against the other one, `batch` sequences; a row of zeros has no length. Rows
 * are an odd number of 64s, so that the last tile of 128 goes past the end. */
static void check_head(uint32_t batch, uint32_t k, uint32_t hidden, uint32_t outputs,
                       uint32_t parts, uint32_t sm_count)
{
    static const uint32_t some[][2] = {{37, 50}, {0, 130}, {300, 0}, {64, 1}, {5, 700}};
    uint32_t added[SKV_MAX_BATCH], targets[SKV_MAX_BATCH];
    struct hstu_counts counts = {.layout = {.batch = batch}};
    struct hstu_layout *l = &counts.layout;
    for (uint32_t b = 0; b < batch; b++) {
        added[b] = b < 5 ? some[b][0] : b % 7;
        targets[b] = b < 5 ? some[b][1] : b % 4;
        l->row_start[b + 1] = l->row_start[b] + added[b] + targets[b];
        l->history[b] = 1000;
        l->cached[b] = 1000 - added[b];
        counts.target_start[b + 1] = counts.target_start[b] + targets[b];
    }
    const uint32_t rows = ((l->row_start[batch] + 63) / 64 | 1) * 64;
    const uint32_t width = k / parts, count = counts.target_start[batch] * outputs;
    counts.candidates = counts.target_start[batch];
    uint32_t *sequence = malloc(rows * 4);
    memset(sequence, 0xff, rows * 4);
    for (uint32_t b = 0; b < batch; b++)
        for (uint32_t r = l->row_start[b]; r < l->row_start[b + 1]; r++)
            sequence[r] = b;
    void *x = random_on_device((uint64_t)rows * k, k, -3, 5);
    CUDA(cudaMemset((uint16_t *)x + 40 * k, 0, k * 2)); /* a candidate */
    uint16_t *host_x = to_host(x, (uint64_t)rows * k * 2);
    struct hstu_moments *moments = malloc((uint64_t)rows * parts * sizeof *moments);
    for (uint64_t i = 0; i < (uint64_t)rows * parts; i++) {
        double sum = 0, square = 0;
        for (uint32_t c = 0; c < width; c++)
            sum += bf16_to_float(host_x[i * width + c]);
        for (uint32_t c = 0; c < width; c++)
            square += pow(bf16_to_float(host_x[i * width + c]) - sum / width, 2);
        moments[i % parts * rows + i / parts] =
            (struct hstu_moments){(float)(sum / width), (float)square};
    }
    struct hstu_counts *on_counts = on_device(&counts, sizeof counts);
    void *on_sequence = on_device(sequence, rows * 4), *on_candidates = on_device(NULL, rows * 4);
    void *norms = on_device(NULL, rows * 4);
    void *on_moments = on_device(moments, (uint64_t)rows * parts * sizeof *moments);
    void *weights[4] = {random_on_device((uint64_t)k * hidden, 2, -0.5f, 0.5f),
                        random_on_device(hidden, 3, -0.5f, 0.5f),
                        random_on_device((uint64_t)hidden * outputs, 4, -0.3f, 0.3f),
                        random_on_device(outputs, 5, -1, 1)};
    const uint64_t scratch_bytes[2] = {(uint64_t)rows * hidden * 4,
                                       (uint64_t)rows * hidden / 64 * outputs * 4};
    void *scratch[2], *logits[2];
    struct hstu_head_args args = {.batch = {.row_sequence = on_sequence,
                                            .row_start = on_counts->layout.row_start,
                                            .history = on_counts->layout.history,
                                            .cached = on_counts->layout.cached,
                                            .target_start = on_counts->target_start},
                                  .x = x,
                                  .weight1 = weights[0],
                                  .bias1 = weights[1],
                                  .weight2 = weights[2],
                                  .bias2 = weights[3],
                                  .row_count = &on_counts->candidates,
                                  .rows = rows,
                                  .embed = k,
                                  .hidden_columns = hidden,
                                  .outputs = outputs,
                                  .candidate_row = on_candidates,
                                  .inverse_norm = norms,
                                  .moments = on_moments,
                                  .parts = parts,
                                  .sm_count = sm_count};
    const uint32_t tile_rows = hstu_head_sm90_listed_rows(&args);
    uint32_t *list = calloc(rows / 64 + 2, 4);
    for (uint32_t t = 0; t * tile_rows < rows; t++) {
        bool any = false;
        for (uint32_t r = t * tile_rows; r < rows && r < (t + 1) * tile_rows; r++)
            any |= sequence[r] != UINT32_MAX && r >= l->row_start[sequence[r]] + added[sequence[r]];
        if (any)
            list[++list[0]] = t;
    }
    void *wanted = on_device(list, (rows / 64 + 2) * 4);
    args.wanted = wanted;
    float *host[2];
    for (int i = 0; i < 2; i++) {
        logits[i] = on_device(NULL, (uint64_t)rows * outputs * 4);
        CUDA(cudaMemset(logits[i], 0xff, (uint64_t)rows * outputs * 4));
        scratch[i] = on_device(NULL, scratch_bytes[i]);
        CUDA(cudaMemset(scratch[i], 0xff, scratch_bytes[i]));
        args.scratch = scratch[i];
        args.logits = logits[i];
        cr_assert_eq(i ? hstu_launch_head_sm90(&args, NULL) : hstu_launch_head(&args, NULL),
                     SKV_OK);
        CUDA(cudaDeviceSynchronize());
        host[i] = (float *)to_host(logits[i], (uint64_t)rows * outputs * 4);
    }
    for (uint32_t i = 0; i < count; i++)
        cr_assert(fabsf(host[1][i] - host[0][i]) <= 1e-3f * fmaxf(fabsf(host[0][i]), 1),
                  "k %u hidden %u outputs %u: logit %u: %f, not %f", k, hidden, outputs, i,
                  host[1][i], host[0][i]);
    for (uint64_t i = count; i < (uint64_t)rows * outputs; i++)
        cr_assert(isnan(host[1][i]), "only candidates have logits");
    for (int i = 0; i < 4; i++)
        cudaFree(weights[i]);
    cudaFree(x), cudaFree(on_counts), cudaFree(on_sequence), cudaFree(on_candidates);
    cudaFree(norms), cudaFree(on_moments), cudaFree(wanted);
    cudaFree(scratch[0]), cudaFree(scratch[1]), cudaFree(logits[0]), cudaFree(logits[1]);
    free(sequence), free(host_x), free(moments), free(list), free(host[0]), free(host[1]);
}

Test(products_cuda, the_head_on_hopper_equals_the_other_one)
{
    NEED_HOPPER();
    check_head(5, 1024, 1024, 1, 8, 132);
    check_head(5, 1024, 1024, 1, 4, 16);
    check_head(5, 256, 2048, 2, 4, 132); /* tiles of 128 x 128 */
    check_head(5, 512, 512, 8, 4, 132);
    check_head(SKV_MAX_BATCH, 192, 128, 3, 1, 132);
    check_head(3, 64, 64, HSTU_HEAD_SM90_OUTPUTS, 1, 2);
    check_head(5, 256, 192, 5, 4, 6);
}

static void check_projections(enum hstu_tiles tiles)
{
    check_project(64, 64, 256, tiles, 132);
    check_project(384, 1024, 1024, tiles, 132);
    check_project(1000, 512, 512, tiles, 132);
    check_project(9000, 1024, 1024, tiles, 132);
    for (uint32_t s = 0; s < sizeof few / sizeof *few; s++)
        check_project(1000, 128, 1024, tiles, few[s]);
}

Test(products_cuda, projection_equals_product_and_residual)
{
    NEED_HOPPER();
    check_projections(HSTU_TILES_ANY);
    for (enum hstu_tiles tiles = HSTU_TILES_128X256; tiles <= HSTU_TILES_64X64; tiles++)
        check_projections(tiles);
    check_project(320, 128, 192, HSTU_TILES_ANY, 132);
}
