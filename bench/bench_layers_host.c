/* The fast host layers: GFLOP/s a core, cold (no cache) and warm (new tokens and candidates over a
 * cached prefix), beside what the core can do at most: fused multiply-adds on registers, measured
 * in the same run. Operations counted are those of the mathematics (exact mask, a multiply-add is
 * two; in the last layer only what is needed of history rows); the SiLU of scores is not counted.
 *
 * Usage: bench_layers_host [MODEL [HISTORY [NEW [CANDIDATES [THREADS]]]]]    tiny 2000 8 128 1 */
#include "hstu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "device.h"
#include "host_math.h"

/* Rates are by CPU time, so that a busy machine does not show in them; latencies are wall time. */
static uint64_t cpu_ns(void)
{
    struct timespec used;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used);
    return (uint64_t)used.tv_sec * 1000000000u + (uint64_t)used.tv_nsec;
}

#define MEASURE_NS UINT64_C(2000000000)
#define MAX_RUNS   20000

static void print_machine(void)
{
    char line[256] = "", name[256] = "unknown CPU\n";
    FILE *file = fopen("/proc/cpuinfo", "r");
    while (file && fgets(line, sizeof line, file))
        if (strncmp(line, "model name", 10) == 0 && strchr(line, ':')) {
            snprintf(name, sizeof name, "%s", strchr(line, ':') + 2);
            break;
        }
    if (file)
        fclose(file);
    printf("machine: %s", name);
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* The best of several short runs: another process on the core can only slow one down. */
static double peak_gflops(const struct host_math *math)
{
    double best = 0;
    for (int i = 0; i < 20; i++) {
        uint64_t start = cpu_ns();
        double done = (double)math->peak(2000000);
        double rate = done / (double)(cpu_ns() - start);
        best = rate > best ? rate : best;
    }
    return best;
}

static double operations(const struct hstu_model *m, const struct hstu_sequence *q)
{
    const double E = m->embed, H = m->geometry.heads, D = m->geometry.head_dim, HD = H * D;
    const double L = m->geometry.layers, h = q->history, c = q->cached, n = h - c, T = q->targets;
    const double uvqk = 2 * E * 4 * HD, projection = 2 * HD * E;
    const double history_pairs = (h * (h + 1) - c * (c + 1)) / 2, target_pairs = T * (h + 1);
    double all = (n + T) * (uvqk + projection) + (history_pairs + target_pairs) * H * 4 * D;
    double last = n * uvqk / 2 + T * (uvqk + projection) + target_pairs * H * 4 * D;
    return (L - 1) * all + last + T * 2 * (E * m->head_hidden + m->head_hidden * m->head_out);
}

static int measure(const char *what, const struct hstu_model *model, struct hstu_runner *runner,
                   const struct hstu_sequence *q, double peak)
{
    static double ms[MAX_RUNS];
    uint32_t runs = 0;
    const uint64_t cpu = cpu_ns();
    for (uint64_t start = skv_now_ns(); runs < MAX_RUNS && skv_now_ns() - start < MEASURE_NS;) {
        uint64_t begin = skv_now_ns();
        int status = hstu_runner_launch(runner, q, 1, false);
        if (status == 0)
            status = hstu_runner_wait(runner, NULL, 60000);
        if (status != 0) {
            fprintf(stderr, "%s: %s\n", what, skv_strerror(status));
            return 1;
        }
        ms[runs++] = (double)(skv_now_ns() - begin) / 1e6;
    }
    const double rate = operations(model, q) * runs / (double)(cpu_ns() - cpu);
    qsort(ms, runs, sizeof *ms, by_value);
    printf(
        "%-5s h %u, new %u, candidates %u: %8.3f ms p50, %8.3f ms p90, %6u runs; %6.1f GFLOP/s a "
        "core, %2.0f %% of the bound %.1f\n",
        what, q->history, q->history - q->cached, q->targets, ms[runs / 2], ms[runs * 9 / 10], runs,
        rate, 100 * rate / peak, peak);
    return 0;
}

static uint32_t argument(int argc, char **argv, int i, uint32_t otherwise)
{
    return argc > i ? (uint32_t)strtoul(argv[i], NULL, 10) : otherwise;
}

int main(int argc, char **argv)
{
    const char *name = argc > 1 ? argv[1] : "tiny";
    const uint32_t history = argument(argc, argv, 2, 2000), fresh = argument(argc, argv, 3, 8);
    const uint32_t targets = argument(argc, argv, 4, 128), threads = argument(argc, argv, 5, 1);
    struct hstu_model model;
    struct hstu_weights *weights;
    struct skv_device *device;
    struct hstu_runner *runner;
    if (hstu_model_named(name, &model) != 0 || history > hstu_model_history(name) ||
        fresh > history || threads == 0) {
        fprintf(stderr, "usage: bench_layers_host [tiny|kuairand|bench [HISTORY [NEW [CANDIDATES "
                        "[THREADS]]]]]\n");
        return 2;
    }
    const struct host_math *math = host_math_choose();
    if (!math || hstu_weights_random(&model, 1, &weights) != 0 ||
        skv_device_open("host", &device) != 0)
        return 1;

    const uint32_t pages = (history + model.geometry.page_tokens - 1) / model.geometry.page_tokens;
    uint32_t *list = calloc(pages + 1, sizeof *list);
    uint64_t *tokens = calloc(history + targets + 1, sizeof *tokens);
    void *pool = calloc(pages + 1, skv_page_bytes(&model.geometry));
    for (uint32_t i = 0; i < pages; i++)
        list[i] = pages - 1 - i;
    for (uint32_t i = 0; i < history + targets; i++)
        tokens[i] = i * UINT64_C(0x9e3779b97f4a7c15);
    struct hstu_runner_options options = {.weights = weights,
                                          .device = device,
                                          .pool_base = pool,
                                          .pool_pages = pages + 1,
                                          .max_rows = history + targets + 1,
                                          .max_batch = 1,
                                          .threads = threads};
    if (hstu_runner_open(&options, &runner) != 0)
        return 1;

    print_machine();
    printf("model %s: L %u, E %u, H %u, D %u, S %u; %s; %u thread%s\n", name, model.geometry.layers,
           model.embed, model.geometry.heads, model.geometry.head_dim, model.geometry.page_tokens,
           math->name, threads, threads == 1 ? "" : "s");
    const double peak = peak_gflops(math);
    struct hstu_sequence cold = {.history = history, .targets = targets, .tokens = tokens};
    struct hstu_sequence fill = cold, warm = cold;
    fill.append = warm.append = true;
    fill.pages = warm.pages = list;
    warm.cached = history - fresh;
    warm.tokens = tokens + warm.cached;
    int failed = measure("cold", &model, runner, &cold, peak);
    if (!failed && hstu_runner_launch(runner, &fill, 1, false) == 0 &&
        hstu_runner_wait(runner, NULL, 60000) == 0)
        failed = measure("warm", &model, runner, &warm, peak);

    hstu_runner_close(runner);
    skv_device_close(device);
    hstu_weights_close(weights);
    free(list);
    free(tokens);
    free(pool);
    return failed;
}
