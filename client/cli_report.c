#include "cli_report.h"

#include <inttypes.h>
#include <unistd.h>

#include "clock.h"

#define TTY_NS  UINT64_C(200000000)   /* between two lines of progress */
#define FILE_NS UINT64_C(10000000000) /* where stderr is no terminal */

/* ---- progress ---- */

static bool progress_shown;

static double percent(uint64_t part, uint64_t whole)
{
    return whole ? 100.0 * (double)part / (double)whole : 0;
}

void replay_progress(const struct replay_run *run, const struct replay_result *result)
{
    static uint64_t last_ns, start_ns;
    static const struct replay_run *of;
    uint64_t now = skv_now_ns();
    bool tty = isatty(STDERR_FILENO);
    if (of != run) {
        of = run;
        start_ns = last_ns = now;
    }
    if (now - last_ns < (tty ? TTY_NS : FILE_NS) || result->requests == 0)
        return;
    last_ns = now;
    double seconds = (double)(now - start_ns) / 1e9;
    double left =
        seconds * (double)(run->plan->count - result->requests) / (double)result->requests;
    fprintf(stderr, "%s%s: %" PRIu64 " of %" PRIu64 " requests", tty ? "\r\033[K" : "", run->name,
            result->requests, run->plan->count);
    if (run->header.socket[0])
        fprintf(stderr, ", %.1f %% of history from cache", percent(result->cached, result->tokens));
    if (result->restarts)
        fprintf(stderr, ", %" PRIu64 " workers restarted", result->restarts);
    if (result->scores_wrong || result->rows_wrong)
        fprintf(stderr, ", WRONG: %" PRIu64 " scores, %" PRIu64 " rows", result->scores_wrong,
                result->rows_wrong);
    fprintf(stderr, ", about %.0f s left%s", left, tty ? "" : "\n");
    progress_shown = tty;
}

void replay_progress_end(void)
{
    if (progress_shown)
        fputs("\r\033[K", stderr);
    progress_shown = false;
}

/* ---- the summary ---- */

static double us(uint64_t ns)
{
    return (double)ns / 1e3;
}

static double seconds(uint64_t ns)
{
    return (double)ns / 1e9;
}

static double mib(uint64_t bytes)
{
    return (double)bytes / (1024 * 1024);
}

/* Tokens that went through the model: history that was not cached, and candidates. */
static uint64_t computed(const struct replay_run *run, const struct replay_result *r)
{
    return r->tokens - r->cached + r->requests * run->header.candidates;
}

static void report_plan(const struct replay_run *run, const struct replay_result *r)
{
    const struct replay_log *log = run->log;
    printf("log        %s, %" PRIu64 " users, %" PRIu64 " events, %" PRIu64 " items", log->format,
           log->user_count, log->count, log->item_count);
    if (log->lines_skipped)
        printf(", %" PRIu64 " broken lines skipped", log->lines_skipped);
    printf("\nrequests   %" PRIu64 " of %" PRIu64 ", %u candidates each", r->requests,
           run->plan->count, run->header.candidates);
    if (run->plan->restarts)
        printf(", %" PRIu64 " histories over %u tokens began anew", run->plan->restarts,
               run->header.history);
    printf("\nran on     %s, model %s, %u workers, batch %u", r->device, run->header.model,
           run->workers, r->batch);
    if (r->restarts)
        printf(", %" PRIu64 " workers died and were started again", r->restarts);
    putchar('\n');
}

static void report_cache(const struct replay_run *run, const struct replay_result *r)
{
    printf("history    %" PRIu64 " tokens", r->tokens);
    if (!run->header.socket[0]) {
        puts(", all of them computed");
        return;
    }
    printf("; from cache %" PRIu64 " (%.2f %%): pool %" PRIu64 ", store %" PRIu64 "\n", r->cached,
           percent(r->cached, r->tokens), r->gpu_tokens, r->cached - r->gpu_tokens);
    printf("           the most that this log allows a cache that starts empty: %.2f %%\n",
           percent(run->plan->reusable, run->plan->tokens));
    if (r->uncached_requests)
        printf("           %" PRIu64 " requests served while the daemon was away\n",
               r->uncached_requests);
    if (r->no_append)
        printf("           %" PRIu64 " requests whose new tokens could not be cached\n",
               r->no_append);
    if (r->reloads || r->reconnects || r->stale)
        printf("           %" PRIu64 " passes done again, %" PRIu64 " reconnects, %" PRIu64
               " commits too late\n",
               r->reloads, r->reconnects, r->stale);
}

static void report_times(const struct replay_run *run, const struct replay_result *r)
{
    printf("time       %.2f s; compute %.2f s in all workers (%.2f s launching, %.2f s of CPU), "
           "%" PRIu64 " tokens computed\n",
           seconds(r->wall_ns), seconds(r->compute.total_ns), seconds(r->launch_ns),
           seconds(r->cpu_ns), computed(run, r));
    printf("latency    p50 %.0f us, p99 %.0f us", us(replay_percentile(&r->latency, 0.5)),
           us(replay_percentile(&r->latency, 0.99)));
    if (r->acquire.count)
        printf("; acquire p50 %.1f us, p99 %.1f us", us(replay_percentile(&r->acquire, 0.5)),
               us(replay_percentile(&r->acquire, 0.99)));
    putchar('\n');
}

static void report_worker(const struct replay_result *r)
{
    const struct work_bye *f = &r->footprint;
    printf("a worker   %.0f MiB resident; runner: weights %.0f, arena %.0f", mib(f->resident_bytes),
           mib(f->weights_bytes), mib(f->arena_bytes));
    if (r->cuda)
        printf(", context %.0f, %u graphs %.0f", mib(f->context_bytes), f->graphs,
               mib(f->graphs_bytes));
    puts(" MiB");
}

static void report_sample(const struct replay_result *r)
{
    const char *what = "best";
    for (uint32_t i = 0; i < REPLAY_SAMPLES; i++) {
        if (r->samples[i].count == 0)
            continue;
        printf("%-11suser %" PRIu64 ":", what, r->samples[i].user);
        for (uint32_t j = 0; j < r->samples[i].count && j < 5; j++)
            printf(" %" PRIu64 " (%.3f)", r->samples[i].top[j].item,
                   (double)r->samples[i].top[j].score);
        putchar('\n');
        what = "";
    }
}

static void report_check(const struct replay_run *run, const struct replay_result *r)
{
    if (run->verify == 0)
        return;
    printf("checked    %" PRIu64 " scores, %" PRIu64 " wrong; %" PRIu64 " rows of K and V, %" PRIu64
           " wrong\n",
           r->scores_checked, r->scores_wrong, r->rows_checked, r->rows_wrong);
    printf("           largest difference: logits %g, rows %g of their largest value",
           (double)r->max_abs_diff, (double)r->max_row_diff);
    if (r->cuda)
        printf(" (allowed: %g, %g)", (double)WORK_CUDA_LOGIT_TOLERANCE,
               (double)WORK_CUDA_ROW_TOLERANCE);
    putchar('\n');
    if (run->flip)
        printf("           a cached token was flipped for %" PRIu64 " of them\n", r->flipped);
}

void replay_report(const struct replay_run *run, const struct replay_result *result)
{
    report_plan(run, result);
    report_cache(run, result);
    report_times(run, result);
    report_worker(result);
    report_sample(result);
    report_check(run, result);
}

static void report_row(const char *what, const char *format, double left, double right, bool ratio)
{
    printf("%-28s", what);
    printf(format, left);
    printf(format, right);
    if (ratio && left > 0)
        printf("%9.1f x", right / left);
    putchar('\n');
}

void replay_report_pair(const struct replay_run *run, const struct replay_result *cached,
                        const struct replay_result *uncached)
{
    const struct replay_result *c = cached, *u = uncached;
    printf("\n%-28s%14s%14s\n", "", "with cache", "without");
    report_row("time, s", "%14.2f", seconds(c->wall_ns), seconds(u->wall_ns), true);
    report_row("compute, s", "%14.2f", seconds(c->compute.total_ns), seconds(u->compute.total_ns),
               true);
    report_row("tokens computed", "%14.0f", (double)computed(run, c), (double)computed(run, u),
               true);
    report_row("history from cache, %", "%14.2f", percent(c->cached, c->tokens),
               percent(u->cached, u->tokens), false);
    report_row("latency p50, us", "%14.0f", us(replay_percentile(&c->latency, 0.5)),
               us(replay_percentile(&u->latency, 0.5)), true);
    report_row("latency p99, us", "%14.0f", us(replay_percentile(&c->latency, 0.99)),
               us(replay_percentile(&u->latency, 0.99)), true);
    report_row("workers died, restarted", "%14.0f", (double)c->restarts, (double)u->restarts,
               false);
    if (!c->cuda)
        printf("%-28s%28s\n", "scores, bit for bit",
               c->digest == u->digest ? "the same" : "DIFFERENT");
}

/* ---- for programs ---- */

static json_t *times_json(const struct replay_times *times)
{
    return json_pack("{s:f, s:f, s:f}", "p50", us(replay_percentile(times, 0.5)), "p99",
                     us(replay_percentile(times, 0.99)), "total", us(times->total_ns));
}

static json_int_t integer(uint64_t value)
{
    return (json_int_t)value;
}

json_t *replay_report_json(const struct replay_run *run, const struct replay_result *r)
{
    char digest[17];
    snprintf(digest, sizeof digest, "%016" PRIx64, r->digest);
    json_t *compute = times_json(&r->compute);
    if (!compute || json_object_set_new(compute, "launch", json_real(us(r->launch_ns))) != 0 ||
        json_object_set_new(compute, "wait", json_real(us(r->wait_ns))) != 0 ||
        json_object_set_new(compute, "cpu", json_real(us(r->cpu_ns))) != 0)
        return NULL;
    const struct work_bye *f = &r->footprint;
    json_t *worker =
        json_pack("{s:I, s:I, s:I, s:I, s:I, s:i}", "resident_bytes", integer(f->resident_bytes),
                  "context_bytes", integer(f->context_bytes), "weights_bytes",
                  integer(f->weights_bytes), "arena_bytes", integer(f->arena_bytes), "graphs_bytes",
                  integer(f->graphs_bytes), "graphs", (int)f->graphs);
    json_t *plan =
        json_pack("{s:s, s:I, s:I, s:I, s:I, s:I, s:I}", "log", run->log->format, "users",
                  integer(run->log->user_count), "events", integer(run->log->count),
                  "lines_skipped", integer(run->log->lines_skipped), "requests_planned",
                  integer(run->plan->count), "tokens_cacheable", integer(run->plan->reusable),
                  "history_restarts", integer(run->plan->restarts));
    json_t *all =
        json_pack("{s:s, s:s, s:b, s:i, s:i, s:i}", "device", r->device, "model", run->header.model,
                  "cache", run->header.socket[0] != 0, "workers", (int)run->workers, "batch",
                  (int)r->batch, "candidates", (int)run->header.candidates);
    json_t *counts = json_pack(
        "{s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I}", "requests",
        integer(r->requests), "tokens_total", integer(r->tokens), "tokens_cached",
        integer(r->cached), "tokens_computed", integer(computed(run, r)), "hit_gpu_tokens",
        integer(r->gpu_tokens), "hit_store_tokens", integer(r->cached - r->gpu_tokens),
        "uncached_requests", integer(r->uncached_requests), "no_append", integer(r->no_append),
        "passes_again", integer(r->reloads), "reconnects", integer(r->reconnects), "stale_commits",
        integer(r->stale), "worker_restarts", integer(r->restarts));
    json_t *checks =
        json_pack("{s:I, s:I, s:I, s:I, s:f, s:f, s:I, s:s}", "scores_checked",
                  integer(r->scores_checked), "scores_wrong", integer(r->scores_wrong),
                  "rows_checked", integer(r->rows_checked), "rows_wrong", integer(r->rows_wrong),
                  "max_abs_diff", (double)r->max_abs_diff, "max_row_diff", (double)r->max_row_diff,
                  "flipped", integer(r->flipped), "scores_digest", digest);
    json_t *times = json_pack("{s:o, s:o, s:o, s:f, s:f, s:f, s:o}", "latency_us",
                              times_json(&r->latency), "acquire_us", times_json(&r->acquire),
                              "compute_us", compute, "commit_us", us(r->commit_ns), "verify_us",
                              us(r->verify_ns), "wall_s", seconds(r->wall_ns), "worker", worker);
    json_t *parts[] = {plan, counts, checks, times};
    bool whole = all != NULL;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        whole = whole && parts[i] && json_object_update(all, parts[i]) == 0;
        json_decref(parts[i]);
    }
    if (whole)
        return all;
    json_decref(all);
    return NULL;
}
