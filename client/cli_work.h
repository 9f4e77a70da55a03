/* What the dispatcher of replay and its workers tell each other. A worker is this program again,
 * started with two fds: a SEQPACKET socket for the messages below, and a memory file, read-only to
 * it, that starts with struct work_header: everything that does not change during a run.
 *
 *   dispatcher -> worker: work_job, one at a time; end of file: finish
 *   worker -> dispatcher: work_ready once; a work_done for every job; work_bye when finishing
 *
 * Both ends are one program of one build: no versions, no checks beyond sizes. */
#ifndef SKV_CLI_WORK_H
#define SKV_CLI_WORK_H

#include <stddef.h>

#include "cli_log.h"

#define WORK_SOCKET_FD      3
#define WORK_MEMORY_FD      4
#define WORK_ARGUMENT       "--worker" /* argv[1] of a worker; no option of the command line */

#define WORK_TOP_MAX        16u
#define WORK_CANDIDATES_MAX 4096u
#define WORK_CUDA_BATCH     8u /* users a pass, unless --batch says otherwise */

/* A pass: bench with a full history takes a host core most of a minute. */
#define WORK_PASS_TIMEOUT_MS 600000u

/* Wrong on CUDA: a cached and a recomputed row went through GEMMs of other sizes, which sum in
 * another order, and bf16 rounds what differs. On the host any bit that differs is wrong. The most
 * measured on an H200, ml-latest-small and generated logs, 2026-11-23 (a flipped token: 0.7 and 1):
 *
 *             logit    row, of its largest value
 *   tiny      0.0150   0.0106     235,000 scores, 2.3 million rows
 *   kuairand  0.0274   0.0139     638,000 scores, 2.5 million rows
 *   bench     0.0509   0.0190      90,000 scores, 6.7 million rows */
#define WORK_CUDA_LOGIT_TOLERANCE 0.1f
#define WORK_CUDA_ROW_TOLERANCE   0x1p-5f

struct work_header {
    char model[16];
    char device[16];  /* without a daemon */
    char socket[108]; /* of the daemon; empty: no cache */
    uint64_t seed;    /* of weights and candidates */
    uint32_t history; /* most tokens of a request */
    uint32_t batch;   /* most users a pass; 0: WORK_CUDA_BATCH on CUDA, else 1 */
    uint32_t threads; /* of a host worker */
    uint32_t candidates, top;
    bool verify; /* some items will be WORK_VERIFY */
    uint64_t token_count, item_count;
    /* Then uint64_t tokens[token_count], two an event; uint64_t items[item_count]. */
};

static inline const uint64_t *work_tokens(const struct work_header *header)
{
    return (const uint64_t *)(header + 1);
}
static inline const uint64_t *work_items(const struct work_header *header)
{
    return work_tokens(header) + header->token_count;
}

enum work_item_flags {
    WORK_VERIFY = 1u << 0, /* recompute without cache and compare */
    WORK_FLIP = 1u << 1,   /* and recompute with one cached token changed: must be found */
};

struct work_item {
    uint64_t request;     /* index in the plan; seeds the candidates */
    uint64_t user;        /* key */
    uint64_t first_token; /* of the history */
    uint32_t history;     /* tokens */
    uint32_t flags;       /* enum work_item_flags */
};

struct work_job {
    uint32_t count;
    struct work_item items[SKV_MAX_BATCH];
};

enum work_kind { WORK_READY = 1, WORK_DONE, WORK_BYE };

struct work_ready {
    uint32_t kind, batch;
    uint32_t cuda;
    char device[64];
};

struct work_score {
    uint64_t item; /* as in the log */
    float score;   /* after the sigmoid */
};

enum work_result_flags {
    WORK_FLIPPED = 1u << 0,  /* a token was changed for the comparison */
    WORK_UNCACHED = 1u << 1, /* served without the daemon, which was lost */
    WORK_NO_APPEND = 1u << 2 /* new tokens that were not cached: no append lease */
};

struct work_result {
    uint64_t request;
    uint64_t digest;     /* of the logits' bits */
    uint32_t cached;     /* history tokens that were not computed */
    uint32_t gpu_tokens; /* of these, already in the pool */
    uint32_t scores_checked, scores_wrong;
    uint32_t rows_checked, rows_wrong;
    float max_abs_diff; /* of logits */
    float max_row_diff; /* of K and V, as a part of the row's largest value */
    uint32_t flags;     /* enum work_result_flags */
    uint32_t top_count;
    struct work_score top[WORK_TOP_MAX]; /* best first */
};

struct work_done {
    uint32_t kind, count;
    uint64_t latency_ns; /* from the job's arrival to its scores */
    uint64_t acquire_ns; /* the last skv_acquire(); 0: none */
    uint64_t launch_ns;  /* of hstu_runner_launch() */
    uint64_t wait_ns;    /* of hstu_runner_wait(); both over every pass that this job needed */
    uint64_t cpu_ns;     /* of the process meanwhile: wait_ns on a machine of its own */
    uint64_t commit_ns;
    uint64_t verify_ns;
    uint32_t reloads;    /* passes thrown away: a page could not be loaded, or the daemon died */
    uint32_t reconnects; /* sessions that began anew */
    uint32_t stale;      /* commits refused */
    uint32_t reserved;
    struct work_result results[SKV_MAX_BATCH]; /* [count] */
};

static inline size_t work_done_bytes(uint32_t count)
{
    return offsetof(struct work_done, results) + count * sizeof(struct work_result);
}

/* What the worker took: its runner's, and the process's at its peak. */
struct work_bye {
    uint32_t kind, graphs;
    uint64_t context_bytes, weights_bytes, arena_bytes, graphs_bytes;
    uint64_t resident_bytes;
};

/* main() of a worker. Returns its exit code. */
int replay_worker(void);

#endif
