/* Claims that hold on every backend of device.h: each is run on the host, and on CUDA where there
 * is a GPU. Where there is none its CUDA runs are skips that show. */
#ifndef SKV_EVERY_BACKEND_H
#define SKV_EVERY_BACKEND_H

#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "gpu.h"

struct backend {
    char name[8];
};

static struct backend backends[] = {{"host"}, {"cuda"}};

/* The body has `backend`, and begins with require(). What follows the claim goes to Criterion. */
#define TEST_ON_EVERY_BACKEND(suite, claim, ...)                                                   \
    ParameterizedTestParameters(suite, claim)                                                      \
    {                                                                                              \
        return cr_make_param_array(struct backend, backends, 2);                                   \
    }                                                                                              \
    ParameterizedTest(struct backend *backend, suite, claim, __VA_ARGS__)

static inline void require(const struct backend *backend)
{
    if (strcmp(backend->name, "cuda") == 0 && !has_gpu())
        cr_skip_test("cuda: no GPU on this machine");
}

ReportHook(POST_ALL)(struct criterion_global_stats *stats)
{
    if (stats->tests_skipped)
        fprintf(stderr, "%s: SKIPPED %zu runs on CUDA: no GPU on this machine\n",
                program_invocation_short_name, stats->tests_skipped);
}

#endif
