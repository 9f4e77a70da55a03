/* The session's two rings, as both sides see them: who publishes, who sleeps, who wakes. Not
 * installed.
 *
 * A ring has one producer and one consumer in different processes. Each keeps a private copy of its
 * own index and never reads it back from shared memory; the other's index is read with acquire and
 * bounded before use. The NEED_WAKEUP handshake: the consumer sets the flag, then a seq_cst fence,
 * then looks once more; the producer publishes, then a seq_cst fence, then looks at the flag. One
 * of them sees the other. */
#ifndef SKV_RING_H
#define SKV_RING_H

#include "wire.h"

struct ring_side {    /* one side of one ring */
    uint32_t *mine;   /* my index in shared memory */
    uint32_t *theirs; /* the other's */
    uint32_t *flags;  /* WIRE_NEED_WAKEUP of the consumer */
    uint32_t index;   /* private copy of mine */
    uint32_t entries; /* a power of two */
};

/* Consumer: how many entries wait. More than `entries` is a lie: UINT32_MAX. Pairs with
 * ring_publish(). */
static inline uint32_t ring_ready(const struct ring_side *side)
{
    uint32_t count = __atomic_load_n(side->theirs, __ATOMIC_ACQUIRE) - side->index;
    return count <= side->entries ? count : UINT32_MAX;
}

/* Producer: room for how many. More than `entries` in flight is a lie: UINT32_MAX. Pairs with
 * ring_publish() of the consumer. */
static inline uint32_t ring_room(const struct ring_side *side)
{
    uint32_t used = side->index - __atomic_load_n(side->theirs, __ATOMIC_ACQUIRE);
    return used <= side->entries ? side->entries - used : UINT32_MAX;
}

/* Either side: the next `count` entries are published (producer) or taken (consumer). Pairs with
 * ring_ready(), ring_room(). */
static inline void ring_publish(struct ring_side *side, uint32_t count)
{
    side->index += count;
    __atomic_store_n(side->mine, side->index, __ATOMIC_RELEASE);
}

/* Producer, after publishing: must the consumer be woken? Pairs with the fence in ring_sleep(). */
static inline bool ring_must_wake(const struct ring_side *side)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return __atomic_load_n(side->flags, __ATOMIC_RELAXED) & WIRE_NEED_WAKEUP;
}

/* Consumer, before sleeping: true: sleep (the producer will wake me); false: something came
 * meanwhile. */
static inline bool ring_sleep(const struct ring_side *side)
{
    __atomic_store_n(side->flags, WIRE_NEED_WAKEUP, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return ring_ready(side) == 0;
}

/* Consumer, awake again. */
static inline void ring_awake(const struct ring_side *side)
{
    __atomic_store_n(side->flags, 0, __ATOMIC_RELAXED);
}

#endif
