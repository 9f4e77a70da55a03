/* sidekvd's command line. */
#ifndef SKV_OPTIONS_H
#define SKV_OPTIONS_H

#include "device.h"
#include "store.h"

/* Of a default pool, where the GPU has hardly more than 8 GiB free. */
#define OPTIONS_LEAST_PAGES 64u

/* May the next daemon wait beside this one? auto: where opening a device takes long. */
enum standby { STANDBY_AUTO, STANDBY_ON, STANDBY_OFF };

/* May workers write to extents of their own only? auto: where the pool has enough of them. */
enum protection { PROTECTION_AUTO, PROTECTION_ON, PROTECTION_OFF };

struct options {
    const char *socket;
    const char *store; /* NULL: none */
    const char *device;
    struct skv_geometry geometry;
    enum skv_export export;
    enum skv_durability durability;
    enum standby standby;
    enum protection protection;
    uint64_t pool_bytes, store_bytes, pin_bytes, staging_bytes; /* 0: by the machine */
    bool least_pool;         /* pool_bytes is OPTIONS_LEAST_PAGES by default, for want of more: */
    uint64_t gpu_free_bytes; /* this was free */
    uint32_t tail_ms, spin_us, lease_ms, start_wait_ms, stop_wait_ms;
    uint32_t max_users;
    bool epoll;
};

/* Fills it from the arguments and the defaults. Returns -1 to go on, else the exit status: 0 after
 * --help or --version, 2 after a usage error (said on stderr). */
int options_parse(int argc, char **argv, struct options *out);

/* --staging-bytes, or what suits the device. */
uint64_t options_staging(const struct options *options, struct skv_device *device);

/* Replaces the sizes that are 0 by what suits the device and this machine. */
void options_defaults(struct options *options, struct skv_device *device);

#endif
