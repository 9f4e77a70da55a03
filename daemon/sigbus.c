/* The SIGBUS handler. Any thread may fault: the loop in a ring, an arena or a gate row, the copy
 * thread and the host device's streams at a gate. The faulting instruction goes on in zeros, and
 * whoever owns the range finds it hit and ends the session; nothing is decided here.
 *
 * The kernel's own accesses for us (a futex, a system call's buffer) fail with EFAULT instead, and
 * a GPU's go to pages that it has pinned: neither comes here. A fault anywhere else (the store's
 * map on a disk that broke) does what it does without a handler. */
#include "sigbus.h"

#include <assert.h>
#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <sys/mman.h>

/* Written by the loop, `hit` by whoever faults. `bytes` 0: none. */
static struct {
    uintptr_t begin;
    uint64_t bytes; /* release, after begin: pairs with the acquire in cover() */
    uint32_t hit;   /* release: pairs with skv_sigbus_hit() */
} ranges[SKV_SIGBUS_RANGES];

/* Async-signal-safe: mmap() is a bare system call here. */
static bool cover(uintptr_t at)
{
    for (uint32_t i = 0; i < SKV_SIGBUS_RANGES; i++) {
        uint64_t bytes = __atomic_load_n(&ranges[i].bytes, __ATOMIC_ACQUIRE);
        uintptr_t begin = __atomic_load_n(&ranges[i].begin, __ATOMIC_RELAXED);
        if (at - begin >= bytes)
            continue;
        void *zeros = mmap((void *)begin, bytes, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
        __atomic_store_n(&ranges[i].hit, 1, __ATOMIC_RELEASE);
        return zeros != MAP_FAILED;
    }
    return false;
}

static void on_sigbus(int signal_number, siginfo_t *info, void *context)
{
    int error = errno;
    (void)context;
    if (info->si_code <= 0 || !cover((uintptr_t)info->si_addr)) {
        signal(signal_number, SIG_DFL);
        raise(signal_number); /* comes when this returns, also if nothing faults again */
    }
    errno = error;
}

void skv_sigbus_init(void)
{
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_RESTART};
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, NULL);
}

void skv_sigbus_watch(uint32_t index, void *memory, uint64_t bytes)
{
    assert(index < SKV_SIGBUS_RANGES && !ranges[index].bytes);
    __atomic_store_n(&ranges[index].hit, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&ranges[index].begin, (uintptr_t)memory, __ATOMIC_RELAXED);
    __atomic_store_n(&ranges[index].bytes, bytes, __ATOMIC_RELEASE);
}

void skv_sigbus_unwatch(uint32_t index)
{
    __atomic_store_n(&ranges[index].bytes, 0, __ATOMIC_RELEASE);
}

bool skv_sigbus_hit(uint32_t index)
{
    return __atomic_load_n(&ranges[index].hit, __ATOMIC_ACQUIRE);
}
