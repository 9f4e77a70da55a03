/* Preloaded into sidekvd, or into a program with the client library: numbers the calls by which
 * memory and I/O are had, by class, and fails one of them, or all of a kind for a while (fault.h).
 * Calls of liblmdb and liburing, and glibc's own through opendir() and the like, count too.
 *
 * A call fails as it can fail: an eventfd, which cannot, does not. Submissions to an io_uring are
 * calls too: one that strikes goes out with no file, and completes with an error. */
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "fault.h"

#define META_BYTES 8192 /* of data.mdb */

static struct fault_control *control;
static _Atomic uint64_t eventfds[1024]; /* a bit an fd */

__attribute__((constructor)) static void open_control(void)
{
    const char *path = getenv(FAULTS_VARIABLE);
    int fd = path ? (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    void *memory =
        (void *)syscall(SYS_mmap, NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (memory != MAP_FAILED)
        control = memory;
}

static void tell(const char *name, void *site)
{
    Dl_info info = {0};
    dladdr(site, &info);
    const char *slash = info.dli_fname ? strrchr(info.dli_fname, '/') : NULL;
    snprintf(control->what, sizeof control->what, "%s of %s+0x%lx", name,
             slash ? slash + 1 : "nowhere", (unsigned long)((char *)site - (char *)info.dli_fbase));
    atomic_fetch_add(&control->failed, 1);
}

/* Is this call to fail? */
static bool strikes(enum fault_class class, const char *name, void *site)
{
    if (!control)
        return false;
    if (class == FAULT_MEMORY && control->lasting & FAULT_NO_MEMORY) {
        atomic_fetch_add(&control->failed, 1);
        return true;
    }
    uint32_t number = atomic_fetch_add(&control->counted[class], 1) + 1;
    if (control->class != class || control->nth != number)
        return false;
    tell(name, site);
    return true;
}

static bool lasts(uint32_t conditions)
{
    if (!control || !(control->lasting & conditions))
        return false;
    atomic_fetch_add(&control->failed, 1);
    return true;
}

#define SITE       __builtin_return_address(0)
#define STRIKES(c) strikes(c, __func__, SITE)
#define NEXT(name)                                                                                 \
    ({                                                                                             \
        static __typeof__(&(name)) next;                                                           \
        if (!next)                                                                                 \
            next = (__typeof__(next))dlsym(RTLD_NEXT, #name);                                      \
        next;                                                                                      \
    })
#define FAIL(error, value) return errno = (error), (value)

/* ---- memory ---- */

void *__libc_malloc(size_t bytes);
void *__libc_calloc(size_t count, size_t bytes);
void *__libc_realloc(void *old, size_t bytes);
void *__libc_memalign(size_t alignment, size_t bytes);

void *malloc(size_t bytes)
{
    if (STRIKES(FAULT_MEMORY))
        FAIL(ENOMEM, NULL);
    return __libc_malloc(bytes);
}

void *calloc(size_t count, size_t bytes)
{
    if (STRIKES(FAULT_MEMORY))
        FAIL(ENOMEM, NULL);
    return __libc_calloc(count, bytes);
}

void *realloc(void *old, size_t bytes)
{
    if (STRIKES(FAULT_MEMORY))
        FAIL(ENOMEM, NULL);
    return __libc_realloc(old, bytes);
}

int posix_memalign(void **out, size_t alignment, size_t bytes)
{
    if (STRIKES(FAULT_MEMORY) || !(*out = __libc_memalign(alignment, bytes)))
        return ENOMEM;
    return 0;
}

char *strdup(const char *text)
{
    if (STRIKES(FAULT_MEMORY))
        FAIL(ENOMEM, NULL);
    char *copy = __libc_malloc(strlen(text) + 1);
    return copy ? strcpy(copy, text) : NULL;
}

void *mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset)
{
    if (STRIKES(FAULT_MEMORY))
        FAIL(ENOMEM, MAP_FAILED);
    return NEXT(mmap)(at, bytes, protection, flags, fd, offset);
}

int memfd_create(const char *name, unsigned flags)
{
    if (lasts(FAULT_NO_FDS))
        FAIL(EMFILE, -1);
    if (STRIKES(FAULT_MEMORY))
        FAIL(control->nth % 2 ? ENOMEM : EMFILE, -1);
    return NEXT(memfd_create)(name, flags);
}

int madvise(void *at, size_t bytes, int advice)
{
    if (STRIKES(FAULT_MEMORY))
        FAIL(ENOMEM, -1);
    return NEXT(madvise)(at, bytes, advice);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *how, void *(*run)(void *), void *with)
{
    if (STRIKES(FAULT_MEMORY))
        return EAGAIN;
    return NEXT(pthread_create)(thread, how, run, with);
}

/* ---- descriptors ---- */

static bool is_eventfd(int fd)
{
    return fd >= 0 && fd < 65536 && eventfds[fd / 64] >> fd % 64 & 1;
}

static int note(int fd, bool is)
{
    if (fd >= 0 && fd < 65536 && is)
        atomic_fetch_or(&eventfds[fd / 64], UINT64_C(1) << fd % 64);
    else if (fd >= 0 && fd < 65536)
        atomic_fetch_and(&eventfds[fd / 64], ~(UINT64_C(1) << fd % 64));
    return fd;
}

#define NEW_FD()                                                                                   \
    if (lasts(FAULT_NO_FDS))                                                                       \
        FAIL(EMFILE, -1);                                                                          \
    if (STRIKES(FAULT_IO))                                                                         \
    FAIL(control->nth % 2 ? EMFILE : ENOMEM, -1)

int open(const char *path, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    mode_t mode = va_arg(rest, mode_t);
    va_end(rest);
    NEW_FD();
    return note(NEXT(open)(path, flags, mode), false);
}

FILE *fopen(const char *path, const char *mode)
{
    if (STRIKES(FAULT_IO) || lasts(FAULT_NO_FDS))
        FAIL(EMFILE, NULL);
    return NEXT(fopen)(path, mode);
}

DIR *opendir(const char *path)
{
    if (STRIKES(FAULT_IO) || lasts(FAULT_NO_FDS))
        FAIL(EMFILE, NULL);
    return NEXT(opendir)(path);
}

int socket(int domain, int type, int protocol)
{
    NEW_FD();
    return note(NEXT(socket)(domain, type, protocol), false);
}

int accept4(int listener, struct sockaddr *address, socklen_t *length, int flags)
{
    NEW_FD();
    return note(NEXT(accept4)(listener, address, length, flags), false);
}

int eventfd(unsigned count, int flags)
{
    NEW_FD();
    return note(NEXT(eventfd)(count, flags), true);
}

int signalfd(int fd, const sigset_t *signals, int flags)
{
    NEW_FD();
    return note(NEXT(signalfd)(fd, signals, flags), false);
}

int epoll_create1(int flags)
{
    NEW_FD();
    return note(NEXT(epoll_create1)(flags), false);
}

int fcntl(int fd, int command, ...)
{
    va_list rest;
    va_start(rest, command);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    bool may = command == F_SETLK || command == F_DUPFD_CLOEXEC || command == F_ADD_SEALS;
    if (may && STRIKES(FAULT_IO))
        FAIL(command == F_SETLK ? ENOLCK : command == F_ADD_SEALS ? EBUSY : EMFILE, -1);
    return NEXT(fcntl)(fd, command, argument);
}

long syscall(long number, ...)
{
    va_list rest;
    long a[6];
    va_start(rest, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(rest, long);
    va_end(rest);
    if (number == SYS_pidfd_open && (STRIKES(FAULT_IO) || lasts(FAULT_NO_FDS)))
        FAIL(EMFILE, -1);
    return NEXT(syscall)(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

/* ---- files ---- */

static bool is_file(int fd)
{
    struct stat about;
    return NEXT(fstat)(fd, &about) == 0 && S_ISREG(about.st_mode);
}

/* 0, or the error of a read or sync. */
static int no_read(int fd, const char *name, void *site)
{
    if (is_eventfd(fd))
        return 0;
    if (control && control->lasting & FAULT_DISK_ERROR && is_file(fd) && lasts(FAULT_DISK_ERROR))
        return EIO;
    return strikes(FAULT_IO, name, site) ? EIO : 0;
}

/* 0, or the error of a write; -1: it writes half. */
static int no_write(int fd, off_t at, const char *name, void *site)
{
    if (is_eventfd(fd) || fd == STDERR_FILENO)
        return 0;
    uint32_t lasting = control ? control->lasting & ~(uint32_t)FAULT_NO_MEMORY : 0;
    if (lasting && is_file(fd)) {
        if (lasts(FAULT_DISK_FULL))
            return ENOSPC;
        if (lasts(FAULT_DISK_ERROR) || (at >= 0 && at < META_BYTES && lasts(FAULT_META_ERROR)))
            return EIO;
    }
    if (!strikes(FAULT_IO, name, site))
        return 0;
    return control->nth % 3 == 0 ? EIO : control->nth % 3 == 1 ? ENOSPC : -1;
}

#define READS(call)                                                                                \
    int error = no_read(fd, __func__, SITE);                                                       \
    if (error)                                                                                     \
        FAIL(error, -1);                                                                           \
    return call
#define WRITES(at)                                                                                 \
    int error = no_write(fd, at, __func__, SITE);                                                  \
    if (error > 0)                                                                                 \
    FAIL(error, -1)

ssize_t read(int fd, void *bytes, size_t count)
{
    READS(NEXT(read)(fd, bytes, count));
}

ssize_t pread(int fd, void *bytes, size_t count, off_t at)
{
    READS(NEXT(pread)(fd, bytes, count, at));
}

ssize_t preadv2(int fd, const struct iovec *parts, int count, off_t at, int flags)
{
    READS(NEXT(preadv2)(fd, parts, count, at, flags));
}

ssize_t write(int fd, const void *bytes, size_t count)
{
    WRITES(-1);
    return NEXT(write)(fd, bytes, error < 0 && count > 1 ? count / 2 : count);
}

ssize_t pwrite(int fd, const void *bytes, size_t count, off_t at)
{
    WRITES(at);
    return NEXT(pwrite)(fd, bytes, error < 0 ? count / 2 : count, at);
}

ssize_t writev(int fd, const struct iovec *parts, int count)
{
    WRITES(-1);
    return NEXT(writev)(fd, parts, error < 0 && count > 1 ? count / 2 : count);
}

int fsync(int fd)
{
    READS(NEXT(fsync)(fd));
}

int fdatasync(int fd)
{
    READS(NEXT(fdatasync)(fd));
}

int fstat(int fd, struct stat *about)
{
    READS(NEXT(fstat)(fd, about));
}

int fstatvfs(int fd, struct statvfs *about)
{
    READS(NEXT(fstatvfs)(fd, about));
}

int ftruncate(int fd, off_t length)
{
    if (STRIKES(FAULT_IO))
        FAIL(control->nth % 2 ? ENOSPC : EIO, -1);
    return NEXT(ftruncate)(fd, length);
}

int flock(int fd, int operation)
{
    if (STRIKES(FAULT_IO))
        FAIL(ENOLCK, -1);
    return NEXT(flock)(fd, operation);
}

int msync(void *at, size_t bytes, int flags)
{
    if (STRIKES(FAULT_IO))
        FAIL(EIO, -1);
    return NEXT(msync)(at, bytes, flags);
}

int stat(const char *path, struct stat *about)
{
    if (STRIKES(FAULT_IO))
        FAIL(EIO, -1);
    return NEXT(stat)(path, about);
}

int statvfs(const char *path, struct statvfs *about)
{
    if (STRIKES(FAULT_IO))
        FAIL(EIO, -1);
    return NEXT(statvfs)(path, about);
}

int access(const char *path, int mode)
{
    if (STRIKES(FAULT_IO))
        FAIL(EIO, -1);
    return NEXT(access)(path, mode);
}

int mkdir(const char *path, mode_t mode)
{
    if (STRIKES(FAULT_IO))
        FAIL(control->nth % 2 ? ENOSPC : EIO, -1);
    return NEXT(mkdir)(path, mode);
}

int unlink(const char *path)
{
    if (STRIKES(FAULT_IO))
        FAIL(EIO, -1);
    return NEXT(unlink)(path);
}

struct dirent *readdir(DIR *directory)
{
    if (STRIKES(FAULT_IO))
        FAIL(EIO, NULL);
    return NEXT(readdir)(directory);
}

/* ---- sockets, waiting ---- */

int bind(int fd, const struct sockaddr *address, socklen_t length)
{
    if (STRIKES(FAULT_IO))
        FAIL(ENOSPC, -1);
    return NEXT(bind)(fd, address, length);
}

int connect(int fd, const struct sockaddr *address, socklen_t length)
{
    if (STRIKES(FAULT_IO))
        FAIL(control->nth % 2 ? EAGAIN : ENOMEM, -1);
    return NEXT(connect)(fd, address, length);
}

int listen(int fd, int backlog)
{
    if (STRIKES(FAULT_IO))
        FAIL(ENOMEM, -1);
    return NEXT(listen)(fd, backlog);
}

int getsockopt(int fd, int level, int name, void *value, socklen_t *length)
{
    if (STRIKES(FAULT_IO))
        FAIL(ENOBUFS, -1);
    return NEXT(getsockopt)(fd, level, name, value, length);
}

ssize_t recvmsg(int fd, struct msghdr *message, int flags)
{
    if (STRIKES(FAULT_IO))
        FAIL(control->nth % 2 ? EAGAIN : ENOMEM, -1);
    return NEXT(recvmsg)(fd, message, flags);
}

ssize_t recv(int fd, void *bytes, size_t count, int flags)
{
    if (STRIKES(FAULT_IO))
        FAIL(control->nth % 2 ? EAGAIN : ENOMEM, -1);
    return NEXT(recv)(fd, bytes, count, flags);
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
    if (STRIKES(FAULT_IO))
        FAIL(control->nth % 2 ? EAGAIN : ENOBUFS, -1);
    return NEXT(sendmsg)(fd, message, flags);
}

ssize_t send(int fd, const void *bytes, size_t count, int flags)
{
    if (STRIKES(FAULT_IO))
        FAIL(control->nth % 2 ? EAGAIN : ENOBUFS, -1);
    return NEXT(send)(fd, bytes, count, flags);
}

int poll(struct pollfd *fds, nfds_t count, int timeout_ms)
{
    if (STRIKES(FAULT_IO))
        FAIL(ENOMEM, -1);
    return NEXT(poll)(fds, count, timeout_ms);
}

int ppoll(struct pollfd *fds, nfds_t count, const struct timespec *timeout, const sigset_t *mask)
{
    if (STRIKES(FAULT_IO))
        FAIL(ENOMEM, -1);
    return NEXT(ppoll)(fds, count, timeout, mask);
}

int epoll_ctl(int fd, int operation, int of, struct epoll_event *event)
{
    if (operation != EPOLL_CTL_DEL && STRIKES(FAULT_IO))
        FAIL(control->nth % 2 ? ENOMEM : ENOSPC, -1);
    return NEXT(epoll_ctl)(fd, operation, of, event);
}

int epoll_wait(int fd, struct epoll_event *events, int count, int timeout_ms)
{
    if (STRIKES(FAULT_IO))
        FAIL(EINTR, -1);
    return NEXT(epoll_wait)(fd, events, count, timeout_ms);
}

/* ---- io_uring ---- */

/* Each entry about to be submitted is a call of the code that submits it. */
static void spoil_entries(struct io_uring *ring, void *site)
{
    for (unsigned i = ring->sq.sqe_head; i != ring->sq.sqe_tail; i++) {
        struct io_uring_sqe *sqe = &ring->sq.sqes[i & ring->sq.ring_mask];
        bool has_file = sqe->opcode == IORING_OP_READ || sqe->opcode == IORING_OP_POLL_ADD;
        const char *name = sqe->opcode == IORING_OP_READ ? "read entry" : "poll entry";
        if (has_file && strikes(FAULT_IO, name, site))
            sqe->fd = -1;
    }
}

int io_uring_queue_init(unsigned entries, struct io_uring *ring, unsigned flags)
{
    if (STRIKES(FAULT_IO) || lasts(FAULT_NO_FDS))
        return control->nth % 2 ? -EMFILE : -ENOMEM;
    return NEXT(io_uring_queue_init)(entries, ring, flags);
}

int io_uring_submit(struct io_uring *ring)
{
    if (STRIKES(FAULT_IO))
        return -EAGAIN;
    spoil_entries(ring, SITE);
    return NEXT(io_uring_submit)(ring);
}

int io_uring_submit_and_wait_timeout(struct io_uring *ring, struct io_uring_cqe **cqe,
                                     unsigned count, struct __kernel_timespec *timeout,
                                     sigset_t *mask)
{
    if (STRIKES(FAULT_IO))
        return -EAGAIN;
    spoil_entries(ring, SITE);
    return NEXT(io_uring_submit_and_wait_timeout)(ring, cqe, count, timeout, mask);
}
