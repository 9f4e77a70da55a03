/* Where a prover's processes are to die: a file that they all map. Whoever links failpoint.c and
 * finds FAILPOINTS_FILE in its environment obeys it from its start. */
#ifndef SKV_TEST_FAILPOINT_H
#define SKV_TEST_FAILPOINT_H

#include <stdint.h>

#include "failpoint.h"

#define FAILPOINTS_FILE "SIDEKV_TEST_FAILPOINTS" /* environment: the file */

struct failpoint_plan {
    uint32_t armed;                   /* point + 1; 0: nobody dies */
    int32_t countdown;                /* 1: whoever reaches it next */
    int32_t died;                     /* who did, written before */
    uint64_t reached[SKV_FAILPOINTS]; /* by anybody */
};

#endif
