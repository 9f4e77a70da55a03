/* What fuzzers share: what must be so, an input taken as bytes and numbers, memfds, and a count of
 * fds. */
#ifndef SKV_FUZZ_INPUT_H
#define SKV_FUZZ_INPUT_H

#include <dirent.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define FUZZ_MUST(condition)                                                                       \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);                \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

/* Past its end there are zeroes. */
struct fuzz_input {
    const uint8_t *at, *end;
};

static inline bool fuzz_more(const struct fuzz_input *in)
{
    return in->at < in->end;
}

/* Takes `bytes` of it. */
static inline void fuzz_take(struct fuzz_input *in, void *out, size_t bytes)
{
    size_t left = (size_t)(in->end - in->at), taken = bytes < left ? bytes : left;
    memset(out, 0, bytes);
    memcpy(out, in->at, taken);
    in->at += taken;
}

static inline uint8_t fuzz_u8(struct fuzz_input *in)
{
    uint8_t value;
    fuzz_take(in, &value, sizeof value);
    return value;
}

static inline uint32_t fuzz_u32(struct fuzz_input *in)
{
    uint32_t value;
    fuzz_take(in, &value, sizeof value);
    return value;
}

/* A memfd. */
static inline int fuzz_memory(uint64_t bytes, int seals)
{
    int fd = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    FUZZ_MUST(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0);
    FUZZ_MUST(fcntl(fd, F_ADD_SEALS, seals) == 0);
    return fd;
}

/* Open now. */
static inline uint32_t fuzz_count_fds(void)
{
    uint32_t count = 0;
    DIR *directory = opendir("/proc/self/fd");
    while (directory && readdir(directory))
        count++;
    closedir(directory);
    return count;
}

#endif
