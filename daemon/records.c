#include "records.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "hash.h"

#define FIRST_LEVEL 10u /* 1,024 buckets to begin with */

static void *reserve(uint64_t bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return NULL;
    madvise(memory, bytes, MADV_HUGEPAGE); /* random look-ups: two misses, not four */
    return memory;
}

static uint64_t bucket_bytes(const struct records *records)
{
    uint64_t buckets = 1u << FIRST_LEVEL;
    while (buckets < records->capacity)
        buckets *= 2;
    return buckets * 2 * sizeof *records->buckets;
}

int skv_records_init(struct records *records, uint32_t capacity)
{
    *records = (struct records){.capacity = capacity,
                                .free = SKV_NONE,
                                .level = FIRST_LEVEL,
                                .newest = SKV_NONE,
                                .oldest = SKV_NONE};
    records->all = reserve((uint64_t)capacity * sizeof *records->all);
    records->buckets = reserve(bucket_bytes(records));
    if (!records->all || !records->buckets) {
        skv_records_fini(records);
        return SKV_ENOMEM;
    }
    memset(records->buckets, 0xff, sizeof *records->buckets << FIRST_LEVEL);
    return SKV_OK;
}

void skv_records_fini(struct records *records)
{
    if (records->all)
        munmap(records->all, (uint64_t)records->capacity * sizeof *records->all);
    if (records->buckets)
        munmap(records->buckets, bucket_bytes(records));
    free(records->unsorted);
    *records = (struct records){0};
}

static inline uint64_t mix(uint16_t model, struct skv_id user)
{
    uint64_t x = user.lo ^ (user.hi * UINT64_C(0x9e3779b97f4a7c15)) ^ ((uint64_t)model << 48);
    x = (x ^ (x >> 32)) * UINT64_C(0xd6e8feb86659fd93);
    x = (x ^ (x >> 32)) * UINT64_C(0xd6e8feb86659fd93);
    return x ^ (x >> 32);
}

static inline uint32_t bucket_of(const struct records *records, uint64_t hash)
{
    uint32_t bucket = (uint32_t)hash & ((1u << records->level) - 1);
    if (bucket < records->split)
        bucket = (uint32_t)hash & ((2u << records->level) - 1);
    return bucket;
}

uint32_t skv_records_find(const struct records *records, uint16_t model, struct skv_id user)
{
    uint32_t index = records->buckets[bucket_of(records, mix(model, user))];
    while (index != SKV_NONE) {
        const struct record *record = &records->all[index];
        if (record->model == model && skv_id_equal(record->user, user))
            return index;
        index = record->chain;
    }
    return SKV_NONE;
}

/* Splits the next bucket: its records go to it or to its image one level up. */
static void split_one(struct records *records)
{
    uint32_t low = records->split, high = low + (1u << records->level);
    uint32_t index = records->buckets[low];
    records->buckets[low] = records->buckets[high] = SKV_NONE;
    while (index != SKV_NONE) {
        struct record *record = &records->all[index];
        uint32_t next = record->chain;
        bool up = (mix(record->model, record->user) >> records->level) & 1;
        uint32_t *head = &records->buckets[up ? high : low];
        record->chain = *head;
        *head = index;
        index = next;
    }
    if (++records->split == 1u << records->level) {
        records->level++;
        records->split = 0;
    }
}

uint32_t skv_records_add(struct records *records, uint16_t model, struct skv_id user)
{
    uint32_t index = records->free;
    if (index != SKV_NONE)
        records->free = records->all[index].older;
    else if (records->used < records->capacity)
        index = records->used++;
    else
        return SKV_NONE;
    uint32_t *head = &records->buckets[bucket_of(records, mix(model, user))];
    records->all[index] = (struct record){.user = user,
                                          .model = model,
                                          .residence = SKV_NONE,
                                          .chain = *head,
                                          .newer = SKV_NONE,
                                          .older = SKV_NONE};
    *head = index;
    records->count++;
    if (records->count > (1u << records->level) + records->split)
        split_one(records);
    return index;
}

static void unlink_lru(struct records *records, uint32_t index)
{
    struct record *record = &records->all[index];
    *(record->newer == SKV_NONE ? &records->newest : &records->all[record->newer].older) =
        record->older;
    *(record->older == SKV_NONE ? &records->oldest : &records->all[record->older].newer) =
        record->newer;
    record->newer = record->older = SKV_NONE;
}

static void link_oldest(struct records *records, uint32_t index)
{
    struct record *record = &records->all[index];
    record->older = SKV_NONE;
    record->newer = records->oldest;
    *(records->oldest == SKV_NONE ? &records->newest : &records->all[records->oldest].older) =
        index;
    records->oldest = index;
}

static void link_newest(struct records *records, uint32_t index)
{
    struct record *record = &records->all[index];
    record->newer = SKV_NONE;
    record->older = records->newest;
    *(records->newest == SKV_NONE ? &records->oldest : &records->all[records->newest].newer) =
        index;
    records->newest = index;
}

void skv_records_remove(struct records *records, uint32_t index)
{
    struct record *record = &records->all[index];
    skv_records_set_stored(records, index, 0);
    uint32_t *link = &records->buckets[bucket_of(records, mix(record->model, record->user))];
    while (*link != index)
        link = &records->all[*link].chain;
    *link = record->chain;
    record->model = SKV_NO_MODEL;
    record->older = records->free;
    records->free = index;
    records->count--;
}

void skv_records_set_stored(struct records *records, uint32_t index, uint32_t tokens)
{
    struct record *record = &records->all[index];
    if (!record->stored && tokens) {
        link_newest(records, index);
        records->stored_count++;
    } else if (record->stored && !tokens) {
        unlink_lru(records, index);
        records->stored_count--;
    }
    record->stored = (uint16_t)tokens;
}

void skv_records_touch(struct records *records, uint32_t index)
{
    if (!records->all[index].stored || records->newest == index)
        return;
    unlink_lru(records, index);
    link_newest(records, index);
}

/* ---- sorting: a heap, so that it can be left at any time; the latest goes first, to the oldest
 * end, so that those used meanwhile stay at the other ---- */

struct unsorted {
    uint32_t last_use_s, index;
};

/* Lets an entry sink from `at` to where nothing below it was used later. */
static void sink(struct records *records, uint32_t at, struct unsorted entry)
{
    struct unsorted *heap = records->unsorted;
    for (uint32_t child; (child = 2 * at + 1) < records->unsorted_count; at = child) {
        if (child + 1 < records->unsorted_count &&
            heap[child + 1].last_use_s > heap[child].last_use_s)
            child++;
        if (heap[child].last_use_s <= entry.last_use_s)
            break;
        heap[at] = heap[child];
    }
    heap[at] = entry;
}

int skv_records_unsorted(struct records *records, uint32_t index)
{
    if (records->unsorted_count == records->unsorted_room) {
        uint32_t room = records->unsorted_room ? records->unsorted_room * 2 : 1024;
        struct unsorted *heap = realloc(records->unsorted, room * sizeof *heap);
        if (!heap)
            return SKV_ENOMEM;
        records->unsorted = heap;
        records->unsorted_room = room;
    }
    struct unsorted *heap = records->unsorted;
    uint32_t at = records->unsorted_count++, use = records->all[index].last_use_s;
    for (; at && heap[(at - 1) / 2].last_use_s < use; at = (at - 1) / 2)
        heap[at] = heap[(at - 1) / 2];
    heap[at] = (struct unsorted){use, index};
    return SKV_OK;
}

bool skv_records_sort(struct records *records, uint32_t limit)
{
    for (; records->unsorted_count && limit; limit--) {
        struct unsorted first = records->unsorted[0];
        struct unsorted last = records->unsorted[--records->unsorted_count];
        if (records->unsorted_count)
            sink(records, 0, last);
        const struct record *record = &records->all[first.index];
        if (!record->stored || record->last_use_s > first.last_use_s)
            continue; /* used since */
        unlink_lru(records, first.index);
        link_oldest(records, first.index);
    }
    if (records->unsorted_count)
        return false;
    free(records->unsorted);
    records->unsorted = NULL;
    records->unsorted_room = 0;
    return true;
}
