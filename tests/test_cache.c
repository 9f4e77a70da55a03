/* The rules of the cache core, one claim each, in the simulated world of cache_workers.h, which
 * also judges every grant and every page that these tests come by. */
#include <criterion/criterion.h>

#include "cache_steps.h"

/* ---- matching ---- */

Test(cache, an_unknown_user_gets_pages_for_its_whole_history)
{
    setup(16);
    struct view *view = acquire(0, 0, 0, 40);
    cr_assert(appends(view));
    cr_assert_eq(view->grant.cached, 0);
    cr_assert_eq(view->grant.page_count, 3);
    finish(0, 0, true);
    cr_assert_eq(info_of(0).committed, 40);
}

Test(cache, a_longer_history_is_granted_its_committed_prefix)
{
    setup(16);
    append(0, 40);
    struct view *view = acquire(1, 0, 0, 60);
    cr_assert_eq(view->grant.cached, 40);
    cr_assert_eq(view->grant.gpu_tokens, 40);
    cr_assert_eq(view->grant.tail_valid, 8);
    cr_assert_eq(view->grant.page_count, 4);
    cr_assert(appends(view));
}

Test(cache, the_same_history_again_is_all_there_and_is_not_appended_to)
{
    setup(16);
    append(0, 40);
    struct view *view = acquire(1, 0, 0, 40);
    cr_assert_eq(view->grant.cached, 40);
    cr_assert_eq(view->grant.tail_valid, 0); /* proven by the request's own hash */
    cr_assert_not(appends(view));
}

Test(cache, a_shorter_history_reads_and_never_cuts)
{
    setup(16);
    append(0, 60);
    struct view *view = acquire(1, 0, 0, 37);
    cr_assert_eq(view->grant.cached, 32);
    cr_assert_not(appends(view));
    finish(1, 0, true);
    cr_assert_eq(info_of(0).committed, 60);
}

Test(cache, max_cached_alone_never_cuts)
{
    setup(16);
    append(0, 60);
    struct view view;
    history(&view, 0, 80, 0, 0);
    view.max_cached = 20;
    cr_assert_eq(acquire_view(1, 0, view)->grant.cached, 20);
    cr_assert_not(appends(&sessions[1].rows[0].views[0]));
    finish(1, 0, true);
    view.max_cached = 55; /* within the tail, which cannot be checked in part */
    cr_assert_eq(acquire_view(1, 0, view)->grant.cached, 48);
    finish(1, 0, true);
    cr_assert_eq(info_of(0).committed, 60);
}

Test(cache, a_proven_mismatch_of_a_full_page_cuts_there)
{
    setup(16);
    append(0, 60);
    uint64_t generation = info_of(0).generation;
    struct view *view = acquire_edited(1, 0, 0, 60, 20);
    cr_assert_eq(view->grant.cached, 16);
    cr_assert(appends(view));
    cr_assert_eq(info_of(0).committed, 16);
    cr_assert_gt(info_of(0).generation, generation);
    finish(1, 0, true);
    cr_assert_eq(info_of(0).committed, 60);
}

Test(cache, a_tail_of_the_same_length_that_differs_is_cut)
{
    setup(16);
    append(0, 40);
    struct view *view = acquire_edited(1, 0, 0, 40, 39);
    cr_assert_eq(view->grant.cached, 32);
    cr_assert(appends(view));
}

/* The worker of session s releases what it was granted, and acquires again. */
static struct view *echo_tail(uint32_t s)
{
    struct view again = sessions[s].rows[0].views[0];
    uint32_t committed = info_of(0).committed;
    finish(s, 0, false);
    cr_assert_eq(info_of(0).committed, committed);
    again.flags = WIRE_TAIL_DIFFERS;
    again.max_cached = again.grant.cached - again.grant.cached % S;
    again.tail_hash = again.grant.tail_hash;
    return acquire_view(s, 0, again);
}

Test(cache, a_tail_that_only_the_worker_can_judge_is_cut_when_it_echoes_its_hash)
{
    setup(16);
    append(0, 40);
    struct view *view = acquire_edited(1, 0, 0, 60, 38);
    cr_assert_eq(view->grant.cached, 40);
    cr_assert_eq(view->grant.tail_valid, 8);
    cr_assert_not(view->proven); /* so it releases and acquires again */
    view = echo_tail(1);
    cr_assert_eq(view->grant.cached, 32);
    cr_assert(appends(view));
    cr_assert_eq(info_of(0).committed, 32);
}

/* A user with a stored tail that a fenced session may write to: others append to a fresh page. */
static void hold_tail(void)
{
    setup(24);
    append(0, 40);
    store_all();
    acquire(1, 0, 0, 44);
    fence(1);
}

Test(cache, an_edited_tail_is_cut_before_a_fresh_page_replaces_it)
{
    hold_tail();
    uint64_t generation = info_of(0).generation;
    struct view *view = acquire_edited(2, 0, 0, 60, 38);
    cr_assert_eq(view->grant.cached, 32);
    cr_assert(appends(view));
    cr_assert_eq(view->grant.tail_valid, 8);
    cr_assert_not(view->proven);
    view = echo_tail(2);
    cr_assert_eq(view->grant.cached, 32);
    cr_assert(appends(view));
    cr_assert_eq(view->grant.tail_valid, 0);
    cr_assert_gt(info_of(0).generation, generation);
    cr_assert_eq(info_of(0).stored, 32);
    finish(2, 0, true);
    cr_assert_eq(info_of(0).committed, 60);
}

Test(cache, one_that_is_the_same_stays_stored)
{
    hold_tail();
    uint64_t generation = info_of(0).generation;
    struct view *view = acquire(2, 0, 0, 60);
    cr_assert_eq(view->grant.cached, 32);
    cr_assert_eq(view->grant.tail_valid, 8);
    cr_assert(view->proven);
    finish(2, 0, true);
    cr_assert_eq(info_of(0).committed, 60);
    cr_assert_eq(info_of(0).stored, 40);
    cr_assert_eq(info_of(0).generation, generation);
}

Test(cache, an_echo_of_another_tail_proves_nothing)
{
    setup(16);
    append(0, 40);
    struct view view;
    history(&view, 0, 60, 38, 1);
    view.flags = WIRE_TAIL_DIFFERS;
    view.max_cached = 32;
    view.tail_hash = 12345;
    cr_assert_eq(acquire_view(1, 0, view)->grant.cached, 32);
    cr_assert_not(appends(&sessions[1].rows[0].views[0]));
    cr_assert_eq(info_of(0).committed, 40);
}

Test(cache, one_user_of_two_models_is_two_users)
{
    setup(16);
    append(0, 40);
    struct view *view = acquire(SESSIONS - 1, 0, WORLD_USERS - 1, 40);
    cr_assert_eq(view->grant.cached, 0);
    finish(SESSIONS - 1, 0, true);
    cr_assert_eq(stats_now().users_resident, 2);
}

Test(cache, a_stored_history_is_matched_by_its_hash_array_once_it_is_read)
{
    setup(16);
    put_away(0, 60);
    struct view view;
    history(&view, 0, 60, 20, 1);
    struct sim_row *row = &sessions[1].rows[0];
    row->count = 1;
    row->views[0] = view;
    cr_assert(acquire_begin(1, 0, true));
    cr_assert_eq(row->known_count, 1);
    acquire_end(1, 0);
    cr_assert_eq(row->views[0].grant.cached, 16);
    cr_assert_eq(info_of(0).stored, 16);
}

Test(cache, an_unread_hash_array_is_a_miss_not_a_cut)
{
    setup(16);
    put_away(0, 60);
    struct sim_row *row = &sessions[1].rows[0];
    row->count = 1;
    history(&row->views[0], 0, 60, 20, 1);
    cr_assert(acquire_begin(1, 0, false));
    acquire_end(1, 0);
    cr_assert_eq(row->views[0].grant.cached, 0);
    cr_assert_not(appends(&row->views[0]));
    cr_assert_eq(info_of(0).stored, 60);
}

/* ---- leases ---- */

Test(cache, one_appends_and_many_read)
{
    setup(24);
    append(0, 40);
    cr_assert(appends(acquire(0, 0, 0, 60)));
    cr_assert_not(appends(acquire(1, 0, 0, 60)));
    cr_assert_not(appends(acquire(2, 0, 0, 70)));
    cr_assert_eq(info_of(0).leases, 3);
    finish(1, 0, true);
    finish(0, 0, true);
    finish(2, 0, true);
    cr_assert_eq(info_of(0).committed, 60);
}

Test(cache, a_user_named_twice_in_a_batch_is_appended_to_once)
{
    setup(24);
    append(0, 40);
    struct sim_row *row = &sessions[1].rows[0];
    row->count = 2;
    history(&row->views[0], 0, 60, 0, 0);
    history(&row->views[1], 0, 60, 0, 0);
    cr_assert(acquire_begin(1, 0, true));
    acquire_end(1, 0);
    cr_assert(appends(&row->views[0]));
    cr_assert_not(appends(&row->views[1]));
    cr_assert_eq(row->views[1].grant.cached, 40);
    finish(1, 0, true);
    cr_assert_eq(info_of(0).committed, 60);
}

Test(cache, what_was_released_counts_for_nothing)
{
    setup(16);
    append(0, 40);
    acquire(1, 0, 0, 60);
    finish(1, 0, false);
    cr_assert_eq(info_of(0).committed, 40);
    cr_assert_eq(stats_now().pool_pages_free, 13);
    cr_assert_eq(acquire(2, 0, 0, 60)->grant.cached, 40);
}

Test(cache, a_lease_ends_once)
{
    setup(16);
    uint64_t lease = acquire(0, 0, 0, 40)->grant.lease;
    finish(0, 0, true);
    cr_assert_eq(end_lease(0, 0, lease, true).status, SKV_ESTALE);
    acquire(0, 0, 0, 60);
    cr_assert_eq(end_lease(0, 0, lease, true).status, SKV_ESTALE);
    cr_assert_eq(info_of(0).committed, 40);
}

Test(cache, a_lease_of_another_session_or_row_is_stale)
{
    setup(16);
    uint64_t lease = acquire(0, 0, 0, 40)->grant.lease;
    acquire(1, 0, 1, 40);
    cr_assert_eq(end_lease(0, 1, lease, true).status, SKV_ESTALE);
    cr_assert_eq(end_lease(1, 1, lease, true).status, SKV_ESTALE);
    for (uint64_t entry = 0; entry < 256; entry++)
        if (entry)
            cr_assert_eq(end_lease(0, 0, lease ^ entry, true).status, SKV_ESTALE);
    cr_assert_eq(info_of(0).leases, 1);
}

Test(cache, a_row_belongs_to_one_batch)
{
    setup(16);
    acquire(0, 0, 0, 40);
    struct skv_batch_input *input;
    cr_assert_eq(skv_cache_input(world.cache, sessions[0].slot, 0, &input), SKV_EBUSY);
    cr_assert_eq(skv_cache_input(world.cache, sessions[0].slot, 1, &input), 0);
    finish(0, 0, true);
    cr_assert_eq(skv_cache_input(world.cache, sessions[0].slot, 0, &input), 0);
}

Test(cache, leases_of_a_cut_user_are_stale)
{
    setup(24);
    append(0, 40);
    acquire(0, 0, 0, 60);
    uint32_t kept;
    uint64_t change;
    cr_assert_eq(skv_cache_truncate(world.cache, record_of(0), 20, NULL, &kept, &change), 0);
    cr_assert_eq(kept, 16);
    take_actions();
    sync_users(true);
    uint64_t lease = sessions[0].rows[0].views[0].grant.lease;
    run_pass(0, 0);
    cr_assert(appends(acquire(1, 0, 0, 50))); /* it holds nobody up */
    cr_assert_eq(end_lease(0, 0, lease, true).status, SKV_ESTALE);
    cr_assert_eq(info_of(0).committed, 16);
}

Test(cache, a_user_that_was_only_leased_is_forgotten_too)
{
    setup(24);
    uint64_t lease = acquire(0, 0, 0, 40)->grant.lease;
    run_pass(0, 0);
    uint32_t kept;
    uint64_t change;
    cr_assert_eq(skv_cache_truncate(world.cache, record_of(0), 0, NULL, &kept, &change), 0);
    cr_assert_neq(change, 0);
    take_actions();
    cr_assert_eq(end_lease(0, 0, lease, true).status, SKV_ESTALE);
    cr_assert_eq(record_of(0), SKV_NONE);
    cr_assert_eq(stats_now().pool_pages_free, 24);
    settle_mover();
}

/* ---- fencing and quarantine ---- */

Test(cache, a_fenced_session_commits_nothing)
{
    setup(16);
    uint64_t lease = acquire(0, 0, 0, 40)->grant.lease;
    run_pass(0, 0);
    fence(0);
    cr_assert_eq(end_lease(0, 0, lease, true).status, SKV_ESTALE);
    cr_assert_eq(info_of(0).committed, 0);
    cr_assert_eq(stats_now().fenced_leases, 1);
}

Test(cache, pages_of_a_fenced_session_wait_until_it_is_gone)
{
    setup(6);
    append(0, 32);
    acquire(1, 0, 0, 64); /* holds all four of the user's pages */
    fence(1);
    cr_assert_eq(stats_now().pool_pages_quarantined, 4);
    struct view *view = acquire(0, 0, 1, 90); /* wants six, gets none */
    cr_assert_not(appends(view));
    finish(0, 0, true);
    cr_assert_eq(acquire(0, 0, 0, 32)->grant.cached, 32); /* committed tokens are everybody's */
    finish(0, 0, true);
    session_gone(1);
    cr_assert_eq(stats_now().pool_pages_quarantined, 0);
    cr_assert(appends(acquire(0, 0, 1, 90)));
}

Test(cache, a_tail_that_a_fenced_lease_may_write_gets_a_fresh_page)
{
    setup(24);
    append(0, 40);
    uint32_t tail = acquire(1, 0, 0, 44)->pages[2];
    fence(1);
    struct view *view = acquire(2, 0, 0, 60);
    cr_assert(appends(view));
    cr_assert_eq(view->grant.cached, 32); /* those few tokens are computed again */
    cr_assert_neq(view->pages[2], tail);
    finish(2, 0, false);
    view = acquire(3, 0, 0, 60); /* and the next but one too */
    cr_assert_eq(view->grant.cached, 32);
    cr_assert_neq(view->pages[2], tail);
    run_pass(1, 0); /* the fenced one's pass goes on meanwhile */
    finish(3, 0, true);
    cr_assert_eq(info_of(0).committed, 60);
    cr_assert_eq(acquire(2, 0, 0, 60)->grant.cached, 60);
}

Test(cache, an_append_lease_held_too_long_is_fenced_for_another_session)
{
    setup(24);
    acquire(0, 0, 0, 40);
    later(300);
    cr_assert_not(appends(acquire(1, 0, 0, 40)));
    finish(1, 0, true);
    later(1);
    cr_assert(appends(acquire(1, 0, 0, 40)));
    cr_assert_eq(sessions[0].state, ZOMBIE);
}

Test(cache, a_session_does_not_fence_itself)
{
    setup(24);
    acquire(0, 0, 0, 40);
    later(10000);
    cr_assert_not(appends(acquire(0, 1, 0, 40)));
    cr_assert_eq(sessions[0].state, LIVE);
    finish(0, 0, true);
    cr_assert_eq(info_of(0).committed, 40);
}

Test(cache, a_session_with_copies_in_flight_is_gone_only_after_them)
{
    setup(24);
    put_away(0, 40);
    cr_assert(gated(acquire(1, 0, 0, 60)));
    fence(1);
    session_gone(1);
    cr_assert_eq(sessions[1].state, GONE);
    settle_mover();
    session_gone(1);
    cr_assert_eq(sessions[1].state, CLOSED);
}

/* ---- pages: who is evicted, and who is not ---- */

Test(cache, the_least_recently_used_stored_user_is_evicted_first)
{
    setup(9);
    append(0, 48);
    append(1, 48);
    append(2, 48);
    store_all();
    finish(0, 0, (acquire(0, 0, 0, 48), false)); /* used again: user 1 is the oldest */
    append(3, 40);
    cr_assert_eq(info_of(1).resident, 0);
    cr_assert_eq(info_of(0).resident, 48);
    cr_assert_eq(info_of(2).resident, 48);
    cr_assert_eq(info_of(1).stored, 48);
    cr_assert_eq(stats_now().dropped_tokens, 0);
}

Test(cache, a_stored_user_goes_before_an_older_unstored_one)
{
    setup(9);
    append(0, 48);
    append(1, 48);
    store_all();
    append(2, 48); /* not stored; then used least recently */
    finish(0, 0, (acquire(0, 0, 0, 48), false));
    finish(0, 0, (acquire(0, 0, 1, 48), false));
    append(3, 30);
    cr_assert_eq(info_of(2).resident, 48);
    cr_assert_eq(info_of(0).resident, 0);
}

Test(cache, an_unstored_user_is_dropped_when_nothing_else_helps_and_counted)
{
    setup(6);
    append(0, 48);
    append(1, 40);
    append(2, 40);
    cr_assert_eq(record_of(0), SKV_NONE);
    cr_assert_eq(stats_now().dropped_tokens, 48);
    cr_assert_eq(info_of(1).committed, 40);
}

Test(cache, a_leased_page_is_never_evicted)
{
    setup(6);
    append(0, 48);
    store_all();
    acquire(1, 0, 0, 48);
    struct view *view = acquire(2, 0, 1, 90);
    cr_assert_not(appends(view));
    cr_assert_eq(info_of(0).resident, 48);
    uint32_t record = record_of(0);
    cr_assert_eq(skv_cache_evict(world.cache, record), SKV_EBUSY);
}

Test(cache, a_full_pool_grants_without_append)
{
    setup(4);
    acquire(0, 0, 0, 64);
    struct view *view = acquire(1, 0, 1, 20);
    cr_assert_not(appends(view));
    cr_assert_eq(view->grant.status, 0);
    cr_assert_eq(stats_now().append_refused, 1);
    finish(1, 0, true);
    cr_assert_eq(record_of(1), SKV_NONE);
}

Test(cache, a_full_pool_shortens_the_prefix_that_is_brought_back)
{
    setup(6);
    put_away(0, 64);
    acquire(1, 0, 1, 64); /* four of six */
    struct view *view = acquire(2, 0, 0, 80);
    cr_assert_eq(view->grant.cached, 32);
    cr_assert_not(appends(view));
    cr_assert_eq(stats_now().full_pool, 1);
    settle_mover();
    finish(2, 0, true);
    cr_assert_eq(info_of(0).stored, 64);
}

Test(cache, a_full_table_of_users_grants_nothing_but_status_0)
{
    world_open((struct skv_cache_options){
        .pages = 16, .sessions = SESSIONS, .max_records = 1, .lease_ms = 300, .store = true});
    workers_open();
    for (uint32_t s = 0; s < SESSIONS; s++)
        session_open(s);
    append(0, 20);
    struct view *view = acquire(1, 0, 1, 20);
    cr_assert_not(appends(view));
    cr_assert_eq(view->grant.cached, 0);
    finish(1, 0, true);
}

/* ---- onboarding ---- */

Test(cache, a_stored_user_comes_back_behind_gates)
{
    setup(16);
    put_away(0, 40);
    struct view *view = acquire(1, 0, 0, 60);
    cr_assert_eq(view->grant.cached, 40);
    cr_assert_eq(view->grant.gpu_tokens, 0);
    cr_assert(gated(view) && view->grant.flags & SKV_GRANT_STORE);
    cr_assert_eq(sessions[1].rows[0].gates[0], 0);
    settle_mover();
    cr_assert_eq(sessions[1].rows[0].gates[0], 1);
    finish(1, 0, true);
    cr_assert_eq(info_of(0).committed, 60);
}

Test(cache, an_append_into_a_tail_that_is_being_onboarded_is_gated)
{
    setup(16);
    put_away(0, 40);
    finish(1, 0, (acquire(1, 0, 0, 40), false));
    struct view *view = acquire(2, 0, 0, 44); /* its only new page is the tail itself */
    cr_assert(gated(view) && appends(view));
    cr_assert_eq(view->grant.page_count, 3);
    cr_assert_not(run_step(&sessions[2], &sessions[2].rows[0], 1));
    settle_mover();
    finish(2, 0, true);
    cr_assert_eq(info_of(0).committed, 44);
}

Test(cache, a_batch_waits_for_every_onboard_of_its_users)
{
    setup(24);
    put_away(0, 60);
    struct view view;
    history(&view, 0, 60, 0, 0);
    view.max_cached = 32;
    acquire_view(1, 0, view); /* pages 0 and 1 */
    acquire(2, 0, 0, 60);     /* pages 2 and 3 */
    struct sim_onboard *first = &world.onboards[0], *second = &world.onboards[1];
    cr_assert_eq(second->job->after, first->id);
    while (onboard_step(second))
        ;
    cr_assert_eq(sessions[2].rows[0].gates[0], 0);
    while (onboard_step(first))
        ;
    while (onboard_step(second))
        ;
    cr_assert_eq(sessions[2].rows[0].gates[0], 1);
    finish(1, 0, true);
    finish(2, 0, true); /* before the loop hears of either */
    take_event();
    cr_assert(gated(acquire(3, 0, 0, 60))); /* one of them is still under way, as far as it knows */
    settle_mover();
    finish(3, 0, true);
    check_table();
}

Test(cache, a_commit_that_would_swap_a_tail_still_loading_is_stale)
{
    setup(24);
    put_away(0, 40);
    cr_assert(gated(acquire(1, 0, 0, 44)));
    fence(1); /* may write the tail, once it is there */
    struct view *view = acquire(2, 0, 0, 60);
    cr_assert_eq(view->grant.cached, 32);
    for (uint32_t i = 0; i < WORLD_JOBS; i++)
        while (onboard_step(&world.onboards[i]))
            ;
    uint64_t lease = view->grant.lease;
    run_pass(2, 0); /* its gates are open before the loop hears of it */
    cr_assert_eq(end_lease(2, 0, lease, true).status, SKV_ESTALE);
    settle_mover();
    cr_assert_eq(info_of(0).committed, 40);
    check_table();
}

Test(cache, no_onboard_means_none)
{
    setup(16);
    put_away(0, 40);
    struct view view;
    history(&view, 0, 40, 0, 0);
    view.flags = WIRE_NO_ONBOARD;
    cr_assert_eq(acquire_view(1, 0, view)->grant.cached, 0);
    cr_assert_eq(stats_now().onboard_jobs, 0);
}

Test(cache, a_batch_released_before_its_copies_frees_its_row_after_them)
{
    setup(16);
    put_away(0, 40);
    acquire(1, 0, 0, 60);
    row_end(1, 0, false, ~0u);
    cr_assert_eq(sessions[1].rows[0].phase, WAITING);
    struct skv_batch_input *input;
    cr_assert_eq(skv_cache_input(world.cache, sessions[1].slot, 0, &input), SKV_EBUSY);
    settle_mover();
    cr_assert_eq(sessions[1].rows[0].phase, IDLE);
    cr_assert_not(gated(acquire(1, 0, 0, 60)));
}

Test(cache, a_damaged_page_cuts_its_user_and_abandons_who_waits)
{
    setup(24);
    put_away(0, 60);
    put_away(1, 40);
    world.store[0].pages[2].damaged = true;
    struct sim_row *row = &sessions[1].rows[0];
    row->count = 2;
    history(&row->views[0], 0, 70, 0, 0);
    history(&row->views[1], 1, 50, 0, 0);
    cr_assert(acquire_begin(1, 0, true));
    acquire_end(1, 0);
    acquire(2, 0, 1, 60); /* waits for the same copies */
    settle_mover();
    sync_users(true);
    cr_assert_eq(info_of(0).committed, 32);
    cr_assert_eq(info_of(1).stored, 40); /* the other one only has to come again */
    cr_assert_eq(row->gates[WORLD_LAYERS], (uint32_t)SKV_ELOAD);
    cr_assert_eq(sessions[2].rows[0].gates[WORLD_LAYERS], (uint32_t)SKV_ELOAD);
    cr_assert_eq(stats_now().onboard_failures, 1);
    finish(1, 0, false);
    finish(2, 0, false);
    struct view *view = acquire(1, 0, 0, 70);
    cr_assert_eq(view->grant.cached, 32);
    settle_mover();
    finish(1, 0, true);
    cr_assert_eq(world.store[0].tokens, 32);
}

Test(cache, a_page_that_cannot_be_read_now_shortens_the_hit_and_is_asked_for_again)
{
    setup(24);
    put_away(0, 60);
    world.unreadable = true;
    cr_assert(gated(acquire(1, 0, 0, 70)));
    settle_mover();
    cr_assert_eq(sessions[1].rows[0].gates[WORLD_LAYERS], (uint32_t)SKV_ELOAD);
    finish(1, 0, false);
    struct view *view = acquire(1, 0, 0, 70); /* not a second time at once */
    cr_assert_eq(view->grant.cached, 0);
    cr_assert_not(gated(view));
    finish(1, 0, false);
    settle_mover();
    cr_assert_eq(info_of(0).stored, 60, "it is not cut");
    world.unreadable = false;
    later(1500);
    view = acquire(1, 0, 0, 70);
    cr_assert_eq(view->grant.cached, 60);
    settle_mover();
    finish(1, 0, true);
    cr_assert_eq(world.store[0].tokens, 60);
}

Test(cache, a_prefetch_leases_nothing)
{
    setup(16);
    put_away(0, 40);
    struct sim_row *row = &sessions[1].rows[0];
    row->count = 1;
    history(&row->views[0], 0, 60, 0, 0);
    cr_assert(acquire_begin(1, 0, true));
    skv_cache_acquire(world.cache, sessions[1].slot, 0, 1, NULL, 0, false, grants, page_list);
    row->phase = IDLE;
    take_actions();
    cr_assert_eq(info_of(0).leases, 0);
    settle_mover();
    cr_assert_eq(info_of(0).resident, 40);
    cr_assert_not(gated(acquire(1, 0, 0, 60)));
}

Test(cache, a_prefetch_that_gets_no_page_leaves_nothing_behind)
{
    setup(4);
    put_away(0, 40);
    acquire(2, 0, 1, 64);
    struct sim_row *row = &sessions[1].rows[0];
    row->count = 1;
    history(&row->views[0], 0, 60, 0, 0);
    cr_assert(acquire_begin(1, 0, true));
    skv_cache_acquire(world.cache, sessions[1].slot, 0, 1, NULL, 0, false, grants, page_list);
    row->phase = IDLE;
    take_actions();
    skv_cache_check(world.cache);
    cr_assert_eq(stats_now().users_resident, 1);
}
