/* What admins and workers do to users through a real sidekvd: EVICT, TRUNCATE, FORGET, LIST, on
 * users that are idle, leased, of two models, unknown; what of it a restart remembers; and MPS,
 * which both sides tell each other. */
#include <criterion/criterion.h>

#include "daemon_rig.h"

static const struct skv_geometry tiny = {
    .layers = 2, .heads = 2, .head_dim = 64, .page_tokens = 32};
static const struct skv_id first = {.lo = 5}, second = {.lo = 6}, all = {0};
static const char *const options[] = {"--pool-bytes", "8M", NULL};
static struct rig rig;
static struct skv *worker, *other, *admin; /* workers of the first and the second model */
static uint64_t tokens[1024];

static struct skv *connect_as(struct skv_options session)
{
    struct skv *skv;
    session.geometry = tiny;
    session.timeout_ms = 20000;
    cr_assert_eq(rig_connect(&rig, session, &skv), 0);
    return skv;
}

static void connect_all(void)
{
    worker = connect_as((struct skv_options){.model = first, .rows = 2});
    other = connect_as((struct skv_options){.model = second, .rows = 1});
    admin = connect_as((struct skv_options){.admin = true});
}

static void set_up(void)
{
    for (uint32_t i = 0; i < 1024; i++)
        tokens[i] = i * UINT64_C(2654435761);
    rig_init(&rig);
    rig_start(&rig, options);
    connect_all();
}

static void close_all(void)
{
    skv_close(worker);
    skv_close(other);
    skv_close(admin);
}

static void tear_down(void)
{
    close_all();
    rig_fini(&rig);
}

TestSuite(admin, .init = set_up, .fini = tear_down, .timeout = 180);

static struct skv_grant acquire(struct skv *skv, uint32_t row, uint64_t user, uint32_t history,
                                struct skv_batch *batch)
{
    struct skv_request request = {.user = skv_user_integer(user),
                                  .tokens = tokens,
                                  .history = history,
                                  .max_cached = UINT32_MAX};
    cr_assert_eq(skv_acquire(skv, row, &request, 1, batch), 0);
    return batch->grants[0];
}

static void append(struct skv *skv, uint64_t user, uint32_t history)
{
    struct skv_batch batch;
    struct skv_committed result;
    acquire(skv, 0, user, history, &batch);
    cr_assert_eq(skv_commit(skv, &batch, &result), 0);
    cr_assert_eq(result.committed, history);
}

static struct skv_user_info info_of(struct skv *skv, struct skv_id model, uint64_t user)
{
    struct skv_user_info info;
    cr_assert_eq(skv_lookup(skv, model, skv_user_integer(user), &info), 0);
    return info;
}

/* What an ACQUIRE finds of a user, without changing it. */
static struct skv_grant peek(struct skv *skv, uint64_t user, uint32_t history)
{
    struct skv_batch batch;
    struct skv_grant grant = acquire(skv, 0, user, history, &batch);
    cr_assert_eq(skv_release(skv, &batch), 0);
    return grant;
}

Test(admin, evict_stores_first_and_the_user_comes_back_from_the_store)
{
    append(worker, 1, 200);
    cr_assert_eq(skv_evict(admin, all, skv_user_integer(1)), 0);
    struct skv_user_info info = info_of(admin, first, 1);
    cr_expect_eq(info.resident, 0);
    cr_expect_eq(info.stored, 200);
    struct skv_grant grant = peek(worker, 1, 200);
    cr_expect_eq(grant.cached, 200);
    cr_expect_eq(grant.gpu_tokens, 0, "all of it from the store");
}

Test(admin, a_leased_user_is_not_evicted)
{
    struct skv_batch batch;
    append(worker, 1, 100);
    acquire(worker, 1, 1, 100, &batch);
    cr_expect_eq(skv_evict(admin, all, skv_user_integer(1)), SKV_EBUSY);
    cr_expect_eq(info_of(admin, first, 1).resident, 100);
    cr_assert_eq(skv_release(worker, &batch), 0);
    cr_expect_eq(skv_evict(admin, all, skv_user_integer(1)), 0);
}

Test(admin, truncate_keeps_whole_pages_and_a_lease_taken_before_is_stale)
{
    struct skv_batch batch;
    append(worker, 1, 200);
    acquire(worker, 1, 1, 250, &batch);
    cr_assert_eq(skv_truncate(worker, all, skv_user_integer(1), 100), 0);
    cr_expect_eq(info_of(worker, all, 1).committed, 96);
    struct skv_committed result;
    cr_expect_eq(skv_commit(worker, &batch, &result), 0);
    cr_expect_eq(result.status, SKV_ESTALE, "what it computed follows from tokens that are gone");
    cr_expect_eq(peek(worker, 1, 200).cached, 96);
    append(worker, 1, 200);
    cr_expect_eq(peek(worker, 1, 200).cached, 200);
}

Test(admin, a_forgotten_user_is_gone_after_a_kill_too)
{
    append(worker, 1, 200);
    append(worker, 2, 150);
    cr_assert_eq(skv_flush(worker), 0);
    cr_assert_eq(skv_forget(admin, all, skv_user_integer(1)), 0);
    cr_expect_eq(skv_lookup(admin, first, skv_user_integer(1), NULL), SKV_ENOENT);
    rig_stop(&rig, SIGKILL);
    rig_start(&rig, options);
    close_all();
    connect_all();
    cr_expect_eq(skv_lookup(admin, first, skv_user_integer(1), NULL), SKV_ENOENT);
    cr_expect_eq(peek(worker, 1, 200).cached, 0);
    cr_expect_eq(info_of(admin, first, 2).stored, 150);
}

Test(admin, a_truncated_user_is_short_after_a_kill_too)
{
    append(worker, 1, 200);
    cr_assert_eq(skv_flush(worker), 0);
    cr_assert_eq(skv_evict(worker, all, skv_user_integer(1)), 0);
    cr_assert_eq(skv_truncate(admin, all, skv_user_integer(1), 64), 0, "by what is stored alone");
    rig_stop(&rig, SIGKILL);
    rig_start(&rig, options);
    close_all();
    connect_all();
    cr_expect_eq(peek(worker, 1, 200).cached, 64);
}

Test(admin, an_admin_names_all_models_or_one_and_a_worker_only_its_own)
{
    append(worker, 1, 100);
    append(other, 1, 100);
    cr_expect_eq(skv_forget(admin, second, skv_user_integer(1)), 0);
    cr_expect_eq(peek(other, 1, 100).cached, 0);
    cr_expect_eq(peek(worker, 1, 100).cached, 100);
    append(other, 1, 100);
    cr_expect_eq(skv_forget(other, all, skv_user_integer(1)), 0);
    cr_expect_eq(peek(worker, 1, 100).cached, 100, "a worker's `all` is its own model");
    append(other, 1, 100);
    cr_expect_eq(skv_truncate(admin, all, skv_user_integer(1), 32), 0);
    cr_expect_eq(peek(other, 1, 100).cached, 32);
    cr_expect_eq(peek(worker, 1, 100).cached, 32);
}

Test(admin, nobody_is_evicted_truncated_or_forgotten_is_said)
{
    struct skv_id nobody = skv_user_integer(99);
    cr_expect_eq(skv_evict(admin, all, nobody), SKV_ENOENT);
    cr_expect_eq(skv_truncate(admin, all, nobody, 5), SKV_ENOENT);
    cr_expect_eq(skv_forget(worker, all, nobody), SKV_ENOENT);
    cr_expect_eq(skv_lookup(worker, all, nobody, NULL), SKV_ENOENT);
}

static uint32_t listed(struct skv *skv)
{
    struct skv_user_info infos[7];
    uint64_t cursor = 0;
    uint32_t seen = 0;
    do {
        int got = skv_list(skv, &cursor, infos, 7);
        cr_assert_geq(got, 0);
        seen += (uint32_t)got;
    } while (cursor);
    return seen;
}

Test(admin, a_list_walks_all_users_of_whom_it_may_see)
{
    for (uint64_t user = 1; user <= 20; user++)
        append(worker, user, 40);
    append(other, 1, 40);
    cr_expect_eq(listed(admin), 21);
    cr_expect_eq(listed(worker), 20);
    cr_expect_eq(listed(other), 1);
}

Test(admin, mps_is_seen_told_and_counted_on_both_sides)
{
    struct skv_stats stats;
    cr_assert_eq(skv_stats(admin, &stats), 0);
    cr_expect_eq(stats.mps, 0);
    cr_expect_eq(stats.mps_workers, 0);
    setenv("SIDEKV_TEST_MPS", "1", 1);
    struct skv *under = connect_as((struct skv_options){.model = first, .rows = 1});
    cr_assert_eq(skv_stats(admin, &stats), 0);
    cr_expect_eq(stats.mps_workers, 1, "the worker tells the daemon");
    skv_close(under);
    for (int i = 0; i < 2000 && stats.mps_workers; i++) {
        usleep(10000);
        cr_assert_eq(skv_stats(admin, &stats), 0);
    }
    cr_expect_eq(stats.mps_workers, 0);
    rig_stop(&rig, SIGTERM);
    rig_start(&rig, options);
    cr_assert_eq(skv_ping(worker, NULL), SKV_ELOST);
    cr_assert_eq(skv_reconnect(worker, 20000), 0);
    cr_assert_eq(skv_stats(worker, &stats), 0);
    cr_expect_eq(stats.mps, 1);
    cr_expect(skv_server(worker)->mps, "and the daemon the worker");
}
