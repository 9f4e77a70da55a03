/* The attention planner: cuts a batch into work items. Called by the CUDA runner before every
 * launch, on the CPU, in a few microseconds; plain C, needs no GPU.
 *
 * A tile is tile_rows() consecutive query rows of one sequence and one head. Its keys are the
 * history up to its last row, then, for candidates, their own groups. SiLU attention has no row
 * sum, so a tile's history may be cut into slices whose partial outputs simply add: that is how a
 * small batch fills the machine. How many slices: for each possible count the planner estimates
 * when the last multiprocessor would finish if the graph's rows were all filled by copies of this
 * one sequence, and takes the best. The estimate looks at the graph size and at this sequence
 * alone, never at its batch mates, so who else is in the batch cannot change a single bit.
 *
 * Items come longest first (a counting sort), so that a persistent grid ends evenly. */
#include "cuda_pass.h"

#include <assert.h>
#include <string.h>

enum {
    PLANE_ROWS = 32768, /* rows of partial sums that all planes of a graph may have together */
    MAX_SLICES = 16,    /* a slice of 4096 keys / 16 is 256: shorter ones are mostly overhead */
    MIN_STEPS = 2,      /* a slice is at least this many key steps */
    /* What starting and ending an item costs, in key steps of one tile: loading Q, filling the
     * pipeline, writing the partial sums. Reading a plane back in the norm kernel costs 1/1400 step
     * a row. */
    ITEM_STEPS = 2,
    ROW_STEP_SHARE = 1400,
    LENGTHS = 1024, /* longer items are sorted as if they were this long */
};

/* One tile: key steps of history, of the candidates' own groups, and its rows. */
struct tile {
    uint32_t history_steps, group_steps;
    uint32_t row0, rows;
    uint32_t key_end; /* one past its last absolute row */
};

struct shape {
    uint32_t cached, history, rows; /* c, h, q */
    uint32_t tile_rows, key_step, group, heads;
};

/* Where a sequence lies in the batch. */
struct place {
    uint32_t sequence, row_start, page_start;
};

static uint32_t divide_up(uint32_t a, uint32_t b)
{
    return (a + b - 1) / b;
}

static uint32_t min_u32(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

uint32_t hstu_plan_slices(uint32_t rows)
{
    uint32_t planes = rows ? PLANE_ROWS / rows : 1;
    return planes < 1 ? 1 : min_u32(planes, MAX_SLICES);
}

uint32_t hstu_plan_capacity(const struct hstu_attention_path *path,
                            const struct skv_geometry *geometry, uint32_t rows, uint32_t batch)
{
    uint32_t tiles = divide_up(rows, path->tile_rows(geometry->head_dim)) + batch;
    return tiles * geometry->heads * hstu_plan_slices(rows);
}

static struct tile tile_at(const struct shape *s, uint32_t index)
{
    uint32_t row0 = index * s->tile_rows;
    struct tile t = {.row0 = row0, .rows = min_u32(s->tile_rows, s->rows - row0)};
    uint32_t first = s->cached + row0;
    t.key_end = first + t.rows;
    t.history_steps = divide_up(min_u32(t.key_end, s->history), s->key_step);
    if (t.key_end > s->history) {
        uint32_t candidate = first > s->history ? first - s->history : 0;
        uint32_t start = s->history + candidate / s->group * s->group;
        uint32_t from = start / s->key_step, to = divide_up(t.key_end, s->key_step);
        if (from < t.history_steps)
            from = t.history_steps;
        t.group_steps = to > from ? to - from : 0;
    }
    return t;
}

/* Key steps of history in each slice of a tile, given how many a slice should have in all. */
static uint32_t slice_steps(const struct tile *t, uint32_t target, uint32_t max_slices)
{
    uint32_t slices = divide_up(t->history_steps + t->group_steps, target);
    if (slices > max_slices)
        slices = max_slices;
    return slices <= 1 ? t->history_steps : divide_up(t->history_steps, slices);
}

static uint32_t slice_count(const struct tile *t, uint32_t steps)
{
    return steps ? divide_up(t->history_steps, steps) : 1;
}

static uint32_t item_steps(const struct tile *t, uint32_t steps, uint32_t slice, uint32_t slices)
{
    uint32_t history = min_u32(steps, t->history_steps - slice * steps);
    return history + (slice + 1 == slices ? t->group_steps : 0);
}

static uint32_t length_bucket(uint32_t steps)
{
    return min_u32(steps, LENGTHS - 1);
}

/* When the last of `workers` would finish, in key steps times q, if this sequence, cut by `target`,
 * were repeated until it fills `graph_rows`. The k * workers longest items take at least k rounds;
 * all items take at least their sum over the workers. */
static uint64_t estimate(const struct shape *s, uint32_t graph_rows, uint32_t workers,
                         uint32_t target, uint32_t max_slices)
{
    uint32_t lengths[LENGTHS] = {0};
    uint64_t plane_rows = 0;
    uint32_t longest = 0;
    for (uint32_t i = 0; i * s->tile_rows < s->rows; i++) {
        struct tile t = tile_at(s, i);
        uint32_t steps = slice_steps(&t, target, max_slices), slices = slice_count(&t, steps);
        plane_rows += (uint64_t)slices * t.rows;
        for (uint32_t k = 0; k < slices; k++) {
            uint32_t bucket = length_bucket(item_steps(&t, steps, k, slices));
            lengths[bucket]++;
            longest = bucket > longest ? bucket : longest;
        }
    }
    /* An item of one head stands for heads * graph_rows / q of them; everything is times q. */
    uint64_t copies = (uint64_t)s->heads * graph_rows, round = (uint64_t)workers * s->rows;
    uint64_t before = 0, sum = 0, worst = 0;
    for (uint32_t bucket = longest + 1; bucket-- > 0;) {
        if (!lengths[bucket])
            continue;
        uint64_t cost = bucket + ITEM_STEPS;
        before += lengths[bucket] * copies;
        sum += lengths[bucket] * copies * cost;
        uint64_t bound = (before + round - 1) / round * cost * s->rows;
        worst = bound > worst ? bound : worst;
    }
    uint64_t even = sum / workers;
    return (worst > even ? worst : even) + plane_rows * graph_rows / ROW_STEP_SHARE;
}

/* The slice length for a sequence: key steps, history and own groups together. */
static uint32_t choose_target(const struct shape *s, uint32_t graph_rows, uint32_t workers,
                              uint32_t max_slices)
{
    uint32_t longest = 1, best = 0;
    for (uint32_t i = 0; i * s->tile_rows < s->rows; i++) {
        struct tile t = tile_at(s, i);
        uint32_t steps = t.history_steps + t.group_steps;
        longest = steps > longest ? steps : longest;
    }
    uint64_t best_time = UINT64_MAX;
    for (uint32_t slices = 1; slices <= max_slices; slices++) {
        uint32_t target = divide_up(longest, slices);
        if (slices > 1 && target < MIN_STEPS)
            break;
        if (max_slices == 1)
            return target;
        uint64_t time = estimate(s, graph_rows, workers, target, max_slices);
        if (time < best_time) {
            best_time = time;
            best = target;
        }
    }
    return best;
}

/* Calls for every item of a sequence, in a fixed order: counts them by length, or places them. */
static uint32_t walk(const struct shape *s, const struct place *at, uint32_t target,
                     uint32_t max_slices, uint32_t *lengths, struct hstu_work *work,
                     uint8_t *row_slices)
{
    uint32_t items = 0;
    for (uint32_t i = 0; i * s->tile_rows < s->rows; i++) {
        struct tile t = tile_at(s, i);
        uint32_t steps = slice_steps(&t, target, max_slices), slices = slice_count(&t, steps);
        items += slices * s->heads;
        if (row_slices) {
            memset(row_slices + t.row0, (int)slices, t.rows);
            for (uint32_t k = 0; k < slices; k++)
                lengths[length_bucket(item_steps(&t, steps, k, slices))] += s->heads;
            continue;
        }
        for (uint32_t k = 0; k < slices; k++) {
            uint32_t key0 = k * steps * s->key_step;
            uint32_t key1 = k + 1 == slices ? t.key_end : key0 + steps * s->key_step;
            uint32_t *place = &lengths[length_bucket(item_steps(&t, steps, k, slices))];
            for (uint32_t head = 0; head < s->heads; head++)
                work[(*place)++] = (struct hstu_work){.sequence = at->sequence,
                                                      .head = head,
                                                      .row0 = t.row0,
                                                      .key0 = key0,
                                                      .key1 = key1,
                                                      .slice = k,
                                                      .rows = t.rows,
                                                      .history = s->history,
                                                      .cached = s->cached,
                                                      .row_start = at->row_start,
                                                      .page_start = at->page_start,
                                                      .slices = slices};
        }
    }
    return items;
}

uint32_t hstu_plan(const struct hstu_attention_path *path, const struct skv_geometry *geometry,
                   uint32_t group, const struct hstu_sequence *sequences, uint32_t count,
                   uint32_t rows, uint32_t sm_count, uint32_t max_slices, struct hstu_work *work,
                   uint32_t capacity, uint8_t *row_slices)
{
    assert(count <= SKV_MAX_BATCH && max_slices >= 1 && group >= 1);
    uint32_t places[LENGTHS] = {0}, targets[SKV_MAX_BATCH] = {0};
    struct shape shapes[SKV_MAX_BATCH];
    struct place at[SKV_MAX_BATCH];
    uint32_t items = 0, row = 0, page = 0;
    for (uint32_t b = 0; b < count; b++) {
        const struct hstu_sequence *s = &sequences[b];
        shapes[b] = (struct shape){.cached = s->cached,
                                   .history = s->history,
                                   .rows = s->history - s->cached + s->targets,
                                   .tile_rows = path->tile_rows(geometry->head_dim),
                                   .key_step = path->key_step,
                                   .group = group,
                                   .heads = geometry->heads};
        /* Identical shapes, the usual case in a benchmark, are planned once. */
        if (b > 0 && memcmp(&shapes[b], &shapes[b - 1], sizeof shapes[b]) == 0)
            targets[b] = targets[b - 1];
        else if (shapes[b].rows)
            targets[b] = choose_target(&shapes[b], rows, sm_count, max_slices);
        assert(row + shapes[b].rows <= rows);
        at[b] = (struct place){.sequence = b, .row_start = row, .page_start = page};
        items += walk(&shapes[b], &at[b], targets[b], max_slices, places, NULL, row_slices + row);
        row += shapes[b].rows;
        page += hstu_pages_listed(s, geometry->page_tokens);
    }
    memset(row_slices + row, 0, rows - row);
    if (items > capacity)
        return 0;
    uint32_t place = 0;
    for (uint32_t bucket = LENGTHS; bucket-- > 0;) {
        uint32_t n = places[bucket];
        places[bucket] = place;
        place += n;
    }
    for (uint32_t b = 0; b < count; b++)
        walk(&shapes[b], &at[b], targets[b], max_slices, places, work, NULL);
    return items;
}
