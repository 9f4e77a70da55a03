/* Preloaded into a program that uses a store: records what it does to the store's directory and its
 * files, writes and syncs, in order (power.h). lock.mdb, which is shared memory in a file, is left
 * out. The boot id is what the environment says. */
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "power.h"

static const char *const names[POWER_FILES] = {
    [POWER_THE_DIRECTORY] = "", [POWER_STATE] = "/sidekv.store", [POWER_DATA] = "/data.mdb"};
static int recorder = -1;
static struct {
    uint32_t file; /* enum power_file, plus 1 */
    bool durable;
} open_files[1024];

#define NEXT(name)                                                                                 \
    ({                                                                                             \
        static __typeof__(&(name)) next;                                                           \
        if (!next)                                                                                 \
            next = (__typeof__(next))dlsym(RTLD_NEXT, #name);                                      \
        next;                                                                                      \
    })

static void record(struct power_entry entry, const void *bytes)
{
    if (recorder < 0)
        recorder = NEXT(open)(getenv(POWER_LOG), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    struct iovec parts[2] = {{&entry, sizeof entry}, {(void *)(uintptr_t)bytes, entry.length}};
    size_t total = sizeof entry + (bytes ? entry.length : 0);
    if (NEXT(writev)(recorder, parts, bytes ? 2 : 1) != (ssize_t)total)
        abort();
}

/* Which file, plus 1, a path names; 0: none of ours. */
static uint32_t file_of(const char *path)
{
    const char *directory = getenv(POWER_DIRECTORY);
    size_t length = directory ? strlen(directory) : 0;
    if (!length || strncmp(path, directory, length) != 0)
        return 0;
    for (uint32_t file = 0; file < POWER_FILES; file++)
        if (strcmp(path + length, names[file]) == 0)
            return file + 1;
    return 0;
}

static uint32_t file_at(int fd)
{
    return fd >= 0 && fd < 1024 ? open_files[fd].file : 0;
}

int open(const char *path, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    mode_t mode = va_arg(rest, mode_t);
    va_end(rest);
    if (getenv(POWER_BOOT) && strcmp(path, "/proc/sys/kernel/random/boot_id") == 0) {
        int fd = memfd_create("boot", MFD_CLOEXEC);
        if (pwrite(fd, getenv(POWER_BOOT), 36, 0) != 36)
            abort();
        return fd;
    }
    uint32_t file = file_of(path);
    if (file && flags & O_CREAT && access(path, F_OK) != 0)
        record((struct power_entry){.kind = POWER_CREATE, .file = file - 1}, NULL);
    int fd = NEXT(open)(path, flags, mode);
    if (fd >= 0 && fd < 1024) {
        open_files[fd].file = file;
        open_files[fd].durable = flags & (O_DSYNC | O_SYNC);
    }
    return fd;
}

int close(int fd)
{
    if (fd >= 0 && fd < 1024)
        open_files[fd].file = 0;
    return NEXT(close)(fd);
}

static void wrote(int fd, const void *bytes, uint64_t length, off_t at)
{
    if (file_at(fd))
        record((struct power_entry){.kind = POWER_WRITE,
                                    .file = file_at(fd) - 1,
                                    .durable = open_files[fd].durable,
                                    .at = (uint64_t)at,
                                    .length = length},
               bytes);
}

ssize_t pwrite(int fd, const void *bytes, size_t count, off_t at)
{
    wrote(fd, bytes, count, at);
    return NEXT(pwrite)(fd, bytes, count, at);
}

ssize_t write(int fd, const void *bytes, size_t count)
{
    if (file_at(fd))
        wrote(fd, bytes, count, lseek(fd, 0, SEEK_CUR));
    return NEXT(write)(fd, bytes, count);
}

ssize_t writev(int fd, const struct iovec *parts, int count)
{
    off_t at = file_at(fd) ? lseek(fd, 0, SEEK_CUR) : 0;
    for (int i = 0; i < count; at += (off_t)parts[i++].iov_len)
        wrote(fd, parts[i].iov_base, parts[i].iov_len, at);
    return NEXT(writev)(fd, parts, count);
}

static int sync_with(int (*how)(int), int fd)
{
    int rc = how(fd);
    if (rc == 0 && file_at(fd))
        record((struct power_entry){.kind = POWER_SYNC, .file = file_at(fd) - 1}, NULL);
    return rc;
}

int fsync(int fd)
{
    return sync_with(NEXT(fsync), fd);
}

int fdatasync(int fd)
{
    return sync_with(NEXT(fdatasync), fd);
}

int ftruncate(int fd, off_t length)
{
    if (file_at(fd))
        record((struct power_entry){.kind = POWER_TRUNCATE,
                                    .file = file_at(fd) - 1,
                                    .length = (uint64_t)length},
               NULL);
    return NEXT(ftruncate)(fd, length);
}

int unlink(const char *path)
{
    uint32_t file = file_of(path);
    if (file && access(path, F_OK) == 0)
        record((struct power_entry){.kind = POWER_UNLINK, .file = file - 1}, NULL);
    return NEXT(unlink)(path);
}

/* Found by the recorded program with dlsym(): commit `number` has returned. */
void power_mark(uint64_t number);
void power_mark(uint64_t number)
{
    record((struct power_entry){.kind = POWER_MARK, .at = number}, NULL);
}
