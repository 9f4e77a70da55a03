/* The check at start, damage by damage: each of these leaves a file that only one of its rules
 * tells from a whole one. What happens to damages without a name is prove_store.c. */
#include <criterion/criterion.h>

#include "store_damages.h"

static struct golden golden;
static char directory[64];

static void set_up(void)
{
    snprintf(directory, sizeof directory, "/tmp/sidekv-check.XXXXXX");
    cr_assert_not_null(mkdtemp(directory));
    make_golden(directory, 11, false, &golden);
}

static void tear_down(void)
{
    clear(directory);
    rmdir(directory);
    drop_golden(&golden);
}

TestSuite(store_check, .init = set_up, .fini = tear_down, .timeout = 180);

/* The first leaf with at least `least` keys of `key_bytes`; users have 32, their pages 36. */
static uint8_t *find_leaf(uint64_t key_bytes, uint64_t least)
{
    struct image *image = &golden.now;
    for (uint32_t i = 0; i < image->tree_count; i++) {
        uint8_t *page = image->data + image->tree[i] * UINT64_C(4096);
        if (page[10] == 2 && get(page + 12, 2) >= 16 + 2 * least &&
            get(page + get(page + 16, 2) + 6, 2) == key_bytes)
            return page;
    }
    fprintf(stderr, "no such leaf\n");
    abort();
}

static uint8_t *node(uint8_t *page, uint32_t index)
{
    return page + get(page + 16 + 2 * index, 2);
}

static uint64_t cold_starts(void)
{
    struct skv_store *store;
    uint64_t cold, records;
    clear(directory);
    write_file(directory, "data.mdb", golden.now.data, golden.now.bytes, MAP_BYTES);
    write_file(directory, "sidekv.store", golden.now.state, 1024, 1024);
    cr_assert_eq(open_in(directory, &store), 0);
    skv_store_damage(store, &cold, &records);
    skv_store_close(store);
    return cold;
}

Test(store_check, a_whole_store_passes)
{
    cr_assert_eq(cold_starts(), 0);
}

Test(store_check, two_pages_of_users_in_one_place_do_not_pass)
{
    uint8_t *leaf = find_leaf(36, 2);
    memcpy(node(leaf, 0) + 8 + 36, node(leaf, 1) + 8 + 36, 8);
    cr_assert_eq(cold_starts(), 1);
}

Test(store_check, a_free_page_that_is_in_use_does_not_pass)
{
    struct image *image = &golden.now;
    uint64_t used = image->tree[image->tree_count - 1];
    uint8_t *leaf = find_leaf(8, 1), *value = node(leaf, 0) + 16;
    cr_assert_eq(get(node(leaf, 0) + 4, 2), 0, "the list lies in its leaf");
    for (uint64_t i = 1; i <= get(value, 8); i++) /* keeps its descending order */
        if (get(value + i * 8, 8) < used || i == get(value, 8)) {
            memcpy(value + i * 8, &used, 8);
            break;
        }
    cr_assert_eq(cold_starts(), 1);
}

Test(store_check, keys_out_of_order_do_not_pass)
{
    uint8_t *leaf = find_leaf(36, 2), space[2];
    memcpy(space, leaf + 16, 2);
    memcpy(leaf + 16, leaf + 18, 2);
    memcpy(leaf + 18, space, 2);
    cr_assert_eq(cold_starts(), 1);
}

Test(store_check, keys_beyond_their_branch_do_not_pass)
{
    uint8_t *leaf = find_leaf(36, 2); /* the first one: its last key goes past the second's */
    uint32_t last = (uint32_t)(get(leaf + 12, 2) - 16) / 2 - 1;
    node(leaf, last)[8 + 31]++;
    node(leaf, last)[8 + 24] = 0xff;
    cr_assert_eq(cold_starts(), 1);
}

Test(store_check, nodes_that_overlap_do_not_pass)
{
    uint8_t *leaf = find_leaf(32, 3);
    uint64_t key = get(node(leaf, 1) + 6, 2), bytes = get(node(leaf, 1), 4);
    cr_assert_geq(bytes, 80);
    /* Node 1 claims two bytes more: into its neighbour, or past the page's end. */
    bytes += 2;
    memcpy(node(leaf, 1), &bytes, 2);
    cr_assert_eq(key, 32);
    cr_assert_eq(cold_starts(), 1);
}

Test(store_check, a_page_that_says_it_is_dirty_does_not_pass)
{
    find_leaf(32, 1)[10] |= 0x10;
    cr_assert_eq(cold_starts(), 1, "LMDB would write into it where it lies");
}

Test(store_check, a_page_size_in_the_older_meta_page_does_not_pass)
{
    uint64_t older = get(golden.now.data + 4096 + 144, 8) < get(golden.now.data + 144, 8);
    golden.now.data[older * 4096 + 40 + 3] = 0xff;
    cr_assert_eq(cold_starts(), 1, "LMDB would look for the other one at its end");
}

Test(store_check, an_end_that_was_lost_does_not_pass)
{
    uint64_t newer = get(golden.now.data + 4096 + 144, 8) > get(golden.now.data + 144, 8);
    uint8_t *last = golden.now.data + newer * 4096 + 136;
    uint64_t less = get(last, 8) - 1;
    for (uint32_t i = 0; i < golden.now.tree_count; i++)
        if (golden.now.tree[i] > less)
            less = golden.now.tree[i] - 1;
    less = less / 2;
    memcpy(last, &less, 8);
    cr_assert_eq(cold_starts(), 1, "new pages would be put over old ones");
}

Test(store_check, a_record_that_does_not_match_harms_its_user_alone)
{
    struct skv_store *store;
    uint64_t cold, records;
    uint8_t *leaf = find_leaf(32, 2);
    node(leaf, 1)[8 + 32 + 20] ^= 1; /* 0 is user 0, whose record lies elsewhere */
    cr_assert_eq(cold_starts(), 0);
    cr_assert_eq(open_in(directory, &store), 0);
    skv_store_damage(store, &cold, &records);
    cr_assert_eq(records, 1);
    skv_store_close(store);
}

/* ---- sidekv.store ---- */

/* A power cut under `process`, and then the newer half of sidekv.store is lost: what the older one
 * says of a clean end is no longer so. */
Test(store_check, half_a_state_file_is_no_clean_end)
{
    drop_golden(&golden);
    make_golden(directory, 11, true, &golden);
    char *slots[2] = {(char *)golden.now.state, (char *)golden.now.state + 512};
    int newer = strtoull(strstr(slots[1], "sequence") + 9, NULL, 10) >
                strtoull(strstr(slots[0], "sequence") + 9, NULL, 10);
    cr_assert_not_null(strstr(slots[!newer], "clean 1"));
    slots[newer][20] ^= 1;
    char *boot = strstr(slots[!newer], "boot ") + 5; /* another boot than this one */
    boot[0] = boot[0] == '1' ? '2' : '1';
    char *check = strstr(slots[!newer], " check ") + 7;
    size_t body = (size_t)(check - slots[!newer]);
    char sum[17];
    snprintf(sum, sizeof sum, "%016llx", (unsigned long long)skv_checksum(slots[!newer], body));
    memcpy(check, sum, 16);
    cr_assert_eq(cold_starts(), 1);
}

Test(store_check, a_flipped_version_is_damage_and_no_other_version)
{
    for (int slot = 0; slot < 2; slot++)
        golden.now.state[slot * 512 + 13] ^= 2; /* 1: 3 */
    cr_assert_eq(cold_starts(), 1);
}
