/* bench_attention: attention alone, on the device, checked and timed.
 *
 *   bench_attention --check            the shapes of attention_check.cuh, against a plain CUDA
 *                                      reference; golden A'; bitwise properties
 *   bench_attention --bench            the shapes that matter, TFLOP/s of the exact mask beside 600
 *   bench_attention --batch 8 --history 4096 --new 4096 --candidates 256 --head-dim 256 --page 32
 *                                      one shape: checked with --check, timed with --bench
 *   --group g, --heads H, --seconds s (of timing, a shape)
 *
 * It makes its own batches (attention_problem.cuh), so it needs neither the runner nor the daemon:
 * one path, the planner, log.c. The checks are in attention_check.cuh; here are timing and main. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention_check.cuh"
#include "attention_problem.cuh"

struct options {
    uint32_t batch, history, fresh, candidates, head_dim, page, heads, group;
};

static int by_value(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return x < y ? -1 : x > y;
}

/* Pairs that the mask allows. */
static double allowed_pairs(const struct problem *p)
{
    double pairs = 0;
    for (uint32_t b = 0; b < p->count; b++) {
        const struct hstu_sequence *q = &p->sequence[b];
        double n = q->history - q->cached;
        pairs += n * q->cached + n * (n + 1) / 2;
        for (uint32_t t = 0; t < q->targets; t++)
            pairs += q->history + t % p->group + 1;
    }
    return pairs * p->geometry.heads;
}

static void bench(const struct hstu_attention_path *path, const struct options *o, double seconds)
{
    struct problem p = make(path, o->head_dim, o->page, o->heads, o->group);
    for (uint32_t b = 0; b < o->batch; b++)
        add(&p, o->history, o->history - o->fresh, o->candidates);
    /* Enough layers that one comes back from memory, not from the L2; at most 8. */
    p.geometry.layers = 8;
    build(&p, 0, 1, 1, 1, 0);
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamCreate(&stream));
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    CHECK(cudaMemsetAsync(p.args.batch.next, 0, SKV_MAX_LAYERS * sizeof(uint32_t), stream));
    for (uint32_t l = 0; l < p.geometry.layers; l++) {
        p.args.layer = l;
        launch(&p, stream);
    }
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    enum { MOST = 4096 };
    static float times[MOST];
    int count = 0;
    float total = 0;
    for (int i = 0; i < MOST && (total < seconds * 1e3f || i < 8); i++) {
        CHECK(cudaEventRecord(begin, stream));
        CHECK(cudaGraphLaunch(exec, stream));
        CHECK(cudaEventRecord(end, stream));
        CHECK(cudaEventSynchronize(end));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, begin, end));
        total += ms;
        if (i >= 3)
            times[count++] = ms / p.geometry.layers;
    }
    qsort(times, count, sizeof *times, by_value);
    float median = times[count / 2];
    double flops = allowed_pairs(&p) * 4 * o->head_dim;
    printf("%s batch %u history %u new %u candidates %u D %u S %u g %u: %u items, %u slices, %.4f "
           "ms (p90 %.4f), %.1f TFLOP/s of 600\n",
           path->name, o->batch, o->history, o->fresh, o->candidates, o->head_dim, o->page,
           o->group, p.items, p.max_slices, median, times[count * 9 / 10], flops / median * 1e-9);
    CHECK(cudaGraphExecDestroy(exec));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    CHECK(cudaStreamDestroy(stream));
    clear(&p);
}

static uint32_t number(const char *text)
{
    return (uint32_t)strtoul(text, NULL, 10);
}

int main(int argc, char **argv)
{
    struct options o = {8, 4096, 4096, 256, 256, 32, 4, 1};
    const struct hstu_attention_path *path = &hstu_attention_sm90;
    bool want_check = false, want_bench = false, shape = false;
    double seconds = 0.25;
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : "";
        static const char *const names[] = {"--batch",    "--history", "--new",   "--candidates",
                                            "--head-dim", "--page",    "--heads", "--group"};
        uint32_t *const fields[] = {&o.batch,    &o.history, &o.fresh, &o.candidates,
                                    &o.head_dim, &o.page,    &o.heads, &o.group};
        bool known = false;
        for (size_t k = 0; k < sizeof names / sizeof *names; k++)
            if (strcmp(name, names[k]) == 0) {
                *fields[k] = number(value);
                known = true;
                shape = true;
                i++;
            }
        if (known)
            continue;
        if (strcmp(name, "--check") == 0) {
            want_check = true;
        } else if (strcmp(name, "--bench") == 0) {
            want_bench = true;
        } else if (strcmp(name, "--seconds") == 0) {
            seconds = atof(value);
            i++;
        } else {
            fprintf(stderr, "bench_attention: what is %s? See the head of bench_attention.cu\n",
                    name);
            return 2;
        }
    }
    struct cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess || properties.major != 9) {
        printf("SKIPPED: no GPU of compute capability 9.0\n");
        return 0;
    }
    printf("%s, %d multiprocessors\n", properties.name, properties.multiProcessorCount);
    setvbuf(stdout, NULL, _IOLBF, 0);
    int status = 0;
    if (want_check && shape) {
        struct problem p = make(path, o.head_dim, o.page, o.heads, o.group);
        for (uint32_t b = 0; b < o.batch; b++)
            add(&p, o.history, o.history - o.fresh, o.candidates);
        build(&p, 3, 1, 1, 1, 0);
        check_problem(&p, "one shape");
        clear(&p);
        printf("%d failures\n", failures);
        status = failures != 0;
    } else if (want_check) {
        status = check_all(path);
    }
    if (want_bench && shape) {
        bench(path, &o, seconds);
    } else if (want_bench) {
        static const uint32_t shapes[][5] = {
            {8, 4096, 4096, 256, 256}, {8, 1024, 1024, 256, 256}, {1, 4096, 4096, 256, 256},
            {8, 4096, 128, 256, 256},  {4, 4096, 128, 256, 256},  {2, 4096, 128, 256, 256},
            {1, 4096, 128, 256, 256},  {1, 2048, 128, 256, 256},  {1, 1024, 128, 256, 256},
            {1, 128, 128, 256, 256},   {8, 4096, 4096, 256, 128}, {8, 4096, 4096, 256, 64}};
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
            struct options s = o;
            s.batch = shapes[i][0];
            s.history = shapes[i][1];
            s.fresh = shapes[i][2];
            s.candidates = shapes[i][3];
            s.head_dim = shapes[i][4];
            bench(path, &s, seconds);
        }
    }
    return status;
}
