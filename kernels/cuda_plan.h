/* What the files of the attention planner share: cuda_plan.c (a batch), cuda_plan_units.c (the
 * units of a sequence that is cut in some way), cuda_plan_time.c (which worker has which unit, and
 * when).
 *
 * Tiles, slices, units and workers are explained in cuda_plan.c. Nothing here is used outside. */
#ifndef HSTU_CUDA_PLAN_H
#define HSTU_CUDA_PLAN_H

#include "cuda_pass.h"

#include <stdbool.h>

enum {
    LENGTHS = 1024,     /* in half steps; longer units count as if they were this long */
    MOMENTS = 512,      /* of a timeline; a power of two */
    MAX_WORKERS = 1024, /* multiprocessors, or pairs of them */
};

/* ---- cuda_plan_units.c ---- */

/* A sequence's rows, and tiles of them. */
struct shape {
    uint32_t cached, history, rows; /* c, h, q */
    uint32_t from; /* the first row that is wanted: tiles before its own have no units */
    uint32_t tiles, tile_rows, key_step, unit_items, group, heads;
    uint32_t halved; /* 1: its tiles have half the path's rows */
};

struct tile {
    uint32_t row0, rows;
    uint32_t first, end; /* absolute positions of its rows: [first, end) */
    uint32_t history_steps;
};

/* How a sequence's keys are cut. */
struct cutting {
    uint32_t target; /* steps of history a slice */
    bool apart;      /* what else a tile has is a slice of its own */
};

/* Two neighbouring tiles, cut alike, or one that has none to join: then it is both. Slices of the
 * history come first; the lower one's history may be a step longer, which makes its last slice
 * longer, or is a slice of its own. */
struct neighbours {
    struct tile upper, lower;
    uint32_t slices, lower_slices; /* of the history */
    bool joined;
    bool upper_own, lower_own; /* have a slice more, of candidates' own keys */
};

/* One slice of two neighbours, or of the lower one alone. */
struct part {
    uint32_t slice, key0, upper_key1, lower_key1;
    uint32_t length; /* of its unit */
    bool both;
};

/* Units by their length in half key steps. */
struct lengths {
    uint32_t count[LENGTHS];
    uint32_t longest;
    uint64_t ticks;  /* of all together */
    uint32_t single; /* the length of an item that waits for a second one; 0: none */
};

static inline uint32_t divide_up(uint32_t a, uint32_t b)
{
    return (a + b - 1) / b;
}

static inline uint32_t min_u32(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

static inline uint32_t max_u32(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}

/* The first tile that has units. */
static inline uint32_t first_tile_of(const struct shape *s)
{
    return s->from / s->tile_rows;
}

struct tile hstu_plan_tile(const struct shape *s, uint32_t index);
void hstu_plan_neighbours(const struct shape *s, uint32_t index, struct cutting cutting,
                          struct neighbours *n);
/* Slices of the upper tile, and of the lower one. */
static inline uint32_t upper_parts_of(const struct neighbours *n)
{
    return n->slices + n->upper_own;
}
static inline uint32_t parts_of(const struct neighbours *n)
{
    return n->lower_slices + n->lower_own;
}
struct part hstu_plan_part(const struct shape *s, const struct neighbours *n,
                           struct cutting cutting, uint32_t k);

/* Counts the units of a sequence by length. Returns what is read back, in half rows of a plane. The
 * last item without a neighbour waits for the next sequence's first, until
 * hstu_plan_count_single() says that there is none. */
uint32_t hstu_plan_count(const struct shape *s, struct cutting cutting, struct lengths *l);
void hstu_plan_count_single(struct lengths *l);
/* No units again; an item that waits stays. Clearing it whole took a quarter of the time. */
void hstu_plan_clear(struct lengths *l);

/* ---- cuda_plan_time.c ---- */

/* When workers become free: moments modulo MOMENTS, from `now` on, of ticks halved `shift` times.
 */
struct timeline {
    uint32_t now;                /* no worker is free before */
    uint32_t end, shift;         /* end: of the last unit so far */
    uint64_t some[MOMENTS / 64]; /* a bit a moment: workers become free then */
    uint16_t at[MOMENTS];        /* which, or how many: the user's, where the bit is set */
};

/* Units given to workers, each to the one that is free first: worker w has the w-th unit, and each
 * unit's first item names the next one. */
struct roster {
    struct timeline line;
    uint16_t after[MAX_WORKERS + 1]; /* a moment's workers are a chain of worker + 1 */
    uint32_t latest[MAX_WORKERS + 1];
    uint32_t workers, units;
};

enum {
    /* Time in ticks: half a key step of a unit, and what starting and ending a unit adds (Q, the
     * partial sums, what of the pipeline's filling is not hidden behind the unit before). */
    HALF_STEP_TICKS = 5,
    UNIT_TICKS = 12,
};

/* All workers free, and no unit longer than `longest`. */
void hstu_timeline_open(struct timeline *t, uint32_t workers, uint32_t longest);
/* Gives units, longest first, each to the worker that is free first. False: the last one would end
 * after `limit` ticks. */
bool hstu_timeline_give(struct timeline *t, const struct lengths *l, uint64_t limit);
static inline uint64_t hstu_timeline_end(const struct timeline *t)
{
    return (uint64_t)t->end << t->shift;
}

void hstu_roster_open(struct roster *r, uint32_t workers, uint32_t longest);
/* Units that come next in the list `work`, of two items each, longest first. */
void hstu_roster_give(struct roster *r, const struct lengths *l, struct hstu_work *work);

#endif
