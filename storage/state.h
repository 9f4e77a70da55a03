/* The store's own small file, sidekv.store: whose directory this is, which geometry, and whether
 * data.mdb may be trusted. It lies beside LMDB, not in it, because after a power loss under
 * `process` the tree must not even be opened. It is also the lock: flock'ed for the store's life,
 * so that a second daemon is refused.
 *
 * Format: two slots of 512 bytes of readable text, each with a sequence number and a checksum;
 * writes go to the older slot and are synced, so that a cut anywhere leaves the other one. Written
 * in place: a full disk does not keep a daemon from starting. */
#ifndef SKV_STATE_H
#define SKV_STATE_H

#include "store.h"

struct skv_state {
    int fd; /* sidekv.store, locked; -1: none */
    uint64_t sequence;
    struct skv_geometry geometry;
    enum skv_durability durability; /* the weakest under which data.mdb was written since it was
                                       last synced whole */
    char boot[40];                  /* boot id of the machine when this was written */
    bool clean;                     /* closed in good order since then */
    bool damaged;                   /* LMDB met a damaged tree: start cold */
    uint64_t cold_starts;           /* since the store was made */
};

/* Opens and locks the state of the store in directory `path`, making both if they are missing.
 * *fresh: there was none, or none of its slots is whole; only fd is set then. Follow with
 * skv_state_close(). SKV_ECORRUPT: not a store, nothing was touched; SKV_EBUSY: another daemon has
 * it; SKV_EPERM, SKV_ENOENT (the parent), SKV_ENOSPC, SKV_EIO. All but SKV_EBUSY are logged. */
int skv_state_open(const char *path, struct skv_state *state, bool *fresh);
/* Writes the state and syncs it. SKV_EIO, SKV_ENOSPC (logged). */
int skv_state_write(struct skv_state *state);
void skv_state_close(struct skv_state *state); /* unlocks; writes nothing */

/* The machine's boot id, or "unknown", which equals no other. */
void skv_boot_id(char boot[40]);

/* Has the directory's entries on disk. SKV_EIO, SKV_ENOMEM, ... (logged). */
int skv_sync_directory(const char *path);

/* The status of an errno, not logged. */
int skv_errno_status(int error);

#endif
