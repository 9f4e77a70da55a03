#include "queue.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "log.h"
#include "sidekv.h"

#define SEGMENT_MESSAGES 340u /* of 24 bytes: two pages of memory a segment */

struct skv_queue_segment {
    struct skv_queue_segment *next; /* written by the producer before it publishes into it */
    struct skv_message messages[SEGMENT_MESSAGES];
};

bool skv_queue_init(struct skv_queue *queue)
{
    *queue = (struct skv_queue){0};
    queue->head = queue->tail = malloc(sizeof *queue->head);
    return queue->head != NULL;
}

void skv_queue_fini(struct skv_queue *queue)
{
    while (queue->head) {
        struct skv_queue_segment *next = queue->head == queue->tail ? NULL : queue->head->next;
        free(queue->head);
        queue->head = next;
    }
    free(queue->spare);
    *queue = (struct skv_queue){0};
}

static struct skv_queue_segment *more(struct skv_queue *queue)
{
    /* Acquire: pairs with the consumer's release in pop(), which was done reading it. */
    struct skv_queue_segment *segment =
        atomic_exchange_explicit(&queue->spare, NULL, memory_order_acquire);
    bool said = false;
    while (!segment && !(segment = malloc(sizeof *segment))) {
        if (!said)
            skv_error("out of memory for a thread's queue: waiting for some");
        said = true;
        usleep(1000); /* the consumer may come to one meanwhile */
        segment = atomic_exchange_explicit(&queue->spare, NULL, memory_order_acquire);
    }
    return segment;
}

void skv_queue_push(struct skv_queue *queue, const struct skv_message *message)
{
    uint64_t at = queue->pushed % SEGMENT_MESSAGES;
    if (at == 0 && queue->pushed) {
        struct skv_queue_segment *segment = more(queue);
        queue->tail->next = segment;
        queue->tail = segment;
    }
    queue->tail->messages[at] = *message;
    queue->pushed++;
    /* Releases the message and `next`; seq_cst for the bell. */
    atomic_store(&queue->published, queue->pushed);
}

bool skv_queue_peek(struct skv_queue *queue, struct skv_message *message)
{
    if (!skv_queue_ready(queue))
        return false;
    uint64_t at = queue->popped % SEGMENT_MESSAGES;
    if (at == 0 && queue->popped)
        *message = queue->head->next->messages[0];
    else
        *message = queue->head->messages[at];
    return true;
}

bool skv_queue_pop(struct skv_queue *queue, struct skv_message *message)
{
    if (!skv_queue_peek(queue, message))
        return false;
    if (queue->popped && queue->popped % SEGMENT_MESSAGES == 0) {
        struct skv_queue_segment *emptied = queue->head;
        queue->head = emptied->next;
        /* Release: pairs with the producer's acquire in more(). */
        free(atomic_exchange_explicit(&queue->spare, emptied, memory_order_acq_rel));
    }
    queue->popped++;
    return true;
}

int skv_bell_init(struct skv_bell *bell)
{
    bell->fd = eventfd(0, EFD_CLOEXEC);
    if (bell->fd < 0) {
        skv_error("eventfd: %s", strerror(errno));
        return SKV_ENOMEM;
    }
    atomic_init(&bell->armed, 1);
    return 0;
}

void skv_bell_fini(struct skv_bell *bell)
{
    if (bell->fd >= 0)
        close(bell->fd);
    bell->fd = -1;
}

void skv_bell_ring(struct skv_bell *bell)
{
    /* The load pairs with skv_bell_arm(); of several producers one writes. */
    if (!atomic_load(&bell->armed) || !atomic_exchange(&bell->armed, 0))
        return;
    uint64_t one = 1;
    while (write(bell->fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

void skv_bell_wait(struct skv_bell *bell, uint64_t timeout_ns)
{
    struct pollfd poll = {.fd = bell->fd, .events = POLLIN};
    struct timespec timeout = {.tv_sec = (time_t)(timeout_ns / 1000000000u),
                               .tv_nsec = (long)(timeout_ns % 1000000000u)};
    uint64_t count;
    if (ppoll(&poll, 1, timeout_ns == UINT64_MAX ? NULL : &timeout, NULL) == 1)
        while (read(bell->fd, &count, sizeof count) < 0 && errno == EINTR)
            ;
    /* Awake: nobody need ring. A ring just now only makes the next wait a short one. */
    atomic_store_explicit(&bell->armed, 0, memory_order_relaxed);
}
