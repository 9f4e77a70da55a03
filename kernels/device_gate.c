/* Gates on the host: opening one by a plain store, waiting for one.
 *
 * A gate word is in memory shared between processes, and may be opened by a stream of either
 * backend, by a GPU's memory write, or by a library's watcher thread. Only skv_gate_store() wakes
 * sleepers; a GPU's write cannot. So the wait sleeps in slices and looks again after each. */
#include "device.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "clock.h"

/* About what going to sleep and waking up costs. */
#define SPIN_NS UINT64_C(20000)
/* The most that a gate opened without a wake is noticed late. */
#define SLICE_NS UINT64_C(1000000)

void skv_gate_store(uint32_t *word, uint32_t value)
{
    /* Pairs with the acquire load in skv_gate_wait, and with the wait node of a graph: what was
     * copied before is visible to whoever sees the gate open. */
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
    /* Shared, not FUTEX_PRIVATE: waiters are in other processes. The kernel orders the wake after
     * the store. */
    syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static uint32_t look(const uint32_t *word)
{
    return __atomic_load_n(word, __ATOMIC_ACQUIRE); /* pairs with skv_gate_store's release */
}

int skv_gate_wait(uint32_t *word, uint32_t timeout_ms)
{
    if (look(word) >= 1)
        return 0;
    uint64_t start = skv_now_ns(), now = start;
    uint64_t deadline = start + timeout_ms * UINT64_C(1000000);
    while (now < start + SPIN_NS && now < deadline) {
        for (int i = 0; i < 64; i++) {
            if (look(word) >= 1)
                return 0;
            skv_relax();
        }
        now = skv_now_ns();
    }
    while (now < deadline) {
        uint64_t sleep = deadline - now < SLICE_NS ? deadline - now : SLICE_NS;
        struct timespec slice = {.tv_nsec = (long)sleep};
        /* Woken, opened just now (EAGAIN), a signal, the slice over: all mean "look again". */
        syscall(SYS_futex, word, FUTEX_WAIT, 0, &slice, NULL, 0);
        if (look(word) >= 1)
            return 0;
        now = skv_now_ns();
    }
    return SKV_ETIMEDOUT;
}
