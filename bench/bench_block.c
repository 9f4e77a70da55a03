/* The HSTU block on CUDA over the whole grid: batch 1 to 8, history 128 to 4096, new tokens 128 to
 * all of it, 256 candidates; the benchmark model (8 layers, 1024, 4 heads of 256, pages of 32).
 *
 *   bench_block [--csv] [--seconds S] [--batch B] [--history H] [--new N] [--every-row]
 *
 * "block" is the layers alone, one graph, timed by events, L2 emptied before each run; "gated" the
 * same with open gates; "pass" the whole graph with pull and head; "launch" what the worker sees of
 * hstu_runner_launch(); "last gate" from when the last gate opens, all else done, to the pass's
 * end. The three graphs run by turns. The floor is the products at 700 TFLOP/s and the attention
 * (exact mask) at 600, one after the other, of what a pass needs: of history rows the last layer's
 * K and V alone, unless --every-row asks for all of their outputs, as the peers make them. Weights,
 * pages and tokens are random. */
#include <assert.h>
#include <cuda_runtime_api.h>
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench_peers.h"
#include "clock.h"
#include "cuda_reference.h"
#include "cuda_state.h"
#include "device.h"

enum {
    CANDIDATES = 256,
    MAX_BATCH = 8,
    MAX_HISTORY = 4096,
    GRAPHS = 3,
    MAX_RUNS = 4000,
    TURN = 5,
    FLUSH = 256 << 20
};

static double seconds = 1;
static bool csv, every_row;
static uint32_t only_batch, only_history, only_new;

static void *flush_memory;
static cudaEvent_t before[TURN], after[TURN];

struct times {
    double median, p90; /* microseconds */
};

struct timed {
    uint32_t instance; /* of the graph */
    struct times times;
};

static void check(int status, const char *what)
{
    if (status != 0) {
        fprintf(stderr, "bench_block: %s: %s\n", what, skv_strerror(status));
        exit(1);
    }
}

static void check_cuda(cudaError_t e)
{
    check(hstu_cuda_check(e, "CUDA"), "CUDA");
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static struct times summarise(double *samples, uint32_t count)
{
    qsort(samples, count, sizeof *samples, ascending);
    return (struct times){samples[count / 2], samples[count * 9 / 10]};
}

/* Runs the graphs of these instances, cold, for `seconds` each, at least 10 times: a few runs of
 * one, a few of the next, so that a board that warms up slows all of them alike. */
static void time_graphs(struct hstu_cuda *c, uint32_t rows, struct timed timed[GRAPHS])
{
    static double samples[GRAPHS][MAX_RUNS];
    static_assert(MAX_RUNS % TURN == 0, "whole turns");
    cudaGraphExec_t graph[GRAPHS];
    for (uint32_t k = 0; k < GRAPHS; k++) {
        check(hstu_cuda_graph(c, rows, timed[k].instance, &graph[k]), "capturing");
        for (int i = 0; i < 3; i++)
            check_cuda(cudaGraphLaunch(graph[k], c->stream));
    }
    check_cuda(cudaStreamSynchronize(c->stream));
    uint64_t end = skv_now_ns() + (uint64_t)(GRAPHS * seconds * 1e9);
    uint32_t runs = 0;
    for (; runs < MAX_RUNS && (runs < 10 || skv_now_ns() < end); runs += TURN)
        for (uint32_t k = 0; k < GRAPHS; k++) {
            for (uint32_t i = 0; i < TURN; i++) {
                check(cuda_flush(flush_memory, FLUSH, c->stream), "flush");
                check_cuda(cudaEventRecord(before[i], c->stream));
                check_cuda(cudaGraphLaunch(graph[k], c->stream));
                check_cuda(cudaEventRecord(after[i], c->stream));
            }
            check_cuda(cudaStreamSynchronize(c->stream));
            for (uint32_t i = 0; i < TURN; i++) {
                float ms;
                check_cuda(cudaEventElapsedTime(&ms, before[i], after[i]));
                samples[k][runs + i] = ms * 1000.0;
            }
        }
    for (uint32_t k = 0; k < GRAPHS; k++)
        timed[k].times = summarise(samples[k], runs);
}

/* What launch() costs its caller; the pass is waited for in between. */
static struct times time_launch(struct hstu_cuda *c, const struct hstu_sequence *s, uint32_t batch)
{
    double samples[100];
    for (uint32_t i = 0; i < 100; i++) {
        uint64_t start = skv_now_ns();
        check(hstu_backend_cuda.launch(c, s, batch, false), "launch");
        samples[i] = (double)(skv_now_ns() - start) / 1000.0;
        check(hstu_backend_cuda.wait(c, NULL, 10000), "wait");
    }
    return summarise(samples, 100);
}

/* What is left to do when the last gate opens: from the store, all before it done, until the CPU
 * sees the end. */
static struct times time_last_gate(struct hstu_cuda *c, const struct hstu_sequence *s,
                                   uint32_t batch, double pass_us)
{
    enum { RUNS = 20 };
    uint32_t *last = c->gate_row + c->model.geometry.layers - 1;
    double samples[RUNS];
    for (uint32_t i = 0; i < RUNS; i++) {
        *last = 0;
        check(hstu_backend_cuda.launch(c, s, batch, true), "launch");
        const int waited = hstu_backend_cuda.wait(c, NULL, 1 + (uint32_t)(1.5 * pass_us / 1000));
        check(waited == SKV_ETIMEDOUT ? SKV_OK : SKV_EPROTO, "a pass behind a closed gate");
        uint64_t start = skv_now_ns();
        skv_gate_store(last, 1);
        while (cudaEventQuery(c->done) == cudaErrorNotReady)
            ;
        samples[i] = (double)(skv_now_ns() - start) / 1000.0;
        check(hstu_backend_cuda.wait(c, NULL, 10000), "wait");
    }
    return summarise(samples, RUNS);
}

static double floor_us(const struct hstu_model *m, uint32_t batch, uint32_t history, uint32_t n)
{
    const double E = m->embed, HD = m->geometry.heads * m->geometry.head_dim;
    const double c = history - n, layers = m->geometry.layers;
    /* Of history rows, all layers' and what is not needed of the last one's. */
    const double saved = every_row ? 0 : 1;
    const double own = n * ((layers - saved) * 5 + saved * 2) * E * HD;
    const double pairs = (layers - saved) * (c * n + (double)n * (n + 1) / 2);
    const double candidate_pairs = layers * CANDIDATES * (history + 1);
    const double products = 2 * (own + layers * CANDIDATES * 5 * E * HD);
    const double attention = 4 * (pairs + candidate_pairs) * HD;
    return batch * (products / 700e12 + attention / 600e12) * 1e6;
}

static const struct peer *peer_of(uint32_t batch, uint32_t history, uint32_t n)
{
    for (size_t i = 0; i < sizeof peers / sizeof *peers; i++)
        if (peers[i].batch == batch && peers[i].history == history && peers[i].new_tokens == n)
            return &peers[i];
    return NULL;
}

static void print_clock(void)
{
    char line[128];
    FILE *smi = popen("nvidia-smi --query-gpu=name,clocks.sm,clocks.max.sm,driver_version "
                      "--format=csv,noheader 2>/dev/null",
                      "r");
    if (smi && fgets(line, sizeof line, smi))
        printf("# %s", line);
    if (smi)
        pclose(smi);
}

static struct {
    double dense, paged, waste, waste_most;
    uint32_t count, dense_wins, paged_wins;
} totals;

static void cell(struct hstu_cuda *c, const struct hstu_sequence *s, uint32_t batch,
                 uint32_t history, uint32_t n)
{
    uint32_t rows = batch * (n + CANDIDATES), index;
    uint32_t size = hstu_cuda_graph_rows(rows, &index);
    double waste = 100.0 * (size - rows) / size;
    check(hstu_backend_cuda.launch(c, s, batch, false), "launch");
    check(hstu_backend_cuda.wait(c, NULL, 10000), "wait");
    struct timed graphs[GRAPHS] = {{.instance = HSTU_CUDA_BLOCK},
                                   {.instance = HSTU_CUDA_BLOCK | HSTU_CUDA_GATED},
                                   {.instance = 0 /* the whole pass */}};
    time_graphs(c, size, graphs);
    const struct times block = graphs[0].times, gated = graphs[1].times, pass = graphs[2].times;
    const struct times launch = time_launch(c, s, batch);
    const struct times last_gate = time_last_gate(c, s, batch, pass.median);
    double least = floor_us(&c->model, batch, history, n);
    const struct peer *peer = peer_of(batch, history, n);
    double dense = peer ? peer->dense * 1000 / block.median : NAN;
    double paged = peer ? peer->paged * 1000 / block.median : NAN;
    printf(csv ? "%u,%u,%u,%u,%.1f,%.1f,%.1f,%.1f,%.1f,%.1f,%.1f,%.1f,%.3f,%.2f,%.2f,%.1f\n"
               : "%5u %7u %5u %6u %5.1f %9.1f %9.1f %9.1f %9.1f %7.1f %7.1f %9.1f %6.2f %6.2f "
                 "%6.2f %9.1f\n",
           batch, history, n, rows, waste, block.median, block.p90, gated.median, pass.median,
           launch.median, launch.p90, least, least / block.median, dense, paged, last_gate.median);
    fflush(stdout);
    if (peer) {
        totals.dense += log(dense);
        totals.paged += log(paged);
        totals.dense_wins += dense >= 1.1;
        totals.paged_wins += paged >= (history >= 1024 ? 1.5 : 1.3);
    }
    totals.count++;
    totals.waste += waste;
    totals.waste_most = fmax(totals.waste_most, waste);
}

static void options(int argc, char **argv)
{
    static const struct option names[] = {{"csv", no_argument, NULL, 'c'},
                                          {"seconds", required_argument, NULL, 's'},
                                          {"batch", required_argument, NULL, 'b'},
                                          {"new", required_argument, NULL, 'n'},
                                          {"history", required_argument, NULL, 'h'},
                                          {"every-row", no_argument, NULL, 'e'},
                                          {0}};
    for (int o; (o = getopt_long(argc, argv, "", names, NULL)) != -1;)
        switch (o) {
        case 'c':
            csv = true;
            break;
        case 's':
            seconds = atof(optarg);
            break;
        case 'e':
            every_row = true;
            break;
        case 'b':
            only_batch = (uint32_t)atoi(optarg);
            break;
        case 'n':
            only_new = (uint32_t)atoi(optarg);
            break;
        case 'h':
            only_history = (uint32_t)atoi(optarg);
            break;
        default:
            fprintf(stderr, "usage: bench_block [--csv] [--seconds S] [--batch B] [--history H] "
                            "[--new N] [--every-row]\n");
            exit(2);
        }
}

int main(int argc, char **argv)
{
    struct hstu_model model;
    struct hstu_weights *weights;
    struct skv_device *device;
    void *pool, *state;
    uint32_t *gates;
    options(argc, argv);
    if (skv_device_open("cuda", &device) != 0) {
        fprintf(stderr, "bench_block: no GPU here\n");
        return 0;
    }
    check(hstu_model_named("bench", &model), "model");
    model.embedding_rows = 8192; /* smaller than the model's: only its rows are read */
    check(hstu_weights_random(&model, 1, &weights), "weights");
    check_cuda(cudaSetDevice(skv_device_info(device)->ordinal));
    const uint64_t page_bytes = skv_page_bytes(&model.geometry);
    const uint32_t pages = MAX_BATCH * MAX_HISTORY / model.geometry.page_tokens;
    check_cuda(cudaMalloc(&pool, pages * page_bytes));
    check_cuda(cudaMalloc(&flush_memory, FLUSH));
    check_cuda(cudaMemset(flush_memory, 1, FLUSH));
    check(cuda_fill_random(pool, pages * page_bytes / 2, 3, -0.3f, 1.0f), "pages");
    check_cuda(cudaDeviceSynchronize());
    check(skv_pinned_alloc(device, 4096, (void **)&gates), "gates");
    for (uint32_t i = 0; i < SKV_MAX_LAYERS; i++)
        gates[i] = 1;
    for (uint32_t i = 0; i < TURN; i++) {
        check_cuda(cudaEventCreate(&before[i]));
        check_cuda(cudaEventCreate(&after[i]));
    }
    struct hstu_runner_options options_ = {.weights = weights,
                                           .device = device,
                                           .pool_base = pool,
                                           .pool_pages = pages,
                                           .max_rows = MAX_BATCH * (MAX_HISTORY + CANDIDATES),
                                           .max_batch = MAX_BATCH,
                                           .gate_row = gates};
    check(hstu_backend_cuda.open(&options_, &state), "runner");
    struct hstu_cuda *c = state;
    c->every_row = every_row;

    uint32_t *list = malloc(pages * sizeof *list);
    uint64_t *tokens = malloc((MAX_HISTORY + CANDIDATES) * sizeof *tokens);
    for (uint32_t i = 0; i < pages; i++)
        list[i] = i * 389 % pages; /* odd, and pages is a power of two: a permutation */
    for (uint32_t i = 0; i < MAX_HISTORY + CANDIDATES; i++)
        tokens[i] = i * UINT64_C(2654435761);

    print_clock();
    printf("# attention %s, products %s; times in us\n", c->path->name, hstu_cuda_products(c));
    printf(
        csv ? "batch,history,new,rows,padding_percent,block,block_p90,gated,pass,launch,"
              "launch_p90,floor,fraction,dense_peer_over,paged_peer_over,last_gate\n"
            : "batch history   new   rows  pad%%     block       p90     gated      pass  launch "
              "    p90     floor  floor/ dense/ paged/ last gate\n");
    for (uint32_t batch = 1; batch <= MAX_BATCH; batch *= 2)
        for (uint32_t history = 128; history <= MAX_HISTORY; history *= 2)
            for (uint32_t n = history; n >= 128; n /= 2) {
                if ((only_batch && batch != only_batch) ||
                    (only_history && history != only_history) || (only_new && n != only_new))
                    continue;
                struct hstu_sequence s[MAX_BATCH];
                for (uint32_t b = 0; b < batch; b++)
                    s[b] = (struct hstu_sequence){
                        .history = history,
                        .cached = history - n,
                        .targets = CANDIDATES,
                        .append = true,
                        .pages = list + b * (MAX_HISTORY / model.geometry.page_tokens),
                        .tokens = tokens};
                cell(c, s, batch, history, n);
            }
    print_clock();
    struct hstu_footprint f;
    hstu_backend_cuda.footprint(state, &f);
    printf("# %u cells; padding %.1f %% on the mean, %.1f %% at most; geometric mean %.2f x dense, "
           "%.2f x paged peers; %u and %u cells reach 1.1 x and 1.3 x (1.5 x from 1024)\n",
           totals.count, totals.waste / totals.count, totals.waste_most,
           exp(totals.dense / totals.count), exp(totals.paged / totals.count), totals.dense_wins,
           totals.paged_wins);
    printf("# footprint: weights %.0f MiB, arena %.0f MiB, %u graphs %.0f MiB, modules and "
           "libraries %.0f MiB\n",
           (double)f.weights_bytes / (1 << 20), (double)f.arena_bytes / (1 << 20), f.graphs,
           (double)f.graphs_bytes / (1 << 20), (double)f.context_bytes / (1 << 20));
    hstu_backend_cuda.close(state);
    skv_pinned_free(device, gates);
    cudaFree(pool);
    cudaFree(flush_memory);
    skv_device_close(device);
    hstu_weights_close(weights);
    free(list);
    free(tokens);
    return 0;
}
