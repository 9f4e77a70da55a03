/* One command of one session: into the SQ, out of the CQ.
 *
 * Busy sides spin: no system call, lock or allocation then, clock reads go through the vDSO. After
 * `spin_ns` the caller announces that it sleeps (ring.h) and polls the CQ's bell in slices. The
 * spin adapts: it halves, down to an eighth, when a wait outlasted it, and returns to its full
 * length when a wait ended so soon that full spinning would have caught it.
 *
 * The library is synchronous and a handle has one thread, so one command is in flight at most: a
 * completion with any other user_data is a lie, and a command that timed out costs the session
 * (its completion could come at any time). */
#include "skv_session.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define SPIN_BATCH 64 /* turns between two looks at the clock */

int skv_session_usable(const struct skv *skv)
{
    if (*skv->owner == 0)
        return SKV_EPERM;
    return skv_lost(skv) ? SKV_ELOST : SKV_OK;
}

int skv_violation(struct skv *skv, const char *what)
{
    skv_session_lose(skv, "protocol violation by the daemon: %s", what);
    return SKV_EPROTO;
}

static int submit(struct skv *skv, const struct wire_sqe *sqe)
{
    uint32_t room = ring_room(&skv->sq);
    if (room == 0 || room == UINT32_MAX)
        return skv_violation(skv, "the submission ring's head is wrong");
    struct wire_sqe *entries = (struct wire_sqe *)(skv->memory + WIRE_SQ_OFFSET);
    entries[skv->sq.index & (skv->sq.entries - 1)] = *sqe;
    skv_failpoint(FAIL_client_unsubmitted);
    ring_publish(&skv->sq, 1);
    skv_failpoint(FAIL_client_submitted);
    if (ring_must_wake(&skv->sq))
        eventfd_write(skv->link.sq_event, 1);
    return SKV_OK;
}

/* Takes the completion if it is there: 0, SKV_EAGAIN or SKV_EPROTO. */
static int take(struct skv *skv, uint64_t user_data, struct wire_cqe *cqe)
{
    uint32_t ready = ring_ready(&skv->cq);
    if (ready == 0)
        return SKV_EAGAIN;
    if (ready == UINT32_MAX)
        return skv_violation(skv, "the completion ring's tail is wrong");
    const struct wire_cqe *entries = (struct wire_cqe *)(skv->memory + WIRE_CQ_OFFSET);
    *cqe = entries[skv->cq.index & (skv->cq.entries - 1)];
    ring_publish(&skv->cq, 1);
    if (cqe->user_data != user_data)
        return skv_violation(skv, "a completion of no command");
    if (!skv_status_told(cqe->status))
        return skv_violation(skv, "a completion's status is none");
    return SKV_OK;
}

/* Until something waits in the CQ, `lost`, or the time has come. */
static void spin(struct skv *skv, uint64_t until_ns)
{
    do {
        for (int turn = 0; turn < SPIN_BATCH; turn++) {
            if (ring_ready(&skv->cq) != 0 || skv_lost(skv))
                return;
            skv_relax();
        }
    } while (skv_now_ns() < until_ns);
}

/* One slice of sleep at most. False when poll() itself fails. */
static bool sleep_slice(struct skv *skv, uint64_t now_ns, uint64_t deadline_ns)
{
    bool fine = true;
    if (ring_sleep(&skv->cq)) {
        uint64_t left_ms = (deadline_ns - now_ns + 999999) / 1000000;
        int slice = left_ms < SKV_SLEEP_SLICE_MS ? (int)left_ms : SKV_SLEEP_SLICE_MS;
        struct pollfd bell = {.fd = skv->link.cq_event, .events = POLLIN};
        int ready = poll(&bell, 1, slice);
        fine = ready >= 0 || errno == EINTR;
        char rings[256]; /* eight bytes a ring */
        /* This thread is its only reader; too few taken: it looks once more. None, ever: the other
         * end is closed, as the watcher is about to say, unless the daemon is a broken one. */
        if (ready > 0 && read(skv->link.cq_event, rings, sizeof rings) == 0)
            poll(NULL, 0, 1);
    }
    ring_awake(&skv->cq);
    return fine;
}

static void adapt_spin(struct skv *skv, uint64_t waited_ns)
{
    if (waited_ns <= 2 * skv->spin_max_ns) /* a wake-up's own cost included */
        skv->spin_ns = skv->spin_max_ns;
    else if (skv->spin_ns > skv->spin_max_ns / 8)
        skv->spin_ns /= 2;
}

static int await(struct skv *skv, uint64_t user_data, uint64_t deadline_ns, struct wire_cqe *cqe)
{
    uint64_t start = skv_now_ns();
    if (skv->spin_ns) {
        uint64_t until = start + skv->spin_ns;
        spin(skv, until < deadline_ns ? until : deadline_ns);
    }
    for (bool slept = false;; slept = true) {
        /* `lost` first, then the ring: a completion published before the loss still counts. */
        bool lost = skv_lost(skv);
        int status = take(skv, user_data, cqe);
        if (status != SKV_EAGAIN) {
            if (slept && skv->spin_max_ns)
                adapt_spin(skv, skv_now_ns() - start);
            return status;
        }
        if (lost)
            return SKV_ELOST;
        uint64_t now = skv_now_ns();
        if (now >= deadline_ns) {
            skv_session_lose(skv, "no answer within %u ms", skv->options.timeout_ms);
            return SKV_ETIMEDOUT;
        }
        if (!sleep_slice(skv, now, deadline_ns)) {
            skv_session_lose(skv, "poll: %s", strerror(errno));
            return SKV_ELOST;
        }
    }
}

int skv_call(struct skv *skv, struct wire_sqe *sqe, uint64_t deadline_ns, struct wire_cqe *cqe)
{
    int status = skv_session_usable(skv);
    if (status)
        return status;
    sqe->user_data = ++skv->user_data;
    status = submit(skv, sqe);
    if (!status)
        status = await(skv, sqe->user_data, deadline_ns, cqe);
    return status ? status : cqe->status;
}

int skv_call_again(struct skv *skv, struct wire_sqe *sqe, uint64_t deadline_ns,
                   struct wire_cqe *cqe)
{
    int status = skv_call(skv, sqe, deadline_ns, cqe);
    while (status == SKV_ELOST && skv_session_return(skv, deadline_ns) == SKV_OK)
        status = skv_call(skv, sqe, deadline_ns, cqe);
    return status;
}
