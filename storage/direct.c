/* Cold reads of data.mdb, see direct.h.
 *
 * The happy path: cachestat says whether the extent is in the page cache. If it is, a buffered read
 * that may not block copies it there and then; else one O_DIRECT read goes to the io_uring. (Asking
 * by a read that may not block would do, but on a miss the kernel starts reading ahead into the
 * page cache, and the disk works twice.) A short read goes on where it stopped.
 *
 * Failure: no io_uring (containers deny it): pread in submit, said once. A file system that refuses
 * the O_DIRECT read: a buffered one. Anything else: SKV_EIO, logged with the kernel's text. */
#include "direct.h"

#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "log.h"

#define BLOCK_BYTES 4096u /* what O_DIRECT wants of offset, length and memory */
#define MAX_DEPTH   4096u

#ifndef SYS_cachestat
#define SYS_cachestat 451 /* Linux 6.5; newer than Debian 12's headers */
#endif

struct slot {
    struct skv_direct_read *read; /* NULL: free */
    uint32_t done;                /* bytes read so far, a multiple of BLOCK_BYTES */
};

struct skv_direct {
    int fd;       /* the caller's, O_DIRECT where possible */
    int buffered; /* our own, without O_DIRECT; -1: none, then nothing is looked for in the cache */
    bool no_cachestat;
    bool has_ring, refused; /* refused: it is only reaped any more */
    struct io_uring ring;
    uint32_t depth, in_flight; /* in_flight counts finished ones too, until they are polled */
    struct slot *slots;        /* [depth] */
    struct skv_direct_read **finished; /* [depth], a ring: those that needed no io_uring */
    uint32_t finished_first, finished_count;
};

int skv_direct_open(int fd, uint32_t depth, struct skv_direct **out)
{
    if (depth == 0 || depth > MAX_DEPTH)
        return SKV_EINVAL;
    struct skv_direct *direct = calloc(1, sizeof *direct);
    if (!direct)
        return SKV_ENOMEM;
    direct->fd = fd;
    direct->depth = depth;
    direct->slots = calloc(depth, sizeof *direct->slots);
    direct->finished = calloc(depth, sizeof(void *));
    if (!direct->slots || !direct->finished) {
        free(direct->finished);
        free(direct->slots);
        free(direct);
        return SKV_ENOMEM;
    }
    char name[64];
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    direct->buffered = open(name, O_RDONLY | O_CLOEXEC);
    if (direct->buffered >= 0)
        posix_fadvise(direct->buffered, 0, 0, POSIX_FADV_RANDOM);
    int rc = io_uring_queue_init(depth, &direct->ring, 0);
    direct->has_ring = rc == 0;
    if (rc)
        skv_warn("no io_uring for reads of the store (%s): they go one by one; in a container, "
                 "allow io_uring_setup in its seccomp profile",
                 strerror(-rc));
    *out = direct;
    return 0;
}

static void finish(struct skv_direct *direct, struct skv_direct_read *read, int status)
{
    read->status = status;
    direct->finished[(direct->finished_first + direct->finished_count++) % direct->depth] = read;
}

static int fail(const struct skv_direct_read *read, int error)
{
    skv_error("store: reading %u bytes at %llu of data.mdb: %s", read->bytes,
              (unsigned long long)read->offset, error ? strerror(error) : "it ends there");
    return SKV_EIO;
}

/* Is the whole extent in the page cache? Without cachestat: is its first block? */
static bool is_cached(struct skv_direct *direct, const struct skv_direct_read *read)
{
    struct {
        uint64_t offset, bytes;
    } range = {read->offset, read->bytes};
    struct {
        uint64_t cached, dirty, writeback, evicted, recently_evicted;
    } pages = {0};
    if (!direct->no_cachestat) {
        if (syscall(SYS_cachestat, direct->buffered, &range, &pages, 0) == 0)
            return pages.cached * BLOCK_BYTES >= read->bytes;
        direct->no_cachestat = true;
    }
    struct iovec first = {read->memory, BLOCK_BYTES};
    return preadv2(direct->buffered, &first, 1, (off_t)read->offset, RWF_NOWAIT) == BLOCK_BYTES;
}

/* Bytes copied from the page cache without waiting, whole blocks. */
static uint32_t read_cached(struct skv_direct *direct, const struct skv_direct_read *read)
{
    if (direct->buffered < 0 || !is_cached(direct, read))
        return 0;
    uint32_t done = 0;
    while (done < read->bytes) {
        struct iovec rest = {(uint8_t *)read->memory + done, read->bytes - done};
        ssize_t got = preadv2(direct->buffered, &rest, 1, (off_t)(read->offset + done), RWF_NOWAIT);
        if (got < (ssize_t)BLOCK_BYTES)
            break;
        done += (uint32_t)got / BLOCK_BYTES * BLOCK_BYTES;
    }
    return done;
}

/* Reads the rest here and now: where there is no io_uring, or it would not. */
static int read_waiting(struct skv_direct *direct, const struct skv_direct_read *read,
                        uint32_t done)
{
    int fd = direct->fd;
    while (done < read->bytes) {
        ssize_t got = pread(fd, (uint8_t *)read->memory + done, read->bytes - done,
                            (off_t)(read->offset + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 && errno == EINVAL && fd == direct->fd && direct->buffered >= 0) {
            fd = direct->buffered; /* no O_DIRECT here, or of larger blocks */
            continue;
        }
        if (got <= 0)
            return fail(read, got < 0 ? errno : 0);
        done += (uint32_t)got;
        if (done % BLOCK_BYTES && direct->buffered >= 0)
            fd = direct->buffered;
    }
    return 0;
}

/* Hands the rest of a slot's read to the kernel; false when it takes none (no memory for it): then
 * the ring is not submitted to again, and reads go one by one. */
static bool start(struct skv_direct *direct, uint32_t index)
{
    struct slot *slot = &direct->slots[index];
    struct skv_direct_read *read = slot->read;
    struct io_uring_sqe *sqe = direct->refused ? NULL : io_uring_get_sqe(&direct->ring);
    if (!sqe)
        return false;
    io_uring_prep_read(sqe, direct->fd, (uint8_t *)read->memory + slot->done,
                       read->bytes - slot->done, read->offset + slot->done);
    sqe->user_data = index;
    int rc;
    do
        rc = io_uring_submit(&direct->ring);
    while (rc == -EINTR);
    if (rc > 0)
        return true;
    skv_warn("io_uring takes no more reads of the store (%s): they go one by one", strerror(-rc));
    direct->refused = true; /* the entry stays in the ring, unseen */
    return false;
}

int skv_direct_submit(struct skv_direct *direct, struct skv_direct_read *read)
{
    if (read->bytes == 0 || (read->offset | read->bytes | (uintptr_t)read->memory) % BLOCK_BYTES)
        return SKV_EINVAL;
    if (direct->in_flight == direct->depth)
        return SKV_EAGAIN;
    direct->in_flight++;
    uint32_t done = read_cached(direct, read);
    if (done == read->bytes) {
        finish(direct, read, 0);
        return 0;
    }
    if (!direct->has_ring) {
        finish(direct, read, read_waiting(direct, read, done));
        return 0;
    }
    uint32_t index = 0;
    while (direct->slots[index].read)
        index++;
    direct->slots[index] = (struct slot){.read = read, .done = done};
    if (!start(direct, index)) {
        direct->slots[index].read = NULL;
        finish(direct, read, read_waiting(direct, read, done));
    }
    return 0;
}

/* One completion of the ring: the finished read, or NULL when it goes on. */
static struct skv_direct_read *complete(struct skv_direct *direct, uint32_t index, int result)
{
    struct slot *slot = &direct->slots[index];
    struct skv_direct_read *read = slot->read;
    int rc = 0;
    if (result > 0)
        slot->done += (uint32_t)result;
    if (slot->done < read->bytes) {
        bool again =
            result == -EINTR || result == -EAGAIN || (result > 0 && slot->done % BLOCK_BYTES == 0);
        if (again && start(direct, index))
            return NULL;
        if (result == -EINVAL || result > 0)
            rc = read_waiting(direct, read, slot->done / BLOCK_BYTES * BLOCK_BYTES);
        else
            rc = fail(read, -result);
    }
    slot->read = NULL;
    read->status = rc;
    direct->in_flight--;
    return read;
}

struct skv_direct_read *skv_direct_poll(struct skv_direct *direct, bool wait)
{
    if (direct->finished_count) {
        struct skv_direct_read *read = direct->finished[direct->finished_first];
        direct->finished_first = (direct->finished_first + 1) % direct->depth;
        direct->finished_count--;
        direct->in_flight--;
        return read;
    }
    while (direct->in_flight) {
        struct io_uring_cqe *cqe;
        int rc =
            wait ? io_uring_wait_cqe(&direct->ring, &cqe) : io_uring_peek_cqe(&direct->ring, &cqe);
        if (rc == -EINTR)
            continue;
        if (rc)
            return NULL;
        uint32_t index = (uint32_t)cqe->user_data;
        int result = cqe->res;
        io_uring_cqe_seen(&direct->ring, cqe);
        struct skv_direct_read *read = complete(direct, index, result);
        if (read)
            return read;
    }
    return NULL;
}

void skv_direct_close(struct skv_direct *direct)
{
    if (!direct)
        return;
    while (
        skv_direct_poll(direct, true)) /* the kernel writes into the caller's memory until then */
        ;
    if (direct->has_ring)
        io_uring_queue_exit(&direct->ring);
    if (direct->buffered >= 0)
        close(direct->buffered);
    free(direct->finished);
    free(direct->slots);
    free(direct);
}
