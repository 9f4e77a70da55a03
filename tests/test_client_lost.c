/* What a session does when things end: deadlines, a daemon that dies or says goodbye, gates and
 * sleepers then, reconnecting with the same addresses, forks, closing. Against a scripted daemon.
 */
#include <criterion/criterion.h>
#include <pthread.h>

#include "fake_daemon.h"
#include "sidekv.h"

static struct fake fake;
static struct skv *skv;
static const uint64_t tokens[32];

static void setup(void)
{
    fake_init(&fake);
}

static void teardown(void)
{
    skv_close(skv);
    fake_fini(&fake);
}

TestSuite(client_lost, .init = setup, .fini = teardown, .timeout = 180);

static void open_with(void (*script)(struct fake *))
{
    struct skv_options options = fake_options(&fake);
    fake_start(&fake, script);
    cr_assert_eq(skv_open(&options, &skv), 0);
}

static void close_and_end(void)
{
    skv_close(skv);
    skv = NULL;
    int code = fake_end(&fake);
    cr_assert_eq(code, 0, "the script ended with %d", code);
}

static struct skv_request request(uint64_t user)
{
    return (struct skv_request){
        .user = skv_user_integer(user), .tokens = tokens, .history = 32, .max_cached = UINT32_MAX};
}

static bool await_lost(void)
{
    for (int i = 0; i < FAKE_PATIENCE_MS && !skv_lost(skv); i++)
        poll(NULL, 0, 1);
    return skv_lost(skv);
}

/* An ACQUIRE answered with a grant of 16 tokens of 32; gated: the row closed as a daemon would. */
static void serve_acquire(struct fake *f, bool gated)
{
    struct wire_sqe sqe = fake_take(f, WIRE_ACQUIRE);
    uint32_t *row = f->gates + sqe.row * (f->hello.gate_stride / sizeof *f->gates);
    for (uint32_t word = 0; word < 2; word++)
        row[word] = !gated;
    row[2] = 0;
    struct wire_grant *g = fake_grant(f, sqe.row, 0, 16, true);
    g->flags |= gated ? SKV_GRANT_GATED : 0;
    fake_complete(f, (struct wire_cqe){.user_data = sqe.user_data, .value = {gated}});
}

/* ---- deadlines ---- */

static void serve_silence(struct fake *f)
{
    fake_handshake(f);
    fake_take(f, WIRE_NOP);
    fake_await_hang_up(f); /* the client gives up, and says so by hanging up */
}

Test(client_lost, a_call_without_an_answer_times_out_and_costs_the_session)
{
    uint64_t timeout_ms = fake_open_impatient(&fake, serve_silence, &skv), start = skv_now_ns();
    cr_assert_neq(timeout_ms, 0);
    cr_assert_eq(skv_ping(skv, NULL), SKV_ETIMEDOUT);
    cr_expect_geq(skv_now_ns() - start, timeout_ms * 1000000);
    cr_expect(skv_lost(skv));
    cr_expect_eq(skv_ping(skv, NULL), SKV_ELOST);
    close_and_end();
}

/* Hangs the bell's end up, and answers all the same. */
static void serve_without_a_bell(struct fake *f)
{
    fake_handshake(f);
    close(f->bell);
    fake_answer_a_ping(f);
}

Test(client_lost, a_daemon_without_a_bell_is_asked_in_naps)
{
    open_with(serve_without_a_bell);
    cr_expect_eq(skv_ping(skv, NULL), 0);
    close_and_end();
}

/* ---- the daemon is gone ---- */

static void serve_gated_then_die(struct fake *f)
{
    fake_handshake(f);
    serve_acquire(f, true);
    serve_acquire(f, false);
    fake_here(f);
    fake_wait_go(f, 1);
    raise(SIGKILL);
}

static void *wait_at_gate(void *gate)
{
    return (void *)(intptr_t)skv_gate_wait(gate, FAKE_PATIENCE_MS);
}

Test(client_lost, a_dead_daemon_opens_every_gate)
{
    open_with(serve_gated_then_die);
    struct skv_request one = request(1), two = request(2);
    struct skv_batch gated, ungated;
    cr_assert_eq(skv_acquire(skv, 0, &one, 1, &gated), 0);
    cr_assert_eq(skv_acquire(skv, 1, &two, 1, &ungated), 0);
    cr_expect(gated.gated && !ungated.gated);
    cr_expect_eq(skv_prefetch(skv, &one), SKV_EBUSY, "no row is free");
    cr_expect_eq(skv_gate_wait(skv_gate_row(skv, 0), 20), SKV_ETIMEDOUT);
    pthread_t waiter;
    cr_assert_eq(pthread_create(&waiter, NULL, wait_at_gate, skv_gate_row(skv, 0) + 1), 0);
    cr_assert(fake_await(&fake.shared->here, 1));
    fake_go(&fake);
    void *result;
    pthread_join(waiter, &result);
    cr_expect_eq((intptr_t)result, 0);
    cr_assert(await_lost());
    for (uint32_t row = 0; row < 2; row++) {
        const uint32_t *words = skv_gate_row(skv, row); /* row after row, by the watcher */
        for (int i = 0; i < FAKE_PATIENCE_MS && !__atomic_load_n(&words[2], __ATOMIC_ACQUIRE); i++)
            poll(NULL, 0, 1);
        cr_expect_eq((int32_t)words[2], SKV_ELOST);
        cr_expect_eq(skv_gate_wait(skv_gate_row(skv, row), FAKE_PATIENCE_MS), 0);
        cr_expect_eq(skv_gate_wait(skv_gate_row(skv, row) + 1, FAKE_PATIENCE_MS), 0);
    }
    cr_expect_eq(skv_batch_status(skv, &gated), SKV_ELOST);
    cr_expect_eq(skv_batch_status(skv, &ungated), 0, "it waited for nothing");
    cr_expect_eq(skv_commit(skv, &ungated, NULL), SKV_ELOST);
    cr_expect_eq(fake_end(&fake), 128 + SIGKILL);
}

static void serve_flush_then_leave(struct fake *f)
{
    fake_handshake(f);
    fake_take(f, WIRE_FLUSH);
    poll(NULL, 0, 2 * *(const int *)f->argument); /* the client's timeout: FLUSH has none */
}

Test(client_lost, a_sleeping_caller_wakes_when_the_daemon_leaves)
{
    uint64_t timeout_ms = fake_open_impatient(&fake, serve_flush_then_leave, &skv);
    uint64_t start = skv_now_ns();
    cr_assert_neq(timeout_ms, 0);
    cr_assert_eq(skv_flush(skv), SKV_ELOST);
    cr_expect_gt(skv_now_ns() - start, timeout_ms * 1000000);
    close_and_end();
}

static void say_goodbye(struct fake *f)
{
    fake_handshake(f);
    struct wire_goodbye goodbye = {.magic = WIRE_MAGIC, .status = SKV_EPROTO};
    memset(goodbye.text, 'x', sizeof goodbye.text); /* and no end to it */
    fake_send(f, &goodbye, sizeof goodbye, NULL, 0);
    fake_await_hang_up(f);
}

static void babble(struct fake *f)
{
    fake_handshake(f);
    fake_send(f, "hello?", 6, f->fds, 3);
    fake_await_hang_up(f);
}

Test(client_lost, a_goodbye_or_nonsense_ends_the_session)
{
    open_with(say_goodbye);
    cr_expect(await_lost());
    close_and_end();
    open_with(babble);
    cr_expect(await_lost());
    close_and_end();
}

static void serve_failed_load(struct fake *f)
{
    fake_handshake(f);
    serve_acquire(f, true);
    __atomic_store_n(&f->gates[2], (uint32_t)SKV_ELOAD, __ATOMIC_RELEASE);
    skv_gate_store(&f->gates[0], 1);
    skv_gate_store(&f->gates[1], 1);
    struct wire_sqe sqe = fake_take(f, WIRE_RELEASE);
    fake_answer(f, &sqe, 0);
    fake_await_hang_up(f);
}

Test(client_lost, a_failed_load_is_seen_in_the_rows_status)
{
    open_with(serve_failed_load);
    struct skv_request one = request(1);
    struct skv_batch batch;
    cr_assert_eq(skv_acquire(skv, 0, &one, 1, &batch), 0);
    cr_assert_eq(skv_gate_wait(skv_gate_row(skv, 0) + 1, FAKE_PATIENCE_MS), 0);
    cr_expect_eq(skv_batch_status(skv, &batch), SKV_ELOAD);
    cr_expect_eq(skv_release(skv, &batch), 0);
    close_and_end();
}

/* ---- reconnecting ---- */

static void serve_acquire_then_leave(struct fake *f)
{
    fake_handshake(f);
    serve_acquire(f, false);
    fake_wait_go(f, 1);
}

static void serve_after_a_while(struct fake *f)
{
    close(accept(f->listener, NULL, NULL)); /* hardly up */
    fake_accept(f);                         /* copies of the old session are in flight */
    f->welcome =
        (struct wire_welcome){.magic = WIRE_MAGIC, .version = WIRE_VERSION, .status = SKV_EAGAIN};
    fake_send(f, &f->welcome, sizeof f->welcome, NULL, 0);
    close(f->socket);
    fake_accept(f); /* all others have come back sooner */
    f->welcome.status = SKV_EFULL;
    fake_send(f, &f->welcome, sizeof f->welcome, NULL, 0);
    close(f->socket);
    fake_handshake(f);
    memset(skv_pool_address(f->pool), 0x5a, 4096);
    struct wire_sqe sqe = fake_take(f, WIRE_NOP);
    fake_answer(f, &sqe, 0);
    serve_acquire(f, false);
    fake_await_hang_up(f);
}

Test(client_lost, a_reconnect_keeps_every_address)
{
    fake.session = 4711;
    open_with(serve_acquire_then_leave);
    cr_expect_eq(fake.shared->drained, 0);
    struct skv_request one = request(1);
    struct skv_batch old, batch;
    cr_assert_eq(skv_acquire(skv, 0, &one, 1, &old), 0);
    cr_expect_eq(skv_reconnect(skv, 100), 0, "nothing lost, nothing done");
    void *base = skv_pool_base(skv);
    uint32_t *row = skv_gate_row(skv, 1);
    struct skv_device *device = skv_session_device(skv);
    fake_go(&fake);
    cr_assert(await_lost());
    cr_assert_eq(fake_end(&fake), 0);

    uint64_t start = skv_now_ns();
    cr_expect_eq(skv_reconnect(skv, 100), SKV_ELOST, "nobody there");
    cr_expect_geq(skv_now_ns() - start, 90000000u);
    cr_expect(skv_lost(skv));
    cr_expect_null(skv_pool_base(skv));

    fake.session = 4712;
    fake_start(&fake, serve_after_a_while);
    cr_assert_eq(skv_reconnect(skv, FAKE_PATIENCE_MS), 0);
    cr_expect_eq(fake.shared->drained, 4711);
    cr_expect_eq(skv_pool_base(skv), base);
    cr_expect_eq(skv_gate_row(skv, 1), row);
    cr_expect_eq(skv_session_device(skv), device);
    cr_expect_eq(skv_server(skv)->pid, (uint32_t)fake.pid);
    cr_expect_eq(skv_batch_status(skv, &old), SKV_ESTALE);
    cr_expect_eq(skv_commit(skv, &old, NULL), SKV_ESTALE);
    cr_expect_eq(skv_ping(skv, NULL), 0);
    cr_expect_eq(*(uint8_t *)skv_pool_base(skv), 0x5a, "the new pool");
    cr_expect_eq(skv_acquire(skv, 0, &one, 1, &batch), 0);
    close_and_end();
}

/* As kept by a keeper: who loses it waits for the next one. */
static void serve_silent_end(struct fake *f)
{
    fake_accept(f);
    fake_prepare(f);
    f->welcome.pool_id = 1;
    fake_send_welcome(f);
    fake_send_extents(f);
    serve_acquire(f, false);
    fake_take(f, *(const enum wire_opcode *)f->argument);
    fake_await_hang_up(f);
}

Test(client_lost, a_batch_whose_end_is_not_answered_is_over_and_the_session_comes_back)
{
    static const enum wire_opcode ends[] = {WIRE_RELEASE, WIRE_COMMIT};
    for (int i = 0; i < 2; i++) {
        struct skv_options options = fake_options(&fake);
        options.timeout_ms = 10000;
        fake.argument = &ends[i];
        fake_start(&fake, serve_silent_end);
        cr_assert_eq(skv_open(&options, &skv), 0);
        struct skv_request one = request(1);
        struct skv_batch batch;
        cr_assert_eq(skv_acquire(skv, 0, &one, 1, &batch), 0);
        int status =
            ends[i] == WIRE_COMMIT ? skv_commit(skv, &batch, NULL) : skv_release(skv, &batch);
        cr_assert_eq(status, SKV_ETIMEDOUT);
        cr_assert_eq(fake_end(&fake), 0);
        fake_start(&fake, fake_serve_a_ping);
        for (int k = 0; k < 100 && (status = skv_ping(skv, NULL)) == SKV_ELOST; k++)
            usleep(100000);
        cr_expect_eq(status, 0, "a batch is open still");
        close_and_end();
    }
}

static void serve_larger_pool(struct fake *f)
{
    f->pool_bytes = 16 * FAKE_POOL_BYTES;
    fake_handshake(f);
    struct wire_sqe sqe = fake_take(f, WIRE_NOP);
    fake_answer(f, &sqe, 0);
    fake_await_hang_up(f);
}

Test(client_lost, a_larger_pool_is_mapped_anew)
{
    open_with(serve_acquire_then_leave);
    struct skv_request one = request(1);
    struct skv_batch batch;
    cr_assert_eq(skv_acquire(skv, 0, &one, 1, &batch), 0);
    fake_go(&fake);
    cr_assert(await_lost());
    cr_assert_eq(fake_end(&fake), 0);
    fake_start(&fake, serve_larger_pool);
    cr_assert_eq(skv_reconnect(skv, FAKE_PATIENCE_MS), 0);
    cr_expect_eq(skv_pool_pages(skv), 16 * FAKE_POOL_BYTES / skv_page_bytes(&fake_geometry));
    memset(skv_pool_base(skv), 1, 16 * FAKE_POOL_BYTES);
    cr_expect_eq(skv_ping(skv, NULL), 0);
    close_and_end();
}

static void refuse_now(struct fake *f)
{
    fake_accept(f);
    f->welcome = (struct wire_welcome){
        .magic = WIRE_MAGIC, .version = WIRE_VERSION, .status = SKV_EGEOMETRY, .text = "no"};
    fake_send(f, &f->welcome, sizeof f->welcome, NULL, 0);
}

static void another_version(struct fake *f)
{
    fake_accept(f);
    f->welcome = (struct wire_welcome){
        .magic = WIRE_MAGIC, .version = WIRE_VERSION + 1, .status = SKV_EVERSION};
    fake_send(f, &f->welcome, sizeof f->welcome, NULL, 0);
}

static void another_device(struct fake *f)
{
    fake_accept(f);
    fake_prepare(f);
    f->welcome.uuid[3] ^= 1;
    fake_send_welcome(f);
    fake_send_extents(f);
}

Test(client_lost, a_reconnect_that_is_refused_returns_at_once_and_may_be_tried_again)
{
    open_with(say_goodbye);
    cr_assert(await_lost());
    const uint32_t long_ms = 3600000; /* the suite's timeout is shorter */
    kill(fake.pid, SIGKILL);
    fake_end(&fake);
    fake_start(&fake, refuse_now);
    cr_expect_eq(skv_reconnect(skv, long_ms), SKV_EGEOMETRY);
    cr_assert_eq(fake_end(&fake), 0);
    fake_start(&fake, another_version);
    cr_expect_eq(skv_reconnect(skv, long_ms), SKV_EVERSION);
    cr_assert_eq(fake_end(&fake), 0);
    fake_start(&fake, another_device);
    cr_expect_eq(skv_reconnect(skv, long_ms), SKV_ENODEVICE);
    cr_assert_eq(fake_end(&fake), 0);
    cr_expect(skv_lost(skv));
    fake_start(&fake, serve_larger_pool);
    cr_expect_eq(skv_reconnect(skv, long_ms), 0);
    cr_expect_eq(skv_ping(skv, NULL), 0);
    close_and_end();
}

/* ---- forks ---- */

static void serve_two_pings(struct fake *f)
{
    fake_handshake(f);
    for (int i = 0; i < 2; i++) {
        struct wire_sqe sqe = fake_take(f, WIRE_NOP);
        fake_answer(f, &sqe, 0);
    }
    fake_await_hang_up(f);
}

Test(client_lost, a_forked_child_may_only_close)
{
    open_with(serve_two_pings);
    cr_assert_eq(skv_ping(skv, NULL), 0);
    pid_t child = fork();
    if (child == 0) {
        struct skv_request one = request(1);
        struct skv_batch batch = {.count = 1};
        int wrong = skv_ping(skv, NULL) != SKV_EPERM;
        wrong |= skv_acquire(skv, 0, &one, 1, &batch) != SKV_EPERM;
        wrong |= skv_commit(skv, &batch, NULL) != SKV_EPERM;
        wrong |= skv_batch_status(skv, &batch) != SKV_EPERM;
        wrong |= skv_reconnect(skv, 10) != SKV_EPERM;
        skv_close(skv);
        _exit(wrong);
    }
    int status = -1;
    waitpid(child, &status, 0);
    cr_expect_eq(status, 0);
    cr_expect_not(skv_lost(skv), "the parent's session goes on");
    cr_expect_eq(skv_ping(skv, NULL), 0);
    close_and_end();
}

/* ---- closing ---- */

static void serve_many(struct fake *f)
{
    for (int i = 0; i < 20; i++) {
        fake_handshake(f);
        fake_await_hang_up(f);
        close(f->socket);
        munmap(f->memory, f->welcome.session_bytes);
        for (uint32_t fd = 0; fd <= WIRE_WELCOME_FDS; fd++)
            close(f->fds[fd]);
        skv_pool_close(f->pool);
        skv_device_close(f->device);
    }
}

Test(client_lost, sessions_leave_nothing_behind)
{
    fake_start(&fake, serve_many);
    int before = fake_open_fds();
    for (int i = 0; i < 20; i++) {
        struct skv_options options = fake_options(&fake);
        cr_assert_eq(skv_open(&options, &skv), 0);
        skv_close(skv);
        skv = NULL;
        cr_assert_eq(fake_open_fds(), before);
    }
    cr_assert_eq(fake_end(&fake), 0);
}
