/* The cache core and the store: what is stored when, flush, tails, what leaves the store, what a
 * new daemon starts from; and the descriptor table. In the simulated world of cache_workers.h. */
#include <criterion/criterion.h>

#include "cache_steps.h"

static bool offload_one(uint32_t max_pages)
{
    if (!offload_begin(max_pages, false))
        return false;
    settle_mover();
    sync_users(true);
    return true;
}

static uint64_t forget(uint32_t u)
{
    uint32_t kept;
    uint64_t change, generation = info_of(u).generation;
    cr_assert_eq(skv_cache_truncate(world.cache, record_of(u), 0, NULL, &kept, &change), 0);
    cr_assert_eq(kept, 0);
    world.users[u].forgotten_by = change;
    world.users[u].forgotten_generation = generation;
    take_actions();
    sync_users(true);
    return change;
}

/* ---- what goes to the store ---- */

Test(cache_store, full_pages_are_due_at_once_and_tails_are_not)
{
    setup(16);
    append(0, 40);
    cr_assert(offload_one(8));
    cr_assert_eq(info_of(0).stored, 32);
    cr_assert_not(offload_one(8));
}

Test(cache_store, a_tail_is_due_some_time_after_its_last_append)
{
    setup(16);
    append(0, 10);
    cr_assert_eq(skv_cache_tail_due(world.cache), 500);
    later(300);
    append(0, 13);
    cr_assert_eq(skv_cache_tail_due(world.cache), 500);
    later(499);
    cr_assert_eq(skv_cache_tail_due(world.cache), 1);
    cr_assert_not(offload_one(8));
    later(1);
    cr_assert(offload_one(8));
    cr_assert_eq(info_of(0).stored, 13);
    cr_assert_eq(skv_cache_tail_due(world.cache), UINT64_MAX);
}

Test(cache_store, users_are_stored_in_the_order_they_were_committed)
{
    setup(24);
    append(1, 16);
    append(0, 16);
    append(2, 16);
    offload_one(8);
    cr_assert_eq(info_of(1).stored, 16);
    cr_assert_eq(info_of(0).stored, 0);
    offload_one(8);
    cr_assert_eq(info_of(0).stored, 16);
    cr_assert_eq(info_of(2).stored, 0);
}

Test(cache_store, long_histories_are_stored_piece_by_piece_in_ascending_order)
{
    setup(16);
    append(0, 90);
    for (uint32_t stored = 32; stored <= 64; stored += 32) {
        cr_assert(offload_one(2));
        cr_assert_eq(info_of(0).stored, stored);
    }
    cr_assert(offload_one(2));
    cr_assert_eq(info_of(0).stored, 80);
}

Test(cache_store, a_user_has_one_offload_in_flight)
{
    setup(16);
    append(0, 32);
    cr_assert(offload_begin(1, false));
    cr_assert_not(offload_begin(1, false));
    settle_mover();
    cr_assert(offload_begin(1, false));
}

Test(cache_store, an_offload_that_could_not_be_handed_over_comes_again)
{
    setup(16);
    append(0, 40);
    struct skv_offload *job = skv_cache_next_offload(world.cache, 4, true);
    cr_assert(job);
    skv_cache_offload_undo(world.cache, job);
    skv_cache_check(world.cache);
    cr_assert_eq(info_of(0).stored, 0);
    store_all();
    cr_assert_eq(info_of(0).stored, 40);
}

Test(cache_store, a_store_that_refuses_keeps_users_and_is_asked_again)
{
    setup(16);
    append(0, 40);
    offload_begin(4, true);
    offload_copy(0);
    write_step(SKV_ENOSPC, 0);
    while (take_event())
        ;
    cr_assert_eq(info_of(0).stored, 0);
    cr_assert_eq(info_of(0).committed, 40);
    store_all();
    cr_assert_eq(info_of(0).stored, 40);
}

Test(cache_store, a_half_written_offload_counts_as_far_as_it_came_and_leaves_no_user)
{
    setup(16);
    append(0, 20);
    store_all();
    append(0, 60);
    offload_begin(4, true);
    offload_copy(0);
    write_step(SKV_EIO, 1); /* the tail's page is full now, the others were not written */
    while (take_event())
        ;
    cr_assert_eq(info_of(0).stored, 32);
    put_away(1, 20); /* another one is none the worse */
    forget(0);
    settle_mover();
    cr_assert_eq(world.store[0].tokens, 0);
}

Test(cache_store, what_is_swapped_behind_an_offload_never_goes_back)
{
    setup(24);
    append(0, 40);
    acquire(1, 0, 0, 44);
    fence(1); /* may write that tail */
    cr_assert(offload_begin(4, true));
    struct view *view = acquire(2, 0, 0, 90);
    cr_assert_eq(view->grant.cached, 32);
    finish(2, 0, true);                    /* its list has a successor now */
    cr_assert_not(offload_begin(1, true)); /* that knows of the offload in flight */
    settle_mover();
    cr_assert_eq(info_of(0).stored, 40);
    store_all();
    cr_assert_eq(info_of(0).stored, 90);
}

Test(cache_store, a_stopping_daemon_stores_everything)
{
    setup(24);
    append(0, 40);
    append(1, 5);
    append(2, 32);
    store_all();
    cr_assert_eq(info_of(0).stored, 40);
    cr_assert_eq(info_of(1).stored, 5);
    cr_assert_eq(info_of(2).stored, 32);
}

Test(cache_store, evict_stores_first)
{
    setup(16);
    append(0, 40);
    cr_assert_eq(skv_cache_evict(world.cache, record_of(0)), SKV_EAGAIN);
    cr_assert(offload_one(8));
    cr_assert_eq(info_of(0).stored, 40);
    cr_assert_eq(skv_cache_evict(world.cache, record_of(0)), 0);
    cr_assert_eq(info_of(0).resident, 0);
}

Test(cache_store, grooming_asks_for_the_tails_that_eviction_would_meet)
{
    setup(16);
    append(0, 10);
    append(1, 120);
    append(2, 112);
    skv_cache_groom(world.cache);
    while (offload_one(8))
        ;
    cr_assert_eq(info_of(0).stored, 10);
}

/* ---- flush ---- */

Test(cache_store, a_flush_waits_for_what_was_committed_before_it)
{
    setup(24);
    append(0, 40);
    uint64_t epoch = skv_cache_flush(world.cache);
    cr_assert_not(skv_cache_flushed(world.cache, epoch));
    append(1, 10); /* later: not waited for */
    while (offload_one(1))
        if (info_of(0).stored < 40)
            cr_assert_not(skv_cache_flushed(world.cache, epoch));
        else
            break;
    cr_assert(skv_cache_flushed(world.cache, epoch));
}

Test(cache_store, a_flush_of_nothing_is_done)
{
    setup(16);
    cr_assert(skv_cache_flushed(world.cache, skv_cache_flush(world.cache)));
    append(0, 40);
    store_all();
    cr_assert(skv_cache_flushed(world.cache, skv_cache_flush(world.cache)));
}

Test(cache_store, commits_after_a_flush_do_not_hold_it_up)
{
    setup(24);
    append(0, 20);
    uint64_t epoch = skv_cache_flush(world.cache);
    cr_assert(offload_begin(4, false));
    append(0, 40); /* while the first 20 are on their way */
    settle_mover();
    cr_assert(skv_cache_flushed(world.cache, epoch));
    cr_assert_eq(info_of(0).stored, 20);
}

Test(cache_store, thousands_of_flushes_may_wait)
{
    setup(24);
    append(0, 20);
    uint64_t first = skv_cache_flush(world.cache), last = first;
    for (uint32_t i = 0; i < 5000; i++)
        last = skv_cache_flush(world.cache);
    append(1, 20);
    cr_assert_not(skv_cache_flushed(world.cache, first));
    while (offload_one(8))
        ;
    cr_assert(skv_cache_flushed(world.cache, first));
    cr_assert(skv_cache_flushed(world.cache, last));
    skv_cache_check(world.cache);
}

Test(cache_store, a_flushed_tail_is_owed_even_when_it_is_swapped)
{
    setup(24);
    append(0, 10);
    acquire(1, 0, 0, 12);
    fence(1);
    acquire(2, 0, 0, 25); /* on a fresh page */
    uint64_t epoch = skv_cache_flush(world.cache);
    finish(2, 0, true);
    cr_assert_not(skv_cache_flushed(world.cache, epoch));
    while (offload_one(8))
        ;
    cr_assert(skv_cache_flushed(world.cache, epoch));
    cr_assert_eq(info_of(0).stored, 25);
}

/* ---- shortening what is stored ---- */

Test(cache_store, truncate_rounds_down_to_a_page_and_tells_the_store)
{
    setup(16);
    append(0, 60);
    store_all();
    uint32_t kept;
    uint64_t change;
    cr_assert_eq(skv_cache_truncate(world.cache, record_of(0), 47, NULL, &kept, &change), 0);
    cr_assert_eq(kept, 32);
    cr_assert_neq(change, 0);
    take_actions();
    sync_users(true);
    settle_mover();
    cr_assert_eq(world.store[0].tokens, 32);
    cr_assert_eq(acquire(1, 0, 0, 60)->grant.cached, 32);
}

Test(cache_store, truncate_to_more_than_there_is_changes_nothing)
{
    setup(16);
    append(0, 40);
    uint32_t kept;
    uint64_t change, generation = info_of(0).generation;
    cr_assert_eq(skv_cache_truncate(world.cache, record_of(0), 40, NULL, &kept, &change), 0);
    cr_assert_eq(kept, 40);
    cr_assert_eq(change, 0);
    cr_assert_eq(info_of(0).generation, generation);
}

Test(cache_store, truncate_of_a_user_that_is_only_stored_needs_its_hashes)
{
    setup(16);
    put_away(0, 60);
    uint32_t kept;
    uint64_t change, hashes[WORLD_PAGES];
    struct skv_known known = {0};
    uint32_t record = record_of(0);
    cr_assert_eq(skv_cache_truncate(world.cache, record, 40, NULL, &kept, &change), SKV_EAGAIN);
    cr_assert(look_up(0, &known, hashes));
    cr_assert_eq(skv_cache_truncate(world.cache, record, 40, &known, &kept, &change), 0);
    cr_assert_eq(kept, 32);
    take_actions();
    sync_users(true);
    settle_mover();
    cr_assert_eq(acquire(1, 0, 0, 60)->grant.cached, 32);
}

Test(cache_store, hashes_of_another_history_truncate_further_never_less)
{
    setup(16);
    put_away(0, 60);
    uint32_t kept;
    uint64_t change, hashes[WORLD_PAGES];
    struct skv_known known = {0};
    cr_assert(look_up(0, &known, hashes));
    hashes[2]++;
    cr_assert_eq(skv_cache_truncate(world.cache, record_of(0), 40, &known, &kept, &change), 0);
    cr_assert_eq(kept, 0);
}

Test(cache_store, forget_outlives_an_offload_in_flight)
{
    setup(16);
    append(0, 60);
    offload_begin(8, true);
    cr_assert_neq(forget(0), 0);
    offload_copy(0);
    write_step(0, 0); /* the writer did not see that it was dropped */
    settle_mover();
    cr_assert_eq(world.store[0].tokens, 0);
    cr_assert_eq(record_of(0), SKV_NONE);
    cr_assert_eq(stats_now().pool_pages_free, 16);
}

Test(cache_store, forget_outlives_an_onboard_in_flight)
{
    setup(16);
    put_away(0, 60);
    acquire(1, 0, 0, 70);
    onboard_step(&world.onboards[0]);
    onboard_step(&world.onboards[0]);
    forget(0);
    struct view *view = acquire(2, 0, 0, 70);
    cr_assert_eq(view->grant.cached, 0);
    settle_mover();
    run_pass(1, 0);
    uint64_t lease = sessions[1].rows[0].views[0].grant.lease;
    cr_assert_eq(end_lease(1, 0, lease, true).status, SKV_ESTALE);
    finish(2, 0, true);
    cr_assert_eq(info_of(0).committed, 70);
}

Test(cache_store, generations_only_grow)
{
    setup(24);
    uint64_t last = 0;
    for (uint32_t i = 0; i < 20; i++) {
        acquire(0, 0, 0, 20 + i);
        finish(0, 0, true);
        cr_assert_geq(info_of(0).generation, last);
        last = info_of(0).generation;
        if (i % 3 == 0)
            forget(0);
        else if (i % 3 == 1)
            finish(1, 0, (acquire_edited(1, 0, 0, 20, 3), false));
        settle_mover();
        cr_assert_eq(world.table->generation, skv_cache_generation(world.cache));
    }
    restart();
    cr_assert_gt(skv_cache_generation(world.cache), last);
}

/* ---- the store's own eviction, and a new daemon ---- */

Test(cache_store, the_store_evicts_its_least_recently_used_user_that_is_not_resident)
{
    setup(24);
    for (uint32_t u = 0; u < 3; u++)
        append(u, 20);
    store_all();
    for (uint32_t u = 1; u < 3; u++)
        evict(u);
    cr_assert_neq(skv_cache_evict_stored(world.cache), 0);
    take_actions();
    sync_users(true);
    settle_mover();
    cr_assert_eq(record_of(1), SKV_NONE); /* 0 is older, and in use */
    cr_assert_eq(world.store[1].tokens, 0);
    cr_assert_eq(world.store[0].tokens, 20);
    cr_assert_neq(skv_cache_evict_stored(world.cache), 0);
    cr_assert_eq(skv_cache_evict_stored(world.cache), 0);
}

Test(cache_store, a_new_daemon_serves_what_was_stored)
{
    setup(24);
    append(0, 60);
    store_all();
    append(1, 40);
    offload_one(8); /* full pages only */
    restart();
    cr_assert_eq(info_of(0).stored, 60);
    cr_assert_eq(info_of(1).stored, 32);
    session_open(0);
    struct view *view = acquire(0, 0, 0, 70);
    cr_assert_eq(view->grant.cached, 60);
    settle_mover();
    finish(0, 0, true);
    view = acquire(0, 0, 1, 40);
    cr_assert_eq(view->grant.cached, 32);
    settle_mover();
    finish(0, 0, true);
    cr_assert_eq(info_of(1).committed, 40);
}

Test(cache_store, restored_users_leave_in_the_order_of_their_last_use)
{
    setup(24);
    for (uint32_t u = 0; u < 3; u++) {
        append(u, 20);
        store_all();
        later(5000);
    }
    world.store[2].last_use_s = 1; /* as written by a daemon with another clock */
    restart();
    cr_assert_neq(skv_cache_evict_stored(world.cache), 0);
    cr_assert_eq(record_of(2), SKV_NONE);
    cr_assert_neq(skv_cache_evict_stored(world.cache), 0);
    cr_assert_eq(record_of(0), SKV_NONE);
}

Test(cache_store, impossible_records_are_not_restored)
{
    setup(16);
    struct skv_record record = {
        .model = {.lo = 5}, .user = {.lo = 6}, .generation = 1, .tokens = 20};
    const uint64_t hashes[2] = {1, 2};
    struct skv_record wrong = record;
    append(0, 20); /* so that generation 1 has been handed out */
    cr_assert_eq(skv_cache_restore(world.cache, &record, hashes), 0);
    cr_assert_eq(skv_cache_restore(world.cache, &record, hashes), SKV_EINVAL); /* twice */
    wrong.user.lo = 7;
    wrong.tokens = 0;
    cr_assert_eq(skv_cache_restore(world.cache, &wrong, hashes), SKV_EINVAL);
    wrong.tokens = SKV_MAX_TOKENS + 1;
    cr_assert_eq(skv_cache_restore(world.cache, &wrong, hashes), SKV_EINVAL);
    wrong.tokens = 20;
    wrong.generation = 1000000;
    cr_assert_eq(skv_cache_restore(world.cache, &wrong, hashes), SKV_EINVAL);
    wrong.generation = 1;
    wrong.model.lo = 0;
    cr_assert_eq(skv_cache_restore(world.cache, &wrong, hashes), SKV_EINVAL);
}

/* ---- the descriptor table ---- */

Test(cache_store, the_table_alone_says_who_owns_what)
{
    setup(24);
    append(0, 60);
    append(1, 40);
    tag tags[WORLD_TOKENS];
    cr_assert_eq(rebuild(0, tags), 60);
    cr_assert_eq(memcmp(tags, world.users[0].committed, 60 * sizeof(tag)), 0);
    cr_assert_eq(rebuild(1, tags), 40);
    check_table();
}

Test(cache_store, the_table_tells_loading_and_appending_pages_apart)
{
    setup(24);
    put_away(0, 40);
    struct view *view = acquire(1, 0, 0, 60);
    struct wire_descriptor tail = descriptor(view->pages[2]), own = descriptor(view->pages[3]);
    cr_assert_eq(tail.flags,
                 WIRE_PAGE_USED | WIRE_PAGE_VALID | WIRE_PAGE_LOADING | WIRE_PAGE_APPENDING);
    cr_assert_eq(tail.valid, 8);
    cr_assert_eq(tail.session, sessions[1].slot);
    cr_assert_eq(own.flags, WIRE_PAGE_USED | WIRE_PAGE_APPENDING);
    cr_assert_eq(own.index, 3);
    tag tags[WORLD_TOKENS];
    cr_assert_eq(rebuild(0, tags), 0);
    settle_mover();
    cr_assert_eq(descriptor(view->pages[2]).flags,
                 WIRE_PAGE_USED | WIRE_PAGE_VALID | WIRE_PAGE_APPENDING);
    cr_assert_eq(rebuild(0, tags), 40);
    finish(1, 0, true);
    cr_assert_eq(rebuild(0, tags), 60);
}

Test(cache_store, a_forgotten_user_is_not_rebuilt_from_pages_that_are_still_leased)
{
    setup(24);
    append(0, 60);
    acquire(1, 0, 0, 60);
    forget(0);
    tag tags[WORLD_TOKENS];
    cr_assert_eq(rebuild(0, tags), 0);
    cr_assert_eq(stats_now().pool_pages_free, 20); /* but they are not free either */
    check_table();
    settle_mover();
}

Test(cache_store, a_truncated_user_that_grew_again_is_rebuilt_from_its_new_pages)
{
    setup(24);
    append(0, 60);
    acquire(1, 0, 0, 60); /* holds the old ones */
    struct view *view = acquire_edited(2, 0, 0, 70, 20);
    cr_assert(appends(view));
    finish(2, 0, true);
    tag tags[WORLD_TOKENS];
    cr_assert_eq(rebuild(0, tags), 70);
    cr_assert_eq(memcmp(tags, world.users[0].committed, 70 * sizeof(tag)), 0);
}

Test(cache_store, without_a_store_nothing_is_offloaded_and_flush_is_done)
{
    world_open((struct skv_cache_options){
        .pages = 16, .sessions = SESSIONS, .max_records = 8, .lease_ms = 300, .tail_ms = 500});
    workers_open();
    session_open(0);
    append(0, 60);
    cr_assert_not(offload_begin(4, true));
    cr_assert(skv_cache_flushed(world.cache, skv_cache_flush(world.cache)));
    cr_assert_eq(skv_cache_evict(world.cache, record_of(0)), 0);
    cr_assert_eq(record_of(0), SKV_NONE);
}

/* ---- a stored tail and hot restarts ---- */

/* All that is under way is copied, and nothing written. */
static void copy_all(void)
{
    for (uint32_t i = 0; i < WORLD_JOBS; i++)
        while (onboard_step(&world.onboards[i]))
            ;
    while (take_event())
        ;
}

/* A user with a stored tail gets a new generation that the store has not heard of: cut behind the
 * tail. Then it is dropped to what is stored, and loaded. */
static void outdate_the_store(void)
{
    setup(8);
    append(0, S + 7);
    store_all();
    append(0, 3 * S + 4);
    acquire_edited(0, 0, 0, 3 * S + 6, 2 * S + 3);
    finish(0, 0, false);
    cr_assert_eq(info_of(0).committed, 2 * S);
    append(1, 8 * S);
    cr_assert_eq(info_of(0).committed, S + 7);
    cr_assert_eq(info_of(0).resident, 0);
    acquire(0, 0, 0, S + 7);
    copy_all();
    finish(0, 0, false);
    cr_assert_eq(info_of(0).resident, S + 7);
}

/* It is appended to as soon as the store has taken it, and then cut by no restart. */
static void check_told(uint32_t stored)
{
    for (int told = 0; told < 2; told++) {
        struct view *view = acquire(0, 0, 0, 2 * S);
        cr_expect_eq(view->grant.cached, stored);
        cr_assert_eq(appends(view), told);
        finish(0, 0, told);
        if (!told)
            settle_mover();
    }
    hot_restart(false);
    cr_expect_eq(info_of(0).committed, 2 * S);
    cr_expect_eq(info_of(0).stored, stored);
}

Test(cache_store, a_stored_tail_is_appended_to_only_once_the_store_knows_its_generation)
{
    outdate_the_store();
    check_told(S + 7);
}

Test(cache_store, nor_while_the_store_refuses_to_know_it)
{
    outdate_the_store();
    for (int i = 0; i < 3; i++) {
        cr_assert(write_step(i % 2 ? SKV_EIO : SKV_ENOSPC, 0));
        while (take_event())
            ;
        cr_expect_not(appends(acquire(0, 0, 0, 2 * S)));
        finish(0, 0, false);
    }
    check_told(S + 7);
}

Test(cache_store, after_a_hot_restart_too)
{
    outdate_the_store();
    hot_restart(false);
    session_open(0);
    check_told(S + 7);
}

/* A user with a stored tail that is being replaced by an offload of all it has, and is cut behind
 * the tail meanwhile; also before the offload, if it is cut twice. */
static void cut_meanwhile_and_before(int cuts)
{
    setup(8);
    append(0, 7);
    store_all();
    while (cuts--) {
        append(0, 3 * S + 4);
        cr_assert(cuts || offload_begin(8, true));
        acquire_edited(0, 0, 0, 3 * S + 6, 2 * S + 3);
        finish(0, 0, false);
        cr_assert_eq(info_of(0).committed, 2 * S);
        cr_expect_eq(info_of(0).stored, 7);
    }
}

static void cut_meanwhile(void)
{
    cut_meanwhile_and_before(1);
}

Test(cache_store, a_cut_behind_a_stored_tail_costs_it_not)
{
    cut_meanwhile();
    settle_mover();
    cr_expect_eq(info_of(0).stored, 2 * S);
    cr_expect_eq(world.store[0].tokens, 2 * S);
    cr_expect_eq(world.store[0].generation, info_of(0).generation);
    append(0, 2 * S + 5);
    hot_restart(false);
    cr_expect_eq(info_of(0).committed, 2 * S + 5);
    cr_expect_eq(info_of(0).stored, 2 * S);
}

Test(cache_store, nor_where_the_offload_fails)
{
    cut_meanwhile();
    cr_assert(offload_copy(0));
    cr_assert(write_step(SKV_EIO, 0));
    while (take_event())
        ;
    cr_expect_eq(info_of(0).stored, 7);
    settle_mover();
    cr_expect_eq(world.store[0].tokens, 7);
    cr_expect_eq(world.store[0].generation, info_of(0).generation);
    cr_expect(offload_one(8));
    cr_expect_eq(info_of(0).stored, 2 * S);
}

/* Who wants to append has the store told. */
static void check_starved(int cuts)
{
    cut_meanwhile_and_before(cuts);
    cr_assert(offload_copy((uint32_t)cuts - 1));
    cr_assert(cuts == 1 || write_step(0, 0));
    cr_assert(write_step(SKV_EIO, 0));
    world.starved = true;
    while (take_event())
        ;
    world.starved = false;
    cr_assert_eq(world.write_count, 0);
    append(1, 8 * S); /* it is dropped to what is stored */
    acquire(0, 0, 0, 7);
    copy_all();
    finish(0, 0, false);
    cr_assert_eq(info_of(0).resident, 7);
    check_told(7);
}

Test(cache_store, nor_where_there_is_no_memory_to_tell_the_store)
{
    check_starved(1);
}

Test(cache_store, nor_where_there_is_none_and_it_was_just_told_of_another_cut)
{
    check_starved(2);
}

Test(cache_store, nor_where_a_restart_finds_none)
{
    outdate_the_store();
    hot_restart_begin(false);
    world.starved = true;
    while (world.early)
        hot_restart_step();
    world.starved = false;
    cr_assert_eq(world.write_count, 0);
    session_open(0);
    check_told(S + 7);
}

static uint32_t stored_after(bool written, bool hot)
{
    cut_meanwhile();
    cr_assert(offload_copy(0));
    cr_assert(!written || write_step(0, 0));
    if (hot)
        hot_restart(false);
    else
        restart();
    return info_of(0).stored;
}

Test(cache_store, nor_where_the_daemon_is_killed_before_the_write)
{
    cr_expect_eq(stored_after(false, false), 7);
}

Test(cache_store, nor_where_it_is_killed_behind_it)
{
    cr_expect_eq(stored_after(true, false), 3 * S + 4); /* of the older history */
}

Test(cache_store, nor_where_the_pool_outlives_it)
{
    cr_expect_eq(stored_after(false, true), 7);
}

Test(cache_store, nor_where_both_outlive_it)
{
    cr_expect_eq(stored_after(true, true), 3 * S + 4); /* nothing was committed that says other */
}

Test(cache_store, a_user_that_is_forgotten_waits_for_no_offload)
{
    cut_meanwhile();
    forget(0);
    cr_expect_eq(info_of(0).committed, 0);
    settle_mover();
    cr_expect_eq(world.store[0].tokens, 0);
}
