/* The two rings of a session under load: a client thread and a daemon thread, each sometimes busy,
 * sometimes asleep, over one piece of shared memory. Every command must be answered exactly once,
 * its entry whole; a wake-up that gets lost shows as a stall. A plain program, for TSan too.
 *
 * usage: stress_ring [COMMANDS [SEED]] */
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "clock.h"
#include "ring.h"

#define STALL_MS 60000
#define SHUFFLED 8 /* commands that the daemon holds back and answers in another order */

static struct wire_ring ring;
static struct wire_sqe submissions[WIRE_ENTRIES];
static struct wire_cqe completions[WIRE_CQ_ENTRIES];
static int sq_event, cq_event;
static uint64_t commands = 200000;
static uint64_t slept[2];

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "stress_ring: line %d: not so: %s\n", __LINE__, #condition);           \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}

static uint64_t mix(uint64_t sequence)
{
    return next_random(&sequence);
}

/* Waits for entries: spins for a random while, then sleeps. */
static uint32_t await_entries(struct ring_side *side, int event, uint64_t *random, int who)
{
    for (;;) {
        for (uint64_t turns = next_random(random) % 200; turns; turns--) {
            uint32_t ready = ring_ready(side);
            if (ready) {
                CHECK(ready != UINT32_MAX);
                return ready;
            }
            skv_relax();
        }
        if (ring_sleep(side)) {
            struct pollfd bell = {.fd = event, .events = POLLIN};
            CHECK(poll(&bell, 1, STALL_MS) == 1); /* else a wake-up was lost */
            eventfd_t rings;
            CHECK(eventfd_read(event, &rings) == 0);
            slept[who]++;
        }
        ring_awake(side);
        uint32_t ready = ring_ready(side);
        if (ready) {
            CHECK(ready != UINT32_MAX);
            return ready;
        }
    }
}

static void publish(struct ring_side *side, uint32_t count, int event)
{
    ring_publish(side, count);
    if (ring_must_wake(side))
        CHECK(eventfd_write(event, 1) == 0);
}

static void dawdle(uint64_t *random)
{
    uint64_t choice = next_random(random) % 256;
    if (choice == 0)
        poll(NULL, 0, 1);
    else if (choice < 8)
        sched_yield();
}

static void *daemon_thread(void *argument)
{
    uint64_t random = *(uint64_t *)argument * 31 + 7, answered = 0;
    struct ring_side sq = {&ring.sq_head, &ring.sq_tail, &ring.sq_flags, 0, WIRE_ENTRIES};
    struct ring_side cq = {&ring.cq_tail, &ring.cq_head, &ring.cq_flags, 0, WIRE_CQ_ENTRIES};
    while (answered < commands) {
        struct wire_sqe taken[SHUFFLED];
        uint32_t ready = await_entries(&sq, sq_event, &random, 0);
        uint32_t count = 1 + (uint32_t)(next_random(&random) % SHUFFLED);
        count = count < ready ? count : ready;
        for (uint32_t i = 0; i < count; i++)
            taken[i] = submissions[(sq.index + i) % WIRE_ENTRIES];
        ring_publish(&sq, count);
        for (uint32_t left = count; left; left--) {
            uint32_t pick = (uint32_t)(next_random(&random) % left);
            const struct wire_sqe *sqe = &taken[pick];
            CHECK(sqe->argument == mix(sqe->user_data) && sqe->reserved == ~sqe->user_data);
            CHECK(ring_room(&cq) != UINT32_MAX && ring_room(&cq) > 0);
            struct wire_cqe *cqe = &completions[cq.index % WIRE_CQ_ENTRIES];
            cqe->user_data = sqe->user_data;
            for (int v = 0; v < 6; v++)
                cqe->value[v] = sqe->argument + (uint64_t)v;
            publish(&cq, 1, cq_event);
            taken[pick] = taken[left - 1];
        }
        answered += count;
        dawdle(&random);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    uint64_t seed = 1;
    if (argc > 1)
        commands = strtoull(argv[1], NULL, 10);
    if (argc > 2)
        seed = strtoull(argv[2], NULL, 10);
    sq_event = eventfd(0, EFD_CLOEXEC);
    cq_event = eventfd(0, EFD_CLOEXEC);
    uint8_t *done = calloc(commands, 1);
    CHECK(done && sq_event >= 0 && cq_event >= 0 && seed);
    pthread_t daemon;
    CHECK(pthread_create(&daemon, NULL, daemon_thread, &seed) == 0);

    struct ring_side sq = {&ring.sq_tail, &ring.sq_head, &ring.sq_flags, 0, WIRE_ENTRIES};
    struct ring_side cq = {&ring.cq_head, &ring.cq_tail, &ring.cq_flags, 0, WIRE_CQ_ENTRIES};
    uint64_t random = seed * 17 + 3, sent = 0, back = 0, start = skv_now_ns();
    while (back < commands) {
        uint32_t room = ring_room(&sq), burst = 0;
        CHECK(room != UINT32_MAX);
        uint32_t wanted = 1 + (uint32_t)(next_random(&random) % 16);
        while (burst < wanted && burst < room && sent < commands) {
            submissions[(sq.index + burst) % WIRE_ENTRIES] =
                (struct wire_sqe){.user_data = sent, .argument = mix(sent), .reserved = ~sent};
            sent++;
            burst++;
        }
        if (burst)
            publish(&sq, burst, sq_event);
        uint32_t ready = await_entries(&cq, cq_event, &random, 1);
        for (uint32_t i = 0; i < ready; i++) {
            struct wire_cqe cqe = completions[(cq.index + i) % WIRE_CQ_ENTRIES];
            CHECK(cqe.user_data < sent && !done[cqe.user_data]);
            done[cqe.user_data] = 1;
            for (int v = 0; v < 6; v++)
                CHECK(cqe.value[v] == mix(cqe.user_data) + (uint64_t)v);
        }
        ring_publish(&cq, ready);
        back += ready;
        dawdle(&random);
    }
    pthread_join(daemon, NULL);
    CHECK(sent == commands && ring_ready(&cq) == 0 && ring_room(&sq) == WIRE_ENTRIES);
    printf("stress_ring: %llu commands in %.2f s; daemon slept %llu times, client %llu\n",
           (unsigned long long)commands, (double)(skv_now_ns() - start) / 1e9,
           (unsigned long long)slept[0], (unsigned long long)slept[1]);
    free(done);
    return 0;
}
