/* The two big products of a layer: UVQK (rows x 1024 x 4096, + bias) and projection (rows x 1024 x
 * 1024, + residual), for the row counts of the grid. On Hopper also with what is fused to them
 * (uvqk_sm90.cu, project_sm90.cu), for every shape of tiles, beside the passes that norm,
 * activation and gate are otherwise.
 *
 *   bench_gemm [--tune] [--choices N]
 *
 * For each, the time of every algorithm that cuBLASLt's heuristic offers (first N, 8), the first
 * one beside the best. --tune prints the rows of kernels/cuda_gemm_table.h instead. Eight weight
 * matrices take turns, as in a pass, so that they come from memory. */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_gemm.h"
#include "cuda_reference.h"
#include "cuda_state.h"

enum { E = 1024, HEADS = 4, LAYERS = 8, REPEATS = 5, WORKSPACE = 32 << 20, MOST_ROWS = 34816 };

/* Of bench_block's cells. */
static const uint32_t grid_rows[] = {384,  512,  768,  1024,  1280,  1536,  2048,
                                     2304, 2560, 3072, 4096,  4352,  4608,  5120,
                                     6144, 8704, 9216, 10240, 17408, 18432, 34816};

static cudaStream_t stream;
static cudaEvent_t before, after;
static char *a, *b, *bias, *out, *x;
static float *partial;
static struct hstu_moments *moments, *new_moments;
static struct hstu_fold *fold;
static uint32_t *no_slots, *all_rows; /* [MOST_ROWS] */
static uint8_t *one_slice;            /* [MOST_ROWS] */
static int sm_count, major;

static void check(int status, const char *what)
{
    if (status == 0)
        return;
    fprintf(stderr, "bench_gemm: %s: %s\n", what, skv_strerror(status));
    exit(1);
}

static void check_cuda(cudaError_t e)
{
    check(hstu_cuda_check(e, "CUDA"), "CUDA");
}

/* Microseconds of one of the eight launches captured since begin(); the best of REPEATS replays. */
static void begin(void)
{
    check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
}

static double replay(void)
{
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    double best = 1e30;
    check_cuda(cudaStreamEndCapture(stream, &graph));
    check_cuda(cudaGraphInstantiate(&exec, graph, 0));
    for (int i = 0; i <= REPEATS; i++) {
        float ms;
        check_cuda(cudaEventRecord(before, stream));
        check_cuda(cudaGraphLaunch(exec, stream));
        check_cuda(cudaEventRecord(after, stream));
        check_cuda(cudaStreamSynchronize(stream));
        check_cuda(cudaEventElapsedTime(&ms, before, after));
        if (i > 0 && ms * 1000 / LAYERS < best)
            best = ms * 1000 / LAYERS;
    }
    check_cuda(cudaGraphExecDestroy(exec));
    check_cuda(cudaGraphDestroy(graph));
    return best;
}

static double time_plan(struct hstu_gemm_plan *plan, enum hstu_product product, uint32_t n)
{
    begin();
    for (uint32_t l = 0; l < LAYERS; l++)
        check(hstu_gemm_run(plan, a, b + (uint64_t)l * E * n * 2,
                            product == HSTU_PRODUCT_BIAS ? bias : NULL, out, stream),
              "a product");
    return replay();
}

static const struct skv_geometry geometry = {LAYERS, HEADS, E / HEADS, 32};

static void uvqk(uint32_t layer, uint32_t rows, enum hstu_tiles tiles)
{
    struct hstu_uvqk_args args = {.x = a,
                                  .b = b + (uint64_t)layer * E * 4 * E * 2,
                                  .moments = moments,
                                  .fold = fold,
                                  .m = out,
                                  .slot = no_slots,
                                  .geometry = geometry,
                                  .rows = rows,
                                  .n = 4 * E,
                                  .k = E,
                                  .parts = E / 128,
                                  .sm_count = (uint32_t)sm_count,
                                  .eps = 1e-5f,
                                  .early = true,
                                  .tiles = tiles};
    check(hstu_launch_uvqk_sm90(&args, stream), "UVQK");
}

static void project(uint32_t layer, uint32_t rows, enum hstu_tiles tiles)
{
    struct hstu_project_args args = {.y = a,
                                     .b = b + (uint64_t)layer * E * E * 2,
                                     .x = x,
                                     .moments = new_moments,
                                     .rows = rows,
                                     .n = E,
                                     .k = E,
                                     .sm_count = (uint32_t)sm_count,
                                     .early = true,
                                     .tiles = tiles};
    check(hstu_launch_project_sm90(&args, stream), "projection");
}

static void norm(uint32_t rows)
{
    struct hstu_norm_args args = {.row_sequence = all_rows,
                                  .x = x,
                                  .weight = bias,
                                  .bias = bias,
                                  .out = a,
                                  .rows = rows,
                                  .columns = E,
                                  .eps = 1e-5f};
    check(hstu_launch_norm(&args, stream), "norm");
}

static void activate(uint32_t rows)
{
    struct hstu_activate_args args = {
        .row_sequence = all_rows, .slot = no_slots, .m = out, .geometry = geometry, .rows = rows};
    check(hstu_launch_activate(&args, stream), "activation");
}

/* Of sums of one slice. */
static void gate(uint32_t rows)
{
    struct hstu_gate_args args = {.slices = one_slice,
                                  .partial = partial,
                                  .m = out,
                                  .weight = bias,
                                  .bias = bias,
                                  .y = a,
                                  .rows = rows,
                                  .columns = E,
                                  .sm_count = (uint32_t)sm_count,
                                  .inverse_n = 1.0f / 4352,
                                  .eps = 1e-5f,
                                  .rounded = true};
    check(hstu_launch_gate(&args, stream), "gate");
}

#define TIME(call)                                                                                 \
    (begin(), ({                                                                                   \
         for (uint32_t l = 0; l < LAYERS; l++)                                                     \
             call;                                                                                 \
     }),                                                                                           \
     replay())

static void fused_shapes(uint32_t rows)
{
    static const char *const name[] = {"chosen",  "256x128", "128x256",
                                       "192x128", "128x128", "64x64"};
    printf("fused UVQK %6u:", rows);
    for (enum hstu_tiles tiles = HSTU_TILES_ANY; tiles <= HSTU_TILES_128X128; tiles++)
        printf(" %s %.1f", name[tiles], TIME(uvqk(l, rows, tiles)));
    printf("; norm alone %.1f, activation %.1f\n", TIME(norm(rows)), TIME(activate(rows)));
    printf("fused projection %6u: %s %.1f", rows, name[HSTU_TILES_ANY],
           TIME(project(l, rows, HSTU_TILES_ANY)));
    for (enum hstu_tiles tiles = HSTU_TILES_128X256; tiles <= HSTU_TILES_64X64; tiles++)
        printf(" %s %.1f", name[tiles], TIME(project(l, rows, tiles)));
    printf("; gate alone %.1f\n", TIME(gate(rows)));
}

static void shape(struct hstu_gemm *gemm, enum hstu_product product, uint32_t rows, uint32_t n,
                  uint32_t choices, bool tune)
{
    double first = 0, best = 1e30;
    uint32_t best_choice = 0;
    choices = hstu_gemm_choices(gemm, product, rows, n, E, choices);
    for (uint32_t choice = 0; choice < choices; choice++) {
        struct hstu_gemm_plan *plan;
        if (hstu_gemm_plan_choice(gemm, product, rows, n, E, choice, &plan) != 0)
            continue;
        double us = time_plan(plan, product, n);
        hstu_gemm_plan_close(plan);
        first = choice == 0 ? us : first;
        if (us < best) {
            best = us;
            best_choice = choice;
        }
    }
    double flop = 2.0 * rows * n * E;
    if (tune) {
        /* 3 % is noise: the first choice then. */
        if (best < 0.97 * first)
            printf("    {%zu, %d, %u, %u, %u, %u}, /* %.1f us, first %.1f */\n",
                   hstu_gemm_version(gemm), (int)product, rows, n, (unsigned)E, best_choice, best,
                   first);
        return;
    }
    printf("%-10s %6u %5u %9.1f %8.0f %9.1f %8.0f %4u of %u\n",
           product == HSTU_PRODUCT_BIAS ? "UVQK" : "projection", rows, n, first, flop / first / 1e6,
           best, flop / best / 1e6, best_choice, choices);
}

int main(int argc, char **argv)
{
    int gpus = 0;
    bool tune = false;
    uint32_t choices = 8;
    struct hstu_gemm *gemm;
    void *workspace;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--tune") == 0)
            tune = true;
        else if (strcmp(argv[i], "--choices") == 0 && i + 1 < argc)
            choices = (uint32_t)atoi(argv[++i]);
        else
            return fprintf(stderr, "usage: bench_gemm [--tune] [--choices N]\n"), 2;
    }
    if (cudaGetDeviceCount(&gpus) != cudaSuccess || gpus == 0)
        return fprintf(stderr, "bench_gemm: no GPU here\n"), 0;
    check_cuda(cudaStreamCreate(&stream));
    check_cuda(cudaEventCreate(&before));
    check_cuda(cudaEventCreate(&after));
    check_cuda(cudaMalloc(&workspace, WORKSPACE));
    check_cuda(cudaMalloc((void **)&a, (uint64_t)MOST_ROWS * E * 2));
    check_cuda(cudaMalloc((void **)&b, (uint64_t)LAYERS * E * 4 * E * 2));
    check_cuda(cudaMalloc((void **)&bias, 4 * E * 2));
    check_cuda(cudaMalloc((void **)&out, (uint64_t)MOST_ROWS * 4 * E * 2));
    check_cuda(cudaMalloc((void **)&no_slots, MOST_ROWS * 4));
    check_cuda(cudaMalloc((void **)&all_rows, MOST_ROWS * 4));
    check_cuda(cudaMalloc((void **)&one_slice, MOST_ROWS));
    check_cuda(cudaMalloc((void **)&x, (uint64_t)MOST_ROWS * E * 2));
    check_cuda(cudaMalloc((void **)&partial, (uint64_t)MOST_ROWS * E * 4));
    check_cuda(cudaMalloc((void **)&moments, MOST_ROWS * (E / 128) * sizeof *moments));
    check_cuda(cudaMalloc((void **)&new_moments, MOST_ROWS * (E / 64) * sizeof *moments));
    check_cuda(cudaMalloc((void **)&fold, 4 * E * sizeof *fold));
    check_cuda(cudaMemset(one_slice, 1, MOST_ROWS));
    check_cuda(cudaMemset(moments, 0, MOST_ROWS * (E / 128) * sizeof *moments));
    check_cuda(cudaMemset(fold, 0, 4 * E * sizeof *fold));
    check_cuda(cudaMemset(no_slots, 0xff, MOST_ROWS * 4));
    check_cuda(cudaMemset(all_rows, 0, MOST_ROWS * 4));
    check_cuda(cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, 0));
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    check(cuda_fill_random(a, (uint64_t)MOST_ROWS * E, 1, -1, 1), "random");
    check(cuda_fill_random(b, (uint64_t)LAYERS * E * 4 * E, 2, -0.1f, 0.1f), "random");
    check(cuda_fill_random(bias, 4 * E, 3, -1, 1), "random");
    check(cuda_fill_random(x, (uint64_t)MOST_ROWS * E, 5, -1, 1), "random");
    check(cuda_fill_random(partial, (uint64_t)MOST_ROWS * E * 2, 6, -1, 1), "random");
    check(cuda_fill_random(out, (uint64_t)MOST_ROWS * 4 * E, 4, -1, 1), "random");
    check(hstu_gemm_open(workspace, WORKSPACE, &gemm), "opening");
    if (!tune)
        printf("# %s; first and best of the heuristic's algorithms\n"
               "product      rows     n     first TFLOP/s      best TFLOP/s choice\n",
               hstu_gemm_name(gemm));
    for (size_t i = 0; i < sizeof grid_rows / sizeof *grid_rows; i++) {
        shape(gemm, HSTU_PRODUCT_BIAS, grid_rows[i], 4 * E, choices, tune);
        shape(gemm, HSTU_PRODUCT_RESIDUAL, grid_rows[i], E, choices, tune);
        if (major == 9 && !tune)
            fused_shapes(grid_rows[i]);
    }
    hstu_gemm_close(gemm);
    return 0;
}
