/* A pass, enqueued on a stream and kept as a graph: one per size class and instance, captured when
 * first needed (a few milliseconds), launched with one call ever after. Batch and lengths are data
 * behind fixed addresses; only the number of rows is in the graph.
 *
 *   pull -> L x { norm -> UVQK -> [wait l] -> activate -> attention -> gate -> projection } -> head
 *
 * or, fused (uvqk_sm90.cu, project_sm90.cu, head_sm90.cu),
 *
 *   pull -> prepare -> L x { [wait l] -> UVQK -> attention -> gate -> projection } -> head
 *
 * The last layer makes only what candidates need: of new history K and V, which go to pages. Who is
 * left out is data too: attention has a work list of its own there, the gate passes rows without
 * slices by, the products walk lists of row tiles, where fused. (`every_row`: all is in them.)
 *
 * A wait stands before the first kernel of its layer that touches pages, or sooner (is_ahead());
 * the waits form a branch of their own (cuda_waits.c). On Hopper a kernel that is not behind one
 * may start while the kernel before it ends (programmatic dependent launch): it then waits, itself,
 * for what that one writes. Every kernel lets the next start only after its own wait, so what is
 * older than the kernel before may be read at once. */
#include "cuda_state.h"

#include <string.h>

/* ---- size classes ---- */

uint32_t hstu_cuda_graph_rows(uint32_t rows, uint32_t *index)
{
    if (rows <= 1024) {
        uint32_t class = rows ? (rows + 63) / 64 : 1;
        *index = class - 1;
        return class * 64;
    }
    if (rows <= 8192) {
        uint32_t class = (rows - 1024 + 127) / 128;
        *index = 15 + class;
        return 1024 + class * 128;
    }
    uint32_t class = (rows - 8192 + 255) / 256;
    *index = 15 + 56 + class;
    return 8192 + class * 256;
}

/* ---- one pass, enqueued ---- */

/* Up to so many rows a layer's gate stands before y of the layer before, which of all kernels loses
 * the least by not starting early (2.4 us; others 2.6 to 4, docs/benchmarks.md). In a larger graph
 * that would only be a wait too soon. So it would for the last gate, which opens when all copies
 * are done: what stands behind it is what a user still waits for. */
enum { GATE_AHEAD_ROWS = 4352 };

/* Up to so many rows, a layer's activations stay in the L2 if weights, and what attention reads,
 * give way to them: 2 % on the mean up to 1,024 rows. In larger graphs that costs up to 7 %. */
enum { SPARED_L2_ROWS = 1536 };

static bool is_last(const struct hstu_cuda *c, uint32_t layer)
{
    return layer + 1 == c->model.geometry.layers;
}

/* The batch as a layer sees it: attention of the last one has its own work list. */
static struct hstu_device_batch device_batch(const struct hstu_cuda *c, uint32_t layer)
{
    const bool last = is_last(c, layer);
    const struct hstu_cuda_arena *a = &c->arena;
    return (struct hstu_device_batch){
        .row_start = a->counts->layout.row_start,
        .history = a->counts->layout.history,
        .cached = a->counts->layout.cached,
        .page_start = a->counts->layout.page_start,
        .pages = a->page,
        .row_sequence = a->row_sequence,
        .slices = last ? a->last_slices : a->slices,
        .work = last ? a->last_work : a->work,
        .work_room = c->work_capacity,
        .work_count = last ? &a->counts->layout.last_work : &a->counts->layout.work,
        .target_start = a->counts->target_start,
        .next = a->counts->next,
    };
}

static bool is_rounded(const struct hstu_cuda *c, uint32_t rows)
{
    return hstu_sums_rounded(c->path, hstu_plan_slices(rows));
}

static struct hstu_attention_args attention_args(const struct hstu_cuda *c, uint32_t layer,
                                                 uint32_t rows)
{
    return (struct hstu_attention_args){
        .geometry = c->model.geometry,
        .layer = layer,
        .rows = rows,
        .group = c->model.group,
        .inverse_n = 1.0f / (float)c->model.scaling_length,
        .m = c->arena.m,
        .pool = c->pool,
        .pool_pages = c->pool_pages,
        .batch = device_batch(c, layer),
        .units = is_last(c, layer) ? c->arena.last_units : c->arena.units,
        .partial = c->arena.partial,
        .max_slices = hstu_plan_slices(rows),
        .rounded = is_rounded(c, rows),
        .sm_count = (uint32_t)c->sm_count,
    };
}

static int enqueue_pull(struct hstu_cuda *c, uint32_t rows)
{
    const struct hstu_cuda_arena *a = &c->arena;
    const struct hstu_cuda_pinned *p = &c->pinned;
    struct hstu_pull_args pull = {
        .counts = p->counts,
        .token = p->token,
        .slices = p->slices,
        .last_slices = p->last_slices,
        .page = p->page,
        .work = p->work,
        .last_work = p->last_work,
        .to_counts = a->counts,
        .to_row_sequence = a->row_sequence,
        .to_slot = a->slot,
        .to_slices = a->slices,
        .to_last_slices = a->last_slices,
        .to_page = a->page,
        .to_work = a->work,
        .to_last_work = a->last_work,
        .embedding = c->on_device.embedding,
        .position = c->on_device.position,
        .x = a->x,
        .rows = rows,
        .embed = c->model.embed,
        .embedding_rows = c->model.embedding_rows,
        .position_buckets = c->model.position_buckets,
        .page_tokens = c->model.geometry.page_tokens,
    };
    return hstu_launch_pull(&pull, c->stream);
}

/* y for the projection: u * LN(sums of slices / N). */
static int enqueue_y(struct hstu_cuda *c, uint32_t rows, uint32_t layer)
{
    const struct hstu_cuda_arena *a = &c->arena;
    const struct hstu_cuda_layer *w = &c->on_device.layer[layer];
    struct hstu_gate_args gate = {.slices = device_batch(c, layer).slices,
                                  .partial = a->partial,
                                  .m = a->m,
                                  .weight = w->ln2_weight,
                                  .bias = w->ln2_bias,
                                  .y = a->normed,
                                  .rows = rows,
                                  .columns = c->model.geometry.heads * c->model.geometry.head_dim,
                                  .sm_count = (uint32_t)c->sm_count,
                                  .inverse_n = 1.0f / (float)c->model.scaling_length,
                                  .eps = c->model.eps,
                                  .rounded = is_rounded(c, rows),
                                  .early = c->fused};
    return hstu_launch_gate(&gate, c->stream);
}

/* May the layer's products leave out what nobody wants? A first layer's may start before prepare
 * has made the lists. */
static bool lists_tiles(const struct hstu_cuda *c, uint32_t layer)
{
    return is_last(c, layer) && layer > 0;
}

static struct hstu_project_args project_args(const struct hstu_cuda *c, uint32_t rows,
                                             uint32_t layer)
{
    const struct hstu_cuda_arena *a = &c->arena;
    return (struct hstu_project_args){
        .y = a->normed,
        .b = c->on_device.layer[layer].projection,
        .x = a->x,
        .moments = a->x_moments,
        .rows = rows,
        .n = c->model.embed,
        .k = c->model.geometry.heads * c->model.geometry.head_dim,
        .sm_count = (uint32_t)c->sm_count,
        .early = true,
        .spares_l2 = rows <= SPARED_L2_ROWS,
        .wanted = lists_tiles(c, layer) ? a->project_wanted : NULL,
    };
}

static struct hstu_uvqk_args uvqk_args(const struct hstu_cuda *c, uint32_t rows, uint32_t layer)
{
    const struct hstu_cuda_arena *a = &c->arena;
    const struct hstu_cuda_layer *w = &c->on_device.layer[layer];
    /* Who wrote the moments. */
    const struct hstu_project_args before = project_args(c, rows, layer ? layer - 1 : 0);
    return (struct hstu_uvqk_args){
        .x = a->x,
        .b = w->uvqk,
        .moments = a->x_moments,
        .fold = w->fold,
        .m = a->m,
        .pool = c->append_pool,
        .slot = a->slot,
        .geometry = c->model.geometry,
        .layer = layer,
        .rows = rows,
        .n = 4 * c->model.geometry.heads * c->model.geometry.head_dim,
        .k = c->model.embed,
        .parts = layer ? hstu_project_sm90_parts(&before) : 1,
        .sm_count = (uint32_t)c->sm_count,
        .eps = c->model.eps,
        .early = true,
        .spares_l2 = rows <= SPARED_L2_ROWS,
        .wanted = lists_tiles(c, layer) ? a->uvqk_wanted : NULL,
    };
}

static struct hstu_head_args head_args(const struct hstu_cuda *c, uint32_t rows)
{
    const struct hstu_cuda_arena *a = &c->arena;
    const uint32_t last = c->model.geometry.layers - 1;
    struct hstu_head_args head = {
        .batch = device_batch(c, last),
        .x = a->x,
        .weight1 = c->on_device.head1,
        .bias1 = c->on_device.head1_bias,
        .weight2 = c->on_device.head2,
        .bias2 = c->on_device.head2_bias,
        .scratch = a->head,
        .logits = c->pinned.logits,
        .row_count = &a->counts->candidates,
        .rows = rows,
        .embed = c->model.embed,
        .hidden_columns = c->on_device.head_columns,
        .outputs = c->model.head_out,
        .candidate_row = a->candidate_row,
        .inverse_norm = a->inverse_norm,
        .moments = a->x_moments,
        .wanted = a->head_wanted,
        .sm_count = (uint32_t)c->sm_count,
    };
    if (hstu_cuda_head_fused(c)) {
        const struct hstu_project_args before = project_args(c, rows, last);
        head.parts = hstu_project_sm90_parts(&before);
    }
    return head;
}

/* What Hopper's layers rely on beside what pull brings. */
static int enqueue_prepare(struct hstu_cuda *c, uint32_t rows)
{
    const struct hstu_cuda_arena *a = &c->arena;
    const uint32_t last_layer = c->model.geometry.layers - 1;
    if (!a->units)
        return SKV_OK;
    const struct hstu_attention_args first = attention_args(c, 0, rows);
    const struct hstu_attention_args last = attention_args(c, last_layer, rows);
    struct hstu_prepare_args prepare = {
        .row_sequence = a->row_sequence,
        .x = a->x,
        .out = a->x_moments,
        .rows = c->fused ? rows : 0,
        .columns = c->model.embed,
        .units = {hstu_units_of(&first, a->units), hstu_units_of(&last, a->last_units)},
        .counts = a->counts,
    };
    if (hstu_cuda_head_fused(c)) {
        const struct hstu_head_args head = head_args(c, rows);
        prepare.wanted[2] =
            (struct hstu_wanted_tiles){hstu_head_sm90_listed_rows(&head), a->head_wanted};
    }
    if (c->fused && lists_tiles(c, last_layer)) {
        const struct hstu_uvqk_args uvqk = uvqk_args(c, rows, last_layer);
        const struct hstu_project_args project = project_args(c, rows, last_layer);
        prepare.wanted[0] =
            (struct hstu_wanted_tiles){hstu_uvqk_sm90_listed_rows(&uvqk), a->uvqk_wanted};
        prepare.wanted[1] =
            (struct hstu_wanted_tiles){hstu_project_sm90_listed_rows(&project), a->project_wanted};
    }
    return hstu_launch_prepare(&prepare, c->stream);
}

/* Does the layer's gate stand before y of the layer before, instead of before its own UVQK? */
static bool is_ahead(const struct hstu_cuda *c, uint32_t rows, uint32_t layer)
{
    return rows <= GATE_AHEAD_ROWS && layer > 0 && layer + 1 < c->model.geometry.layers;
}

/* A layer of four kernels: the first norm, activation and the residual are parts of the products.
 */
static int enqueue_fused_layer(struct hstu_cuda *c, uint32_t rows, uint32_t layer,
                               cudaGraphNode_t *behind)
{
    struct hstu_attention_args attention = attention_args(c, layer, rows);
    attention.early = true;
    attention.spares_l2 = rows <= SPARED_L2_ROWS;
    const struct hstu_project_args project = project_args(c, rows, layer);
    const struct hstu_uvqk_args uvqk = uvqk_args(c, rows, layer);
    int status;
    if ((status = hstu_launch_uvqk_sm90(&uvqk, c->stream)) != SKV_OK ||
        (!is_ahead(c, rows, layer) &&
         (status = hstu_cuda_stands_behind(c, layer, behind)) != SKV_OK) ||
        (status = c->path->launch(&attention, c->stream)) != SKV_OK ||
        (status = enqueue_y(c, rows, layer)) != SKV_OK ||
        (is_ahead(c, rows, layer + 1) &&
         (status = hstu_cuda_stands_behind(c, layer + 1, behind)) != SKV_OK))
        return status;
    return hstu_launch_project_sm90(&project, c->stream);
}

/* The same in six kernels. */
static int enqueue_layer(struct hstu_cuda *c, uint32_t rows, uint32_t layer,
                         cudaGraphNode_t *behind, struct hstu_gemm_plan *uvqk,
                         struct hstu_gemm_plan *projection)
{
    const struct hstu_model *m = &c->model;
    const struct hstu_cuda_arena *a = &c->arena;
    const struct hstu_cuda_layer *w = &c->on_device.layer[layer];
    struct hstu_norm_args norm = {.row_sequence = a->row_sequence,
                                  .x = a->x,
                                  .weight = w->ln1_weight,
                                  .bias = w->ln1_bias,
                                  .out = a->normed,
                                  .rows = rows,
                                  .columns = m->embed,
                                  .eps = m->eps};
    struct hstu_activate_args activate = {.row_sequence = a->row_sequence,
                                          .slot = a->slot,
                                          .m = a->m,
                                          .pool = c->append_pool,
                                          .geometry = m->geometry,
                                          .rows = rows,
                                          .layer = layer};
    struct hstu_attention_args attention = attention_args(c, layer, rows);
    int status;
    if ((status = hstu_launch_norm(&norm, c->stream)) != SKV_OK ||
        (status = hstu_gemm_run(uvqk, a->normed, w->uvqk, w->uvqk_bias, a->m, c->stream)) !=
            SKV_OK ||
        (status = hstu_launch_activate(&activate, c->stream)) != SKV_OK ||
        (status = hstu_cuda_stands_behind(c, layer, behind)) != SKV_OK ||
        (status = c->path->launch(&attention, c->stream)) != SKV_OK ||
        (status = enqueue_y(c, rows, layer)) != SKV_OK)
        return status;
    return hstu_gemm_run(projection, a->normed, w->projection, NULL, a->x, c->stream);
}

static int enqueue_pass(struct hstu_cuda *c, uint32_t rows, bool block, cudaGraphNode_t *behind,
                        struct hstu_gemm_plan *uvqk, struct hstu_gemm_plan *projection)
{
    int status = SKV_OK;
    if (!block)
        status = enqueue_pull(c, rows);
    else if (c->path->unit_items == 1)
        status = hstu_cuda_check(
            cudaMemsetAsync(c->arena.counts->next, 0, sizeof c->arena.counts->next, c->stream),
            "resetting the counters");
    if (status == SKV_OK)
        status = enqueue_prepare(c, rows);
    for (uint32_t l = 0; l < c->model.geometry.layers && status == SKV_OK; l++)
        status = c->fused ? enqueue_fused_layer(c, rows, l, behind)
                          : enqueue_layer(c, rows, l, behind, uvqk, projection);
    if (status != SKV_OK || block)
        return status;
    const struct hstu_head_args head = head_args(c, rows);
    return hstu_cuda_head_fused(c) ? hstu_launch_head_sm90(&head, c->stream)
                                   : hstu_launch_head(&head, c->stream);
}

/* ---- graphs ---- */

static int capture(struct hstu_cuda *c, uint32_t rows, uint32_t instance,
                   struct hstu_gemm_plan *uvqk, struct hstu_gemm_plan *projection,
                   cudaGraphExec_t *out)
{
    cudaGraphNode_t behind[SKV_MAX_LAYERS] = {0}; /* each gate */
    const bool gated = instance & HSTU_CUDA_GATED, block = instance & HSTU_CUDA_BLOCK;
    cudaGraph_t graph = NULL;
    /* Thread-local: what the watcher thread or another session calls meanwhile is its own matter.
     */
    int status = hstu_cuda_check(
        cudaStreamBeginCapture(c->stream, cudaStreamCaptureModeThreadLocal), "starting a capture");
    if (status != SKV_OK)
        return status;
    status = enqueue_pass(c, rows, block, gated ? behind : NULL, uvqk, projection);
    int ended = hstu_cuda_check(cudaStreamEndCapture(c->stream, &graph), "capturing a pass");
    if (status == SKV_OK)
        status = ended;
    if (status == SKV_OK && gated)
        status = hstu_cuda_add_waits(c, graph, behind);
    if (status == SKV_OK)
        status = hstu_cuda_check(cudaGraphInstantiate(out, graph, 0), "instantiating a graph");
    if (graph)
        cudaGraphDestroy(graph);
    if (status == SKV_OK)
        status = hstu_cuda_check(cudaGraphUpload(*out, c->stream), "uploading a graph");
    return status;
}

int hstu_cuda_graph(struct hstu_cuda *c, uint32_t graph_rows, uint32_t instance,
                    cudaGraphExec_t *out)
{
    uint32_t index;
    hstu_cuda_graph_rows(graph_rows, &index);
    if (index >= HSTU_CUDA_MAX_SIZES)
        return SKV_EINVAL;
    cudaGraphExec_t *kept = &c->graph[index][instance];
    if (*kept) {
        *out = *kept;
        return SKV_OK;
    }
    const struct hstu_model *m = &c->model;
    const uint32_t hd = m->geometry.heads * m->geometry.head_dim;
    struct hstu_gemm_plan *uvqk = NULL, *projection = NULL;
    size_t before = 0, after = 0, total;
    cudaMemGetInfo(&before, &total);
    int status = SKV_OK;
    if (!c->fused) {
        status = hstu_gemm_plan(c->gemm, HSTU_PRODUCT_BIAS, graph_rows, 4 * hd, m->embed, &uvqk);
        if (status == SKV_OK)
            status = hstu_gemm_plan(c->gemm, HSTU_PRODUCT_RESIDUAL, graph_rows, m->embed, hd,
                                    &projection);
    }
    if (status == SKV_OK)
        status = capture(c, graph_rows, instance, uvqk, projection, kept);
    hstu_gemm_plan_close(uvqk);
    hstu_gemm_plan_close(projection);
    if (status != SKV_OK) {
        if (*kept)
            cudaGraphExecDestroy(*kept);
        *kept = NULL;
        return status;
    }
    cudaMemGetInfo(&after, &total);
    c->graphs++;
    c->graphs_bytes += before > after ? before - after : 0;
    *out = *kept;
    return SKV_OK;
}

void hstu_cuda_graphs_close(struct hstu_cuda *c)
{
    for (uint32_t i = 0; i < HSTU_CUDA_MAX_SIZES; i++)
        for (uint32_t k = 0; k < HSTU_CUDA_INSTANCES; k++)
            if (c->graph[i][k])
                cudaGraphExecDestroy(c->graph[i][k]);
}
