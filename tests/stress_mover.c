/* The mover under load, for ThreadSanitizer and for luck: users are stored, loaded, replaced and
 * removed in random order, jobs are dropped and cancelled at random moments, a prefetch and a batch
 * share loads; whatever is loaded must be what was stored. Usage: stress_mover [seconds] [seed] */
#include <assert.h>
#include <ftw.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "clock.h"
#include "hash.h"
#include "mover.h"

#define USERS      24u
#define USER_PAGES 12u /* at most */
#define TOKENS     32u
#define POOL_PAGES (USERS * USER_PAGES * 2) /* of each user: where it is stored from, loaded to */

enum state { IDLE, STORING, LOADING, REMOVING, LOOKING };

struct user {
    enum state state;
    bool loadable; /* the store has it, as far as we were told */
    bool cancelled, dropped;
    uint32_t version, stored, tokens;
    uint64_t hashes[USER_PAGES];
    struct skv_record record;
    struct skv_move moves[USER_PAGES];
    struct skv_onboard onboard;
    uint64_t onboard_state[SKV_ONBOARD_STATE_BYTES(USER_PAGES) / sizeof(uint64_t)];
    struct skv_offload offload;
    struct skv_change change;
    struct skv_lookup_job lookup;
    uint64_t looked[SKV_MAX_USER_PAGES];
};

static const struct skv_geometry geometry = {
    .layers = 4, .heads = 2, .head_dim = 64, .page_tokens = TOKENS}; /* 64 KiB a page */
static struct skv_mover *mover;
static struct user users[USERS];
static uint8_t *pool;
static uint32_t *rows; /* one a user, 16 words apart */
static uint64_t page_bytes, last_id, loads, stores, cancels, drops;
static uint32_t busy, seed;

static uint32_t dice(uint32_t sides)
{
    seed = seed * 1664525 + 1013904223;
    return (seed >> 8) % sides;
}

static uint8_t *pool_page(const struct user *u, uint32_t index, bool loaded)
{
    return pool + (((uint32_t)(u - users) * 2 + loaded) * USER_PAGES + index) * page_bytes;
}

static uint64_t word_of(const struct user *u, uint32_t index, uint64_t at)
{
    return ((uint64_t)(u - users) << 48 ^ (uint64_t)u->version << 32 ^ (uint64_t)index << 24 ^ at) *
           UINT64_C(0x9e3779b97f4a7c15);
}

static uint32_t pages_of(uint32_t tokens)
{
    return (tokens + TOKENS - 1) / TOKENS;
}

/* The record and the moves of pages [first, ..) of a user's `tokens`. */
static void describe(struct user *u, uint32_t first, bool loaded)
{
    uint64_t tokens[USER_PAGES * TOKENS];
    struct skv_id model = {.lo = 1}, id = {.lo = (uint64_t)(u - users)};
    for (uint32_t i = 0; i < u->tokens; i++)
        tokens[i] = (uint64_t)u->version << 32 | i;
    uint32_t count = skv_chain_hashes(model, id, TOKENS, tokens, u->tokens, 0, u->hashes);
    uint32_t full = u->tokens / TOKENS;
    u->record = (struct skv_record){
        .model = model,
        .user = id,
        .generation = u->version,
        .hash_full = full ? u->hashes[full - 1] : skv_chain_start(model, id),
        .hash_tail = u->hashes[count - 1],
        .tokens = u->tokens,
    };
    for (uint32_t i = first; i < count; i++)
        u->moves[i - first] = (struct skv_move){
            .page = (uint32_t)((uint64_t)(pool_page(u, i, loaded) - pool) / page_bytes),
            .index = i,
            .valid = i < full ? TOKENS : u->tokens % TOKENS,
            .hash = u->hashes[i],
            .generation = u->version,
        };
}

/* Extends what is stored; or begins anew, as after a cut. */
static void store(struct user *u)
{
    bool anew = !u->loadable || u->stored > (USER_PAGES - 1) * TOKENS || dice(6) == 0;
    uint32_t first = anew ? 0 : u->stored / TOKENS;
    uint32_t least = anew ? 1 : u->stored + 1;
    u->version += anew;
    u->tokens = least + dice(USER_PAGES * TOKENS - least + 1);
    describe(u, first, false);
    u->offload = (struct skv_offload){.id = ++last_id,
                                      .record = u->record,
                                      .hashes = u->hashes,
                                      .move_count = pages_of(u->tokens) - first,
                                      .moves = u->moves};
    for (uint32_t i = first; i < pages_of(u->tokens); i++)
        for (uint64_t at = 0; at < page_bytes; at += 8) {
            uint64_t word = word_of(u, i, at);
            memcpy(pool_page(u, i, false) + at, &word, 8);
        }
    if (!skv_mover_offload(mover, &u->offload)) {
        u->loadable = false; /* its bytes have changed: begins anew */
        return;
    }
    u->state = STORING;
    if (dice(5) == 0) {
        __atomic_store_n(&u->offload.drop, 1, __ATOMIC_RELEASE);
        u->dropped = true;
    }
}

static void load(struct user *u)
{
    uint32_t *row = rows + (u - users) * 16;
    u->tokens = u->stored;
    describe(u, 0, true);
    bool gated = dice(3) != 0;
    memset(row, 0, 64);
    u->onboard = (struct skv_onboard){.id = ++last_id,
                                      .after = dice(2) ? last_id - 1 : 0,
                                      .gate_row = gated ? row : NULL,
                                      .user_count = 1,
                                      .users = &u->record,
                                      .move_count = pages_of(u->tokens),
                                      .moves = u->moves,
                                      .state = u->onboard_state};
    skv_mover_onboard(mover, &u->onboard);
    u->state = LOADING;
}

static void cancel(struct user *u)
{
    if (u->cancelled)
        return;
    u->cancelled = true;
    skv_mover_cancel(mover, u->onboard.id, SKV_ELOAD);
    for (uint32_t i = 0; i < USERS; i++) /* as the core does */
        if (users[i].state == LOADING && users[i].onboard.after >= u->onboard.id)
            cancel(&users[i]);
}

static void start_something(struct user *u)
{
    switch (dice(8)) {
    case 0:
        u->change = (struct skv_change){
            .id = ++last_id,
            .kind = SKV_CHANGE_RECORD,
            .record = {.model = {.lo = 1}, .user = {.lo = (uint64_t)(u - users)}}};
        u->state = REMOVING;
        skv_mover_change(mover, &u->change);
        break;
    case 1:
        u->lookup = (struct skv_lookup_job){
            .record = {.model = {.lo = 1}, .user = {.lo = (uint64_t)(u - users)}},
            .hashes = u->looked};
        u->state = LOOKING;
        skv_mover_lookup(mover, &u->lookup);
        break;
    case 2:
    case 3:
    case 4:
        store(u);
        break;
    default:
        if (u->loadable)
            load(u);
    }
    busy += u->state != IDLE;
}

static void check_loaded(const struct user *u)
{
    const uint32_t *row = rows + (u - users) * 16;
    for (uint32_t layer = 0; u->onboard.gate_row && layer < geometry.layers; layer++)
        assert(__atomic_load_n(&row[layer], __ATOMIC_ACQUIRE) == 1);
    for (uint32_t i = 0; i < pages_of(u->tokens); i++)
        for (uint64_t at = 0; at < page_bytes; at += 8) {
            bool there = i * TOKENS + at / (geometry.head_dim * 2) % TOKENS < u->tokens;
            uint64_t want = there ? word_of(u, i, at) : 0, word;
            memcpy(&word, pool_page(u, i, true) + at, 8);
            assert(word == want);
        }
    loads++;
}

static struct user *user_of(const struct skv_mover_event *event)
{
    return &users[((uintptr_t)event->job - (uintptr_t)users) / sizeof *users];
}

static void take(const struct skv_mover_event *event)
{
    struct user *u = user_of(event);
    switch (event->kind) {
    case SKV_MOVER_COPIED:
        memset(pool_page(u, event->user, false), 0xff, page_bytes); /* the pages are free */
        return;
    case SKV_MOVER_STORED:
        assert(event->status == (u->dropped ? SKV_ESTALE : 0) || event->status == 0);
        u->loadable = event->status == 0;
        u->stored = u->loadable ? u->tokens : 0;
        stores += u->loadable;
        drops += !u->loadable;
        u->dropped = false;
        break;
    case SKV_MOVER_CHANGED:
        assert(event->status == 0);
        u->loadable = false;
        u->stored = 0;
        break;
    case SKV_MOVER_ONBOARDED:
        check_loaded(u);
        u->cancelled = false;
        break;
    case SKV_MOVER_CANCELLED:
        assert(u->cancelled);
        u->cancelled = false;
        cancels++;
        break;
    case SKV_MOVER_FOUND:
        assert(event->status == 0 || !u->loadable);
        assert(!u->loadable || u->lookup.record.tokens == u->stored);
        break;
    default:
        fprintf(stderr, "event %d, status %d: not expected\n", event->kind, event->status);
        abort();
    }
    u->state = IDLE;
    busy--;
}

static void turn(bool start)
{
    struct skv_mover_event event;
    uint64_t count;
    while (skv_mover_next(mover, &event))
        take(&event);
    for (uint32_t tries = dice(4); start && tries; tries--) {
        struct user *u = &users[dice(USERS)];
        if (u->state == IDLE)
            start_something(u);
        else if (u->state == LOADING && dice(8) == 0)
            cancel(u);
    }
    struct pollfd ready = {.fd = skv_mover_fd(mover), .events = POLLIN};
    if (poll(&ready, 1, start ? 1 : 1000) == 1)
        assert(read(ready.fd, &count, sizeof count) == sizeof count);
}

static int remove_one(const char *path, const struct stat *st, int kind, struct FTW *walk)
{
    (void)st, (void)kind, (void)walk;
    return remove(path);
}

static void must(int status, const char *what)
{
    if (status == 0)
        return;
    fprintf(stderr, "%s: %s\n", what, skv_strerror(status));
    exit(1);
}

int main(int argc, char **argv)
{
    uint32_t seconds = argc > 1 ? (uint32_t)atoi(argv[1]) : 5;
    seed = argc > 2 ? (uint32_t)atoi(argv[2]) : 1;
    char path[] = "/tmp/sidekv-stress-XXXXXX";
    struct skv_device *device;
    struct skv_pool *memory;
    struct skv_store *lmdb;
    struct skv_pinner *pinner;
    void *pinned;
    page_bytes = skv_page_bytes(&geometry);
    must(mkdtemp(path) ? 0 : SKV_EIO, "mkdtemp");
    must(skv_device_open("host", &device), "device");
    must(skv_pool_create(device, POOL_PAGES * page_bytes, page_bytes, SKV_EXPORT_FD, &memory),
         "pool");
    must(skv_pinned_alloc(device, USERS * 64, &pinned), "gates");
    pool = skv_pool_address(memory);
    rows = pinned;
    must(skv_store_open(&(struct skv_store_options){.path = path,
                                                    .geometry = geometry,
                                                    .map_bytes = UINT64_C(256) << 20},
                        &lmdb),
         "store");
    must(skv_pinner_start(lmdb, device, UINT64_C(32) << 20, &pinner), "pinner");
    must(skv_mover_start(&(struct skv_mover_options){.device = device,
                                                     .pool = memory,
                                                     .geometry = geometry,
                                                     .store = lmdb,
                                                     .pinner = pinner,
                                                     .staging_bytes = 64 * (page_bytes + 8192)},
                         &mover),
         "mover");
    for (uint64_t end = skv_now_ns() + seconds * UINT64_C(1000000000); skv_now_ns() < end;)
        turn(true);
    while (busy)
        turn(false);
    struct skv_mover_counters counters;
    skv_mover_counters(mover, &counters);
    printf(
        "stress_mover: %llu loads (%.0f %% in place), %llu stores, %llu dropped, %llu cancelled\n",
        (unsigned long long)loads,
        100.0 * (double)counters.onboard_in_place_bytes / (double)(counters.onboard_bytes + 1),
        (unsigned long long)stores, (unsigned long long)drops, (unsigned long long)cancels);
    skv_mover_stop(mover);
    skv_pinner_stop(pinner);
    skv_store_close(lmdb);
    skv_pinned_free(device, pinned);
    skv_pool_close(memory);
    skv_device_close(device);
    nftw(path, remove_one, 8, FTW_DEPTH | FTW_PHYS);
    return 0;
}
