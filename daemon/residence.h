/* Pages and who holds them. A *residence* is the pages that one user has in the pool, in order,
 * each with its chain hash.
 *
 * While a residence is leased or copied from or to, its list only grows at the end. Any other
 * change (a cut, a swapped tail, a failed load) makes a new residence that shares the surviving
 * pages, and detaches the old one, which lives until its last lease and copy end. A page is free
 * again when no residence and no lease holds it. So a lease is one count on a residence, however
 * long the history.
 *
 * Pages lie in *extents*, all of one length, each with one owner: who may take free pages of it.
 * Without protection there is one extent, of all pages, and it is common.
 *
 * All memory is reserved at start. One thread: the loop. */
#ifndef SKV_RESIDENCE_H
#define SKV_RESIDENCE_H

#include "records.h"

struct skv_offload;

struct residence {
    uint64_t *hash; /* [room] chain hash after the committed tokens of each page */
    uint32_t *page; /* [room] ids; behind the hashes in one array of its class */
    uint8_t room_class;
    bool queued;                 /* in the dirty or the tail queue */
    bool in_tails;               /* that queue is the tail queue */
    bool urgent;                 /* its tail goes to the store too, soon */
    bool trimmed;                /* adopted, and pages behind it were not: it is to be renumbered */
    uint32_t record;             /* the user, or SKV_NONE: detached */
    uint32_t pages;              /* in the list */
    uint32_t ready;              /* of these, not being loaded */
    uint32_t tokens;             /* committed, loading ones included */
    uint32_t leases;             /* that hold it */
    uint32_t copies;             /* mover jobs that touch its pages */
    uint32_t loads;              /* of these, onboards that are still to fill some */
    uint32_t appender;           /* the lease that may append, or SKV_NONE */
    uint32_t tail_writers;       /* leases that may write into its half-filled last page */
    uint64_t load_job;           /* the last onboard that loads it, or 0: none does */
    struct skv_offload *offload; /* the one in flight, or NULL */
    uint64_t dirty_epoch;        /* flush epoch of its oldest unstored commit */
    uint64_t committed_ms;       /* time of the last append */
    uint32_t newer, older;       /* LRU; `older` also links free ones */
    uint32_t before, behind;     /* dirty or tail queue */
};

struct page {
    uint64_t generation; /* its user's, when it was filled */
    uint32_t refs;       /* residences and leases that hold it; 0: free */
    uint32_t next_free;  /* in its extent */
    uint32_t residence;  /* the one with a user that has it, or SKV_NONE; with protection only */
    uint16_t extent;
    bool limbo; /* held once more: a worker of an earlier daemon may still touch it */
};

#define SKV_MAX_SESSIONS 128u /* 64 workers, some of them fenced, and a few more */

/* Owners of extents: a session's slot, or
 *   FREE --append--> a session --share is smaller, or session ended--> HELD --view gone--> COMMON
 *   FREE --onboard--> COMMON --no page in use--> FREE */
enum {
    EXTENT_COMMON = SKV_MAX_SESSIONS, /* onboards take its pages; nobody appends */
    EXTENT_FREE,                      /* no page in use */
    EXTENT_HELD,                      /* a worker may still have its view: nobody takes its pages */
    EXTENT_OWNERS,
};

struct extent {
    uint32_t pages, free, first_free;
    uint32_t writing;        /* of its pages, those that open append leases may write to */
    uint32_t before, behind; /* in its owner's list, while any page is free */
    uint32_t asked;          /* held: the session's list of extents that names it no more */
    uint16_t owner;
    uint16_t lender; /* held: the session, or EXTENT_HELD: one of an earlier daemon */
};

struct owner {
    uint32_t first; /* of its extents with free pages */
    uint32_t extents, free_pages;
};

struct backlog { /* of residences, by `before` and `behind` */
    uint32_t first, last, count;
};

struct residences {
    struct page *page; /* [pages] */
    uint32_t pages, free_pages;
    struct extent *extent; /* [extents] */
    uint32_t extents, extent_pages;
    bool protect;
    struct owner owners[EXTENT_OWNERS];
    struct residence *all; /* [capacity] */
    uint32_t capacity, used, first_free_residence, count;
    struct {
        uint8_t *memory;
        uint32_t capacity, used, first_free;
    } arrays[9]; /* of 8 << class entries */
    uint32_t newest, oldest;
};

/* `extent_pages`: 0 without protection. `holders`: leases and copies that may keep detached
 * residences alive at one time. SKV_ENOMEM. */
int skv_residences_init(struct residences *rs, uint32_t pages, uint32_t extent_pages,
                        uint32_t holders);
void skv_residences_fini(struct residences *rs);

/* A free page of an owner's extents, held once by the caller; SKV_NONE when there is none. */
uint32_t skv_page_take(struct residences *rs, uint32_t owner, uint64_t generation);
/* Lets go; true when that freed it. The last one of a common extent makes that free. */
bool skv_page_drop(struct residences *rs, uint32_t page);

/* Makes all extents and their free lists anew from what is held; limbo pages are. For the start. */
void skv_pages_relink(struct residences *rs);
void skv_extent_give(struct residences *rs, uint32_t extent, uint32_t owner);

/* An empty residence for a user, newest in the LRU. SKV_NONE when there is no room. */
uint32_t skv_residence_add(struct residences *rs, uint32_t record);
/* Room for `pages` in its list. false: no room. */
bool skv_residence_reserve(struct residences *rs, uint32_t index, uint32_t pages);
/* Appends a page that the caller holds (the hold passes on). Room must be reserved. */
void skv_residence_push(struct residences *rs, uint32_t index, uint32_t page, uint64_t hash);
void skv_residence_touch(struct residences *rs, uint32_t index);
/* Takes it out of the LRU; it has no user from then on. */
void skv_residence_detach(struct residences *rs, uint32_t index);
/* Gives the struct and its array back; its list must be empty. */
void skv_residence_remove(struct residences *rs, uint32_t index);

void skv_backlog_push(struct residences *rs, struct backlog *queue, uint32_t index);
void skv_backlog_remove(struct residences *rs, struct backlog *queue, uint32_t index);

#endif
