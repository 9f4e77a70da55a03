/* The time of day, UTC, as text. libc's gmtime_r() takes a lock, which in the child of a process
 * with threads may be held by nobody for ever. */
#ifndef SKV_UTC_H
#define SKV_UTC_H

#include <stdint.h>

#define SKV_UTC_BYTES 32 /* of the text */

/* Writes "2026-11-28T21:46:11"; seconds since 1970, not before. */
void skv_utc_text(char text[SKV_UTC_BYTES], uint64_t seconds);

#endif
