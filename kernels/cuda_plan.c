/* The attention planner: cuts a batch into work items. Called by the CUDA runner before every
 * launch, on the CPU, in a few microseconds; plain C, needs no GPU.
 *
 * A tile is tile_rows() consecutive query rows of one sequence and one head. Its keys are the
 * history up to its last row, then, for candidates, their own groups. SiLU attention has no row
 * sum, so a tile's history may be cut into slices whose partial outputs simply add: that is how a
 * small batch fills the machine. All slices of a sequence but each tile's last have the same
 * length, its target. It need not divide the history: a long slice and a short rest fill a machine
 * that two halves do not. For each possible target the planner works out when the last worker would
 * finish if the graph's rows were all filled by copies of this one sequence, and takes the best. It
 * looks at the graph size and at this sequence alone, never at its batch mates, so who else is in
 * the batch cannot change a single bit.
 *
 * A worker takes a unit of work at a time: an item, or two where the path's blocks work in pairs
 * (struct hstu_attention_path). Two items of a unit are neighbouring tiles of one head and slice,
 * which read the same keys; a tile without a neighbour shares its unit with the next head's.
 *
 * Units come longest first (a counting sort), and each goes to the worker that is free first. */
#include "cuda_pass.h"

#include <assert.h>
#include <stdbool.h>
#include <string.h>

enum {
    PLANE_ROWS = 32768, /* rows of partial sums that all planes of a graph may have together */
    MAX_SLICES = 16,    /* a slice of 4096 keys / 16 is 256: shorter ones are mostly overhead */
    /* Time in ticks: a key step of a unit, and what starting and ending a unit adds (Q, the partial
     * sums, what of the pipeline's filling is not hidden behind the unit before). Reading a plane
     * back in the gate kernel costs 1/5600 step a row and head. */
    STEP_TICKS = 10,
    UNIT_TICKS = 12,
    ROW_STEP_SHARE = 5600,
    FINE_STEPS = 32,    /* targets up to this are tried one by one, longer ones 1/32 apart */
    LENGTHS = 1024,     /* longer units count as if they were this long */
    MOMENTS = 512,      /* of a timeline; a power of two */
    MAX_WORKERS = 1024, /* multiprocessors, or pairs of them */
};

struct shape {
    uint32_t cached, history, rows; /* c, h, q */
    uint32_t tiles, tile_rows, key_step, unit_items, group, heads;
};

/* Where a sequence lies in the batch. */
struct place {
    const struct shape *shape;
    uint32_t sequence, row_start, page_start;
};

struct tile {
    uint32_t row0, rows;
    uint32_t first, end; /* absolute positions of its rows: [first, end) */
    uint32_t history_steps;
};

/* Two neighbouring tiles, cut alike, or one that has none to join: then it is both. */
struct neighbours {
    struct tile upper, lower;
    uint32_t slices; /* of each; the lower one's last may be a step longer */
    bool joined;
};

struct cut {
    uint32_t slice, key0, key1;
};

/* Units by their length in steps. */
struct lengths {
    uint32_t count[LENGTHS];
    uint32_t longest;
    uint64_t ticks;  /* of all together */
    uint32_t single; /* the length of an item that waits for a second one; 0: none */
};

/* When workers become free: moments modulo MOMENTS, from `now` on. */
struct timeline {
    uint32_t now;                /* no worker is free before */
    uint64_t some[MOMENTS / 64]; /* a bit a moment: workers become free then */
    uint16_t at[MOMENTS];        /* which, or how many: the caller's, where the bit is set */
};

static uint32_t divide_up(uint32_t a, uint32_t b)
{
    return (a + b - 1) / b;
}

static uint32_t min_u32(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

static uint32_t max_u32(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
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
    /* The last unit may lack an item. */
    return tiles * geometry->heads * hstu_plan_slices(rows) + path->unit_items - 1;
}

/* ---- a sequence's units ---- */

static struct tile tile_at(const struct shape *s, uint32_t index)
{
    uint32_t row0 = index * s->tile_rows;
    struct tile t = {.row0 = row0, .rows = min_u32(s->tile_rows, s->rows - row0)};
    t.first = s->cached + row0;
    t.end = t.first + t.rows;
    t.history_steps = divide_up(min_u32(t.end, s->history), s->key_step);
    return t;
}

static void neighbours_at(const struct shape *s, uint32_t index, uint32_t target,
                          struct neighbours *n)
{
    n->joined = s->unit_items == 2 && index + 1 < s->tiles;
    n->upper = tile_at(s, index);
    n->lower = tile_at(s, n->joined ? index + 1 : index);
    n->slices = max_u32(divide_up(n->upper.history_steps, target), 1);
}

/* Key tiles that a block walks for rows [first, end) over keys [key0, key1): of the prefix, of the
 * in-flight history and of the candidates' own groups, none of which shares a tile with another. */
static uint32_t steps_of(const struct shape *s, uint32_t first, uint32_t end, uint32_t key0,
                         uint32_t key1)
{
    uint32_t seen = min_u32(min_u32(s->history, end), key1), steps = 0;
    uint32_t prefix_end = min_u32(s->cached, seen), flight = max_u32(key0, s->cached);
    if (key0 < prefix_end)
        steps += divide_up(prefix_end - key0, s->key_step);
    if (flight < seen)
        steps += divide_up(seen - flight, s->key_step);
    if (key1 > s->history) {
        uint32_t own = first > s->history ? (first - s->history) / s->group * s->group : 0;
        steps += divide_up(key1 - s->history - own, s->key_step);
    }
    return min_u32(max_u32(steps, 1), LENGTHS - 1);
}

static uint32_t slice_key(const struct shape *s, uint32_t target, uint32_t slice)
{
    return slice * target * s->key_step;
}

/* The length of the unit that slice k belongs to. */
static uint32_t unit_steps(const struct shape *s, const struct neighbours *n, uint32_t target,
                           uint32_t k)
{
    uint32_t end = k + 1 == n->slices ? n->lower.end : slice_key(s, target, k + 1);
    return steps_of(s, n->upper.first, n->lower.end, slice_key(s, target, k), end);
}

static void count_units(struct lengths *l, uint32_t steps, uint32_t count)
{
    l->count[steps] += count;
    l->ticks += (uint64_t)count * (steps * STEP_TICKS + UNIT_TICKS);
    l->longest = max_u32(l->longest, steps);
}

/* Items without a neighbour: two by two in the order in which they come. */
static void count_singles(struct lengths *l, uint32_t steps, uint32_t count)
{
    if (l->single && count) {
        count_units(l, max_u32(l->single, steps), 1);
        l->single = 0;
        count--;
    }
    count_units(l, steps, count / 2);
    if (count % 2)
        l->single = steps;
}

static void count_last_single(struct lengths *l)
{
    if (l->single)
        count_units(l, l->single, 1);
    l->single = 0;
}

/* Counts the units of a sequence by length. Returns what is read back, in rows of a plane. */
static uint32_t count_sequence(const struct shape *s, uint32_t target, uint32_t heads,
                               struct lengths *l)
{
    uint32_t plane_rows = 0;
    for (uint32_t i = 0; i < s->tiles; i += s->unit_items) {
        struct neighbours n;
        neighbours_at(s, i, target, &n);
        plane_rows += n.slices * (n.lower.end - n.upper.first);
        for (uint32_t k = 0; k < n.slices; k++) {
            uint32_t steps = unit_steps(s, &n, target, k);
            if (n.joined || s->unit_items == 1)
                count_units(l, steps, heads);
            else
                count_singles(l, steps, heads);
        }
    }
    return plane_rows;
}

/* ---- time ---- */

/* Ticks are halved until a unit is shorter than a timeline. */
static uint32_t tick_shift(uint32_t longest)
{
    uint32_t shift = 0;
    while ((longest * STEP_TICKS + UNIT_TICKS) >> shift >= MOMENTS)
        shift++;
    return shift;
}

static uint32_t ticks_of(uint32_t steps, uint32_t shift)
{
    return (steps * STEP_TICKS + UNIT_TICKS) >> shift;
}

static void timeline_clear(struct timeline *t)
{
    t->now = 0;
    memset(t->some, 0, sizeof t->some);
}

/* Moves `now` on to the first moment at which a worker is free; returns its place in the ring. */
static uint32_t timeline_first(struct timeline *t)
{
    uint32_t word = t->now % MOMENTS / 64;
    uint64_t bits = t->some[word] & ~UINT64_C(0) << t->now % 64;
    while (!bits) {
        word = (word + 1) % (MOMENTS / 64);
        bits = t->some[word];
    }
    uint32_t first = word * 64 + (uint32_t)__builtin_ctzll(bits);
    t->now += (first - t->now) % MOMENTS;
    return first;
}

static uint32_t timeline_at(const struct timeline *t, uint32_t moment)
{
    return t->some[moment / 64] >> moment % 64 & 1 ? t->at[moment] : 0;
}

/* 0: nobody. */
static void timeline_set(struct timeline *t, uint32_t moment, uint32_t who)
{
    uint64_t bit = UINT64_C(1) << moment % 64, *some = &t->some[moment / 64];
    *some = who ? *some | bit : *some & ~bit;
    t->at[moment] = (uint16_t)who;
}

/* When the last of `workers` finishes, in ticks, if each unit, longest first, goes to the worker
 * that is free first. Gives up where that is later than `limit`. */
static uint64_t finish(const struct lengths *l, uint32_t workers, uint64_t limit)
{
    struct timeline line;
    timeline_clear(&line);
    uint32_t shift = tick_shift(l->longest), end = 0;
    timeline_set(&line, 0, workers);
    for (uint32_t steps = l->longest; steps > 0; steps--) {
        uint32_t ticks = ticks_of(steps, shift);
        for (uint32_t left = l->count[steps]; left > 0;) {
            uint32_t moment = timeline_first(&line), busy = (moment + ticks) % MOMENTS;
            uint32_t taken = min_u32(left, timeline_at(&line, moment));
            end = max_u32(end, line.now + ticks);
            if ((uint64_t)end << shift > limit)
                return UINT64_MAX;
            timeline_set(&line, moment, timeline_at(&line, moment) - taken);
            timeline_set(&line, busy, timeline_at(&line, busy) + taken);
            left -= taken;
        }
    }
    return (uint64_t)end << shift;
}

/* The slice length for a sequence, in key steps of history. */
static uint32_t choose_target(const struct shape *s, uint32_t graph_rows, uint32_t workers,
                              uint32_t max_slices)
{
    struct tile last = tile_at(s, s->tiles - 1);
    uint32_t longest = max_u32(last.history_steps, 1), best = longest;
    uint32_t least = divide_up(longest, max_slices);
    uint32_t copies = graph_rows / s->rows;
    uint64_t best_time = UINT64_MAX;
    struct lengths l = {.longest = 0};
    for (uint32_t target = longest; target >= least && longest > least;
         target -= 1 + (target - 1) / FINE_STEPS) {
        uint64_t reading = count_sequence(s, target, s->heads * copies, &l);
        reading = reading * copies * s->heads * STEP_TICKS / ROW_STEP_SHARE;
        count_last_single(&l);
        /* Shorter slices only add to the sum of all units and to what is read back. */
        if (l.ticks / workers + reading >= best_time)
            break;
        uint64_t time = finish(&l, workers, best_time - reading);
        if (time < best_time - reading) {
            best_time = time + reading;
            best = target;
        }
        memset(l.count, 0, (l.longest + 1) * sizeof *l.count);
        l.longest = 0;
        l.ticks = 0;
    }
    return best;
}

/* ---- the list ---- */

struct list {
    struct hstu_work *work;
    uint32_t unit_items;
    uint32_t place[LENGTHS]; /* the next unit of each length */
    struct hstu_work single; /* waits for a second item, as in struct lengths */
    uint32_t single_steps;
};

static struct hstu_work *next_unit(struct list *to, uint32_t steps)
{
    return to->work + to->place[steps]++ * to->unit_items;
}

/* Where an item without a neighbour goes: beside the one before it, or it waits for another. */
static struct hstu_work *next_single(struct list *to, uint32_t steps)
{
    if (to->unit_items == 1)
        return next_unit(to, steps);
    if (!to->single_steps) {
        to->single_steps = steps;
        return &to->single;
    }
    struct hstu_work *unit = next_unit(to, max_u32(to->single_steps, steps));
    unit[0] = to->single;
    to->single_steps = 0;
    return &unit[1];
}

static void put_last_single(struct list *to)
{
    if (to->single_steps)
        *next_single(to, 0) = (struct hstu_work){.rows = 0};
}

static struct hstu_work item_of(const struct place *at, const struct tile *t, const struct cut *cut,
                                uint32_t head)
{
    return (struct hstu_work){.sequence = at->sequence,
                              .head = head,
                              .row0 = t->row0,
                              .key0 = cut->key0,
                              .key1 = cut->key1,
                              .slice = cut->slice,
                              .rows = t->rows,
                              .history = at->shape->history,
                              .cached = at->shape->cached,
                              .row_start = at->row_start,
                              .page_start = at->page_start,
                              .next = HSTU_WORK_LAST};
}

/* Puts a sequence's units into the list, as count_sequence() counts them. */
static void put_sequence(const struct place *at, uint32_t target, struct list *to,
                         uint8_t *row_slices)
{
    const struct shape *s = at->shape;
    for (uint32_t i = 0; i < s->tiles; i += s->unit_items) {
        struct neighbours n;
        neighbours_at(s, i, target, &n);
        memset(row_slices + n.upper.row0, (int)n.slices, n.lower.end - n.upper.first);
        for (uint32_t k = 0; k < n.slices; k++) {
            uint32_t steps = unit_steps(s, &n, target, k), key1 = slice_key(s, target, k + 1);
            bool last = k + 1 == n.slices;
            struct cut upper = {k, slice_key(s, target, k), last ? n.upper.end : key1};
            struct cut lower = {k, upper.key0, last ? n.lower.end : key1};
            for (uint32_t head = 0; head < s->heads; head++) {
                if (n.joined) {
                    struct hstu_work *unit = next_unit(to, steps);
                    unit[0] = item_of(at, &n.upper, &upper, head);
                    unit[1] = item_of(at, &n.lower, &lower, head);
                } else {
                    *next_single(to, steps) = item_of(at, &n.lower, &lower, head);
                }
            }
        }
    }
}

/* Gives each worker its units: worker w has the w-th, and whoever is free first the next one. */
static void link_units(struct hstu_work *work, const struct lengths *l, uint32_t workers)
{
    struct timeline line;
    timeline_clear(&line);
    uint16_t after[MAX_WORKERS + 1]; /* a moment's workers are a chain of worker + 1 */
    uint32_t latest[MAX_WORKERS + 1], shift = tick_shift(l->longest), unit = 0;
    for (uint32_t steps = l->longest; steps > 0; steps--) {
        uint32_t ticks = ticks_of(steps, shift);
        for (uint32_t left = l->count[steps]; left > 0; left--, unit++) {
            uint32_t worker = unit + 1, moment = 0;
            if (unit >= workers) {
                moment = timeline_first(&line);
                worker = timeline_at(&line, moment);
                timeline_set(&line, moment, after[worker]);
                work[latest[worker] * 2].next = unit;
            }
            uint32_t busy = (moment + ticks) % MOMENTS;
            after[worker] = timeline_at(&line, busy);
            timeline_set(&line, busy, worker);
            latest[worker] = unit;
        }
    }
}

uint32_t hstu_plan(const struct hstu_attention_path *path, const struct skv_geometry *geometry,
                   uint32_t group, const struct hstu_sequence *sequences, uint32_t count,
                   uint32_t rows, uint32_t sm_count, uint32_t max_slices, struct hstu_work *work,
                   uint32_t capacity, uint8_t *row_slices)
{
    uint32_t workers = max_u32(sm_count / path->unit_items, 1);
    assert(count <= SKV_MAX_BATCH && max_slices >= 1 && group >= 1 && workers <= MAX_WORKERS);
    uint32_t tile_rows = path->tile_rows(geometry->head_dim), targets[SKV_MAX_BATCH] = {0};
    struct shape shapes[SKV_MAX_BATCH];
    struct lengths l = {.longest = 0};
    for (uint32_t b = 0; b < count; b++) {
        const struct hstu_sequence *s = &sequences[b];
        uint32_t own_rows = s->history - s->cached + s->targets;
        shapes[b] = (struct shape){.cached = s->cached,
                                   .history = s->history,
                                   .rows = own_rows,
                                   .tiles = divide_up(own_rows, tile_rows),
                                   .tile_rows = tile_rows,
                                   .key_step = path->key_step,
                                   .unit_items = path->unit_items,
                                   .group = group,
                                   .heads = geometry->heads};
        /* Identical shapes, the usual case in a benchmark, are planned once. */
        if (b > 0 && memcmp(&shapes[b], &shapes[b - 1], sizeof shapes[b]) == 0)
            targets[b] = targets[b - 1];
        else if (shapes[b].rows)
            targets[b] = choose_target(&shapes[b], rows, workers, max_slices);
        count_sequence(&shapes[b], targets[b], geometry->heads, &l);
    }
    count_last_single(&l);

    struct list to = {.work = work, .unit_items = path->unit_items};
    uint32_t units = 0, row = 0, page = 0;
    for (uint32_t steps = l.longest; steps > 0; steps--) {
        to.place[steps] = units;
        units += l.count[steps];
    }
    if (units * path->unit_items > capacity)
        return 0;
    for (uint32_t b = 0; b < count; b++) {
        struct place at = {&shapes[b], b, row, page};
        assert(row + shapes[b].rows <= rows);
        put_sequence(&at, targets[b], &to, row_slices + row);
        row += shapes[b].rows;
        page += hstu_pages_listed(&sequences[b], geometry->page_tokens);
    }
    put_last_single(&to);
    memset(row_slices + row, 0, rows - row);
    if (path->unit_items == 2)
        link_units(work, &l, workers);
    return units * path->unit_items;
}
