/* Inside the mover. mover.c: the loop's side, start and stop, the copy thread's turns.
 * mover_onboard.c: onboard jobs from arrival to last event, layers and gates. mover_source.c: finds
 * and verifies stored pages. mover_offload.c: pool to staging. mover_writer.c: the writer thread.
 * Nobody else includes this.
 *
 * Ownership: everything in struct skv_mover is the copy thread's, but for what says otherwise. */
#ifndef SKV_MOVER_INTERNAL_H
#define SKV_MOVER_INTERNAL_H

#include <pthread.h>

#include "direct.h"
#include "mover.h"
#include "queue.h"

#define READERS         8u   /* snapshots, so onboards that read at one time */
#define PREFETCHES      4u   /* of these for jobs without a gate row: a gated one finds one free */
#define STARVE_TURNS    256u /* of others, then a prefetch has one too, under whatever load */
#define READS           32u  /* direct reads in flight: 32 MiB of 1 MiB pages keep a disk busy */
#define TURN_NS         UINT64_C(500000) /* a turn's work; a lookup waits for twice this at most */
#define NAP_NS          UINT64_C(20000)  /* between looks at what is in flight */
#define GROUP_BYTES     (UINT64_C(128) << 10) /* smaller slices share a group of copies */
#define CHUNK_COPIES    1024u                 /* one call: 0.5 ms at 0.5 us a copy */
#define CHUNK_BYTES     (UINT64_C(32) << 20)  /* one call: 0.6 ms at 55 GB/s */
#define TURN_BYTES      CHUNK_BYTES /* a job's turn: at least one layer group, and this much */
#define FLIGHTS         64u         /* marks queued on a stream; the last ones are for gates */
#define LAYER_FLIGHTS   32u /* while there are fewer, and fewer bytes: layer groups. 2.4 ms */
#define LAYER_BYTES     (UINT64_C(128) << 20) /* of copies keep the bus busy from turn to turn */
#define PAGE_FLIGHTS    48u                   /* and for whole pages: more, so that layers, which */
#define PAGE_BYTES      (UINT64_C(192) << 20) /* come faster, do not keep them out */
#define EARLY_PAGES     64u /* found so far: worth a call before the rest is found */
#define STREAM_PAGES    32u /* pages copied whole in one call */
#define OUT_CHUNK_BYTES (UINT64_C(16) << 20) /* one call of an offload: an onboard waits 0.3 ms */
#define OUT_STARVE_NS   UINT64_C(100000000)  /* held back by gated onboards this long, an offload */
#define OUT_ALLOWANCE   (UINT64_C(64) << 20) /* may copy this much: 640 MB/s whatever happens */

/* An onboard job, as the copy thread sees it.
 *
 *   queued --a snapshot is free--> finding --every page found, verified--> layers
 *   layers --all copies queued--> gates --gates open, copies done--> (ONBOARDED)
 *   queued, finding --a bad page--> halted
 *   any --cancel, nothing in flight any more--> (CANCELLED)
 * A job without pages starts in `gates`. */
enum stage { STAGE_QUEUED, STAGE_FINDING, STAGE_LAYERS, STAGE_GATES, STAGE_HALTED };

struct layered {          /* a page to be copied layer by layer */
    const uint8_t *value; /* in the store's map, registered, verified */
    uint32_t page;        /* in the pool */
};

struct onboard {
    struct skv_onboard *job;
    struct onboard *prev, *next; /* live jobs, by id */
    struct skv_reader *reader;   /* its snapshot, while it reads or copies in place */
    enum stage stage;
    bool cancelled;
    bool orphaned; /* a job that it came after was cancelled: its gates stay shut */
    int32_t cancel_status;
    uint32_t found;    /* moves looked at */
    uint32_t reads;    /* slots in reading or verifying */
    uint32_t copies;   /* flights of copies */
    uint32_t openings; /* flights of gates */
    uint32_t groups;   /* layer groups whose copies are all queued */
    uint32_t opened;   /* groups whose gates are queued or open */
    uint32_t at;       /* of pages[], in the group being queued */
    uint32_t page_count;
    uint64_t turn;          /* when its last turn ended; at first: when it came */
    uint64_t turn_bytes;    /* of layers, queued in this turn */
    uint64_t visit;         /* the last one in which it looked for pages */
    struct slot *read_slot; /* read, waiting to be verified */
    struct layered pages[]; /* [move_count] */
};
_Static_assert(sizeof(struct onboard) <= SKV_ONBOARD_STATE_BYTES(0) && sizeof(struct layered) == 16,
               "it fits in the room that comes with a job");

struct slot { /* of onboard staging */
    struct skv_direct_read read;
    struct onboard *onboard;
    struct slot *next; /* free, or of its job: waiting to be verified */
    uint32_t move;     /* of the job */
    uint32_t value_offset;
};

struct flight { /* something queued on the onboard stream */
    uint64_t mark;
    uint64_t bytes; /* 0: gates */
    struct onboard *onboard;
    uint32_t slot_count;
    struct slot *slots[STREAM_PAGES]; /* free when it lands */
};

struct out_flight { /* on the offload stream */
    uint64_t mark;
    uint64_t bytes;
    struct skv_offload *last_of; /* its last copies; or NULL */
};

struct writer {                          /* the writer thread's own */
    struct skv_reader *reader;           /* to find what it put, for the pinner */
    struct skv_offload *offload;         /* begun in an earlier transaction, or in this one */
    uint32_t committed;                  /* moves of it, by earlier transactions */
    struct skv_change *owed, *owed_last; /* changes that failed, oldest first */
};

struct skv_mover {
    struct skv_mover_options options; /* constant */
    uint64_t page_bytes, slice_bytes; /* constant */
    uint32_t group_layers, groups;    /* constant */
    uint8_t *pool;                    /* constant: device address of page 0 */
    const uint8_t *map;               /* the store's: constant from resume to halt */
    uint64_t map_bytes, pool_pages;   /* likewise; constant */
    pthread_t copy_thread, writer_thread;
    bool halted; /* the loop's: there are no threads */

    /* Queues, by producer and consumer. Events of the copy thread come before the writer's. */
    struct skv_queue commands;     /* loop -> copy */
    struct skv_queue writes;       /* copy -> writer: offloads and changes, in order */
    struct skv_queue copy_events;  /* copy -> loop */
    struct skv_queue write_events; /* writer -> loop */
    struct skv_bell copy_bell, write_bell, loop_bell;

    void *staging; /* options.staging_bytes, pinned: for onboard, then for offload */

    /* Offload staging: a ring of slots, taken by the loop and freed by the writer in one order. */
    uint8_t *out_memory;
    uint64_t out_slot_bytes;
    uint32_t out_slots;
    uint64_t out_taken;         /* the loop's */
    _Atomic uint64_t out_freed; /* the writer's */

    _Atomic uint64_t onboard_bytes, onboard_in_place_bytes, offload_bytes, offload_pages,
        store_errors, damaged_pages;

    /* Copy thread. */
    struct skv_stream *stream, *out_stream;
    struct skv_direct *direct;
    struct skv_reader *lookup_reader;
    struct skv_reader *readers[READERS]; /* free ones */
    uint32_t readers_free, prefetches;
    struct onboard *first, *last; /* live jobs, by id */
    uint64_t turns, visits;       /* counted */
    uint64_t awaited;             /* a gated job comes after all jobs up to this one */
    uint32_t gated;               /* live jobs with a gate row */
    uint64_t slot_bytes;
    uint32_t slot_count, reads;
    struct slot *slots, *free_slot;
    struct flight flights[FLIGHTS];
    uint32_t flight_first, flight_count;
    uint64_t flight_bytes;
    struct flight batch;     /* whole pages, being gathered: not queued yet */
    struct skv_copy *copies; /* [CHUNK_COPIES + copies_slack] */
    uint32_t copies_slack;   /* copies that one page may take, split at window borders */
    uint32_t copy_count;     /* of the batch */
    struct skv_queue out;    /* offloads and changes, in order, not forwarded yet */
    uint32_t out_at;         /* moves queued of the first offload in `out` */
    struct out_flight out_flights[FLIGHTS];
    uint32_t out_flight_first, out_flight_count;
    uint64_t out_flight_bytes, out_allowance, out_held_since;
    bool stopping, broken;

    struct writer writer;
};

enum command {
    COMMAND_ONBOARD,
    COMMAND_CANCEL,
    COMMAND_OFFLOAD,
    COMMAND_CHANGE,
    COMMAND_LOOKUP,
    COMMAND_STOP
};

/* mover.c */
void mover_event(struct skv_mover *mover, const struct skv_mover_event *event); /* copy thread */
/* The device failed: says so once, and nothing is queued any more. */
void mover_break(struct skv_mover *mover, const char *what, int status);

/* mover_onboard.c: each returns whether it got anything done. */
void onboard_accept(struct skv_mover *mover, struct skv_onboard *job);
void onboard_cancel(struct skv_mover *mover, uint64_t id, int32_t status);
void onboard_fail(struct skv_mover *mover, struct onboard *onboard, uint32_t move, int status);
bool onboard_land(struct skv_mover *mover);                         /* flights that are done */
bool onboard_layers(struct skv_mover *mover, uint64_t deadline_ns); /* queues layer groups */
bool onboard_gates(struct skv_mover *mover);                        /* queues openings; ends jobs */
void onboard_forget(struct skv_mover *mover, struct onboard *onboard); /* no event */
/* Whose turn it is, of those that `may` have one: jobs that a worker waits for before the others,
 * then the one whose last turn is longest ago. NULL: nobody's. */
struct onboard *onboard_next(const struct skv_mover *mover,
                             bool (*may)(const struct skv_mover *, const struct onboard *));
/* Queues mover->copies[count], and takes `flight` with its mark. */
void flight_start(struct skv_mover *mover, struct flight *flight, uint32_t copy_count);
/* Appends copies of a page's bytes [from, from + bytes) to mover->copies[count]; split at window
 * borders if `value` is in the map. Returns the new count. */
uint32_t copies_add(struct skv_mover *mover, uint32_t count, uint32_t page, const uint8_t *value,
                    uint64_t from, uint64_t bytes);

/* mover_source.c */
int source_open(struct skv_mover *mover, uint8_t *memory, uint64_t bytes);
void source_close(struct skv_mover *mover);
bool source_begin(struct skv_mover *mover);                      /* gives queued jobs a snapshot */
bool source_find(struct skv_mover *mover, uint64_t deadline_ns); /* and verifies */
void source_flush(struct skv_mover *mover);                      /* queues the gathered pages */
void source_free(struct skv_mover *mover, struct slot *slot);
void source_end(struct skv_mover *mover, struct onboard *onboard); /* the snapshot */

/* mover_offload.c */
bool offload_land(struct skv_mover *mover);
bool offload_copy(struct skv_mover *mover);
uint64_t offload_patience_ns(const struct skv_mover *mover); /* until a held one may go anyway */

/* mover_writer.c: the thread */
void *writer_run(void *mover);

/* The staging slot of an offload's move: the ring's slots from job->state on. */
static inline uint8_t *out_slot(const struct skv_mover *mover, const struct skv_offload *job,
                                uint32_t move)
{
    uint64_t first = (uint64_t)((uint8_t *)job->state - mover->out_memory) / mover->out_slot_bytes;
    return mover->out_memory + (first + move) % mover->out_slots * mover->out_slot_bytes;
}

#endif
