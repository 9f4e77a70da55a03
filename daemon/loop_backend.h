/* What a backend of the loop provides; loop.c holds the table. */
#ifndef SKV_LOOP_BACKEND_H
#define SKV_LOOP_BACKEND_H

#include "loop.h"

struct loop_backend {
    const char *name;
    int (*open)(void **state);
    void (*close)(void *state);
    void (*arm)(void *state, struct watch *watch);
    void (*cancel)(void *state, struct watch *watch);
    int (*turn)(void *state, bool wait, uint64_t timeout_ns);
};
extern const struct loop_backend loop_uring, loop_epoll;

/* A backend's end of a watch: runs it unless it was forgotten. Returns 1 when it ran. */
int loop_complete(struct watch *watch, int32_t result);

#endif
