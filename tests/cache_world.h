/* A simulated world around the cache core, for its tests: a pool and a store whose slots hold tags,
 * a mover that copies, fails and reports when the test says so, and what everybody may expect.
 *
 * A *tag* names a token together with all tokens before it, so that a slot can be judged by itself:
 * it is right for a request exactly if it holds the request's own tag of that position. Workers
 * write tags through the pages of their grants, onboards copy them out of the simulated store. A
 * stale, foreign or torn page is a wrong tag.
 *
 * Everything is driven from outside, one step at a time; whatever is left undone is late. */
#ifndef SKV_CACHE_WORLD_H
#define SKV_CACHE_WORLD_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cache.h"
#include "hash.h"

static int *failed_line;    /* of the tests; where a parent process looks for it */
static char failed_at[128]; /* what was going on */

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: not so: %s %s\n", __FILE__, __LINE__, #condition, failed_at);  \
            if (failed_line)                                                                       \
                *failed_line = __LINE__;                                                           \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

#define S            16u /* tokens a page */
#define WORLD_PAGES  8u  /* of a history, at most */
#define WORLD_TOKENS (S * WORLD_PAGES)
#define WORLD_USERS  6u  /* the last one is the first one's namesake in another model */
#define WORLD_POOL   64u /* pages of the pool, at most */
#define WORLD_LAYERS 2u
#define WORLD_JOBS   32u /* onboards at one time, at most */
#define WORLD_MOVES  24u /* of an onboard, at most */
#define WORLD_QUEUE  64u /* writes or events that wait at one time, at most */

typedef uint64_t tag;

struct stored_page {
    bool present, damaged;
    uint32_t valid;
    uint64_t generation, hash;
    tag tags[S];
};

struct stored_user {
    uint32_t tokens; /* 0: not there */
    uint64_t generation, hash_full, hash_tail, last_use_s;
    uint64_t hashes[WORLD_PAGES];
    struct stored_page pages[WORLD_PAGES];
};

struct sim_user {
    struct skv_id model, id;
    uint64_t tokens[WORLD_TOKENS]; /* its true history, as its clients know it */
    uint32_t length;
    tag committed[WORLD_TOKENS]; /* what the cache promised to have */
    uint32_t count;
    tag stored[WORLD_TOKENS]; /* what the cache said is stored */
    uint32_t stored_count;
    uint64_t generation;   /* seen last */
    uint64_t forgotten_by; /* change whose end must find it gone from the store, or 0 */
    uint64_t forgotten_generation;
    uint64_t gone_below; /* no page of this generation or an older one may be stored any more */
    uint64_t untold;     /* there was no memory to tell the store of this generation */
};

struct sim_onboard {
    struct skv_onboard *job; /* NULL: free */
    uint64_t id;
    bool located, failed, cancelled, orphaned, finished;
    int32_t status;
    uint32_t copied;                       /* moves */
    struct stored_page pages[WORLD_MOVES]; /* of the snapshot */
};

struct sim_write { /* in the writer's queue */
    struct skv_offload *offload;
    struct skv_change *change;
    bool copied;
    tag expected[WORLD_PAGES][S];
};

struct world {
    struct skv_cache *cache;
    struct skv_cache_options options;
    struct wire_table *table;
    tag pool[WORLD_POOL][S];
    uint64_t
        filled_by[WORLD_POOL]; /* serial of the session whose worker filled it; 0: an onboard */
    struct sim_user users[WORLD_USERS];
    struct stored_user store[WORLD_USERS];
    struct sim_onboard onboards[WORLD_JOBS];
    struct sim_write writes[WORLD_QUEUE];
    uint32_t write_first, write_count;
    struct skv_mover_event copy_events[WORLD_QUEUE], write_events[WORLD_QUEUE];
    tag written[WORLD_QUEUE][WORLD_TOKENS]; /* beside write_events: what an offload stored */
    uint32_t copy_first, copy_count, write_event_first, write_event_count;
    uint64_t now_ms, clock_s, dropped_tokens, load_failures;
    bool damaged;    /* a stored page was damaged on purpose */
    bool unreadable; /* the store: no page can be read now */
    bool starved;    /* no memory for a change that an event or a restart asks for */
    bool early;      /* the cache is: some of the store's users are not known to it yet */
    bool trace;
    /* hooks of whoever plays the workers */
    void (*on_fence)(uint32_t session);
    void (*on_row)(uint32_t session, uint32_t row);
    bool (*is_touched)(uint32_t page); /* by a pass that runs right now */
};

static struct world world;

/* ---- memory ---- */

static uint32_t starvations = UINT32_MAX; /* allocations that failed; UINT32_MAX: none does */

/* Every program that includes this is linked with --wrap=calloc. */
void *__real_calloc(size_t count, size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes)
{
    if (starvations == UINT32_MAX)
        return __real_calloc(count, bytes);
    starvations++;
    return NULL;
}

static inline void starve(void)
{
    if (world.starved)
        starvations = 0;
}

/* Did something fail since? */
static inline bool starve_end(void)
{
    bool failed = starvations && starvations != UINT32_MAX;
    starvations = UINT32_MAX;
    return failed;
}

/* ---- tags ---- */

static inline uint64_t mix64(uint64_t x)
{
    x = (x ^ (x >> 31)) * UINT64_C(0x7fb5d329728ea185);
    x = (x ^ (x >> 27)) * UINT64_C(0x81dadef4bc2dd44d);
    return x ^ (x >> 33);
}

static inline void make_tags(const struct sim_user *user, const uint64_t *tokens, uint32_t count,
                             tag *tags)
{
    tag last = mix64(user->model.lo * 31 + user->id.lo + 7);
    for (uint32_t i = 0; i < count; i++)
        tags[i] = last = mix64(last ^ mix64(tokens[i] + 1));
}

static inline uint32_t pages_for(uint32_t tokens)
{
    return (tokens + S - 1) / S;
}

static inline uint32_t record_of(uint32_t user)
{
    return skv_cache_find(world.cache, world.users[user].model, world.users[user].id);
}

static inline uint32_t user_of(struct skv_id model, struct skv_id id)
{
    for (uint32_t i = 0; i < WORLD_USERS; i++)
        if (skv_id_equal(world.users[i].model, model) && skv_id_equal(world.users[i].id, id))
            return i;
    CHECK(!"an unknown user");
    return 0;
}

static inline struct skv_user_info info_of(uint32_t user)
{
    struct skv_user_info info = {0};
    uint32_t record = record_of(user);
    if (record != SKV_NONE)
        skv_cache_info(world.cache, record, &info);
    return info;
}

static inline struct skv_stats stats_now(void)
{
    struct skv_stats stats;
    skv_cache_stats(world.cache, &stats);
    return stats;
}

/* ---- the simulated store ---- */

static inline void remove_past(struct stored_user *stored, uint32_t tokens)
{
    for (uint32_t i = pages_for(tokens); i < WORLD_PAGES; i++)
        stored->pages[i].present = false;
}

/* Whatever was written, the store holds a valid history of somebody. */
static inline void check_stored(const struct stored_user *stored)
{
    if (!stored->tokens)
        return;
    CHECK(stored->tokens <= WORLD_TOKENS);
    for (uint32_t i = 0; i < pages_for(stored->tokens); i++) {
        const struct stored_page *page = &stored->pages[i];
        uint32_t left = stored->tokens - i * S;
        if (page->damaged)
            return;
        CHECK(page->present && page->hash == stored->hashes[i]);
        CHECK(page->valid == (left < S ? left : S));
        CHECK(page->generation <= stored->generation);
    }
    CHECK(stored->hash_tail == stored->hashes[pages_for(stored->tokens) - 1]);
    CHECK(stored->tokens < S || stored->hash_full == stored->hashes[stored->tokens / S - 1]);
}

static inline void put_record(struct stored_user *stored, const struct skv_record *record,
                              uint32_t tokens, const uint64_t *hashes)
{
    stored->tokens = tokens;
    stored->generation = record->generation;
    stored->last_use_s = record->last_use_s;
    if (tokens)
        memcpy(stored->hashes, hashes, pages_for(tokens) * sizeof *hashes);
    stored->hash_full = tokens == record->tokens ? record->hash_full
                        : tokens                 ? hashes[tokens / S - 1]
                                                 : 0;
    stored->hash_tail = tokens == record->tokens ? record->hash_tail : stored->hash_full;
    remove_past(stored, tokens);
}

/* Writes an offload's pages, `limit` at most; the record follows them. */
static inline void put_pages(const struct sim_write *write, uint32_t limit)
{
    const struct skv_offload *job = write->offload;
    uint32_t user = user_of(job->record.model, job->record.user);
    struct stored_user *stored = &world.store[user];
    CHECK(job->record.generation > world.users[user].gone_below);
    for (uint32_t i = 0; i < job->move_count && i < limit; i++) {
        const struct skv_move *move = &job->moves[i];
        struct stored_page *page = &stored->pages[move->index];
        *page = (struct stored_page){.present = true,
                                     .valid = move->valid,
                                     .generation = move->generation,
                                     .hash = move->hash};
        memcpy(page->tags, write->expected[i], move->valid * sizeof(tag));
    }
    uint32_t tokens =
        limit >= job->move_count ? job->record.tokens : (job->moves[limit - 1].index + 1) * S;
    put_record(stored, &job->record, tokens, job->hashes);
    check_stored(stored);
}

/* What a look-up of a user's record gives; false: not there. */
static inline bool look_up(uint32_t user, struct skv_known *known, uint64_t *hashes)
{
    const struct stored_user *stored = &world.store[user];
    if (!stored->tokens)
        return false;
    memcpy(hashes, stored->hashes, sizeof stored->hashes);
    known->count = pages_for(stored->tokens);
    known->hashes = hashes;
    known->record = (struct skv_record){.model = world.users[user].model,
                                        .user = world.users[user].id,
                                        .generation = stored->generation,
                                        .hash_full = stored->hash_full,
                                        .hash_tail = stored->hash_tail,
                                        .tokens = stored->tokens};
    return true;
}

/* ---- the simulated mover ---- */

static inline void copy_event(struct skv_mover_event event)
{
    CHECK(world.copy_count < WORLD_QUEUE);
    world.copy_events[(world.copy_first + world.copy_count++) % WORLD_QUEUE] = event;
}

static inline void write_event(struct skv_mover_event event, const struct sim_write *write)
{
    CHECK(world.write_event_count < WORLD_QUEUE);
    uint32_t slot = (world.write_event_first + world.write_event_count++) % WORLD_QUEUE;
    world.write_events[slot] = event;
    memcpy(world.written[slot], write->expected, sizeof write->expected);
}

static inline struct sim_write *push_write(void)
{
    CHECK(world.write_count < WORLD_QUEUE);
    struct sim_write *write =
        &world.writes[(world.write_first + world.write_count++) % WORLD_QUEUE];
    *write = (struct sim_write){0};
    return write;
}

/* Jobs handed in before this cancel that rely on the cancelled one keep their gates shut. */
static inline void orphan(uint64_t id)
{
    for (uint32_t i = 0; i < WORLD_JOBS; i++)
        if (world.onboards[i].job && world.onboards[i].job->after >= id)
            world.onboards[i].orphaned = true;
}

static inline void take_actions(void)
{
    struct skv_action action;
    while (skv_cache_action(world.cache, &action)) {
        struct sim_onboard *free_one = NULL;
        switch (action.kind) {
        case SKV_ACTION_ONBOARD:
            for (uint32_t i = 0; i < WORLD_JOBS && !free_one; i++)
                free_one = world.onboards[i].job ? NULL : &world.onboards[i];
            CHECK(free_one);
            *free_one = (struct sim_onboard){.job = action.job};
            free_one->id = free_one->job->id;
            for (uint32_t i = 0; i < WORLD_JOBS; i++)
                CHECK(!world.onboards[i].job || &world.onboards[i] == free_one ||
                      world.onboards[i].id < free_one->id);
            CHECK(free_one->job->after < free_one->id);
            break;
        case SKV_ACTION_CANCEL:
            for (uint32_t i = 0; i < WORLD_JOBS; i++) {
                struct sim_onboard *onboard = &world.onboards[i];
                if (onboard->job && onboard->id == action.id && !onboard->finished) {
                    onboard->cancelled = true;
                    onboard->status = action.status;
                    orphan(action.id);
                }
            }
            break;
        case SKV_ACTION_CHANGE:
            push_write()->change = action.job;
            break;
        case SKV_ACTION_FENCE:
            if (world.on_fence)
                world.on_fence(action.session);
            break;
        case SKV_ACTION_ROW:
            if (world.on_row)
                world.on_row(action.session, action.row);
            break;
        case SKV_ACTION_VIEWS:
            break; /* its worker looks at the list when it likes to */
        }
    }
}

static inline void finish_onboard(struct sim_onboard *onboard, enum skv_mover_event_kind kind)
{
    uint32_t *row = onboard->job->gate_row;
    if (row && onboard->cancelled)
        row[WORLD_LAYERS] = (uint32_t)onboard->status;
    for (uint32_t layer = 0; row && layer < WORLD_LAYERS; layer++)
        row[layer] = 1;
    onboard->finished = true;
    copy_event((struct skv_mover_event){.kind = kind, .job = onboard->job});
}

/* Finds and checks a job's pages: a snapshot of the store. */
static inline void locate(struct sim_onboard *onboard)
{
    const struct skv_onboard *job = onboard->job;
    CHECK(job->move_count <= WORLD_MOVES);
    for (uint32_t i = 0; i < job->move_count; i++) {
        const struct skv_move *move = &job->moves[i];
        const struct skv_record *record = &job->users[move->user];
        const struct stored_page *page =
            &world.store[user_of(record->model, record->user)].pages[move->index];
        CHECK(move->user < job->user_count && move->index < WORLD_PAGES);
        if (world.unreadable || !page->present || page->damaged || page->valid != move->valid ||
            page->hash != move->hash || page->generation > move->generation) {
            onboard->failed = true;
            copy_event((struct skv_mover_event){.kind = SKV_MOVER_FAILED,
                                                .job = onboard->job,
                                                .status = world.unreadable ? SKV_EIO : SKV_ECORRUPT,
                                                .user = move->user,
                                                .index = move->index});
            return;
        }
        onboard->pages[i] = *page;
    }
    onboard->located = true;
}

/* May its gates open: has every job up to `after` made its copies? */
static inline bool may_open(const struct sim_onboard *onboard)
{
    for (uint32_t i = 0; i < WORLD_JOBS; i++) {
        const struct sim_onboard *other = &world.onboards[i];
        if (other->job && other != onboard && !other->finished &&
            other->id <= onboard->job->after &&
            (!other->located || other->copied < other->job->move_count))
            return false;
    }
    return !onboard->orphaned;
}

/* One step of an onboard; false: there is nothing it could do. */
static inline bool onboard_step(struct sim_onboard *onboard)
{
    if (!onboard->job || onboard->finished)
        return false;
    if (onboard->cancelled) {
        finish_onboard(onboard, SKV_MOVER_CANCELLED);
        return true;
    }
    if (onboard->failed)
        return false;
    if (!onboard->located) {
        locate(onboard);
        return true;
    }
    if (onboard->copied < onboard->job->move_count) {
        const struct skv_move *move = &onboard->job->moves[onboard->copied];
        CHECK(move->page < world.options.pages);
        CHECK(!world.is_touched || !world.is_touched(move->page));
        memcpy(world.pool[move->page], onboard->pages[onboard->copied].tags, sizeof(tag) * S);
        world.filled_by[move->page] = 0;
        onboard->copied++;
        return true;
    }
    if (onboard->job->gate_row && !may_open(onboard))
        return false;
    finish_onboard(onboard, SKV_MOVER_ONBOARDED);
    return true;
}

/* Asks for an offload; false: none is due. What it is to store must be there. */
static inline bool offload_begin(uint32_t max_pages, bool stop)
{
    struct skv_offload *job = skv_cache_next_offload(world.cache, max_pages, stop);
    if (!job)
        return false;
    uint32_t index = user_of(job->record.model, job->record.user);
    const struct sim_user *user = &world.users[index];
    const struct skv_user_info info = info_of(index);
    CHECK(job->move_count && job->move_count <= max_pages);
    CHECK(job->record.tokens > info.stored && job->record.tokens <= info.resident);
    CHECK(job->moves[0].index == info.stored / S);
    CHECK(job->moves[job->move_count - 1].index == (job->record.tokens - 1) / S);
    CHECK(job->record.generation == info.generation);
    struct sim_write *write = push_write();
    write->offload = job;
    for (uint32_t i = 0; i < job->move_count; i++) {
        const struct skv_move *move = &job->moves[i];
        CHECK(move->index == job->moves[0].index + i);
        CHECK(memcmp(world.pool[move->page], user->committed + move->index * S,
                     move->valid * sizeof(tag)) == 0);
        memcpy(write->expected[i], world.pool[move->page], move->valid * sizeof(tag));
    }
    return true;
}

/* The i-th write's pages are read out of the pool; false: nothing to copy. */
static inline bool offload_copy(uint32_t i)
{
    struct sim_write *write = &world.writes[(world.write_first + i) % WORLD_QUEUE];
    if (i >= world.write_count || !write->offload || write->copied)
        return false;
    for (uint32_t m = 0; m < write->offload->move_count; m++)
        CHECK(memcmp(world.pool[write->offload->moves[m].page], write->expected[m],
                     write->offload->moves[m].valid * sizeof(tag)) == 0);
    write->copied = true;
    copy_event((struct skv_mover_event){.kind = SKV_MOVER_COPIED, .job = write->offload});
    return true;
}

/* The writer takes its next job. `status`: an error to meet; of an offload `pages` pages are stored
 * before; SKV_ESTALE: it looks whether the job was dropped. */
static inline bool write_step(int32_t status, uint32_t pages)
{
    struct sim_write *write = &world.writes[world.write_first];
    if (!world.write_count || (write->offload && !write->copied))
        return false;
    if (write->change && status && status != SKV_ESTALE)
        return true; /* it is owed: made before all else, and the core waits for it */
    world.write_first = (world.write_first + 1) % WORLD_QUEUE;
    world.write_count--;
    if (write->change) {
        struct skv_change *change = write->change;
        struct stored_user *stored =
            &world.store[user_of(change->record.model, change->record.user)];
        put_record(stored, &change->record, change->record.tokens, change->hashes);
        check_stored(stored);
        write_event((struct skv_mover_event){.kind = SKV_MOVER_CHANGED, .job = change}, write);
        return true;
    }
    if (status == SKV_ESTALE && !write->offload->drop)
        status = 0;
    if (!status)
        put_pages(write, write->offload->move_count);
    else if (status != SKV_ESTALE && pages && pages < write->offload->move_count)
        put_pages(write, write->offload->stored_moves = pages);
    write_event(
        (struct skv_mover_event){.kind = SKV_MOVER_STORED, .job = write->offload, .status = status},
        write);
    return true;
}

static inline void forget_onboard(const struct skv_onboard *job)
{
    for (uint32_t i = 0; i < WORLD_JOBS; i++)
        if (world.onboards[i].job == job)
            world.onboards[i].job = NULL;
}

static inline void on_stored(struct skv_offload *job, int32_t status, const tag *tags)
{
    uint32_t index = user_of(job->record.model, job->record.user), first = job->moves[0].index * S;
    struct sim_user *user = &world.users[index];
    struct skv_record record = job->record;
    struct skv_user_info before = info_of(index);
    uint32_t stored = status ? before.stored : record.tokens;
    if (status && job->stored_moves)
        stored = (job->moves[job->stored_moves - 1].index + 1) * S;
    starve();
    skv_cache_stored(world.cache, job, status);
    struct skv_user_info after = info_of(index);
    if (starve_end())
        user->untold = after.generation;
    if (before.generation != record.generation || after.generation != record.generation) {
        if (after.stored > before.stored) { /* cut meanwhile, and it waited for the outcome */
            memcpy(user->stored + first, tags, (after.stored - first) * sizeof(tag));
            user->stored_count = after.stored;
        }
        return;
    }
    CHECK(after.stored >= before.stored && after.stored == stored);
    if (stored > before.stored)
        memcpy(user->stored + first, tags, (stored - first) * sizeof(tag));
    user->stored_count = after.stored;
}

static inline void on_changed(struct skv_change *change)
{
    uint32_t index = user_of(change->record.model, change->record.user);
    struct sim_user *user = &world.users[index];
    if (user->forgotten_by == change->id) {
        user->forgotten_by = 0; /* acknowledged: nothing older may be there, nor come back */
        user->gone_below = user->forgotten_generation;
        CHECK(!world.store[index].tokens || world.store[index].generation > user->gone_below);
    }
    if (user->untold == change->record.generation)
        user->untold = 0;
    skv_cache_changed(world.cache, change);
    free(change);
}

/* The loop takes the mover's oldest event, the copy thread's first; false: there is none. */
static inline bool take_event(void)
{
    bool writer = !world.copy_count;
    uint32_t *first = writer ? &world.write_event_first : &world.copy_first;
    uint32_t *count = writer ? &world.write_event_count : &world.copy_count;
    if (!*count)
        return false;
    const tag *tags = world.written[*first];
    struct skv_mover_event event = (writer ? world.write_events : world.copy_events)[*first];
    *first = (*first + 1) % WORLD_QUEUE;
    --*count;
    switch (event.kind) {
    case SKV_MOVER_ONBOARDED:
    case SKV_MOVER_CANCELLED:
        forget_onboard(event.job);
        if (event.kind == SKV_MOVER_ONBOARDED)
            skv_cache_onboarded(world.cache, event.job);
        else
            skv_cache_cancelled(world.cache, event.job);
        break;
    case SKV_MOVER_FAILED:
        world.load_failures++;
        skv_cache_load_failed(world.cache, event.job, event.user, event.index, event.status);
        break;
    case SKV_MOVER_COPIED:
        skv_cache_copied(world.cache, event.job);
        break;
    case SKV_MOVER_STORED:
        on_stored(event.job, event.status, tags);
        break;
    case SKV_MOVER_CHANGED:
        on_changed(event.job);
        break;
    default:
        CHECK(!"an event that this mover does not make");
    }
    take_actions();
    return true;
}

/* The mover does all that it can, and the loop hears of it. */
static inline void settle_mover(void)
{
    for (bool any = true; any;) {
        any = false;
        for (uint32_t i = 0; i < WORLD_JOBS; i++)
            while (onboard_step(&world.onboards[i]))
                any = true;
        for (uint32_t i = 0; i < world.write_count; i++)
            any = offload_copy(i) || any;
        while (write_step(SKV_ESTALE, 0))
            any = true;
        while (take_event())
            any = true;
    }
}

/* ---- opening and closing ---- */

static inline void world_cache_open(uint64_t generation)
{
    size_t bytes = sizeof *world.table + world.options.pages * sizeof *world.table->entries;
    memset(world.table, 0, bytes);
    world.options.table = world.table;
    world.options.generation = generation;
    CHECK(skv_cache_open(&world.options, &world.cache) == 0);
    skv_cache_time(world.cache, world.now_ms, (uint32_t)world.clock_s);
    memset(world.pool, 0xee, sizeof world.pool);
}

static inline void world_open(struct skv_cache_options options)
{
    struct wire_table *table = world.table;
    memset(&world, 0, sizeof world);
    options.geometry =
        (struct skv_geometry){.layers = WORLD_LAYERS, .heads = 1, .head_dim = 64, .page_tokens = S};
    world.options = options;
    CHECK(options.pages <= WORLD_POOL);
    if (!table)
        table = calloc(1, sizeof *table + WORLD_POOL * sizeof *table->entries);
    world.table = table;
    world.now_ms = 1000;
    world.clock_s = 1700000000;
    for (uint32_t i = 0; i < WORLD_USERS; i++) {
        world.users[i].model.lo = i + 1 == WORLD_USERS ? 78 : 77;
        world.users[i].id = skv_user_integer(i + 1 == WORLD_USERS ? 1 : i + 1);
    }
    world_cache_open(1);
}

/* All that is under way is lost, as when the daemon is killed. */
static inline void world_cache_close(void)
{
    for (uint32_t i = 0; i < world.write_count; i++) {
        struct sim_write *write = &world.writes[(world.write_first + i) % WORLD_QUEUE];
        free(write->change);
        free(write->offload);
    }
    for (uint32_t i = 0; i < world.write_event_count; i++)
        free(world.write_events[(world.write_event_first + i) % WORLD_QUEUE].job);
    memset(world.onboards, 0, sizeof world.onboards);
    world.write_first = world.write_count = world.copy_first = world.copy_count = 0;
    world.write_event_first = world.write_event_count = 0;
    skv_cache_close(world.cache);
    world.cache = NULL;
}

#endif
