/* The store: what goes in comes out, whatever happens in between; and what it refuses. */
#include <errno.h>
#include <fcntl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "store_help.h"

#define MAP (256 * MIB)

static char directory[256];

static void set_up(void)
{
    temp_directory(directory);
}

static void tear_down(void)
{
    umount2(directory, MNT_DETACH); /* only the test of a full disk mounted something */
    remove_directory(directory);
}

TestSuite(store, .init = set_up, .fini = tear_down);

static uint64_t file_blocks_bytes(const char *path)
{
    char file[300];
    struct stat st;
    snprintf(file, sizeof file, "%s/data.mdb", path);
    cr_assert_eq(stat(file, &st), 0);
    return (uint64_t)st.st_blocks * 512;
}

/* ---- what goes in comes out ---- */

Test(store, a_page_comes_back_byte_for_byte)
{
    struct skv_store *store = open_store(directory, MAP);
    struct user u = user_of(42);
    cr_assert_eq(store_user(store, u, 0, 100), 0);
    struct skv_reader *reader;
    cr_assert_eq(skv_reader_open(store, &reader), 0);
    cr_assert_eq(skv_reader_begin(reader), 0);
    uint8_t expected[TINY_PAGE_BYTES];
    for (uint32_t index = 0; index < 3; index++) {
        struct skv_location where;
        cr_assert_eq(skv_reader_locate(reader, MODEL, u.id, index, &where), 0);
        fill_page(u, index, expected);
        cr_assert_eq(memcmp(where.value, expected, sizeof expected), 0);
    }
    cr_assert_eq(check_user(reader, u), 100);
    skv_reader_close(reader);
    skv_store_close(store);
}

Test(store, slots_past_valid_are_zeroed_and_the_others_kept)
{
    struct skv_store *store = open_store(directory, MAP);
    struct user u = user_of(1);
    const uint32_t valid = 5;
    cr_assert_eq(store_user(store, u, 0, valid), 0);
    struct skv_reader *reader;
    struct skv_location where;
    cr_assert_eq(skv_reader_open(store, &reader), 0);
    cr_assert_eq(skv_reader_begin(reader), 0);
    cr_assert_eq(skv_reader_locate(reader, MODEL, u.id, 0, &where), 0);
    uint8_t expected[TINY_PAGE_BYTES];
    fill_page(u, 0, expected);
    for (uint32_t at = 0; at < TINY_PAGE_BYTES; at++) {
        bool kept = at / (TINY.head_dim * 2) % TINY.page_tokens < valid;
        cr_assert_eq(where.value[at], kept ? expected[at] : 0, "byte %u", at);
    }
    skv_reader_close(reader);
    skv_store_close(store);
}

Test(store, an_overflow_value_begins_16_bytes_behind_a_4096_boundary_of_the_file)
{
    struct skv_store *store = open_store(directory, MAP);
    struct skv_reader *reader;
    uint64_t map_bytes, page_bytes = TINY_PAGE_BYTES;
    const uint8_t *map = skv_store_map(store, &map_bytes);
    cr_assert_eq(map_bytes, MAP);
    for (uint64_t id = 0; id < 50; id++)
        cr_assert_eq(store_user(store, user_of(id), 0, 40), 0);
    cr_assert_eq(skv_reader_open(store, &reader), 0);
    cr_assert_eq(skv_reader_begin(reader), 0);
    for (uint64_t id = 0; id < 50; id++)
        for (uint32_t index = 0; index < 2; index++) {
            struct skv_location where;
            uint8_t value[TINY_PAGE_BYTES + SKV_TRAILER_BYTES];
            cr_assert_eq(skv_reader_locate(reader, MODEL, user_of(id).id, index, &where), 0);
            cr_assert_eq(where.extent_offset % 4096, 0);
            cr_assert_eq(where.extent_bytes % 4096, 0);
            cr_assert_eq(where.value_offset, 16);
            cr_assert_eq(where.value, map + where.extent_offset + 16);
            cr_assert_geq(where.extent_bytes, 16 + page_bytes + SKV_TRAILER_BYTES);
            cr_assert_leq(where.extent_offset + where.extent_bytes, skv_store_high_water(store));
            char file[300];
            snprintf(file, sizeof file, "%s/data.mdb", directory);
            int fd = open(file, O_RDONLY);
            cr_assert_eq(pread(fd, value, sizeof value, (off_t)where.extent_offset + 16),
                         sizeof value);
            close(fd);
            cr_assert_eq(memcmp(value, where.value, sizeof value), 0);
        }
    skv_reader_close(reader);
    skv_store_close(store);
}

Test(store, every_commit_leaves_a_valid_shorter_prefix)
{
    struct skv_store *store = open_store(directory, MAP);
    struct user u = user_of(9);
    struct skv_reader *reader;
    cr_assert_eq(skv_reader_open(store, &reader), 0);
    for (uint32_t tokens = 32; tokens <= 1024; tokens += 64) {
        cr_assert_eq(store_user(store, u, tokens / 32 > 2 ? tokens / 32 - 2 : 0, tokens), 0);
        cr_assert_eq(skv_reader_begin(reader), 0);
        cr_assert_eq(check_user(reader, u), tokens);
    }
    skv_reader_close(reader);
    skv_store_close(store);
    store = open_store(directory, MAP);
    cr_assert_eq(tokens_of(store, u), 992);
    skv_store_close(store);
}

Test(store, a_tail_page_is_rewritten_longer)
{
    struct skv_store *store = open_store(directory, MAP);
    struct user u = user_of(5);
    for (uint32_t tokens = 33; tokens <= 64; tokens++) {
        cr_assert_eq(store_user(store, u, 1 - (tokens == 33), tokens), 0);
        cr_assert_eq(tokens_of(store, u), tokens);
    }
    skv_store_close(store);
}

Test(store, a_shorter_record_removes_the_pages_past_it_and_no_others)
{
    struct skv_store *store = open_store(directory, MAP);
    struct user before = user_of(4), u = user_of(5), after = user_of(6);
    cr_assert_eq(store_user(store, before, 0, 320), 0);
    cr_assert_eq(store_user(store, u, 0, 320), 0);
    cr_assert_eq(store_user(store, after, 0, 320), 0);
    cr_assert_eq(store_user(store, u, 3, 96), 0); /* no pages put: the record alone */
    struct skv_reader *reader;
    struct skv_location where;
    cr_assert_eq(skv_reader_open(store, &reader), 0);
    cr_assert_eq(skv_reader_begin(reader), 0);
    cr_assert_eq(check_user(reader, u), 96);
    for (uint32_t index = 3; index < 12; index++)
        cr_assert_eq(skv_reader_locate(reader, MODEL, u.id, index, &where), SKV_ENOENT);
    cr_assert_eq(remove_user(store, u), 0);
    cr_assert_eq(skv_reader_begin(reader), 0);
    cr_assert_eq(check_user(reader, u), 0);
    cr_assert_eq(skv_reader_locate(reader, MODEL, u.id, 0, &where), SKV_ENOENT);
    cr_assert_eq(check_user(reader, before), 320);
    cr_assert_eq(check_user(reader, after), 320);
    cr_assert_eq(remove_user(store, u), 0, "removing nobody is fine");
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

static int count_three(void *context, const struct skv_record *record, const void *hashes)
{
    (void)record, (void)hashes;
    return ++*(int *)context == 3;
}

Test(store, a_scan_finds_every_user_once)
{
    struct skv_store *store = open_store(directory, MAP);
    uint64_t seen[500] = {0};
    cr_assert_eq(skv_store_begin(store), 0);
    for (uint64_t id = 0; id < 500; id++)
        cr_assert_eq(put_user(store, user_of(id), 0, (uint32_t)id % 70 + 1), 0);
    cr_assert_eq(skv_store_commit(store), 0);
    skv_store_close(store);
    store = open_store(directory, MAP);
    cr_assert_eq(skv_store_scan(store, count_record, seen), 0);
    for (uint64_t id = 0; id < 500; id++)
        cr_assert_eq(seen[id], id % 70 + 1);
    int some = 0;
    cr_assert_eq(skv_store_scan(store, count_three, &some), 0);
    cr_assert_eq(some, 3);
    skv_store_close(store);
}

Test(store, an_aborted_transaction_leaves_nothing)
{
    struct skv_store *store = open_store(directory, MAP);
    cr_assert_eq(store_user(store, user_of(1), 0, 64), 0);
    cr_assert_eq(skv_store_begin(store), 0);
    cr_assert_eq(put_user(store, user_of(1), 2, 128), 0);
    cr_assert_eq(put_user(store, user_of(2), 0, 128), 0);
    skv_store_abort(store);
    cr_assert_eq(tokens_of(store, user_of(1)), 64);
    cr_assert_eq(tokens_of(store, user_of(2)), 0);
    skv_store_close(store);
}

Test(store, a_reader_keeps_its_snapshot_while_the_writer_overwrites)
{
    struct skv_store *store = open_store(directory, MAP);
    struct user old = user_of(3), new = old;
    struct skv_reader *reader;
    struct skv_location where;
    uint8_t expected[TINY_PAGE_BYTES];
    cr_assert_eq(store_user(store, old, 0, 64), 0);
    cr_assert_eq(skv_reader_open(store, &reader), 0);
    cr_assert_eq(skv_reader_begin(reader), 0);
    cr_assert_eq(skv_reader_locate(reader, MODEL, old.id, 0, &where), 0);
    for (new.version = 1; new.version < 200; new.version++)
        cr_assert_eq(store_user(store, new, 0, 64), 0);
    fill_page(old, 0, expected);
    cr_assert_eq(memcmp(where.value, expected, sizeof expected), 0);
    cr_assert_eq(check_user(reader, old), 64);
    new.version--;
    cr_assert_eq(skv_reader_begin(reader), 0);
    cr_assert_eq(check_user(reader, new), 64);
    skv_reader_close(reader);
    skv_store_close(store);
}

Test(store, the_generation_mark_survives)
{
    struct skv_store *store = open_store(directory, MAP);
    cr_assert_eq(skv_store_generation(store), 0);
    cr_assert_eq(skv_store_begin(store), 0);
    cr_assert_eq(skv_store_put_generation(store, UINT64_C(1) << 40), 0);
    cr_assert_eq(skv_store_commit(store), 0);
    skv_store_close(store);
    store = open_store(directory, MAP);
    cr_assert_eq(skv_store_generation(store), UINT64_C(1) << 40);
    skv_store_close(store);
}

/* ---- space ---- */

Test(store, usage_follows_what_is_live_and_survives_a_reopen)
{
    struct skv_store *store = open_store(directory, MAP);
    uint64_t empty, full, reopened, again, limit;
    skv_store_usage(store, &empty, &limit);
    cr_assert_eq(limit, MAP);
    cr_assert_lt(empty, MIB);
    for (uint64_t id = 0; id < 100; id++)
        cr_assert_eq(store_user(store, user_of(id), 0, 320), 0);
    skv_store_usage(store, &full, &limit);
    uint64_t live = 1000 * (TINY_PAGE_BYTES + 4096);
    cr_assert(full >= live && full < live + live / 20, "%lu", full);
    skv_store_close(store);
    store = open_store(directory, MAP);
    skv_store_usage(store, &reopened, &limit);
    cr_assert(reopened >= live && reopened < live + live / 20, "%lu", reopened);
    for (uint64_t id = 0; id < 100; id++)
        cr_assert_eq(remove_user(store, user_of(id)), 0);
    skv_store_usage(store, &again, &limit);
    cr_assert_lt(again, MIB);
    skv_store_close(store);
}

Test(store, steady_overwriting_grows_the_file_no_further_than_a_tenth)
{
    struct skv_store *store = open_store(directory, MAP);
    uint64_t used, limit;
    for (uint64_t id = 0; id < 200; id++)
        cr_assert_eq(store_user(store, user_of(id), 0, 320), 0);
    for (uint32_t round = 1; round <= 2000; round++) {
        struct user u = user_of(round * 7919 % 200);
        if (round % 3 == 0)
            cr_assert_eq(remove_user(store, u), 0);
        u.version = round;
        cr_assert_eq(store_user(store, u, 0, 320), 0);
    }
    skv_store_usage(store, &used, &limit);
    uint64_t ever = skv_store_high_water(store);
    cr_assert_lt(ever, used + used / 10, "%lu used, %lu ever", used, ever);
    cr_assert_leq(file_blocks_bytes(directory), ever + MIB);
    skv_store_close(store);
}

Test(store, a_full_map_refuses_puts_until_users_are_removed)
{
    struct skv_store *store = open_store(directory, 64 * MIB);
    uint64_t id = 0, used, limit;
    int rc;
    while ((rc = store_user(store, user_of(id), 0, 64)) == 0)
        cr_assert_lt(++id, 2000);
    cr_assert_eq(rc, SKV_ENOSPC);
    skv_store_usage(store, &used, &limit);
    cr_assert_gt(used, limit / 10 * 9);
    cr_assert_eq(tokens_of(store, user_of(id)), 0);
    cr_assert_eq(store_user(store, user_of(id), 0, 64), SKV_ENOSPC);
    for (uint64_t i = 0; i < id; i++)
        cr_assert_eq(tokens_of(store, user_of(i)), 64);
    /* records still move, and every user can go, however full it is */
    for (uint64_t i = 0; i < id; i += 2)
        cr_assert_eq(remove_user(store, user_of(i)), 0);
    for (uint64_t i = 0; i < id / 10 * 8; i += 2) /* tree pages took some of the gaps */
        cr_assert_eq(store_user(store, user_of(i + 10000), 0, 64), 0);
    for (uint64_t i = 1; i < id; i += 2)
        cr_assert_eq(tokens_of(store, user_of(i)), 64);
    skv_store_close(store);
}

Test(store, a_transaction_that_failed_stays_failed_until_the_next_begin)
{
    struct skv_store *store = open_store(directory, 64 * MIB);
    cr_assert_eq(skv_store_begin(store), 0);
    uint64_t id = 0;
    while (put_user(store, user_of(id), 0, 64) == 0)
        cr_assert_lt(++id, 2000);
    cr_assert_eq(put_user(store, user_of(0), 0, 32), SKV_ENOSPC);
    cr_assert_eq(skv_store_put_generation(store, 3), SKV_ENOSPC);
    cr_assert_eq(skv_store_commit(store), SKV_ENOSPC);
    cr_assert_eq(tokens_of(store, user_of(0)), 0);
    cr_assert_eq(store_user(store, user_of(0), 0, 32), 0);
    skv_store_close(store);
}

Test(store, a_full_disk_is_an_error_and_everything_stored_stays)
{
    if (mount("sidekv-test", directory, "tmpfs", 0, "size=48m") < 0)
        cr_skip("needs root to mount a small tmpfs: %s", strerror(errno));
    char path[300];
    snprintf(path, sizeof path, "%s/store", directory);
    struct skv_store *store = open_store(path, MAP);
    uint64_t id = 0;
    int rc;
    while ((rc = store_user(store, user_of(id), 0, 320)) == 0)
        cr_assert_lt(++id, 2000);
    cr_expect_eq(rc, SKV_ENOSPC);
    cr_expect_gt(id, 90);
    for (uint64_t i = 0; i < id; i++)
        cr_expect_eq(tokens_of(store, user_of(i)), 320);
    for (uint64_t i = 0; i < 20; i++)
        cr_expect_eq(remove_user(store, user_of(i)), 0);
    for (uint64_t i = 0; i < 15; i++)
        cr_expect_eq(store_user(store, user_of(i + 5000), 0, 320), 0);
    skv_store_close(store);
    cr_expect_eq(try_open(path, MAP, SKV_PROCESS, &store), 0, "opens on a full disk");
    cr_expect_eq(tokens_of(store, user_of(50)), 320);
    skv_store_close(store);
    umount(directory);
}

Test(store, a_larger_map_grows_the_file_and_a_smaller_one_keeps_it)
{
    uint64_t bytes;
    struct skv_store *store = open_store(directory, 64 * MIB);
    cr_assert_eq(store_user(store, user_of(1), 0, 64), 0);
    skv_store_close(store);
    store = open_store(directory, 128 * MIB);
    skv_store_map(store, &bytes);
    cr_assert_eq(bytes, 128 * MIB);
    cr_assert_eq(tokens_of(store, user_of(1)), 64);
    skv_store_close(store);
    store = open_store(directory, 64 * MIB);
    skv_store_map(store, &bytes);
    cr_assert_eq(bytes, 128 * MIB);
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

/* ---- refusals ---- */

Test(store, another_geometry_is_refused_and_the_store_kept)
{
    struct skv_store *store = open_store(directory, MAP), *none = NULL;
    cr_assert_eq(store_user(store, user_of(1), 0, 64), 0);
    skv_store_close(store);
    struct skv_store_options options = {.path = directory, .geometry = TINY, .map_bytes = MAP};
    options.geometry.page_tokens = 64;
    cr_assert_eq(skv_store_open(&options, &none), SKV_EGEOMETRY);
    cr_assert_null(none);
    store = open_store(directory, MAP);
    cr_assert_eq(tokens_of(store, user_of(1)), 64);
    skv_store_close(store);
}

/* As a daemon leaves it that was started once, without the options that were meant. */
Test(store, one_of_another_geometry_with_nobody_in_it_is_made_anew)
{
    struct skv_store_options options = {.path = directory, .geometry = TINY, .map_bytes = MAP};
    struct skv_store *store = open_store(directory, MAP), *none = NULL;
    skv_store_close(store);
    options.geometry.page_tokens = 64;
    cr_assert_eq(skv_store_open(&options, &store), 0);
    skv_store_close(store);
    cr_assert_eq(skv_store_open(&options, &store), 0, "and is of the new one from then on");
    skv_store_close(store);
    store = open_store(directory, MAP);
    cr_assert_eq(store_user(store, user_of(1), 0, 64), 0);
    skv_store_close(store);
    cr_assert_eq(skv_store_open(&options, &none), SKV_EGEOMETRY);
    store = open_store(directory, MAP);
    cr_assert_eq(remove_user(store, user_of(1)), 0);
    skv_store_close(store);
    cr_assert_eq(skv_store_open(&options, &store), 0, "nobody is left");
    uint64_t cold, records;
    skv_store_damage(store, &cold, &records);
    cr_expect_eq(cold, 0, "nothing was lost");
    skv_store_close(store);
}

Test(store, one_of_another_geometry_that_cannot_be_looked_at_is_refused)
{
    struct skv_store_options options = {.path = directory, .geometry = TINY, .map_bytes = MAP};
    struct skv_store *store = open_store(directory, MAP), *none = NULL;
    skv_store_close(store);
    options.geometry.page_tokens = 64;
    setenv("SIDEKV_TEST_CHECK", "crash", 1);
    cr_expect_eq(skv_store_open(&options, &none), SKV_EGEOMETRY);
    unsetenv("SIDEKV_TEST_CHECK");
    store = open_store(directory, MAP);
    skv_store_close(store);
}

Test(store, a_second_opener_is_refused)
{
    struct skv_store *store = open_store(directory, MAP), *second;
    cr_assert_eq(try_open(directory, MAP, SKV_PROCESS, &second), SKV_EBUSY);
    pid_t child = fork();
    if (child == 0)
        _exit(try_open(directory, MAP, SKV_PROCESS, &second) == SKV_EBUSY ? 0 : 1);
    int status;
    waitpid(child, &status, 0);
    cr_assert_eq(status, 0);
    cr_assert_eq(store_user(store, user_of(1), 0, 64), 0);
    skv_store_close(store);
}

/* The directory's names and the files' bytes, in one number. */
static uint64_t digest_of(const char *path)
{
    char command[400], line[64] = "";
    snprintf(command, sizeof command, "cd %s && (ls -lA --time-style=full-iso; cat *) | sha1sum",
             path);
    FILE *pipe = popen(command, "r");
    cr_assert_not_null(fgets(line, sizeof line, pipe));
    pclose(pipe);
    return skv_checksum(line, 40);
}

static void refused_untouched(void)
{
    struct skv_store *store;
    uint64_t before = digest_of(directory);
    cr_assert_eq(try_open(directory, MAP, SKV_PROCESS, &store), SKV_ECORRUPT);
    cr_assert_eq(digest_of(directory), before);
}

Test(store, a_directory_of_other_files_is_refused_untouched)
{
    write_file("thesis.tex", "years of work");
    refused_untouched();
}

Test(store, a_database_that_is_not_ours_is_refused_untouched)
{
    struct skv_store *store = open_store(directory, MAP);
    skv_store_close(store);
    char file[300];
    snprintf(file, sizeof file, "%s/sidekv.store", directory);
    unlink(file);
    snprintf(file, sizeof file, "%s/data.mdb", directory);
    cr_assert_eq(truncate(file, 65536), 0);
    refused_untouched();
}

Test(store, a_data_file_that_is_no_database_and_not_ours_is_refused_untouched)
{
    write_file("data.mdb", "not LMDB");
    refused_untouched();
}

Test(store, a_state_file_that_is_not_ours_is_refused_untouched)
{
    write_file("sidekv.store", "shopping: eggs, milk\n");
    write_file("data.mdb", "not LMDB");
    refused_untouched();
}

Test(store, a_regular_file_is_refused_untouched)
{
    char file[300], text[16] = "";
    struct skv_store *store;
    write_file("file", "kept");
    snprintf(file, sizeof file, "%s/file", directory);
    cr_assert_eq(try_open(file, MAP, SKV_PROCESS, &store), SKV_ECORRUPT);
    FILE *in = fopen(file, "r");
    cr_assert_not_null(fgets(text, sizeof text, in));
    fclose(in);
    cr_assert_str_eq(text, "kept");
}

Test(store, a_missing_parent_a_tiny_map_and_a_silly_geometry_are_refused)
{
    char path[300];
    struct skv_store *store;
    snprintf(path, sizeof path, "%s/a/b", directory);
    cr_assert_eq(try_open(path, MAP, SKV_PROCESS, &store), SKV_ENOENT);
    cr_assert_eq(try_open(directory, MIB, SKV_PROCESS, &store), SKV_EINVAL);
    struct skv_store_options options = {.path = directory, .geometry = TINY, .map_bytes = MAP};
    options.geometry.head_dim = 100;
    cr_assert_eq(skv_store_open(&options, &store), SKV_EINVAL);
}

Test(store, a_later_format_is_refused_untouched)
{
    char text[128] = "sidekv store 2 whatever comes then check ";
    size_t body = strlen(text);
    snprintf(text + body, sizeof text - body, "%016llx\n",
             (unsigned long long)skv_checksum(text, body));
    write_file("sidekv.store", text);
    struct skv_store *store;
    uint64_t before = digest_of(directory);
    cr_assert_eq(try_open(directory, MAP, SKV_PROCESS, &store), SKV_ENOTSUP);
    cr_assert_eq(digest_of(directory), before);
}

Test(store, an_empty_directory_with_lost_and_found_will_do)
{
    char path[300];
    snprintf(path, sizeof path, "%s/lost+found", directory);
    cr_assert_eq(mkdir(path, 0700), 0);
    struct skv_store *store = open_store(directory, MAP);
    skv_store_close(store);
}

Test(store, pages_and_records_out_of_range_are_refused)
{
    struct skv_store *store = open_store(directory, MAP);
    static uint8_t page[TINY_PAGE_BYTES + SKV_TRAILER_BYTES];
    struct skv_record record = {.model = MODEL, .user = user_of(1).id, .tokens = 32};
    const struct {
        uint32_t index, valid;
    } bad[] = {{0, 0}, {0, 33}, {SKV_MAX_USER_PAGES, 1}};
    for (unsigned i = 0; i < 3; i++) {
        cr_assert_eq(skv_store_begin(store), 0);
        cr_assert_eq(skv_store_put_page(store, &record, bad[i].index, bad[i].valid, 1, 1, page),
                     SKV_EINVAL);
        skv_store_abort(store);
    }
    record.tokens = SKV_MAX_TOKENS + 1;
    cr_assert_eq(skv_store_begin(store), 0);
    cr_assert_eq(skv_store_put_record(store, &record, NULL), SKV_EINVAL);
    cr_assert_eq(skv_store_commit(store), SKV_EINVAL);
    cr_assert_eq(skv_store_commit(store), SKV_EINVAL, "no transaction at all");
    skv_store_close(store);
}
