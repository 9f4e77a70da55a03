/* The client library's calls against a scripted daemon: batches and what is checked of them, tails
 * that differ, sleeping and waking, deadlines, the loss of a daemon, reconnecting, forks. */
#include <criterion/criterion.h>
#include <pthread.h>

#include "fake_daemon.h"
#include "sidekv.h"

static struct fake fake;
static struct skv *skv;

static void setup(void)
{
    fake_init(&fake);
}

static void teardown(void)
{
    skv_close(skv);
    fake_fini(&fake);
}

TestSuite(client, .init = setup, .fini = teardown, .timeout = 180);

static void open_with(void (*script)(struct fake *), uint32_t timeout_ms, uint32_t spin_us)
{
    struct skv_options options = fake_options(&fake);
    options.timeout_ms = timeout_ms;
    options.spin_us = spin_us;
    options.no_spin_default = true;
    fake_start(&fake, script);
    cr_assert_eq(skv_open(&options, &skv), 0);
}

/* Ends the session, then the script, which must have found everything as it should be. */
static void close_and_end(void)
{
    skv_close(skv);
    skv = NULL;
    int code = fake_end(&fake);
    cr_assert_eq(code, 0, "the script ended with %d", code);
}

/* Three users of 40, 20 and 64 tokens; page tokens 16. */
static uint64_t tokens[3][64];
static struct skv_request requests[3];

static void make_requests(void)
{
    static const uint32_t lengths[3] = {40, 20, 64};
    for (uint32_t i = 0; i < 3; i++) {
        for (uint32_t t = 0; t < 64; t++)
            tokens[i][t] = 100000 * (i + 1) + t;
        requests[i] = (struct skv_request){.user = skv_user_integer(i + 1),
                                           .tokens = tokens[i],
                                           .history = lengths[i],
                                           .max_cached = UINT32_MAX};
    }
}

/* The chain hash of user i's first `count` tokens. */
static uint64_t hash_at(uint32_t i, uint32_t count)
{
    uint64_t hashes[4];
    uint32_t pages =
        skv_chain_hashes(fake_model, skv_user_integer(i + 1), 16, tokens[i], count, 0, hashes);
    return hashes[pages - 1];
}

/* ---- one batch, as it should be ---- */

static void serve_one_batch(struct fake *f)
{
    make_requests();
    fake_handshake(f);
    struct wire_sqe sqe = fake_take(f, WIRE_ACQUIRE);
    struct wire_slot *slot = fake_slot(f, 1);
    FAKE_CHECK(sqe.row == 1 && sqe.count == 3 && skv_id_is_zero(sqe.model));
    uint32_t offset = 0;
    for (uint32_t i = 0; i < 3; i++) {
        struct wire_request *r = &slot->requests[i];
        uint64_t hashes[4];
        uint32_t pages = skv_chain_hashes(fake_model, requests[i].user, 16, tokens[i],
                                          requests[i].history, 0, hashes);
        FAKE_CHECK(skv_id_equal(r->user, requests[i].user) && r->history == requests[i].history);
        FAKE_CHECK(r->max_cached == (i == 2 ? 48 : UINT32_MAX) && r->tail_hash == 0);
        FAKE_CHECK(r->flags == (i == 2 ? (uint32_t)WIRE_READ : 0) && r->hash_offset == offset);
        FAKE_CHECK(memcmp(slot->hashes + offset, hashes, pages * sizeof *hashes) == 0);
        offset += pages;
    }
    fake_grant(f, 1, 0, 32, true);
    slot->grants[1] = (struct wire_grant){.status = SKV_EFULL, .lease = 99, .cached = 3};
    fake_grant(f, 1, 2, 48, false)->flags = SKV_GRANT_GATED;
    fake_complete(f, (struct wire_cqe){.user_data = sqe.user_data, .value = {1}});

    sqe = fake_take(f, WIRE_COMMIT);
    FAKE_CHECK(sqe.row == 1 && sqe.count == 2);
    FAKE_CHECK(slot->leases[0] == 1000 && slot->leases[1] == 1002);
    slot->results[0] = (struct wire_committed){.committed = 40, .stored = 32};
    slot->results[1] = (struct wire_committed){.status = SKV_ESTALE};
    fake_answer(f, &sqe, 0);
    fake_await_hang_up(f);
}

Test(client, a_batch_goes_out_and_comes_back)
{
    make_requests();
    requests[2].max_cached = 48;
    requests[2].flags = SKV_REQUEST_READ;
    uint64_t hashes[4];
    skv_chain_hashes(fake_model, requests[2].user, 16, tokens[2], 64, 0, hashes);
    requests[2].hashes = hashes;
    open_with(serve_one_batch, FAKE_PATIENCE_MS, 0);

    struct skv_batch batch = {0};
    cr_expect_eq(skv_acquire(skv, 2, requests, 3, &batch), SKV_EINVAL);
    cr_expect_eq(skv_acquire(skv, 1, requests, 0, &batch), SKV_EINVAL);
    cr_expect_eq(skv_acquire(skv, 1, requests, SKV_MAX_BATCH + 1, &batch), SKV_EINVAL);
    cr_assert_eq(skv_acquire(skv, 1, requests, 3, &batch), 0);
    cr_expect(batch.row == 1 && batch.count == 3 && batch.gated);
    cr_expect(batch.grants[0].cached == 32 && batch.grants[0].page_count == 3);
    cr_expect(batch.grants[0].flags == SKV_GRANT_APPEND && batch.grants[0].pages[2] == 2);
    cr_expect(batch.grants[1].status == SKV_EFULL && batch.grants[1].cached == 0);
    cr_expect_eq(batch.grants[1].lease, 0);
    cr_expect(batch.grants[2].page_count == 3 && batch.grants[2].pages[0] == 6);
    cr_expect_eq(skv_acquire(skv, 1, requests, 3, &batch), SKV_EBUSY, "asked locally");
    cr_expect_eq(skv_batch_status(skv, &batch), 0);

    struct skv_committed results[3];
    cr_assert_eq(skv_commit(skv, &batch, results), 0);
    cr_expect(results[0].status == 0 && results[0].committed == 40 && results[0].stored == 32);
    cr_expect_eq(results[1].status, SKV_EFULL);
    cr_expect_eq(results[2].status, SKV_ESTALE);
    cr_expect_eq(skv_commit(skv, &batch, results), SKV_ESTALE, "a batch ends once");
    cr_expect_eq(skv_release(skv, &batch), SKV_ESTALE);
    cr_expect_eq(skv_batch_status(skv, &batch), SKV_ESTALE);
    close_and_end();
}

/* Nobody got a lease: the row is nobody's, and nothing more is said. */
static void serve_nothing(struct fake *f)
{
    fake_handshake(f);
    for (int round = 0; round < 2; round++) {
        struct wire_sqe sqe = fake_take(f, WIRE_ACQUIRE);
        fake_slot(f, 0)->grants[0] = (struct wire_grant){.status = SKV_EFULL};
        fake_answer(f, &sqe, 0);
    }
    struct wire_sqe sqe = fake_take(f, WIRE_ACQUIRE);
    fake_answer(f, &sqe, SKV_EBUSY);
    fake_await_hang_up(f);
}

Test(client, a_batch_without_leases_ends_without_a_command)
{
    make_requests();
    open_with(serve_nothing, FAKE_PATIENCE_MS, 0);
    struct skv_batch batch;
    cr_assert_eq(skv_acquire(skv, 0, requests, 1, &batch), 0);
    cr_assert_eq(skv_release(skv, &batch), 0);
    cr_assert_eq(skv_acquire(skv, 0, requests, 1, &batch), 0);
    cr_assert_eq(skv_commit(skv, &batch, NULL), 0);
    cr_assert_eq(skv_acquire(skv, 0, requests, 1, &batch), SKV_EBUSY);
    cr_expect_not(skv_lost(skv));
    close_and_end();
}

/* ---- what is told is checked ---- */

static const struct spoiled {
    const char *name;
    size_t offset; /* in the grant */
    size_t size;
    uint64_t value;
} spoiled[] = {
#define SPOILED(field, what)                                                                       \
    {                                                                                              \
#field, offsetof(struct wire_grant, field), sizeof(((struct wire_grant *)0)->field), what  \
    }
    SPOILED(status, 5),
    SPOILED(status, 0x80000000),
    SPOILED(flags, 1u << 5),
    SPOILED(flags, SKV_GRANT_APPEND | SKV_GRANT_GATED), /* in a batch that is not */
    SPOILED(cached, 41),
    SPOILED(cached, UINT32_MAX),
    SPOILED(gpu_tokens, 33),
    SPOILED(page_offset, WIRE_SLOT_PAGES - 2),
    SPOILED(page_offset, UINT32_MAX),
    SPOILED(page_count, 2),
    SPOILED(page_count, UINT32_MAX),
    SPOILED(lease, 0),
    SPOILED(tail_valid, 8), /* as far as the history: that proves it by itself */
    SPOILED(tail_valid, 16),
    {.name = "page", .offset = SIZE_MAX, .value = FAKE_POOL_BYTES / 8192},
    {.name = "ring", .offset = SIZE_MAX - 1},
    {.name = "user_data", .offset = SIZE_MAX - 2},
    {.name = "value", .offset = SIZE_MAX - 3},
    {.name = "completion status", .offset = SIZE_MAX - 4},
};

static void serve_spoiled(struct fake *f)
{
    const struct spoiled *s = f->argument;
    fake_handshake(f);
    struct wire_sqe sqe = fake_take(f, WIRE_ACQUIRE);
    struct wire_cqe cqe = {.user_data = sqe.user_data};
    struct wire_grant *grant = fake_grant(f, 0, 0, 32, true);
    switch (s->offset) {
    case SIZE_MAX:
        fake_slot(f, 0)->pages[2] = (uint32_t)s->value;
        break;
    case SIZE_MAX - 1:
        f->cq.index += WIRE_CQ_ENTRIES;
        break;
    case SIZE_MAX - 2:
        cqe.user_data++;
        break;
    case SIZE_MAX - 3:
        cqe.value[0] = 2;
        break;
    case SIZE_MAX - 4:
        cqe.status = 1;
        break;
    default:
        memcpy((uint8_t *)grant + s->offset, &s->value, s->size);
    }
    fake_complete(f, cqe);
    fake_await_hang_up(f);
}

Test(client, every_lie_about_a_grant_ends_the_session)
{
    make_requests();
    for (size_t i = 0; i < sizeof spoiled / sizeof *spoiled; i++) {
        fake.argument = &spoiled[i];
        open_with(serve_spoiled, FAKE_PATIENCE_MS, 0);
        struct skv_batch batch;
        int status = skv_acquire(skv, 0, requests, 1, &batch);
        cr_expect_eq(status, SKV_EPROTO, "%s = %llu: %s", spoiled[i].name,
                     (unsigned long long)spoiled[i].value, skv_strerror(status));
        cr_expect(skv_lost(skv), "%s", spoiled[i].name);
        cr_expect_eq(skv_ping(skv, NULL), SKV_ELOST);
        close_and_end();
    }
}

/* ---- tails ---- */

static void expect_release(struct fake *f, uint32_t count)
{
    struct wire_sqe sqe = fake_take(f, WIRE_RELEASE);
    FAKE_CHECK(sqe.row == 0 && sqe.count == count);
    FAKE_CHECK(fake_slot(f, 0)->leases[count - 1] == 999 + count);
    fake_answer(f, &sqe, 0);
}

/* Tails that are granted, or, with an argument, replaced by fresh pages. */
static void serve_tails(struct fake *f)
{
    bool replaced = f->argument != NULL;
    make_requests();
    fake_handshake(f);
    struct wire_slot *slot = fake_slot(f, 0);
    struct wire_sqe sqe = fake_take(f, WIRE_ACQUIRE);
    struct wire_grant *g = fake_grant(f, 0, 0, replaced ? 32 : 38, true);
    g->tail_valid = 6;
    g->tail_hash = hash_at(0, 38); /* the client's own tokens: fine */
    g = fake_grant(f, 0, 1, replaced ? 16 : 18, true);
    g->tail_valid = 2;
    g->tail_hash = 4711; /* somebody else's */
    fake_grant(f, 0, 2, 64, false);
    fake_answer(f, &sqe, 0);

    expect_release(f, 3);
    sqe = fake_take(f, WIRE_ACQUIRE);
    FAKE_CHECK(slot->requests[0].flags == 0 && slot->requests[0].max_cached == UINT32_MAX);
    FAKE_CHECK(slot->requests[1].flags == WIRE_TAIL_DIFFERS);
    FAKE_CHECK(slot->requests[1].tail_hash == 4711 && slot->requests[1].max_cached == 16);
    FAKE_CHECK(slot->requests[2].flags == 0 && slot->requests[2].tail_hash == 0);
    g = fake_grant(f, 0, 0, replaced ? 32 : 38, true);
    g->tail_valid = 6;
    g->tail_hash = hash_at(0, 38);
    fake_grant(f, 0, 1, 16, true);
    fake_grant(f, 0, 2, 64, false);
    fake_answer(f, &sqe, 0);
    expect_release(f, 3); /* the test's */
    fake_await_hang_up(f);
}

static void meet_tails(bool replaced)
{
    make_requests();
    fake.argument = replaced ? requests : NULL;
    open_with(serve_tails, FAKE_PATIENCE_MS, 0);
    struct skv_batch batch;
    cr_assert_eq(skv_acquire(skv, 0, requests, 3, &batch), 0);
    cr_expect_eq(batch.grants[0].cached, replaced ? 32 : 38);
    cr_expect_eq(batch.grants[1].cached, 16);
    cr_expect_eq(batch.grants[2].cached, 64);
    cr_assert_eq(skv_release(skv, &batch), 0);
    close_and_end();
}

Test(client, a_tail_that_differs_is_echoed_and_acquired_again)
{
    meet_tails(false);
}

Test(client, one_that_a_fresh_page_would_replace_too)
{
    meet_tails(true);
}

/* However often the tail changes under us, it ends, at last without a hit. */
static void serve_restless_tails(struct fake *f)
{
    fake_handshake(f);
    struct wire_slot *slot = fake_slot(f, 0);
    uint32_t rounds = 0;
    for (;; rounds++) {
        struct wire_sqe sqe = fake_take(f, WIRE_ACQUIRE);
        uint32_t most = slot->requests[0].max_cached < 64 ? slot->requests[0].max_cached : 64;
        uint32_t cached = most ? most - 1 : 0;
        struct wire_grant *g = fake_grant(f, 0, 0, cached, true);
        g->tail_valid = cached % 16;
        g->tail_hash = rounds;
        fake_answer(f, &sqe, 0);
        if (!cached)
            break;
        expect_release(f, 1);
    }
    f->shared->seen = rounds;
    fake_await_hang_up(f);
}

Test(client, a_tail_that_never_rests_ends_without_a_hit)
{
    make_requests();
    open_with(serve_restless_tails, FAKE_PATIENCE_MS, 0);
    struct skv_batch batch;
    cr_assert_eq(skv_acquire(skv, 0, &requests[2], 1, &batch), 0);
    cr_expect_eq(batch.grants[0].cached, 0);
    close_and_end();
    cr_expect_eq(fake.shared->seen, 4);
}

/* ---- sleeping and waking ---- */

static void serve_slowly(struct fake *f)
{
    fake_handshake(f);
    for (int i = 0; i < 3; i++) {
        struct wire_sqe sqe = fake_take(f, WIRE_NOP); /* asleep until the doorbell rings */
        const uint32_t *asleep = f->cq.flags;
        FAKE_CHECK(fake_await(asleep, WIRE_NEED_WAKEUP));
        poll(NULL, 0, 150); /* longer than a slice */
        fake_answer(f, &sqe, 0);
    }
    for (int i = 0; i < 2000; i++) {
        struct wire_sqe sqe = fake_take(f, WIRE_NOP);
        fake_answer(f, &sqe, 0);
    }
    fake_await_hang_up(f);
}

Test(client, sleepers_on_both_sides_are_woken)
{
    open_with(serve_slowly, FAKE_PATIENCE_MS, 0);
    uint64_t round_trip = 0;
    for (int i = 0; i < 3; i++) {
        cr_assert_eq(skv_ping(skv, &round_trip), 0);
        cr_expect_geq(round_trip, 150000000u);
    }
    for (int i = 0; i < 2000; i++)
        cr_assert_eq(skv_ping(skv, NULL), 0);
    close_and_end();
}

Test(client, a_spinning_client_and_a_sleeping_daemon_meet)
{
    open_with(serve_slowly, FAKE_PATIENCE_MS, 20);
    for (int i = 0; i < 2003; i++)
        cr_assert_eq(skv_ping(skv, NULL), 0);
    close_and_end();
}

/* ---- looking and managing ---- */

static void serve_admin(struct fake *f)
{
    fake_handshake(f);
    struct wire_sqe sqe = fake_take(f, WIRE_LOOKUP);
    FAKE_CHECK(sqe.user.lo == 5 && skv_id_equal(sqe.model, fake_model));
    fake_complete(f, (struct wire_cqe){.user_data = sqe.user_data,
                                       .value = {3, 100 | UINT64_C(64) << 32,
                                                 96 | UINT64_C(2) << 32, 1234567, 7, 8}});
    sqe = fake_take(f, WIRE_LOOKUP);
    fake_answer(f, &sqe, SKV_ENOENT);
    sqe = fake_take(f, WIRE_TRUNCATE);
    FAKE_CHECK(sqe.argument == 48);
    fake_answer(f, &sqe, 0);
    sqe = fake_take(f, WIRE_LIST);
    FAKE_CHECK(sqe.argument == 17 && sqe.count == 10);
    struct skv_user_info *infos = (struct skv_user_info *)(f->memory + WIRE_SCRATCH_OFFSET);
    infos[1].committed = 31;
    fake_complete(f, (struct wire_cqe){.user_data = sqe.user_data, .count = 2, .value = {18}});
    sqe = fake_take(f, WIRE_STATS); /* all counters, and some that the client does not know */
    memset(f->memory + WIRE_SCRATCH_OFFSET, 0xff, WIRE_SCRATCH_BYTES);
    fake_complete(f, (struct wire_cqe){.user_data = sqe.user_data,
                                       .count = sizeof(struct skv_stats) / sizeof(uint64_t) + 3});
    sqe = fake_take(f, WIRE_STATS); /* an older daemon */
    fake_complete(f, (struct wire_cqe){.user_data = sqe.user_data, .count = 2});
    sqe = fake_take(f, WIRE_PREFETCH);
    FAKE_CHECK(sqe.row == 0 && sqe.count == 1 && fake_slot(f, 0)->requests[0].history == 40);
    fake_answer(f, &sqe, 0);
    sqe = fake_take(f, WIRE_LIST);
    fake_complete(f, (struct wire_cqe){.user_data = sqe.user_data, .count = 11});
    fake_await_hang_up(f);
}

static void serve_counters(struct fake *f)
{
    fake_handshake(f);
    struct wire_sqe sqe = fake_take(f, WIRE_STATS);
    fake_complete(
        f, (struct wire_cqe){.user_data = sqe.user_data, .count = *(const uint32_t *)f->argument});
    fake_await_hang_up(f);
}

Test(client, no_counters_or_more_than_there_is_room_for_end_the_session)
{
    static const uint32_t counts[] = {0, WIRE_SCRATCH_BYTES / 8 + 1, UINT32_MAX};
    for (int i = 0; i < 3; i++) {
        fake.argument = &counts[i];
        open_with(serve_counters, FAKE_PATIENCE_MS, 0);
        struct skv_stats stats;
        cr_expect_eq(skv_stats(skv, &stats), SKV_EPROTO, "%u", counts[i]);
        cr_expect(skv_lost(skv), "%u", counts[i]);
        close_and_end();
    }
}

Test(client, answers_are_unpacked)
{
    make_requests();
    open_with(serve_admin, FAKE_PATIENCE_MS, 0);
    struct skv_user_info info, infos[10];
    struct skv_id model = fake_model;
    cr_assert_eq(skv_lookup(skv, model, skv_user_integer(5), &info), 0);
    cr_expect(info.generation == 3 && info.committed == 100 && info.resident == 64);
    cr_expect(info.stored == 96 && info.leases == 2 && info.last_use_s == 1234567);
    cr_expect(info.model.lo == 7 && info.model.hi == 8 && info.user.lo == 5);
    cr_expect_eq(skv_lookup(skv, model, skv_user_integer(5), &info), SKV_ENOENT);
    cr_expect_eq(skv_truncate(skv, model, skv_user_integer(5), 48), 0);
    uint64_t cursor = 17;
    cr_expect_eq(skv_list(skv, &cursor, infos, 10), 2);
    cr_expect(cursor == 18 && infos[1].committed == 31);
    struct skv_stats stats;
    cr_expect_eq(skv_stats(skv, &stats), 0);
    cr_expect_eq(stats.standby, UINT64_MAX);
    cr_expect_eq(skv_stats(skv, &stats), 0);
    cr_expect(stats.epoll == UINT64_MAX && stats.pool_pages == 0 && stats.standby == 0);
    cr_expect_eq(skv_prefetch(skv, &requests[0]), 0);
    cr_expect_eq(skv_list(skv, &cursor, infos, 10), SKV_EPROTO);
    cr_expect(skv_lost(skv));
    close_and_end();
}
