/* The attention planner: the units of a sequence whose tiles are cut in some way, one by one, and
 * counted by length. Called by cuda_plan.c for every cutting that it tries, so in all some hundred
 * times a launch. */
#include "cuda_plan.h"

#include <string.h>

/* Key steps that so many keys take; a step is a power of two. */
static uint32_t steps_of(const struct shape *s, uint32_t keys)
{
    return (keys + s->key_step - 1) >> __builtin_ctz(s->key_step);
}

struct tile hstu_plan_tile(const struct shape *s, uint32_t index)
{
    uint32_t row0 = index * s->tile_rows;
    struct tile t = {.row0 = row0, .rows = min_u32(s->tile_rows, s->rows - row0)};
    t.first = s->cached + row0;
    t.end = t.first + t.rows;
    t.history_steps = steps_of(s, min_u32(t.end, s->history));
    return t;
}

void hstu_plan_neighbours(const struct shape *s, uint32_t index, struct cutting cutting,
                          struct neighbours *n)
{
    n->joined = s->unit_items == 2 && index + 1 < s->tiles;
    n->upper = hstu_plan_tile(s, index);
    n->lower = hstu_plan_tile(s, n->joined ? index + 1 : index);
    n->slices = n->lower_slices = max_u32(divide_up(n->upper.history_steps, cutting.target), 1);
    if (cutting.apart)
        n->lower_slices = max_u32(divide_up(n->lower.history_steps, cutting.target), 1);
    n->upper_own = cutting.apart && n->upper.end > s->history;
    n->lower_own = cutting.apart && n->lower.end > s->history;
}

/* Key tiles of the own groups of candidates among rows [first, end), if there are any; groups'
 * begin at sixteens of keys (cut() in attention_sm90_item.cuh). */
static uint32_t own_steps(const struct shape *s, uint32_t first, uint32_t end)
{
    uint32_t from = first > s->history ? (first - s->history) / s->group * s->group : 0;
    from -= s->group > 1 ? from % 16 : 0;
    return end > s->history ? steps_of(s, end - s->history - from) : 0;
}

/* Key tiles of the history in [key0, key1) that a block walks for rows up to `end`: of the prefix
 * and of the in-flight history, which share no tile. */
static uint32_t history_steps(const struct shape *s, uint32_t end, uint32_t key0, uint32_t key1)
{
    uint32_t seen = min_u32(min_u32(s->history, end), key1), steps = 0;
    uint32_t prefix_end = min_u32(s->cached, seen), flight = max_u32(key0, s->cached);
    if (key0 < prefix_end)
        steps += steps_of(s, prefix_end - key0);
    if (flight < seen)
        steps += steps_of(s, seen - flight);
    return steps;
}

/* The length of a unit of so many half steps. A halved tile's take as long as a whole one's, what
 * is around them half a step less. */
static uint32_t length_of(const struct shape *s, uint32_t half_steps)
{
    return min_u32(max_u32(half_steps, 1 + s->halved) - s->halved, LENGTHS - 1);
}

/* The length of a unit of two tiles, or of one: the kernel's blocks share their key tiles only
 * where candidates' own keys, which are nobody else's, do not make that too dear (joins() in
 * attention_sm90_item.cuh). */
static uint32_t unit_length(const struct shape *s, const struct neighbours *n,
                            const struct part *part)
{
    const struct tile *upper = part->both ? &n->upper : &n->lower, *lower = &n->lower;
    uint32_t shared = history_steps(s, lower->end, part->key0, part->lower_key1), own = 0;
    if (part->lower_key1 > s->history) {
        uint32_t alone = own_steps(s, lower->first, lower->end);
        own = own_steps(s, upper->first, lower->end);
        if (upper->end > s->history && (own - alone) * 8 > shared)
            own = max_u32(alone, own_steps(s, upper->first, upper->end));
    }
    /* Of its own keys' tile a warpgroup multiplies half, where the groups are small. */
    own *= s->group <= s->key_step / 2 ? 1 : 2;
    return length_of(s, shared * 2 + own);
}

static uint32_t slice_key(const struct shape *s, uint32_t target, uint32_t slice)
{
    return slice * target * s->key_step;
}

struct part hstu_plan_part(const struct shape *s, const struct neighbours *n,
                           struct cutting cutting, uint32_t k)
{
    uint32_t next = slice_key(s, cutting.target, k + 1);
    struct part part = {.slice = k,
                        .key0 = slice_key(s, cutting.target, k),
                        .upper_key1 = next,
                        .lower_key1 = next,
                        .both = n->joined && k < n->slices};
    if (k + 1 == n->slices)
        part.upper_key1 = n->upper_own ? s->history : n->upper.end;
    if (k + 1 == n->lower_slices)
        part.lower_key1 = n->lower_own ? s->history : n->lower.end;
    if (k == n->lower_slices) {
        part.key0 = s->history;
        part.upper_key1 = n->upper.end;
        part.lower_key1 = n->lower.end;
        part.both = n->joined && n->upper_own;
    }
    part.length = unit_length(s, n, &part);
    return part;
}

static void count_units(struct lengths *l, uint32_t length, uint32_t count)
{
    l->count[length] += count;
    l->ticks += (uint64_t)count * (length * HALF_STEP_TICKS + UNIT_TICKS);
    l->longest = max_u32(l->longest, length);
}

/* Items without a neighbour: two by two in the order in which they come. */
static void count_singles(struct lengths *l, uint32_t length, uint32_t count)
{
    if (l->single && count) {
        count_units(l, max_u32(l->single, length), 1);
        l->single = 0;
        count--;
    }
    count_units(l, length, count / 2);
    if (count % 2)
        l->single = length;
}

void hstu_plan_count_single(struct lengths *l)
{
    if (l->single)
        count_units(l, l->single, 1);
    l->single = 0;
}

void hstu_plan_clear(struct lengths *l)
{
    memset(l->count, 0, (l->longest + 1) * sizeof *l->count);
    l->longest = 0;
    l->ticks = 0;
}

/* What a tile's planes come to, in half rows: a single one is of bf16 (and is counted so where the
 * path rounds in graphs of one plane only). */
static uint32_t half_rows(const struct tile *t, uint32_t slices)
{
    return t->rows * (slices > 1 ? 2 * slices : 1);
}

/* Counts the units of `count` slices of one length in a row. */
static void count_slices(struct lengths *l, const struct shape *s, uint32_t length, bool both,
                         uint32_t count)
{
    if (both || s->unit_items == 1)
        count_units(l, length, count * s->heads);
    else
        count_singles(l, length, count * s->heads);
}

/* Counts the units of neighbours. Slices before the last have all the same length, but one that
 * holds the end of the prefix. */
static void count_parts(const struct shape *s, const struct neighbours *n, struct cutting cutting,
                        struct lengths *l)
{
    const uint32_t before_last = min_u32(n->slices, n->lower_slices) - 1;
    const uint32_t slice_keys = slice_key(s, cutting.target, 1),
                   plain = length_of(s, cutting.target * 2);
    uint32_t mixed = s->cached / slice_keys, k = 0;
    if (s->cached % slice_keys == 0)
        mixed = before_last;
    while (k < parts_of(n)) {
        const uint32_t until = k <= mixed ? min_u32(mixed, before_last) : before_last;
        if (k < until) {
            count_slices(l, s, plain, n->joined, until - k);
            k = until;
            continue;
        }
        struct part part = hstu_plan_part(s, n, cutting, k++);
        count_slices(l, s, part.length, part.both, 1);
    }
}

uint32_t hstu_plan_count(const struct shape *s, struct cutting cutting, struct lengths *l)
{
    uint32_t plane_half_rows = 0;
    for (uint32_t i = first_tile_of(s); i < s->tiles; i += s->unit_items) {
        struct neighbours n;
        hstu_plan_neighbours(s, i, cutting, &n);
        plane_half_rows += half_rows(&n.lower, parts_of(&n));
        plane_half_rows += n.joined ? half_rows(&n.upper, upper_parts_of(&n)) : 0;
        count_parts(s, &n, cutting, l);
    }
    return plane_half_rows;
}
