/* Time: monotonic, in nanoseconds. */
#ifndef SKV_CLOCK_H
#define SKV_CLOCK_H

#include <stdint.h>
#include <time.h>

static inline uint64_t skv_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* One turn of a spin loop. */
static inline void skv_relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

#endif
