#include "loop_backend.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "log.h"
#include "sidekv.h"

struct loop {
    const struct loop_backend *backend;
    void *state;
};

int loop_open(struct loop **out, bool epoll, const char **what)
{
    struct loop *loop = calloc(1, sizeof *loop);
    if (!loop)
        return SKV_ENOMEM;
    loop->backend = &loop_uring;
    int error = epoll ? -ENOSYS : loop_uring.open(&loop->state);
    if (error) {
        if (!epoll)
            skv_warn("no io_uring here (%s): serving by epoll, which costs some microseconds a "
                     "wake-up. Remedy: sysctl kernel.io_uring_disabled=0, and a seccomp profile "
                     "that allows io_uring_setup, io_uring_enter and io_uring_register",
                     strerror(-error));
        loop->backend = &loop_epoll;
        error = loop_epoll.open(&loop->state);
    }
    if (error) {
        skv_error("no event loop: %s", strerror(-error));
        free(loop);
        return SKV_EIO;
    }
    *what = loop->backend->name;
    *out = loop;
    return SKV_OK;
}

void loop_close(struct loop *loop)
{
    if (!loop)
        return;
    loop->backend->close(loop->state);
    free(loop);
}

static void arm(struct loop *loop, struct watch *watch, int fd, uint32_t events, bool counts)
{
    assert(!watch->pending && watch->done);
    watch->fd = fd;
    watch->pending = true;
    watch->cancelled = false;
    watch->counts = counts;
    watch->events = events;
    loop->backend->arm(loop->state, watch);
}

void loop_poll(struct loop *loop, struct watch *watch, int fd, uint32_t events)
{
    arm(loop, watch, fd, events, false);
}

void loop_read(struct loop *loop, struct watch *watch, int fd)
{
    arm(loop, watch, fd, 0, true);
}

bool loop_forget(struct loop *loop, struct watch *watch)
{
    if (watch->pending && !watch->cancelled) {
        watch->cancelled = true;
        loop->backend->cancel(loop->state, watch);
    }
    return !watch->pending;
}

int loop_complete(struct watch *watch, int32_t result)
{
    watch->pending = false;
    if (watch->cancelled)
        return 0;
    watch->done(watch->context, result);
    return 1;
}

int loop_turn(struct loop *loop, bool wait, uint64_t timeout_ns)
{
    return loop->backend->turn(loop->state, wait, timeout_ns);
}
