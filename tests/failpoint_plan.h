/* Where a test's or a prover's processes are to die, or to stop: a file that they all map. Whoever
 * links failpoint.c and finds FAILPOINTS_FILE in its environment obeys it from its start. */
#ifndef SKV_TEST_FAILPOINT_H
#define SKV_TEST_FAILPOINT_H

#include <stdint.h>

#include "failpoint.h"

#define FAILPOINTS_FILE "SIDEKV_TEST_FAILPOINTS" /* environment: the file */

struct failpoint_plan {
    uint32_t armed;                   /* point + 1; 0: nobody dies */
    int32_t countdown;                /* 1: whoever reaches it next */
    int32_t died;                     /* who did, written before */
    int32_t signal;                   /* of what; 0: SIGKILL. SIGSTOP: it goes on at a SIGCONT */
    uint64_t reached[SKV_FAILPOINTS]; /* by anybody */
};

#endif
