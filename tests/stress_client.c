/* A session whose daemon dies again and again, at any moment: every call must return, every gate
 * must open, every reconnect must find the same addresses. A second thread waits at gates as a
 * stream would. A plain program, for TSan too (Criterion does not run under it).
 *
 * A supervisor, forked while this process has one thread, runs one scripted daemon after another
 * and kills each after a few milliseconds, most of them once they have a client. The last one stays
 * until the client has met it.
 *
 * usage: stress_client [DAEMONS [SEED]] */
#include <pthread.h>
#include <time.h>

#include "fake_daemon.h"
#include "log.h"
#include "sidekv.h"

static struct fake fake;
static struct skv *skv;
static uint32_t finished; /* atomic */

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "stress_client: line %d: not so: %s\n", __LINE__, #condition);         \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

/* One daemon: answers what it can, gates every other batch and opens them late, or never. */
static void serve(struct fake *f)
{
    fake_handshake(f);
    fake_here(f);
    for (uint32_t round = 0;; round++) {
        struct wire_sqe sqe = fake_take_any(f);
        struct wire_cqe cqe = {.user_data = sqe.user_data};
        uint32_t *row = f->gates + sqe.row * (f->hello.gate_stride / sizeof *f->gates);
        if (sqe.opcode == WIRE_ACQUIRE) {
            bool gated = round / 2 % 2;
            cqe.value[0] = gated;
            __atomic_store_n(&row[2], 0, __ATOMIC_RELAXED);
            for (int layer = 0; layer < 2; layer++)
                __atomic_store_n(&row[layer], !gated, __ATOMIC_RELEASE);
            fake_grant(f, sqe.row, 0, 16, true)->flags |= gated ? SKV_GRANT_GATED : 0;
        } else if (sqe.opcode == WIRE_COMMIT) {
            fake_slot(f, sqe.row)->results[0] = (struct wire_committed){.committed = 32};
        }
        if (round % 7 == 3)
            poll(NULL, 0, 1); /* long enough for the client to fall asleep */
        fake_complete(f, cqe);
        for (int layer = 0; sqe.opcode == WIRE_ACQUIRE && layer < 2; layer++)
            skv_gate_store(&row[layer], 1);
    }
}

static void supervise(struct fake *f)
{
    const uint32_t *arguments = f->argument;
    srand(arguments[1]);
    close(f->listener);
    for (uint32_t life = 0; life <= arguments[0]; life++) {
        uint32_t clients = __atomic_load_n(&f->shared->here, __ATOMIC_ACQUIRE);
        bool last = life == arguments[0];
        f->session = 1000 + life;
        __atomic_store_n(&f->shared->seen, last, __ATOMIC_RELEASE);
        fake_start(f, serve);
        if (last)
            fake_wait_go(f, 1);
        else if (life % 4 != 3)
            FAKE_CHECK(fake_await(&f->shared->here, clients + 1));
        poll(NULL, 0, 20 + rand() % 60);
        kill(f->pid, SIGKILL);
        FAKE_CHECK(fake_end(f) == 128 + SIGKILL);
    }
}

static void *wait_at_gates(void *argument)
{
    (void)argument;
    while (!__atomic_load_n(&finished, __ATOMIC_ACQUIRE))
        for (uint32_t row = 0; row < 2; row++)
            skv_gate_wait(skv_gate_row(skv, row) + 1, 5);
    return NULL;
}

/* A pass: wait for the gates, then look whether it was worth anything. */
static int run_pass(struct skv_batch *batch)
{
    for (int layer = 0; batch->gated && layer < 2; layer++)
        CHECK(skv_gate_wait(skv_gate_row(skv, batch->row) + layer, FAKE_PATIENCE_MS) == 0);
    return skv_batch_status(skv, batch);
}

static int one_batch(uint32_t round)
{
    static const uint64_t tokens[32];
    struct skv_request request = {
        .user = skv_user_integer(round), .tokens = tokens, .history = 32, .max_cached = UINT32_MAX};
    struct skv_batch batch;
    int status = skv_acquire(skv, round % 2, &request, 1, &batch);
    if (!status)
        status = run_pass(&batch);
    if (!status)
        status = round % 3 ? skv_commit(skv, &batch, NULL) : skv_release(skv, &batch);
    return status;
}

int main(int argc, char **argv)
{
    uint32_t arguments[2] = {20, 1};
    for (int i = 1; i < argc && i < 3; i++)
        arguments[i - 1] = (uint32_t)strtoul(argv[i], NULL, 10);
    setenv("SIDEKV_LOG", "error", 0);
    skv_log_init("stress_client", SKV_LOG_ERROR);
    fake_init(&fake);
    fake.argument = arguments;
    fake_start(&fake, supervise);

    struct skv_options options = fake_options(&fake);
    options.spin_us = 20;
    while (skv_open(&options, &skv) != 0) /* the listener changes hands at first */
        poll(NULL, 0, 1);
    void *base = skv_pool_base(skv);
    pthread_t waiter;
    CHECK(pthread_create(&waiter, NULL, wait_at_gates, NULL) == 0);

    uint32_t batches = 0, lost = 0;
    for (;; batches++) {
        int status = one_batch(batches);
        if (status == 0 && __atomic_load_n(&fake.shared->seen, __ATOMIC_ACQUIRE))
            break; /* the last daemon */
        if (status == 0)
            continue;
        if (status != SKV_ELOST)
            fprintf(stderr, "batch %u: %s\n", batches, skv_strerror(status));
        CHECK(status == SKV_ELOST);
        lost++;
        for (int i = 0; i < FAKE_PATIENCE_MS && !skv_lost(skv); i++)
            poll(NULL, 0, 1);
        CHECK(skv_reconnect(skv, FAKE_PATIENCE_MS) == 0);
        CHECK(skv_pool_base(skv) == base);
    }
    __atomic_store_n(&finished, 1, __ATOMIC_RELEASE);
    pthread_join(waiter, NULL);
    skv_close(skv);
    fake_go(&fake);
    CHECK(fake_end(&fake) == 0);
    fake_fini(&fake);
    printf("stress_client: %u batches, %u daemons lost\n", batches, lost);
    CHECK(lost > 1);
    return 0;
}
