/* Attention checked on the device: the shapes of check_all(), against a plain CUDA reference of
 * layers.h within check_problem()'s tolerance; golden A'; bitwise properties. bench_attention calls
 * check_all(), or check_problem() for one shape; every failure and a sample of what passed is
 * printed, and counted in `failures`. */
#ifndef BENCH_ATTENTION_CHECK_CUH
#define BENCH_ATTENTION_CHECK_CUH

#include <math.h>
#include <stdarg.h>

#include "attention_problem.cuh"

/* ---- reference: a block a row and head, scores in shared memory, then a thread an output ---- */

struct reference_args {
    struct hstu_attention_args a;
    uint32_t count;
    float *exact, *rounded, *magnitude; /* [rows][HD], [rows][HD], [rows] */
};

__device__ bool allowed(uint32_t query, uint32_t key, uint32_t history, uint32_t group)
{
    if (query < history)
        return key <= query;
    if (key < history)
        return true;
    return key <= query && (key - history) / group == (query - history) / group;
}

__device__ const __nv_bfloat16 *key_or_value(const struct hstu_attention_args &a, uint32_t b,
                                             uint32_t cached, uint32_t key, uint32_t kv,
                                             uint32_t head)
{
    const struct skv_geometry &g = a.geometry;
    uint64_t hd = (uint64_t)g.heads * g.head_dim;
    if (key >= cached) {
        uint64_t row = a.batch.row_start[b] + key - cached;
        return (const __nv_bfloat16 *)a.m + row * 4 * hd + (kv ? 1 : 3) * hd + head * g.head_dim;
    }
    uint64_t page = a.batch.pages[a.batch.page_start[b] + key / g.page_tokens];
    uint64_t plane = ((page * g.layers + a.layer) * 2 + kv) * g.heads + head;
    return (const __nv_bfloat16 *)a.pool +
           (plane * g.page_tokens + key % g.page_tokens) * g.head_dim;
}

__global__ void reference(const struct reference_args r)
{
    extern __shared__ float scores[];
    const struct hstu_attention_args &a = r.a;
    const uint32_t D = a.geometry.head_dim, hd = a.geometry.heads * D, head = blockIdx.y;
    uint32_t row = blockIdx.x, b = 0;
    while (b + 1 < r.count && row >= a.batch.row_start[b + 1])
        b++;
    uint32_t cached = a.batch.cached[b], history = a.batch.history[b];
    uint32_t query = cached + row - a.batch.row_start[b], keys = query + 1;
    const __nv_bfloat16 *q =
        (const __nv_bfloat16 *)a.m + (uint64_t)row * 4 * hd + 2 * hd + head * D;
    float scale = 1 / sqrtf((float)D);
    for (uint32_t key = threadIdx.x / 32; key < keys; key += blockDim.x / 32) {
        float sum = 0;
        if (allowed(query, key, history, a.group)) {
            const __nv_bfloat16 *k = key_or_value(a, b, cached, key, 0, head);
            for (uint32_t d = threadIdx.x % 32; d < D; d += 32)
                sum += __bfloat162float(q[d]) * __bfloat162float(k[d]);
        }
        for (uint32_t i = 16; i; i /= 2)
            sum += __shfl_xor_sync(~0u, sum, i);
        if (threadIdx.x % 32 == 0)
            scores[key] = sum * scale;
    }
    __syncthreads();
    __shared__ float largest[256];
    float exact = 0, rounded = 0, magnitude = 0;
    if (threadIdx.x < D)
        for (uint32_t key = 0; key < keys; key++) {
            if (!allowed(query, key, history, a.group))
                continue;
            float v = __bfloat162float(key_or_value(a, b, cached, key, 1, head)[threadIdx.x]);
            float s = scores[key], p = s / (1 + expf(-s));
            exact += p * v;
            rounded += __bfloat162float(__float2bfloat16(p)) * v;
            magnitude += fabsf(s * v);
        }
    largest[threadIdx.x] = magnitude;
    __syncthreads();
    for (uint32_t i = blockDim.x / 2; i; i /= 2) {
        if (threadIdx.x < i)
            largest[threadIdx.x] = fmaxf(largest[threadIdx.x], largest[threadIdx.x + i]);
        __syncthreads();
    }
    if (threadIdx.x < D) {
        uint64_t at = (uint64_t)row * hd + head * D + threadIdx.x;
        r.exact[at] = exact * a.inverse_n;
        r.rounded[at] = __bfloat162float(__float2bfloat16(rounded * a.inverse_n));
    }
    if (threadIdx.x == 0)
        r.magnitude[(uint64_t)row * a.geometry.heads + head] = largest[0] * a.inverse_n / 2;
}

/* out = sum of a row's slices / N, in slice order, as the norm kernel does it. */
__global__ void sum_slices(const struct hstu_attention_args a, float *out, uint32_t used_rows)
{
    uint64_t hd = (uint64_t)a.geometry.heads * a.geometry.head_dim;
    for (uint64_t i = blockIdx.x * (uint64_t)blockDim.x + threadIdx.x; i < used_rows * hd;
         i += (uint64_t)gridDim.x * blockDim.x) {
        const uint64_t row = i / hd * hd;
        const uint32_t slices = a.batch.slices[i / hd];
        const bool rounded = a.rounded && slices == 1;
        float sum = 0;
        if (rounded)
            sum =
                __bfloat162float(reinterpret_cast<const __nv_bfloat16 *>(a.partial + row)[i - row]);
        for (uint32_t k = 0; !rounded && k < slices; k++)
            sum += a.partial[k * a.rows * hd + i];
        out[i] = sum * a.inverse_n;
    }
}

static float *run(struct problem *p)
{
    uint64_t hd = (uint64_t)p->geometry.heads * p->geometry.head_dim;
    float *out = (float *)device_alloc(p->used_rows * hd * sizeof(float));
    CHECK(cudaMemset(p->args.partial, 0xff, p->max_slices * p->rows * hd * sizeof(float)));
    CHECK(cudaMemset(p->args.batch.next, 0, SKV_MAX_LAYERS * sizeof(uint32_t)));
    launch(p, 0);
    sum_slices<<<1024, 256>>>(p->args, out, p->used_rows);
    CHECK(cudaDeviceSynchronize());
    float *host = (float *)malloc(p->used_rows * hd * sizeof(float));
    CHECK(cudaMemcpy(host, out, p->used_rows * hd * sizeof(float), cudaMemcpyDeviceToHost));
    CHECK(cudaFree(out));
    return host;
}

static void run_reference(struct problem *p, float **exact, float **rounded, float *magnitude)
{
    uint32_t heads = p->geometry.heads;
    uint64_t n = (uint64_t)p->used_rows * heads * p->geometry.head_dim, longest = 1;
    for (uint32_t b = 0; b < p->count; b++) {
        uint64_t keys = p->sequence[b].history + p->sequence[b].targets;
        longest = keys > longest ? keys : longest;
    }
    struct reference_args r = {p->args, p->count};
    r.exact = (float *)device_alloc(n * sizeof(float));
    r.rounded = (float *)device_alloc(n * sizeof(float));
    r.magnitude = (float *)device_alloc((uint64_t)p->used_rows * heads * sizeof(float));
    CHECK(cudaFuncSetAttribute(reference, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 << 10));
    if (p->used_rows)
        reference<<<dim3(p->used_rows, heads), 256, longest * sizeof(float)>>>(r);
    CHECK(cudaDeviceSynchronize());
    *exact = (float *)malloc(n * sizeof(float));
    *rounded = (float *)malloc(n * sizeof(float));
    float *all = (float *)malloc((uint64_t)p->used_rows * heads * sizeof(float));
    CHECK(cudaMemcpy(*exact, r.exact, n * sizeof(float), cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(*rounded, r.rounded, n * sizeof(float), cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(all, r.magnitude, (uint64_t)p->used_rows * heads * sizeof(float),
                     cudaMemcpyDeviceToHost));
    *magnitude = 0;
    for (uint64_t i = 0; i < (uint64_t)p->used_rows * heads; i++)
        *magnitude = all[i] > *magnitude ? all[i] : *magnitude;
    free(all);
    CHECK(cudaFree(r.exact));
    CHECK(cudaFree(r.rounded));
    CHECK(cudaFree(r.magnitude));
}

/* ---- checks ---- */

static int failures, checks;

static void report(bool good, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void report(bool good, const char *format, ...)
{
    checks++;
    failures += !good;
    if (good && checks % 16 != 1)
        return; /* every failure, and a sample of what passed */
    va_list arguments;
    va_start(arguments, format);
    printf("%s ", good ? "ok  " : "FAIL");
    vprintf(format, arguments);
    printf("\n");
    va_end(arguments);
}

struct difference {
    double largest, mean;
    uint64_t nan, worst;
};

static struct difference compare(const float *a, const float *b, uint64_t n)
{
    struct difference d = {0, 0, 0, 0};
    for (uint64_t i = 0; i < n; i++) {
        double e = fabs((double)a[i] - b[i]);
        if (!(e == e)) {
            if (!d.nan++)
                d.worst = i;
            continue;
        }
        d.mean += e / n;
        if (e > d.largest) {
            d.largest = e;
            if (!d.nan)
                d.worst = i;
        }
    }
    return d;
}

/* The tolerance: with R32 the fp32 reference and R16 the one rounded where layers.h says, max and
 * mean of |out - R32| at most twice those of |R16 - R32|, each plus the slack of an approximate
 * tanh: 2^-11 of the largest sum of |s v| of a row, over 2 N. */
static bool check_problem(struct problem *p, const char *name)
{
    float *exact, *rounded, magnitude, *out = run(p);
    run_reference(p, &exact, &rounded, &magnitude);
    uint64_t hd = (uint64_t)p->geometry.heads * p->geometry.head_dim, n = p->used_rows * hd;
    struct difference ours = compare(out, exact, n), theirs = compare(rounded, exact, n);
    double slack = magnitude / 2048;
    bool good = !ours.nan && !theirs.nan && ours.largest <= 2 * theirs.largest + slack &&
                ours.mean <= 2 * theirs.mean + slack;
    const struct hstu_sequence *q = &p->sequence[0];
    report(good,
           "%s: batch %u, h %u c %u T %u, D %u S %u g %u, %u items: max %.3g (R16 %.3g) mean %.3g "
           "(%.3g) slack %.3g, NaN %llu, worst row %llu column %llu",
           name, p->count, q->history, q->cached, q->targets, p->geometry.head_dim,
           p->geometry.page_tokens, p->group, p->items, ours.largest, theirs.largest, ours.mean,
           theirs.mean, slack, (unsigned long long)ours.nan, (unsigned long long)(ours.worst / hd),
           (unsigned long long)(ours.worst % hd));
    free(out);
    free(exact);
    free(rounded);
    return good;
}

static float gen(uint32_t a, uint32_t b, uint32_t c, uint32_t salt)
{
    return ((131 * a + 37 * b + 17 * c + 7919 * salt) % 1009) * 2 / 1008.0 - 1;
}

/* Golden case A', by an independent fp64 program (tests/test_reference.c holds the host to it): two
 * sequences, H 2, S 32, N 64, inputs of gen() rounded to bf16. */
static void check_golden(const struct hstu_attention_path *path, uint32_t D, uint32_t group)
{
    static const struct golden {
        uint32_t D, group;
        double sum0, sum1, b0[4], b1[4];
    } table[] = {
        {64,
         1,
         1299.726215634,
         88.747186597,
         {1.289679877, -.652218514, 1.695531440, .688580442},
         {-.017543951, .000462352, -.078950315, -.233237007}},
        {64,
         2,
         1299.727309728,
         88.754704069,
         {1.289679877, -.652218514, 1.695531440, .688580442},
         {-.017543951, .000462352, -.078950315, -.234320069}},
        {128,
         1,
         3676.284050418,
         256.996913737,
         {2.021179422, -.621524329, 2.555308518, .909204262},
         {-.026395070, .000699628, -.108575461, -.305424107}},
        {128,
         2,
         3676.284285564,
         256.999533524,
         {2.021179422, -.621524329, 2.555308518, .909204262},
         {-.026395070, .000699628, -.108575461, -.305722327}},
        {256,
         1,
         10342.698323058,
         741.201261626,
         {2.855279865, -.755849006, 3.754849523, 1.302396644},
         {-.042886167, .001016029, -.145347914, -.428225658}},
        {256,
         2,
         10342.698614989,
         741.201669080,
         {2.855279865, -.755849006, 3.754849523, 1.302396644},
         {-.042886167, .001016029, -.145347914, -.428258365}},
    };
    const struct golden *want = NULL;
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (table[i].D == D && table[i].group == group)
            want = &table[i];
    struct problem p = make(path, D, 32, 2, group);
    p.inverse_n = 1.0f / 64;
    add(&p, 47, 40, 3);
    add(&p, 5, 0, 4);
    build(&p, 5, 1, 7, 1, 0);
    uint32_t wide = 8 * D;
    __nv_bfloat16 *m = (__nv_bfloat16 *)malloc((uint64_t)p.used_rows * wide * 2);
    uint64_t slice = 2 * 2 * 32 * (uint64_t)D, page_elements = LAYERS * slice;
    __nv_bfloat16 *pool = (__nv_bfloat16 *)malloc(p.pool_pages * page_elements * 2);
    CHECK(cudaMemcpy(pool, p.args.pool, p.pool_pages * page_elements * 2, cudaMemcpyDeviceToHost));
    for (uint32_t b = 0; b < 2; b++) {
        const struct hstu_sequence *q = &p.sequence[b];
        for (uint32_t t = 0; t < q->history + q->targets; t++)
            for (uint32_t head = 0; head < 2; head++)
                for (uint32_t d = 0; d < D; d++) {
                    __nv_bfloat16 x[3];
                    for (uint32_t i = 0; i < 3; i++)
                        x[i] =
                            __float2bfloat16((i == 0 ? 8 : 1) * gen(t, head, d, 100 * b + 1 + i));
                    if (t >= q->cached) {
                        __nv_bfloat16 *row = m + (uint64_t)(p.row_start[b] + t - q->cached) * wide;
                        for (uint32_t i = 0; i < 3; i++) /* u | v | q | k */
                            row[(i == 0 ? 2 : i == 1 ? 3 : 1) * 2 * D + head * D + d] = x[i];
                    } else {
                        uint64_t page = p.page[p.page_start[b] + t / 32];
                        __nv_bfloat16 *at = pool + page * page_elements + p.layer * slice;
                        for (uint32_t kv = 0; kv < 2; kv++)
                            at[((kv * 2 + head) * 32 + t % 32) * (uint64_t)D + d] = x[1 + kv];
                    }
                }
    }
    CHECK(
        cudaMemcpy((void *)p.args.m, m, (uint64_t)p.used_rows * wide * 2, cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy((void *)p.args.pool, pool, p.pool_pages * page_elements * 2,
                     cudaMemcpyHostToDevice));
    float *exact, *rounded, magnitude, *out = run(&p);
    run_reference(&p, &exact, &rounded, &magnitude);
    double error[2] = {0, 0}; /* of the reference, of the kernel, relative to the sum of abs */
    const float *both[2] = {exact, out};
    static const uint32_t places[2][4][3] = {{{0, 0, 0}, {0, 1, 5}, {7, 0, 0}, {9, 1, 31}},
                                             {{0, 0, 0}, {0, 1, 5}, {5, 0, 0}, {8, 1, 31}}};
    for (uint32_t i = 0; i < 2; i++)
        for (uint32_t b = 0; b < 2; b++) {
            double sum = 0, expected = b ? want->sum1 : want->sum0;
            uint64_t begin = (uint64_t)p.row_start[b] * 2 * D,
                     end = (uint64_t)p.row_start[b + 1] * 2 * D;
            for (uint64_t j = begin; j < end; j++)
                sum += fabs(both[i][j]);
            error[i] = fmax(error[i], fabs(sum / expected - 1));
            for (uint32_t k = 0; k < 4; k++) {
                const uint32_t *at = places[b][k];
                double x = both[i][begin + (uint64_t)at[0] * 2 * D + at[1] * D + at[2]];
                error[i] = fmax(error[i], fabs(x - (b ? want->b1 : want->b0)[k]) /
                                              (expected / (end - begin)));
            }
        }
    report(error[0] < 1e-4 && error[1] < 2e-2,
           "golden A' D %u g %u: reference off by %.2g, kernel by %.2g of the mean", D, group,
           error[0], error[1]);
    check_problem(&p, "golden A'");
    free(m);
    free(pool);
    free(exact);
    free(rounded);
    free(out);
    clear(&p);
}

/* Bitwise: physical pages permuted; a batch mate made NaN (its pages too: its rows are enough). */
static void check_bitwise(const struct hstu_attention_path *path, uint32_t D, uint32_t page)
{
    struct problem p = make(path, D, page, 2, 1);
    add(&p, 700, 467, 37);
    add(&p, 900, 640, 100);
    add(&p, 333, 300, 11);
    build(&p, 70, 1, 3, 2, 0);
    uint64_t hd = 2 * (uint64_t)D, n = p.used_rows * hd;
    float *first = run(&p), *again = run(&p);
    report(memcmp(first, again, n * sizeof(float)) == 0, "D %u S %u: two runs, bitwise", D, page);
    free(again);
    /* The same tokens in other pages. */
    struct problem moved = make(path, D, page, 2, 1);
    for (uint32_t b = 0; b < p.count; b++)
        add(&moved, p.sequence[b].history, p.sequence[b].cached, p.sequence[b].targets);
    build(&moved, 70, 99, 3, 2, 0);
    uint64_t bytes = skv_page_bytes(&p.geometry);
    for (uint32_t i = 0; i < p.pages; i++)
        CHECK(cudaMemcpy((char *)moved.args.pool + moved.page[i] * bytes,
                         (const char *)p.args.pool + p.page[i] * bytes, bytes,
                         cudaMemcpyDeviceToDevice));
    again = run(&moved);
    report(memcmp(first, again, n * sizeof(float)) == 0, "D %u S %u: pages permuted, bitwise", D,
           page);
    free(again);
    clear(&moved);
    /* Sequence 1 all NaN: 0 and 2 keep every bit. */
    uint64_t row = 4 * hd * 2, rows = p.row_start[2] - p.row_start[1];
    CHECK(cudaMemset((char *)p.args.m + p.row_start[1] * row, 0xff, rows * row));
    again = run(&p);
    uint64_t cut1 = p.row_start[1] * hd, cut2 = p.row_start[2] * hd;
    report(memcmp(first, again, cut1 * sizeof(float)) == 0 &&
               memcmp(first + cut2, again + cut2, (n - cut2) * sizeof(float)) == 0,
           "D %u S %u: a batch mate of NaN, bitwise", D, page);
    free(again);
    free(first);
    clear(&p);
}

static int check_all(const struct hstu_attention_path *path)
{
    static const uint32_t dims[] = {256, 128, 64}, sizes[] = {32, 64, 128, 16};
    for (uint32_t i = 0; i < 3; i++)
        for (uint32_t g = 1; g <= 2; g++)
            check_golden(path, dims[i], g);
    for (uint32_t i = 0; i < 3; i++)
        for (uint32_t j = 0; j < 4; j++) {
            uint32_t D = dims[i], S = sizes[j];
            for (uint32_t g = 1; g <= 3; g++) {
                /* c mod S in {0, 1, S - 1}; n, T, h at 37 and 1111; nothing cached, new, asked. */
                struct problem p = make(path, D, S, 3, g);
                add(&p, 1111, 1111 - 37, 37);
                add(&p, 37, 0, 1111);
                add(&p, 8 * S + 200, 8 * S, 5);
                add(&p, 8 * S + 200, 7 * S + 1, 130);
                add(&p, 8 * S + 200, 9 * S - 1 < 8 * S + 200 ? 9 * S - 1 : 3 * S - 1, 64);
                add(&p, 300, 300, 70);
                add(&p, 1111, 0, 0);
                add(&p, 0, 0, 37);
                add(&p, 640, 513, 0);
                add(&p, 1, 0, 1);
                build(&p, 41, i * 7 + j + g, 17 * i + 5 * j + g, 3, 0);
                check_problem(&p, "many shapes");
                clear(&p);
            }
            check_bitwise(path, D, S);
        }
    static const float ranges[][2] = {{1, 0}, {0.2f, 1.2f}, {8, 0}};
    for (uint32_t i = 0; i < 3; i++)
        for (uint32_t j = 0; j < 3; j++) { /* small, all positive, large mixed scores */
            struct problem p = make(path, dims[i], 32, 2, 1);
            add(&p, 700, 0, 50);
            build(&p, 0, 5, 100 + j, ranges[j][0], ranges[j][1]);
            check_problem(&p, "score range");
            clear(&p);
        }
    printf("%d checks of path %s, %d failures\n", checks, path->name, failures);
    return failures != 0;
}

#endif
