/* Is there a GPU? For tests that run on what this machine has. */
#ifndef SKV_TEST_GPU_H
#define SKV_TEST_GPU_H

#include <dlfcn.h>
#include <stdbool.h>
#include <unistd.h>

/* Not by opening it: a process that will fork must not have started CUDA. */
static inline bool has_gpu(void)
{
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    bool there = library && access("/dev/nvidiactl", R_OK | W_OK) == 0;
    if (library)
        dlclose(library);
    return there;
}

#endif
