/* The second opinion: recomputes a request without the cache, in the worker that served it, and
 * compares scores, and K and V of every cached row. */
#ifndef SKV_CLI_VERIFY_H
#define SKV_CLI_VERIFY_H

#include "cli_work.h"
#include "hstu.h"

struct replay_verify;

struct replay_verify_options {
    const struct hstu_weights *weights; /* must outlive it */
    struct skv_device *device;          /* the session's */
    uint32_t history;                   /* most tokens */
    uint32_t candidates;
    uint32_t threads;
};

/* A second runner with private pages. Follow with replay_verify_close(). An error of
 * hstu_runner_open(), skv_device_alloc(), skv_pinned_alloc() or skv_stream_open(). */
int replay_verify_open(const struct replay_verify_options *options, struct replay_verify **out);
void replay_verify_close(struct replay_verify *verify);

/* One request that was served out of the cache and not yet committed: its pages are still leased.
 */
struct replay_served {
    const uint64_t *tokens; /* [history + targets] history, then candidates */
    uint32_t history, targets, cached;
    const uint32_t *pages; /* [ceil(cached / S)] */
    const void *pool;      /* page 0 */
    const float *logits;   /* [targets][head_out] */
    bool flip;             /* recompute with one cached token changed, if any is cached */
};

/* Fills the comparison's part of `result`. Returns 0 whatever the comparison says, or an error of
 * the runner or the stream. */
int replay_verify_check(struct replay_verify *verify, const struct replay_served *served,
                        struct work_result *result);

#endif
