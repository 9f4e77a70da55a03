/* What a run added up to: counts, times, a sample of answers. Filled while it runs, by
 * cli_dispatch.c; read by cli_report.c. */
#ifndef SKV_CLI_RESULT_H
#define SKV_CLI_RESULT_H

#include "cli_plan.h"
#include "cli_work.h"

#define REPLAY_SAMPLES 3u /* requests whose best candidates the summary shows */

struct replay_times {
    uint64_t *ns; /* [count], sorted by replay_times_sort() */
    uint64_t count, capacity;
    uint64_t total_ns;
};

struct replay_result {
    char device[64];
    bool cuda;
    uint32_t batch;
    uint64_t requests, tokens, cached, gpu_tokens; /* of requests that were answered */
    uint64_t uncached_requests;                    /* the daemon was lost */
    uint64_t no_append; /* requests whose new tokens could not be cached */
    uint64_t scores_checked, scores_wrong, rows_checked, rows_wrong, flipped;
    float max_abs_diff, max_row_diff;
    struct replay_times latency, acquire, compute;
    uint64_t launch_ns, wait_ns, cpu_ns, commit_ns, verify_ns, wall_ns;
    uint64_t reloads, reconnects, stale;
    uint64_t restarts;         /* workers started again */
    uint64_t digest;           /* of every logit of the run, whatever the order */
    struct work_bye footprint; /* the largest of any worker */
    struct {
        uint64_t user;
        uint32_t count;
        struct work_score top[WORK_TOP_MAX];
    } samples[REPLAY_SAMPLES]; /* the last requests of some users; count 0: none */
};

/* One answered request of the user with that id. */
void replay_result_add(struct replay_result *r, const struct replay_request *request, uint64_t user,
                       const struct work_result *result);
/* One job: its times. */
void replay_result_add_job(struct replay_result *r, const struct work_done *done);
/* A worker's footprint: keeps the largest. */
void replay_result_add_footprint(struct replay_result *r, const struct work_bye *bye);
/* After the last one: sorts the times. */
void replay_result_finish(struct replay_result *r);
void replay_result_close(struct replay_result *r);

/* As replay_result_finish() does with a run's; ping has times of its own. */
void replay_times_sort(struct replay_times *times);
/* Percentile 0..1 of sorted times, the nearest of them: 0 the least, 1 the most. 0 without any. */
uint64_t replay_percentile(const struct replay_times *times, double share);

#endif
