/* The daemon's event loop: one-shot watches, completed by io_uring; by epoll where there is none.
 * It and storage/direct alone know io_uring. One thread. */
#ifndef SKV_LOOP_H
#define SKV_LOOP_H

#include <stdbool.h>
#include <stdint.h>

struct loop;

/* One watch. Its memory is the caller's and must stay until `done` has run or loop_forget() has
 * returned true. */
struct watch {
    void (*done)(void *context,
                 int32_t result); /* result: poll events, or bytes read; negative errno */
    void *context;
    int fd;
    bool pending;
    bool cancelled; /* `done` will not run; the watch is still the loop's while pending */
    bool counts;    /* reads the eventfd's counter */
    uint32_t events;
    struct watch *unarmed; /* epoll: next of those that the kernel did not take */
    uint64_t counter;      /* where the read goes */
};

/* `epoll`: do not even try io_uring. *what: "io_uring" or "epoll". */
int loop_open(struct loop **out, bool epoll, const char **what);
void loop_close(struct loop *loop);

/* Runs `done` once when the fd has one of `events` (POLLIN, ...; hang-up and error always count).
 */
void loop_poll(struct loop *loop, struct watch *watch, int fd, uint32_t events);
/* Runs `done` once when the eventfd (or timerfd, 8 bytes) has been read. */
void loop_read(struct loop *loop, struct watch *watch, int fd);
/* `done` will not run any more. true: the memory is the caller's again; false: ask again after a
 * turn. */
bool loop_forget(struct loop *loop, struct watch *watch);

/* Runs what has completed; waits for something up to timeout_ns first when `wait`. Returns how many
 * ran, or a negative errno. */
int loop_turn(struct loop *loop, bool wait, uint64_t timeout_ns);

#endif
