/* Cold reads: extents of data.mdb into pinned staging, from the page cache when they are there,
 * else by O_DIRECT through a small io_uring of the calling thread's own; pread where io_uring is
 * missing. One user: the copy thread. */
#ifndef SKV_DIRECT_H
#define SKV_DIRECT_H

#include "sidekv.h"

struct skv_direct;

struct skv_direct_read {
    uint64_t offset; /* of the file, a multiple of 4096 */
    uint32_t bytes;  /* a multiple of 4096 */
    int32_t status;  /* out: 0, SKV_EIO (short or failed; logged) */
    void *memory;    /* 4096-aligned */
    uint64_t tag;    /* the caller's */
};

/* `depth` reads in flight at most. Falls back to pread, says so once, when there is no io_uring. */
int skv_direct_open(int fd, uint32_t depth, struct skv_direct **out);
void skv_direct_close(struct skv_direct *direct);
/* Starts a read; it is the callee's until it comes back from skv_direct_poll(). SKV_EAGAIN: `depth`
 * are in flight. */
int skv_direct_submit(struct skv_direct *direct, struct skv_direct_read *read);
/* A finished read, or NULL when none has finished (wait: or none is in flight). */
struct skv_direct_read *skv_direct_poll(struct skv_direct *direct, bool wait);

#endif
