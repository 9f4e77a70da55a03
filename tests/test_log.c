/* The logs of replay: readers, generator, and how a log is cut into requests. */
#include "cli_plan.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MOVIELENS "userId,movieId,rating,timestamp\n"
#define KUAIRAND  "user_id,video_id,date,time_ms,is_click,long_view,tab\n"

static char complaints[8192];

/* Reads `text`; what was complained about lands in complaints[]. */
static int read_bytes(const char *text, size_t bytes, struct replay_log *log)
{
    FILE *in = bytes ? fmemopen((void *)(uintptr_t)text, bytes, "r") : fopen("/dev/null", "r");
    memset(complaints, 0, sizeof complaints);
    FILE *said = fmemopen(complaints, sizeof complaints - 1, "w");
    int rc = replay_log_read(in, "log", said, log);
    fclose(in);
    fclose(said);
    return rc;
}

static int read_text(const char *text, struct replay_log *log)
{
    return read_bytes(text, strlen(text), log);
}

static void must_read(const char *text, uint64_t events, uint64_t skipped, struct replay_log *log)
{
    int rc = read_text(text, log);
    cr_assert_eq(rc, 0, "%s: %s", skv_strerror(rc), complaints);
    cr_assert_eq(log->count, events, "%lu events: %s", log->count, complaints);
    cr_assert_eq(log->lines_skipped, skipped, "%lu skipped: %s", log->lines_skipped, complaints);
}

static void must_say(const char *text)
{
    cr_assert(strstr(complaints, text), "no '%s' in: %s", text, complaints);
}

/* ---- readers ---- */

Test(log, movielens_is_known_by_its_header)
{
    struct replay_log log;
    must_read(MOVIELENS "7,10,4.5,100\n7,11,0.5,101\n3,10,5,99", 3, 0, &log);
    cr_assert_str_eq(log.format, "MovieLens");
    cr_assert_eq(log.user_count, 2);
    cr_assert_eq(log.users[0].id, 3);
    cr_assert_eq(log.users[1].count, 2);
    cr_assert_eq(log.events[1].action, 9);
    cr_assert_eq(log.events[1].time_ms, 100000);
    cr_assert_eq(log.events[2].action, 1);
    cr_assert_eq(log.item_count, 2);
    replay_log_close(&log);
}

Test(log, kuairand_actions_are_bits_of_feedback)
{
    struct replay_log log;
    must_read(KUAIRAND "1,5,20220408,1649350000123,1,0,1\n1,6,20220408,1649350000124,0,1,x\n", 2, 0,
              &log);
    cr_assert_str_eq(log.format, "KuaiRand");
    cr_assert_eq(log.events[0].action, 1);
    cr_assert_eq(log.events[1].action, 64);
    cr_assert_eq(log.events[1].time_ms, 1649350000124);
    replay_log_close(&log);
}

Test(log, columns_may_come_in_any_order_and_quoted)
{
    struct replay_log log;
    must_read("\xef\xbb\xbf\"timestamp\",\"rating\",extra,\"movieId\",\"userId\"\r\n"
              "\"5\",\"3.0\",\"a, \"\"b\"\"\",\"12\",\"9\"\r\n",
              1, 0, &log);
    cr_assert_eq(log.events[0].user, 9);
    cr_assert_eq(log.events[0].item, 12);
    cr_assert_eq(log.events[0].action, 6);
    cr_assert_eq(log.events[0].time_ms, 5000);
    replay_log_close(&log);
}

Test(log, blank_lines_and_crlf_are_nothing)
{
    struct replay_log log;
    must_read("\n\r\n" MOVIELENS "\r\n1,2,3,4\r\n\n1,2,3,5\n\n", 2, 0, &log);
    cr_assert_str_empty(complaints);
    replay_log_close(&log);
}

Test(log, broken_lines_are_named_by_number_and_skipped)
{
    struct replay_log log;
    must_read(MOVIELENS "1,2,3,4\n"    /* 2 */
                        "1,2,3\n"      /* 3 */
                        "1,2,3,4,5\n"  /* 4 */
                        "\n"           /* 5: blank */
                        "x,2,3,4\n"    /* 6 */
                        "1,-2,3,4\n"   /* 7 */
                        "1,2,3,\n"     /* 8 */
                        "1,2,nan,4\n"  /* 9 */
                        "1,2,11,4\n"   /* 10 */
                        "\"1,2,3,4\n"  /* 11 */
                        "1, 2,3,4\n"   /* 12 */
                        "1,2,3.0,5\n", /* 13 */
              2, 9, &log);
    must_say("log:3: 3 columns, the header has 4; skipped");
    must_say("log:4: 5 columns");
    must_say("log:6: column 1 is not a number: \"x\"");
    must_say("log:7: column 2 is negative: \"-2\"");
    must_say("log:8: column 4 is not a number");
    must_say("log:9: column 3 is not a number");
    must_say("log:10: column 3 is too large");
    must_say("log:11: quotes");
    must_say("log:12: column 2");
    cr_assert_null(strstr(complaints, "log:13:"));
    replay_log_close(&log);
}

Test(log, numbers_that_overflow_are_broken)
{
    struct replay_log log;
    must_read(MOVIELENS "18446744073709551615,1152921504606846975,3,9223372036854775\n"
                        "18446744073709551616,1,3,4\n"
                        "1,1152921504606846976,3,4\n"
                        "1,1,3,9223372036854776\n"
                        "1,1,3,99999999999999999999999999999999\n",
              1, 4, &log);
    cr_assert_eq(log.events[0].user, UINT64_MAX);
    cr_assert_eq(log.events[0].item, REPLAY_ITEM_LIMIT - 1);
    replay_log_close(&log);
    must_read(KUAIRAND "1,1,0,9223372036854775807,1,1,0\n1,1,0,9223372036854775808,1,1,0\n"
                       "1,1,0,5,2,1,0\n",
              1, 2, &log);
    replay_log_close(&log);
}

Test(log, overlong_and_binary_lines_are_broken_and_the_next_is_read)
{
    size_t head = strlen(MOVIELENS), size = head + 100000 + 64;
    char *text = malloc(size);
    memcpy(text, MOVIELENS, head);
    memset(text + head, '1', 100000);
    char tail[] = "\n1,2,3,4\n1,\0,3,4\n2,2,3,4";
    memcpy(text + head + 100000, tail, sizeof tail - 1);
    struct replay_log log;
    cr_assert_eq(read_bytes(text, head + 100000 + sizeof tail - 1, &log), 0, "%s", complaints);
    cr_assert_eq(log.count, 2);
    cr_assert_eq(log.lines_skipped, 2);
    must_say("log:2: longer than");
    must_say("log:4: contains a NUL byte");
    replay_log_close(&log);
    free(text);
}

Test(log, only_ten_broken_lines_are_reported_but_all_are_counted)
{
    char text[1024] = MOVIELENS;
    for (int i = 0; i < 25; i++)
        strcat(text, "bad\n");
    strcat(text, "1,2,3,4\n");
    struct replay_log log;
    must_read(text, 1, 25, &log);
    must_say("log:11:");
    cr_assert_null(strstr(complaints, "log:12:"));
    must_say("15 more broken lines skipped");
    replay_log_close(&log);
}

Test(log, a_file_that_is_no_log_is_refused)
{
    static const struct {
        const char *text, *says;
    } cases[] = {
        {"", "is empty"},
        {"\n\n", "is empty"},
        {"a,b,c\n1,2,3\n", "neither MovieLens"},
        {"1,2,3,4\n", "neither MovieLens"},
        {"\"userId,movieId\n", "not a CSV header"},
        {"userId,movieId,timestamp\n1,2,3\n", "no rating column"},
        {"userId,movieId,rating\n1,2,3\n", "no timestamp column"},
        {"userId,movieId,rating,timestamp,rating\n1,2,3,4,5\n", "more than one rating"},
        {"movieId,rating,timestamp\n1,2,3\n", "no userId column"},
        {"user_id,video_id,is_click\n1,2,1\n", "no time_ms column"},
        {"user_id,video_id,time_ms\n1,2,3\n", "feedback column"},
        {"user_id,time_ms,is_click\n1,2,1\n", "no video_id column"},
        {MOVIELENS, "no event"},
        {MOVIELENS "a,b\n", "no event"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct replay_log log;
        cr_assert_eq(read_text(cases[i].text, &log), SKV_EINVAL, "case %zu", i);
        must_say(cases[i].says);
    }
}

Test(log, unsorted_input_is_sorted_and_ties_keep_their_order)
{
    struct replay_log log;
    must_read(MOVIELENS "2,9,1,50\n1,1,1,30\n1,2,1,10\n2,8,1,50\n1,3,1,30\n2,7,1,50\n1,4,1,20\n", 7,
              0, &log);
    static const uint64_t items[] = {2, 4, 1, 3, 9, 8, 7};
    for (size_t i = 0; i < 7; i++)
        cr_assert_eq(log.events[i].item, items[i], "event %zu", i);
    cr_assert_eq(log.users[1].first, 4);
    replay_log_close(&log);
}

Test(log, the_log_at_hand_is_read_whole)
{
    const char *path = getenv("SIDEKV_RATINGS");
    FILE *in = fopen(path ? path : "../shared/data/ml-latest-small/ratings.csv", "r");
    if (!in)
        cr_skip_test("no ratings.csv: set SIDEKV_RATINGS");
    struct replay_log log;
    cr_assert_eq(replay_log_read(in, "ratings", stderr, &log), 0);
    fclose(in);
    cr_expect_eq(log.count, 100836);
    cr_expect_eq(log.user_count, 610);
    cr_expect_eq(log.lines_skipped, 0);
    struct replay_plan plan;
    struct replay_plan_options options = {.events = 8, .history_tokens = 8192};
    cr_assert_eq(replay_plan_make(&log, &options, &plan), 0);
    cr_expect_eq(plan.count, 12340);
    cr_expect_eq(plan.tokens, 7623216);
    cr_expect_float_eq((double)plan.reusable / (double)plan.tokens, 0.9741, 1e-4);
    replay_plan_close(&plan);
    replay_log_close(&log);
}

/* ---- generator ---- */

Test(generate, the_same_seed_gives_the_same_log)
{
    struct replay_generate options = {.seed = 5, .users = 50, .events = 4000};
    struct replay_log a, b, c;
    cr_assert_eq(replay_log_generate(&options, &a), 0);
    cr_assert_eq(replay_log_generate(&options, &b), 0);
    options.seed = 6;
    cr_assert_eq(replay_log_generate(&options, &c), 0);
    cr_assert_eq(a.count, 4000);
    cr_assert_eq(a.user_count, 50);
    cr_assert_eq(memcmp(a.events, b.events, a.count * sizeof *a.events), 0);
    cr_assert_neq(memcmp(a.events, c.events, a.count * sizeof *a.events), 0);
    replay_log_close(&a);
    replay_log_close(&b);
    replay_log_close(&c);
}

static int descending(const void *left, const void *right)
{
    double a = *(const double *)left, b = *(const double *)right;
    return a > b ? -1 : a < b;
}

/* The share of the total that the largest `share` of the values has. */
static double top_share(double *values, size_t count, double share)
{
    qsort(values, count, sizeof *values, descending);
    double top = 0, sum = 0;
    for (size_t i = 0; i < count; i++) {
        sum += values[i];
        top += (double)i < (double)count * share ? values[i] : 0;
    }
    return top / sum;
}

Test(generate, histories_items_and_return_times_have_heavy_tails)
{
    struct replay_generate options = {.seed = 1, .users = 500, .events = 50000};
    struct replay_log log;
    cr_assert_eq(replay_log_generate(&options, &log), 0);
    double *values = calloc(log.count, sizeof *values);
    for (uint64_t i = 0; i < log.user_count; i++)
        values[i] = (double)log.users[i].count;
    double share = top_share(values, log.user_count, 0.1);
    cr_expect_gt(share, 0.4, "the first tenth of users has %.2f of events", share);

    size_t pauses = 0;
    for (uint64_t i = 1; i < log.count; i++) {
        int64_t pause = log.events[i].time_ms - log.events[i - 1].time_ms;
        if (log.events[i].user == log.events[i - 1].user) {
            cr_assert_gt(pause, 0);
            if (pause > 1000000)
                values[pauses++] = (double)pause;
        }
    }
    share = top_share(values, pauses, 0.1);
    cr_expect_gt(share, 0.4, "the longest tenth of %zu pauses is %.2f of the time", pauses, share);

    memset(values, 0, log.count * sizeof *values);
    for (uint64_t i = 0; i < log.count; i++)
        values[log.events[i].item]++;
    share = top_share(values, log.item_count, 0.01);
    cr_expect_gt(share, 0.3, "the first hundredth of items has %.2f of events", share);
    free(values);
    replay_log_close(&log);
}

Test(generate, impossible_sizes_are_refused)
{
    struct replay_log log;
    cr_assert_eq(replay_log_generate(&(struct replay_generate){.users = 0, .events = 5}, &log),
                 SKV_EINVAL);
    cr_assert_eq(replay_log_generate(&(struct replay_generate){.users = 6, .events = 5}, &log),
                 SKV_EINVAL);
    cr_assert_eq(replay_log_generate(&(struct replay_generate){.users = 5, .events = 5}, &log), 0);
    cr_assert_eq(log.user_count, 5);
    replay_log_close(&log);
}

/* ---- requests ---- */

/* One user with `count` events a second apart, from time 0 on. */
static void steady_log(uint32_t count, struct replay_log *log)
{
    *log = (struct replay_log){.count = count};
    log->events = calloc(count, sizeof *log->events);
    for (uint32_t i = 0; i < count; i++)
        log->events[i] =
            (struct replay_event){.user = 1, .item = i, .time_ms = 1000 * (int64_t)i, .order = i};
    cr_assert_eq(replay_log_finish(log), 0);
}

Test(plan, a_request_comes_with_every_so_many_events)
{
    struct replay_log log;
    struct replay_plan plan;
    steady_log(29, &log);
    cr_assert_eq(
        replay_plan_make(&log, &(struct replay_plan_options){.events = 8, .history_tokens = 8192},
                         &plan),
        0);
    cr_assert_eq(plan.count, 3);
    for (uint32_t i = 0; i < 3; i++) {
        cr_expect_eq(plan.requests[i].first, 0);
        cr_expect_eq(plan.requests[i].end, 8 * (i + 1));
        cr_expect_eq(plan.requests[i].reusable, 16 * i);
        cr_expect_eq(plan.requests[i].time_ms, 8000 * (int64_t)(i + 1) - 1000);
    }
    cr_expect_eq(plan.tokens, 16 + 32 + 48);
    cr_expect_eq(plan.reusable, 16 + 32);
    replay_plan_close(&plan);
    replay_log_close(&log);
}

Test(plan, a_pause_makes_a_request_at_the_return)
{
    struct replay_log log;
    struct replay_plan plan;
    steady_log(20, &log);
    for (uint32_t i = 3; i < 20; i++)
        log.events[i].time_ms += 60000; /* away between events 2 and 3 */
    for (uint32_t i = 11; i < 20; i++)
        log.events[i].time_ms += 60000; /* and between 10 and 11, right after a request */
    cr_assert_eq(replay_plan_make(&log,
                                  &(struct replay_plan_options){
                                      .events = 8, .gap_ms = 60000, .history_tokens = 8192},
                                  &plan),
                 0);
    cr_assert_eq(plan.count, 3);
    cr_expect_eq(plan.requests[0].end, 3);
    cr_expect_eq(plan.requests[0].time_ms, 63000);
    cr_expect_eq(plan.requests[1].end, 11);
    cr_expect_eq(plan.requests[2].end, 19);
    replay_plan_close(&plan);
    replay_log_close(&log);
}

Test(plan, a_history_over_the_limit_drops_its_oldest_half_and_grows_again)
{
    struct replay_log log;
    struct replay_plan plan;
    steady_log(96, &log);
    cr_assert_eq(replay_plan_make(
                     &log, &(struct replay_plan_options){.events = 8, .history_tokens = 64}, &plan),
                 0);
    /* 8, 16, 24, 32 events fit (64 tokens); 40 become 20, then 28; 36 become 18, ... */
    static const struct {
        uint64_t first, end;
        bool restart;
    } wanted[] = {{0, 8, false},  {0, 16, false},  {0, 24, false}, {0, 32, false},
                  {20, 40, true}, {20, 48, false}, {38, 56, true}, {38, 64, false},
                  {55, 72, true}, {55, 80, false}, {72, 88, true}, {72, 96, false}};
    cr_assert_eq(plan.count, 12);
    uint64_t reusable = 0;
    for (size_t i = 0; i < 12; i++) {
        const struct replay_request *request = &plan.requests[i];
        cr_expect_eq(request->first, wanted[i].first, "request %zu: %lu", i, request->first);
        cr_expect_eq(request->end, wanted[i].end);
        cr_expect_eq(request->restart, wanted[i].restart, "request %zu", i);
        cr_expect_leq(replay_history_tokens(request), 64);
        cr_expect(!request->restart || request->reusable == 0);
        reusable += request->reusable;
    }
    cr_expect_eq(plan.restarts, 4);
    cr_expect_eq(plan.reusable, reusable);
    replay_plan_close(&plan);
    replay_log_close(&log);
}

Test(plan, a_limit_keeps_the_first_requests_of_all)
{
    struct replay_log log;
    struct replay_plan all, some;
    cr_assert_eq(replay_log_generate(
                     &(struct replay_generate){.seed = 3, .users = 40, .events = 4000}, &log),
                 0);
    struct replay_plan_options options = {.events = 8, .history_tokens = 8192};
    cr_assert_eq(replay_plan_make(&log, &options, &all), 0);
    options.limit = 100;
    cr_assert_eq(replay_plan_make(&log, &options, &some), 0);
    cr_assert_eq(some.count, 100);
    int64_t last = INT64_MIN, first_left = INT64_MAX;
    uint64_t kept = 0;
    for (uint64_t u = 0; u < all.user_count; u++)
        for (uint64_t i = 0; i < all.users[u].count; i++) {
            const struct replay_request *request = &all.requests[all.users[u].first + i];
            bool in = i < some.users[u].count;
            kept += in;
            if (in && request->time_ms > last)
                last = request->time_ms;
            if (!in && request->time_ms < first_left)
                first_left = request->time_ms;
        }
    cr_expect_eq(kept, 100);
    cr_expect_leq(last, first_left);
    replay_plan_close(&all);
    replay_plan_close(&some);
    replay_log_close(&log);
}
