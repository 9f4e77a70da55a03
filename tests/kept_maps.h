/* The memory that the core maps, kept from world to world: what a program gets for mmap() that is
 * linked with --wrap=mmap, munmap and madvise, and includes this. A world of a few operations costs
 * 20 mappings and 50 page faults otherwise, most of its time.
 *
 * What is mapped is zero, as from the kernel. What is unmapped is filled with a pattern, so that
 * whoever reads it later finds nonsense, and whoever wrote to it is found when it is mapped again;
 * a page that no world touched is not there, nor are the pages beyond the end. Only pages that were
 * touched once are filled and looked at: they are learnt from their first fault. */
#ifndef SKV_KEPT_MAPS_H
#define SKV_KEPT_MAPS_H

#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define KEPT_MAPS    64u
#define KEPT_TOUCHED 64u /* pages of a mapping */
#define KEPT_PAGE    4096u
#define KEPT_PATTERN 0xdb

void *__real_mmap(void *at, size_t bytes, int access, int flags, int fd, off_t offset);
void *__wrap_mmap(void *at, size_t bytes, int access, int flags, int fd, off_t offset);
int __wrap_munmap(void *at, size_t bytes);
int __wrap_madvise(void *at, size_t bytes, int advice);

static struct kept_map {
    char *at;
    size_t bytes; /* of whole pages */
    bool mapped;
    uint32_t touched_count;
    char *touched[KEPT_TOUCHED]; /* pages */
} kept_maps[KEPT_MAPS];
static uint32_t kept_count, kept_mapped;
static struct sigaction kept_before;

static inline void kept_wrong(const char *what)
{
    fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, what);
    abort();
}

/* A first touch; any other fault is what it was. */
static void kept_fault(int number, siginfo_t *info, void *context)
{
    (void)number, (void)context;
    char *page = (char *)((uintptr_t)info->si_addr / KEPT_PAGE * KEPT_PAGE);
    for (uint32_t i = 0; i < kept_count; i++) {
        struct kept_map *map = &kept_maps[i];
        if (!map->mapped || page < map->at || page >= map->at + map->bytes ||
            map->touched_count == KEPT_TOUCHED ||
            mprotect(page, KEPT_PAGE, PROT_READ | PROT_WRITE) != 0)
            continue;
        map->touched[map->touched_count++] = page;
        return;
    }
    sigaction(SIGSEGV, &kept_before, NULL); /* and it faults again */
}

static inline struct kept_map *kept_new(size_t bytes)
{
    struct kept_map *map = &kept_maps[kept_count];
    if (kept_count == KEPT_MAPS)
        kept_wrong("more mappings than KEPT_MAPS");
    if (!kept_count) {
        struct sigaction action = {.sa_sigaction = kept_fault, .sa_flags = SA_SIGINFO};
        sigaction(SIGSEGV, &action, &kept_before);
    }
    map->at = __real_mmap(NULL, bytes + KEPT_PAGE, PROT_NONE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map->at == MAP_FAILED)
        kept_wrong("no memory");
    map->bytes = bytes;
    kept_count++;
    return map;
}

void *__wrap_mmap(void *at, size_t bytes, int access, int flags, int fd, off_t offset)
{
    struct kept_map *map = NULL;
    bytes = (bytes + KEPT_PAGE - 1) / KEPT_PAGE * KEPT_PAGE;
    if (at || access != (PROT_READ | PROT_WRITE) || !(flags & MAP_ANONYMOUS) || fd >= 0 || offset)
        kept_wrong("a mapping of another kind");
    for (uint32_t i = 0; i < kept_count && !map; i++)
        if (!kept_maps[i].mapped && kept_maps[i].bytes == bytes)
            map = &kept_maps[i];
    if (!map)
        map = kept_new(bytes);
    for (uint32_t i = 0; i < map->touched_count; i++) {
        const char *page = map->touched[i];
        if (*(const unsigned char *)page != KEPT_PATTERN || memcmp(page, page + 1, KEPT_PAGE - 1))
            kept_wrong("written to after it was unmapped");
        memset(map->touched[i], 0, KEPT_PAGE);
    }
    map->mapped = true;
    kept_mapped++;
    return map->at;
}

int __wrap_munmap(void *at, size_t bytes)
{
    struct kept_map *map = kept_maps;
    bytes = (bytes + KEPT_PAGE - 1) / KEPT_PAGE * KEPT_PAGE;
    while (map < kept_maps + kept_count && map->at != at)
        map++;
    if (map == kept_maps + kept_count || !map->mapped || map->bytes != bytes)
        kept_wrong("unmapped, and not mapped so");
    for (uint32_t i = 0; i < map->touched_count; i++)
        memset(map->touched[i], KEPT_PATTERN, KEPT_PAGE);
    map->mapped = false;
    kept_mapped--;
    return 0;
}

int __wrap_madvise(void *at, size_t bytes, int advice)
{
    (void)at, (void)bytes, (void)advice;
    return 0;
}

#endif
