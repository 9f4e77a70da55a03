/* Which parts of the store's map the device may read in place. A thread of its own faults 16 MiB
 * windows in without the device, then registers them read-only, up to --pin-bytes, in file order up
 * to the store's high-water mark, and never while paused (a gated batch is in flight: registering
 * stalls copies). Keeps one bit per 4 KiB page of the map: "a value that begins here was verified
 * since its window was registered", cleared when a window is registered.
 *
 * The copy thread asks, marks and pauses; the writer tells what it put. All calls are
 * lock-free but pause. */
#ifndef SKV_PINNER_H
#define SKV_PINNER_H

#include "device.h"
#include "store.h"

#define SKV_WINDOW_BYTES (UINT64_C(16) << 20) /* of the map; registered as one */

struct skv_pinner;

int skv_pinner_start(struct skv_store *store, struct skv_device *device, uint64_t pin_bytes,
                     struct skv_pinner **out);
void skv_pinner_stop(struct skv_pinner *pinner); /* unregisters; no copy may be in flight */

/* Are all of these bytes of the map in registered windows? */
bool skv_pinner_covers(const struct skv_pinner *pinner, const void *memory, uint64_t bytes);
/* Has the value that begins here been verified since then? Mark it once it is, and only while all
 * of it is covered: verified in place, or put. */
bool skv_pinner_verified(const struct skv_pinner *pinner, const void *value);
void skv_pinner_mark(struct skv_pinner *pinner, const void *value);
/* Nested; returns once no registration is under way when `pause` is true (at most one window's
 * time). */
void skv_pinner_pause(struct skv_pinner *pinner, bool pause);
uint64_t skv_pinner_bytes(const struct skv_pinner *pinner); /* registered now */

#endif
