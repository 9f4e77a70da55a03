/* The gate kernel (gate.cu) against doubles: every way that a row's columns and a graph's rows are
 * shared out, rows of no slice to more than are read at once, sums that are fp32 and that are bf16.
 * A row has the same bits whatever else is in the batch, wherever it is, and every time; padding is
 * not written, nor anything behind the last row. */
#include <stdio.h>

#include "cuda_bed.h"
#include "cuda_kernels.h"

enum { ROWS = 500, GUARDS = 16, PLANES = 16, N = 64 };

/* Multiprocessors of the device that is asked for, so that each has this many rows: 1, 2, 3, 4, 5,
 * 6, 8, 9, 16, 17, 100, 500. */
static const uint32_t sm_counts[] = {500, 264, 167, 125, 100, 84, 63, 56, 32, 30, 5, 1};
enum { SM_COUNTS = sizeof sm_counts / sizeof *sm_counts };

struct bed {
    uint32_t columns;
    bool rounded;
    float eps;
    uint8_t slices[ROWS];
    void *on_slices, *m, *weight, *bias, *y;
    float *partial;
};

static uint32_t mixed(uint32_t x)
{
    x = (x ^ x >> 16) * 0x45d9f3bu;
    return x ^ x >> 16;
}

/* A third of the rows with one slice, an eighth with none. Rows `period` apart are the same. Sums
 * are from middle - spread to middle + spread; NaN where no slice is. */
static void bed_open(struct bed *b, uint32_t columns, bool rounded, uint32_t period, float middle,
                     float spread, float eps)
{
    const uint64_t row = columns, plane = ROWS * row;
    b->columns = columns;
    b->rounded = rounded;
    b->eps = eps;
    for (uint32_t i = 0; i < ROWS; i++) {
        const uint32_t x = mixed(i % period + 1);
        b->slices[i] = x % 3 == 0 ? 1 : x % 8 == 1 ? 0 : (uint8_t)(1 + x / 8 % PLANES);
    }
    void *noise = random_on_device(PLANES * plane, 5, -1, 1);
    void *u = random_on_device(4 * plane, columns, -2, 2);
    uint16_t *random = to_host(noise, PLANES * plane * 2), *m = to_host(u, 4 * plane * 2);
    float *partial = malloc(PLANES * plane * sizeof *partial);
    for (uint32_t i = 0; i < ROWS; i++) {
        const uint64_t from = i % period;
        memmove(m + i * 4 * row, m + from * 4 * row, row * 2);
        for (uint32_t s = 0; s < PLANES; s++)
            for (uint64_t k = 0; k < row; k++) {
                const float x = bf16_to_float(random[s * plane + from * row + k]);
                partial[s * plane + i * row + k] =
                    s < b->slices[i] ? middle + spread * 1.001f * x : NAN;
            }
        if (rounded && b->slices[i] == 1) {
            uint16_t *half = (uint16_t *)(partial + i * row);
            for (uint64_t k = 0; k < row; k++)
                half[k] = bf16_from_float(partial[i * row + k]);
            memset(half + row, 0xff, row * 2);
        }
    }
    b->m = on_device(m, 4 * plane * 2);
    b->partial = on_device(partial, PLANES * plane * sizeof *partial);
    b->weight = random_on_device(row, 3, 0.5f, 1.5f);
    b->bias = random_on_device(row, 4, -0.5f, 0.5f);
    b->on_slices = on_device(b->slices, ROWS);
    b->y = on_device(NULL, (ROWS + GUARDS) * row * 2);
    cudaFree(noise), cudaFree(u);
    free(random), free(m), free(partial);
}

static void bed_close(struct bed *b)
{
    cudaFree(b->m), cudaFree(b->weight), cudaFree(b->bias), cudaFree(b->partial);
    cudaFree(b->on_slices), cudaFree(b->y);
}

/* y of all rows and of the guards behind them, as from a device with so many multiprocessors. */
static uint16_t *gate(struct bed *b, uint32_t sm_count)
{
    const uint64_t bytes = (uint64_t)(ROWS + GUARDS) * b->columns * 2;
    struct hstu_gate_args args = {.slices = b->on_slices,
                                  .partial = b->partial,
                                  .m = b->m,
                                  .weight = b->weight,
                                  .bias = b->bias,
                                  .y = b->y,
                                  .rows = ROWS,
                                  .columns = b->columns,
                                  .sm_count = sm_count,
                                  .inverse_n = 1.0f / N,
                                  .eps = b->eps,
                                  .rounded = b->rounded};
    CUDA(cudaMemset(b->y, 0xff, bytes));
    cr_assert_eq(hstu_launch_gate(&args, NULL), SKV_OK);
    CUDA(cudaDeviceSynchronize());
    return to_host(b->y, bytes);
}

/* What a row's y is of, in doubles. */
struct want {
    double *sums, *weight, *bias;
};

static void check_row(const struct bed *b, const uint16_t *y, const struct want *w,
                      const uint16_t *u, double slack, const char *what)
{
    double mean = 0, square = 0;
    for (uint32_t k = 0; k < b->columns; k++)
        mean += w->sums[k] / N / b->columns;
    for (uint32_t k = 0; k < b->columns; k++) {
        double d = w->sums[k] / N - mean;
        square += d * d / b->columns;
    }
    const double factor = 1 / sqrt(square + b->eps);
    for (uint32_t k = 0; k < b->columns; k++) {
        double normed = (w->sums[k] / N - mean) * factor, gate = bf16_to_float(u[k]);
        double parts = fabs(normed * w->weight[k]) + fabs(w->bias[k]);
        double want = (normed * w->weight[k] + w->bias[k]) * gate;
        /* Half of bf16's last place, and fp32's of what is subtracted. */
        cr_assert(fabs(bf16_to_float(y[k]) - want) <=
                      0x1.02p-8 * fabs(want) + slack * (1 + parts) * fabs(gate),
                  "%s, column %u: %g, not %g", what, k, bf16_to_float(y[k]), want);
    }
}

/* The sums of row i's slices; of no slice: 0. */
static void sum_slices(const struct bed *b, const float *partial, uint32_t i, double *sums)
{
    const uint64_t row = b->columns, plane = ROWS * row;
    const uint16_t *half = (const uint16_t *)(partial + i * row);
    memset(sums, 0, row * sizeof *sums);
    for (uint32_t s = 0; s < b->slices[i]; s++)
        for (uint64_t k = 0; k < row; k++)
            sums[k] += b->rounded && b->slices[i] == 1 ? bf16_to_float(half[k])
                                                       : partial[s * plane + i * row + k];
}

static double *widened(const void *from, uint32_t count)
{
    uint16_t *narrow = to_host(from, count * 2);
    double *wide = malloc(count * sizeof *wide);
    for (uint32_t k = 0; k < count; k++)
        wide[k] = bf16_to_float(narrow[k]);
    free(narrow);
    return wide;
}

static void check_nothing(const uint16_t *y, uint64_t count, const char *what)
{
    for (uint64_t k = 0; k < count; k++)
        cr_assert_eq(y[k], 0xffff, "%s is written", what);
}

static void check(const struct bed *b, uint16_t *const y[SM_COUNTS], double slack)
{
    const uint64_t row = b->columns, plane = ROWS * row;
    float *partial = (float *)to_host(b->partial, PLANES * plane * sizeof *partial);
    uint16_t *m = to_host(b->m, 4 * plane * 2);
    struct want w = {malloc(row * sizeof *w.sums), widened(b->weight, b->columns),
                     widened(b->bias, b->columns)};
    char what[160];
    for (uint32_t i = 0; i < ROWS + GUARDS; i++) {
        if (i < ROWS)
            sum_slices(b, partial, i, w.sums);
        for (uint32_t s = 0; s < SM_COUNTS; s++) {
            snprintf(what, sizeof what,
                     "%u columns, %u multiprocessors, rounded %d, row %u of %u slices", b->columns,
                     sm_counts[s], b->rounded, i, i < ROWS ? b->slices[i] : 0);
            if (i >= ROWS || b->slices[i] == 0)
                check_nothing(y[s] + i * row, row, what);
            else
                check_row(b, y[s] + i * row, &w, m + i * 4 * row, slack, what);
        }
    }
    free(w.sums), free(w.weight), free(w.bias), free(m), free(partial);
}

static void check_all(uint32_t columns, bool rounded, float middle, float spread, float eps,
                      double slack)
{
    struct bed b;
    uint16_t *y[SM_COUNTS];
    bed_open(&b, columns, rounded, ROWS, middle, spread, eps);
    for (uint32_t s = 0; s < SM_COUNTS; s++)
        y[s] = gate(&b, sm_counts[s]);
    check(&b, y, slack);
    for (uint32_t s = 0; s < SM_COUNTS; s++)
        free(y[s]);
    bed_close(&b);
}

/* The variance is of eps's size: both, and N, matter. */
Test(gate_cuda, is_u_times_the_norm_of_the_sum_of_slices)
{
    NEED_GPU();
    const uint32_t columns[] = {64, 192, 256, 320, 1024, 1536, 2048, 2304, 4096, 6400, 16384};
    for (uint32_t c = 0; c < sizeof columns / sizeof *columns; c++)
        for (int rounded = 0; rounded < 2; rounded++)
            check_all(columns[c], rounded, 20, 40, 0.2f, 1e-5);
}

/* A mean a thousand times the deviation: fp32's last places of it are seen, no more. */
Test(gate_cuda, takes_the_mean_off_before_it_squares)
{
    NEED_GPU();
    const uint32_t columns[] = {256, 1024, 2048, 16384};
    for (uint32_t c = 0; c < sizeof columns / sizeof *columns; c++)
        check_all(columns[c], false, 1000, 1.5f, 1e-5f, 5e-3);
}

enum { PERIOD = 37 };

/* As from so many multiprocessors: alike rows, a batch of few of them, and the same once more. */
static void check_alike(struct bed *b, uint32_t sm_count)
{
    const uint64_t row = b->columns;
    uint16_t *y = gate(b, sm_count);
    uint8_t few[ROWS] = {0};
    for (uint32_t i = PERIOD; i < ROWS; i++)
        cr_assert_arr_eq(y + i * row, y + i % PERIOD * row, row * 2,
                         "%u columns, %u multiprocessors, row %u", b->columns, sm_count, i);
    for (uint32_t i = 0; i < ROWS; i += 1 + mixed(i) % 7)
        few[i] = b->slices[i];
    for (int times = 0; times < 6; times++) {
        const uint8_t *slices = times % 2 ? few : b->slices;
        CUDA(cudaMemcpy(b->on_slices, slices, ROWS, cudaMemcpyHostToDevice));
        uint16_t *again = gate(b, sm_count);
        for (uint32_t i = 0; i < ROWS; i++)
            if (slices[i])
                cr_assert_arr_eq(again + i * row, y + i * row, row * 2,
                                 "%u columns, %u multiprocessors, row %u, batch %d", b->columns,
                                 sm_count, i, times);
        free(again);
    }
    CUDA(cudaMemcpy(b->on_slices, b->slices, ROWS, cudaMemcpyHostToDevice));
    free(y);
}

Test(gate_cuda, of_a_row_does_not_depend_on_where_or_with_whom_it_is)
{
    NEED_GPU();
    const uint32_t columns[] = {256, 1024, 2048, 4096, 16384};
    for (uint32_t c = 0; c < sizeof columns / sizeof *columns; c++) {
        struct bed b;
        bed_open(&b, columns[c], c % 2, PERIOD, 20, 40, 1e-5f);
        for (uint32_t s = 0; s < SM_COUNTS; s++)
            check_alike(&b, sm_counts[s]);
        bed_close(&b);
    }
}
