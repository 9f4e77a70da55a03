/* The loop on io_uring: polls and eventfd reads as submissions, one system call to submit and wait.
 */
#include "loop_backend.h"

#include <assert.h>
#include <errno.h>
#include <liburing.h>
#include <poll.h>
#include <stdlib.h>

/* A turn arms each watch once at most, and cancels it: three a session, a few of the daemon's. */
#define RING_ENTRIES 2048u

static int uring_open(void **state)
{
    struct io_uring *ring = calloc(1, sizeof *ring);
    if (!ring)
        return -ENOMEM;
    /* Task work runs when this thread enters the kernel, never as an interrupt of its spinning. */
    int error = io_uring_queue_init(RING_ENTRIES, ring,
                                    IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_COOP_TASKRUN |
                                        IORING_SETUP_TASKRUN_FLAG);
    if (error == -EINVAL) /* an older kernel */
        error = io_uring_queue_init(RING_ENTRIES, ring, 0);
    if (error) {
        free(ring);
        return error;
    }
    *state = ring;
    return 0;
}

static void uring_close(void *state)
{
    io_uring_queue_exit(state);
    free(state);
}

static struct io_uring_sqe *entry(struct io_uring *ring)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(ring);
    if (!sqe) {
        io_uring_submit(ring);
        sqe = io_uring_get_sqe(ring);
    }
    assert(sqe);
    return sqe;
}

static void uring_arm(void *state, struct watch *watch)
{
    struct io_uring_sqe *sqe = entry(state);
    if (watch->counts)
        io_uring_prep_read(sqe, watch->fd, &watch->counter, sizeof watch->counter, 0);
    else
        io_uring_prep_poll_add(sqe, watch->fd, watch->events);
    io_uring_sqe_set_data(sqe, watch);
}

static void uring_cancel(void *state, struct watch *watch)
{
    struct io_uring_sqe *sqe = entry(state);
    io_uring_prep_cancel(sqe, watch, 0);
    io_uring_sqe_set_data(sqe, NULL);
}

static int uring_turn(void *state, bool wait, uint64_t timeout_ns)
{
    struct io_uring *ring = state;
    struct io_uring_cqe *cqe;
    if (wait) {
        struct __kernel_timespec timeout = {.tv_sec = (long long)(timeout_ns / 1000000000u),
                                            .tv_nsec = (long long)(timeout_ns % 1000000000u)};
        int error = io_uring_submit_and_wait_timeout(ring, &cqe, 1, &timeout, NULL);
        if (error < 0 && error != -ETIME && error != -EINTR && error != -EAGAIN)
            return error;
    } else if (io_uring_sq_ready(ring)) {
        io_uring_submit(ring);
    }
    int ran = 0;
    while (io_uring_peek_cqe(ring, &cqe) == 0 && cqe) {
        struct watch *watch = io_uring_cqe_get_data(cqe);
        int32_t result = cqe->res;
        io_uring_cqe_seen(ring, cqe);
        if (watch)
            ran += loop_complete(watch, result);
    }
    return ran;
}

const struct loop_backend loop_uring = {.name = "io_uring",
                                        .open = uring_open,
                                        .close = uring_close,
                                        .arm = uring_arm,
                                        .cancel = uring_cancel,
                                        .turn = uring_turn};
