/* A batch for attention alone, for bench_attention, which checks and times it: random m, a pool
 * whose free pages and tails hold NaN, page lists interleaved between users, hstu_plan()'s work
 * list. The way through: make(), add() a sequence each, build(), launch() as often as one likes,
 * clear(). A CUDA call that fails ends the program. */
#ifndef BENCH_ATTENTION_PROBLEM_CUH
#define BENCH_ATTENTION_PROBLEM_CUH

#include "cuda_kernels.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void check(cudaError_t error, const char *what, const char *file, int line)
{
    if (error == cudaSuccess)
        return;
    fprintf(stderr, "%s:%d: %s: %s\n", file, line, what, cudaGetErrorString(error));
    exit(1);
}
#define CHECK(call) check(call, #call, __FILE__, __LINE__)

enum { LAYERS = 2 }; /* at least; more when timing, so that layers rotate out of the L2 */

struct problem {
    struct skv_geometry geometry;
    uint32_t group, layer, count, rows, used_rows, max_slices, pool_pages, items;
    struct hstu_sequence sequence[SKV_MAX_BATCH];
    uint32_t row_start[SKV_MAX_BATCH + 1], page_start[SKV_MAX_BATCH + 1];
    uint32_t *page; /* host copy, all sequences */
    uint32_t pages;
    float inverse_n;
    struct hstu_attention_args args;
    const struct hstu_attention_path *path;
};

static void *device_alloc(uint64_t bytes)
{
    void *p = NULL;
    CHECK(cudaMalloc(&p, bytes ? bytes : 16));
    return p;
}

static void *device_copy(const void *from, uint64_t bytes)
{
    void *p = device_alloc(bytes);
    CHECK(cudaMemcpy(p, from, bytes, cudaMemcpyHostToDevice));
    return p;
}

/* Uniform in (-1, 1), a fixed function of its place. */
__device__ float noise(uint64_t i, uint32_t seed)
{
    uint64_t x = i * 0x9e3779b97f4a7c15u + seed * 0xd1b54a32d192ed03u;
    x ^= x >> 31;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 29;
    x *= 0x94d049bb133111ebu;
    x ^= x >> 32;
    return (int32_t)(x & 0xffffffff) * (1.0f / 2147483648.0f);
}

__global__ void fill_noise(__nv_bfloat16 *to, uint64_t count, uint32_t seed, float scale,
                           float shift)
{
    for (uint64_t i = blockIdx.x * (uint64_t)blockDim.x + threadIdx.x; i < count;
         i += (uint64_t)gridDim.x * blockDim.x)
        to[i] = __float2bfloat16(scale * noise(i, seed) + shift);
}

/* NaN in every slot of the pool that holds no cached token: free pages and tails. One block a page.
 * valid[page]: tokens of it that are cached. */
__global__ void poison_pool(__nv_bfloat16 *pool, const uint32_t *valid, uint32_t planes, uint32_t s,
                            uint32_t d)
{
    uint64_t page = blockIdx.x;
    __nv_bfloat16 *p = pool + page * planes * s * d;
    for (uint32_t i = threadIdx.x; i < planes * s * d; i += blockDim.x)
        if (i / d % s >= valid[page])
            p[i] = __ushort_as_bfloat16(0x7fff);
}

static uint32_t random_state = 12345;
static uint32_t random_u32(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    random_state ^= random_state << 5;
    return random_state;
}

static struct problem make(const struct hstu_attention_path *path, uint32_t head_dim, uint32_t page,
                           uint32_t heads, uint32_t group)
{
    struct problem p;
    memset(&p, 0, sizeof p);
    p.path = path;
    p.geometry.layers = LAYERS;
    p.geometry.heads = heads;
    p.geometry.head_dim = head_dim;
    p.geometry.page_tokens = page;
    p.group = group;
    p.layer = 1;
    p.inverse_n = 1.0f / 512;
    return p;
}

static void add(struct problem *p, uint32_t history, uint32_t cached, uint32_t targets)
{
    struct hstu_sequence *q = &p->sequence[p->count++];
    memset(q, 0, sizeof *q);
    q->history = history;
    q->cached = cached;
    q->targets = targets;
}

/* Fills the device side for p->sequence[0 .. count). `order`: a seed for which physical pages.
 * Scores: q is scaled and shifted by the two. */
static void build(struct problem *p, uint32_t padding, uint32_t order, uint32_t seed, float scale,
                  float shift)
{
    const struct skv_geometry *g = &p->geometry;
    uint32_t s = g->page_tokens;
    p->row_start[0] = p->page_start[0] = 0;
    for (uint32_t b = 0; b < p->count; b++) {
        const struct hstu_sequence *q = &p->sequence[b];
        p->row_start[b + 1] = p->row_start[b] + q->history - q->cached + q->targets;
        p->page_start[b + 1] = p->page_start[b] + (q->cached + s - 1) / s;
    }
    p->used_rows = p->row_start[p->count];
    p->rows = p->used_rows + padding;
    p->pages = p->page_start[p->count];
    p->pool_pages = p->pages + p->pages / 8 + 3;
    uint32_t *shuffled = (uint32_t *)malloc(p->pool_pages * sizeof(uint32_t));
    uint32_t *valid = (uint32_t *)calloc(p->pool_pages, sizeof(uint32_t));
    for (uint32_t i = 0; i < p->pool_pages; i++)
        shuffled[i] = i;
    random_state = order * 2654435761u + 1;
    for (uint32_t i = p->pool_pages; i-- > 1;) {
        uint32_t j = random_u32() % (i + 1), t = shuffled[i];
        shuffled[i] = shuffled[j];
        shuffled[j] = t;
    }
    /* The pool's last page is always in use: 64-bit addresses. */
    for (uint32_t i = 0; i < p->pages; i++)
        if (shuffled[i] == p->pool_pages - 1)
            break;
        else if (i + 1 == p->pages)
            shuffled[i] = p->pool_pages - 1;
    p->page = shuffled;
    uint32_t history[SKV_MAX_BATCH], cached[SKV_MAX_BATCH];
    for (uint32_t b = 0; b < p->count; b++) {
        const struct hstu_sequence *q = &p->sequence[b];
        history[b] = q->history;
        cached[b] = q->cached;
        for (uint32_t t = 0; t < q->cached; t++)
            valid[shuffled[p->page_start[b] + t / s]]++;
    }
    uint32_t planes = g->layers * 2 * g->heads, wide = 4 * g->heads * g->head_dim;
    uint64_t page_elements = (uint64_t)planes * s * g->head_dim;
    __nv_bfloat16 *pool = (__nv_bfloat16 *)device_alloc(p->pool_pages * page_elements * 2);
    __nv_bfloat16 *m = (__nv_bfloat16 *)device_alloc((uint64_t)p->rows * wide * 2);
    fill_noise<<<1024, 256>>>(pool, p->pool_pages * page_elements, seed, 1, 0);
    fill_noise<<<1024, 256>>>(m, (uint64_t)p->rows * wide, seed + 1, scale, shift);
    uint32_t *device_valid = (uint32_t *)device_copy(valid, p->pool_pages * sizeof(uint32_t));
    poison_pool<<<p->pool_pages, 256>>>(pool, device_valid, planes, s, g->head_dim);
    CHECK(cudaMemset(m + (uint64_t)p->used_rows * wide, 0xff, (uint64_t)padding * wide * 2));
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaFree(device_valid));
    free(valid);

    p->max_slices = hstu_plan_slices(p->rows);
    uint32_t capacity = hstu_plan_capacity(p->path, g, p->rows, p->count);
    struct hstu_work *work = (struct hstu_work *)calloc(capacity, sizeof *work);
    uint8_t *slices = (uint8_t *)calloc(p->rows + 1, 1);
    struct cudaDeviceProp properties;
    CHECK(cudaGetDeviceProperties(&properties, 0));
    struct hstu_plan_args plan = {};
    plan.path = p->path;
    plan.geometry = g;
    plan.group = p->group;
    plan.rows = p->rows;
    plan.sm_count = properties.multiProcessorCount;
    plan.max_slices = p->max_slices;
    plan.sequences = p->sequence;
    plan.count = p->count;
    if (!hstu_plan(&plan, work, capacity, slices, &p->items))
        abort();

    struct hstu_attention_args *a = &p->args;
    memset(a, 0, sizeof *a);
    a->geometry = *g;
    a->layer = p->layer;
    a->rows = p->rows;
    a->group = p->group;
    a->inverse_n = p->inverse_n;
    a->m = m;
    a->pool = pool;
    a->pool_pages = p->pool_pages;
    a->max_slices = p->max_slices;
    a->rounded = hstu_sums_rounded(p->path, p->max_slices);
    a->sm_count = properties.multiProcessorCount;
    a->batch.row_start = (uint32_t *)device_copy(p->row_start, sizeof p->row_start);
    a->batch.page_start = (uint32_t *)device_copy(p->page_start, sizeof p->page_start);
    a->batch.history = (uint32_t *)device_copy(history, sizeof history);
    a->batch.cached = (uint32_t *)device_copy(cached, sizeof cached);
    a->batch.pages = (uint32_t *)device_copy(shuffled, p->pool_pages * sizeof(uint32_t));
    a->batch.slices = (uint8_t *)device_copy(slices, p->rows);
    a->batch.work = (struct hstu_work *)device_copy(work, capacity * sizeof *work);
    a->batch.work_room = p->items;
    a->batch.work_count = (uint32_t *)device_copy(&p->items, sizeof p->items);
    a->batch.next = (uint32_t *)device_alloc(SKV_MAX_LAYERS * sizeof(uint32_t));
    a->partial = (float *)device_alloc((uint64_t)p->max_slices * p->rows * g->heads * g->head_dim *
                                       sizeof(float));
    if (p->path->unit_items == 2) {
        struct hstu_prepare_args prepare = {};
        void *units = device_alloc(hstu_units_bytes(capacity, a->sm_count));
        prepare.units[0] = hstu_units_of(a, units);
        a->units = units;
        if (hstu_launch_prepare(&prepare, 0))
            exit(1);
    }
    free(work);
    free(slices);
}

static void clear(struct problem *p)
{
    struct hstu_attention_args *a = &p->args;
    const void *all[] = {a->m,
                         a->pool,
                         a->partial,
                         a->units,
                         a->batch.row_start,
                         a->batch.page_start,
                         a->batch.history,
                         a->batch.cached,
                         a->batch.pages,
                         a->batch.slices,
                         a->batch.work,
                         a->batch.work_count,
                         a->batch.next};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        CHECK(cudaFree((void *)all[i]));
    free(p->page);
}

static void launch(struct problem *p, cudaStream_t stream)
{
    if (p->path->launch(&p->args, stream))
        exit(1);
}

#endif
