/* The store after damage and sudden ends: kill -9, reboots, torn writes, bytes that changed on
 * disk.
 */
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "state.h"
#include "store_help.h"

#define MAP (256 * MIB)

static char directory[256];

static void set_up(void)
{
    temp_directory(directory);
}

static void tear_down(void)
{
    remove_directory(directory);
}

TestSuite(store_damage, .init = set_up, .fini = tear_down);
TestSuite(store_life, .init = set_up, .fini = tear_down);

/* ---- damage ---- */

static void flip(uint64_t offset)
{
    char file[300];
    uint8_t byte;
    snprintf(file, sizeof file, "%s/data.mdb", directory);
    int fd = open(file, O_RDWR);
    cr_assert_eq(pread(fd, &byte, 1, (off_t)offset), 1);
    byte ^= 0x10;
    cr_assert_eq(pwrite(fd, &byte, 1, (off_t)offset), 1);
    close(fd);
}

Test(store_damage, a_damaged_page_is_found_wherever_the_damage_lies)
{
    struct skv_store *store = open_store(directory, MAP);
    struct user u = user_of(8);
    uint64_t hashes[4];
    cr_assert_eq(store_user(store, u, 0, 64), 0);
    user_hashes(u, 64, hashes);
    struct skv_reader *reader;
    struct skv_location where;
    cr_assert_eq(skv_reader_open(store, &reader), 0);
    cr_assert_eq(skv_reader_begin(reader), 0);
    cr_assert_eq(skv_reader_locate(reader, MODEL, u.id, 1, &where), 0);
#define VERIFY() skv_page_verify(where.value, TINY_PAGE_BYTES, MODEL, u.id, 1, 32, hashes[1], 10)
    cr_assert_eq(VERIFY(), 0);
    const uint32_t spots[] = {0,
                              1,
                              4095,
                              TINY_PAGE_BYTES - 1,
                              TINY_PAGE_BYTES,
                              TINY_PAGE_BYTES + 20,
                              TINY_PAGE_BYTES + 63};
    for (unsigned i = 0; i < sizeof spots / sizeof *spots; i++) {
        flip(where.extent_offset + where.value_offset + spots[i]);
        cr_assert_eq(VERIFY(), SKV_ECORRUPT, "byte %u", spots[i]);
        flip(where.extent_offset + where.value_offset + spots[i]);
        cr_assert_eq(VERIFY(), 0);
    }
    skv_reader_close(reader);
    skv_store_close(store);
}

Test(store_damage, a_page_of_another_user_index_length_hash_or_later_generation_does_not_verify)
{
    struct skv_store *store = open_store(directory, MAP);
    struct user u = user_of(8);
    uint64_t hashes[4];
    cr_assert_eq(store_user(store, u, 0, 64), 0);
    user_hashes(u, 64, hashes);
    struct skv_reader *reader;
    struct skv_location where;
    cr_assert_eq(skv_reader_open(store, &reader), 0);
    cr_assert_eq(skv_reader_begin(reader), 0);
    cr_assert_eq(skv_reader_locate(reader, MODEL, u.id, 1, &where), 0);
    const void *v = where.value;
    const uint64_t n = TINY_PAGE_BYTES;
    struct skv_id other = {.lo = 1};
    cr_assert_eq(skv_page_verify(v, n, MODEL, u.id, 1, 32, hashes[1], 99), 0);
    cr_assert_eq(skv_page_verify(v, n, other, u.id, 1, 32, hashes[1], 10), SKV_ECORRUPT);
    cr_assert_eq(skv_page_verify(v, n, MODEL, other, 1, 32, hashes[1], 10), SKV_ECORRUPT);
    cr_assert_eq(skv_page_verify(v, n, MODEL, u.id, 0, 32, hashes[1], 10), SKV_ECORRUPT);
    cr_assert_eq(skv_page_verify(v, n, MODEL, u.id, 1, 31, hashes[1], 10), SKV_ECORRUPT);
    cr_assert_eq(skv_page_verify(v, n, MODEL, u.id, 1, 32, hashes[0], 10), SKV_ECORRUPT);
    cr_assert_eq(skv_page_verify(v, n, MODEL, u.id, 1, 32, hashes[1], 9), SKV_ECORRUPT);
    skv_reader_close(reader);
    skv_store_close(store);
}

static int count_record(void *context, const struct skv_record *record, const void *stored)
{
    uint64_t *seen = context, hashes[SKV_MAX_USER_PAGES];
    struct user u = user_of(record->user.lo);
    cr_assert(record->user.lo < 500);
    uint32_t count = user_hashes(u, record->tokens, hashes);
    struct skv_record expected = record_of(u, record->tokens, hashes);
    cr_assert_eq(memcmp(&expected, record, sizeof expected), 0);
    cr_assert_eq(memcmp(stored, hashes, count * sizeof *hashes), 0);
    seen[record->user.lo] += record->tokens;
    return 0;
}

/* Where `what` lies in the first 4 MiB of data.mdb; 0: nowhere. */
static uint64_t find_in_file(const void *what, size_t bytes)
{
    static uint8_t data[4 * MIB];
    char file[300];
    snprintf(file, sizeof file, "%s/data.mdb", directory);
    int fd = open(file, O_RDONLY);
    ssize_t got = pread(fd, data, sizeof data, 0);
    close(fd);
    uint8_t *at = got > 0 ? memmem(data, (size_t)got, what, bytes) : NULL;
    return at ? (uint64_t)(at - data) : 0;
}

Test(store_damage, a_damaged_record_is_ignored_and_the_rest_stays)
{
    struct skv_store *store = open_store(directory, MAP);
    uint64_t hashes[4], seen[500] = {0};
    for (uint64_t id = 0; id < 3; id++)
        cr_assert_eq(store_user(store, user_of(id), 0, 64), 0);
    skv_store_close(store);
    user_hashes(user_of(1), 64, hashes);
    uint64_t at = 0;
    for (uint64_t next; (next = find_in_file(hashes, 16)) != 0; at = next)
        flip(next + 9); /* older copies of the leaf carry it too */
    cr_assert_gt(at, 0);
    store = open_store(directory, MAP);
    cr_assert_eq(skv_store_scan(store, count_record, seen), 0);
    cr_assert_eq(seen[0], 64);
    cr_assert_eq(seen[1], 0);
    cr_assert_eq(seen[2], 64);
    struct skv_reader *reader;
    struct skv_record record;
    uint32_t count;
    cr_assert_eq(skv_reader_open(store, &reader), 0);
    cr_assert_eq(skv_reader_begin(reader), 0);
    cr_assert_eq(skv_reader_record(reader, MODEL, user_of(1).id, &record, hashes, 4, &count),
                 SKV_ECORRUPT);
    skv_reader_close(reader);
    cr_assert_eq(store_user(store, user_of(1), 0, 64), 0, "and it can be stored anew");
    cr_assert_eq(tokens_of(store, user_of(1)), 64);
    skv_store_close(store);
}

static void write_file(const char *name, const char *text)
{
    char file[300];
    snprintf(file, sizeof file, "%s/%s", directory, name);
    FILE *out = fopen(file, "w");
    fputs(text, out);
    fclose(out);
}

Test(store_damage, a_data_file_of_garbage_starts_cold)
{
    struct skv_store *store = open_store(directory, MAP);
    cr_assert_eq(store_user(store, user_of(1), 0, 64), 0);
    skv_store_close(store);
    write_file("data.mdb", "this was a database once");
    store = open_store(directory, MAP);
    cr_assert_eq(tokens_of(store, user_of(1)), 0);
    cr_assert_eq(store_user(store, user_of(1), 0, 64), 0);
    skv_store_close(store);
}

Test(store_damage, a_truncated_data_file_starts_cold_or_short_never_a_crash)
{
    char file[300];
    snprintf(file, sizeof file, "%s/data.mdb", directory);
    for (off_t bytes = 0; bytes < 300000; bytes = bytes * 2 + 4000) {
        struct skv_store *store = open_store(directory, MAP);
        for (uint64_t id = 0; id < 4; id++)
            cr_assert_eq(store_user(store, user_of(id), 0, 64), 0);
        skv_store_close(store);
        cr_assert_eq(truncate(file, bytes), 0);
        store = open_store(directory, MAP);
        skv_store_close(store);
        remove_directory(directory);
        cr_assert_eq(mkdir(directory, 0700), 0);
    }
}

Test(store_damage, a_tree_found_damaged_starts_cold)
{
    struct skv_store *store = open_store(directory, MAP);
    cr_assert_eq(store_user(store, user_of(1), 0, 64), 0);
    skv_store_close(store);
    struct skv_state state;
    bool fresh;
    cr_assert_eq(skv_state_open(directory, &state, &fresh), 0);
    state.damaged = true;
    cr_assert_eq(skv_state_write(&state), 0);
    skv_state_close(&state);
    store = open_store(directory, MAP);
    cr_assert_eq(tokens_of(store, user_of(1)), 0);
    skv_store_close(store);
}

static uint64_t cold_starts(const struct skv_store *store)
{
    uint64_t starts, records;
    skv_store_damage(store, &starts, &records);
    return starts;
}

/* Random users of all lengths, overwritten, cut and removed, a few in each transaction. */
static void random_history(struct skv_store *store, uint64_t *random, int transactions)
{
    static const uint32_t most[] = {40, 300, 1500, 12000};
    for (int i = 0; i < transactions; i++) {
        cr_assert_eq(skv_store_begin(store), 0);
        cr_assert_eq(skv_store_put_generation(store, *random % 1000 + 2000), 0);
        for (int users = 0; users < 4; users++) {
            *random = *random * UINT64_C(6364136223846793005) + 1442695040888963407u;
            uint64_t x = *random >> 33;
            struct user u = user_of(x % 60);
            uint32_t tokens = (uint32_t)(x / 64) % most[x % 64 < 2 ? 3 : x % 3] + 1;
            struct skv_record gone = {.model = MODEL, .user = u.id};
            cr_assert_eq(x % 5 ? put_user(store, u, 0, tokens)
                               : skv_store_put_record(store, &gone, NULL),
                         0);
        }
        cr_assert_eq(skv_store_commit(store), 0);
    }
}

Test(store_damage, whatever_a_writer_left_passes_the_check, .timeout = 120)
{
    uint64_t random = 7;
    for (int life = 0; life < 40; life++) {
        struct skv_store *store = open_store(directory, 1024 * MIB);
        cr_assert_eq(cold_starts(store), 0);
        random_history(store, &random, life % 7 * 4 + 1);
        skv_store_close(store);
    }
}

static void starts_cold_when_the_check(const char *fails)
{
    struct skv_store *store = open_store(directory, MAP);
    cr_assert_eq(store_user(store, user_of(1), 0, 64), 0);
    skv_store_close(store);
    setenv("SIDEKV_TEST_CHECK", fails, 1);
    store = open_store(directory, MAP);
    unsetenv("SIDEKV_TEST_CHECK");
    cr_assert_eq(tokens_of(store, user_of(1)), 0);
    cr_assert_eq(cold_starts(store), 1);
    cr_assert_eq(store_user(store, user_of(1), 0, 64), 0);
    skv_store_close(store);
    store = open_store(directory, MAP);
    cr_assert_eq(tokens_of(store, user_of(1)), 64);
    cr_assert_eq(cold_starts(store), 1, "counted, and not again");
    skv_store_close(store);
}

Test(store_damage, a_crash_of_the_check_starts_cold)
{
    starts_cold_when_the_check("crash");
}

Test(store_damage, a_check_that_hangs_starts_cold)
{
    starts_cold_when_the_check("hang");
}

/* What LMDB keeps in front of a stored page, damaged while the store is in use, in each of its
 * fields: it would free the wrong pages, or write where it may not. */
Test(store_damage, a_damaged_header_of_a_page_is_mended_before_lmdb_acts_on_it)
{
    static const uint32_t fields[] = {0, 5, 10, 12, 13, 15};
    struct skv_store *store = open_store(directory, MAP);
    for (uint64_t id = 0; id < 20; id++)
        cr_assert_eq(store_user(store, user_of(id), 0, 90), 0);
    for (uint64_t id = 0; id < 20; id++) {
        struct skv_reader *reader;
        struct skv_location where;
        cr_assert_eq(skv_reader_open(store, &reader), 0);
        cr_assert_eq(skv_reader_begin(reader), 0);
        cr_assert_eq(skv_reader_locate(reader, MODEL, user_of(id).id, id % 3, &where), 0);
        skv_reader_close(reader);
        flip(where.extent_offset + fields[id % 6]);
        cr_assert_eq(id % 2 ? remove_user(store, user_of(id))
                            : store_user(store, user_of(id), 0, 90 + (uint32_t)id),
                     0);
    }
    for (int round = 0; round < 2; round++) {
        for (uint64_t id = 0; id < 20; id++)
            cr_assert_eq(tokens_of(store, user_of(id)), id % 2 ? 0 : 90 + id);
        skv_store_close(store);
        store = open_store(directory, MAP); /* and the free list passes the check */
        cr_assert_eq(cold_starts(store), 0);
    }
    skv_store_close(store);
}

/* ---- lives and deaths ---- */

struct ack {
    uint32_t id, tokens;
};

static void write_until_killed(int acks)
{
    struct skv_store *store = open_store(directory, MAP);
    uint32_t had[40];
    for (uint32_t id = 0; id < 40; id++)
        had[id] = tokens_of(store, user_of(id));
    for (uint32_t step = (uint32_t)getpid();; step++) {
        uint32_t id = step * 2654435761u % 40, more = had[id] + 24;
        if (more > 600)
            more = 24;
        if (store_user(store, user_of(id), more == 24 ? 0 : had[id] / 32, more))
            _exit(1);
        had[id] = more;
        struct ack ack = {id, more};
        if (write(acks, &ack, sizeof ack) != sizeof ack)
            _exit(1);
    }
}

/* One child's life; expected[] is what it acknowledged. */
static void live_and_kill(uint32_t expected[40], useconds_t life_us)
{
    int ends[2];
    cr_assert_eq(pipe(ends), 0);
    pid_t child = fork();
    if (child == 0) {
        close(ends[0]);
        write_until_killed(ends[1]);
    }
    close(ends[1]);
    struct ack ack;
    cr_assert_eq(read(ends[0], &ack, sizeof ack), sizeof ack);
    expected[ack.id] = ack.tokens;
    usleep(life_us);
    kill(child, SIGKILL);
    while (read(ends[0], &ack, sizeof ack) == sizeof ack)
        expected[ack.id] = ack.tokens;
    close(ends[0]);
    int status;
    waitpid(child, &status, 0);
    cr_assert(WIFSIGNALED(status));
}

Test(store_life, kill_9_loses_nothing_acknowledged_and_damages_nothing, .timeout = 120)
{
    uint32_t expected[40] = {0};
    for (int life = 0; life < 25; life++) {
        live_and_kill(expected, (useconds_t)(1000 + life * 1700));
        struct skv_store *store = open_store(directory, MAP);
        int differing = 0;
        for (uint32_t id = 0; id < 40; id++) {
            uint32_t tokens = tokens_of(store, user_of(id)); /* checks every page */
            if (tokens != expected[id]) { /* at most the one commit that was not told */
                differing++;
                cr_assert(tokens == expected[id] + 24 || tokens == 24, "user %u", id);
            }
            expected[id] = tokens;
        }
        cr_assert_leq(differing, 1);
        skv_store_close(store);
    }
}

/* Leaves a store with one user, unclean, as if the machine had gone down. */
static void crash_and_reboot(enum skv_durability durability)
{
    pid_t child = fork();
    if (child == 0) {
        struct skv_store *store;
        if (try_open(directory, MAP, durability, &store) || store_user(store, user_of(1), 0, 64))
            _exit(1);
        _exit(0); /* no close */
    }
    int status;
    waitpid(child, &status, 0);
    cr_assert_eq(status, 0);
    struct skv_state state;
    bool fresh;
    cr_assert_eq(skv_state_open(directory, &state, &fresh), 0);
    cr_assert_not(fresh || state.clean);
    strcpy(state.boot, "00000000-1111-2222-3333-444444444444");
    cr_assert_eq(skv_state_write(&state), 0);
    skv_state_close(&state);
}

Test(store_life, an_unclean_reboot_under_process_starts_cold)
{
    crash_and_reboot(SKV_PROCESS);
    struct skv_store *store = open_store(directory, MAP);
    cr_assert_eq(tokens_of(store, user_of(1)), 0);
    skv_store_close(store);
}

Test(store_life, an_unclean_reboot_under_process_starts_cold_under_power_too)
{
    struct skv_store *store;
    crash_and_reboot(SKV_PROCESS);
    cr_assert_eq(try_open(directory, MAP, SKV_POWER, &store), 0);
    cr_assert_eq(tokens_of(store, user_of(1)), 0);
    skv_store_close(store);
}

Test(store_life, an_unclean_reboot_under_power_keeps_everything)
{
    crash_and_reboot(SKV_POWER);
    struct skv_store *store = open_store(directory, MAP);
    cr_assert_eq(tokens_of(store, user_of(1)), 64);
    skv_store_close(store);
}

Test(store_life, a_clean_close_survives_a_reboot_under_process)
{
    struct skv_store *store = open_store(directory, MAP);
    cr_assert_eq(store_user(store, user_of(1), 0, 64), 0);
    skv_store_close(store);
    struct skv_state state;
    bool fresh;
    cr_assert_eq(skv_state_open(directory, &state, &fresh), 0);
    cr_assert(state.clean);
    strcpy(state.boot, "00000000-1111-2222-3333-444444444444");
    cr_assert_eq(skv_state_write(&state), 0);
    skv_state_close(&state);
    store = open_store(directory, MAP);
    cr_assert_eq(tokens_of(store, user_of(1)), 64);
    skv_store_close(store);
}

Test(store_life, a_state_file_whose_length_came_to_disk_and_not_its_bytes_is_a_new_store)
{
    char file[300];
    snprintf(file, sizeof file, "%s/sidekv.store", directory);
    int fd = open(file, O_RDWR | O_CREAT, 0600);
    cr_assert_eq(ftruncate(fd, 1024), 0);
    close(fd);
    struct skv_store *store = open_store(directory, MAP);
    cr_assert_eq(store_user(store, user_of(1), 0, 64), 0);
    skv_store_close(store);
}

Test(store_life, a_torn_state_write_leaves_the_other_slot)
{
    struct skv_store *store = open_store(directory, MAP);
    cr_assert_eq(store_user(store, user_of(1), 0, 64), 0);
    skv_store_close(store);
    char file[300];
    snprintf(file, sizeof file, "%s/sidekv.store", directory);
    for (int slot = 0; slot < 2; slot++) {
        int fd = open(file, O_RDWR);
        cr_assert_eq(pwrite(fd, "sidekv store 1 sequ##", 21, slot * 512), 21);
        close(fd);
        store = open_store(directory, MAP); /* same boot: either slot will do */
        cr_assert_eq(tokens_of(store, user_of(1)), 64);
        skv_store_close(store);
    }
    int fd = open(file, O_RDWR);
    for (int slot = 0; slot < 2; slot++)
        cr_assert_eq(pwrite(fd, "sidekv store 1 sequ##", 21, slot * 512), 21);
    close(fd);
    store = open_store(directory, MAP);
    cr_assert_eq(tokens_of(store, user_of(1)), 0, "neither slot: cold");
    skv_store_close(store);
}
