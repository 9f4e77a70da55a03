/* Named instructions at which a prover may have a process killed, or a test stopped: daemon, keeper
 * and client library call skv_failpoint() there, and tests/failpoint.c, which no shipped program
 * links, does it. Without it the call is a load and a branch that is never taken.
 *
 * A point stands between two steps that another process can see: a descriptor and the next one, a
 * change and its answer. The list is the provers' too, who fail when a point is never reached. */
#ifndef SKV_FAILPOINT_H
#define SKV_FAILPOINT_H

/* Name, and what has just been done there. */
#define SKV_DAEMON_POINTS(X)                                                                       \
    X(table_torn, "a descriptor's slot is written, its sequence is not")                           \
    X(grant_own, "one of the pages to append to is described")                                     \
    X(grant_loading, "one of the pages to load is described")                                      \
    X(grant_silent, "a grant is written, its completion is not published")                         \
    X(grant_told, "an ACQUIRE's completion is published")                                          \
    X(commit_ahead, "a COMMIT's first page is described beside the tail that it replaces")         \
    X(commit_swapped, "the old tail is gone")                                                      \
    X(commit_page, "one of the pages of a COMMIT is described")                                    \
    X(commit_silent, "a COMMIT is done, not answered")                                             \
    X(drop_page, "one page of a user is dropped")                                                  \
    X(evict_unstored, "a user is about to be evicted that is not stored: tokens are dropped")      \
    X(evict_begun, "a user is about to be evicted")                                                \
    X(succeed_page, "one page that the user lost is described as held")                            \
    X(cut_numbered, "a cut user has its new generation, and nothing else")                         \
    X(cut_done, "a user is cut in the pool, the store's change is handed in")                      \
    X(cut_silent, "a FORGET or TRUNCATE is stored, not answered")                                  \
    X(load_page, "one page that was loaded is described as ready")                                 \
    X(flush_silent, "a FLUSH is done, not answered")                                               \
    X(gate_shut, "copies are queued, the gates behind them are not")                               \
    X(gate_open, "openings of gates are queued")                                                   \
    X(onboard_ended, "an onboard's last event is about to go out")                                 \
    X(offload_copied, "pages are in staging, the loop does not know")                              \
    X(store_page, "a page is put into a transaction")                                              \
    X(store_uncommitted, "pages and records are put, the transaction is not committed")            \
    X(store_committed, "pages are stored, nobody knows")                                           \
    X(change_uncommitted, "a record's change is put, not committed")                               \
    X(change_committed, "a record's change is stored, nobody knows")                               \
    X(hello_pidfd, "the keeper has a worker's pidfd, the session table does not know it")          \
    X(hello_recorded, "a session is recorded, not welcomed")                                       \
    X(hello_welcomed, "a welcome is sent")                                                         \
    X(session_fenced, "a session is fenced")                                                       \
    X(session_gone, "a session's leases have ended, its record has not")                           \
    X(settle_one, "a worker of an earlier daemon has drained or is gone")                          \
    X(start_numbered, "the store's mark of generations is ahead")                                  \
    X(start_opened, "the store is open, none of its users is known")                               \
    X(start_handing, "the keeper has a part of a new pool")                                        \
    X(start_whole, "the keeper has all of a new pool")                                             \
    X(adopt_placed, "the pages of an earlier daemon are in their lists")                           \
    X(adopt_user, "one user of an earlier daemon is reconciled with the store")                    \
    X(adopt_page, "one page of an earlier daemon is freed or held")                                \
    X(start_listening, "all is adopted, nobody is let in")                                         \
    X(stop_stored, "all is stored at the end, the store is not closed")
#define SKV_KEEPER_POINTS(X)                                                                       \
    X(keeper_part, "a part of a pool is held")                                                     \
    X(keeper_unwhole, "the last part is held, the pool does not count as whole")                   \
    X(keeper_pidfd, "a worker's pidfd is held")                                                    \
    X(keeper_reaped, "the daemon is gone, no new one was given anything")                          \
    X(keeper_started, "a new daemon runs, and was given nothing")                                  \
    X(keeper_giving, "a new daemon was given some of the fds")
#define SKV_CLIENT_POINTS(X)                                                                       \
    X(client_unsubmitted, "a command is written into the ring, not published")                     \
    X(client_submitted, "a command is published, the daemon not woken")                            \
    X(client_granted, "an ACQUIRE is answered")                                                    \
    X(client_committed, "a COMMIT is answered")                                                    \
    X(client_welcomed, "a handshake is done, nothing mapped")                                      \
    X(client_attached, "all is mapped, the caller does not know")                                  \
    X(client_opening, "a row's status is set after a loss, its gates are shut")                    \
    X(client_detached, "a lost session has let go of its memory")

enum skv_failpoint {
#define X(name, text) FAIL_##name,
    SKV_DAEMON_POINTS(X) SKV_KEEPER_POINTS(X) SKV_CLIENT_POINTS(X)
#undef X
        SKV_FAILPOINTS
};

/* Absent from what is shipped. */
__attribute__((weak)) void skv_failpoint_reached(enum skv_failpoint point);

static inline void skv_failpoint(enum skv_failpoint point)
{
    if (__builtin_expect(skv_failpoint_reached != 0, 0))
        skv_failpoint_reached(point);
}

#endif
