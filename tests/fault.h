/* What shim_faults.c and who preloads it into a program say to each other: a file that both map,
 * named by $SKV_FAULTS. */
#ifndef SKV_FAULT_H
#define SKV_FAULT_H

#include <stdatomic.h>
#include <stdint.h>

#define FAULTS_VARIABLE "SKV_FAULTS"

enum fault_class { FAULT_NONE, FAULT_IO, FAULT_MEMORY, FAULT_CLASSES };

enum fault_lasting {                       /* conditions, for as long as the bit is set */
                     FAULT_DISK_FULL = 1,  /* writes to files */
                     FAULT_DISK_ERROR = 2, /* reads, writes and syncs of files */
                     FAULT_META_ERROR = 4, /* LMDB's two meta pages */
                     FAULT_NO_MEMORY = 8,  /* every allocation */
                     FAULT_NO_FDS = 16,
};

struct fault_control {
    uint32_t class, nth; /* the call that fails, once; nth 0: none */
    _Atomic uint32_t lasting;
    _Atomic uint32_t counted[FAULT_CLASSES]; /* calls numbered so far */
    _Atomic uint32_t failed;                 /* calls failed so far */
    char what[128];                          /* the last one: function, module, offset */
};

#endif
