/* What the mover's tests share: a mover between a host pool and a store in a temporary directory,
 * users whose every byte follows from their number, jobs made of them. Pages of 32 tokens. */
#ifndef SKV_MOVER_HELP_H
#define SKV_MOVER_HELP_H

#include <fcntl.h>
#include <poll.h>

#include "clock.h"
#include "mover.h"
#include "store_help.h"

/* 8 layers of 128 KiB: a gate each, as in the benchmark model. 1 MiB a page. */
#define WIDE ((struct skv_geometry){.layers = 8, .heads = 4, .head_dim = 256, .page_tokens = 32})

struct bench {
    struct skv_geometry geometry;
    uint64_t page_bytes;
    char path[256], hold[264];
    struct skv_device *device;
    struct skv_pool *pool;
    uint8_t *pages; /* of the pool */
    struct skv_store *store;
    struct skv_pinner *pinner;
    struct skv_mover *mover;
    uint32_t *rows; /* eight gate rows, 128 words each */
    uint64_t last_id;
};

struct setup {
    struct skv_geometry geometry;
    uint64_t pool_pages, staging_pages, map_bytes,
        pin_bytes; /* map 0: no store; pin 0: no pinner */
};

static inline void start_mover(struct bench *b, uint64_t staging_pages)
{
    struct skv_mover_options options = {.device = b->device,
                                        .pool = b->pool,
                                        .geometry = b->geometry,
                                        .store = b->store,
                                        .pinner = b->pinner,
                                        .staging_bytes = staging_pages * (b->page_bytes + 8192)};
    cr_assert_eq(skv_mover_start(&options, &b->mover), 0);
}

static inline void open_bench(struct bench *b, struct setup setup)
{
    *b = (struct bench){.geometry = setup.geometry, .page_bytes = skv_page_bytes(&setup.geometry)};
    if (setup.map_bytes) {
        temp_directory(b->path);
        snprintf(b->hold, sizeof b->hold, "%s/hold", b->path);
        setenv("SIDEKV_TEST_COPY_HOLD", b->hold, 1);
    }
    cr_assert_eq(skv_device_open("host", &b->device), 0);
    cr_assert_eq(skv_pool_create(b->device, setup.pool_pages * b->page_bytes, b->page_bytes,
                                 SKV_EXPORT_FD, &b->pool),
                 0);
    b->pages = skv_pool_address(b->pool);
    void *rows;
    cr_assert_eq(skv_pinned_alloc(b->device, 4096, &rows), 0);
    b->rows = rows;
    memset(b->rows, 0, 4096);
    if (setup.map_bytes) {
        struct skv_store_options options = {
            .path = b->path, .geometry = b->geometry, .map_bytes = setup.map_bytes};
        cr_assert_eq(skv_store_open(&options, &b->store), 0);
    }
    if (setup.pin_bytes)
        cr_assert_eq(skv_pinner_start(b->store, b->device, setup.pin_bytes, &b->pinner), 0);
    start_mover(b, setup.staging_pages);
}

static inline void close_bench(struct bench *b)
{
    skv_mover_stop(b->mover);
    skv_pinner_stop(b->pinner);
    skv_store_close(b->store);
    skv_pinned_free(b->device, b->rows);
    skv_pool_close(b->pool);
    skv_device_close(b->device);
    if (b->path[0])
        remove_directory(b->path);
}

/* From here on nothing is copied, either way, and no gate opens. */
static inline void hold_copies(struct bench *b)
{
    int fd = open(b->hold, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    cr_assert_geq(fd, 0);
    close(fd);
}

static inline void let_copies_go(struct bench *b)
{
    cr_assert_eq(unlink(b->hold), 0);
}

/* ---- bytes ---- */

static inline uint64_t word_of(struct user u, uint32_t index, uint64_t at)
{
    uint64_t x = (u.id.lo << 40) ^ ((uint64_t)u.version << 32) ^ ((uint64_t)index << 20) ^ at;
    x *= UINT64_C(0x9e3779b97f4a7c15);
    return x ^ x >> 29;
}

static inline void fill_bytes(struct bench *b, struct user u, uint32_t index, uint8_t *page)
{
    for (uint64_t at = 0; at < b->page_bytes; at += 8) {
        uint64_t word = word_of(u, index, at);
        memcpy(page + at, &word, 8);
    }
}

/* Is this layer of a pool page the user's, its slots past `valid` zero? */
static inline bool same_layer(struct bench *b, uint32_t page, struct user u, uint32_t index,
                              uint32_t valid, uint32_t layer)
{
    uint64_t slice = skv_slice_bytes(&b->geometry), token = b->geometry.head_dim * 2;
    const uint8_t *bytes = b->pages + page * b->page_bytes;
    for (uint64_t at = layer * slice; at < (layer + 1) * slice; at += 8) {
        uint64_t want = at / token % b->geometry.page_tokens < valid ? word_of(u, index, at) : 0;
        if (memcmp(bytes + at, &want, 8) != 0)
            return false;
    }
    return true;
}

static inline bool same_page(struct bench *b, uint32_t page, struct user u, uint32_t index,
                             uint32_t valid)
{
    for (uint32_t layer = 0; layer < b->geometry.layers; layer++)
        if (!same_layer(b, page, u, index, valid, layer))
            return false;
    return true;
}

static inline bool same_user(struct bench *b, uint32_t first_page, struct user u, uint32_t tokens)
{
    for (uint32_t index = 0; index * 32 < tokens; index++)
        if (!same_page(b, first_page + index, u, index, page_valid(tokens, index)))
            return false;
    return true;
}

/* ---- jobs; freed by the caller ---- */

static inline struct skv_move *moves_of(struct user u, uint32_t first, uint32_t tokens,
                                        uint32_t first_page, uint64_t generation, uint32_t *count)
{
    uint64_t hashes[SKV_MAX_USER_PAGES];
    uint32_t pages = user_hashes(u, tokens, hashes);
    struct skv_move *moves = calloc(pages - first, sizeof *moves);
    *count = pages - first;
    for (uint32_t i = 0; i < *count; i++)
        moves[i] = (struct skv_move){.page = first_page + i,
                                     .index = first + i,
                                     .valid = page_valid(tokens, first + i),
                                     .hash = hashes[first + i],
                                     .generation = generation};
    return moves;
}

static inline struct skv_onboard *onboard_of(struct bench *b, struct user u, uint32_t tokens,
                                             uint32_t first_page, uint32_t *row)
{
    struct skv_onboard *job = calloc(1, sizeof *job);
    uint64_t hashes[SKV_MAX_USER_PAGES];
    user_hashes(u, tokens, hashes);
    job->id = ++b->last_id;
    job->gate_row = row;
    job->user_count = 1;
    job->users = calloc(1, sizeof *job->users);
    job->users[0] = record_of(u, tokens, hashes);
    job->moves = moves_of(u, 0, tokens, first_page, job->users[0].generation, &job->move_count);
    job->state = malloc(SKV_ONBOARD_STATE_BYTES(job->move_count));
    return job;
}

static inline struct skv_onboard *gates_only(struct bench *b, uint32_t *row, uint64_t after)
{
    struct skv_onboard *job = calloc(1, sizeof *job);
    job->id = ++b->last_id;
    job->gate_row = row;
    job->after = after;
    job->state = malloc(SKV_ONBOARD_STATE_BYTES(0));
    return job;
}

static inline void free_onboard(struct skv_onboard *job)
{
    free(job->users);
    free(job->moves);
    free(job->state);
    free(job);
}

static inline struct skv_offload *offload_of(struct bench *b, struct user u, uint32_t first,
                                             uint32_t tokens, uint32_t first_page)
{
    struct skv_offload *job = calloc(1, sizeof *job);
    job->hashes = calloc(SKV_MAX_USER_PAGES, sizeof *job->hashes);
    user_hashes(u, tokens, job->hashes);
    job->id = ++b->last_id;
    job->record = record_of(u, tokens, job->hashes);
    job->moves = moves_of(u, first, tokens, first_page, job->record.generation, &job->move_count);
    return job;
}

static inline void free_offload(struct skv_offload *job)
{
    free(job->hashes);
    free(job->moves);
    free(job);
}

/* ---- events ---- */

static inline bool try_event(struct bench *b, struct skv_mover_event *event, uint32_t timeout_ms)
{
    uint64_t deadline_ns = skv_now_ns() + timeout_ms * UINT64_C(1000000), count;
    while (!skv_mover_next(b->mover, event)) {
        struct pollfd ready = {.fd = skv_mover_fd(b->mover), .events = POLLIN};
        if (skv_now_ns() >= deadline_ns)
            return false;
        if (poll(&ready, 1, (int)timeout_ms) == 1)
            cr_assert_eq(read(ready.fd, &count, sizeof count), (ssize_t)sizeof count);
    }
    return true;
}

static inline struct skv_mover_event next_event(struct bench *b)
{
    struct skv_mover_event event;
    cr_assert(try_event(b, &event, 60000), "no event came");
    return event;
}

static inline void expect_event(struct bench *b, enum skv_mover_event_kind kind, const void *job,
                                int status)
{
    struct skv_mover_event event = next_event(b);
    cr_assert_eq(event.kind, kind, "event %d came, not %d", event.kind, kind);
    cr_assert_eq(event.job, job, "event %d of another job", event.kind);
    cr_assert_eq(event.status, status, "event %d: %s", kind, skv_strerror(event.status));
}

static inline void expect_silence(struct bench *b, uint32_t milliseconds)
{
    struct skv_mover_event event;
    cr_assert(!try_event(b, &event, milliseconds), "event %d came", event.kind);
}

/* Puts a user's pages [first, ..) into the store by way of pool pages from `first_page` on. */
static inline void offload_user(struct bench *b, struct user u, uint32_t first, uint32_t tokens,
                                uint32_t first_page, int status)
{
    struct skv_offload *job = offload_of(b, u, first, tokens, first_page);
    for (uint32_t i = 0; i < job->move_count; i++)
        fill_bytes(b, u, first + i, b->pages + (first_page + i) * b->page_bytes);
    cr_assert(skv_mover_offload(b->mover, job));
    expect_event(b, SKV_MOVER_COPIED, job, 0);
    expect_event(b, SKV_MOVER_STORED, job, status);
    free_offload(job);
}

/* Until the pinner has registered all of the store's map that is in use. */
static inline void await_pinner(struct bench *b)
{
    uint64_t want = skv_store_high_water(b->store);
    for (int i = 0; i < 12000 && skv_pinner_bytes(b->pinner) < want; i++)
        usleep(5000);
    cr_assert_geq(skv_pinner_bytes(b->pinner), want);
}

static inline bool row_open(const uint32_t *row, uint32_t layers)
{
    for (uint32_t layer = 0; layer < layers; layer++)
        if (!__atomic_load_n(&row[layer], __ATOMIC_ACQUIRE))
            return false;
    return true;
}

#define SMALL                                                                                      \
    ((struct setup){                                                                               \
        .geometry = TINY, .pool_pages = 512, .staging_pages = 64, .map_bytes = 256 * MIB})
#define BIG                                                                                        \
    ((struct setup){                                                                               \
        .geometry = WIDE, .pool_pages = 96, .staging_pages = 32, .map_bytes = 512 * MIB})

static inline struct setup pinned(struct setup setup)
{
    setup.pin_bytes = setup.map_bytes;
    return setup;
}

static inline uint32_t *row_at(struct bench *b, uint32_t row)
{
    return b->rows + row * 128;
}

#endif
