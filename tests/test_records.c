/* The records: a linear hash and two lists, against a table that is searched by looking at
 * everything. */
#include <criterion/criterion.h>
#include <stdlib.h>

#include "hash.h"
#include "records.h"

static uint64_t state;

static uint64_t draw(uint64_t below)
{
    state += UINT64_C(0x9e3779b97f4a7c15);
    uint64_t x = state;
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return (x ^ (x >> 31)) % below;
}

static struct skv_id user(uint64_t n)
{
    return n & 1 ? skv_user_integer(n) : (struct skv_id){.lo = n * 77, .hi = ~n};
}

/* The LRU holds exactly the stored records, linked both ways. */
static void check_lru(const struct records *records)
{
    uint32_t count = 0, last = SKV_NONE;
    for (uint32_t i = records->oldest; i != SKV_NONE; i = records->all[i].newer) {
        cr_assert_eq(records->all[i].older, last);
        cr_assert(records->all[i].stored);
        last = i;
        count++;
    }
    cr_assert_eq(records->newest, last);
    cr_assert_eq(records->stored_count, count);
}

/* Which bucket holds what, counted: as many as there are, each in the bucket it is looked for in.
 */
static void check_buckets(const struct records *records)
{
    uint32_t buckets = (1u << records->level) + records->split, count = 0;
    for (uint32_t bucket = 0; bucket < buckets; bucket++)
        for (uint32_t i = records->buckets[bucket]; i != SKV_NONE; i = records->all[i].chain) {
            cr_assert_eq(skv_records_find(records, records->all[i].model, records->all[i].user), i);
            count++;
        }
    cr_assert_eq(records->count, count);
    cr_assert_leq(count, buckets);
}

Test(records, millions_of_adds_and_removes_agree_with_a_plain_table)
{
    enum { KEYS = 300000, MODELS = 3, STEPS = 3000000 };
    struct records records;
    static uint32_t at[KEYS]; /* index, or SKV_NONE */
    static uint16_t stored[KEYS];
    memset(at, 0xff, sizeof at);
    cr_assert_eq(skv_records_init(&records, KEYS), 0);
    uint32_t live = 0, kept = 0;
    for (uint32_t step = 0; step < STEPS; step++) {
        uint32_t key = (uint32_t)draw(KEYS);
        uint16_t model = key % MODELS;
        /* first it grows, then it shrinks, then it stays */
        bool add = draw(100) < (step < STEPS / 2 ? 80u : step < STEPS * 3 / 4 ? 10u : 50u);
        uint32_t found = skv_records_find(&records, model, user(key));
        cr_assert_eq(found, at[key]);
        if (at[key] == SKV_NONE && add) {
            at[key] = skv_records_add(&records, model, user(key));
            cr_assert_neq(at[key], SKV_NONE);
            cr_assert_eq(records.all[at[key]].residence, SKV_NONE);
            stored[key] = 0;
            live++;
        } else if (at[key] != SKV_NONE && !add) {
            kept -= stored[key] != 0;
            skv_records_remove(&records, at[key]);
            at[key] = SKV_NONE;
            live--;
        } else if (at[key] != SKV_NONE) {
            uint16_t tokens = draw(3) ? (uint16_t)draw(SKV_MAX_TOKENS + 1) : 0;
            kept += (tokens != 0) - (stored[key] != 0);
            stored[key] = tokens;
            skv_records_set_stored(&records, at[key], tokens);
            if (draw(2))
                skv_records_touch(&records, at[key]);
            cr_assert_eq(records.all[at[key]].stored, tokens);
            if (tokens && draw(2)) {
                skv_records_touch(&records, at[key]);
                cr_assert_eq(records.newest, at[key]);
            }
        }
        cr_assert_eq(records.count, live);
        cr_assert_eq(records.stored_count, kept);
        if (step % (STEPS / 8) == 0) {
            check_lru(&records);
            check_buckets(&records);
        }
    }
    check_lru(&records);
    check_buckets(&records);
    for (uint32_t key = 0; key < KEYS; key++)
        if (at[key] != SKV_NONE)
            skv_records_remove(&records, at[key]);
    cr_assert_eq(records.count, 0);
    cr_assert_eq(records.oldest, SKV_NONE);
    check_buckets(&records);
    skv_records_fini(&records);
}

Test(records, a_full_table_refuses_and_takes_again_after_a_removal)
{
    struct records records;
    cr_assert_eq(skv_records_init(&records, 5), 0);
    for (uint32_t i = 0; i < 5; i++)
        cr_assert_eq(skv_records_add(&records, 0, user(i)), i);
    cr_assert_eq(skv_records_add(&records, 0, user(9)), SKV_NONE);
    skv_records_remove(&records, 2);
    cr_assert_eq(skv_records_add(&records, 0, user(9)), 2);
    cr_assert_eq(skv_records_add(&records, 0, user(2)), SKV_NONE);
    cr_assert_eq(skv_records_find(&records, 0, user(2)), SKV_NONE);
    cr_assert_eq(skv_records_find(&records, 0, user(9)), 2);
    skv_records_fini(&records);
}

Test(records, one_user_of_two_models_is_two_users)
{
    struct records records;
    cr_assert_eq(skv_records_init(&records, 8), 0);
    uint32_t a = skv_records_add(&records, 0, user(7)), b = skv_records_add(&records, 1, user(7));
    cr_assert_neq(a, b);
    cr_assert_eq(skv_records_find(&records, 0, user(7)), a);
    cr_assert_eq(skv_records_find(&records, 1, user(7)), b);
    cr_assert_eq(skv_records_find(&records, 2, user(7)), SKV_NONE);
    skv_records_remove(&records, a);
    cr_assert_eq(skv_records_find(&records, 1, user(7)), b);
    skv_records_fini(&records);
}

Test(records, only_stored_users_are_in_the_lru_and_touching_moves_them)
{
    struct records records;
    cr_assert_eq(skv_records_init(&records, 8), 0);
    for (uint32_t i = 0; i < 4; i++)
        skv_records_add(&records, 0, user(i));
    skv_records_touch(&records, 0); /* not stored: nothing */
    cr_assert_eq(records.newest, SKV_NONE);
    for (uint32_t i = 0; i < 3; i++)
        skv_records_set_stored(&records, i, 10);
    cr_assert_eq(records.oldest, 0);
    skv_records_touch(&records, 0);
    cr_assert_eq(records.oldest, 1);
    cr_assert_eq(records.newest, 0);
    skv_records_set_stored(&records, 1, 20); /* longer: keeps its place */
    cr_assert_eq(records.oldest, 1);
    skv_records_set_stored(&records, 1, 0);
    cr_assert_eq(records.oldest, 2);
    cr_assert_eq(records.stored_count, 2);
    check_lru(&records);
    skv_records_fini(&records);
}

Test(records, sorting_orders_by_last_use)
{
    enum { USERS = 5000 };
    struct records records;
    cr_assert_eq(skv_records_init(&records, USERS), 0);
    for (uint32_t i = 0; i < USERS; i++) {
        uint32_t index = skv_records_add(&records, 0, user(i));
        records.all[index].last_use_s = (uint32_t)draw(UINT32_MAX / 2);
        skv_records_set_stored(&records, index, 1 + i % 100);
        cr_assert_eq(skv_records_unsorted(&records, index), 0);
    }
    for (uint32_t steps = 0; !skv_records_sort(&records, 7); steps++)
        if (steps < 100) { /* used meanwhile */
            uint32_t index = (uint32_t)draw(USERS);
            records.all[index].last_use_s = UINT32_MAX / 2 + steps;
            skv_records_touch(&records, index);
        }
    check_lru(&records);
    for (uint32_t i = records.oldest; records.all[i].newer != SKV_NONE; i = records.all[i].newer)
        cr_assert_leq(records.all[i].last_use_s, records.all[records.all[i].newer].last_use_s);
    skv_records_fini(&records);
}

Test(records, sorting_nothing_is_fine)
{
    struct records records;
    cr_assert_eq(skv_records_init(&records, 4), 0);
    cr_assert(skv_records_sort(&records, 1));
    cr_assert_eq(records.oldest, SKV_NONE);
    skv_records_fini(&records);
}
