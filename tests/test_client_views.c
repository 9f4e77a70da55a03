/* The client library on a protected pool, against a scripted daemon: what can be written, and when
 * extents come into view and leave it. */
#include <criterion/criterion.h>

#include "fake_daemon.h"
#include "skv_session.h"
#include "writable.h"

#define EXTENTS      4u
#define EXTENT_BYTES FAKE_POOL_BYTES
#define EXTENT_PAGES 256u /* of 8 KiB */

static struct fake fake;
static struct skv *skv;
static uint64_t tokens[40];
static struct skv_batch batch;

static void setup(void)
{
    fake_init(&fake);
    fake.extents = EXTENTS;
    fake.pool_bytes = EXTENTS * EXTENT_BYTES;
}

static void teardown(void)
{
    skv_close(skv);
    fake_fini(&fake);
}

TestSuite(views, .init = setup, .fini = teardown, .timeout = 180);

static bool extent_writable(void *base, uint32_t extent)
{
    return writable((uint8_t *)base + extent * EXTENT_BYTES + 77);
}

/* Of the extents, those in view: a bit each. */
static uint32_t in_view(void)
{
    uint32_t found = 0;
    for (uint32_t i = 0; i < EXTENTS; i++) {
        cr_assert(!extent_writable(skv_pool_base(skv), i));
        found |= (uint32_t)extent_writable(skv_pool_append_base(skv), i) << i;
    }
    return found;
}

static int acquire(void)
{
    return skv_acquire(
        skv, 0,
        &(struct skv_request){
            .user = skv_user_integer(1), .tokens = tokens, .history = 40, .max_cached = UINT32_MAX},
        1, &batch);
}

/* ---- scripts ---- */

static uint32_t viewed(struct fake *f)
{
    return __atomic_load_n(&((struct wire_ring *)(void *)f->memory)->viewed, __ATOMIC_ACQUIRE);
}

static void write_list(struct fake *f, uint64_t extents, uint32_t begun, uint32_t sequence)
{
    struct wire_views *views = (struct wire_views *)(void *)(f->memory + WIRE_VIEWS_OFFSET);
    views->begun = begun;
    views->extents[0] = extents;
    __atomic_store_n(&views->sequence, sequence, __ATOMIC_RELEASE);
}

/* Grants the append of 40 tokens to three pages around the border of two extents. */
static void grant(struct fake *f, uint32_t first_page)
{
    struct wire_sqe sqe = fake_take(f, WIRE_ACQUIRE);
    struct wire_grant *g = fake_grant(f, 0, 0, 0, true);
    for (uint32_t i = 0; i < 3; i++)
        fake_slot(f, 0)->pages[g->page_offset + i] = first_page + i;
    fake_answer(f, &sqe, 0);
}

static void commit_under(struct fake *f, uint64_t extents, uint32_t begun, uint32_t sequence)
{
    struct wire_sqe sqe = fake_take(f, WIRE_COMMIT);
    fake_slot(f, 0)->results[0] = (struct wire_committed){.committed = 40};
    write_list(f, extents, begun, sequence);
    fake_answer(f, &sqe, 0);
}

static void lend_and_take_back(struct fake *f)
{
    fake_handshake(f);
    grant(f, EXTENT_PAGES - 1); /* extents 0 and 1, listed nowhere yet */
    commit_under(f, 0x7, 1, 1);
    grant(f, EXTENT_PAGES);
    FAKE_CHECK(viewed(f) == 1);
    commit_under(f, 0x8, 3, 2); /* not a whole list */
    grant(f, EXTENT_PAGES);
    FAKE_CHECK(viewed(f) == 1);
    commit_under(f, 0x2, 3, 3);
    grant(f, EXTENT_PAGES);
    FAKE_CHECK(viewed(f) == 3);
    fake_await_hang_up(f); /* with a batch open */
    FAKE_CHECK(viewed(f) == WIRE_NO_VIEWS);
}

Test(views, extents_come_with_a_grant_or_a_list_and_go_with_a_list)
{
    fake_start(&fake, lend_and_take_back);
    struct skv_options options = fake_options(&fake);
    cr_assert_eq(skv_open(&options, &skv), 0);
    cr_expect(skv_server(skv)->protect);
    cr_expect_neq(skv_pool_base(skv), skv_pool_append_base(skv));
    cr_expect_eq(in_view(), 0);
    static const uint32_t granted[4] = {0x3, 0x7, 0x7, 0x2}, then[3] = {0x7, 0x7, 0x2};
    for (uint32_t i = 0; i < 4; i++) {
        cr_assert_eq(acquire(), 0);
        cr_expect_eq(in_view(), granted[i], "batch %u", i);
        if (i == 3)
            break;
        cr_assert_eq(skv_commit(skv, &batch, NULL), 0);
        cr_expect_eq(in_view(), then[i], "after batch %u", i);
    }
    uint8_t *at = (uint8_t *)skv_pool_append_base(skv) + EXTENT_BYTES;
    at[5] = 0xab;
    cr_expect_eq(((uint8_t *)skv_pool_base(skv))[EXTENT_BYTES + 5], 0xab, "the same memory");
    skv_close(skv);
    skv = NULL;
    cr_expect_eq(fake_end(&fake), 0);
}

static void be_lost_twice(struct fake *f)
{
    fake_handshake(f);
    grant(f, 0);
    close(f->socket);
    f->session = 78;
    fake_accept(f);
    FAKE_CHECK(f->shared->drained == 77);
    FAKE_CHECK(viewed(f) == WIRE_NO_VIEWS); /* of the session before */
    fake_prepare(f);
    fake_send_welcome(f);
    fake_send_extents(f);
    fake_await_hang_up(f);
}

Test(views, a_reconnect_keeps_both_addresses_and_no_view)
{
    fake_start(&fake, be_lost_twice);
    struct skv_options options = fake_options(&fake);
    cr_assert_eq(skv_open(&options, &skv), 0);
    void *base = skv_pool_base(skv), *append = skv_pool_append_base(skv);
    cr_assert_eq(acquire(), 0);
    cr_expect_eq(in_view(), 1);
    while (!skv_lost(skv))
        poll(NULL, 0, 1);
    cr_expect_eq(skv_commit(skv, &batch, NULL), SKV_ELOST);
    cr_assert_eq(skv_reconnect(skv, FAKE_PATIENCE_MS), 0);
    cr_expect_eq(skv_pool_base(skv), base);
    cr_expect_eq(skv_pool_append_base(skv), append);
    cr_expect_eq(in_view(), 0);
    skv_close(skv);
    skv = NULL;
    cr_expect_eq(fake_end(&fake), 0);
}

static void serve_without(struct fake *f)
{
    f->extents = 0;
    fake_handshake(f);
    grant(f, 0);
    fake_await_hang_up(f);
}

Test(views, without_protection_there_is_one_address)
{
    fake_start(&fake, serve_without);
    struct skv_options options = fake_options(&fake);
    cr_assert_eq(skv_open(&options, &skv), 0);
    cr_expect(!skv_server(skv)->protect);
    cr_expect_eq(skv_pool_append_base(skv), skv_pool_base(skv));
    cr_assert_eq(acquire(), 0);
    cr_expect(extent_writable(skv_pool_base(skv), 3));
    skv_close(skv);
    skv = NULL;
    cr_expect_eq(fake_end(&fake), 0);
}

/* ---- another pool that says it is the same ---- */

static void lend_300(struct fake *f)
{
    fake_accept(f);
    fake_prepare(f);
    f->welcome.pool_id = 4711;
    fake_send_welcome(f);
    fake_send_extents(f);
    grant(f, 300);
    struct wire_sqe sqe = fake_take(f, WIRE_RELEASE);
    fake_answer(f, &sqe, 0);
}

static void append_to_300(void)
{
    cr_assert_eq(acquire(), 0);
    cr_expect(writable((uint8_t *)skv_pool_append_base(skv) + 300 * 8192));
    cr_assert_eq(skv_release(skv, &batch), 0);
    cr_assert_eq(fake_end(&fake), 0);
}

Test(views, a_pool_of_other_extents_is_mapped_anew)
{
    struct skv_options options = fake_options(&fake);
    fake_start(&fake, lend_300);
    cr_assert_eq(skv_open(&options, &skv), 0);
    append_to_300();
    fake.extents = EXTENTS / 2;
    fake_start(&fake, lend_300);
    while (!skv_lost(skv))
        poll(NULL, 0, 1);
    cr_assert_eq(skv_reconnect(skv, FAKE_PATIENCE_MS), 0);
    append_to_300();
}

/* ---- a list that changes ---- */

static void lend_once(struct fake *f)
{
    fake_handshake(f);
    grant(f, EXTENT_PAGES - 1);
    fake_await_hang_up(f);
}

/* The lists in the slot stay the daemon's to write. */
Test(views, what_was_granted_is_what_was_checked_whatever_the_daemon_writes_later)
{
    fake_start(&fake, lend_once);
    struct skv_options options = fake_options(&fake);
    cr_assert_eq(skv_open(&options, &skv), 0);
    cr_assert_eq(acquire(), 0);
    memset(skv_slot(skv, 0)->pages, 0xff, sizeof skv_slot(skv, 0)->pages);
    cr_assert_eq(batch.grants[0].page_count, 3);
    for (uint32_t i = 0; i < 3; i++)
        cr_expect_eq(batch.grants[0].pages[i], EXTENT_PAGES - 1 + i);
    cr_expect_eq(skv_views_grant(skv, &batch), 0);
    cr_expect_eq(in_view(), 0x3);
    skv_close(skv);
    skv = NULL;
    cr_expect_eq(fake_end(&fake), 0);
}

static void lend_to_all(struct fake *f)
{
    fake_handshake(f);
    struct wire_sqe sqe = fake_take(f, WIRE_ACQUIRE);
    struct wire_slot *slot = fake_slot(f, 0);
    for (uint32_t i = 0; i < SKV_MAX_BATCH; i++) {
        struct wire_grant *g = fake_grant(f, 0, i, SKV_MAX_TOKENS, false);
        for (uint32_t page = 0; page < SKV_MAX_USER_PAGES; page++)
            slot->pages[g->page_offset + page] = (i + page) % (EXTENTS * EXTENT_PAGES);
    }
    fake_answer(f, &sqe, 0);
    fake_await_hang_up(f);
}

/* The most that a batch can have. */
Test(views, the_largest_batch_is_handed_out_whole)
{
    static uint64_t history[SKV_MAX_TOKENS];
    static struct skv_request requests[SKV_MAX_BATCH];
    fake_start(&fake, lend_to_all);
    struct skv_options options = fake_options(&fake);
    cr_assert_eq(skv_open(&options, &skv), 0);
    for (uint32_t i = 0; i < SKV_MAX_BATCH; i++)
        requests[i] = (struct skv_request){.user = skv_user_integer(i),
                                           .tokens = history,
                                           .history = SKV_MAX_TOKENS,
                                           .max_cached = UINT32_MAX};
    cr_assert_eq(skv_acquire(skv, 0, requests, SKV_MAX_BATCH, &batch), 0);
    for (uint32_t i = 0; i < SKV_MAX_BATCH; i++) {
        cr_assert_eq(batch.grants[i].page_count, SKV_MAX_USER_PAGES);
        for (uint32_t page = 0; page < SKV_MAX_USER_PAGES; page++)
            cr_assert_eq(batch.grants[i].pages[page], (i + page) % (EXTENTS * EXTENT_PAGES));
    }
    skv_close(skv);
    skv = NULL;
    cr_expect_eq(fake_end(&fake), 0);
}
