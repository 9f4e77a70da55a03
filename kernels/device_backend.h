/* Inside libskv-device: what a backend implements, and what device.c and its neighbours do for all
 * of them. Nobody outside kernels/device*.c includes this.
 *
 * The front (device.c, device_pool.c, device_memory.c, device_stream.c) checks every argument,
 * knows which memory belongs to whom, and so refuses the same things on every backend: unregistered
 * memory, a copy across two registrations, a copy that leaves its pool, an import in the exporting
 * process. A backend only does: it may rely on what was checked.
 *
 * After fork() a child may close, nothing else: the front then frees what is its own and does not
 * call the backend, since neither a CUDA context nor a stream's thread crosses a fork. */
#ifndef SKV_DEVICE_BACKEND_H
#define SKV_DEVICE_BACKEND_H

#include "device.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/types.h>

#define SKV_GRANULARITY  (UINT64_C(2) << 20)  /* of device memory mappings, on every backend */
#define SKV_EXTENT_BYTES (UINT64_C(64) << 20) /* fewer fds than granules, little to round off */
#define SKV_HOST_PAGE    UINT64_C(4096)

/* Memory that may take part in copies; sorted by start, never overlapping. */
struct skv_region {
    uintptr_t start, end; /* as the host, or for device memory the device, addresses it */
    uintptr_t device;     /* the device's address of start */
    bool read_only;       /* the device may only read it */
    bool owned;           /* pinned_alloc or device_alloc: given back by skv_device_close */
    bool ready;           /* false while the backend registers or unregisters it */
};

struct skv_regions {
    struct skv_region *items; /* [count of capacity], by start */
    uint32_t count, capacity;
};

struct skv_device {
    const struct skv_backend *backend;
    struct skv_device_info info;
    pid_t pid;                        /* who opened it */
    pthread_rwlock_t lock;            /* the two tables; never held across a backend's call */
    struct skv_regions device_memory; /* mapped pools and skv_device_alloc */
    struct skv_regions host_memory;   /* pinned and registered */
    atomic_int children;              /* pools and streams not closed yet */
};

struct skv_pool {
    struct skv_device *device;
    struct skv_pool_handles handles; /* fds: a created pool's own; NULL in an imported one */
    uint64_t page_bytes;
    uint64_t reserved_bytes; /* of the address range; 0 with IPC */
    void *address;
    void *views;       /* a range of the same length, or NULL; used while handles.read_only */
    uint64_t *extents; /* [handles.extents] what a view is made of; NULL: not mapped read-only */
    bool *viewed;      /* [handles.extents] */
    bool created;      /* here; else imported */
    bool mapped;
    pid_t pid;
    struct skv_pool *next; /* created pools of this process */
};

struct skv_stream {
    struct skv_device *device;
    pid_t pid;
};

/* How to find a device, and why it could not be had. */
struct skv_device_query {
    const uint8_t *uuid; /* [16] wins over ordinal; NULL: not given */
    int ordinal;
    char reason[256]; /* out, on failure; the caller logs it */
};

/* Errors are skv_status; a backend logs the original text where it translates it. */
struct skv_backend {
    const char *name;
    int (*open)(struct skv_device_query *query, struct skv_device **out); /* not logged: reason */
    void (*close)(struct skv_device *device);

    /* An address range; extents mapped into it back to back, made accessible in one go. */
    int (*reserve)(struct skv_device *device, uint64_t bytes, void **address);
    void (*unreserve)(struct skv_device *device, void *address, uint64_t bytes);
    int (*extent_create)(struct skv_device *device, void *address, uint64_t bytes, int *fd);
    /* `kept`: NULL, or receives what view_map() takes until extent_release(); then read-only. */
    int (*extent_import)(struct skv_device *device, void *address, uint64_t bytes, int fd,
                         uint64_t *kept);
    void (*extent_release)(struct skv_device *device, uint64_t kept);
    int (*view_map)(struct skv_device *device, void *address, uint64_t bytes, uint64_t kept);
    void (*extent_unmap)(struct skv_device *device, void *address, uint64_t bytes);
    int (*range_access)(struct skv_device *device, void *address, uint64_t bytes, bool writable);
    bool (*extent_same)(int fd, int other); /* two fds of one extent? false when it cannot tell */

    /* One allocation with an IPC handle; all four NULL where there is no such thing. */
    int (*ipc_create)(struct skv_device *device, uint64_t bytes, uint8_t ipc[64], void **address);
    void (*ipc_free)(struct skv_device *device, void *address);
    int (*ipc_open)(struct skv_device *device, const uint8_t ipc[64], void **address);
    void (*ipc_close)(struct skv_device *device, void *address);

    int (*memory_alloc)(struct skv_device *device, uint64_t bytes, void **address);
    void (*memory_free)(struct skv_device *device, void *address, uint64_t bytes);
    uint64_t (*memory_available)(struct skv_device *device); /* bytes, now */
    /* Host memory; *on_device is the device's address of it. */
    int (*pinned_alloc)(struct skv_device *device, uint64_t bytes, void **address,
                        uintptr_t *on_device);
    void (*pinned_free)(struct skv_device *device, void *address, uint64_t bytes);
    int (*host_register)(struct skv_device *device, void *address, uint64_t bytes, bool read_only,
                         uintptr_t *on_device);
    int (*host_unregister)(struct skv_device *device, void *address);

    int (*stream_open)(struct skv_device *device, struct skv_stream **out);
    void (*stream_close)(struct skv_stream *stream);
    int (*stream_copy)(struct skv_stream *stream, enum skv_direction direction,
                       const struct skv_copy *copies, uint32_t count);
    int (*stream_write32)(struct skv_stream *stream, uint32_t *word, uintptr_t on_device,
                          uint32_t value);
    int (*stream_mark)(struct skv_stream *stream, uint64_t *mark);
    int (*stream_query)(struct skv_stream *stream, uint64_t mark);
    int (*stream_wait)(struct skv_stream *stream, uint64_t mark, uint64_t deadline_ns);

    void (*delay)(struct skv_device *device, uint64_t delay_us); /* NULL: none */
};

extern const struct skv_backend skv_backend_host;
extern const struct skv_backend skv_backend_cuda;

/* Does this process still hold what it opened, or is it a child of the one that did? */
bool skv_device_is_ours(const struct skv_device *device);

/* device_memory.c: the tables. Addresses of device memory and of host memory live apart. */
enum skv_side { SKV_SIDE_DEVICE, SKV_SIDE_HOST };
/* Enters a range, not yet ready. SKV_EINVAL when it overlaps another, SKV_ENOMEM. */
int skv_region_add(struct skv_device *device, enum skv_side side, struct skv_region region);
/* The range that starts at `start` is ready, its device address known. */
void skv_region_ready(struct skv_device *device, enum skv_side side, uintptr_t start,
                      uintptr_t on_device);
/* Takes a range out of use, but keeps its place. SKV_EINVAL when there is none such: owned says
 * whether it must be memory given by us, or memory of others. */
int skv_region_retire(struct skv_device *device, enum skv_side side, uintptr_t start, bool owned,
                      struct skv_region *was);
void skv_region_remove(struct skv_device *device, enum skv_side side, uintptr_t start);
/* May the stream do this? SKV_EINVAL, logged with the first offender. */
int skv_copies_check(struct skv_device *device, enum skv_direction direction,
                     const struct skv_copy *copies, uint32_t count);
/* The device's address of `bytes` at `address`, all in one host region. */
int skv_region_address(struct skv_device *device, const void *address, uint64_t bytes,
                       bool for_writing, uintptr_t *on_device);
/* At skv_device_close: gives back what is left. */
void skv_regions_fini(struct skv_device *device);

#endif
