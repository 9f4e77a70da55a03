/* mover.h, on the host backend with a real store: pages survive the way out and back, gates open
 * when they may and not before, and what fails fails alone. */
#include "mover_help.h"

#include <fcntl.h>
#include <pthread.h>

/* Loads a user once, so that its pages count as verified: from then on they go layer by layer. */
static void touch(struct bench *b, struct user u, uint32_t tokens, uint32_t first_page)
{
    struct skv_onboard *job = onboard_of(b, u, tokens, first_page, NULL);
    skv_mover_onboard(b->mover, job);
    expect_event(b, SKV_MOVER_ONBOARDED, job, 0);
    memset(b->pages + first_page * b->page_bytes, 0xee, job->move_count * b->page_bytes);
    free_onboard(job);
}

/* Changes one byte of a stored page, in the file. */
static void damage(struct bench *b, struct user u, uint32_t index)
{
    char file[300];
    struct skv_reader *reader;
    struct skv_location where;
    cr_assert_eq(skv_reader_open(b->store, &reader), 0);
    cr_assert_eq(skv_reader_begin(reader), 0);
    cr_assert_eq(skv_reader_locate(reader, MODEL, u.id, index, &where), 0);
    skv_reader_close(reader);
    snprintf(file, sizeof file, "%s/data.mdb", b->path);
    int fd = open(file, O_RDWR);
    off_t at = (off_t)(where.extent_offset + where.value_offset + 100);
    uint8_t byte;
    cr_assert_eq(pread(fd, &byte, 1, at), 1);
    byte ^= 1;
    cr_assert_eq(pwrite(fd, &byte, 1, at), 1);
    close(fd);
}

/* ---- the happy path ---- */

/* 41 pages: of 1 MiB they cross windows of the map. */
static void round_trip(struct setup setup)
{
    struct bench b;
    struct user u = user_of(7);
    uint32_t tokens = 40 * 32 + 11;
    open_bench(&b, setup);
    for (uint32_t page = 0; page < 40; page += 10)
        offload_user(&b, u, page, (page + 10) * 32, 0, 0);
    offload_user(&b, u, 40, tokens, 0, 0);
    if (b.pinner)
        await_pinner(&b);
    struct skv_onboard *job = onboard_of(&b, u, tokens, 50, row_at(&b, 0));
    skv_mover_onboard(b.mover, job);
    expect_event(&b, SKV_MOVER_ONBOARDED, job, 0);
    cr_assert(row_open(row_at(&b, 0), setup.geometry.layers));
    cr_assert_eq(row_at(&b, 0)[setup.geometry.layers], 0, "no status");
    cr_assert(same_user(&b, 50, u, tokens));
    struct skv_mover_counters counters;
    skv_mover_counters(b.mover, &counters);
    cr_assert_eq(counters.onboard_bytes, 41 * b.page_bytes);
    cr_assert_eq(counters.offload_pages, 41);
    cr_assert_eq(counters.onboard_in_place_bytes, b.pinner ? 41 * b.page_bytes : 0);
    free_onboard(job);
    close_bench(&b);
}

Test(mover, what_was_offloaded_comes_back_by_way_of_staging)
{
    round_trip(SMALL);
    round_trip(BIG);
}

Test(mover, what_was_offloaded_comes_back_from_the_map_in_place)
{
    round_trip(pinned(SMALL));
    round_trip(pinned(BIG));
}

Test(mover, pages_stored_before_the_pinner_came_are_verified_once_then_read_in_place)
{
    struct bench b;
    struct user u = user_of(8);
    open_bench(&b, BIG);
    offload_user(&b, u, 0, 320, 0, 0);
    skv_mover_stop(b.mover);
    cr_assert_eq(skv_pinner_start(b.store, b.device, 512 * MIB, &b.pinner), 0);
    start_mover(&b, 32);
    await_pinner(&b);
    for (uint32_t round = 0; round < 2; round++) {
        struct skv_onboard *job = onboard_of(&b, u, 320, 20 + round * 20, row_at(&b, round));
        skv_mover_onboard(b.mover, job);
        expect_event(&b, SKV_MOVER_ONBOARDED, job, 0);
        cr_assert(same_user(&b, 20 + round * 20, u, 320));
        free_onboard(job);
        struct skv_mover_counters counters;
        skv_mover_counters(b.mover, &counters);
        cr_assert_eq(counters.onboard_in_place_bytes, (round + 1) * 10 * MIB);
    }
    close_bench(&b);
}

Test(mover, a_page_put_into_a_registered_window_counts_as_verified)
{
    struct bench b;
    struct user u = user_of(34);
    struct skv_location where;
    struct skv_reader *reader;
    open_bench(&b, pinned(BIG));
    offload_user(&b, user_of(35), 0, 320, 0, 0);
    offload_user(&b, user_of(36), 0, 320, 0, 0);
    await_pinner(&b);
    struct skv_change gone = {.kind = SKV_CHANGE_RECORD,
                              .record = {.model = MODEL, .user = user_of(35).id}};
    skv_mover_change(b.mover, &gone);
    expect_event(&b, SKV_MOVER_CHANGED, &gone, 0);
    offload_user(&b, user_of(36), 9, 320, 9,
                 0); /* what was freed is free to use one commit later */
    offload_user(&b, u, 0, 96, 0, 0);
    cr_assert_eq(skv_reader_open(b.store, &reader), 0);
    cr_assert_eq(skv_reader_begin(reader), 0);
    for (uint32_t index = 0; index < 3; index++) {
        cr_assert_eq(skv_reader_locate(reader, MODEL, u.id, index, &where), 0);
        cr_assert(skv_pinner_covers(b.pinner, where.value, MIB + SKV_TRAILER_BYTES));
        cr_assert(skv_pinner_verified(b.pinner, where.value));
    }
    skv_reader_close(reader);
    close_bench(&b);
}

Test(mover, a_prefetch_has_no_gates_and_ends_all_the_same)
{
    struct bench b;
    struct user u = user_of(9);
    open_bench(&b, SMALL);
    offload_user(&b, u, 0, 100, 0, 0);
    struct skv_onboard *job = onboard_of(&b, u, 100, 20, NULL);
    skv_mover_onboard(b.mover, job);
    expect_event(&b, SKV_MOVER_ONBOARDED, job, 0);
    cr_assert(same_user(&b, 20, u, 100));
    free_onboard(job);
    close_bench(&b);
}

Test(mover, a_job_larger_than_staging_is_loaded_whole)
{
    struct bench b;
    struct user u = user_of(10);
    struct setup setup = SMALL;
    setup.staging_pages = 8; /* four pages each way */
    open_bench(&b, setup);
    for (uint32_t tokens = 96; tokens <= 96 * 20; tokens += 96)
        offload_user(&b, u, tokens / 32 - 3, tokens, 0, 0);
    struct skv_onboard *job = onboard_of(&b, u, 96 * 20, 100, row_at(&b, 0));
    skv_mover_onboard(b.mover, job);
    expect_event(&b, SKV_MOVER_ONBOARDED, job, 0);
    cr_assert(same_user(&b, 100, u, 96 * 20));
    free_onboard(job);
    close_bench(&b);
}

Test(mover, a_tail_grows_in_the_store)
{
    struct bench b;
    struct user u = user_of(11);
    open_bench(&b, SMALL);
    offload_user(&b, u, 0, 40, 0, 0);
    offload_user(&b, u, 1, 80, 1, 0);
    struct skv_onboard *job = onboard_of(&b, u, 80, 20, row_at(&b, 0));
    skv_mover_onboard(b.mover, job);
    expect_event(&b, SKV_MOVER_ONBOARDED, job, 0);
    cr_assert(same_user(&b, 20, u, 80));
    free_onboard(job);
    close_bench(&b);
}

/* ---- gates ---- */

/* Watches a row until it is open; whenever a gate is seen open, its layer must be there. */
static void watch_layers(struct bench *b, uint32_t *row, uint32_t first_page, struct user u,
                         uint32_t tokens)
{
    for (uint32_t layer = 0; layer < b->geometry.layers; layer++) {
        cr_assert_eq(skv_gate_wait(&row[layer], 60000), 0);
        for (uint32_t index = 0; index * 32 < tokens; index++)
            cr_assert(same_layer(b, first_page + index, u, index, page_valid(tokens, index), layer),
                      "gate %u is open, page %u is not there", layer, index);
    }
}

static void layer_order(struct setup setup)
{
    struct bench b;
    struct user u = user_of(12);
    open_bench(&b, setup);
    offload_user(&b, u, 0, 256, 0, 0);
    if (b.pinner) {
        await_pinner(&b);
        touch(&b, u, 256, 20);
    }
    hold_copies(&b);
    struct skv_onboard *job = onboard_of(&b, u, 256, 20, row_at(&b, 0));
    skv_mover_onboard(b.mover, job);
    usleep(5000);
    for (uint32_t layer = 0; layer < 8; layer++)
        cr_assert_eq(row_at(&b, 0)[layer], 0);
    let_copies_go(&b);
    watch_layers(&b, row_at(&b, 0), 20, u, 256);
    expect_event(&b, SKV_MOVER_ONBOARDED, job, 0);
    free_onboard(job);
    close_bench(&b);
}

Test(mover, a_gate_opens_after_its_layer)
{
    layer_order(pinned(BIG));
    layer_order(BIG);
}

Test(mover, a_gate_waits_for_the_jobs_it_comes_after)
{
    struct bench b;
    struct user u = user_of(13);
    open_bench(&b, pinned(BIG));
    offload_user(&b, u, 0, 256, 0, 0);
    await_pinner(&b);
    touch(&b, u, 256, 20);
    skv_device_delay(b.device, 20000);
    struct skv_onboard *prefetch = onboard_of(&b, u, 256, 20, NULL);
    struct skv_onboard *waiting = gates_only(&b, row_at(&b, 1), prefetch->id);
    struct skv_onboard *free_to_go = gates_only(&b, row_at(&b, 2), 0);
    skv_mover_onboard(b.mover, prefetch);
    skv_mover_onboard(b.mover, waiting);
    skv_mover_onboard(b.mover, free_to_go);
    watch_layers(&b, row_at(&b, 1), 20, u, 256);
    for (int i = 0; i < 3; i++) {
        struct skv_mover_event event = next_event(&b);
        cr_assert_eq(event.kind, SKV_MOVER_ONBOARDED);
    }
    cr_assert(row_open(row_at(&b, 2), 8));
    free_onboard(prefetch);
    free_onboard(waiting);
    free_onboard(free_to_go);
    close_bench(&b);
}

/* Makes a job larger: `count` pages from `first_page` on, its own many times over. */
static void repeat_pages(struct skv_onboard *job, uint32_t first_page, uint32_t count)
{
    uint32_t own = job->move_count;
    job->moves = realloc(job->moves, count * sizeof *job->moves);
    for (uint32_t i = 0; i < count; i++) {
        job->moves[i] = job->moves[i % own];
        job->moves[i].page = first_page + i;
    }
    job->move_count = count;
    job->state = realloc(job->state, SKV_ONBOARD_STATE_BYTES(count));
}

Test(mover, jobs_take_turns_so_a_small_one_overtakes_a_large_one)
{
    struct bench b;
    struct user u = user_of(14), v = user_of(15);
    struct setup setup = pinned(BIG);
    setup.pool_pages = 420;
    open_bench(&b, setup);
    offload_user(&b, u, 0, 256, 0, 0);
    offload_user(&b, v, 0, 32, 8, 0);
    await_pinner(&b);
    touch(&b, u, 256, 20);
    touch(&b, v, 32, 20);
    struct skv_onboard *large = onboard_of(&b, u, 256, 20, row_at(&b, 0));
    repeat_pages(large, 20, 400);
    struct skv_onboard *small = onboard_of(&b, v, 32, 10, row_at(&b, 1));
    hold_copies(&b);
    skv_mover_onboard(b.mover, large);
    usleep(50000); /* it comes as far as it will: most of it is not queued */
    skv_mover_onboard(b.mover, small);
    let_copies_go(&b);
    expect_event(&b, SKV_MOVER_ONBOARDED, small, 0);
    cr_assert(same_user(&b, 10, v, 32));
    expect_event(&b, SKV_MOVER_ONBOARDED, large, 0);
    cr_assert(same_page(&b, 419, u, 7, 32));
    free_onboard(large);
    free_onboard(small);
    close_bench(&b);
}

Test(mover, the_first_layer_is_being_copied_while_the_last_pages_are_looked_for)
{
    struct bench b;
    struct user u = user_of(40);
    struct setup setup = pinned(BIG);
    struct skv_mover_counters before, after;
    setup.pool_pages = 220;
    open_bench(&b, setup);
    offload_user(&b, u, 0, 256, 0, 0);
    await_pinner(&b);
    touch(&b, u, 256, 20);
    struct skv_onboard *job = onboard_of(&b, u, 256, 20, row_at(&b, 0));
    repeat_pages(job, 20, 200);
    job->moves[128].index = 8; /* missing: where the search ends, however short its turns were */
    skv_mover_counters(b.mover, &before);
    skv_mover_onboard(b.mover, job);
    expect_event(&b, SKV_MOVER_FAILED, job, SKV_ENOENT);
    skv_mover_counters(b.mover, &after);
    uint64_t slices = (after.onboard_in_place_bytes - before.onboard_in_place_bytes) /
                      skv_slice_bytes(&b.geometry);
    cr_assert_geq(slices, 64);
    cr_assert_leq(slices, 128, "of the first layer only, and of pages that were found");
    cr_assert_eq(row_at(&b, 0)[0], 0, "its gate waits for all of them");
    skv_mover_cancel(b.mover, job->id, SKV_ELOAD);
    expect_event(&b, SKV_MOVER_CANCELLED, job, SKV_ELOAD);
    free_onboard(job);
    close_bench(&b);
}

/* ---- cancelling ---- */

/* Exactly one last event; when it is CANCELLED, gates are open and the status is set. */
static void cancel_after(uint32_t delay_us, uint32_t wait_us)
{
    struct bench b;
    struct user u = user_of(16);
    open_bench(&b, BIG);
    offload_user(&b, u, 0, 256, 0, 0);
    skv_device_delay(b.device, delay_us);
    struct skv_onboard *job = onboard_of(&b, u, 256, 20, row_at(&b, 0));
    skv_mover_onboard(b.mover, job);
    usleep(wait_us);
    skv_mover_cancel(b.mover, job->id, SKV_ELOAD);
    struct skv_mover_event event = next_event(&b);
    cr_assert(event.kind == SKV_MOVER_CANCELLED || event.kind == SKV_MOVER_ONBOARDED);
    cr_assert(row_open(row_at(&b, 0), 8));
    bool cancelled = event.kind == SKV_MOVER_CANCELLED;
    cr_assert_eq((int32_t)row_at(&b, 0)[8], cancelled ? SKV_ELOAD : 0);
    /* Nothing is in flight: what is written now stays. */
    memset(b.pages + 20 * MIB, 0x5a, 8 * MIB);
    skv_mover_cancel(b.mover, job->id, SKV_ELOAD);
    expect_silence(&b, delay_us / 1000 + 5);
    for (uint64_t at = 20 * MIB; at < 28 * MIB; at++)
        cr_assert_eq(b.pages[at], 0x5a);
    free_onboard(job);
    close_bench(&b);
}

Test(mover, a_job_can_be_cancelled_at_every_stage)
{
    cancel_after(0, 0);         /* queued or finding */
    cancel_after(20000, 10000); /* in flight */
    cancel_after(20000, 30000);
    for (uint32_t wait_us = 100; wait_us < 3000; wait_us += 400)
        cancel_after(0, wait_us);
    cancel_after(0, 100000); /* long finished */
}

Test(mover, a_job_that_waits_for_another_can_be_cancelled)
{
    struct bench b;
    open_bench(&b, SMALL);
    struct skv_onboard *bad = onboard_of(&b, user_of(17), 64, 20, NULL);
    struct skv_onboard *waiting = gates_only(&b, row_at(&b, 1), bad->id);
    skv_mover_onboard(b.mover, bad);
    skv_mover_onboard(b.mover, waiting);
    expect_event(&b, SKV_MOVER_FAILED, bad, SKV_ENOENT);
    expect_silence(&b, 20);
    cr_assert_eq(row_at(&b, 1)[0], 0);
    skv_mover_cancel(b.mover, bad->id, 0);
    expect_event(&b, SKV_MOVER_CANCELLED, bad, 0);
    expect_silence(&b, 20);
    cr_assert_eq(row_at(&b, 1)[0], 0, "what it waits for will never come");
    skv_mover_cancel(b.mover, waiting->id, SKV_ELOAD);
    expect_event(&b, SKV_MOVER_CANCELLED, waiting, SKV_ELOAD);
    cr_assert_eq((int32_t)row_at(&b, 1)[2], SKV_ELOAD);
    cr_assert(row_open(row_at(&b, 1), 2));
    free_onboard(bad);
    free_onboard(waiting);
    close_bench(&b);
}

/* ---- bad pages ---- */

static void *await_gate_then_status(void *argument)
{
    uint32_t *row = argument;
    cr_assert_eq(skv_gate_wait(&row[7], 60000), 0);
    return (void *)(uintptr_t)__atomic_load_n(&row[8], __ATOMIC_ACQUIRE);
}

static void bad_page(struct setup setup, bool missing)
{
    struct bench b;
    struct user u = user_of(18), v = user_of(19);
    open_bench(&b, setup);
    offload_user(&b, u, 0, 256, 0, 0);
    offload_user(&b, v, 0, 64, 0, 0);
    if (!missing)
        damage(&b, u, 5);
    if (setup.pin_bytes) { /* registered after the damage: first touch */
        skv_mover_stop(b.mover);
        skv_pinner_stop(b.pinner);
        cr_assert_eq(skv_pinner_start(b.store, b.device, 512 * MIB, &b.pinner), 0);
        start_mover(&b, 32);
        await_pinner(&b);
    }
    struct skv_onboard *job = onboard_of(&b, u, missing ? 320 : 256, 20, row_at(&b, 0));
    pthread_t watcher;
    void *seen;
    pthread_create(&watcher, NULL, await_gate_then_status, row_at(&b, 0));
    skv_mover_onboard(b.mover, job);
    struct skv_mover_event event = next_event(&b);
    cr_assert_eq(event.kind, SKV_MOVER_FAILED);
    cr_assert_eq(event.status, missing ? SKV_ENOENT : SKV_ECORRUPT);
    cr_assert_eq(event.user, 0);
    cr_assert_eq(event.index, missing ? 8 : 5);
    for (uint32_t layer = 0; layer < 8; layer++)
        cr_assert_eq(row_at(&b, 0)[layer], 0, "no gate opens before the cancel");
    /* The others go on. */
    struct skv_onboard *other = onboard_of(&b, v, 64, 40, row_at(&b, 1));
    skv_mover_onboard(b.mover, other);
    expect_event(&b, SKV_MOVER_ONBOARDED, other, 0);
    cr_assert(same_user(&b, 40, v, 64));
    skv_mover_cancel(b.mover, job->id, SKV_ELOAD);
    expect_event(&b, SKV_MOVER_CANCELLED, job, SKV_ELOAD);
    pthread_join(watcher, &seen);
    cr_assert_eq((int32_t)(uintptr_t)seen, SKV_ELOAD, "the status is there before the gate opens");
    struct skv_mover_counters counters;
    skv_mover_counters(b.mover, &counters);
    cr_assert_eq(counters.damaged_pages, missing ? 0 : 1);
    free_onboard(job);
    free_onboard(other);
    close_bench(&b);
}

Test(mover, a_damaged_page_fails_its_job_alone)
{
    bad_page(BIG, false);
    bad_page(pinned(BIG), false);
}

Test(mover, a_missing_page_fails_its_job_alone)
{
    bad_page(BIG, true);
    bad_page(pinned(BIG), true);
}

static void other_page(struct setup setup)
{
    struct bench b;
    struct user u = user_of(20);
    open_bench(&b, setup);
    offload_user(&b, u, 0, 96, 0, 0);
    if (b.pinner) {
        await_pinner(&b);
        touch(&b, u, 96, 20);
    }
    for (int what = 0; what < 3; what++) {
        struct skv_onboard *job = onboard_of(&b, u, 96, 20, row_at(&b, 0));
        job->moves[1].hash ^= what == 0;
        job->moves[1].generation -= what == 1;
        job->moves[1].valid -= what == 2;
        skv_mover_onboard(b.mover, job);
        struct skv_mover_event event = next_event(&b);
        cr_assert_eq(event.kind, SKV_MOVER_FAILED);
        cr_assert_eq(event.index, 1);
        cr_assert_eq(event.status, SKV_ECORRUPT);
        skv_mover_cancel(b.mover, job->id, SKV_ELOAD);
        expect_event(&b, SKV_MOVER_CANCELLED, job, SKV_ELOAD);
        free_onboard(job);
    }
    close_bench(&b);
}

Test(mover, a_page_of_another_content_or_generation_is_never_served)
{
    other_page(SMALL);
    other_page(pinned(SMALL));
}

/* ---- lookups, lives ---- */

Test(mover, a_lookup_is_answered_while_a_large_onboard_runs)
{
    struct bench b;
    struct user u = user_of(30);
    open_bench(&b, BIG);
    for (uint32_t tokens = 256; tokens <= 64 * 32; tokens += 256)
        offload_user(&b, u, tokens / 32 - 8, tokens, 0, 0);
    hold_copies(&b); /* 64 pages by 16 slots: it is not done without copies */
    struct skv_onboard *job = onboard_of(&b, u, 64 * 32, 20, row_at(&b, 0));
    struct skv_lookup_job lookup = {.record = {.model = MODEL, .user = u.id}};
    lookup.hashes = calloc(SKV_MAX_USER_PAGES, sizeof *lookup.hashes);
    skv_mover_onboard(b.mover, job);
    skv_mover_lookup(b.mover, &lookup);
    expect_event(&b, SKV_MOVER_FOUND, &lookup, 0);
    cr_assert_eq(lookup.record.tokens, 64 * 32);
    cr_assert_eq(lookup.count, 64);
    let_copies_go(&b);
    expect_event(&b, SKV_MOVER_ONBOARDED, job, 0);
    free(lookup.hashes);
    free_onboard(job);
    close_bench(&b);
}

Test(mover, without_a_store_it_opens_gates_and_refuses_the_rest)
{
    struct bench b;
    struct setup setup = SMALL;
    setup.map_bytes = 0;
    open_bench(&b, setup);
    struct skv_onboard *job = gates_only(&b, row_at(&b, 0), 0);
    skv_mover_onboard(b.mover, job);
    expect_event(&b, SKV_MOVER_ONBOARDED, job, 0);
    cr_assert(row_open(row_at(&b, 0), 2));
    free_onboard(job);
    struct skv_offload *offload = offload_of(&b, user_of(31), 0, 32, 0);
    cr_assert_eq(skv_mover_offload_pages(b.mover), 0);
    cr_assert_not(skv_mover_offload(b.mover, offload));
    free_offload(offload);
    struct skv_change sync = {.kind = SKV_CHANGE_SYNC};
    skv_mover_change(b.mover, &sync);
    expect_event(&b, SKV_MOVER_CHANGED, &sync, 0);
    close_bench(&b);
}

Test(mover, stopping_loses_nothing_that_was_handed_in)
{
    struct bench b;
    struct user u = user_of(32);
    open_bench(&b, SMALL);
    skv_device_delay(b.device, 10000);
    struct skv_offload *offloads[4];
    for (uint32_t i = 0; i < 4; i++) {
        offloads[i] = offload_of(&b, u, i, 32 * (i + 1), i);
        fill_bytes(&b, u, i, b.pages + i * b.page_bytes);
        cr_assert(skv_mover_offload(b.mover, offloads[i]));
    }
    skv_mover_stop(b.mover);
    start_mover(&b, 64);
    struct skv_onboard *job = onboard_of(&b, u, 128, 20, row_at(&b, 0));
    skv_mover_onboard(b.mover, job);
    expect_event(&b, SKV_MOVER_ONBOARDED, job, 0);
    cr_assert(same_user(&b, 20, u, 128));
    free_onboard(job);
    for (uint32_t i = 0; i < 4; i++)
        free_offload(offloads[i]);
    close_bench(&b);
}

Test(mover, many_prefetches_leave_a_gated_job_its_snapshot)
{
    struct bench b;
    struct user u = user_of(33);
    open_bench(&b, SMALL);
    offload_user(&b, u, 0, 32, 0, 0); /* a page: room for copies is not what they compete for */
    hold_copies(&b);                  /* none is done before all are handed in */
    struct skv_onboard *jobs[24];
    for (uint32_t i = 0; i < 24; i++) {
        jobs[i] = onboard_of(&b, u, 32, 20 + i * 10, i == 23 ? row_at(&b, 0) : NULL);
        skv_mover_onboard(b.mover, jobs[i]);
    }
    let_copies_go(&b);
    uint32_t before = 0;
    for (uint32_t i = 0; i < 24; i++) {
        struct skv_mover_event event = next_event(&b);
        cr_assert_eq(event.kind, SKV_MOVER_ONBOARDED);
        if (event.job == jobs[23])
            before = i;
    }
    cr_assert_lt(before, 16, "%u prefetches came before it", before);
    for (uint32_t i = 0; i < 24; i++) {
        cr_assert(same_user(&b, 20 + i * 10, u, 32));
        free_onboard(jobs[i]);
    }
    close_bench(&b);
}

/* Hands in jobs[count] at one time: the mover sees all of them before it moves anything. Returns at
 * which place in the order of their ends `which` came. */
static uint32_t place_among(struct bench *b, struct skv_onboard **jobs, uint32_t count,
                            const struct skv_onboard *which)
{
    uint32_t place = count;
    skv_mover_halt(b->mover);
    for (uint32_t i = 0; i < count; i++)
        skv_mover_onboard(b->mover, jobs[i]);
    cr_assert_eq(skv_mover_resume(b->mover, b->pinner), 0);
    for (uint32_t i = 0; i < count; i++) {
        struct skv_mover_event event = next_event(b);
        cr_assert_eq(event.kind, SKV_MOVER_ONBOARDED);
        if (event.job == which)
            place = i;
    }
    return place;
}

Test(mover, a_gated_job_overtakes_prefetches_that_came_before_it)
{
    struct bench b;
    struct user u = user_of(37);
    struct setup setup = SMALL;
    struct skv_onboard *jobs[24];
    setup.staging_pages = 8; /* four pages each way: what they compete for */
    open_bench(&b, setup);
    for (uint32_t page = 0; page < 10; page += 2)
        offload_user(&b, u, page, (page + 2) * 32, page, 0);
    skv_device_delay(b.device, 20000);
    for (uint32_t i = 0; i < 24; i++)
        jobs[i] = onboard_of(&b, u, 320, 20 + i * 10, i == 23 ? row_at(&b, 0) : NULL);
    uint32_t before = place_among(&b, jobs, 24, jobs[23]);
    cr_assert_lt(before, 12, "%u prefetches came before it", before);
    for (uint32_t i = 0; i < 24; i++) {
        cr_assert(same_user(&b, 20 + i * 10, u, 320));
        free_onboard(jobs[i]);
    }
    close_bench(&b);
}

Test(mover, a_prefetch_is_not_passed_over_for_ever)
{
    struct bench b;
    struct user u = user_of(39);
    struct skv_onboard *jobs[600];
    open_bench(&b, SMALL);
    offload_user(&b, u, 0, 32, 0, 0);
    for (uint32_t i = 0; i < 600; i++)
        jobs[i] = onboard_of(&b, u, 32, 20, i ? row_at(&b, 0) : NULL);
    uint32_t place = place_among(&b, jobs, 600, jobs[0]);
    cr_assert_lt(place, 300, "%u gated jobs came before it", place);
    for (uint32_t i = 0; i < 600; i++)
        free_onboard(jobs[i]);
    close_bench(&b);
}
