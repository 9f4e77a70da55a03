/* The gate kernel (gate.cu) against doubles: every way that a row's columns and a graph's rows are
 * shared out, rows of no slice to more than are read at once, sums that are fp32 and that are bf16.
 * A row has the same bits whatever else is in the batch, and padding is not written. */
#include <stdio.h>

#include "cuda_bed.h"
#include "cuda_kernels.h"

enum { ROWS = 200, PLANES = 11, N = 64 };
#define EPS 1e-5f

struct bed {
    uint32_t columns;
    uint8_t slices[ROWS];
    void *on_slices, *m, *weight, *bias, *y;
    float *partial;
};

/* Sums around a mean that is not zero, NaN where no slice is. */
static void bed_open(struct bed *b, uint32_t columns, bool rounded)
{
    const uint64_t row = columns, plane = ROWS * row;
    uint16_t *random;
    float *partial = malloc(PLANES * plane * sizeof *partial);
    b->columns = columns;
    for (uint32_t i = 0; i < ROWS; i++) /* a third with one slice, some with none */
        b->slices[i] = i % 3 == 0 ? 1 : i % 7 == 0 ? 0 : (uint8_t)(1 + i * 5 % PLANES);
    b->m = random_on_device(4 * plane, columns, -2, 2);
    b->weight = random_on_device(row, 3, 0.5f, 1.5f);
    b->bias = random_on_device(row, 4, -0.5f, 0.5f);
    void *values = random_on_device(PLANES * plane, 5, -20, 60);
    random = to_host(values, PLANES * plane * 2);
    for (uint64_t i = 0; i < PLANES * plane; i++) {
        const uint32_t slices = b->slices[i % plane / row];
        partial[i] = i / plane < slices ? bf16_to_float(random[i]) * 1.001f : NAN;
    }
    for (uint32_t i = 0; rounded && i < ROWS; i++)
        if (b->slices[i] == 1) {
            uint16_t *half = (uint16_t *)(partial + i * row);
            for (uint64_t k = 0; k < row; k++)
                half[k] = random[i * row + k];
            memset(half + row, 0xff, row * 2);
        }
    b->partial = on_device(partial, PLANES * plane * sizeof *partial);
    b->on_slices = on_device(b->slices, ROWS);
    b->y = on_device(NULL, plane * 2);
    cudaFree(values);
    free(random), free(partial);
}

static void bed_close(struct bed *b)
{
    cudaFree(b->m), cudaFree(b->weight), cudaFree(b->bias), cudaFree(b->partial);
    cudaFree(b->on_slices), cudaFree(b->y);
}

/* y of all rows, as from a device with so many multiprocessors. */
static uint16_t *gate(struct bed *b, uint32_t sm_count, bool rounded)
{
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
                                  .eps = EPS,
                                  .rounded = rounded};
    CUDA(cudaMemset(b->y, 0xff, (uint64_t)ROWS * b->columns * 2));
    cr_assert_eq(hstu_launch_gate(&args, NULL), SKV_OK);
    CUDA(cudaDeviceSynchronize());
    return to_host(b->y, (uint64_t)ROWS * b->columns * 2);
}

static void check_row(const uint16_t *y, const double *sums, const uint16_t *u,
                      const uint16_t *weight, const uint16_t *bias, uint32_t columns,
                      const char *what)
{
    double mean = 0, square = 0;
    for (uint32_t k = 0; k < columns; k++)
        mean += sums[k] / N / columns;
    for (uint32_t k = 0; k < columns; k++) {
        double d = sums[k] / N - mean;
        square += d * d / columns;
    }
    for (uint32_t k = 0; k < columns; k++) {
        double normed = (sums[k] / N - mean) / sqrt(square + EPS);
        double parts = fabs(normed * bf16_to_float(weight[k])) + fabs(bf16_to_float(bias[k]));
        double want = normed * bf16_to_float(weight[k]) + bf16_to_float(bias[k]);
        double scale = fabs(bf16_to_float(u[k]));
        want *= bf16_to_float(u[k]);
        /* Half of bf16's last place, and fp32's of what is subtracted. */
        cr_assert(fabs(bf16_to_float(y[k]) - want) <=
                      0x1.02p-8 * fabs(want) + 1e-5 * (1 + parts) * scale,
                  "%s, column %u: %g, not %g", what, k, bf16_to_float(y[k]), want);
    }
}

static void check(struct bed *b, const uint16_t *y, bool rounded, const char *what)
{
    const uint64_t row = b->columns, plane = ROWS * row;
    float *partial = (float *)to_host(b->partial, PLANES * plane * sizeof *partial);
    uint16_t *m = to_host(b->m, 4 * plane * 2), *weight = to_host(b->weight, row * 2);
    uint16_t *bias = to_host(b->bias, row * 2);
    double *sums = malloc(row * sizeof *sums);
    char which[160];
    for (uint32_t i = 0; i < ROWS; i++) {
        snprintf(which, sizeof which, "%s, row %u of %u slices", what, i, b->slices[i]);
        for (uint64_t k = 0; k < row; k++) {
            sums[k] = 0;
            for (uint32_t s = 0; s < b->slices[i]; s++)
                sums[k] += rounded && b->slices[i] == 1
                               ? bf16_to_float(((uint16_t *)(partial + i * row))[k])
                               : partial[s * plane + i * row + k];
            if (b->slices[i] == 0)
                cr_assert_eq(y[i * row + k], 0xffff, "%s: padding is written", which);
        }
        if (b->slices[i])
            check_row(y + i * row, sums, m + i * 4 * row, weight, bias, b->columns, which);
    }
    free(sums), free(bias), free(weight), free(m), free(partial);
}

Test(gate_cuda, is_u_times_the_norm_of_the_sum_of_slices)
{
    NEED_GPU();
    const uint32_t columns[] = {64, 192, 256, 320, 1024, 1536, 2048, 4096, 6400, 16384};
    const uint32_t sm_counts[] = {132, 40, 25, 13, 7, 1};
    for (uint32_t c = 0; c < sizeof columns / sizeof *columns; c++)
        for (int rounded = 0; rounded < 2; rounded++) {
            struct bed b;
            bed_open(&b, columns[c], rounded);
            for (uint32_t s = 0; s < sizeof sm_counts / sizeof *sm_counts; s++) {
                char what[80];
                snprintf(what, sizeof what, "%u columns, %u multiprocessors, rounded %d",
                         columns[c], sm_counts[s], rounded);
                uint16_t *y = gate(&b, sm_counts[s], rounded);
                check(&b, y, rounded, what);
                free(y);
            }
            bed_close(&b);
        }
}

Test(gate_cuda, of_a_row_does_not_depend_on_the_others)
{
    NEED_GPU();
    const uint32_t sm_counts[] = {132, 25, 13, 3};
    struct bed b;
    bed_open(&b, 1024, false);
    for (uint32_t s = 0; s < sizeof sm_counts / sizeof *sm_counts; s++) {
        uint8_t alone[ROWS] = {0};
        const uint32_t kept[] = {1, 38, 39, ROWS - 1};
        uint16_t *all = gate(&b, sm_counts[s], false);
        for (uint32_t i = 0; i < sizeof kept / sizeof *kept; i++)
            alone[kept[i]] = b.slices[kept[i]];
        CUDA(cudaMemcpy(b.on_slices, alone, ROWS, cudaMemcpyHostToDevice));
        uint16_t *few = gate(&b, sm_counts[s], false);
        for (uint32_t i = 0; i < sizeof kept / sizeof *kept; i++)
            cr_assert_arr_eq(few + kept[i] * 1024, all + kept[i] * 1024, 1024 * 2,
                             "%u multiprocessors, row %u", sm_counts[s], kept[i]);
        CUDA(cudaMemcpy(b.on_slices, b.slices, ROWS, cudaMemcpyHostToDevice));
        free(all), free(few);
    }
    bed_close(&b);
}
