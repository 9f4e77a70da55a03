/* A batch, checked and written into the pinned block: what pull then brings to the device. Called
 * once per launch, on the worker's critical path. The GPU has read the block's lines since the last
 * launch, so that writing them is what it costs: nothing that pull can work out is written, 10
 * bytes a row; and whole lines, in order: the plan, whose items come in any order, is laid out in
 * memory of our own and copied. */
#include "cuda_state.h"

#include <string.h>

enum { RECLAIM_LINES = 32 }; /* a few microseconds while they are away, then next to nothing */

static uint32_t rows_of(const struct hstu_sequence *s)
{
    return s->history - s->cached + s->targets;
}

static uint32_t pages_of(const struct hstu_cuda *c, const struct hstu_sequence *s)
{
    return hstu_pages_listed(s, c->model.geometry.page_tokens);
}

static bool sequence_valid(const struct hstu_cuda *c, const struct hstu_sequence *s)
{
    if (s->history > SKV_MAX_TOKENS || s->cached > s->history || s->targets > c->max_rows)
        return false;
    uint32_t pages = pages_of(c, s);
    if (pages && (!c->pool || !s->pages))
        return false;
    for (uint32_t i = 0; i < pages; i++)
        if (s->pages[i] >= c->pool_pages)
            return false;
    return rows_of(s) == 0 || s->tokens;
}

static bool batch_valid(const struct hstu_cuda *c, const struct hstu_sequence *sequences,
                        uint32_t count, uint32_t *rows)
{
    uint64_t sum = 0, pages = 0;
    if (count > c->max_batch)
        return false;
    for (uint32_t b = 0; b < count; b++) {
        if (!sequence_valid(c, &sequences[b]))
            return false;
        sum += rows_of(&sequences[b]);
        pages += pages_of(c, &sequences[b]);
    }
    *rows = (uint32_t)sum;
    return sum <= c->max_rows && pages <= c->page_capacity;
}

static void note_written(struct hstu_cuda *c)
{
    const struct hstu_cuda_pinned *p = &c->pinned;
    const struct hstu_layout *l = &p->counts->layout;
    const struct hstu_cuda_written parts[HSTU_CUDA_PARTS] = {
        {(volatile char *)p->counts, sizeof *p->counts},
        {(volatile char *)p->token, c->rows * sizeof *p->token},
        {(volatile char *)p->slices, c->rows},
        {(volatile char *)p->last_slices, c->rows},
        {(volatile char *)p->page, l->pages * sizeof *p->page},
        {(volatile char *)p->work, l->work * sizeof *p->work},
        {(volatile char *)p->last_work, l->last_work * sizeof *p->work},
    };
    memcpy(c->written, parts, sizeof parts);
    c->reclaim_part = 0;
    c->reclaim_at = 0;
}

void hstu_cuda_reclaim(struct hstu_cuda *c)
{
    for (uint32_t i = 0; i < RECLAIM_LINES; i++) {
        const struct hstu_cuda_written *part = &c->written[c->reclaim_part];
        if (c->reclaim_at < part->bytes) {
            /* A write is what makes a line ours alone; nobody else writes here. */
            const char byte = part->at[c->reclaim_at];
            part->at[c->reclaim_at] = byte;
            c->reclaim_at += HSTU_CUDA_LINE;
        } else {
            c->reclaim_part = (c->reclaim_part + 1) % HSTU_CUDA_PARTS;
            c->reclaim_at = 0;
        }
    }
}

/* Plans attention, of the layers but the last and of the last one, into the block. */
static int plan(struct hstu_cuda *c, const struct hstu_sequence *sequences, uint32_t count,
                uint32_t graph_rows, uint32_t candidates)
{
    const struct hstu_cuda_pinned *p = &c->pinned;
    struct hstu_layout *l = &p->counts->layout;
    struct hstu_plan_args args = {.path = c->path,
                                  .geometry = &c->model.geometry,
                                  .group = c->model.group,
                                  .rows = graph_rows,
                                  .sm_count = (uint32_t)c->sm_count,
                                  .max_slices = hstu_plan_slices(graph_rows),
                                  .sequences = sequences,
                                  .count = count};
    /* It cannot fail: the capacity is the planner's own bound. */
    if (!hstu_plan(&args, c->plan_work, c->work_capacity, c->plan_slices, &l->work))
        return SKV_EINVAL;
    memcpy(p->work, c->plan_work, l->work * sizeof *c->plan_work);
    memcpy(p->slices, c->plan_slices, graph_rows);
    l->last_work = l->work;
    args.candidates_only = !c->every_row;
    if (args.candidates_only && candidates < c->rows &&
        !hstu_plan(&args, c->plan_work, c->work_capacity, c->plan_slices, &l->last_work))
        return SKV_EINVAL;
    memcpy(p->last_work, c->plan_work, l->last_work * sizeof *c->plan_work);
    memcpy(p->last_slices, c->plan_slices, graph_rows);
    return SKV_OK;
}

int hstu_cuda_batch(struct hstu_cuda *c, const struct hstu_sequence *sequences, uint32_t count,
                    uint32_t *graph_rows)
{
    uint32_t rows, index;
    if (!batch_valid(c, sequences, count, &rows))
        return SKV_EINVAL;
    c->rows = rows;
    c->candidates = 0;
    *graph_rows = hstu_cuda_graph_rows(rows, &index);
    if (rows == 0)
        return SKV_OK;
    struct hstu_counts *n = c->pinned.counts;
    struct hstu_layout *l = &n->layout;
    uint32_t row = 0, page = 0, target = 0;
    for (uint32_t b = 0; b < count; b++) {
        const struct hstu_sequence *s = &sequences[b];
        const uint32_t sequence_rows = rows_of(s), pages = pages_of(c, s);
        l->row_start[b] = row;
        l->page_start[b] = page;
        l->history[b] = s->history;
        l->cached[b] = s->cached;
        l->appended[b] = s->append ? s->history - s->cached : 0;
        n->target_start[b] = target;
        if (sequence_rows)
            memcpy(c->pinned.token + row, s->tokens, sequence_rows * sizeof *s->tokens);
        if (pages)
            memcpy(c->pinned.page + page, s->pages, pages * sizeof *s->pages);
        row += sequence_rows;
        page += pages;
        target += s->targets;
    }
    l->row_start[count] = row;
    l->page_start[count] = page;
    n->target_start[count] = target;
    l->batch = count;
    l->pages = page;
    n->candidates = target;
    n->every_row = c->every_row;
    c->candidates = target;
    int status = plan(c, sequences, count, *graph_rows, target);
    note_written(c);
    return status;
}
