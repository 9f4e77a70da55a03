/* The store's way into the daemon, from the check of what it holds to the last of its users. All
 * that takes long is done by a thread of its own, which waits for the check, opens the store,
 * reserves generations, starts pinner and mover (on a GPU behind the earlier daemon's
 * workers: let_workers_in()), and reads every user; the loop takes what it
 * sends, a chunk a turn. Until it is there requests are served out of an adopted pool, see
 * skv_cache_adopt(); daemon->store and daemon->mover are NULL until it is open. */
#ifndef SKV_ARRIVAL_H
#define SKV_ARRIVAL_H

#include <stdint.h>

struct daemon;

/* Takes over daemon->claimed; pool and cache are made. Follow with take() or await() until
 * daemon->arrival is NULL: the store is there. Where none is claimed the mover is started alone.
 * SKV_ENOMEM, or what starting the mover came to. */
int skv_arrival_start(struct daemon *daemon);
/* A step, of a millisecond at most; what went wrong is daemon->arrival_status. Returns how much was
 * done; when it was nothing, daemon->arrival_bell rings for what comes next. */
uint32_t skv_arrival_take(struct daemon *daemon);
/* Takes what comes until the store is there, or the time is over; nothing where workers come first,
 * whom only the loop lets in. 0, or what went wrong; SKV_EAGAIN: the start was told to end. */
int skv_arrival_await(struct daemon *daemon, uint64_t until_ns);
/* Gives up; whatever of store, pinner and mover is there already is the daemon's, to be closed. */
void skv_arrival_stop(struct daemon *daemon);

#endif
