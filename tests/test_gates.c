/* Gated batches over a real daemon whose copies are slow, or held up: the pass must wait for its
 * own batch's copies, whatever was released, reused or appended to meanwhile. Scores are compared
 * bit for bit with those of a pass without any cache. */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <pthread.h>

#include "device.h"
#include "hstu.h"
#include "store.h"

#include "daemon_rig.h"

#define HISTORY 200u /* six pages and a tail */
#define FRESH   8u
#define TARGETS 16u

static struct rig rig;
static struct hstu_model model;
static struct hstu_weights *weights;
static struct skv *skv;
static struct hstu_runner *runner, *plain;
static uint64_t tokens[4][HISTORY + FRESH + TARGETS];
static struct skv_batch batch;
static char hold[128]; /* while there is such a file, the daemon copies nothing and opens no gate */

static void hold_copies(void)
{
    int fd = open(hold, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    cr_assert_geq(fd, 0);
    close(fd);
}

static void *let_copies_go(void *unused)
{
    unlink(hold);
    return unused;
}

static void set_up(void)
{
    static const char *const options[] = {"--pool-bytes", "8M", "--tail-ms", "0", NULL};
    rig_init(&rig);
    snprintf(hold, sizeof hold, "%s/hold", rig.directory);
    setenv("SIDEKV_TEST_COPY_DELAY_US", "20000", 1); /* of each copy and each gate */
    setenv("SIDEKV_TEST_COPY_HOLD", hold, 1);
    rig_start(&rig, options);
    unsetenv("SIDEKV_TEST_COPY_HOLD");
    cr_assert_eq(hstu_model_named("tiny", &model), 0);
    cr_assert_eq(hstu_weights_random(&model, 7, &weights), 0);
    cr_assert_eq(rig_connect(&rig,
                             (struct skv_options){.geometry = model.geometry,
                                                  .model = hstu_fingerprint(weights),
                                                  .rows = 1,
                                                  .timeout_ms = 20000},
                             &skv),
                 0);
    struct hstu_runner_options o = {.weights = weights,
                                    .device = skv_session_device(skv),
                                    .pool_base = skv_pool_base(skv),
                                    .pool_append_base = skv_pool_append_base(skv),
                                    .pool_pages = skv_pool_pages(skv),
                                    .max_rows = HISTORY + FRESH + TARGETS,
                                    .max_batch = 1,
                                    .gate_row = skv_gate_row(skv, 0)};
    cr_assert_eq(hstu_runner_open(&o, &runner), 0);
    o.pool_base = NULL;
    o.pool_pages = 0;
    o.gate_row = NULL;
    cr_assert_eq(hstu_runner_open(&o, &plain), 0);
    for (uint32_t user = 0; user < 4; user++)
        for (uint32_t i = 0; i < HISTORY + FRESH + TARGETS; i++)
            tokens[user][i] = (user * 1000 + i) * 2654435761u;
}

static void tear_down(void)
{
    let_copies_go(NULL);
    hstu_runner_close(runner);
    hstu_runner_close(plain);
    skv_close(skv);
    hstu_weights_close(weights);
    rig_fini(&rig);
}

TestSuite(gates, .init = set_up, .fini = tear_down, .timeout = 180);

static void acquire(uint32_t user, uint32_t history)
{
    struct skv_request request = {.user = skv_user_integer(user),
                                  .tokens = tokens[user],
                                  .history = history,
                                  .max_cached = UINT32_MAX};
    cr_assert_eq(skv_acquire(skv, 0, &request, 1, &batch), 0);
}

static void launch(uint32_t user, uint32_t history)
{
    const struct skv_grant *grant = &batch.grants[0];
    struct hstu_sequence sequence = {.history = history,
                                     .cached = grant->cached,
                                     .targets = TARGETS,
                                     .append = grant->flags & SKV_GRANT_APPEND,
                                     .pages = grant->pages,
                                     .tokens = tokens[user] + grant->cached};
    cr_assert_eq(hstu_runner_launch(runner, &sequence, 1, batch.gated), 0);
}

/* The pass of what was acquired; its last TARGETS tokens are the candidates. */
static void pass(uint32_t user, uint32_t history, float *logits)
{
    launch(user, history);
    cr_assert_eq(hstu_runner_wait(runner, logits, 20000), 0);
    cr_assert_eq(skv_batch_status(skv, &batch), 0);
}

/* The same of a batch whose copies are held up: it waits until they are not. */
static void pass_held(uint32_t user, uint32_t history, float *logits)
{
    cr_assert(batch.gated);
    launch(user, history);
    cr_assert_eq(hstu_runner_wait(runner, logits, 50), SKV_ETIMEDOUT, "no gate is open");
    cr_assert_eq(*skv_gate_row(skv, 0), 0);
    let_copies_go(NULL);
    cr_assert_eq(hstu_runner_wait(runner, logits, 20000), 0);
    cr_assert_eq(skv_batch_status(skv, &batch), 0);
}

static void expect_right(uint32_t user, uint32_t history, const float *logits)
{
    float expected[TARGETS];
    struct hstu_sequence sequence = {
        .history = history, .targets = TARGETS, .tokens = tokens[user]};
    cr_assert_eq(hstu_runner_launch(plain, &sequence, 1, false), 0);
    cr_assert_eq(hstu_runner_wait(plain, expected, 20000), 0);
    cr_assert_arr_eq(logits, expected, sizeof expected);
}

/* Caches a user's history, stores it, and leaves it in the store only. */
static void keep_in_store(uint32_t user)
{
    float logits[TARGETS];
    acquire(user, HISTORY);
    cr_assert(batch.grants[0].flags & SKV_GRANT_APPEND);
    pass(user, HISTORY, logits);
    cr_assert_eq(skv_commit(skv, &batch, NULL), 0);
    cr_assert_eq(skv_evict(skv, (struct skv_id){0}, skv_user_integer(user)), 0);
}

Test(gates, a_gated_pass_waits_for_slow_copies)
{
    float logits[TARGETS];
    keep_in_store(1);
    hold_copies();
    acquire(1, HISTORY + FRESH);
    cr_assert_eq(batch.grants[0].cached, HISTORY);
    pass_held(1, HISTORY + FRESH, logits);
    expect_right(1, HISTORY + FRESH, logits);
    cr_assert_eq(skv_commit(skv, &batch, NULL), 0);
}

Test(gates, a_row_used_again_after_a_release_waits_for_its_own_copies)
{
    float logits[TARGETS];
    pthread_t helper;
    keep_in_store(1);
    keep_in_store(2);
    hold_copies();
    acquire(1, HISTORY + FRESH);
    cr_assert(batch.gated);
    cr_assert_eq(pthread_create(&helper, NULL, let_copies_go, NULL), 0);
    cr_assert_eq(skv_release(skv, &batch), 0, "without a launch; it waits for the copies");
    pthread_join(helper, NULL);
    hold_copies(); /* the second batch's: the first one's open nothing of it */
    acquire(2, HISTORY + FRESH);
    pass_held(2, HISTORY + FRESH, logits);
    expect_right(2, HISTORY + FRESH, logits);
    cr_assert_eq(skv_commit(skv, &batch, NULL), 0);
}

Test(gates, an_append_into_a_tail_that_is_being_onboarded_survives_its_copies)
{
    float logits[TARGETS];
    struct skv_committed committed;
    keep_in_store(1);
    acquire(1, HISTORY + FRESH);
    cr_assert(batch.gated);
    cr_assert(batch.grants[0].flags & SKV_GRANT_APPEND);
    cr_assert_neq(batch.grants[0].cached % model.geometry.page_tokens, 0,
                  "the tail is shared with the onboard");
    pass(1, HISTORY + FRESH, logits);
    cr_assert_eq(skv_commit(skv, &batch, &committed), 0);
    cr_assert_eq(committed.committed, HISTORY + FRESH);
    acquire(1, HISTORY + FRESH); /* all of it from the pool now, the appended tokens too */
    cr_assert_eq(batch.grants[0].cached, HISTORY + FRESH);
    pass(1, HISTORY + FRESH, logits);
    expect_right(1, HISTORY + FRESH, logits);
    cr_assert_eq(skv_release(skv, &batch), 0);
}

/* Flips a bit in the middle of a stored page. */
static void damage(uint32_t user, uint32_t index)
{
    struct skv_store *store;
    struct skv_reader *reader;
    struct skv_location at;
    char path[128];
    cr_assert_eq(skv_store_open(&(struct skv_store_options){.path = rig.store,
                                                            .geometry = model.geometry,
                                                            .map_bytes = 256 << 20},
                                &store),
                 0);
    cr_assert_eq(skv_reader_open(store, &reader), 0);
    cr_assert_eq(skv_reader_begin(reader), 0);
    cr_assert_eq(
        skv_reader_locate(reader, hstu_fingerprint(weights), skv_user_integer(user), index, &at),
        0);
    skv_reader_end(reader);
    skv_reader_close(reader);
    skv_store_close(store);
    snprintf(path, sizeof path, "%s/data.mdb", rig.store);
    FILE *file = fopen(path, "r+b");
    cr_assert_not_null(file);
    long offset = (long)(at.extent_offset + at.value_offset + 5000);
    fseek(file, offset, SEEK_SET);
    int byte = fgetc(file);
    fseek(file, offset, SEEK_SET);
    fputc(byte ^ 0x10, file);
    fclose(file);
}

Test(gates, a_damaged_page_is_a_shorter_hit_and_no_wrong_score)
{
    float logits[TARGETS];
    keep_in_store(3);
    rig_stop(&rig, SIGKILL);
    damage(3, 2);
    static const char *const options[] = {"--pool-bytes", "8M", NULL};
    rig_start(&rig, options);
    while (!skv_lost(skv)) /* the suite's timeout bounds it */
        usleep(1000);
    cr_assert_eq(skv_reconnect(skv, 20000), 0);
    for (int tries = 0; tries < 10; tries++) {
        acquire(3, HISTORY + FRESH);
        const struct skv_grant *grant = &batch.grants[0];
        struct hstu_sequence sequence = {.history = HISTORY + FRESH,
                                         .cached = grant->cached,
                                         .targets = TARGETS,
                                         .append = grant->flags & SKV_GRANT_APPEND,
                                         .pages = grant->pages,
                                         .tokens = tokens[3] + grant->cached};
        cr_assert_eq(hstu_runner_launch(runner, &sequence, 1, batch.gated), 0);
        cr_assert_eq(hstu_runner_wait(runner, logits, 20000), 0);
        if (skv_batch_status(skv, &batch) == 0)
            break;
        cr_assert_eq(skv_batch_status(skv, &batch), SKV_ELOAD);
        cr_assert_eq(skv_release(skv, &batch), 0);
        cr_assert_lt(tries, 9, "each failure shortens the hit: it must end");
    }
    cr_assert_lt(batch.grants[0].cached, HISTORY, "the damage was found");
    expect_right(3, HISTORY + FRESH, logits);
    cr_assert_eq(skv_commit(skv, &batch, NULL), 0);
}
