/* In place of the CUDA backend, in a build without the CUDA headers. */
#include <stdio.h>

#include "device_backend.h"

static int absent_open(struct skv_device_query *query, struct skv_device **out)
{
    (void)out;
    snprintf(query->reason, sizeof query->reason, "built without CUDA");
    return SKV_ENODEVICE;
}

const struct skv_backend skv_backend_cuda = {.name = "cuda", .open = absent_open};
