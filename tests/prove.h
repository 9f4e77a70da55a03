/* What every prover shares. A prover (tests/prove_*.c) is a plain program that puts promises of
 * docs/guarantees.md to the test very often, and ends with one line a promise:
 *
 *     proved <tab> promise <tab> what was done <tab> how often <tab> failures
 *
 * which tests/guarantees.sh gathers into its table. PROVE_SCALE multiplies the full counts (1), and
 * PROVE_SEED starts the random numbers; both are printed, so that a failure can be had again. */
#ifndef SKV_PROVE_H
#define SKV_PROVE_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static uint64_t prove_failed; /* over all lines */

static inline double prove_scale(void)
{
    const char *text = getenv("PROVE_SCALE");
    double scale = text ? strtod(text, NULL) : 1;
    return scale > 0 ? scale : 1;
}

static inline uint64_t prove_seed(void)
{
    const char *text = getenv("PROVE_SEED");
    return text ? strtoull(text, NULL, 0) : 1;
}

/* How often to do what is done `full` times at scale 1: at least once. */
static inline uint64_t prove_times(uint64_t full)
{
    double times = (double)full * prove_scale();
    return times < 1 ? 1 : (uint64_t)times;
}

/* `promise`: its number in docs/guarantees.md. */
static inline void prove_line(unsigned promise, const char *what, uint64_t times, uint64_t failures)
{
    prove_failed += failures > 0 || times == 0;
    printf("proved\t%u\t%s\t%llu\t%llu\n", promise, what, (unsigned long long)times,
           (unsigned long long)failures);
    fflush(stdout);
}

/* The program's exit status. */
static inline int prove_end(void)
{
    return prove_failed != 0;
}

#endif
