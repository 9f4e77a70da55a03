/* Direct reads: the same bytes as the map, from disk or from the page cache, with io_uring or
 * without. */
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include "direct.h"
#include "store_help.h"

#define USERS 20u
#define PAGES (USERS * 4u) /* of 100 tokens each */

static char directory[256];
static struct skv_store *store;
static struct skv_reader *reader;

static void open_in(const char *where)
{
    store = open_store(where, 64 * MIB);
    for (uint64_t id = 0; id < USERS; id++)
        cr_assert_eq(store_user(store, user_of(id), 0, 100), 0);
    cr_assert_eq(skv_reader_open(store, &reader), 0);
    cr_assert_eq(skv_reader_begin(reader), 0);
}

static void set_up(void)
{
    temp_directory(directory);
    open_in(directory);
}

static void tear_down(void)
{
    skv_reader_close(reader);
    skv_store_close(store);
    remove_directory(directory);
}

TestSuite(direct, .init = set_up, .fini = tear_down);

static struct skv_location locate(uint32_t page)
{
    struct skv_location where;
    cr_assert_eq(skv_reader_locate(reader, MODEL, user_of(page / 4).id, page % 4, &where), 0);
    return where;
}

static void *staging(uint64_t bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    cr_assert_neq(memory, MAP_FAILED);
    return memory;
}

/* Out of the page cache, as far as the kernel lets go of it: nothing of it may be mapped in. */
static void make_cold(const char *where)
{
    char file[300];
    uint64_t bytes;
    const uint8_t *map = skv_store_map(store, &bytes);
    snprintf(file, sizeof file, "%s/data.mdb", where);
    int fd = open(file, O_RDWR);
    cr_assert_eq(fsync(fd), 0);
    cr_assert_eq(madvise((void *)map, bytes, MADV_DONTNEED), 0);
    cr_assert_eq(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED), 0);
    close(fd);
}

static bool in_page_cache(struct skv_location where)
{
    unsigned char present[64];
    uint64_t bytes;
    const uint8_t *map = skv_store_map(store, &bytes);
    cr_assert_leq(where.extent_bytes, sizeof present * 4096);
    cr_assert_eq(mincore((void *)(map + where.extent_offset), where.extent_bytes, present), 0);
    for (uint32_t i = 0; i < where.extent_bytes / 4096; i++)
        if (present[i] & 1)
            return true;
    return false;
}

/* Reads every page with `depth` in flight and compares it with the map. */
static void read_all(struct skv_direct *direct, uint32_t depth)
{
    struct skv_direct_read reads[PAGES] = {0}, *done;
    uint32_t extent = locate(0).extent_bytes, submitted = 0, finished = 0;
    uint8_t *memory = staging((uint64_t)PAGES * extent);
    while (finished < PAGES) {
        while (submitted < PAGES) {
            struct skv_location where = locate(submitted);
            reads[submitted] = (struct skv_direct_read){
                .offset = where.extent_offset,
                .bytes = where.extent_bytes,
                .status = 77,
                .memory = memory + (uint64_t)submitted * extent,
                .tag = submitted,
            };
            int rc = skv_direct_submit(direct, &reads[submitted]);
            if (rc == SKV_EAGAIN) {
                cr_assert_eq(submitted - finished, depth);
                break;
            }
            cr_assert_eq(rc, 0);
            submitted++;
        }
        cr_assert_not_null(done = skv_direct_poll(direct, true));
        cr_assert_eq(done->status, 0);
        cr_assert_eq(done, &reads[done->tag]);
        finished++;
        struct skv_location where = locate((uint32_t)done->tag);
        cr_assert_eq(memcmp((uint8_t *)done->memory + where.value_offset, where.value,
                            TINY_PAGE_BYTES + SKV_TRAILER_BYTES),
                     0);
    }
    cr_assert_null(skv_direct_poll(direct, true));
    cr_assert_null(skv_direct_poll(direct, false));
    munmap(memory, (uint64_t)PAGES * extent);
}

Test(direct, what_was_just_written_is_read_right)
{
    struct skv_direct *direct;
    cr_assert_eq(skv_direct_open(skv_store_file(store), 8, &direct), 0);
    read_all(direct, 8);
    skv_direct_close(direct);
}

Test(direct, a_cold_read_equals_the_map)
{
    struct skv_direct *direct;
    cr_assert_eq(skv_direct_open(skv_store_file(store), 4, &direct), 0);
    for (int round = 0; round < 3; round++) {
        make_cold(directory);
        read_all(direct, 4);
    }
    skv_direct_close(direct);
}

Test(direct, a_cold_read_leaves_the_page_cache_alone)
{
    struct skv_direct *direct;
    struct skv_location where = locate(10);
    char file[300];
    snprintf(file, sizeof file, "%s/data.mdb", directory);
    int fd = open(file, O_RDONLY | O_DIRECT | O_CLOEXEC);
    if (fd < 0)
        cr_skip("this file system has no O_DIRECT");
    close(fd);
    make_cold(directory);
    if (in_page_cache(where))
        cr_skip("this file system does not let go of its page cache");
    cr_assert_eq(skv_direct_open(skv_store_file(store), 1, &direct), 0);
    struct skv_direct_read read = {.offset = where.extent_offset,
                                   .bytes = where.extent_bytes,
                                   .memory = staging(where.extent_bytes)};
    cr_assert_eq(skv_direct_submit(direct, &read), 0);
    cr_assert_eq(skv_direct_poll(direct, true), &read);
    cr_assert_eq(read.status, 0);
    usleep(20000); /* read-ahead would take its time */
    cr_assert_not(in_page_cache(where));
    skv_direct_close(direct);
}

Test(direct, a_half_cached_extent_is_read_right)
{
    struct skv_direct *direct;
    cr_assert_eq(skv_direct_open(skv_store_file(store), 8, &direct), 0);
    make_cold(directory);
    uint64_t bytes, sum = 0;
    const uint8_t *map = skv_store_map(store, &bytes);
    for (uint64_t at = 0; at < 4 * MIB; at += 3 * 4096)
        sum += map[at];
    cr_assert_neq(sum, 1);
    read_all(direct, 8);
    skv_direct_close(direct);
}

Test(direct, damage_on_disk_is_found_after_a_direct_read)
{
    struct skv_direct *direct;
    struct skv_location where = locate(6);
    char file[300];
    uint64_t hashes[4];
    user_hashes(user_of(1), 100, hashes);
    snprintf(file, sizeof file, "%s/data.mdb", directory);
    int fd = open(file, O_RDWR);
    off_t at = (off_t)where.extent_offset + 16 + 20000;
    uint8_t byte;
    cr_assert_eq(pread(fd, &byte, 1, at), 1);
    byte ^= 1;
    cr_assert_eq(pwrite(fd, &byte, 1, at), 1);
    close(fd);
    make_cold(directory);
    cr_assert_eq(skv_direct_open(skv_store_file(store), 1, &direct), 0);
    struct skv_direct_read read = {.offset = where.extent_offset,
                                   .bytes = where.extent_bytes,
                                   .memory = staging(where.extent_bytes)};
    cr_assert_eq(skv_direct_submit(direct, &read), 0);
    cr_assert_eq(skv_direct_poll(direct, true), &read);
    cr_assert_eq(read.status, 0, "the disk knows nothing of it");
    cr_assert_eq(skv_page_verify((uint8_t *)read.memory + where.value_offset, TINY_PAGE_BYTES,
                                 MODEL, user_of(1).id, 2, 32, hashes[2], 10),
                 SKV_ECORRUPT);
    skv_direct_close(direct);
}

Test(direct, a_read_past_the_end_is_an_error)
{
    struct skv_direct *direct;
    cr_assert_eq(skv_direct_open(skv_store_file(store), 2, &direct), 0);
    struct skv_direct_read read = {
        .offset = 64 * MIB - 4096, .bytes = 8192, .memory = staging(8192)};
    cr_assert_eq(skv_direct_submit(direct, &read), 0);
    cr_assert_eq(skv_direct_poll(direct, true), &read);
    cr_assert_eq(read.status, SKV_EIO);
    skv_direct_close(direct);
}

Test(direct, what_is_not_aligned_is_refused)
{
    struct skv_direct *direct;
    uint8_t *memory = staging(8192);
    cr_assert_eq(skv_direct_open(skv_store_file(store), 2, &direct), 0);
    struct skv_direct_read odd = {.offset = 512, .bytes = 4096, .memory = memory},
                           some = {.offset = 0, .bytes = 100, .memory = memory},
                           none = {.offset = 0, .bytes = 0, .memory = memory},
                           askew = {.offset = 0, .bytes = 4096, .memory = memory + 16};
    cr_assert_eq(skv_direct_submit(direct, &odd), SKV_EINVAL);
    cr_assert_eq(skv_direct_submit(direct, &some), SKV_EINVAL);
    cr_assert_eq(skv_direct_submit(direct, &none), SKV_EINVAL);
    cr_assert_eq(skv_direct_submit(direct, &askew), SKV_EINVAL);
    cr_assert_eq(skv_direct_open(skv_store_file(store), 0, &direct), SKV_EINVAL);
    skv_direct_close(direct);
}

Test(direct, closing_waits_for_what_is_in_flight)
{
    struct skv_direct *direct;
    make_cold(directory);
    cr_assert_eq(skv_direct_open(skv_store_file(store), 32, &direct), 0);
    struct skv_direct_read reads[32];
    for (uint32_t i = 0; i < 32; i++) {
        struct skv_location where = locate(i);
        reads[i] = (struct skv_direct_read){.offset = where.extent_offset,
                                            .bytes = where.extent_bytes,
                                            .status = 77,
                                            .memory = staging(where.extent_bytes)};
        cr_assert_eq(skv_direct_submit(direct, &reads[i]), 0);
    }
    skv_direct_close(direct);
    for (uint32_t i = 0; i < 32; i++)
        cr_assert_eq(reads[i].status, 0);
}

/* From here on this process is denied io_uring, as in a container. */
static void deny_io_uring(void)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_io_uring_setup, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {.len = 4, .filter = code};
    cr_assert_eq(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) < 0)
        cr_skip("no seccomp here: %s", strerror(errno));
}

Test(direct, without_io_uring_everything_is_read_all_the_same)
{
    struct skv_direct *direct;
    deny_io_uring();
    cr_assert_eq(skv_direct_open(skv_store_file(store), 4, &direct), 0);
    make_cold(directory);
    read_all(direct, 4);
    read_all(direct, 4);
    skv_direct_close(direct);
}

Test(direct, a_file_system_in_memory_will_do)
{
    char path[] = "/dev/shm/sidekv-test-XXXXXX";
    skv_reader_close(reader);
    skv_store_close(store);
    cr_assert_not_null(mkdtemp(path));
    open_in(path);
    struct skv_direct *direct;
    cr_assert_eq(skv_direct_open(skv_store_file(store), 4, &direct), 0);
    read_all(direct, 4);
    skv_direct_close(direct);
    remove_directory(path);
}
