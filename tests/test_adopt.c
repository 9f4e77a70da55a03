/* Users rebuilt from page descriptors, right ones and damaged ones: what cannot be trusted is
 * nobody's page, and a user never more than an unbroken list. */
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#include "cache.h"
#include "hash.h"

#define PAGES 32u
#define S     16u

static struct wire_table *table;
static struct skv_cache *cache;
static const struct skv_id model = {.lo = 7};
static uint32_t max_records;

static void set_up(void)
{
    table = calloc(1, sizeof *table + PAGES * sizeof *table->entries);
    table->generation = 100;
    max_records = 1024;
}

static void tear_down(void)
{
    skv_cache_close(cache);
    free(table);
}

TestSuite(adopt, .init = set_up, .fini = tear_down);

static void put(uint32_t page, struct wire_descriptor d)
{
    struct wire_page_entry *entry = &table->entries[page];
    entry->sequence++;
    d.check = (uint32_t)skv_checksum(&d, offsetof(struct wire_descriptor, check));
    entry->slot[entry->sequence & 1] = d;
}

/* A committed page; its hash names user, index and generation. */
static struct wire_descriptor valid(uint64_t user, uint32_t index, uint32_t tokens,
                                    uint64_t generation)
{
    return (struct wire_descriptor){.model = model,
                                    .user = skv_user_integer(user),
                                    .index = index,
                                    .valid = tokens,
                                    .hash = user * 1000 + index,
                                    .generation = generation,
                                    .flags = WIRE_PAGE_USED | WIRE_PAGE_VALID};
}

static void open_cache(bool store)
{
    struct skv_cache_options options = {
        .geometry = {.layers = 2, .heads = 1, .head_dim = 64, .page_tokens = S},
        .pages = PAGES,
        .sessions = 4,
        .max_records = max_records,
        .generation = table->generation + 1,
        .store = store,
        .table = table};
    cr_assert_eq(skv_cache_open(&options, &cache), 0);
    skv_cache_time(cache, 1000, 1000);
}

/* Out of the table alone: with a store the cache is early from then on. */
static uint32_t adopt(bool limbo)
{
    uint32_t users = skv_cache_adopt(cache, limbo);
    skv_cache_check(cache);
    return users;
}

/* There is no store, or all that it has was said. */
static void arrive(void)
{
    struct skv_action action;
    while (!skv_cache_restored(cache, 1))
        ;
    while (skv_cache_action(cache, &action))
        if (action.kind == SKV_ACTION_CHANGE)
            free(action.job);
    skv_cache_check(cache);
}

static struct skv_user_info info_of(uint64_t user)
{
    struct skv_user_info info = {0};
    uint32_t record = skv_cache_find(cache, model, skv_user_integer(user));
    if (record != SKV_NONE)
        skv_cache_info(cache, record, &info);
    return info;
}

static uint64_t free_pages(void)
{
    struct skv_stats stats;
    skv_cache_stats(cache, &stats);
    return stats.pool_pages_free;
}

Test(adopt, whole_lists_come_back)
{
    put(3, valid(1, 0, S, 5));
    put(9, valid(1, 1, S, 5));
    put(4, valid(1, 2, 7, 8)); /* appended after a cut */
    put(5, valid(2, 0, 3, 6));
    open_cache(false);
    cr_expect_eq(adopt(false), 2);
    cr_expect_eq(info_of(1).resident, 2 * S + 7);
    cr_expect_eq(info_of(2).resident, 3);
    cr_expect_eq(free_pages(), PAGES - 4);
    cr_expect_geq(info_of(1).generation, 8);
}

Test(adopt, an_empty_table_is_an_empty_pool)
{
    open_cache(false);
    cr_expect_eq(adopt(true), 0);
    cr_expect_eq(free_pages(), PAGES);
}

Test(adopt, a_gap_ends_the_list)
{
    put(0, valid(1, 0, S, 5));
    put(1, valid(1, 2, S, 5));
    put(2, valid(2, 1, S, 5)); /* no first page: no user */
    open_cache(false);
    cr_expect_eq(adopt(false), 1);
    cr_expect_eq(info_of(1).resident, S);
    cr_expect_eq(info_of(2).resident, 0);
    cr_expect_eq(free_pages(), PAGES - 1);
    arrive();
    cr_expect_gt(info_of(1).generation, 100, "what was dropped must not be its own again");
}

Test(adopt, a_decrease_of_generation_ends_the_list)
{
    put(0, valid(1, 0, S, 9));
    put(1, valid(1, 1, S, 5)); /* of before a cut */
    open_cache(false);
    adopt(false);
    cr_expect_eq(info_of(1).resident, S);
}

Test(adopt, nothing_follows_a_half_filled_page)
{
    put(0, valid(1, 0, 9, 5));
    put(1, valid(1, 1, S, 5));
    open_cache(false);
    adopt(false);
    cr_expect_eq(info_of(1).resident, 9);
}

Test(adopt, of_two_pages_for_one_index_the_newer_then_the_fuller_wins)
{
    put(0, valid(1, 0, 4, 5));
    put(1, valid(1, 0, S, 5)); /* a tail and what replaces it */
    put(2, valid(1, 1, S, 5));
    put(3, valid(1, 1, 2, 6)); /* another history */
    open_cache(false);
    adopt(false);
    cr_expect_eq(info_of(1).resident, S + 2);
    cr_expect_eq(free_pages(), PAGES - 2);
}

Test(adopt, a_damaged_older_slot_is_nothing)
{
    put(0, valid(2, 0, S, 4));
    put(0, valid(1, 0, S, 5));
    table->entries[0].slot[1].valid ^= 1; /* slot 0 is the newer one: sequence 2 */
    open_cache(false);
    cr_expect_eq(adopt(false), 1);
    cr_expect_eq(info_of(1).resident, S);
}

Test(adopt, a_damaged_newer_slot_is_not_replaced_by_an_earlier_owner)
{
    put(0, valid(2, 0, S, 4));
    put(0, valid(1, 0, S, 5));
    table->entries[0].slot[0].hash ^= 1;
    open_cache(false);
    cr_expect_eq(adopt(true), 0, "user 2's bytes may be gone");
    cr_expect_eq(free_pages(), PAGES - 1, "somebody may be writing there");
    skv_cache_settle(cache);
    skv_cache_check(cache);
    cr_expect_eq(free_pages(), PAGES);
}

Test(adopt, both_slots_damaged)
{
    put(0, valid(1, 0, S, 5));
    put(0, valid(1, 0, S, 5));
    put(1, valid(1, 1, S, 5));
    memset(table->entries[0].slot, 0x5a, sizeof table->entries[0].slot);
    open_cache(false);
    cr_expect_eq(adopt(false), 0);
    cr_expect_eq(free_pages(), PAGES);
}

Test(adopt, impossible_descriptors_are_nobodys)
{
    struct wire_descriptor bad[] = {valid(1, SKV_MAX_USER_PAGES, S, 5),
                                    valid(2, 0, S + 1, 5),
                                    valid(3, 0, 0, 5),
                                    valid(4, 0, S, 0),
                                    valid(5, 0, S, 101),
                                    valid(6, 0, S, 5),
                                    valid(7, 0, S, 5),
                                    valid(8, 0, S, 5)};
    bad[5].model = (struct skv_id){0};
    bad[6].flags |= WIRE_PAGE_LOADING;
    bad[7].flags = WIRE_PAGE_USED | WIRE_PAGE_APPENDING;
    for (uint32_t i = 0; i < 8; i++)
        put(i, bad[i]);
    open_cache(false);
    cr_expect_eq(adopt(true), 0);
    cr_expect_eq(free_pages(), PAGES - 8);
    skv_cache_settle(cache);
    cr_expect_eq(free_pages(), PAGES);
}

Test(adopt, random_damage_breaks_no_invariant)
{
    for (uint32_t round = 0; round < 2000; round++) {
        srandom(round);
        memset(table->entries, 0, PAGES * sizeof *table->entries);
        table->generation = 100;
        for (uint32_t i = 0; i < 40; i++)
            put((uint32_t)random() % PAGES,
                valid((uint64_t)random() % 3 + 1, (uint32_t)random() % 5,
                      random() % 3 ? S : (uint32_t)random() % S + 1, (uint64_t)random() % 4 + 1));
        for (uint32_t i = 0; i < 4; i++)
            ((uint8_t *)table->entries)[(uint32_t)random() % (PAGES * sizeof *table->entries)] ^= 1;
        open_cache(false);
        adopt(round & 1);
        arrive();
        if (round & 1)
            skv_cache_settle(cache);
        skv_cache_check(cache);
        skv_cache_close(cache);
        cache = NULL;
        /* and once more over what that one wrote */
        open_cache(false);
        uint32_t users = adopt(false);
        skv_cache_close(cache);
        open_cache(false);
        cr_assert_eq(adopt(false), users);
        skv_cache_close(cache);
        cache = NULL;
    }
}

/* ---- beside a store ---- */

static int restore(uint64_t user, uint32_t tokens, uint64_t generation, const uint64_t *hashes)
{
    uint32_t full = tokens / S, count = (tokens + S - 1) / S;
    struct skv_record record = {.model = model,
                                .user = skv_user_integer(user),
                                .generation = generation,
                                .hash_full = full ? hashes[full - 1] : 1,
                                .hash_tail = hashes[count - 1],
                                .last_use_s = 500 + user,
                                .tokens = tokens};
    return skv_cache_restore(cache, &record, hashes);
}

Test(adopt, what_is_not_stored_yet_is_to_be_stored)
{
    put(0, valid(1, 0, S, 5));
    put(1, valid(1, 1, 7, 5));
    open_cache(true);
    adopt(false);
    cr_assert_eq(restore(1, S, 5, (uint64_t[]){1000}), 0);
    arrive();
    cr_expect_eq(info_of(1).resident, S + 7);
    cr_expect_eq(info_of(1).stored, S);
    uint64_t epoch = skv_cache_flush(cache);
    cr_expect_not(skv_cache_flushed(cache, epoch));
}

Test(adopt, a_store_that_had_not_heard_of_a_cut_is_cut)
{
    put(0, valid(1, 0, S, 5));
    put(1, valid(1, 1, S, 9)); /* the new history, shorter than the old one */
    open_cache(true);
    adopt(false);
    cr_assert_eq(restore(1, 3 * S, 5, (uint64_t[]){1000, 77, 78}), 0);
    arrive();
    cr_expect_eq(info_of(1).resident, 2 * S);
    cr_expect_eq(info_of(1).stored, S, "the page that both have");
}

/* Or the tail would be taken for that of an earlier history once its page has been filled up. */
Test(adopt, a_store_that_has_a_tail_hears_of_its_users_new_generation)
{
    struct skv_action action;
    uint64_t told = 0;
    put(0, valid(1, 0, S, 5));
    put(1, valid(1, 1, 7, 9)); /* computed again since: the same tokens */
    open_cache(true);
    adopt(false);
    cr_assert_eq(restore(1, S + 7, 5, (uint64_t[]){1000, 1001}), 0);
    while (!skv_cache_restored(cache, 1))
        ;
    while (skv_cache_action(cache, &action))
        if (action.kind == SKV_ACTION_CHANGE) {
            struct skv_change *change = action.job;
            cr_expect_eq(change->kind, SKV_CHANGE_RECORD);
            cr_expect_eq(change->record.tokens, S + 7);
            cr_expect_eq(change->hashes[0], 1000);
            cr_expect_eq(change->hashes[1], 1001);
            told = change->record.generation;
            free(change);
        }
    cr_assert_geq(told, 9);
    skv_cache_check(cache);
    skv_cache_close(cache);
    put(1, valid(1, 1, S, 9)); /* filled up in place, and killed before that was stored */
    open_cache(true);
    adopt(false);
    cr_assert_eq(restore(1, S + 7, told, (uint64_t[]){1000, 1001}), 0);
    arrive();
    cr_expect_eq(info_of(1).resident, 2 * S);
    cr_expect_eq(info_of(1).stored, S + 7, "what was stored stays stored");
}

Test(adopt, a_user_loaded_in_part_keeps_the_rest_in_the_store)
{
    put(0,
        valid(1, 0, S, 9)); /* loaded with its user's generation, which the store does not know */
    open_cache(true);
    adopt(false);
    cr_assert_eq(restore(1, 3 * S, 5, (uint64_t[]){1000, 1001, 1002}), 0);
    arrive();
    cr_expect_eq(info_of(1).resident, S);
    cr_expect_eq(info_of(1).stored, 3 * S);
}

/* ---- before the store is there ---- */

static uint32_t gates[16];

/* One request of user 1 for `history` tokens, in a session of its own, that stays open. */
static uint32_t acquire(uint32_t history, const uint64_t *hashes, struct wire_grant *grant)
{
    static uint32_t pages[WIRE_SLOT_PAGES];
    uint32_t *row = gates;
    int slot = skv_cache_session_open(cache, model, 1, &row);
    struct skv_batch_input *input;
    struct skv_record record;
    cr_assert_eq(skv_cache_input(cache, (uint32_t)slot, 0, &input), 0);
    input->requests[0] = (struct wire_request){
        .user = skv_user_integer(1), .history = history, .max_cached = UINT32_MAX};
    memcpy(input->hashes, hashes, (history + S - 1) / S * sizeof *hashes);
    cr_expect_eq(skv_cache_needs(cache, (uint32_t)slot, 0, 0, 1, &record), SKV_NONE);
    cr_expect_not(skv_cache_acquire(cache, (uint32_t)slot, 0, 1, NULL, 0, true, grant, pages));
    skv_cache_check(cache);
    return (uint32_t)slot;
}

/* A page and a tail of 7 were adopted, and are read before the store is there. */
static uint32_t read_early(struct wire_grant *grant)
{
    put(0, valid(1, 0, S, 5));
    put(1, valid(1, 1, 7, 5));
    open_cache(true);
    adopt(false);
    uint32_t slot = acquire(2 * S, (uint64_t[]){1000, 55}, grant);
    cr_expect_eq(grant->cached, S + 7);
    return slot;
}

Test(adopt, before_the_store_is_there_users_are_read_and_nothing_else)
{
    struct wire_grant grant;
    uint32_t slot = read_early(&grant);
    cr_expect_eq(grant.tail_hash, 1001);
    cr_expect_not(grant.flags & SKV_GRANT_APPEND);
    cr_assert(skv_cache_session_gone(cache, slot));
    slot = acquire(2 * S, (uint64_t[]){77, 78}, &grant);
    cr_expect_eq(grant.cached, 0, "another history");
    cr_assert(skv_cache_session_gone(cache, slot));
    cr_expect_eq(info_of(1).committed, S + 7, "but it is not cut");
    cr_expect_null(skv_cache_next_offload(cache, 8, true));
    cr_expect_eq(skv_cache_tail_due(cache), UINT64_MAX);
    cr_expect_eq(skv_cache_evict(cache, skv_cache_find(cache, model, skv_user_integer(1))),
                 SKV_EAGAIN);
    uint64_t epoch = skv_cache_flush(cache);
    cr_expect_not(skv_cache_flushed(cache, epoch));
    cr_expect_eq(skv_cache_generation(cache), 100);

    skv_cache_number_above(cache, 1000);
    cr_assert_eq(restore(1, S + 7, 5, (uint64_t[]){1000, 1001}), 0);
    cr_assert_eq(restore(2, 3, 900, (uint64_t[]){2000}), 0);
    cr_expect_not(skv_cache_flushed(cache, epoch) && skv_cache_next_offload(cache, 8, true));
    slot = acquire(3 * S, (uint64_t[]){1000, 55, 56}, &grant);
    cr_expect_not(grant.flags & SKV_GRANT_APPEND, "others are missing");
    cr_assert(skv_cache_session_gone(cache, slot));
    arrive();
    cr_expect(skv_cache_flushed(cache, epoch));
    slot = acquire(3 * S, (uint64_t[]){1000, 55, 56}, &grant);
    cr_expect(grant.flags & SKV_GRANT_APPEND);
    cr_assert(skv_cache_session_gone(cache, slot));
    cr_expect_eq(info_of(2).stored, 3);
    cr_expect_eq(info_of(2).last_use_s, 502);
    cr_expect_eq(info_of(1).last_use_s, 1000, "used since");
}

Test(adopt, a_stored_user_is_a_hit_once_all_are_known)
{
    struct wire_grant grant;
    open_cache(true);
    adopt(false);
    cr_assert_eq(restore(1, 2 * S, 5, (uint64_t[]){1000, 1001}), 0);
    uint32_t slot = acquire(2 * S, (uint64_t[]){1000, 1001}, &grant);
    cr_expect_eq(grant.cached, 0);
    cr_assert(skv_cache_session_gone(cache, slot));
    cr_expect_eq(info_of(1).committed, 2 * S);
    cr_expect_eq(restore(1, 2 * S, 5, (uint64_t[]){1000, 1001}), SKV_EINVAL, "twice");
    arrive();
    cr_expect_eq(info_of(1).stored, 2 * S);
}

Test(adopt, a_tail_of_which_the_store_has_more_is_dropped_under_its_readers)
{
    struct wire_grant grant;
    uint32_t slot = read_early(&grant);
    cr_assert_eq(restore(1, 2 * S, 5, (uint64_t[]){1000, 99}), 0);
    arrive();
    cr_expect_eq(info_of(1).resident, S);
    cr_expect_eq(info_of(1).stored, 2 * S);
    cr_expect_eq(free_pages(), PAGES - 2, "it is being read");
    cr_assert(skv_cache_session_gone(cache, slot));
    cr_expect_eq(free_pages(), PAGES - 1);
    skv_cache_check(cache);
}

Test(adopt, pool_users_make_way_for_stored_ones)
{
    for (uint32_t i = 0; i < 3; i++)
        put(i, valid(1 + i, 0, S, 5));
    max_records = 4;
    open_cache(true);
    adopt(false);
    for (uint64_t user = 11; user < 15; user++)
        cr_assert_eq(restore(user, 3, 5, (uint64_t[]){9}), 0);
    cr_expect_eq(restore(15, 3, 5, (uint64_t[]){9}), SKV_EFULL);
    arrive();
    cr_expect_eq(free_pages(), PAGES);
}

static bool may_append(void)
{
    struct wire_grant grant;
    uint32_t slot = acquire(2 * S, (uint64_t[]){1000, 55}, &grant);
    cr_expect_eq(grant.cached, S + 7);
    cr_assert(skv_cache_session_gone(cache, slot));
    return grant.flags & SKV_GRANT_APPEND;
}

Test(adopt, a_stored_tail_is_read_and_not_appended_to_until_the_store_has_its_generation)
{
    struct skv_action action;
    put(0, valid(1, 0, S, 5));
    put(1, valid(1, 1, 7, 9));
    open_cache(true);
    adopt(false);
    cr_assert_eq(restore(1, S + 7, 5, (uint64_t[]){1000, 1001}), 0);
    while (!skv_cache_restored(cache, 1))
        ;
    cr_assert(skv_cache_action(cache, &action));
    cr_assert_eq(action.kind, SKV_ACTION_CHANGE);
    struct skv_change *change = action.job, earlier = *change;
    cr_expect_not(may_append());
    earlier.record.generation--;
    skv_cache_changed(cache, &earlier);
    cr_expect_not(may_append(), "it is another one's answer");
    skv_cache_changed(cache, change);
    cr_expect(may_append());
    free(change);
}

static bool no_memory;
void *__real_calloc(size_t count, size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes)
{
    return no_memory ? NULL : __real_calloc(count, bytes);
}

/* Such a change would take back what the offload stores. */
Test(adopt, beside_an_offload_of_a_stored_tail_the_store_is_told_nothing)
{
    struct skv_action action;
    struct wire_grant grant;
    put(0, valid(1, 0, S, 5));
    put(1, valid(1, 1, 9, 5));
    put(2, valid(1, 2, 3, 5)); /* not of its history: it gets a new generation */
    open_cache(true);
    adopt(false);
    no_memory = true;
    cr_assert_eq(restore(1, S + 7, 5, (uint64_t[]){1000, 1001}), 0);
    no_memory = false;
    while (!skv_cache_restored(cache, 1))
        ;
    struct skv_offload *job = skv_cache_next_offload(cache, 8, true);
    cr_assert(job);
    for (int stored = 0; stored < 2; stored++) {
        uint32_t slot = acquire(2 * S, (uint64_t[]){1000, 55}, &grant);
        cr_expect_eq(grant.cached, S + 9);
        cr_expect_not(grant.flags & SKV_GRANT_APPEND);
        cr_assert(skv_cache_session_gone(cache, slot));
        cr_expect_eq(skv_cache_action(cache, &action), stored);
        if (!stored)
            skv_cache_stored(cache, job, 0);
    }
    struct skv_change *change = action.job;
    cr_assert_eq(change->record.tokens, S + 9);
    skv_cache_changed(cache, change);
    free(change);
    acquire(2 * S, (uint64_t[]){1000, 55}, &grant);
    cr_expect(grant.flags & SKV_GRANT_APPEND);
}

/* ---- limbo ---- */

Test(adopt, in_limbo_nothing_of_before_is_evicted_or_appended_to)
{
    uint32_t *row = gates;
    uint64_t tokens[2 * S] = {0}, hashes[2];
    struct skv_id user = skv_user_integer(1);
    skv_chain_hashes(model, user, S, tokens, 2 * S, 0, hashes);
    struct wire_descriptor tail = valid(1, 0, 7, 5);
    tail.hash = skv_chain_link(skv_chain_start(model, user), tokens, 7);
    put(0, tail);
    for (uint32_t i = 0; i < PAGES - 4; i++)
        put(1 + i, valid(2 + i, 0, S, 5));
    open_cache(false);
    adopt(true);
    arrive();
    for (int round = 0; round < 2; round++) {
        int slot = skv_cache_session_open(cache, model, 1, &row);
        struct skv_batch_input *input;
        struct wire_grant grant;
        static uint32_t pages[WIRE_SLOT_PAGES];
        cr_assert_eq(skv_cache_input(cache, (uint32_t)slot, 0, &input), 0);
        input->requests[0] =
            (struct wire_request){.user = user, .history = 2 * S, .max_cached = UINT32_MAX};
        memcpy(input->hashes, hashes, sizeof hashes);
        skv_cache_acquire(cache, (uint32_t)slot, 0, 1, NULL, 0, true, &grant, pages);
        cr_expect(grant.flags & SKV_GRANT_APPEND);
        cr_expect_eq(grant.cached, round ? 7 : 0, "in limbo the tail is another's to write");
        cr_expect_eq(pages[0] == 0, round == 1);
        cr_assert(skv_cache_session_gone(cache, (uint32_t)slot));
        cr_expect_eq(skv_cache_evict(cache, skv_cache_find(cache, model, skv_user_integer(5))),
                     round ? SKV_OK : SKV_EBUSY);
        skv_cache_check(cache);
        skv_cache_settle(cache);
    }
}
