#include "failpoint_plan.h"

#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

static struct failpoint_plan *obeyed;

__attribute__((constructor)) static void obey_environment(void)
{
    const char *path = getenv(FAILPOINTS_FILE);
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    void *plan = mmap(NULL, sizeof *obeyed, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (plan != MAP_FAILED)
        obeyed = plan;
    close(fd);
}

void skv_failpoint_reached(enum skv_failpoint point)
{
    if (!obeyed)
        return;
    __atomic_add_fetch(&obeyed->reached[point], 1, __ATOMIC_RELAXED);
    if (__atomic_load_n(&obeyed->armed, __ATOMIC_ACQUIRE) != (uint32_t)point + 1 ||
        __atomic_sub_fetch(&obeyed->countdown, 1, __ATOMIC_ACQ_REL) != 0)
        return;
    __atomic_store_n(&obeyed->died, getpid(), __ATOMIC_RELEASE);
    raise(obeyed->signal ? obeyed->signal : SIGKILL); /* this thread goes no further */
}
