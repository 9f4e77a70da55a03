/* A batch, checked and written into the pinned block: what pull then brings to the device. Called
 * once per launch, on the worker's critical path: one pass over the rows, 16 bytes each, one more
 * over those that append. */
#include "cuda_state.h"

#include <string.h>

static uint32_t rows_of(const struct hstu_sequence *s)
{
    return s->history - s->cached + s->targets;
}

static uint32_t pages_of(const struct hstu_cuda *c, uint32_t tokens)
{
    return (tokens + c->model.geometry.page_tokens - 1) / c->model.geometry.page_tokens;
}

static bool sequence_valid(const struct hstu_cuda *c, const struct hstu_sequence *s)
{
    if (s->history > SKV_MAX_TOKENS || s->cached > s->history || s->targets > c->max_rows)
        return false;
    uint32_t pages = pages_of(c, s->append ? s->history : s->cached);
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
        pages += pages_of(c, sequences[b].cached);
    }
    *rows = (uint32_t)sum;
    return sum <= c->max_rows && pages <= c->page_capacity;
}

/* Rows of one sequence, in runs: positions rise by one a row up to a last one that all the rest has
 * (hstu_position()), slots to the end of a page. */
static void write_rows(struct hstu_cuda *c, const struct hstu_sequence *s, uint32_t b,
                       uint32_t first)
{
    const uint64_t next_position = UINT64_C(1) << HSTU_ROW_POSITION;
    const uint32_t page_tokens = c->model.geometry.page_tokens; /* a power of two */
    const uint32_t rows = rows_of(s), appended = s->append ? s->history - s->cached : 0;
    const uint32_t last = hstu_position(rows, s->cached, s->history, c->model.position_buckets);
    const uint32_t rising = last > s->cached ? last - s->cached : 0;
    const uint8_t *slices = c->row_slices + first;
    struct hstu_row *row = c->pinned.row + first;
    for (uint32_t i = 0; i < rows;) {
        const uint32_t token = s->cached + i, at = token & (page_tokens - 1);
        const bool rises = i < rising, appends = i < appended;
        uint32_t end = rises && rising < rows ? rising : rows, slot = UINT32_MAX;
        if (appends) {
            uint32_t page_end = i + page_tokens - at;
            slot = s->pages[token / page_tokens] * page_tokens + at;
            end = end < page_end ? end : page_end;
            end = end < appended ? end : appended;
        }
        const uint64_t step = (rises ? next_position : 0) + appends;
        uint64_t place =
            slot | (rises ? token : last) * next_position | (uint64_t)b << HSTU_ROW_SEQUENCE;
        for (; i < end; i++, place += step)
            row[i] =
                (struct hstu_row){s->tokens[i], place | (uint64_t)slices[i] << HSTU_ROW_SLICES};
    }
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
    n->work = hstu_plan(c->path, &c->model.geometry, c->model.group, sequences, count, *graph_rows,
                        (uint32_t)c->sm_count, hstu_plan_slices(*graph_rows), c->pinned.work,
                        c->work_capacity, c->row_slices);
    if (n->work == 0)
        return SKV_EINVAL; /* cannot be: the capacity is the planner's own bound */
    uint32_t row = 0, page = 0, target = 0;
    for (uint32_t b = 0; b < count; b++) {
        const struct hstu_sequence *s = &sequences[b];
        n->row_start[b] = row;
        n->page_start[b] = page;
        n->target_start[b] = target;
        n->history[b] = s->history;
        n->cached[b] = s->cached;
        n->targets[b] = s->targets;
        write_rows(c, s, b, row);
        if (s->cached)
            memcpy(c->pinned.page + page, s->pages, pages_of(c, s->cached) * sizeof *s->pages);
        row += rows_of(s);
        page += pages_of(c, s->cached);
        target += s->targets;
    }
    n->row_start[count] = row;
    n->page_start[count] = page;
    n->target_start[count] = target;
    n->pages = page;
    n->candidates = target;
    c->candidates = target;
    for (; row < *graph_rows; row++)
        c->pinned.row[row].place = UINT32_MAX | (uint64_t)HSTU_ROW_PADDING << HSTU_ROW_SEQUENCE;
    return SKV_OK;
}
