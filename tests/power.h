/* What shim_power.c records and prove_power.c takes apart: a file of these, WRITE's followed by its
 * bytes. */
#ifndef SKV_POWER_H
#define SKV_POWER_H

#include <stdint.h>

#define POWER_DIRECTORY "SKV_POWER_DIRECTORY" /* what is recorded */
#define POWER_LOG       "SKV_POWER_LOG"       /* where to; appended */
#define POWER_BOOT      "SKV_POWER_BOOT"      /* the machine's boot id, 36 characters */

enum power_kind {
    POWER_CREATE,
    POWER_UNLINK,
    POWER_WRITE,
    POWER_TRUNCATE, /* length */
    POWER_SYNC,
    POWER_MARK, /* at: a commit that returned */
};

enum power_file { POWER_THE_DIRECTORY, POWER_STATE, POWER_DATA, POWER_FILES };

struct power_entry {
    uint32_t kind, file;
    uint32_t durable; /* WRITE: through O_DSYNC or O_SYNC */
    uint32_t reserved;
    uint64_t at, length;
};

#endif
