/* The attention planner: cuts a batch into work items. Called by the CUDA runner before every
 * launch, on the CPU, in a few microseconds; plain C, needs no GPU.
 *
 * A tile is tile_rows() consecutive query rows of one sequence and one head, or half as many where
 * a small graph's work spreads better so. Its keys are the history up to its last row, then, for
 * candidates, their own groups. SiLU attention has no row sum, so a tile's history may be cut into
 * slices whose partial outputs simply add: that is how a small batch fills the machine. All slices
 * of a sequence but each tile's last have the same length, its target. It need not divide the
 * history: a long slice and a short rest fill a machine that two halves do not. What comes behind
 * the slices, candidates' own keys for example, belongs to a tile's last one, or, in small batches,
 * where the longest unit is what counts, is a slice of its own. For each possible cutting the
 * planner works out when the last worker would finish if the graph's rows were all filled by copies
 * of this one sequence, and takes the best. It looks at the graph size and at this sequence alone,
 * never at its batch mates, so who else is in the batch cannot change a single bit.
 *
 * A worker takes a unit of work at a time: an item, or two where the path's blocks work in pairs
 * (struct hstu_attention_path). Two items of a unit are neighbouring tiles of one head and slice,
 * which read the same keys; a tile without a neighbour shares its unit with the next head's.
 *
 * Units come longest first (a counting sort), and each goes to the worker that is free first. Where
 * K and V of a large graph's sequences are more than the L2 keeps, they come in parties, a few
 * sequences at a time, as far as that ends as soon. */
#include "cuda_pass.h"

#include <assert.h>
#include <stdbool.h>
#include <string.h>

enum {
    PLANE_ROWS = 32768, /* rows of partial sums that all planes of a graph may have together */
    MAX_SLICES = 16,    /* a slice of 4096 keys / 16 is 256: shorter ones are mostly overhead */
    /* Time in ticks: half a key step of a unit, and what starting and ending a unit adds (Q, the
     * partial sums, what of the pipeline's filling is not hidden behind the unit before). Writing a
     * plane and reading it back in the gate kernel costs a tick for so many rows and heads. */
    HALF_STEP_TICKS = 5,
    UNIT_TICKS = 12,
    TICK_HALF_ROWS = 2 * 560,
    PARTED_SLICES = 4,  /* where a graph has fewer, nothing is a slice of its own but slices */
    FINE_STEPS = 32,    /* targets up to this are tried one by one, longer ones 1/32 apart */
    LENGTHS = 1024,     /* in half steps; longer units count as if they were this long */
    MOMENTS = 512,      /* of a timeline; a power of two */
    MAX_WORKERS = 1024, /* multiprocessors, or pairs of them */
    /* In graphs of more rows than PARTY_ROWS a tile of K and V is read many times. The L2 of an
     * H100 is 50 MB. */
    PARTY_ROWS = 4352,
    PARTY_BYTES = 20 << 20, /* K and V of a party's sequences, of a layer */
    MAX_PARTIES = 16,
    PARTY_SLACK = 64, /* they may end later by a 64th: the L2 makes up for it */
};

struct shape {
    uint32_t cached, history, rows; /* c, h, q */
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

struct choice {
    struct shape shape;
    struct cutting cutting;
    uint64_t time; /* at which a graph full of such sequences ends, in ticks */
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

/* What the cuttings of sequences are tried with. */
struct search {
    uint32_t graph_rows, workers, max_slices;
    struct lengths units; /* none between two tries; clearing it whole took a quarter of the time */
};

/* A sequence of the batch: how it is cut, and where it lies. */
struct place {
    struct choice choice;
    uint32_t sequence, row_start, page_start;
};

/* Sequences whose units come before the next ones', and those units. */
struct party {
    uint32_t first, end;
    struct lengths units;
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

static bool may_halve(const struct hstu_attention_path *path, uint32_t graph_rows)
{
    return graph_rows <= path->halved_rows;
}

uint32_t hstu_plan_capacity(const struct hstu_attention_path *path,
                            const struct skv_geometry *geometry, uint32_t rows, uint32_t batch)
{
    uint32_t tile_rows = path->tile_rows(geometry->head_dim);
    uint32_t tiles = divide_up(rows, may_halve(path, rows) ? tile_rows / 2 : tile_rows) + batch;
    /* The last unit may lack an item. */
    return tiles * geometry->heads * hstu_plan_slices(rows) + path->unit_items - 1;
}

/* ---- a sequence's units ---- */

/* Key steps that so many keys take; a step is a power of two. */
static uint32_t steps_of(const struct shape *s, uint32_t keys)
{
    return (keys + s->key_step - 1) >> __builtin_ctz(s->key_step);
}

static struct tile tile_at(const struct shape *s, uint32_t index)
{
    uint32_t row0 = index * s->tile_rows;
    struct tile t = {.row0 = row0, .rows = min_u32(s->tile_rows, s->rows - row0)};
    t.first = s->cached + row0;
    t.end = t.first + t.rows;
    t.history_steps = steps_of(s, min_u32(t.end, s->history));
    return t;
}

static void neighbours_at(const struct shape *s, uint32_t index, struct cutting cutting,
                          struct neighbours *n)
{
    n->joined = s->unit_items == 2 && index + 1 < s->tiles;
    n->upper = tile_at(s, index);
    n->lower = tile_at(s, n->joined ? index + 1 : index);
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

static uint32_t upper_parts_of(const struct neighbours *n)
{
    return n->slices + n->upper_own;
}

/* Slices of the lower one. */
static uint32_t parts_of(const struct neighbours *n)
{
    return n->lower_slices + n->lower_own;
}

static struct part part_at(const struct shape *s, const struct neighbours *n,
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

static void count_last_single(struct lengths *l)
{
    if (l->single)
        count_units(l, l->single, 1);
    l->single = 0;
}

static void clear_units(struct lengths *l)
{
    memset(l->count, 0, (l->longest + 1) * sizeof *l->count);
    l->longest = 0;
    l->ticks = 0;
}

static void copy_units(struct lengths *l, uint32_t copies)
{
    for (uint32_t length = 1; length <= l->longest; length++)
        l->count[length] *= copies;
    l->ticks *= copies;
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
        struct part part = part_at(s, n, cutting, k++);
        count_slices(l, s, part.length, part.both, 1);
    }
}

/* Counts the units of a sequence by length. Returns what is read back, in half rows of a plane. */
static uint32_t count_sequence(const struct shape *s, struct cutting cutting, struct lengths *l)
{
    uint32_t plane_half_rows = 0;
    for (uint32_t i = 0; i < s->tiles; i += s->unit_items) {
        struct neighbours n;
        neighbours_at(s, i, cutting, &n);
        plane_half_rows += half_rows(&n.lower, parts_of(&n));
        plane_half_rows += n.joined ? half_rows(&n.upper, upper_parts_of(&n)) : 0;
        count_parts(s, &n, cutting, l);
    }
    return plane_half_rows;
}

/* ---- time ---- */

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

/* Gives units, longest first, each to the worker that is free first. Returns when the last of all
 * ends, which was `end` before, in ticks that are halved `shift` times; or UINT32_MAX, where that
 * is later than `limit`. */
static uint32_t give(struct timeline *line, const struct lengths *l, uint32_t shift, uint32_t end,
                     uint64_t limit)
{
    for (uint32_t length = l->longest; length > 0; length--) {
        uint32_t ticks = ticks_of(length, shift);
        for (uint32_t left = l->count[length]; left > 0;) {
            uint32_t moment = timeline_first(line), busy = (moment + ticks) % MOMENTS;
            uint32_t taken = min_u32(left, timeline_at(line, moment));
            end = max_u32(end, line->now + ticks);
            if ((uint64_t)end << shift > limit)
                return UINT32_MAX;
            timeline_set(line, moment, timeline_at(line, moment) - taken);
            timeline_set(line, busy, timeline_at(line, busy) + taken);
            left -= taken;
        }
    }
    return end;
}

/* When the last of `workers` finishes, in ticks; UINT64_MAX: later than `limit`. */
static uint64_t finish(const struct lengths *l, uint32_t workers, uint64_t limit)
{
    struct timeline line;
    timeline_clear(&line);
    timeline_set(&line, 0, workers);
    const uint32_t shift = tick_shift(l->longest), end = give(&line, l, shift, 0, limit);
    return end == UINT32_MAX ? UINT64_MAX : (uint64_t)end << shift;
}

/* When a graph full of such sequences ends, with what its planes take; UINT64_MAX: not before
 * `limit`. *hopeless: nor would it with shorter slices, which only add to the sum of all units and
 * to the planes. */
static uint64_t time_cutting(struct search *search, const struct shape *s, struct cutting cutting,
                             uint64_t limit, bool *hopeless)
{
    struct lengths *l = &search->units;
    const uint32_t copies = search->graph_rows / s->rows;
    uint64_t planes = count_sequence(s, cutting, l);
    planes = planes * copies * s->heads / TICK_HALF_ROWS;
    count_last_single(l);
    copy_units(l, copies);
    *hopeless = l->ticks / search->workers + planes >= limit;
    uint64_t time = *hopeless ? UINT64_MAX : finish(l, search->workers, limit - planes);
    clear_units(l);
    return time < limit - planes ? time + planes : UINT64_MAX;
}

/* How to cut a sequence, where that ends before c->time. */
static void choose_cutting(struct choice *c, struct search *search)
{
    const struct shape *s = &c->shape;
    const uint32_t max_slices = search->max_slices;
    struct tile last = tile_at(s, s->tiles - 1);
    uint32_t longest = max_u32(last.history_steps, 1);
    struct cutting best = {longest, false};
    /* Slices of the portable path begin at multiples of its key step. */
    uint32_t ways =
        s->unit_items == 2 && max_slices >= PARTED_SLICES && s->history > 0 && last.end > s->history
            ? 2
            : 1;
    for (uint32_t way = 0; way < ways; way++) {
        uint32_t least = divide_up(longest, max_slices - way);
        bool hopeless = max_slices == 1; /* nothing to choose */
        /* With slices of its own for the rest, much longer ones than without are no gain. */
        uint32_t from = min_u32(best.target + 1, longest);
        /* A slice alone must not take that long. */
        if (c->time / (2 * HALF_STEP_TICKS) < from)
            from = max_u32((uint32_t)(c->time / (2 * HALF_STEP_TICKS)), least);
        for (uint32_t target = from; target >= least && !hopeless;
             target -= 1 + (target - 1) / FINE_STEPS) {
            struct cutting cutting = {target, way == 1};
            uint64_t time = time_cutting(search, s, cutting, c->time, &hopeless);
            best = time < c->time ? cutting : best;
            c->time = time < c->time ? time : c->time;
        }
    }
    c->cutting = best;
}

static struct shape halve(struct shape s)
{
    s.halved = 1;
    s.tile_rows /= 2;
    s.tiles = divide_up(s.rows, s.tile_rows);
    return s;
}

/* How to cut a sequence whose tiles may be halved, or may not. */
static struct choice choose(const struct shape *s, bool halves, struct search *search)
{
    struct choice whole = {.shape = *s, .time = UINT64_MAX};
    choose_cutting(&whole, search);
    if (!halves)
        return whole;
    struct choice half = {.shape = halve(*s), .time = whole.time};
    choose_cutting(&half, search);
    return half.time < whole.time ? half : whole;
}

/* ---- the list ---- */

struct list {
    struct hstu_work *work;
    uint32_t unit_items;
    uint32_t place[LENGTHS]; /* the next unit of each length */
    struct hstu_work single; /* waits for a second item, as in struct lengths */
    uint32_t single_length;
};

static struct hstu_work *next_unit(struct list *to, uint32_t length)
{
    return to->work + to->place[length]++ * to->unit_items;
}

/* Where an item without a neighbour goes: beside the one before it, or it waits for another. */
static struct hstu_work *next_single(struct list *to, uint32_t length)
{
    if (to->unit_items == 1)
        return next_unit(to, length);
    if (!to->single_length) {
        to->single_length = length;
        return &to->single;
    }
    struct hstu_work *unit = next_unit(to, max_u32(to->single_length, length));
    unit[0] = to->single;
    to->single_length = 0;
    return &unit[1];
}

static void put_last_single(struct list *to)
{
    if (to->single_length)
        *next_single(to, 0) = (struct hstu_work){.rows = 0};
}

static struct hstu_work item_of(const struct place *at, const struct tile *t,
                                const struct part *part, uint32_t key1, uint32_t slices,
                                uint32_t head)
{
    return (struct hstu_work){.sequence = at->sequence,
                              .head = head,
                              .row0 = t->row0,
                              .key0 = part->key0,
                              .key1 = key1,
                              .slice = (uint16_t)part->slice,
                              .slices = (uint16_t)slices,
                              .rows = t->rows,
                              .history = at->choice.shape.history,
                              .cached = at->choice.shape.cached,
                              .row_start = at->row_start,
                              .page_start = at->page_start,
                              .next = HSTU_WORK_LAST};
}

/* Puts a sequence's units into the list, as count_sequence() counts them. */
static void put_sequence(const struct place *at, struct list *to, uint8_t *row_slices)
{
    const struct shape *s = &at->choice.shape;
    const struct cutting cutting = at->choice.cutting;
    for (uint32_t i = 0; i < s->tiles; i += s->unit_items) {
        struct neighbours n;
        neighbours_at(s, i, cutting, &n);
        memset(row_slices + n.upper.row0, (int)upper_parts_of(&n), n.upper.rows);
        memset(row_slices + n.lower.row0, (int)parts_of(&n), n.lower.rows);
        for (uint32_t k = 0; k < parts_of(&n); k++) {
            struct part part = part_at(s, &n, cutting, k);
            for (uint32_t head = 0; head < s->heads; head++) {
                if (part.both) {
                    struct hstu_work *unit = next_unit(to, part.length);
                    unit[0] =
                        item_of(at, &n.upper, &part, part.upper_key1, upper_parts_of(&n), head);
                    unit[1] = item_of(at, &n.lower, &part, part.lower_key1, parts_of(&n), head);
                } else {
                    *next_single(to, part.length) =
                        item_of(at, &n.lower, &part, part.lower_key1, parts_of(&n), head);
                }
            }
        }
    }
}

/* ---- parties ---- */

/* Bytes of a layer's K and V that a sequence's rows read. */
static uint64_t read_bytes(const struct shape *s, uint32_t head_dim)
{
    return UINT64_C(4) * (s->cached + s->rows) * s->heads * head_dim;
}

/* Shares the sequences out, the last ones first, whose K and V are what UVQK wrote last, and counts
 * their units. Returns how many parties there are. */
static uint32_t make_parties(const struct place *places, uint32_t count, uint32_t head_dim,
                             uint64_t most_bytes, struct party *parties)
{
    uint32_t n = 0, single = 0;
    for (uint32_t end = count; end > 0 || n == 0; end = parties[n++].first) {
        struct party *p = &parties[n];
        uint64_t bytes = 0;
        *p = (struct party){.first = end, .end = end, .units.single = single};
        while (p->first > 0) {
            bytes += read_bytes(&places[p->first - 1].choice.shape, head_dim);
            if (bytes > most_bytes && p->first < end && n + 1 < MAX_PARTIES)
                break;
            p->first--;
        }
        for (uint32_t b = p->first; b < end; b++)
            count_sequence(&places[b].choice.shape, places[b].choice.cutting, &p->units);
        single = p->units.single; /* waits for the next party's */
    }
    count_last_single(&parties[n - 1].units);
    return n;
}

static uint32_t longest_of(const struct party *parties, uint32_t n)
{
    uint32_t longest = 0;
    for (uint32_t i = 0; i < n; i++)
        longest = max_u32(longest, parties[i].units.longest);
    return longest;
}

/* When the last worker finishes, party by party. */
static uint64_t finish_parties(const struct party *parties, uint32_t n, uint32_t workers)
{
    const uint32_t shift = tick_shift(longest_of(parties, n));
    struct timeline line;
    uint32_t end = 0;
    timeline_clear(&line);
    timeline_set(&line, 0, workers);
    for (uint32_t i = 0; i < n; i++)
        end = give(&line, &parties[i].units, shift, end, UINT64_MAX);
    return (uint64_t)end << shift;
}

/* Gives each worker its units: worker w has the w-th, and whoever is free first the next one. */
static void link_units(struct hstu_work *work, const struct party *parties, uint32_t n,
                       uint32_t workers)
{
    struct timeline line;
    timeline_clear(&line);
    uint16_t after[MAX_WORKERS + 1]; /* a moment's workers are a chain of worker + 1 */
    uint32_t latest[MAX_WORKERS + 1], shift = tick_shift(longest_of(parties, n)), unit = 0;
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t length = parties[i].units.longest; length > 0; length--) {
            uint32_t ticks = ticks_of(length, shift);
            for (uint32_t left = parties[i].units.count[length]; left > 0; left--, unit++) {
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
    uint32_t workers = hstu_workers(path->unit_items, sm_count);
    assert(count <= SKV_MAX_BATCH && max_slices >= 1 && group >= 1 && workers <= MAX_WORKERS);
    const uint32_t tile_rows = path->tile_rows(geometry->head_dim), head_dim = geometry->head_dim;
    struct place places[SKV_MAX_BATCH];
    struct shape before = {.rows = 0};
    struct search search = {.graph_rows = rows, .workers = workers, .max_slices = max_slices};
    uint32_t row = 0, page = 0;
    for (uint32_t b = 0; b < count; b++) {
        const struct hstu_sequence *s = &sequences[b];
        uint32_t own_rows = s->history - s->cached + s->targets;
        const struct shape whole = {.cached = s->cached,
                                    .history = s->history,
                                    .rows = own_rows,
                                    .tiles = divide_up(own_rows, tile_rows),
                                    .tile_rows = tile_rows,
                                    .key_step = path->key_step,
                                    .unit_items = path->unit_items,
                                    .group = group,
                                    .heads = geometry->heads};
        struct place *at = &places[b];
        /* Identical shapes, the usual case in a benchmark, are planned once. */
        if (b > 0 && memcmp(&whole, &before, sizeof whole) == 0)
            at->choice = places[b - 1].choice;
        else if (own_rows)
            at->choice = choose(&whole, may_halve(path, rows), &search);
        else
            at->choice = (struct choice){.shape = whole};
        before = whole;
        at->sequence = b;
        at->row_start = row;
        at->page_start = page;
        row += own_rows;
        page += hstu_pages_listed(s, geometry->page_tokens);
        assert(row <= rows);
    }
    memset(row_slices + row, 0, rows - row);

    struct party parties[MAX_PARTIES];
    uint32_t n = make_parties(places, count, head_dim, UINT64_MAX, parties), units = 0;
    if (rows > PARTY_ROWS) {
        const uint64_t end = finish_parties(parties, n, workers);
        uint64_t bytes = PARTY_BYTES;
        do {
            n = make_parties(places, count, head_dim, bytes, parties);
            bytes *= 2;
        } while (n > 1 && finish_parties(parties, n, workers) > end + end / PARTY_SLACK);
    }

    struct list to = {.work = work, .unit_items = path->unit_items};
    for (uint32_t i = 0; i < n; i++) {
        const struct lengths *l = &parties[i].units;
        for (uint32_t length = l->longest; length > 0; length--) {
            to.place[length] = units;
            units += l->count[length];
        }
        if (units * path->unit_items > capacity)
            return 0;
        for (uint32_t b = parties[i].first; b < parties[i].end; b++)
            put_sequence(&places[b], &to, row_slices + places[b].row_start);
    }
    put_last_single(&to);
    if (path->unit_items == 2)
        link_units(work, parties, n, workers);
    return units * path->unit_items;
}
