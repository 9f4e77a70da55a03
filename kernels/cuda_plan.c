/* The attention planner: cuts a batch into work items. Called by the CUDA runner before every
 * launch, on the CPU, twice: for the last layer only tiles with candidates count. 1 to 15
 * microseconds in all for sequences alike; plain C, needs no GPU.
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
 * Units come longest first (a counting sort), and each goes to the worker that is free first. In
 * large graphs, where K and V of all sequences are more than the L2 keeps and each tile of them is
 * read many times, the units come party by party, a few sequences at a time. */
#include "cuda_plan.h"

#include <assert.h>
#include <string.h>

enum {
    PLANE_ROWS = 32768, /* rows of partial sums that all planes of a graph may have together */
    MAX_SLICES = 16,    /* a slice of 4096 keys / 16 is 256: shorter ones are mostly overhead */
    /* Writing a plane and reading it back in the gate kernel costs a tick for so many rows and
     * heads. */
    TICK_HALF_ROWS = 2 * 560,
    PARTED_SLICES = 4, /* where a graph has fewer, nothing is a slice of its own but slices */
    FEW_STEPS = 4,     /* of a history that is cut in all ways without a guess */
    FINE_STEPS = 32,   /* targets up to this are tried one by one, longer ones 1/32 apart */
    PARTY_ROWS = 4352, /* larger graphs have parties: in smaller ones the order matters more */
    /* K and V of a party, of a layer: of what an H100's L2 holds, 50 MB, that and twice as much
     * leave room for what else passes through. */
    PARTY_BYTES = 20 << 20,
    PARTY_BYTES_MOST = 2 * PARTY_BYTES,
    PARTY_SLACK = 64, /* the last may end later by a 64th: the L2 makes up for it */
};

struct choice {
    struct shape shape;
    struct cutting cutting;
    uint64_t time; /* at which a graph full of such sequences ends, in ticks */
};

/* What the cuttings of sequences are tried with. */
struct search {
    uint32_t graph_rows, workers, max_slices;
    struct lengths units; /* none between two tries */
};

/* A sequence of the batch: how it is cut, and where it lies. */
struct place {
    struct choice choice;
    uint32_t sequence, row_start, page_start;
};

/* The last sequences first, whose K and V are what UVQK wrote last: party i has sequences
 * first[i + 1] to first[i] - 1. */
struct parties {
    uint32_t count, first[SKV_MAX_BATCH + 1];
};

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

/* ---- how a sequence is cut ---- */

static void copy_units(struct lengths *l, uint32_t copies)
{
    for (uint32_t length = 1; length <= l->longest; length++)
        l->count[length] *= copies;
    l->ticks *= copies;
}

/* When the last of `workers` ends, in ticks; UINT64_MAX: later than `limit`. */
static uint64_t finish(const struct lengths *l, uint32_t workers, uint64_t limit)
{
    struct timeline line;
    hstu_timeline_open(&line, workers, l->longest);
    return hstu_timeline_give(&line, l, limit) ? hstu_timeline_end(&line) : UINT64_MAX;
}

/* When a graph full of such sequences ends, with what its planes take; UINT64_MAX: not before
 * `limit`. *hopeless: nor would it with shorter slices, which only add to the sum of all units and
 * to the planes. */
static uint64_t time_cutting(struct search *search, const struct shape *s, struct cutting cutting,
                             uint64_t limit, bool *hopeless)
{
    struct lengths *l = &search->units;
    const uint32_t copies = search->graph_rows / s->rows;
    uint64_t planes = hstu_plan_count(s, cutting, l);
    planes = planes * copies * s->heads / TICK_HALF_ROWS;
    hstu_plan_count_single(l);
    copy_units(l, copies);
    *hopeless = l->ticks / search->workers + planes >= limit;
    uint64_t time = *hopeless ? UINT64_MAX : finish(l, search->workers, limit - planes);
    hstu_plan_clear(l);
    return time < limit - planes ? time + planes : UINT64_MAX;
}

/* A cutting that is hardly ever bad, into slices of `least` to `longest` steps: each worker has one
 * slice, or as near to that as can be. */
static struct cutting guess_cutting(const struct shape *s, uint32_t least, uint32_t longest,
                                    const struct search *search)
{
    const uint32_t copies = search->graph_rows / s->rows;
    const uint32_t units = (s->tiles - first_tile_of(s)) * s->heads * copies / s->unit_items;
    const uint32_t share = divide_up(units * longest, search->workers);
    return (struct cutting){max_u32(min_u32(share, longest), least), false};
}

/* How to cut a sequence, where that ends before c->time. */
static void choose_cutting(struct choice *c, struct search *search)
{
    const struct shape *s = &c->shape;
    const uint32_t max_slices = search->max_slices;
    struct tile last = hstu_plan_tile(s, s->tiles - 1);
    uint32_t longest = max_u32(last.history_steps, 1);
    struct cutting best = {longest, false};
    /* Slices of the portable path begin at multiples of its key step. */
    uint32_t ways =
        s->unit_items == 2 && max_slices >= PARTED_SLICES && s->history > 0 && last.end > s->history
            ? 2
            : 1;
    uint64_t limit = c->time; /* a cutting that ends before is better, or as good as the guess */
    if (max_slices > 1 && longest > FEW_STEPS) { /* so that much longer slices need not be tried */
        bool hopeless;
        struct cutting guess = guess_cutting(s, divide_up(longest, max_slices), longest, search);
        uint64_t time = time_cutting(search, s, guess, limit, &hopeless);
        if (time < limit) {
            best = guess;
            c->time = time;
            limit = time + 1;
        }
    }
    for (uint32_t way = 0; way < ways; way++) {
        uint32_t least = divide_up(longest, max_slices - way);
        bool hopeless = max_slices == 1; /* nothing to choose */
        /* With slices of its own for the rest, much longer ones than without are no gain. */
        uint32_t from = way == 0 ? longest : min_u32(best.target + 1, longest);
        /* A slice alone must not take that long. */
        if (limit / (2 * HALF_STEP_TICKS) < from)
            from = max_u32((uint32_t)(limit / (2 * HALF_STEP_TICKS)), least);
        for (uint32_t target = from; target >= least && !hopeless;
             target -= 1 + (target - 1) / FINE_STEPS) {
            struct cutting cutting = {target, way == 1};
            uint64_t time = time_cutting(search, s, cutting, limit, &hopeless);
            if (time < limit) {
                best = cutting;
                c->time = limit = time;
            }
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

/* Puts a sequence's units into the list, as hstu_plan_count() counts them. */
static void put_sequence(const struct place *at, struct list *to, uint8_t *row_slices)
{
    const struct shape *s = &at->choice.shape;
    const struct cutting cutting = at->choice.cutting;
    for (uint32_t i = first_tile_of(s); i < s->tiles; i += s->unit_items) {
        struct neighbours n;
        hstu_plan_neighbours(s, i, cutting, &n);
        memset(row_slices + n.upper.row0, (int)upper_parts_of(&n), n.upper.rows);
        memset(row_slices + n.lower.row0, (int)parts_of(&n), n.lower.rows);
        for (uint32_t k = 0; k < parts_of(&n); k++) {
            struct part part = hstu_plan_part(s, &n, cutting, k);
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
    return s->rows ? UINT64_C(4) * (s->cached + s->rows) * s->heads * head_dim : 0;
}

/* Shares `count` sequences out, as many to a party as have so many bytes together, or one. */
static void share_out(struct parties *p, const struct place *places, uint32_t count,
                      uint32_t head_dim, uint64_t most_bytes)
{
    uint64_t bytes = 0;
    p->count = 0;
    p->first[0] = count;
    for (uint32_t b = count; b-- > 0;) {
        const uint64_t own = read_bytes(&places[b].choice.shape, head_dim);
        if (bytes && bytes + own > most_bytes) {
            p->first[++p->count] = b + 1;
            bytes = 0;
        }
        bytes += own;
    }
    p->first[++p->count] = 0;
}

static void count_party(const struct parties *p, uint32_t party, const struct place *places,
                        struct lengths *l)
{
    for (uint32_t b = p->first[party + 1]; b < p->first[party]; b++)
        hstu_plan_count(&places[b].choice.shape, places[b].choice.cutting, l);
    if (party + 1 == p->count)
        hstu_plan_count_single(l);
}

/* When the last worker ends, with units that are none longer than `longest`. */
static uint64_t finish_parties(const struct parties *p, const struct place *places,
                               uint32_t longest, struct search *search)
{
    struct timeline line;
    hstu_timeline_open(&line, search->workers, longest);
    for (uint32_t i = 0; i < p->count; i++) {
        count_party(p, i, places, &search->units);
        hstu_timeline_give(&line, &search->units, UINT64_MAX);
        hstu_plan_clear(&search->units);
    }
    return hstu_timeline_end(&line);
}

/* Chooses small parties that end about as soon as all sequences at once, which is what *p says and
 * what is counted. Nothing is counted afterwards. */
static void choose_parties(struct parties *p, const struct place *places, uint32_t head_dim,
                           struct search *search)
{
    const uint32_t count = p->first[0], longest = search->units.longest;
    const uint64_t end = finish(&search->units, search->workers, UINT64_MAX);
    hstu_plan_clear(&search->units);
    for (uint64_t bytes = PARTY_BYTES; bytes <= PARTY_BYTES_MOST; bytes *= 2) {
        share_out(p, places, count, head_dim, bytes);
        if (p->count == 1 || finish_parties(p, places, longest, search) <= end + end / PARTY_SLACK)
            return;
    }
    *p = (struct parties){.count = 1, .first = {count, 0}};
}

/* ---- a batch ---- */

/* Chooses how each sequence is cut. Returns the rows of all. */
static uint32_t place_sequences(const struct hstu_plan_args *args, struct search *search,
                                struct place *places)
{
    struct shape before = {.rows = 0},
                 shape = {.tile_rows = args->path->tile_rows(args->geometry->head_dim),
                          .key_step = args->path->key_step,
                          .unit_items = args->path->unit_items,
                          .group = args->group,
                          .heads = args->geometry->heads};
    const bool halves = may_halve(args->path, args->rows);
    uint32_t row = 0, page = 0;
    for (uint32_t b = 0; b < args->count; b++) {
        const struct hstu_sequence *s = &args->sequences[b];
        const uint32_t added = s->history - s->cached, rows = added + s->targets;
        struct place *at = &places[b];
        shape.cached = s->cached;
        shape.history = s->history;
        shape.rows = args->candidates_only && !s->targets ? 0 : rows;
        shape.from = args->candidates_only && shape.rows ? added : 0;
        shape.tiles = divide_up(shape.rows, shape.tile_rows);
        /* Identical shapes, the usual case in a benchmark, are planned once. */
        if (b > 0 && memcmp(&shape, &before, sizeof shape) == 0)
            at->choice = places[b - 1].choice;
        else if (shape.rows)
            at->choice = choose(&shape, halves, search);
        else
            at->choice = (struct choice){.shape = shape};
        before = shape;
        at->sequence = b;
        at->row_start = row;
        at->page_start = page;
        row += rows;
        page += hstu_pages_listed(s, args->geometry->page_tokens);
    }
    return row;
}

/* Where the units of each length go, behind those that have a place already. Returns how many there
 * are then. */
static uint32_t place_units(struct list *to, const struct lengths *l, uint32_t units)
{
    for (uint32_t length = l->longest; length > 0; length--) {
        to->place[length] = units;
        units += l->count[length];
    }
    return units;
}

bool hstu_plan(const struct hstu_plan_args *args, struct hstu_work *work, uint32_t capacity,
               uint8_t *row_slices, uint32_t *items)
{
    const uint32_t unit_items = args->path->unit_items, rows = args->rows;
    const uint32_t workers = hstu_workers(unit_items, args->sm_count);
    assert(args->count <= SKV_MAX_BATCH && args->max_slices >= 1 && args->group >= 1 &&
           workers <= MAX_WORKERS);
    struct place places[SKV_MAX_BATCH];
    struct search search = {.graph_rows = rows, .workers = workers, .max_slices = args->max_slices};
    const uint32_t own_rows = place_sequences(args, &search, places);
    assert(own_rows <= rows);

    struct lengths *l = &search.units;
    struct parties parties = {.count = 1, .first = {args->count, 0}};
    struct list to = {.work = work, .unit_items = unit_items};
    count_party(&parties, 0, places, l);
    if (place_units(&to, l, 0) * unit_items > capacity)
        return false;
    struct roster roster;
    hstu_roster_open(&roster, workers, l->longest);
    if (rows > PARTY_ROWS)
        choose_parties(&parties, places, args->geometry->head_dim, &search);
    if (args->candidates_only) /* rows of no tile */
        memset(row_slices, 0, own_rows);

    uint32_t units = 0;
    for (uint32_t i = 0; i < parties.count; i++) {
        if (l->longest == 0) /* one party's units are counted already, in a small graph */
            count_party(&parties, i, places, l);
        units = place_units(&to, l, units);
        for (uint32_t b = parties.first[i + 1]; b < parties.first[i]; b++)
            put_sequence(&places[b], &to, row_slices + places[b].row_start);
        if (i + 1 == parties.count)
            put_last_single(&to);
        if (unit_items == 2)
            hstu_roster_give(&roster, l, work);
        hstu_plan_clear(l);
    }
    memset(row_slices + own_rows, 0, rows - own_rows);
    *items = units * unit_items;
    return true;
}
