/* A client whose session memory flips all the time, by a thread of its own, while it works. */
#ifndef SKV_FLIPPER_H
#define SKV_FLIPPER_H

#include "hostile_scripts.h"

struct flipper {
    struct raw raw;
    bool indices; /* flips those too: ends the session soon */
    bool on;
};

/* Where it hurts: the entries, the first requests, leases and hashes of the arena, the indices. */
static inline void *flipper_run(void *argument)
{
    struct flipper *f = argument;
    uint32_t seed = (uint32_t)f->raw.welcome.session;
    uint8_t *slot = (uint8_t *)f->raw.slots;
    while (__atomic_load_n(&f->on, __ATOMIC_RELAXED)) {
        seed = seed * 1664525u + 1013904223u;
        uint8_t bit = (uint8_t)(1u << (seed >> 29));
        uint32_t at = seed >> 8 & 0xfffff;
        f->raw.memory[WIRE_SQ_OFFSET + at % (WIRE_CQ_OFFSET - WIRE_SQ_OFFSET)] ^= bit;
        slot[at % (4 * sizeof(struct wire_request))] ^= bit;
        slot[offsetof(struct wire_slot, leases) + at % 32] ^= bit;
        slot[offsetof(struct wire_slot, hashes) + at % 256] ^= bit;
        if (f->indices && at % 512 == 0)
            f->raw.memory[seed >> 20 & (sizeof(struct wire_ring) - 1)] ^= bit;
    }
    return NULL;
}

/* Has it been ended? */
static inline bool flipper_over(const struct flipper *f)
{
    struct pollfd over = {.fd = f->raw.socket, .events = POLLIN};
    return poll(&over, 1, 0) > 0;
}

/* Works in memory that changes all the time, eight commands at once, till the daemon has enough or
 * `commands` are done. Returns how many were published. */
static inline uint32_t flipper_work(struct flipper *f, uint32_t commands)
{
    static const uint8_t opcodes[] = {WIRE_ACQUIRE, WIRE_COMMIT,   WIRE_ACQUIRE, WIRE_RELEASE,
                                      WIRE_LOOKUP,  WIRE_PREFETCH, WIRE_STATS,   WIRE_LIST};
    struct raw *raw = &f->raw;
    uint32_t done = 0;
    for (; done < commands && !flipper_over(f); done += 8) {
        for (uint32_t r = 0; r < 4; r++) { /* right for a moment */
            raw->slots[0].requests[r] = (struct wire_request){
                .user = {own_user() + r, 3}, .history = 40 * r, .max_cached = UINT32_MAX};
            raw->slots[0].leases[r] = raw->slots[0].grants[r].lease;
        }
        for (uint32_t i = 0; i < 8; i++) {
            bool batch = opcodes[i] >= WIRE_ACQUIRE && opcodes[i] <= WIRE_PREFETCH;
            uint32_t count = batch ? 4 : opcodes[i] == WIRE_LIST ? 9 : 0;
            raw_publish(raw, &(struct wire_sqe){.opcode = opcodes[i], .count = count});
        }
        raw_bell(raw);
        for (uint32_t spin = 0, taken = 0; spin < 100 && taken < 8; spin++) {
            for (; __atomic_load_n(&raw->ring->cq_tail, __ATOMIC_ACQUIRE) != raw->cq_head &&
                   taken < 8;
                 taken++)
                __atomic_store_n(&raw->ring->cq_head, ++raw->cq_head, __ATOMIC_RELEASE);
            sched_yield();
        }
    }
    return done;
}

/* A session of it from start to end. Returns 1 when the daemon ended it, 0 when not, -1 when it did
 * not come about. */
static inline int flipper_session(const struct rig *rig, bool indices)
{
    struct flipper f = {.indices = indices, .on = true};
    pthread_t thread;
    if (!raw_open(&f.raw, rig, &tiny) || pthread_create(&thread, NULL, flipper_run, &f))
        return -1;
    flipper_work(&f, 200);
    int over = flipper_over(&f);
    __atomic_store_n(&f.on, false, __ATOMIC_RELAXED);
    pthread_join(thread, NULL);
    raw_close(&f.raw);
    return over;
}

#endif
