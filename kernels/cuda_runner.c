/* The CUDA backend of the runner: hstu.h's functions on captured graphs. Opened in the worker's
 * process on the device that its session maps the pool on (the primary context, which the session
 * retains). One thread at a time.
 *
 * A launch writes the pinned block and starts one graph; nothing waits, nothing is allocated,
 * unless the size is new and must be captured. A wait polls an event. What breaks the context is
 * final: every later launch says SKV_EDEVICE too. */
#include "cuda_state.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "clock.h"
#include "device.h"
#include "log.h"

#define SPIN_NS  UINT64_C(2000000) /* a pass is about this long; then naps */
#define NAP_NS   20000
#define ROW_MOST 65536u /* rows a launch; keeps every index in 32 bits and the size table small */

static int options_check(const struct hstu_runner_options *o)
{
    if (!o->weights || !o->device || hstu_model_check(&o->weights->model) != SKV_OK)
        return SKV_EINVAL;
    if (o->max_rows > ROW_MOST)
        skv_error("max_rows is %u: a launch on a GPU has %u rows at most", o->max_rows, ROW_MOST);
    if (o->max_rows == 0 || o->max_rows > ROW_MOST || o->max_batch == 0 ||
        o->max_batch > SKV_MAX_BATCH)
        return SKV_EINVAL;
    if (skv_device_info(o->device)->kind != SKV_DEVICE_CUDA)
        return SKV_EINVAL;
    uint64_t slots = o->pool_pages * o->weights->model.geometry.page_tokens;
    return slots < UINT32_MAX ? SKV_OK : SKV_EINVAL;
}

static int stream_open(struct hstu_cuda *c)
{
    cudaError_t e = cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking);
    if (e == cudaSuccess)
        e = cudaEventCreateWithFlags(&c->done, cudaEventDisableTiming);
    return hstu_cuda_check(e, "opening a stream");
}

static void cuda_close(void *state)
{
    struct hstu_cuda *c = state;
    if (!c)
        return;
    cudaSetDevice(c->ordinal);
    if (c->stream)
        cudaStreamSynchronize(c->stream);
    hstu_cuda_graphs_close(c);
    hstu_gemm_close(c->gemm);
    if (c->done)
        cudaEventDestroy(c->done);
    if (c->stream)
        cudaStreamDestroy(c->stream);
    hstu_cuda_memory_close(c);
    free(c);
}

/* Pages that the sequences of a launch can read: each at most the longest history's, all together
 * at most a full batch of them. */
static uint32_t page_capacity(const struct hstu_cuda *c)
{
    uint32_t pages = SKV_MAX_TOKENS / c->model.geometry.page_tokens;
    return pages * c->max_batch;
}

static int prepare(struct hstu_cuda *c)
{
    int major = 0, minor = 0;
    uint32_t index;
    cudaError_t e =
        cudaDeviceGetAttribute(&c->sm_count, cudaDevAttrMultiProcessorCount, c->ordinal);
    if (e == cudaSuccess)
        e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, c->ordinal);
    if (e == cudaSuccess)
        e = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, c->ordinal);
    int status = hstu_cuda_check(e, "asking the device");
    if (status != SKV_OK)
        return status;
    c->path = hstu_attention_choose(major, minor);
    if (!c->path)
        return SKV_ENOTSUP;
    c->fused = hstu_products_fused(c->path);
    c->arena_rows = hstu_cuda_graph_rows(c->max_rows, &index);
    c->page_capacity = page_capacity(c);
    c->work_capacity = 0;
    for (uint32_t rows = 0; rows < c->arena_rows;) {
        rows = hstu_cuda_graph_rows(rows + 1, &index);
        uint32_t items = hstu_plan_capacity(c->path, &c->model.geometry, rows, c->max_batch);
        c->work_capacity = items > c->work_capacity ? items : c->work_capacity;
    }
    if (c->gate_row) {
        void *address = NULL;
        status = hstu_cuda_check(cudaHostGetDevicePointer(&address, c->gate_row, 0),
                                 "the gate row is not registered with the device");
        if (status != SKV_OK)
            return status;
        c->gate_address = (uintptr_t)address;
    }
    if ((status = stream_open(c)) != SKV_OK || (status = hstu_cuda_memory_open(c)) != SKV_OK)
        return status;
    return c->fused ? SKV_OK
                    : hstu_gemm_open(c->arena.workspace, c->arena.workspace_bytes, &c->gemm);
}

static int cuda_open(const struct hstu_runner_options *o, void **state)
{
    int status = options_check(o);
    if (status != SKV_OK)
        return status;
    struct hstu_cuda *c = calloc(1, sizeof *c);
    if (!c)
        return SKV_ENOMEM;
    c->weights = o->weights;
    c->model = o->weights->model;
    c->ordinal = skv_device_info(o->device)->ordinal;
    c->pool = o->pool_base;
    c->append_pool = o->pool_append_base ? o->pool_append_base : o->pool_base;
    c->pool_pages = o->pool_base ? o->pool_pages : 0;
    c->max_rows = o->max_rows;
    c->max_batch = o->max_batch;
    c->gate_row = o->gate_row;
    size_t before = 0, after = 0, total;
    status = hstu_cuda_check(cudaSetDevice(c->ordinal), "choosing the device");
    if (status == SKV_OK)
        status = hstu_cuda_check(cudaMemGetInfo(&before, &total), "asking for free memory");
    if (status == SKV_OK)
        status = prepare(c);
    if (status != SKV_OK) {
        cuda_close(c);
        return status;
    }
    cudaMemGetInfo(&after, &total);
    /* Everything but what we asked for: modules, cuBLASLt, streams. The bare context came before.
     */
    uint64_t asked = c->arena.bytes + c->on_device.bytes;
    c->context_bytes = before > after + asked ? before - after - asked : 0;
    skv_info("cuda:%d, %d multiprocessors, attention %s, products %s, weights %.2f GiB, arena %.2f "
             "GiB",
             c->ordinal, c->sm_count, c->path->name, hstu_cuda_products(c),
             (double)c->on_device.bytes / (1 << 30), (double)c->arena.bytes / (1 << 30));
    *state = c;
    return SKV_OK;
}

/* Are all of the row's gates open already? */
static bool gates_open(const struct hstu_cuda *c)
{
    for (uint32_t l = 0; l < c->model.geometry.layers; l++)
        if (skv_gate_wait(&c->gate_row[l], 0) != SKV_OK)
            return false;
    return true;
}

static int cuda_launch(void *state, const struct hstu_sequence *sequences, uint32_t count,
                       bool gated)
{
    struct hstu_cuda *c = state;
    uint32_t rows;
    cudaGraphExec_t graph;
    if (c->running)
        return SKV_EBUSY;
    if (gated && !c->gate_row)
        return SKV_EINVAL;
    int status = hstu_cuda_batch(c, sequences, count, &rows);
    if (status != SKV_OK)
        return status;
    status = hstu_cuda_check(cudaSetDevice(c->ordinal), "choosing the device");
    if (status == SKV_OK && c->rows) {
        /* Waits cost more than 2 us a layer, passed or not. */
        const bool waits = gated && !gates_open(c);
        status = hstu_cuda_graph(c, rows, waits ? HSTU_CUDA_GATED : 0, &graph);
        if (status == SKV_OK)
            status = hstu_cuda_check(cudaGraphLaunch(graph, c->stream), "launching a pass");
    }
    if (status == SKV_OK)
        status = hstu_cuda_check(cudaEventRecord(c->done, c->stream), "marking a pass");
    c->running = status == SKV_OK;
    return status;
}

static int cuda_wait(void *state, float *logits, uint32_t timeout_ms)
{
    struct hstu_cuda *c = state;
    if (!c->running)
        return SKV_EINVAL;
    uint64_t start = skv_now_ns(), end = start + timeout_ms * UINT64_C(1000000);
    cudaError_t e;
    while ((e = cudaEventQuery(c->done)) == cudaErrorNotReady) {
        uint64_t now = skv_now_ns();
        if (now >= end)
            return SKV_ETIMEDOUT;
        if (now - start < SPIN_NS)
            skv_relax();
        else
            nanosleep(&(struct timespec){.tv_nsec = NAP_NS}, NULL);
        hstu_cuda_reclaim(c);
    }
    c->running = false;
    int status = hstu_cuda_check(e, "a pass");
    if (status == SKV_OK && logits)
        memcpy(logits, c->pinned.logits,
               (uint64_t)c->candidates * c->model.head_out * sizeof *logits);
    return status == SKV_OK ? SKV_OK : SKV_EDEVICE;
}

static int cuda_debug(void *state, const struct hstu_sequence *sequences, uint32_t count,
                      float *block_out)
{
    struct hstu_cuda *c = state;
    const bool every_row = c->every_row;
    c->every_row = true;
    int status = cuda_launch(c, sequences, count, false);
    c->every_row = every_row;
    while (status == SKV_OK && (status = cuda_wait(c, NULL, 60000)) == SKV_ETIMEDOUT)
        status = SKV_OK;
    if (status != SKV_OK)
        return status;
    const uint64_t elements = (uint64_t)c->rows * c->model.embed;
    uint16_t *x = malloc(elements * sizeof *x + 1);
    if (!x)
        return SKV_ENOMEM;
    status = hstu_cuda_check(
        cudaMemcpy(x, c->arena.x, elements * sizeof *x, cudaMemcpyDeviceToHost), "reading rows");
    for (uint64_t i = 0; i < elements && status == SKV_OK; i++)
        block_out[i] = bf16_to_float(x[i]);
    free(x);
    return status;
}

static void cuda_footprint(const void *state, struct hstu_footprint *out)
{
    const struct hstu_cuda *c = state;
    *out = (struct hstu_footprint){.context_bytes = c->context_bytes,
                                   .weights_bytes = c->on_device.bytes,
                                   .arena_bytes = c->arena.bytes,
                                   .graphs_bytes = c->graphs_bytes,
                                   .graphs = c->graphs};
}

const struct hstu_backend hstu_backend_cuda = {
    .name = "cuda",
    .open = cuda_open,
    .close = cuda_close,
    .launch = cuda_launch,
    .wait = cuda_wait,
    .debug = cuda_debug,
    .footprint = cuda_footprint,
};
