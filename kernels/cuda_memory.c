/* What a CUDA runner holds: its weights (one upload), one arena for all graphs and layers, one
 * pinned block at a fixed address. Taken when the runner opens, given back when it closes. Plain
 * cudaMalloc, no managed memory. */
#include "cuda_state.h"

#include <stdlib.h>
#include <string.h>

#include "log.h"

enum { ALIGN = 256, WORKSPACE_BYTES = 32 << 20 /* what cuBLASLt asks for on Hopper */ };

static uint64_t round_up(uint64_t value, uint64_t to)
{
    return (value + to - 1) / to * to;
}

/* Hands out parts of one allocation: called twice, first with a NULL base to learn the size. */
struct carver {
    char *base;
    uint64_t used;
};

static void *carve(struct carver *c, uint64_t bytes)
{
    uint64_t at = c->used;
    c->used = round_up(at + bytes, ALIGN);
    return c->base ? c->base + at : NULL;
}

/* ---- weights ---- */

static void carve_weights(struct hstu_cuda *c, struct carver *at)
{
    const struct hstu_model *m = &c->model;
    const uint64_t E = m->embed, HD = (uint64_t)m->geometry.heads * m->geometry.head_dim;
    struct hstu_cuda_weights *w = &c->on_device;
    w->head_columns = (uint32_t)round_up(m->head_hidden, 64);
    for (uint32_t l = 0; l < m->geometry.layers; l++) {
        struct hstu_cuda_layer *k = &w->layer[l];
        k->uvqk = carve(at, E * 4 * HD * 2);
        if (c->fused) {
            k->fold = carve(at, 4 * HD * sizeof *k->fold);
        } else {
            k->ln1_weight = carve(at, E * 2);
            k->ln1_bias = carve(at, E * 2);
            k->uvqk_bias = carve(at, 4 * HD * 2);
        }
        k->ln2_weight = carve(at, HD * 2);
        k->ln2_bias = carve(at, HD * 2);
        k->projection = carve(at, HD * E * 2);
    }
    w->embedding = carve(at, m->embedding_rows * E * 2);
    w->position = carve(at, m->position_buckets * E * 2);
    w->head1 = carve(at, E * w->head_columns * 2);
    w->head1_bias = carve(at, (uint64_t)w->head_columns * 2);
    w->head2 = carve(at, (uint64_t)w->head_columns * m->head_out * 2);
    w->head2_bias = carve(at, (uint64_t)m->head_out * 2);
}

static cudaError_t upload(void *to, const uint16_t *from, uint64_t count)
{
    return cudaMemcpy(to, from, count * 2, cudaMemcpyHostToDevice);
}

/* The norm before UVQK, UVQK's weights and bias. */
static cudaError_t upload_plain(const struct hstu_layer_weights *from, uint64_t rows,
                                uint64_t columns, struct hstu_cuda_layer *to)
{
    cudaError_t e = upload(to->ln1_weight, from->ln1_weight, rows);
    if (e == 0 && (e = upload(to->ln1_bias, from->ln1_bias, rows)) == 0 &&
        (e = upload(to->uvqk, from->uvqk, rows * columns)) == 0)
        e = upload(to->uvqk_bias, from->uvqk_bias, columns);
    return e;
}

/* The same in one: UVQK's weights with the norm before it folded in, as struct hstu_uvqk_args says.
 */
static cudaError_t upload_folded(const struct hstu_layer_weights *from, uint64_t rows,
                                 uint64_t columns, struct hstu_cuda_layer *to)
{
    uint16_t *folded = malloc(rows * columns * sizeof *folded);
    struct hstu_fold *fold = calloc(columns, sizeof *fold);
    cudaError_t e = folded && fold ? cudaSuccess : cudaErrorMemoryAllocation;
    for (uint64_t j = 0; e == cudaSuccess && j < columns; j++)
        fold[j].bias = bf16_to_float(from->uvqk_bias[j]);
    for (uint64_t i = 0; e == cudaSuccess && i < rows; i++) {
        const float weight = bf16_to_float(from->ln1_weight[i]);
        const float bias = bf16_to_float(from->ln1_bias[i]);
        const uint16_t *row = from->uvqk + i * columns;
        for (uint64_t j = 0; j < columns; j++) {
            const float w = bf16_to_float(row[j]);
            folded[i * columns + j] = bf16_from_float(weight * w);
            fold[j].sum += bf16_to_float(folded[i * columns + j]);
            fold[j].bias += bias * w;
        }
    }
    if (e == cudaSuccess && (e = upload(to->uvqk, folded, rows * columns)) == 0)
        e = cudaMemcpy(to->fold, fold, columns * sizeof *fold, cudaMemcpyHostToDevice);
    free(fold);
    free(folded);
    return e;
}

static cudaError_t upload_all(struct hstu_cuda *c)
{
    const struct hstu_model *m = &c->model;
    const uint64_t E = m->embed, HD = (uint64_t)m->geometry.heads * m->geometry.head_dim;
    struct hstu_cuda_weights *w = &c->on_device;
    const struct hstu_weights *from = c->weights;
    cudaError_t e = cudaMemset(w->memory, 0, w->bytes);
    for (uint32_t l = 0; l < m->geometry.layers && e == cudaSuccess; l++) {
        struct hstu_cuda_layer *k = &w->layer[l];
        const struct hstu_layer_weights *f = &from->layer[l];
        if ((e = c->fused ? upload_folded(f, E, 4 * HD, k) : upload_plain(f, E, 4 * HD, k)) == 0 &&
            (e = upload(k->ln2_weight, f->ln2_weight, HD)) == 0 &&
            (e = upload(k->ln2_bias, f->ln2_bias, HD)) == 0)
            e = upload(k->projection, f->projection, HD * E);
    }
    if (e == 0 && (e = upload(w->embedding, from->embedding, m->embedding_rows * E)) == 0 &&
        (e = upload(w->position, from->position, m->position_buckets * E)) == 0 &&
        (e = cudaMemcpy2D(w->head1, w->head_columns * 2, from->head1, m->head_hidden * 2,
                          m->head_hidden * 2, E, cudaMemcpyHostToDevice)) == 0 &&
        (e = upload(w->head1_bias, from->head1_bias, m->head_hidden)) == 0 &&
        (e = upload(w->head2, from->head2, (uint64_t)m->head_hidden * m->head_out)) == 0)
        e = upload(w->head2_bias, from->head2_bias, m->head_out);
    return e;
}

/* ---- arena ---- */

/* Rows of all planes of partial sums, of whichever graph has the most. */
static uint64_t partial_rows(uint32_t arena_rows)
{
    uint64_t most = arena_rows;
    uint32_t index, rows = 0;
    while (rows < arena_rows) {
        rows = hstu_cuda_graph_rows(rows + 1, &index);
        uint64_t planes = (uint64_t)rows * hstu_plan_slices(rows);
        most = planes > most ? planes : most;
    }
    return most;
}

static void carve_arena(struct hstu_cuda *c, struct carver *at)
{
    const struct hstu_model *m = &c->model;
    const uint64_t E = m->embed, HD = (uint64_t)m->geometry.heads * m->geometry.head_dim;
    const uint64_t rows = c->arena_rows;
    struct hstu_cuda_arena *a = &c->arena;
    a->counts = carve(at, sizeof *a->counts);
    a->row_sequence = carve(at, rows * 4);
    a->slot = carve(at, rows * 4);
    a->slices = carve(at, rows);
    a->last_slices = carve(at, rows);
    a->page = carve(at, (uint64_t)c->page_capacity * 4);
    a->work = carve(at, c->work_capacity * sizeof *a->work);
    a->last_work = carve(at, c->work_capacity * sizeof *a->work);
    if (c->path->unit_items == 2) {
        const uint64_t bytes = hstu_units_bytes(c->work_capacity, (uint32_t)c->sm_count);
        a->units = carve(at, bytes);
        a->last_units = carve(at, bytes);
    }
    if (c->fused) {
        const uint64_t bytes = (rows / 64 + 2) * 4; /* a count, and one more for who looks ahead */
        a->uvqk_wanted = carve(at, bytes);
        a->project_wanted = carve(at, bytes);
        a->head_wanted = carve(at, bytes);
    }
    const uint64_t head_bytes = rows * c->on_device.head_columns * 4;
    const uint64_t m_bytes = rows * 4 * HD * 2;
    a->activations = carve(at, 0);
    a->x = carve(at, rows * E * 2);
    a->normed = carve(at, rows * (E > HD ? E : HD) * 2);
    a->m = carve(at, m_bytes > head_bytes ? m_bytes : head_bytes);
    a->head = a->m;
    a->partial = carve(at, partial_rows(c->arena_rows) * HD * 4);
    a->x_moments = carve(at, c->fused ? rows * (E / 64) * sizeof *a->x_moments : 0);
    if (!hstu_cuda_head_fused(c)) {
        a->candidate_row = carve(at, rows * 4);
        a->inverse_norm = carve(at, rows * 4);
    }
    a->workspace_bytes = c->fused ? 0 : WORKSPACE_BYTES;
    a->workspace = carve(at, a->workspace_bytes);
}

int hstu_cuda_poison(struct hstu_cuda *c)
{
    struct hstu_cuda_arena *a = &c->arena;
    /* All ones is NaN in bf16 and in fp32, and an impossible index. */
    uint64_t bytes = (uint64_t)((char *)a->workspace - a->activations);
    cudaError_t e = cudaMemset(a->activations, 0xff, bytes);
    if (e == cudaSuccess)
        e = cudaMemset(a->row_sequence, 0xff,
                       (uint64_t)((char *)a->activations - (char *)a->row_sequence));
    if (e == cudaSuccess)
        e = cudaDeviceSynchronize();
    return hstu_cuda_check(e, "poisoning the arena");
}

/* ---- the pinned block ---- */

static void carve_pinned(struct hstu_cuda *c, struct carver *at)
{
    struct hstu_cuda_pinned *p = &c->pinned;
    p->counts = carve(at, sizeof *p->counts);
    p->token = carve(at, c->arena_rows * sizeof *p->token);
    p->slices = carve(at, c->arena_rows);
    p->last_slices = carve(at, c->arena_rows);
    p->page = carve(at, (uint64_t)c->page_capacity * 4);
    p->work = carve(at, c->work_capacity * sizeof *p->work);
    p->last_work = carve(at, c->work_capacity * sizeof *p->work);
    p->logits = carve(at, (uint64_t)c->arena_rows * c->model.head_out * 4);
}

int hstu_cuda_memory_open(struct hstu_cuda *c)
{
    struct carver at = {0};
    int status;
    carve_weights(c, &at);
    c->on_device.bytes = at.used;
    status = hstu_cuda_check(cudaMalloc(&c->on_device.memory, at.used), "memory for the weights");
    if (status != SKV_OK)
        return status;
    at = (struct carver){.base = c->on_device.memory};
    carve_weights(c, &at);
    status = hstu_cuda_check(upload_all(c), "uploading the weights");
    /* A copy from pageable memory may return before it has arrived; our stream waits for none. */
    if (status == SKV_OK)
        status = hstu_cuda_check(cudaDeviceSynchronize(), "uploading the weights");
    if (status != SKV_OK)
        return status;

    at = (struct carver){0};
    carve_arena(c, &at);
    c->arena.bytes = at.used;
    status =
        hstu_cuda_check(cudaMalloc((void **)&c->arena.memory, at.used), "memory for the arena");
    if (status != SKV_OK)
        return status;
    at = (struct carver){.base = c->arena.memory};
    carve_arena(c, &at);

    at = (struct carver){0};
    carve_pinned(c, &at);
    c->pinned.bytes = at.used;
    status = hstu_cuda_check(
        cudaHostAlloc((void **)&c->pinned.memory, at.used, cudaHostAllocPortable), "pinned memory");
    if (status != SKV_OK)
        return status;
    memset(c->pinned.memory, 0, at.used);
    at = (struct carver){.base = c->pinned.memory};
    carve_pinned(c, &at);
    c->plan_work = calloc(c->work_capacity, sizeof *c->plan_work);
    c->plan_slices = calloc(c->arena_rows, sizeof *c->plan_slices);
    return c->plan_work && c->plan_slices ? SKV_OK : SKV_ENOMEM;
}

void hstu_cuda_memory_close(struct hstu_cuda *c)
{
    free(c->plan_slices);
    free(c->plan_work);
    cudaFreeHost(c->pinned.memory);
    cudaFree(c->arena.memory);
    cudaFree(c->on_device.memory);
}
