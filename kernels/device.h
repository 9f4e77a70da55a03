/* One compute device as the cache sees it: a pool of pages that other processes can map, copies,
 * gates. Two backends, chosen by name in one table: cuda (driver API through dlopen, primary
 * context) and host (shared memory and a copy thread a stream). The host backend is as strict as
 * CUDA: it refuses what CUDA refuses (an import in the exporting process, copies from unregistered
 * memory, a copy across two registrations), and a copy takes effect only when the stream reaches
 * it.
 *
 * The daemon uses nothing else of a GPU: copy engines and stream memory operations only, never a
 * kernel, memset or D2D copy. Thread safety: a device may be used by several threads; a stream by
 * one at a time. A call on a CUDA device leaves its primary context current in the calling thread.
 * After fork() a child may only close, which then touches nothing of the parent's. */
#ifndef SKV_DEVICE_H
#define SKV_DEVICE_H

#include "sidekv.h"

struct skv_device;
struct skv_pool;
struct skv_stream;

enum skv_device_kind { SKV_DEVICE_HOST = 0, SKV_DEVICE_CUDA = 1 };
enum skv_export { SKV_EXPORT_FD = 0, SKV_EXPORT_IPC = 1 };

/* What running under MPS means, for whoever finds out. */
#define SKV_MPS_RISK                                                                               \
    "a fault of one of its clients is everyone's, and no guarantee of sidekv holds for them; "     \
    "stop the MPS control daemon to have them back"

struct skv_device_info {
    enum skv_device_kind kind;
    int ordinal;          /* CUDA device number; 0 on the host */
    char name[64];        /* "host", or the GPU's name */
    uint8_t uuid[16];     /* the GPU's; on the host derived from the boot id */
    uint64_t total_bytes; /* device memory */
    bool mps;             /* an MPS client */
};

/* `name`: "auto", "host", "cuda" or "cuda:N". auto takes the first GPU, or the host, and logs which
 * and why. "cuda" without a driver is SKV_ENODEVICE, with the reason logged. */
int skv_device_open(const char *name, struct skv_device **out);
/* The device that the daemon named: by kind and UUID. SKV_ENODEVICE when this process cannot see
 * it. */
int skv_device_open_uuid(enum skv_device_kind kind, const uint8_t uuid[16],
                         struct skv_device **out);
/* Close its pools and streams first. Memory still allocated or registered is given back. */
void skv_device_close(struct skv_device *device);
const struct skv_device_info *skv_device_info(const struct skv_device *device);
/* Device memory that is free now, in bytes. */
uint64_t skv_device_free_bytes(struct skv_device *device);

/* ---- the pool ---- */

/* How a pool travels: POSIX fds of equal extents, mapped back to back, or one CUDA IPC handle. */
struct skv_pool_handles {
    enum skv_export export;
    uint64_t extent_bytes; /* a multiple of page_bytes; 0 with IPC */
    uint64_t pool_bytes;   /* extents * extent_bytes, or the IPC allocation */
    uint32_t extents;      /* fds in the array; 0 with IPC */
    int *fds;              /* [extents]; owned as the function says */
    uint8_t ipc[64];       /* cudaIpcMemHandle_t */
    bool read_only;        /* importing: mapped so, written through views; fds only */
};

/* Takes at least `bytes`, rounded up to whole extents (64 MiB, rounded up to a multiple of
 * lcm(page_bytes, 2 MiB)); small pools get one smaller extent. SKV_ENOMEM (logged with what was
 * free), SKV_EDEVICE. */
int skv_pool_create(struct skv_device *device, uint64_t bytes, uint64_t page_bytes,
                    enum skv_export export, struct skv_pool **out);
/* The same behind fds, in `extents` extents or more, as far as they can be that small. */
int skv_pool_create_split(struct skv_device *device, uint64_t bytes, uint64_t page_bytes,
                          uint32_t extents, struct skv_pool **out);
/* Imports a pool at an address range reserved for it. The fds stay the caller's (close them
 * afterwards). Importing in the process that created it is SKV_EINVAL. */
int skv_pool_import(struct skv_device *device, const struct skv_pool_handles *handles,
                    uint64_t page_bytes, struct skv_pool **out);
/* The same for a pool whose creator is gone, in the process that succeeds it: the fds, and the
 * array, become the pool's, which can be exported as if it had been created here. With fds only. */
int skv_pool_adopt(struct skv_device *device, const struct skv_pool_handles *handles,
                   uint64_t page_bytes, struct skv_pool **out);
/* Lets the mapping go, keeps the address range. No work on it may be in flight. */
void skv_pool_unmap(struct skv_pool *pool);
/* Maps another pool at the same address. SKV_ENOTSUP when it cannot have that address (IPC, or a
 * larger pool). */
int skv_pool_remap(struct skv_pool *pool, const struct skv_pool_handles *handles);
void skv_pool_close(struct skv_pool *pool);
void *skv_pool_address(const struct skv_pool *pool); /* of page 0, on the device */
/* A pool that was imported read-only has a second address range of the same layout, where nothing
 * is mapped but the extents in view: those can be written there. On: maps one; off: unmaps it, when
 * no work on it is in flight. Nothing to do is fine. That keeps accidents from the rest of the
 * pool, not malice: read-only is the importer's own choice. SKV_EINVAL: not imported read-only, or
 * no such extent. */
int skv_pool_view(struct skv_pool *pool, uint32_t extent, bool on);
/* Where to write: the address of page 0 in that range; of a pool without one its address. */
void *skv_pool_write_address(const struct skv_pool *pool);
/* The pool's handles; a created one's fds are owned by the pool, an imported one has none. */
const struct skv_pool_handles *skv_pool_exported(const struct skv_pool *pool);

/* Private device memory, for a worker's own use (verification, tests). */
int skv_device_alloc(struct skv_device *device, uint64_t bytes, void **out);
void skv_device_free(struct skv_device *device, void *memory);

/* ---- host memory that the device may touch ---- */

int skv_pinned_alloc(struct skv_device *device, uint64_t bytes, void **out);
void skv_pinned_free(struct skv_device *device, void *memory);
/* Registers memory that is already mapped. read_only: the device only reads it (a store's map).
 * Whole 4 KiB pages, address and length. While this runs, copies of the process may stall (CUDA
 * faults holes in): milliseconds for small windows. SKV_ENOTSUP, SKV_ENOMEM (locked-memory limit),
 * SKV_EINVAL (overlap, not mapped so). */
int skv_host_register(struct skv_device *device, void *memory, uint64_t bytes, bool read_only);
int skv_host_unregister(struct skv_device *device, void *memory);

/* ---- streams ---- */

struct skv_copy {
    void *dst;
    const void *src;
    uint64_t bytes;
};

int skv_stream_open(struct skv_device *device, struct skv_stream **out);
void skv_stream_close(struct skv_stream *stream); /* waits for what is queued */

/* Queues `count` copies, host to pool or pool to host, all of one direction, in no order among
 * themselves, after everything queued before. Host memory must be pinned or registered, one copy
 * within one registration. SKV_EINVAL, SKV_EDEVICE. */
enum skv_direction { SKV_TO_DEVICE, SKV_TO_HOST };
int skv_stream_copy(struct skv_stream *stream, enum skv_direction direction,
                    const struct skv_copy *copies, uint32_t count);
/* Queues a 32-bit store to registered host memory, after everything queued before: opens a gate.
 * Wakes host waiters. */
int skv_stream_write32(struct skv_stream *stream, uint32_t *word, uint32_t value);
/* A mark after everything queued before; ask for it later. Marks of a stream only grow. */
int skv_stream_mark(struct skv_stream *stream, uint64_t *mark);
/* 0: reached; SKV_EAGAIN: not yet; SKV_EDEVICE: the device failed. */
int skv_stream_query(struct skv_stream *stream, uint64_t mark);
int skv_stream_wait(struct skv_stream *stream, uint64_t mark,
                    uint32_t timeout_ms); /* SKV_ETIMEDOUT */

/* ---- gates, on the host ---- */

/* A plain store that opens a gate (any thread, no CUDA), and the host backend's wait for one: until
 * *word >= 1, by futex. SKV_ETIMEDOUT. */
void skv_gate_store(uint32_t *word, uint32_t value);
int skv_gate_wait(uint32_t *word, uint32_t timeout_ms);

/* Raises the soft limit of open files so that `more` descriptors fit besides what a process usually
 * has: before creating a pool (done inside) and before receiving one. SKV_ENOSPC: the hard limit
 * is too low, logged. */
int skv_fd_limit_raise(uint32_t more);

/* Host backend, for tests: every later copy and write of this device's streams is held back this
 * long. No-op on CUDA. */
void skv_device_delay(struct skv_device *device, uint64_t delay_us);

#endif
