/* How the daemon's threads hand each other work: an unbounded queue of small messages with one
 * producer and one consumer, and a bell to wake the consumer by.
 *
 * No locks; nothing is allocated once the queue has been as long as it gets: messages live in a
 * chain of segments, and the one that was emptied last is kept for the producer's next need. A
 * queue that cannot be full needs no answer to "what if it is full". (Without memory for a segment
 * the producer waits, for that or for the consumer.)
 *
 * The bell's handshake is the ring's NEED_WAKEUP: the consumer says that it will sleep, then looks
 * once more; the producer publishes, then looks whether the consumer sleeps. All four are
 * sequentially consistent, so that at least one of them sees the other. */
#ifndef SKV_QUEUE_H
#define SKV_QUEUE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct skv_message {
    uint32_t kind; /* the users' */
    int32_t status;
    union {
        uint64_t id;
        struct {
            uint32_t user, index;
        };
    };
    void *job;
};

struct skv_queue_segment;

struct skv_queue {
    struct skv_queue_segment *tail; /* producer's */
    uint64_t pushed;                /* producer's: messages ever */
    uint8_t own_line[48];
    _Atomic uint64_t published; /* producer writes, consumer reads */
    uint8_t shared_line[56];
    struct skv_queue_segment *head; /* consumer's */
    uint64_t popped;                /* consumer's: messages ever */
    struct skv_queue_segment *_Atomic spare;
};

bool skv_queue_init(struct skv_queue *queue); /* false: out of memory */
void skv_queue_fini(struct skv_queue *queue); /* what is left in it is forgotten */
void skv_queue_push(struct skv_queue *queue, const struct skv_message *message);
/* The oldest message; false: none. It stays in the queue until it is popped. */
bool skv_queue_peek(struct skv_queue *queue, struct skv_message *message);
bool skv_queue_pop(struct skv_queue *queue, struct skv_message *message);

/* Consumer: is there something? Seq_cst: also the second look after skv_bell_arm(). */
static inline bool skv_queue_ready(const struct skv_queue *queue)
{
    return atomic_load(&queue->published) != queue->popped;
}

/* One consumer, who may listen to several queues; any number of producers. */
struct skv_bell {
    int fd; /* an eventfd, blocking: for poll, or an io_uring read */
    _Atomic uint32_t armed;
};

int skv_bell_init(struct skv_bell *bell); /* 0, or SKV_ENOMEM (logged) */
void skv_bell_fini(struct skv_bell *bell);
/* Producer, after skv_queue_push(): wakes the consumer if it sleeps or is about to. */
void skv_bell_ring(struct skv_bell *bell);

/* Consumer: the next push shall ring. Look at the queues once more before sleeping. */
static inline void skv_bell_arm(struct skv_bell *bell)
{
    atomic_store(&bell->armed, 1); /* pairs with the load in skv_bell_ring() */
}

/* Consumer, armed: sleeps until it rings, at most `timeout_ns` (UINT64_MAX: for ever). */
void skv_bell_wait(struct skv_bell *bell, uint64_t timeout_ns);

#endif
