/* The ABI between daemon and clients: handshake messages, the session's shared memory, commands.
 * Not installed.
 *
 * Handshake, on a UNIX SOCK_SEQPACKET socket:
 *   client -> daemon   struct wire_hello, with fds {pidfd, gate memfd}, an admin's {pidfd}. The
 *                      gate memfd is sealed F_SEAL_SHRINK | F_SEAL_GROW and exactly
 *                      rows * gate_stride bytes, rounded up to 4096.
 *   daemon -> client   struct wire_welcome. Status 0: with fds {session memfd, SQ eventfd,
 *                      CQ bell: a stream socket, 8 bytes a ring}; else the reason in words, and the
 *                      daemon closes.
 *   daemon -> client   worker and fd export only: struct wire_extents, as many as it takes, with
 *                      up to WIRE_FDS_PER_MESSAGE fds each.
 * After that the socket means "alive". The daemon sends at most one more message, struct
 * wire_goodbye, when it ends the session.
 *
 * Session memory (one memfd, made and sealed by the daemon): struct wire_ring at 0, struct
 * wire_views, then SQ entries, CQ entries, scratch, and one arena slot a gate row. All offsets are
 * in the welcome's constants below; the layout depends on `rows` only.
 *
 * Versions: raised with whatever one side would take wrongly from the other's earlier release;
 * magic, version, status and text keep their places, so that each can say so. Of the descriptor
 * table there is another one, WIRE_TABLE_VERSION: a pool outlives a change of the rest. Since 2 a
 * grant's tail may be one to be replaced, and the descriptor table goes to no client.
 *
 * All fields little-endian, fixed width; reserved ones are zero and checked. What a client writes
 * is told, not promised: the daemon copies an entry once, validates the copy, and ends the session
 * with SKV_EPROTO and a reason when a field is out of range. */
#ifndef SKV_WIRE_H
#define SKV_WIRE_H

#include "sidekv.h"

#define WIRE_MAGIC           0x764b5331u /* "1SKv" */
#define WIRE_VERSION         3u
#define WIRE_HELLO_FDS       2u /* of a worker; an admin has the first alone */
#define WIRE_WELCOME_FDS     3u
#define WIRE_FDS_PER_MESSAGE 200u /* the kernel's limit is 253 */
#define WIRE_MAX_EXTENTS     8192u

enum wire_kind { WIRE_WORKER = 1, WIRE_ADMIN = 2 };

struct wire_hello {
    uint32_t magic;
    uint16_t version;
    uint16_t kind;                /* enum wire_kind */
    struct skv_geometry geometry; /* worker: must equal the daemon's; admin: zero */
    struct skv_id model;          /* worker: its fingerprint, not zero; admin: zero */
    uint32_t rows;                /* worker: gate rows, 1 to SKV_MAX_ROWS; admin: 0 */
    uint32_t gate_stride;         /* bytes from row to row: wire_gate_stride(layers); admin: 0 */
    /* Id of the session that this one replaces, or 0: it has hung up, its process is ours, its
     * streams have drained, and its gate rows are the ones sent here. The daemon ends it, should it
     * not have seen the hang-up yet, and answers SKV_EAGAIN while copies of its batches are in
     * flight: they would open gates of the new session's. An unknown id is ignored. */
    uint64_t drained;
    uint64_t reserved[9];
};
_Static_assert(sizeof(struct wire_hello) == 128, "hello is 128 bytes");

struct wire_welcome {
    uint32_t magic;
    uint16_t version;
    uint16_t reserved0;
    int32_t status; /* 0, or why not; then only `text` counts */
    uint32_t daemon_pid;
    char text[128]; /* the reason, in words */
    struct skv_geometry geometry;
    uint64_t session; /* id, never 0, never used twice: not by the next daemon either, whom a
                         client tells in `drained` */
    uint64_t pool_pages;
    uint64_t pool_bytes;
    uint64_t extent_bytes; /* 0 with IPC */
    uint32_t extents;      /* fds that follow in wire_extents messages; 0 with IPC */
    uint32_t export;       /* enum skv_export of device.h */
    uint32_t device_kind;  /* enum skv_device_kind */
    uint32_t mps;
    uint8_t uuid[16];
    char device[64];
    uint8_t ipc[64];
    uint64_t session_bytes;
    uint64_t pool_id; /* a keeper holds the pool: random, the same as long as the pool lives; 0: it
                         ends with the daemon */
    uint32_t
        protect; /* 1: map the pool read-only, and views of the extents in wire_views; fds only */
    uint32_t reserved1;
    uint64_t reserved[7];
};
_Static_assert(sizeof(struct wire_welcome) == 432, "welcome has no holes");

struct wire_extents {
    uint32_t magic;
    uint32_t first; /* index of the first fd in this message */
    uint32_t count;
    uint32_t reserved;
};

struct wire_goodbye {
    uint32_t magic;
    int32_t status; /* why the daemon ends the session; SKV_EAGAIN: a new daemon comes at once */
    char text[120];
};

/* ---- session memory ---- */

#define WIRE_ENTRIES     64u  /* of the SQ; a power of two */
#define WIRE_CQ_ENTRIES  128u /* the daemon takes no entry that it has no room to answer */
#define WIRE_NEED_WAKEUP 1u

/* One cache line a writer. Heads and tails run freely; index = value & (entries - 1). */
struct wire_ring {
    _Alignas(
        64) uint32_t sq_tail; /* client: entries published (release); daemon reads with acquire */
    _Alignas(64)
        uint32_t sq_head; /* daemon: entries taken (release): the client may reuse their slots */
    uint32_t sq_flags;    /* daemon: WIRE_NEED_WAKEUP: ring the SQ eventfd after publishing */
    _Alignas(64) uint32_t cq_tail; /* daemon: completions published (release) */
    _Alignas(64) uint32_t cq_head; /* client: completions taken (release) */
    uint32_t cq_flags;             /* client: WIRE_NEED_WAKEUP: ring the CQ bell after publishing */
    uint32_t viewed; /* client: the list of views that it has applied; or, hanging up, */
#define WIRE_NO_VIEWS UINT32_MAX /* that it has none mapped */
};
_Static_assert(sizeof(struct wire_ring) == 256, "four cache lines");

/* Of a protected pool: the extents that the session may write to. Daemon: `begun`, the bits, then
 * `sequence`; a client that finds both the same, before and after, has read one list. A list that
 * names an extent no more is written when no lease of the session's writes to it; the daemon gives
 * the extent to others once `viewed` says that the list was applied, or the process is gone. */
struct wire_views {
    _Alignas(64) uint32_t begun;
    uint32_t sequence;
    uint64_t extents[WIRE_MAX_EXTENTS / 64];
};

enum wire_opcode {
    /* Anyone. Completes with status 0. */
    WIRE_NOP = 0,
    /* Anyone. {model, user}; the completion's values are
     * generation, committed | resident << 32, stored | leases << 32, last use in seconds, model.
     * SKV_ENOENT. */
    WIRE_LOOKUP,
    /* Worker. `count` requests in the row's arena; the row must be free (SKV_EBUSY). Fills grants
     * and pages; value[0]: 1 when gated. A batch without a lease (every grant's status is an error)
     * does not own the row: nothing follows it. */
    WIRE_ACQUIRE,
    /* Worker. `count` leases in the row's arena; ends them, commits what ACQUIRE asked for; fills
     * results. A lease that is not the session's own, or of another row, is SKV_ESTALE in its
     * result. Completes once the daemon has no copy of the batch in flight; the row is free when
     * all its leases have ended. */
    WIRE_COMMIT,
    /* Worker. As COMMIT, but nothing counts. */
    WIRE_RELEASE,
    /* Worker. `count` requests in a free row's arena, as ACQUIRE without leases; completes at once.
     */
    WIRE_PREFETCH,
    /* Anyone; admin may name a model, or 0 for all. {model, user}, argument: tokens to keep,
     * rounded down to a whole page. Leases on the user live on, their COMMIT is SKV_ESTALE.
     * Completes after the store's transaction. value[0]: tokens kept. SKV_ENOENT. */
    WIRE_TRUNCATE,
    /* As TRUNCATE. Pool pages only, after storing them. SKV_EBUSY when leased. */
    WIRE_EVICT,
    /* As TRUNCATE to 0: the user is gone everywhere. */
    WIRE_FORGET,
    /* Anyone. Completes when everything committed before it is stored, or with SKV_ENOSPC,
       SKV_EIO or SKV_ENOMEM while it cannot be. */
    WIRE_FLUSH,
    /* Anyone. argument: cursor, count: at most WIRE_LIST_USERS. Fills struct skv_user_info[] in
     * scratch; completion's count says how many, value[0] is the next cursor, 0 at the end. A
     * worker sees its model, an admin all. */
    WIRE_LIST,
    /* Anyone. Fills struct skv_stats in scratch; completion's count says how many u64 it has. */
    WIRE_STATS,
    /* Admin. Completes when accepted; the daemon then ends, and its keeper starts the binary anew.
     * SKV_ENOTSUP: no keeper. */
    WIRE_RESTART,
    /* Worker. Its process is an MPS client: said once, after the welcome, where it is so. */
    WIRE_UNDER_MPS,
    WIRE_OPCODES
};

struct wire_sqe {
    uint8_t opcode;
    uint8_t reserved0;
    uint16_t row;
    uint32_t count;
    uint64_t user_data;
    struct skv_id model; /* zero: the session's own; for an admin: all */
    struct skv_id user;
    uint64_t argument;
    uint64_t reserved;
};
_Static_assert(sizeof(struct wire_sqe) == 64, "an entry is a cache line");

struct wire_cqe {
    uint64_t user_data;
    int32_t status;
    uint32_t count;
    uint64_t value[6];
};
_Static_assert(sizeof(struct wire_cqe) == 64, "an entry is a cache line");

enum wire_request_flags {
    WIRE_READ = SKV_REQUEST_READ,
    WIRE_NO_ONBOARD = SKV_REQUEST_NO_ONBOARD,
    /* The library saw a tail whose hash differs from its own tokens' and echoes it in tail_hash;
     * max_cached is the tail's start. If the user's tail still has that hash, the mismatch is
     * proven and the user is cut there. */
    WIRE_TAIL_DIFFERS = 1u << 2,
    WIRE_REQUEST_FLAGS = (1u << 3) - 1,
};

struct wire_request {
    struct skv_id user;
    uint32_t history;
    uint32_t max_cached;
    uint32_t flags;       /* enum wire_request_flags */
    uint32_t hash_offset; /* of the first of ceil(history / S) hashes in the slot's hashes[] */
    uint64_t tail_hash;   /* with WIRE_TAIL_DIFFERS */
    uint64_t reserved[3];
};
_Static_assert(sizeof(struct wire_request) == 64, "a cache line");

struct wire_grant {
    int32_t status;
    uint32_t flags; /* enum skv_grant_flags */
    uint32_t cached;
    uint32_t gpu_tokens;
    uint32_t page_offset; /* of the first of page_count ids in the slot's pages[] */
    uint32_t page_count;
    uint64_t lease;
    uint64_t tail_hash;  /* chain hash at the tail's end, for the library to check */
    uint32_t tail_valid; /* tokens of the half-filled tail page, which `cached` counts, or ends
                            before: then a fresh page replaces it; 0: nothing to check */
    uint32_t reserved0;
    uint64_t reserved[2];
};
_Static_assert(sizeof(struct wire_grant) == 64, "a cache line");

struct wire_committed {
    int32_t status;
    uint32_t committed;
    uint32_t stored;
    uint32_t reserved;
};
_Static_assert(sizeof(struct wire_committed) == sizeof(struct skv_committed) + 4, "16 bytes");

#define WIRE_SLOT_PAGES (SKV_MAX_BATCH * SKV_MAX_USER_PAGES)

/* The arena of one gate row. Requests, hashes and leases are the client's to write; grants, pages
 * and results the daemon's. Between ACQUIRE's submission and its completion, and between COMMIT's
 * and its, the client leaves the slot alone. */
struct wire_slot {
    struct wire_request requests[SKV_MAX_BATCH];
    struct wire_grant grants[SKV_MAX_BATCH];
    uint64_t leases[SKV_MAX_BATCH];
    struct wire_committed results[SKV_MAX_BATCH];
    uint64_t reserved[320]; /* to a whole page */
    uint64_t hashes[WIRE_SLOT_PAGES];
    uint32_t pages[WIRE_SLOT_PAGES];
};
_Static_assert(sizeof(struct wire_slot) % 4096 == 0, "whole pages");

#define WIRE_SCRATCH_BYTES 65536u
#define WIRE_LIST_USERS    (WIRE_SCRATCH_BYTES / sizeof(struct skv_user_info))
_Static_assert(sizeof(struct skv_user_info) == 64, "a cache line");
_Static_assert(sizeof(struct skv_stats) <= WIRE_SCRATCH_BYTES, "STATS fits the scratch");

#define WIRE_VIEWS_OFFSET   sizeof(struct wire_ring)
#define WIRE_SQ_OFFSET      4096u
#define WIRE_CQ_OFFSET      (WIRE_SQ_OFFSET + WIRE_ENTRIES * sizeof(struct wire_sqe))
#define WIRE_SCRATCH_OFFSET (WIRE_CQ_OFFSET + WIRE_CQ_ENTRIES * sizeof(struct wire_cqe))
#define WIRE_SLOTS_OFFSET   (WIRE_SCRATCH_OFFSET + WIRE_SCRATCH_BYTES)
_Static_assert(WIRE_VIEWS_OFFSET + sizeof(struct wire_views) <= WIRE_SQ_OFFSET, "before the SQ");
_Static_assert(WIRE_SLOTS_OFFSET % 4096 == 0, "slots begin on a page");

static inline uint64_t wire_session_bytes(uint32_t rows)
{
    return WIRE_SLOTS_OFFSET + (uint64_t)rows * sizeof(struct wire_slot);
}

/* A gate row: `layers` words and a status word, padded to 64 bytes. */
static inline uint32_t wire_gate_stride(uint32_t layers)
{
    return (4 * (layers + 1) + 63) / 64 * 64;
}

static inline uint64_t wire_gate_bytes(uint32_t layers, uint32_t rows)
{
    return ((uint64_t)rows * wire_gate_stride(layers) + 4095) / 4096 * 4096;
}

/* ---- the descriptor table: who owns which page; written by the daemon alone, read by the next one
 * after a hot restart. Clients never get it ---- */

enum wire_page_flags {
    WIRE_PAGE_USED = 1u << 0,
    WIRE_PAGE_VALID = 1u << 1,     /* committed: part of its user's history */
    WIRE_PAGE_LOADING = 1u << 2,   /* an onboard writes it */
    WIRE_PAGE_APPENDING = 1u << 3, /* a session may write it, past `valid` */
};

struct wire_descriptor {
    struct skv_id model, user;
    uint32_t index; /* page of the user */
    uint32_t valid; /* committed tokens in it */
    uint64_t hash;  /* chain hash after them */
    uint64_t generation;
    uint16_t flags;   /* enum wire_page_flags */
    uint16_t session; /* slot of the appending session */
    uint32_t check;   /* low 32 bits of the XXH3_64 of all before */
};
_Static_assert(sizeof(struct wire_descriptor) == 64, "a cache line");

/* Two slots a page: the older one is written, then the sequence, so that a process killed between
 * any two stores leaves slot[sequence & 1] whole. Sequence 0: never used. A reader that finds it
 * wrong (it raced with the writer, or the memory is damaged) does not fall back to the other one:
 * that may tell of an earlier owner. */
struct wire_page_entry {
    struct wire_descriptor slot[2];
    uint64_t sequence; /* slot[sequence & 1] is the newer one */
    uint64_t reserved[7];
};

#define WIRE_TABLE_VERSION 1u

struct wire_table {
    uint32_t magic;
    uint32_t version; /* WIRE_TABLE_VERSION */
    struct skv_geometry geometry;
    uint64_t pages;
    uint64_t generation; /* high-water mark */
    uint64_t pool_id;    /* of the pool that it describes, random */
    uint64_t protect;    /* 1: workers write only through views, of extents whose bit is set in */
    uint64_t viewed[WIRE_MAX_EXTENTS / 64];
    uint64_t reserved[377];
    struct wire_page_entry entries[];
};
_Static_assert(sizeof(struct wire_table) == 4096, "entries begin on a page");

#endif
