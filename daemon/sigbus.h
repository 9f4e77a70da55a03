/* Memory that a client can take away under the daemon: a hole punched into it that nothing is left
 * to fill, or a page of it that broke, is a SIGBUS where it is touched next. */
#ifndef SKV_SIGBUS_H
#define SKV_SIGBUS_H

#include <stdbool.h>
#include <stdint.h>

#define SKV_SIGBUS_RANGES 320u

/* Installs the handler, for all threads. */
void skv_sigbus_init(void);
/* From now on a fault inside is survived: the range is private zeros then, the client's no more.
 * `index` is the caller's to choose; pair with skv_sigbus_unwatch() before the memory is unmapped.
 */
void skv_sigbus_watch(uint32_t index, void *memory, uint64_t bytes);
void skv_sigbus_unwatch(uint32_t index);
/* Has there been one? Cheap: an atomic load. */
bool skv_sigbus_hit(uint32_t index);

#endif
