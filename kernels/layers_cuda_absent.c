/* The CUDA backend of a build without nvcc: it says so. */
#include "layers.h"

#include "log.h"

static int absent_open(const struct hstu_runner_options *options, void **state)
{
    (void)options;
    (void)state;
    skv_error("this build has no CUDA kernels: build where nvcc is (make help)");
    return SKV_ENODEVICE;
}

const struct hstu_backend hstu_backend_cuda = {.name = "cuda", .open = absent_open};
