/* The pinner on the host device: what it registers, when, and what it leaves alone. */
#include "clock.h"
#include "device.h"
#include "pinner.h"
#include "store_help.h"

#define MAP         (128 * MIB)
#define VALUE_BYTES (TINY_PAGE_BYTES + SKV_TRAILER_BYTES)

static char directory[256];
static struct skv_store *store;
static struct skv_device *device;
static const uint8_t *map;

static void set_up(void)
{
    uint64_t bytes;
    temp_directory(directory);
    store = open_store(directory, MAP);
    map = skv_store_map(store, &bytes);
    cr_assert_eq(skv_device_open("host", &device), 0);
}

static void tear_down(void)
{
    skv_device_close(device);
    skv_store_close(store);
    remove_directory(directory);
}

TestSuite(pinner, .init = set_up, .fini = tear_down, .timeout = 180);

/* Stores users of 320 tokens (360 KiB) until the store has used this much of its map. */
static void fill_to(uint64_t bytes)
{
    static uint64_t id;
    while (skv_store_high_water(store) < bytes)
        cr_assert_eq(store_user(store, user_of(id++), 0, 320), 0);
}

static bool covers_window(const struct skv_pinner *pinner, uint64_t window)
{
    return skv_pinner_covers(pinner, map + window * SKV_WINDOW_BYTES, SKV_WINDOW_BYTES);
}

static bool soon_covers(const struct skv_pinner *pinner, uint64_t window)
{
    for (int i = 0; i < 6000 && !covers_window(pinner, window); i++)
        usleep(10000);
    return covers_window(pinner, window);
}

static struct skv_pinner *start(uint64_t pin_bytes)
{
    struct skv_pinner *pinner;
    cr_assert_eq(skv_pinner_start(store, device, pin_bytes, &pinner), 0);
    return pinner;
}

Test(pinner, windows_are_registered_as_the_store_fills_them)
{
    struct skv_pinner *pinner = start(MAP);
    fill_to(2 * SKV_WINDOW_BYTES + MIB);
    cr_assert(soon_covers(pinner, 0));
    cr_assert(soon_covers(pinner, 1));
    cr_assert_not(covers_window(pinner, 3));
    cr_assert(skv_pinner_covers(pinner, map + SKV_WINDOW_BYTES - 100, 200), "across a border");
    fill_to(4 * SKV_WINDOW_BYTES + MIB);
    cr_assert(soon_covers(pinner, 3));
    cr_assert_not(covers_window(pinner, 5));
    cr_assert_geq(skv_pinner_bytes(pinner), 4 * SKV_WINDOW_BYTES);
    skv_pinner_stop(pinner);
}

Test(pinner, a_partly_used_window_waits_until_the_store_stands_still)
{
    struct skv_pinner *pinner = start(MAP);
    uint64_t begin_ns = skv_now_ns();
    fill_to(SKV_WINDOW_BYTES / 2);
    cr_assert(soon_covers(pinner, 0));
    cr_assert_geq(skv_now_ns() - begin_ns, 900000000u, "a second of standing still, less a little");
    cr_assert_eq(skv_pinner_bytes(pinner), SKV_WINDOW_BYTES);
    skv_pinner_stop(pinner);
}

Test(pinner, what_is_put_later_is_seen_through_a_registered_window)
{
    struct skv_pinner *pinner = start(MAP);
    fill_to(SKV_WINDOW_BYTES + MIB);
    cr_assert(soon_covers(pinner, 0));
    struct skv_reader *reader;
    struct skv_location where;
    struct user u = user_of(0);
    cr_assert_eq(skv_reader_open(store, &reader), 0);
    for (u.version = 1; u.version < 50; u.version++) {
        cr_assert_eq(store_user(store, u, 0, 320), 0);
        cr_assert_eq(skv_reader_begin(reader), 0);
        cr_assert_eq(check_user(reader, u), 320);
        cr_assert_eq(skv_reader_locate(reader, MODEL, u.id, 0, &where), 0);
    }
    skv_reader_close(reader);
    skv_pinner_stop(pinner);
}

Test(pinner, nothing_is_registered_while_paused)
{
    fill_to(3 * SKV_WINDOW_BYTES);
    struct skv_pinner *pinner = start(MAP);
    skv_pinner_pause(pinner, true);
    skv_pinner_pause(pinner, true);
    uint64_t bytes = skv_pinner_bytes(pinner);
    usleep(300000);
    cr_assert_eq(skv_pinner_bytes(pinner), bytes);
    skv_pinner_pause(pinner, false);
    usleep(300000);
    cr_assert_eq(skv_pinner_bytes(pinner), bytes, "nested");
    skv_pinner_pause(pinner, false);
    cr_assert(soon_covers(pinner, 2));
    skv_pinner_pause(pinner, true);
    skv_pinner_stop(pinner); /* while paused */
}

Test(pinner, no_more_than_pin_bytes_are_registered)
{
    fill_to(5 * SKV_WINDOW_BYTES);
    struct skv_pinner *pinner = start(2 * SKV_WINDOW_BYTES + MIB);
    cr_assert(soon_covers(pinner, 1));
    usleep(300000);
    cr_assert_eq(skv_pinner_bytes(pinner), 2 * SKV_WINDOW_BYTES);
    cr_assert_not(covers_window(pinner, 2));
    skv_pinner_stop(pinner);
    pinner = start(0);
    usleep(200000);
    cr_assert_eq(skv_pinner_bytes(pinner), 0);
    skv_pinner_stop(pinner);
}

Test(pinner, a_value_is_verified_once_marked_and_not_its_neighbours)
{
    struct skv_pinner *pinner = start(MAP);
    fill_to(SKV_WINDOW_BYTES + MIB);
    cr_assert(soon_covers(pinner, 0));
    struct skv_reader *reader;
    cr_assert_eq(skv_reader_open(store, &reader), 0);
    cr_assert_eq(skv_reader_begin(reader), 0);
    struct skv_location where[10];
    for (uint32_t index = 0; index < 10; index++) {
        cr_assert_eq(skv_reader_locate(reader, MODEL, user_of(3).id, index, &where[index]), 0);
        cr_assert(skv_pinner_covers(pinner, where[index].value, VALUE_BYTES));
        cr_assert_not(skv_pinner_verified(pinner, where[index].value));
    }
    for (uint32_t index = 0; index < 10; index += 2)
        skv_pinner_mark(pinner, where[index].value);
    for (uint32_t index = 0; index < 10; index++)
        cr_assert_eq(skv_pinner_verified(pinner, where[index].value), index % 2 == 0);
    skv_reader_close(reader);
    skv_pinner_stop(pinner);
}

Test(pinner, a_mark_from_before_a_registration_counts_for_nothing)
{
    fill_to(2 * SKV_WINDOW_BYTES);
    struct skv_pinner *pinner = start(MAP);
    skv_pinner_pause(pinner, true);
    const uint8_t *value = map + SKV_WINDOW_BYTES + 4096 + 16;
    bool early = covers_window(pinner, 1); /* it may have been quicker than the pause */
    skv_pinner_mark(pinner, value);
    skv_pinner_pause(pinner, false);
    cr_assert(soon_covers(pinner, 1));
    cr_assert_eq(skv_pinner_verified(pinner, value), early);
    skv_pinner_stop(pinner);
}

Test(pinner, memory_outside_the_map_is_never_covered)
{
    struct skv_pinner *pinner = start(MAP);
    fill_to(SKV_WINDOW_BYTES);
    cr_assert(soon_covers(pinner, 0));
    uint8_t local;
    cr_assert_not(skv_pinner_covers(pinner, &local, 1));
    cr_assert_not(skv_pinner_covers(pinner, map - 1, 2));
    cr_assert_not(skv_pinner_covers(pinner, map + MAP, 1));
    cr_assert_not(skv_pinner_covers(pinner, map, MAP + 1));
    cr_assert_not(skv_pinner_covers(pinner, map, UINT64_MAX));
    skv_pinner_stop(pinner);
}

Test(pinner, a_refused_registration_ends_the_walk_and_keeps_the_rest)
{
    fill_to(4 * SKV_WINDOW_BYTES);
    void *taken = (void *)(uintptr_t)(map + 2 * SKV_WINDOW_BYTES + 4096);
    cr_assert_eq(skv_host_register(device, taken, 4096, true), 0);
    struct skv_pinner *pinner = start(MAP);
    cr_assert(soon_covers(pinner, 1));
    usleep(300000);
    cr_assert_eq(skv_pinner_bytes(pinner), 2 * SKV_WINDOW_BYTES);
    skv_pinner_stop(pinner);
    cr_assert_eq(skv_host_unregister(device, taken), 0);
}

Test(pinner, stopping_unregisters_every_window)
{
    fill_to(3 * SKV_WINDOW_BYTES);
    struct skv_pinner *pinner = start(MAP);
    cr_assert(soon_covers(pinner, 2));
    skv_pinner_stop(pinner);
    void *whole = (void *)(uintptr_t)map;
    cr_assert_eq(skv_host_register(device, whole, MAP, true), 0);
    cr_assert_eq(skv_host_unregister(device, whole), 0);
    skv_pinner_stop(NULL);
}
