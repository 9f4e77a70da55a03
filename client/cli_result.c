#include "cli_result.h"

#include <stdlib.h>
#include <string.h>

static void add_time(struct replay_times *times, uint64_t ns)
{
    if (times->count == times->capacity) {
        uint64_t capacity = times->capacity ? 2 * times->capacity : 4096;
        uint64_t *more = reallocarray(times->ns, capacity, sizeof *more);
        if (!more)
            return; /* a percentile less exact */
        times->ns = more;
        times->capacity = capacity;
    }
    times->ns[times->count++] = ns;
    times->total_ns += ns;
}

static void keep_largest(float *most, float value)
{
    if (value > *most)
        *most = value;
}

void replay_result_add(struct replay_result *r, const struct replay_request *request, uint64_t user,
                       const struct work_result *result)
{
    r->requests++;
    r->tokens += replay_history_tokens(request);
    r->cached += result->cached;
    r->gpu_tokens += result->gpu_tokens;
    r->uncached_requests += (result->flags & WORK_UNCACHED) != 0;
    r->no_append += (result->flags & WORK_NO_APPEND) != 0;
    r->flipped += (result->flags & WORK_FLIPPED) != 0;
    r->scores_checked += result->scores_checked;
    r->scores_wrong += result->scores_wrong;
    r->rows_checked += result->rows_checked;
    r->rows_wrong += result->rows_wrong;
    keep_largest(&r->max_abs_diff, result->max_abs_diff);
    keep_largest(&r->max_row_diff, result->max_row_diff);
    uint64_t mixed = result->digest + result->request;
    r->digest += replay_random(&mixed); /* a sum: requests may come in any order */

    uint64_t sample = user % REPLAY_SAMPLES; /* users that differ */
    r->samples[sample].user = user;
    r->samples[sample].count = result->top_count;
    memcpy(r->samples[sample].top, result->top, sizeof result->top);
}

void replay_result_add_job(struct replay_result *r, const struct work_done *done)
{
    for (uint32_t i = 0; i < done->count; i++)
        add_time(&r->latency, done->latency_ns); /* every user of the batch waited that long */
    if (done->acquire_ns)
        add_time(&r->acquire, done->acquire_ns);
    add_time(&r->compute, done->launch_ns + done->wait_ns);
    r->launch_ns += done->launch_ns;
    r->wait_ns += done->wait_ns;
    r->cpu_ns += done->cpu_ns;
    r->commit_ns += done->commit_ns;
    r->verify_ns += done->verify_ns;
    r->reloads += done->reloads;
    r->reconnects += done->reconnects;
    r->stale += done->stale;
}

void replay_result_add_footprint(struct replay_result *r, const struct work_bye *bye)
{
    struct work_bye *most = &r->footprint;
    uint64_t *const into[] = {&most->context_bytes, &most->weights_bytes, &most->arena_bytes,
                              &most->graphs_bytes, &most->resident_bytes};
    const uint64_t from[] = {bye->context_bytes, bye->weights_bytes, bye->arena_bytes,
                             bye->graphs_bytes, bye->resident_bytes};
    for (size_t i = 0; i < sizeof from / sizeof *from; i++)
        if (from[i] > *into[i])
            *into[i] = from[i];
    if (bye->graphs > most->graphs)
        most->graphs = bye->graphs;
}

static int by_value(const void *left, const void *right)
{
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return a < b ? -1 : a > b;
}

void replay_times_sort(struct replay_times *times)
{
    if (times->count > 0)
        qsort(times->ns, times->count, sizeof *times->ns, by_value);
}

void replay_result_finish(struct replay_result *r)
{
    replay_times_sort(&r->latency);
    replay_times_sort(&r->acquire);
    replay_times_sort(&r->compute);
}

void replay_result_close(struct replay_result *r)
{
    free(r->latency.ns);
    free(r->acquire.ns);
    free(r->compute.ns);
    *r = (struct replay_result){0};
}

uint64_t replay_percentile(const struct replay_times *times, double share)
{
    if (times->count == 0)
        return 0;
    return times->ns[(uint64_t)(share * (double)(times->count - 1) + 0.5)];
}
