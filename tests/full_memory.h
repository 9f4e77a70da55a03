/* A daemon whose sessions live in memory that can run out: its memfds of sessions are files of a
 * small tmpfs, which a supervisor gives it in their place (seccomp's user notification), with seals
 * that are only said to be there. A hole punched into one, and the tmpfs filled, is a page that
 * cannot be had: the SIGBUS of a machine out of memory, without one. Needs root. */
#ifndef SKV_FULL_MEMORY_H
#define SKV_FULL_MEMORY_H

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#include "raw_client.h"

#define FULL_MEMORY "4m"

static struct {
    char directory[128];
    dev_t device;
    int sockets[2], listener;
    bool on;    /* sessions get such memory now; libsidekv wants real seals */
    int filler; /* a file that takes what is left, or -1 */
} tight = {.filler = -1};

/* In the daemon's process, before it becomes the daemon. */
static inline void full_filter(void)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_memfd_create, 4, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_fcntl, 0, 4),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1])),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, F_ADD_SEALS, 1, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, F_GET_SEALS, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {.len = sizeof code / sizeof *code, .filter = code};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    int fd = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER,
                          &program);
    if (fd < 0 || !raw_send(tight.sockets[1], "", 1, &fd, 1))
        _exit(1);
    close(fd);
}

/* A file of the tmpfs of `bytes`. */
static inline int full_file(uint64_t bytes)
{
    int fd = open(tight.directory, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (fd < 0 || ftruncate(fd, (off_t)bytes))
        abort();
    return fd;
}

/* Answers one system call of the daemon's; true: it is answered, false: let it go its way. */
static inline bool full_answer(const struct seccomp_notif *call, int64_t *result)
{
    char path[64], name[32] = {0};
    struct stat about;
    if (call->data.nr == SYS_memfd_create) {
        snprintf(path, sizeof path, "/proc/%d/mem", (int)call->pid);
        int memory = open(path, O_RDONLY | O_CLOEXEC);
        bool session = pread(memory, name, sizeof name - 1, (off_t)call->data.args[0]) > 0 &&
                       strcmp(name, "sidekv-session") == 0;
        close(memory);
        if (!session || !__atomic_load_n(&tight.on, __ATOMIC_RELAXED))
            return false;
        int fd = full_file(0);
        struct seccomp_notif_addfd add = {
            .id = call->id, .srcfd = (uint32_t)fd, .newfd_flags = O_CLOEXEC};
        *result = ioctl(tight.listener, SECCOMP_IOCTL_NOTIF_ADDFD, &add);
        close(fd);
        return true;
    }
    snprintf(path, sizeof path, "/proc/%d/fd/%d", (int)call->pid, (int)call->data.args[0]);
    if (stat(path, &about) || about.st_dev != tight.device)
        return false;
    *result = call->data.args[1] == F_GET_SEALS ? F_SEAL_SHRINK | F_SEAL_GROW : 0;
    return true;
}

/* Till the daemon has ended. */
static inline void *full_supervise(void *unused)
{
    struct pollfd wait = {.fd = tight.listener, .events = POLLIN};
    while (poll(&wait, 1, -1) == 1 && !(wait.revents & POLLHUP)) {
        struct seccomp_notif call = {0};
        if (ioctl(tight.listener, SECCOMP_IOCTL_NOTIF_RECV, &call))
            continue;
        int64_t result = 0;
        struct seccomp_notif_resp answer = {.id = call.id};
        if (!full_answer(&call, &result))
            answer.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
        answer.val = result;
        ioctl(tight.listener, SECCOMP_IOCTL_NOTIF_SEND, &answer);
    }
    close(tight.listener);
    return unused;
}

/* Starts a daemon like rig_start(). false: this machine does not let us. */
static inline bool full_start(struct rig *rig, const char *const options[], pthread_t *supervisor)
{
    struct stat about;
    char byte;
    snprintf(tight.directory, sizeof tight.directory, "%s/full", rig->directory);
    if (mkdir(tight.directory, 0700) || unshare(CLONE_NEWNS) ||
        mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
        mount("tmpfs", tight.directory, "tmpfs", 0, "size=" FULL_MEMORY) ||
        stat(tight.directory, &about) || socketpair(AF_UNIX, SOCK_SEQPACKET, 0, tight.sockets))
        return false;
    tight.device = about.st_dev;
    rig_child = full_filter;
    rig_start(rig, options);
    rig_child = NULL;
    close(tight.sockets[1]);
    int fds[8] = {-1};
    bool heard = raw_receive(tight.sockets[0], &byte, 1, fds, RAW_PATIENCE_MS) == 1;
    close(tight.sockets[0]);
    tight.listener = fds[0];
    return heard && pthread_create(supervisor, NULL, full_supervise, NULL) == 0;
}

/* Takes the daemon and the tmpfs down. */
static inline void full_end(struct rig *rig, pthread_t supervisor)
{
    rig_stop(rig, SIGTERM);
    pthread_join(supervisor, NULL);
    umount2(tight.directory, MNT_DETACH);
}

/* Takes what is left of the memory. Returns how many pages that was. */
static inline uint32_t full_fill(void)
{
    static const uint8_t page[4096] = {1};
    uint32_t pages = 0;
    if (tight.filler < 0)
        tight.filler = full_file(0);
    while (write(tight.filler, page, sizeof page) == sizeof page)
        pages++;
    return pages;
}

static inline void full_empty(void)
{
    close(tight.filler);
    tight.filler = -1;
}

/* Waits till all earlier sessions have given theirs back, so that nobody does meanwhile. */
static inline bool full_is_empty(void)
{
    struct statvfs use;
    for (int i = 0; i < 6000; i++) {
        if (!statvfs(tight.directory, &use) && use.f_bfree == use.f_blocks)
            return true;
        usleep(10000);
    }
    return false;
}

/* Takes a page away from a file for good; false: somebody touches it all the time. */
static inline bool full_take(int fd, uint64_t offset)
{
    full_fill();
    for (int i = 0; i < 1000; i++)
        if (!fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, 4096) &&
            full_fill())
            return true;
    return false;
}

#endif
