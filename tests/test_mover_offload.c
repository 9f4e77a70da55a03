/* mover.h, the way out: what is handed in is stored, in order, a valid prefix at every commit; what
 * is dropped or does not fit is not. */
#include <signal.h>
#include <sys/resource.h>

#include "mover_help.h"
#include "store_private.h"

Test(mover_offload, a_dropped_offload_is_not_stored)
{
    struct bench b;
    struct user u = user_of(21);
    open_bench(&b, SMALL);
    struct skv_offload *job = offload_of(&b, u, 0, 64, 0);
    job->drop = 1;
    uint32_t room = skv_mover_offload_pages(b.mover);
    skv_mover_halt(b.mover); /* or the threads may be done before we look */
    cr_assert(skv_mover_offload(b.mover, job));
    cr_assert_eq(skv_mover_offload_pages(b.mover), room - 2);
    cr_assert_eq(skv_mover_resume(b.mover, b.pinner), 0);
    expect_event(&b, SKV_MOVER_COPIED, job, 0);
    expect_event(&b, SKV_MOVER_STORED, job, SKV_ESTALE);
    cr_assert_eq(skv_mover_offload_pages(b.mover), room);
    free_offload(job);
    struct skv_lookup_job lookup = {.record = {.model = MODEL, .user = u.id}};
    lookup.hashes = calloc(SKV_MAX_USER_PAGES, sizeof *lookup.hashes);
    skv_mover_lookup(b.mover, &lookup);
    expect_event(&b, SKV_MOVER_FOUND, &lookup, SKV_ENOENT);
    free(lookup.hashes);
    close_bench(&b);
}

Test(mover_offload, staging_bounds_what_may_be_offloaded_at_once)
{
    struct bench b;
    struct setup setup = SMALL;
    setup.staging_pages = 8;
    open_bench(&b, setup);
    uint32_t room = skv_mover_offload_pages(b.mover);
    cr_assert_eq(room, 4);
    struct skv_offload *large = offload_of(&b, user_of(22), 0, 5 * 32, 0);
    struct skv_offload *small = offload_of(&b, user_of(22), 0, 3 * 32, 0);
    struct skv_offload *more = offload_of(&b, user_of(23), 0, 2 * 32, 0);
    cr_assert_not(skv_mover_offload(b.mover, large));
    hold_copies(&b);
    cr_assert(skv_mover_offload(b.mover, small));
    cr_assert_not(skv_mover_offload(b.mover, more));
    let_copies_go(&b);
    expect_event(&b, SKV_MOVER_COPIED, small, 0);
    expect_event(&b, SKV_MOVER_STORED, small, 0);
    cr_assert(skv_mover_offload(b.mover, more));
    expect_event(&b, SKV_MOVER_COPIED, more, 0);
    expect_event(&b, SKV_MOVER_STORED, more, 0);
    free_offload(large);
    free_offload(small);
    free_offload(more);
    close_bench(&b);
}

Test(mover_offload, a_full_store_refuses_and_takes_again_after_a_removal)
{
    struct bench b;
    struct setup setup = BIG;
    setup.map_bytes = 64 * MIB;
    open_bench(&b, setup);
    uint32_t stored = 0;
    struct skv_mover_event event;
    do { /* eight pages each */
        struct skv_offload *job = offload_of(&b, user_of(100 + stored), 0, 256, 0);
        cr_assert(skv_mover_offload(b.mover, job));
        expect_event(&b, SKV_MOVER_COPIED, job, 0);
        event = next_event(&b);
        cr_assert_eq(event.kind, SKV_MOVER_STORED);
        free_offload(job);
    } while (event.status == 0 && ++stored < 16);
    cr_assert_eq(event.status, SKV_ENOSPC);
    cr_assert(stored >= 4 && stored < 8, "%u users", stored);
    cr_assert_eq(skv_mover_offload_pages(b.mover), 16, "staging is free again");
    for (uint32_t i = 0; i < 3; i++) {
        struct skv_change gone = {.kind = SKV_CHANGE_RECORD,
                                  .record = {.model = MODEL, .user = user_of(100 + i).id}};
        skv_mover_change(b.mover, &gone);
        expect_event(&b, SKV_MOVER_CHANGED, &gone, 0);
    }
    offload_user(&b, user_of(200), 0, 256, 0, 0);
    struct skv_onboard *job = onboard_of(&b, user_of(200), 256, 20, row_at(&b, 0));
    skv_mover_onboard(b.mover, job);
    expect_event(&b, SKV_MOVER_ONBOARDED, job, 0);
    cr_assert(same_user(&b, 20, user_of(200), 256));
    free_onboard(job);
    close_bench(&b);
}

/* Writes to files fail from here on, but for LMDB's first two pages; 0: no more. */
static void limit_files(rlim_t bytes)
{
    struct rlimit limit;
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &limit);
    limit.rlim_cur = bytes ? bytes : limit.rlim_max;
    setrlimit(RLIMIT_FSIZE, &limit);
}

Test(mover_offload, a_change_that_failed_is_made_before_anything_later)
{
    struct bench b;
    open_bench(&b, BIG);
    offload_user(&b, user_of(30), 0, 64, 0, 0);
    limit_files(8192);
    struct skv_change gone = {.kind = SKV_CHANGE_RECORD,
                              .record = {.model = MODEL, .user = user_of(30).id}};
    skv_mover_change(b.mover, &gone);
    expect_event(&b, SKV_MOVER_CHANGED, &gone, SKV_ENOSPC);
    struct skv_offload *job = offload_of(&b, user_of(31), 0, 64, 0);
    cr_assert(skv_mover_offload(b.mover, job));
    expect_event(&b, SKV_MOVER_COPIED, job, 0);
    expect_event(&b, SKV_MOVER_STORED, job, SKV_ENOSPC);
    cr_assert_eq(job->stored_moves, 0);
    limit_files(0);
    cr_assert(skv_mover_offload(b.mover, job));
    expect_event(&b, SKV_MOVER_COPIED, job, 0);
    expect_event(&b, SKV_MOVER_CHANGED, &gone, 0);
    expect_event(&b, SKV_MOVER_STORED, job, 0);
    free_offload(job);
    cr_assert_eq(tokens_of(b.store, user_of(30)), 0);
    close_bench(&b);
}

Test(mover_offload, a_halted_mover_lets_the_store_be_opened_anew_and_goes_on)
{
    struct bench b;
    bool more;
    open_bench(&b, BIG);
    offload_user(&b, user_of(32), 0, 64, 0, 0);
    skv_mover_halt(b.mover);
    struct skv_onboard *onboard = onboard_of(&b, user_of(32), 64, 20, row_at(&b, 0));
    skv_mover_onboard(b.mover, onboard); /* waits */
    cr_assert_eq(skv_store_reopen(b.store, &more), 0);
    cr_assert_not(more);
    cr_assert_eq(skv_mover_resume(b.mover, NULL), 0);
    expect_event(&b, SKV_MOVER_ONBOARDED, onboard, 0);
    cr_assert(same_user(&b, 20, user_of(32), 64));
    free_onboard(onboard);
    offload_user(&b, user_of(33), 0, 64, 0, 0);
    close_bench(&b);
}

Test(mover_offload, changes_and_offloads_keep_their_order)
{
    struct bench b;
    struct user u = user_of(24);
    open_bench(&b, SMALL);
    skv_device_delay(b.device, 5000);
    struct skv_offload *first = offload_of(&b, u, 0, 96, 0);
    struct skv_change gone = {.kind = SKV_CHANGE_RECORD, .record = {.model = MODEL, .user = u.id}};
    struct skv_offload *second = offload_of(&b, u, 0, 32, 0);
    struct skv_change high = {.kind = SKV_CHANGE_GENERATION, .record = {.generation = 4711}};
    struct skv_change sync = {.kind = SKV_CHANGE_SYNC};
    cr_assert(skv_mover_offload(b.mover, first));
    skv_mover_change(b.mover, &gone);
    cr_assert(skv_mover_offload(b.mover, second));
    skv_mover_change(b.mover, &high);
    skv_mover_change(b.mover, &sync);
    const void *order[5];
    for (uint32_t i = 0; i < 5;) {
        struct skv_mover_event event = next_event(&b);
        cr_assert_eq(event.status, 0);
        if (event.kind != SKV_MOVER_COPIED)
            order[i++] = event.job;
    }
    const void *want[5] = {first, &gone, second, &high, &sync};
    cr_assert_eq(memcmp(order, want, sizeof want), 0);
    struct skv_lookup_job lookup = {.record = {.model = MODEL, .user = u.id}};
    lookup.hashes = calloc(SKV_MAX_USER_PAGES, sizeof *lookup.hashes);
    skv_mover_lookup(b.mover, &lookup);
    expect_event(&b, SKV_MOVER_FOUND, &lookup, 0);
    cr_assert_eq(lookup.record.tokens, 32);
    cr_assert_eq(lookup.count, 1);
    cr_assert_eq(lookup.hashes[0], second->hashes[0]);
    free(lookup.hashes);
    free_offload(first);
    free_offload(second);
    close_bench(&b);
}

static size_t commits_of(const struct skv_store *store)
{
    MDB_envinfo info;
    cr_assert_eq(mdb_env_info(store->env, &info), 0);
    return info.me_last_txnid;
}

/* The reader sees what it comes in time for: on a busy machine perhaps only the last state. */
Test(mover_offload, a_long_offload_leaves_a_prefix_at_every_commit)
{
    struct bench b;
    struct user u = user_of(25);
    struct setup setup = BIG;
    setup.staging_pages = 2 * 64;
    open_bench(&b, setup);
    struct skv_offload *job = offload_of(&b, u, 0, 60 * 32 + 5, 0);
    for (uint32_t i = 0; i < job->move_count; i++)
        fill_bytes(&b, u, i, b.pages + i * MIB);
    const size_t commits = commits_of(b.store);
    cr_assert(skv_mover_offload(b.mover, job));
    expect_event(&b, SKV_MOVER_COPIED, job, 0);
    struct skv_reader *reader;
    struct skv_mover_event event;
    uint32_t before = 0;
    cr_assert_eq(skv_reader_open(b.store, &reader), 0);
    do {
        struct skv_record record;
        uint64_t hashes[SKV_MAX_USER_PAGES];
        uint32_t count, pages = 0;
        cr_assert_eq(skv_reader_begin(reader), 0);
        if (skv_reader_record(reader, MODEL, u.id, &record, hashes, SKV_MAX_USER_PAGES, &count))
            continue;
        struct skv_location where;
        while (skv_reader_locate(reader, MODEL, u.id, pages, &where) == 0)
            pages++;
        cr_assert_eq(pages, count, "record and pages agree");
        cr_assert_eq(memcmp(hashes, job->hashes, count * sizeof *hashes), 0);
        cr_assert_eq(record.hash_tail, hashes[count - 1]);
        cr_assert_geq(record.tokens, before);
        before = record.tokens;
    } while (before < job->record.tokens);
    skv_reader_close(reader);
    cr_assert(try_event(&b, &event, 60000) && event.kind == SKV_MOVER_STORED && event.status == 0);
    cr_assert_gt(commits_of(b.store), commits + 1, "61 MiB are more than one transaction");
    free_offload(job);
    close_bench(&b);
}

#define PATIENCE_NS 90000000u /* the mover's, and a little less */

Test(mover_offload, an_offload_waits_for_a_gated_onboard_but_not_for_ever)
{
    struct bench b;
    struct user u = user_of(26);
    uint64_t start_ns;
    open_bench(&b, SMALL);
    offload_user(&b, u, 0, 96, 0, 0);
    skv_device_delay(b.device, 20000);
    struct skv_onboard *onboard = onboard_of(&b, u, 96, 20, row_at(&b, 0));
    struct skv_offload *offload = offload_of(&b, user_of(27), 0, 64, 0);
    skv_mover_onboard(b.mover, onboard);
    start_ns = skv_now_ns();
    cr_assert(skv_mover_offload(b.mover, offload));
    bool loaded = false;
    for (int i = 0; i < 3; i++) {
        struct skv_mover_event event = next_event(&b);
        cr_assert_eq(event.status, 0);
        loaded |= event.kind == SKV_MOVER_ONBOARDED;
        /* Before it only on a machine so busy that the onboard took longer than the patience. */
        cr_assert(loaded || skv_now_ns() - start_ns >= PATIENCE_NS);
    }
    cr_assert(loaded);
    free_onboard(onboard);
    free_offload(offload);
    /* One that stays. */
    skv_device_delay(b.device, 0);
    onboard = onboard_of(&b, user_of(28), 64, 20, row_at(&b, 0));
    offload = offload_of(&b, user_of(29), 0, 64, 0);
    skv_mover_onboard(b.mover, onboard);
    expect_event(&b, SKV_MOVER_FAILED, onboard, SKV_ENOENT);
    start_ns = skv_now_ns();
    cr_assert(skv_mover_offload(b.mover, offload));
    expect_event(&b, SKV_MOVER_COPIED, offload, 0);
    cr_assert_geq(skv_now_ns() - start_ns, PATIENCE_NS);
    expect_event(&b, SKV_MOVER_STORED, offload, 0);
    skv_mover_cancel(b.mover, onboard->id, SKV_ELOAD);
    expect_event(&b, SKV_MOVER_CANCELLED, onboard, SKV_ELOAD);
    free_onboard(onboard);
    free_offload(offload);
    close_bench(&b);
}
