/* The attention planner: which worker has which unit, and when the last one ends, if each unit,
 * longest first, goes to the worker that is free first. Called by cuda_plan.c, with mere counts for
 * every cutting that it tries, and once with the list. */
#include "cuda_plan.h"

#include <string.h>

/* Ticks are halved until a unit is shorter than a timeline. */
static uint32_t tick_shift(uint32_t longest)
{
    uint32_t shift = 0;
    while ((longest * HALF_STEP_TICKS + UNIT_TICKS) >> shift >= MOMENTS)
        shift++;
    return shift;
}

static uint32_t ticks_of(uint32_t length, uint32_t shift)
{
    return (length * HALF_STEP_TICKS + UNIT_TICKS) >> shift;
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

void hstu_timeline_open(struct timeline *t, uint32_t workers, uint32_t longest)
{
    t->now = t->end = 0;
    t->shift = tick_shift(longest);
    memset(t->some, 0, sizeof t->some);
    timeline_set(t, 0, workers);
}

bool hstu_timeline_give(struct timeline *t, const struct lengths *l, uint64_t limit)
{
    for (uint32_t length = l->longest; length > 0; length--) {
        uint32_t ticks = ticks_of(length, t->shift);
        for (uint32_t left = l->count[length]; left > 0;) {
            uint32_t moment = timeline_first(t), busy = (moment + ticks) % MOMENTS;
            uint32_t taken = min_u32(left, timeline_at(t, moment));
            t->end = max_u32(t->end, t->now + ticks);
            if (hstu_timeline_end(t) > limit)
                return false;
            timeline_set(t, moment, timeline_at(t, moment) - taken);
            timeline_set(t, busy, timeline_at(t, busy) + taken);
            left -= taken;
        }
    }
    return true;
}

void hstu_roster_open(struct roster *r, uint32_t workers, uint32_t longest)
{
    r->workers = workers;
    r->units = 0;
    hstu_timeline_open(&r->line, 0, longest); /* the first units are the workers' own */
}

void hstu_roster_give(struct roster *r, const struct lengths *l, struct hstu_work *work)
{
    struct timeline *line = &r->line;
    for (uint32_t length = l->longest; length > 0; length--) {
        uint32_t ticks = ticks_of(length, line->shift);
        for (uint32_t left = l->count[length]; left > 0; left--, r->units++) {
            uint32_t worker = r->units + 1, moment = 0;
            if (r->units >= r->workers) {
                moment = timeline_first(line);
                worker = timeline_at(line, moment);
                timeline_set(line, moment, r->after[worker]);
                work[r->latest[worker] * 2].next = r->units;
            }
            uint32_t busy = (moment + ticks) % MOMENTS;
            r->after[worker] = timeline_at(line, busy);
            timeline_set(line, busy, worker);
            r->latest[worker] = r->units;
        }
    }
}
