/* What the CPU does for a launch, without a GPU. The attention planner: items cover every row, head
 * and key once, neighbours share a unit, every unit is some pair of blocks' and the pairs end
 * together, and a sequence's items do not depend on its batch mates. The batch's rows: as the
 * definitions have them. */
#include "cuda_state.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

static uint32_t rows_64(uint32_t head_dim)
{
    (void)head_dim;
    return 64;
}

static uint32_t rows_128(uint32_t head_dim)
{
    (void)head_dim;
    return 128;
}

/* As the portable and the sm90 path want it. */
static const struct hstu_attention_path small_tiles = {
    .tile_rows = rows_64, .key_step = 64, .unit_items = 1};
static const struct hstu_attention_path large_tiles = {
    .tile_rows = rows_128, .key_step = 128, .unit_items = 2};
static const struct hstu_attention_path halved_tiles = {
    .tile_rows = rows_128, .key_step = 128, .unit_items = 2, .halved_rows = 2048};
static struct skv_geometry geometry = {.layers = 1, .heads = 4, .head_dim = 256, .page_tokens = 32};

enum { ROOM = 1 << 16, SMS = 132, PAIRS = SMS / 2, GROUP = 1 };
static struct hstu_work work[ROOM];
static uint8_t row_slices[65536];

static struct hstu_sequence sequence(uint32_t history, uint32_t cached, uint32_t targets)
{
    return (struct hstu_sequence){.history = history, .cached = cached, .targets = targets};
}

static uint32_t rows_of(const struct hstu_sequence *s)
{
    return s->history - s->cached + s->targets;
}

static struct hstu_plan_args plan_args(const struct hstu_attention_path *path,
                                       const struct hstu_sequence *sequences, uint32_t count,
                                       uint32_t rows)
{
    return (struct hstu_plan_args){.path = path,
                                   .geometry = &geometry,
                                   .group = GROUP,
                                   .rows = rows,
                                   .sm_count = SMS,
                                   .max_slices = hstu_plan_slices(rows),
                                   .sequences = sequences,
                                   .count = count};
}

static uint32_t plan(const struct hstu_attention_path *path, const struct hstu_sequence *sequences,
                     uint32_t count, uint32_t rows)
{
    const struct hstu_plan_args args = plan_args(path, sequences, count, rows);
    uint32_t items;
    cr_assert(hstu_plan(&args, work, ROOM, row_slices, &items));
    return items;
}

static uint32_t least(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

static uint32_t most(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}

/* Key tiles of `step` keys that cover [from, to). */
static uint32_t tiles_of(uint32_t from, uint32_t to, uint32_t step)
{
    return to > from ? (to - from + step - 1) / step : 0;
}

/* Tiles that attention_sm90_item.cuh's cut() makes of `rows` rows from an item's first on. */
struct tiles {
    uint32_t history, own;
};

static struct tiles cut(const struct hstu_work *w, uint32_t rows, uint32_t key1, uint32_t step)
{
    uint32_t first = w->cached + w->row0, h = w->history, candidate = first > h ? first - h : 0;
    uint32_t seen = least(least(h, first + rows), key1);
    uint32_t own = most(h + candidate / GROUP * GROUP, w->key0);
    return (struct tiles){tiles_of(w->key0, least(w->cached, seen), step) +
                              tiles_of(most(w->key0, w->cached), seen, step),
                          tiles_of(own, least(first + rows, key1), step)};
}

/* In half steps: of a tile of own keys a warpgroup multiplies half. */
static uint32_t length_of(struct tiles t)
{
    return most(1, 2 * t.history + t.own);
}

/* Are two items neighbours that see the same keys? */
static bool join(const struct hstu_work *a, const struct hstu_work *b)
{
    return (a->rows == 128 || a->rows == 64) && b->rows > 0 && a->sequence == b->sequence &&
           a->head == b->head && b->row0 == a->row0 + a->rows && a->key0 == b->key0 &&
           (a->key1 == b->key1 || (a->key1 < b->key1 && a->key1 == a->cached + a->row0 + a->rows));
}

/* The length of the unit of two items that begins at w. They share their tiles, as joins() there
 * says, where candidates' own keys do not add too many. */
static uint32_t unit_length(const struct hstu_work *w)
{
    struct tiles upper = cut(w, w->rows, w->key1, 128), lower = {0};
    if (w[1].rows)
        lower = cut(w + 1, w[1].rows, w[1].key1, 128);
    if (join(w, w + 1)) {
        struct tiles both = cut(w, w->rows + w[1].rows, w[1].key1, 128);
        if (upper.own == 0 || (both.own - lower.own) * 8 <= lower.history)
            return length_of(both);
    }
    return most(length_of(upper), length_of(lower));
}

/* The path's, or half of them, where no item of the sequence has more and the graph may. */
static uint32_t tile_rows_of(const struct hstu_attention_path *path, uint32_t items,
                             uint32_t sequence)
{
    uint32_t whole = path->tile_rows(256), largest = 0;
    for (uint32_t i = 0; i < items; i++)
        if (work[i].sequence == sequence)
            largest = most(largest, work[i].rows);
    return path->halved_rows && largest <= whole / 2 ? whole / 2 : whole;
}

/* The first row of a sequence's first tile: its first, or of the tile of the first candidate. */
static uint32_t planned_from(const struct hstu_plan_args *args, uint32_t items, uint32_t sequence)
{
    const struct hstu_sequence *s = &args->sequences[sequence];
    const uint32_t added = s->history - s->cached, tile_rows = args->path->tile_rows(256);
    uint32_t from = rows_of(s);
    for (uint32_t i = 0; i < items; i++)
        if (work[i].sequence == sequence && work[i].rows > 0)
            from = least(from, work[i].row0);
    if (!args->candidates_only)
        cr_assert_eq(from, 0);
    else if (s->targets == 0)
        cr_assert_eq(from, rows_of(s), "nobody wants anything of it");
    else if (args->path->halved_rows == 0)
        cr_assert_eq(from, added / tile_rows * tile_rows);
    else
        cr_assert(from <= added && added < from + tile_rows);
    return from;
}

/* Every (row, head) of a planned tile has its slices exactly once, and they partition [0, row's
 * tile end). */
static void check_cover_of(const struct hstu_plan_args *args)
{
    const struct hstu_attention_path *path = args->path;
    const struct hstu_sequence *sequences = args->sequences;
    const uint32_t count = args->count, rows = args->rows;
    uint32_t items, first = 0;
    uint32_t holes = 0;
    uint64_t covered = 0, wanted = 0;
    memset(row_slices, 0xff, rows);
    cr_assert(hstu_plan(args, work, ROOM, row_slices, &items));
    for (uint32_t b = 0; b < count; first += rows_of(&sequences[b++])) {
        const uint32_t from = planned_from(args, items, b);
        for (uint32_t r = 0; r < rows_of(&sequences[b]); r++) {
            cr_assert_eq(row_slices[first + r] > 0, r >= from);
            cr_assert_leq(row_slices[first + r], hstu_plan_slices(rows));
            wanted += (uint64_t)row_slices[first + r] * geometry.heads;
        }
    }
    for (; first < rows; first++)
        cr_assert_eq(row_slices[first], 0);
    for (uint32_t i = 0; i < items; i++) {
        const struct hstu_work *w = &work[i];
        const struct hstu_sequence *s = &sequences[w->sequence];
        uint32_t end = s->cached + w->row0 + w->rows, next = 0;
        if (w->rows == 0) { /* a hole: the second of a unit, and there is one at most */
            cr_assert(path->unit_items == 2 && i % 2 == 1 && holes++ == 0);
            continue;
        }
        covered += w->rows;
        uint32_t tile_rows = tile_rows_of(path, items, w->sequence);
        cr_assert(w->rows >= 1 && w->rows <= tile_rows);
        cr_assert_eq(w->row0 % tile_rows, 0);
        cr_assert(w->history == s->history && w->cached == s->cached);
        cr_assert_leq(w->row0 + w->rows, rows_of(s));
        cr_assert(w->key0 < w->key1 && w->key1 <= end);
        cr_assert(w->key0 % path->key_step == 0 ||
                  (path->unit_items == 2 && w->key0 == s->history));
        cr_assert(w->key1 <= s->history || w->key1 == end, "only the last slice passes h");
        cr_assert(w->key1 == end || w->key1 % path->key_step == 0 || w->key1 == s->history);
        /* The slice that begins where this one ends. */
        for (uint32_t k = 0; k < items && w->key1 != end; k++)
            if (work[k].sequence == w->sequence && work[k].head == w->head &&
                work[k].row0 == w->row0 && work[k].key0 == w->key1)
                next += work[k].slice == w->slice + 1;
        cr_assert_eq(next, w->key1 != end);
        cr_assert_eq(w->slice == 0, w->key0 == 0);
        for (uint32_t r = w->row_start + w->row0; r < w->row_start + w->row0 + w->rows; r++)
            cr_assert_eq(w->slices, row_slices[r]);
        cr_assert_eq(w->slice + 1 == w->slices, w->key1 == end);
    }
    cr_assert_eq(covered, wanted);
}

static void check_cover(const struct hstu_attention_path *path,
                        const struct hstu_sequence *sequences, uint32_t count, uint32_t rows)
{
    struct hstu_plan_args args = plan_args(path, sequences, count, rows);
    args.candidates_only = true;
    check_cover_of(&args);
    args.candidates_only = false;
    check_cover_of(&args);
}

Test(plan, items_cover_every_row_and_key_once)
{
    const struct hstu_sequence batches[][4] = {
        {{.history = 4096, .cached = 3968, .targets = 256}},
        {{.history = 4096, .targets = 256}},
        {{.history = 0, .targets = 5},
         {.history = 37, .targets = 0},
         {.history = 1111, .cached = 1111, .targets = 37},
         {.history = 65, .cached = 64, .targets = 1111}},
        {{.history = 1}, {.targets = 1}, {.history = 1, .cached = 1}, {.history = 64}},
        /* One twice with an empty one between, then as many rows of another history. */
        {{.history = 500, .cached = 400, .targets = 100},
         {.history = 700, .cached = 700},
         {.history = 500, .cached = 400, .targets = 100},
         {.history = 420, .cached = 400, .targets = 180}},
        /* Whole tiles beside halved ones, where there are some. */
        {{.history = 4096, .cached = 3968, .targets = 256}, {.history = 128, .targets = 256}},
    };
    for (size_t i = 0; i < sizeof batches / sizeof *batches; i++) {
        uint32_t rows = 0, count = 0;
        for (uint32_t b = 0; b < 4; b++) {
            rows += rows_of(&batches[i][b]);
            count += batches[i][b].history + batches[i][b].targets > 0 ? 1 : 0;
        }
        for (geometry.heads = 1; geometry.heads <= 4; geometry.heads++) {
            check_cover(&small_tiles, batches[i], count, (rows + 63) / 64 * 64);
            check_cover(&large_tiles, batches[i], count, (rows + 63) / 64 * 64);
            check_cover(&halved_tiles, batches[i], count, (rows + 63) / 64 * 64);
        }
    }
}

Test(plan, a_small_batch_fills_the_machine)
{
    struct hstu_sequence s = sequence(4096, 3968, 256);
    cr_assert_geq(plan(&large_tiles, &s, 1, 384), SMS * 3 / 4);
    cr_assert_geq(plan(&small_tiles, &s, 1, 384), SMS * 3 / 4);
}

Test(plan, a_small_batch_has_short_units)
{
    const struct hstu_sequence batches[] = {sequence(128, 0, 256), sequence(256, 0, 256),
                                            sequence(256, 128, 256), sequence(512, 384, 256)};
    for (uint32_t b = 0; b < sizeof batches / sizeof *batches; b++) {
        uint32_t items = plan(&large_tiles, &batches[b], 1, rows_of(&batches[b]));
        cr_assert_gt(items, 0);
        for (uint32_t u = 0; u < items; u += 2)
            cr_assert_leq(unit_length(&work[u]), 2, "batch %u", b);
    }
}

Test(plan, a_small_batch_of_short_histories_has_halved_tiles)
{
    static const uint32_t ends[] = {128, 256, 1024};
    for (uint32_t i = 0; i < sizeof ends / sizeof *ends; i++) {
        struct hstu_sequence s = sequence(ends[i], ends[i] - 128, 256);
        check_cover(&halved_tiles, &s, 1, 384);
        uint32_t items = plan(&halved_tiles, &s, 1, 384), rows[2] = {0};
        for (uint32_t k = 0; k < items; k++)
            rows[work[k].row0 / 64 % 2] += work[k].rows;
        cr_assert_gt(rows[1], 0);
        cr_assert_leq(items, hstu_plan_capacity(&halved_tiles, &geometry, 384, 1));
        cr_assert_gt(plan(&large_tiles, &s, 1, 384), 0);
        cr_assert_geq(items, SMS / 4, "%u: too few blocks work", ends[i]);
    }
}

Test(plan, tiles_are_halved_up_to_the_paths_rows)
{
    struct hstu_sequence s = sequence(256, 128, 256);
    for (uint32_t rows = 2048; rows <= 2176; rows += 128) {
        uint32_t items = plan(&halved_tiles, &s, 1, rows), halved = 0;
        cr_assert_gt(items, 0);
        for (uint32_t k = 0; k < items; k++)
            halved += work[k].row0 % 128 == 64;
        cr_assert_eq(halved > 0, rows == 2048);
    }
}

Test(plan, many_rows_of_a_short_history_have_one_slice)
{
    struct hstu_sequence s[8];
    for (uint32_t b = 0; b < 8; b++)
        s[b] = sequence(128, 0, 256);
    cr_assert_gt(plan(&large_tiles, s, 8, 3072), 0);
    for (uint32_t r = 0; r < 3072; r++)
        cr_assert_eq(row_slices[r], 1);
}

Test(plan, longest_units_come_first)
{
    struct hstu_sequence s[2] = {sequence(4096, 0, 256), sequence(300, 0, 10)};
    uint32_t items = plan(&small_tiles, s, 2, 5120), before = UINT32_MAX;
    for (uint32_t i = 0; i < items; i++) {
        uint32_t now = length_of(cut(&work[i], work[i].rows, work[i].key1, 64));
        cr_assert_leq(now, before);
        before = now;
    }
    items = plan(&large_tiles, s, 2, 5120);
    before = UINT32_MAX;
    for (uint32_t i = 0; i < items; i += 2) {
        uint32_t now = unit_length(&work[i]);
        cr_assert_leq(now, before);
        before = now;
    }
    items = plan(&halved_tiles, s + 1, 1, 384);
    before = UINT32_MAX;
    for (uint32_t i = 0; i < items; i += 2) {
        uint32_t now = unit_length(&work[i]);
        cr_assert_leq(now, before);
        before = now;
    }
}

/* So many sequences alike, whose units come so many sequences at a time, in a graph of their rows.
 */
static const struct {
    uint32_t batch, history, fresh, targets, together;
} parties[] = {
    {8, 4096, 4096, 256, 1},  {8, 2048, 2048, 256, 2}, {4, 8192, 8192, 0, 1},
    {18, 4096, 3072, 256, 1}, {2, 4096, 2048, 256, 1}, {2, 4096, 1920, 256, 2},
};

/* The last sequences first; in a party longest first. */
Test(plan, units_of_large_graphs_come_in_parties)
{
    for (size_t i = 0; i < sizeof parties / sizeof *parties; i++) {
        struct hstu_sequence s[SKV_MAX_BATCH];
        const uint32_t batch = parties[i].batch, history = parties[i].history;
        for (uint32_t b = 0; b < batch; b++)
            s[b] = sequence(history, history - parties[i].fresh, parties[i].targets);
        uint32_t items = plan(&large_tiles, s, batch, batch * rows_of(s));
        uint32_t party = 0, before = UINT32_MAX;
        cr_assert_gt(items, 0);
        for (uint32_t k = 0; k < items; k += 2) {
            const uint32_t now = unit_length(&work[k]);
            party += now > before;
            before = now;
            cr_assert_eq((batch - 1 - work[k].sequence) / parties[i].together, party,
                         "batch %u of %u: sequence %u in party %u", batch, history,
                         work[k].sequence, party);
        }
        cr_assert_eq(party, (batch - 1) / parties[i].together);
    }
}

/* Two parties, on either side of an empty sequence. With an odd number of tiles of three heads, the
 * first one's last item shares its unit with the other's first. */
Test(plan, parties_cover_every_row_and_key_once)
{
    struct hstu_sequence s[7];
    uint32_t rows = 0;
    for (uint32_t b = 0; b < 7; b++) {
        s[b] = b == 3 ? sequence(0, 0, 0) : sequence(b < 3 ? 3840 : 4096, 5 * b, 100);
        rows += rows_of(&s[b]);
    }
    rows = (rows + 255) / 256 * 256;
    for (geometry.heads = 3; geometry.heads <= 4; geometry.heads++) {
        check_cover(&small_tiles, s, 7, rows);
        check_cover(&large_tiles, s, 7, rows);
        uint32_t items = plan(&large_tiles, s, 7, rows), mixed = 0;
        for (uint32_t k = 0; k < items; k += 2)
            mixed += work[k].sequence > 3 && work[k + 1].sequence < 3;
        cr_assert_eq(mixed, geometry.heads == 3 ? 1 : 0);
    }
}

/* Batches with a name of their own, and how far above the pairs' mean the last of them may end. */
static const struct {
    uint32_t batch, history, fresh, heads;
    double allowed; /* of the mean */
} cells[] = {
    {1, 4096, 128, 4, 1.05},
    {2, 4096, 128, 4, 1.20},
    {4, 4096, 128, 4, 1.20},
    {8, 4096, 128, 4, 1.10},
    {1, 4096, 4096, 4, 1.10},
    {8, 1024, 1024, 4, 1.15},
    {8, 4096, 4096, 4, 1.05},
    {8, 4096, 128, 1, 1.25},
    {5, 4096, 128, 3, 1.20},
    /* Two in parties; in some the last one would end by a tenth later. */
    {8, 4096, 2048, 4, 1.10},
    {8, 2048, 2048, 4, 1.05},
    {8, 4096, 1024, 4, 1.10},
};
enum { CELLS = sizeof cells / sizeof *cells };

static uint32_t plan_cell(uint32_t i)
{
    struct hstu_sequence s[SKV_MAX_BATCH];
    geometry.heads = cells[i].heads;
    for (uint32_t b = 0; b < cells[i].batch; b++)
        s[b] = sequence(cells[i].history, cells[i].history - cells[i].fresh, 256);
    return plan(&large_tiles, s, cells[i].batch, cells[i].batch * (cells[i].fresh + 256));
}

/* Pair w begins with unit w and follows the links. A unit costs its length, and 1.4 half steps. */
Test(plan, every_unit_is_one_pairs_and_the_pairs_end_together)
{
    static uint8_t visits[ROOM];
    for (uint32_t i = 0; i < CELLS; i++) {
        uint32_t units = plan_cell(i) / 2;
        double sum = 0, last = 0;
        memset(visits, 0, sizeof visits);
        for (uint32_t pair = 0; pair < PAIRS && pair < units; pair++) {
            double end = 0;
            for (uint32_t u = pair; u != HSTU_WORK_LAST; u = work[u * 2].next) {
                cr_assert_lt(u, units);
                cr_assert_eq(visits[u]++, 0);
                end += unit_length(&work[u * 2]) + 1.4;
            }
            sum += end;
            last = end > last ? end : last;
        }
        for (uint32_t u = 0; u < units; u++)
            cr_assert_eq(visits[u], 1);
        cr_assert_leq(last, sum / PAIRS * cells[i].allowed,
                      "batch %u history %u new %u: %.1f, %.1f", cells[i].batch, cells[i].history,
                      cells[i].fresh, last, sum / PAIRS);
    }
}

/* Rows 256 i and on with rows 256 i + 128 and on, of a head, for as many slices as the first has.
 */
Test(plan, neighbours_share_a_unit)
{
    for (uint32_t i = 0; i < CELLS; i++) {
        uint32_t items = plan_cell(i), tiles = (cells[i].fresh + 256 + 127) / 128, joined = 0;
        for (uint32_t u = 0; u < items; u += 2) {
            joined += join(&work[u], &work[u + 1]);
            for (uint32_t k = u; k < u + 2; k++)
                if (work[k].rows && work[k].row0 % 256 == 0 && work[k].row0 / 128 + 1 < tiles)
                    cr_assert(k == u && join(&work[u], &work[u + 1]));
        }
        cr_assert_geq(joined, cells[i].batch * cells[i].heads * (tiles / 2));
    }
}

static int by_place(const void *a, const void *b)
{
    const struct hstu_work *x = a, *y = b;
    int order = (x->head > y->head) - (x->head < y->head);
    order = order ? order : (x->row0 > y->row0) - (x->row0 < y->row0);
    return order ? order : (x->slice > y->slice) - (x->slice < y->slice);
}

/* The items of sequence 0, in an order of their own. What comes after a unit is left out. */
static uint32_t items_of_first(const struct hstu_attention_path *path,
                               const struct hstu_sequence *sequences, uint32_t count, uint32_t rows,
                               struct hstu_work *out)
{
    uint32_t items = plan(path, sequences, count, rows), found = 0;
    for (uint32_t i = 0; i < items; i++)
        if (work[i].sequence == 0 && work[i].rows) {
            out[found] = work[i];
            out[found++].next = 0;
        }
    qsort(out, found, sizeof *out, by_place);
    return found;
}

static void check_mates(const struct hstu_sequence *a, uint32_t a_count,
                        const struct hstu_sequence *b, uint32_t b_count, uint32_t rows)
{
    static const struct hstu_attention_path *const paths[] = {&small_tiles, &large_tiles,
                                                              &halved_tiles};
    static struct hstu_work with_a[ROOM], with_b[ROOM];
    for (uint32_t i = 0; i < 3; i++)
        for (geometry.heads = 1; geometry.heads <= 4; geometry.heads++) {
            uint32_t items = items_of_first(paths[i], a, a_count, rows, with_a);
            cr_assert_gt(items, 0);
            cr_assert_eq(items_of_first(paths[i], b, b_count, rows, with_b), items);
            cr_assert_eq(memcmp(with_a, with_b, items * sizeof *with_a), 0);
            cr_assert_eq(items_of_first(paths[i], a, 1, rows, with_b), items);
            cr_assert_eq(memcmp(with_a, with_b, items * sizeof *with_a), 0);
        }
}

Test(plan, batch_mates_change_nothing)
{
    struct hstu_sequence a[3] = {sequence(2000, 1700, 100), sequence(64, 0, 64),
                                 sequence(500, 100, 7)};
    struct hstu_sequence b[3] = {sequence(2000, 1700, 100), sequence(4000, 3600, 30),
                                 sequence(3, 0, 0)};
    check_mates(a, 3, b, 3, 1024);
    /* Three parties beside one. */
    struct hstu_sequence c[3] = {sequence(4096, 2096, 256), sequence(4096, 1096, 256),
                                 sequence(4096, 1096, 256)};
    struct hstu_sequence d[2] = {sequence(4096, 2096, 256), sequence(100, 0, 3)};
    check_mates(c, 3, d, 2, 9216);
}

Test(plan, random_batches_fit_the_capacity)
{
    srand(7);
    for (int round = 0; round < 200; round++) {
        struct hstu_sequence s[SKV_MAX_BATCH];
        uint32_t count = 1 + (uint32_t)rand() % SKV_MAX_BATCH, rows = 0;
        for (uint32_t b = 0; b < count; b++) {
            uint32_t h = (uint32_t)rand() % 3000;
            s[b] = sequence(h, h ? (uint32_t)rand() % (h + 1) : 0, (uint32_t)rand() % 300);
            rows += rows_of(&s[b]);
        }
        if (!rows)
            continue;
        geometry.heads = 1 + (uint32_t)rand() % 8;
        const struct hstu_attention_path *path = round % 2 ? &small_tiles : &large_tiles;
        uint32_t items = plan(path, s, count, rows);
        cr_assert_gt(items, 0);
        cr_assert_leq(items, hstu_plan_capacity(path, &geometry, rows, count));
    }
}

/* Each is more than a party has room for. */
Test(plan, a_batch_of_as_many_parties_as_sequences_fits)
{
    struct hstu_sequence s[SKV_MAX_BATCH];
    for (uint32_t b = 0; b < SKV_MAX_BATCH; b++)
        s[b] = sequence(8192, 7936, 0);
    uint32_t items = plan(&large_tiles, s, SKV_MAX_BATCH, SKV_MAX_BATCH * 256);
    cr_assert_eq(items, SKV_MAX_BATCH * 2 * geometry.heads * row_slices[0]);
}

/* A head alone, whose few rows are cut as often as they may be. */
Test(plan, halved_tiles_fit_the_capacity)
{
    geometry.heads = 1;
    for (uint32_t rows = 256; rows <= 512; rows += 64) {
        struct hstu_sequence s = sequence(4096, 4352 - rows, 256);
        uint32_t items = plan(&halved_tiles, &s, 1, rows);
        cr_assert_gt(items, 0);
        cr_assert_leq(items, hstu_plan_capacity(&halved_tiles, &geometry, rows, 1));
    }
    /* The largest graph that may have them: every tile in as many slices as there are planes. */
    cr_assert_geq(hstu_plan_capacity(&halved_tiles, &geometry, 2048, 1),
                  2048 / 64 * hstu_plan_slices(2048));
}

/* The kernels count signed. */
Test(plan, a_group_beyond_all_candidates_is_one_group)
{
    const struct hstu_attention_args args = {.group = UINT32_MAX, .sm_count = SMS};
    cr_assert_eq(hstu_units_of(&args, NULL).group, INT32_MAX);
}

Test(plan, too_small_a_room_is_refused)
{
    struct hstu_sequence s = sequence(128, 0, 0);
    geometry.heads = 3;
    const struct hstu_plan_args small = plan_args(&small_tiles, &s, 1, 128);
    const struct hstu_plan_args large = plan_args(&large_tiles, &s, 1, 128);
    uint32_t items = 0;
    cr_assert_not(hstu_plan(&small, work, 5, row_slices, &items));
    cr_assert_not(hstu_plan(&large, work, 3, row_slices, &items));
    cr_assert_eq(items, 0);
    cr_assert(hstu_plan(&large, work, 4, row_slices, &items));
    cr_assert_eq(items, 4);
}

static void check_items(const struct hstu_layout *l, const struct hstu_work *items, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        cr_assert_eq(items[i].row_start, l->row_start[items[i].sequence]);
        cr_assert_eq(items[i].page_start, l->page_start[items[i].sequence]);
    }
}

/* Of the last layer: what is wanted has slices, and items of as many rows, all heads together. */
static void check_wanted(const struct hstu_cuda *c, const struct hstu_sequence *sequences,
                         uint32_t count)
{
    const struct hstu_cuda_pinned *p = &c->pinned;
    uint64_t item_rows = 0, slices = 0;
    cr_assert_eq(p->counts->every_row, c->every_row);
    for (uint32_t b = 0, row = 0; b < count; b++) {
        const struct hstu_sequence *s = &sequences[b];
        const uint32_t from = c->every_row ? 0 : s->history - s->cached;
        for (uint32_t i = 0; i < rows_of(s); i++, row++) {
            /* From the first candidate's tile on, of 64 rows. */
            cr_assert_eq(p->last_slices[row] > 0,
                         c->every_row || (s->targets > 0 && i >= from / 64 * 64));
            slices += p->last_slices[row];
            if (c->every_row)
                cr_assert_eq(p->last_slices[row], p->slices[row]);
        }
    }
    for (uint32_t i = 0; i < p->counts->layout.last_work; i++)
        item_rows += p->last_work[i].rows;
    cr_assert_eq(item_rows, slices * geometry.heads);
    uint64_t written = 0;
    for (uint32_t i = 0; i < HSTU_CUDA_PARTS; i++)
        if (c->written[i].at == (volatile char *)p->last_work)
            written = c->written[i].bytes;
    cr_assert_eq(written, p->counts->layout.last_work * sizeof *p->last_work);
}

/* Every row, by its definition, from what pull reads and by the function that pull calls. */
static void check_rows(const struct hstu_cuda *c, const struct hstu_sequence *sequences,
                       uint32_t count, uint32_t graph_rows)
{
    const uint32_t page_tokens = c->model.geometry.page_tokens;
    const uint32_t buckets = c->model.position_buckets;
    const struct hstu_cuda_pinned *p = &c->pinned;
    const struct hstu_layout *l = &p->counts->layout;
    uint32_t row = 0;
    cr_assert_eq(l->batch, count);
    for (uint32_t b = 0; b < count; b++) {
        const struct hstu_sequence *s = &sequences[b];
        cr_assert_eq(l->row_start[b], row);
        for (uint32_t t = 0; t < s->cached; t += page_tokens)
            cr_assert_eq(p->page[l->page_start[b] + t / page_tokens], s->pages[t / page_tokens]);
        for (uint32_t i = 0; i < rows_of(s); i++, row++) {
            const uint32_t token = s->cached + i;
            struct hstu_place place = hstu_place_row(l, row, page_tokens, buckets);
            cr_assert_eq(p->token[row], s->tokens[i]);
            cr_assert_geq(p->slices[row], 1);
            cr_assert_eq(place.sequence, b);
            cr_assert_eq(place.position, hstu_position(i, s->cached, s->history, buckets));
            if (s->append && token < s->history) {
                cr_assert_lt(place.page, l->pages);
                cr_assert_eq(p->page[place.page], s->pages[token / page_tokens]);
                cr_assert_eq(place.slot, token % page_tokens);
            } else
                cr_assert_eq(place.page, UINT32_MAX);
        }
    }
    check_items(l, p->work, l->work);
    check_items(l, p->last_work, l->last_work);
    for (; row < graph_rows; row++) {
        cr_assert_eq(hstu_place_row(l, row, page_tokens, buckets).sequence, UINT32_MAX);
        cr_assert(p->slices[row] == 0 && p->last_slices[row] == 0);
    }
    check_wanted(c, sequences, count);
}

enum { BATCH_ROWS = 8192 };

/* A runner as far as hstu_cuda_batch() looks at it. */
static struct hstu_cuda runner(void)
{
    static struct hstu_counts counts;
    static uint64_t tokens[BATCH_ROWS];
    static uint8_t slices[BATCH_ROWS], last_slices[BATCH_ROWS];
    static uint32_t pages[BATCH_ROWS];
    static struct hstu_work planned[ROOM], last_work[ROOM];
    return (struct hstu_cuda){.model = {.geometry = geometry, .group = 1, .position_buckets = 1024},
                              .path = &small_tiles,
                              .sm_count = SMS,
                              .max_rows = BATCH_ROWS,
                              .max_batch = SKV_MAX_BATCH,
                              .pool = pages, /* only asked whether there is one */
                              .pool_pages = UINT32_MAX / 64,
                              .page_capacity = BATCH_ROWS,
                              .work_capacity = ROOM,
                              .plan_work = planned,
                              .plan_slices = row_slices,
                              .pinned = {.counts = &counts,
                                         .token = tokens,
                                         .slices = slices,
                                         .last_slices = last_slices,
                                         .page = pages,
                                         .work = work,
                                         .last_work = last_work}};
}

Test(batch, rows_are_as_defined)
{
    enum { TOKENS = 2048 };
    static uint64_t tokens[SKV_MAX_BATCH][TOKENS];
    static uint32_t pages[SKV_MAX_BATCH][TOKENS / 16];
    srand(11);
    struct hstu_cuda c = runner();
    uint32_t checked = 0;
    for (int round = 0; round < 300; round++) {
        c.model.geometry.page_tokens = 16u << rand() % 4;
        c.every_row = round % 5 == 0;
        c.model.position_buckets = round % 3 ? 1024 : 100; /* fewer than a history: clamped */
        /* Few sequences with many rows, or all that there can be; every fourth without rows. */
        uint32_t count = round % 10 ? 1 + (uint32_t)rand() % 6 : SKV_MAX_BATCH, graph_rows;
        uint32_t most = count > 6 ? 64 : 1024;
        struct hstu_sequence s[SKV_MAX_BATCH];
        for (uint32_t b = 0; b < count; b++) {
            uint32_t history = (uint32_t)rand() % most;
            s[b] = sequence(history, (uint32_t)rand() % (history + 1), (uint32_t)rand() % 64);
            if (rand() % 4 == 0)
                s[b] = sequence(history, history, 0);
            s[b].append = rand() % 2;
            s[b].tokens = tokens[b];
            s[b].pages = pages[b];
            for (uint32_t i = 0; i < TOKENS; i++)
                tokens[b][i] = (uint64_t)rand() << 32 | (uint64_t)rand();
            for (uint32_t i = 0; i < TOKENS / 16; i++)
                pages[b][i] = (uint32_t)rand() % (UINT32_MAX / 128);
        }
        cr_assert_eq(hstu_cuda_batch(&c, s, count, &graph_rows), SKV_OK);
        if (c.rows)
            check_rows(&c, s, count, graph_rows);
        checked += c.rows;
    }
    cr_assert_gt(checked, 100000);
}

Test(batch, pages_that_are_appended_to_need_room)
{
    static const uint32_t pages[4];
    static const uint64_t tokens[128];
    struct hstu_cuda c = runner();
    struct hstu_sequence s = sequence(97, 32, 0); /* a page cached, four with what is appended */
    uint32_t graph_rows;
    s.pages = pages;
    s.tokens = tokens;
    s.append = true;
    c.page_capacity = 4;
    cr_assert_eq(hstu_cuda_batch(&c, &s, 1, &graph_rows), SKV_OK);
    cr_assert_eq(c.pinned.counts->layout.pages, 4);
    c.page_capacity = 3;
    cr_assert_eq(hstu_cuda_batch(&c, &s, 1, &graph_rows), SKV_EINVAL);
    s.append = false;
    cr_assert_eq(hstu_cuda_batch(&c, &s, 1, &graph_rows), SKV_OK);
    cr_assert_eq(c.pinned.counts->layout.pages, 1);
}

/* Whole rounds over the block, and some lines more. */
Test(batch, taking_lines_back_changes_none)
{
    static uint64_t tokens[4096];
    static uint32_t pages[128];
    static struct hstu_work work_before[ROOM];
    struct hstu_cuda c = runner();
    struct hstu_sequence s[2] = {sequence(2048, 1000, 100), sequence(300, 0, 7)};
    uint32_t graph_rows;
    for (uint32_t i = 0; i < 4096; i++)
        tokens[i] = i * UINT64_C(0x9e3779b97f4a7c15);
    for (uint32_t b = 0; b < 2; b++) {
        s[b].tokens = tokens;
        s[b].pages = pages;
    }
    hstu_cuda_reclaim(&c); /* before the first launch there is nothing */
    for (uint32_t count = 2; count > 0; count--) {
        cr_assert_eq(hstu_cuda_batch(&c, s, count, &graph_rows), SKV_OK);
        const struct hstu_counts counts_before = *c.pinned.counts;
        memcpy(work_before, work, sizeof work);
        uint64_t lines = 0;
        for (uint32_t i = 0; i < HSTU_CUDA_PARTS; i++)
            lines += c.written[i].bytes / HSTU_CUDA_LINE;
        for (uint64_t i = 0; i < lines; i++)
            hstu_cuda_reclaim(&c);
        cr_assert_eq(memcmp(c.pinned.counts, &counts_before, sizeof counts_before), 0);
        cr_assert_eq(memcmp(work, work_before, sizeof work), 0);
        check_rows(&c, s, count, graph_rows);
    }
}
