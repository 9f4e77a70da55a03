/* A protected pool in the core: who may append where, how extents change hands, and what a tail in
 * another's extent costs. stress_cache does the same at random. */
#include <criterion/criterion.h>

#include "cache_steps.h"

#define EXTENT 4u /* pages */

static void world_of(uint32_t extents, uint32_t extent_pages, uint32_t workers)
{
    world_open((struct skv_cache_options){.pages = extents * extent_pages,
                                          .extent_pages = extent_pages,
                                          .sessions = SESSIONS,
                                          .max_records = 100,
                                          .lease_ms = 300,
                                          .tail_ms = 500,
                                          .store = true});
    workers_open();
    for (uint32_t s = 0; s < workers; s++)
        session_open(s);
}

static void protected_world(uint32_t extents, uint32_t workers)
{
    world_of(extents, EXTENT, workers);
}

static void append_by(uint32_t s, uint32_t u, uint32_t tokens)
{
    CHECK(appends(acquire(s, 0, u, tokens)));
    finish(s, 0, true);
    check_views();
}

static uint64_t listed(uint32_t s)
{
    uint32_t sequence;
    return list_of(&sessions[s], &sequence);
}

Test(extents, a_tail_is_appended_to_where_it_is_ones_own_and_else_computed_anew)
{
    protected_world(8, 2);
    append_by(0, 0, S + 5);
    struct view *view = acquire(0, 0, 0, S + 7);
    cr_expect_eq(view->grant.cached, S + 5, "its own extent");
    finish(0, 0, true);
    view = acquire(1, 0, 0, S + 9);
    cr_expect(appends(view));
    cr_expect_eq(view->grant.cached, S, "rounded down to the page");
    cr_expect_neq(view->pages[1] / EXTENT, view->pages[0] / EXTENT);
    finish(1, 0, true);
    check_views();
    cr_expect_eq(info_of(0).committed, S + 9);
    view = acquire(0, 0, 0, S + 9);
    cr_expect_eq(view->grant.cached, S + 9, "whoever only reads loses nothing");
    finish(0, 0, true);
    check_quiet();
}

Test(extents, the_next_one_is_listed_before_the_last_is_full)
{
    protected_world(8, 1);
    append_by(0, 0, 3 * S);
    uint64_t one = listed(0);
    cr_expect_eq(__builtin_popcountll(one), 1);
    append_by(0, 1, S); /* no page is left of it */
    cr_expect_eq(__builtin_popcountll(listed(0)), 2);
    cr_expect_eq(listed(0) & one, one);
    check_quiet();
}

Test(extents, a_share_is_never_used_up_while_extents_are_free)
{
    world_of(16, 3, 1); /* a share is eight */
    for (uint32_t u = 0; u < 5; u++) {
        append_by(0, u, 6 * S); /* two extents */
        look_at_views(0);
    }
    struct skv_stats stats = stats_now();
    cr_expect_eq(stats.evicted_users, 0);
    cr_expect_eq(stats.users_resident, 5);
    cr_expect_geq(stats.extents_common, 2, "what is full is everybody's");
    check_quiet();
}

Test(extents, one_given_up_is_nobodys_until_its_view_is_unmapped)
{
    protected_world(3, 1); /* a share is one extent */
    append_by(0, 0, 4 * S);
    struct skv_stats stats = stats_now();
    cr_expect_eq(stats.extents_owned, 2, "a fresh one, and the full one given up for it");
    cr_expect_eq(__builtin_popcountll(listed(0)), 1);
    append_by(0, 1, 4 * S);
    cr_expect_eq(stats_now().extents_owned, 2, "no third before the first has come back");
    acquire(0, 1, 1, 4 * S); /* so that its pages cannot be had instead */
    cr_expect(!appends(acquire(0, 0, 2, S)));
    finish(0, 0, false);
    cr_expect_eq(stats_now().extents_owned, 2);
    look_at_views(0);
    cr_expect_eq(stats_now().extents_owned, 1);
    append_by(0, 2, S);
    finish(0, 1, false);
    check_quiet();
}

Test(extents, a_session_that_ends_leaves_its_extents_to_all)
{
    protected_world(8, 2);
    append_by(0, 0, 2 * S);
    fence(0);
    cr_expect_eq(stats_now().extents_owned, 1, "its process may still run");
    session_gone(0);
    cr_expect_eq(stats_now().extents_common, 1);
    cr_expect_eq(acquire(1, 0, 0, 2 * S)->grant.cached, 2 * S, "what it committed stays");
    finish(1, 0, false);
    check_quiet();
}

Test(extents, onboards_go_to_common_extents)
{
    protected_world(8, 2);
    append_by(0, 0, 2 * S);
    store_all();
    evict(0);
    struct view *view = acquire(1, 0, 0, 2 * S);
    cr_expect_eq(view->grant.cached, 2 * S);
    cr_expect_eq((listed(0) | listed(1)) & extent_bit(view->pages[0]), 0);
    settle_mover();
    finish(1, 0, false);
    check_quiet();
}

Test(extents, who_appends_does_without_a_stored_tail)
{
    protected_world(8, 2);
    put_away(0, S + 5);
    put_away(1, 5);
    uint64_t before = stats_now().pool_pages_free;
    struct view *view = acquire(1, 0, 0, S + 9);
    cr_expect(appends(view));
    cr_expect_eq(view->grant.cached, S);
    cr_expect_eq(before - stats_now().pool_pages_free, 2, "a page onboarded, and one of its own");
    settle_mover();
    finish(1, 0, true);
    cr_expect_eq(info_of(0).committed, S + 9);
    view = acquire(1, 0, 1, 7);
    cr_expect(appends(view));
    cr_expect_not(gated(view), "it waits for nothing");
    cr_expect_eq(view->grant.cached, 0);
    finish(1, 0, true);
    cr_expect_eq(info_of(1).committed, 7);
    store_all();
    evict(0);
    cr_expect_eq(acquire(0, 0, 0, S + 9)->grant.cached, S + 9, "who reads has the tail");
    settle_mover();
    finish(0, 0, false);
    check_quiet();
}

Test(extents, one_is_left_to_onboards_however_many_append)
{
    protected_world(3, 3);
    put_away(0, 2 * S); /* stored, and not in the pool; session 0's extent is empty */
    append_by(1, 1, S);
    cr_expect(!appends(acquire(2, 0, 2, S)));
    finish(2, 0, false);
    cr_expect_eq(acquire(2, 0, 0, 2 * S)->grant.cached, 2 * S);
    settle_mover();
    finish(2, 0, false);
    check_quiet();
}

Test(extents, where_none_is_free_the_emptiest_common_one_is_cleared)
{
    protected_world(4, 3);
    append_by(0, 0, 4 * S);
    append_by(1, 1, 2 * S);
    store_all();
    for (uint32_t s = 0; s < 2; s++) {
        fence(s);
        session_gone(s);
        session_open(s);
    }
    append_by(0, 2, 4 * S);
    append_by(1, 3, 4 * S);
    look_at_views(0);
    look_at_views(1);
    struct view *held = acquire(0, 1, 0, 4 * S); /* leased: not to be cleared, nor evicted */
    cr_expect_eq(held->grant.cached, 4 * S);
    append_by(2, 4, S);
    cr_expect_eq(info_of(1).resident, 0);
    cr_expect_eq(info_of(0).resident, 4 * S);
    finish(0, 1, false);
    check_quiet();
}

Test(extents, a_restart_holds_back_what_workers_may_still_have_in_view)
{
    protected_world(8, 2);
    append_by(0, 0, 2 * S);
    append_by(1, 1, S);
    world.options.generation = world.table->generation + 1;
    world_cache_close();
    CHECK(skv_cache_open(&world.options, &world.cache) == 0);
    cr_expect_eq(skv_cache_adopt(world.cache, true), 2);
    cr_expect(skv_cache_restored(world.cache, 1));
    workers_open();
    session_open(0);
    cr_expect_eq(stats_now().extents_owned, 2);
    cr_expect_eq(stats_now().extents_free, 6);
    struct view *view = acquire(0, 0, 2, S);
    cr_expect(appends(view));
    cr_expect_geq(view->pages[0], 2 * EXTENT);
    finish(0, 0, true);
    skv_cache_settle(world.cache);
    cr_expect_eq(stats_now().extents_common, 2);
    cr_expect_eq(acquire(0, 0, 0, 2 * S)->grant.cached, 2 * S);
    finish(0, 0, false);
    check_quiet();
}

Test(extents, a_pool_that_was_not_protected_is_held_back_whole)
{
    protected_world(8, 1);
    world.table->protect = 0;
    world.table->generation = 10;
    world.options.generation = 11;
    world_cache_close();
    CHECK(skv_cache_open(&world.options, &world.cache) == 0);
    skv_cache_adopt(world.cache, true);
    cr_expect(skv_cache_restored(world.cache, 1));
    cr_expect_eq(stats_now().extents_owned, 8);
    skv_cache_settle(world.cache);
    cr_expect_eq(stats_now().extents_free, 8);
    cr_expect_eq(world.table->protect, 1);
}
