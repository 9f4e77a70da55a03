/* The loop on epoll, for hosts without io_uring: one-shot registrations, re-armed by each watch.
 * One that the kernel does not take, for want of memory, is tried again every RETRY_MS. */
#include "loop_backend.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

_Static_assert(EPOLLIN == POLLIN && EPOLLOUT == POLLOUT && EPOLLHUP == POLLHUP &&
                   EPOLLRDHUP == POLLRDHUP,
               "poll and epoll name events alike");

#define EVENTS_A_TURN 64
#define RETRY_MS      10

struct epoll {
    int fd;
    struct watch *unarmed; /* what the kernel did not take */
};

static int epoll_open(void **state)
{
    struct epoll *epoll = calloc(1, sizeof *epoll);
    if (!epoll)
        return -ENOMEM;
    epoll->fd = epoll_create1(EPOLL_CLOEXEC);
    if (epoll->fd < 0) {
        int error = -errno;
        free(epoll);
        return error;
    }
    *state = epoll;
    return 0;
}

static void epoll_close(void *state)
{
    struct epoll *epoll = state;
    close(epoll->fd);
    free(epoll);
}

static void epoll_arm(void *state, struct watch *watch)
{
    struct epoll *epoll = state;
    struct epoll_event event = {.events = (watch->counts ? EPOLLIN : watch->events) | EPOLLONESHOT,
                                .data.ptr = watch};
    if (epoll_ctl(epoll->fd, EPOLL_CTL_MOD, watch->fd, &event) == 0 ||
        epoll_ctl(epoll->fd, EPOLL_CTL_ADD, watch->fd, &event) == 0)
        return;
    watch->unarmed = epoll->unarmed;
    epoll->unarmed = watch;
}

static void arm_again(struct epoll *epoll)
{
    struct watch *watch = epoll->unarmed, *next;
    epoll->unarmed = NULL;
    for (; watch; watch = next) {
        next = watch->unarmed;
        epoll_arm(epoll, watch);
    }
}

static void epoll_cancel(void *state, struct watch *watch)
{
    struct epoll *epoll = state;
    struct watch **link = &epoll->unarmed;
    while (*link && *link != watch)
        link = &(*link)->unarmed;
    if (*link)
        *link = watch->unarmed;
    epoll_ctl(epoll->fd, EPOLL_CTL_DEL, watch->fd, NULL);
    watch->pending = false;
}

static int finish(struct watch *watch, uint32_t events)
{
    if (!watch->counts)
        return loop_complete(watch, (int32_t)events);
    ssize_t got = read(watch->fd, &watch->counter, sizeof watch->counter);
    return loop_complete(watch, got < 0 ? -errno : (int32_t)got);
}

static int epoll_turn(void *state, bool wait, uint64_t timeout_ns)
{
    struct epoll *epoll = state;
    struct epoll_event events[EVENTS_A_TURN];
    arm_again(epoll);
    int timeout_ms = !wait                         ? 0
                     : timeout_ns > 3600000000000u ? 3600000
                                                   : (int)((timeout_ns + 999999) / 1000000);
    if (epoll->unarmed && timeout_ms > RETRY_MS)
        timeout_ms = RETRY_MS;
    int count = epoll_wait(epoll->fd, events, EVENTS_A_TURN, timeout_ms), ran = 0;
    if (count < 0)
        return errno == EINTR ? 0 : -errno;
    for (int i = 0; i < count; i++) {
        struct watch *watch = events[i].data.ptr;
        if (watch->pending) /* an earlier one of this turn may have ended it */
            ran += finish(watch, events[i].events);
    }
    return ran;
}

const struct loop_backend loop_epoll = {.name = "epoll",
                                        .open = epoll_open,
                                        .close = epoll_close,
                                        .arm = epoll_arm,
                                        .cancel = epoll_cancel,
                                        .turn = epoll_turn};
