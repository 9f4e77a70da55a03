#include "residence.h"

#include <assert.h>
#include <string.h>
#include <sys/mman.h>

#define CLASSES     9u
#define CLASS_ROOM  8u /* entries of class 0 */
#define ENTRY_BYTES (sizeof(uint64_t) + sizeof(uint32_t))
_Static_assert(CLASS_ROOM << (CLASSES - 1) == SKV_MAX_USER_PAGES, "the last class holds any user");

static void *reserve(uint64_t bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

static uint64_t array_bytes(uint32_t class)
{
    return (uint64_t)(CLASS_ROOM << class) * ENTRY_BYTES;
}

int skv_residences_init(struct residences *rs, uint32_t pages, uint32_t extent_pages,
                        uint32_t holders)
{
    bool protect = extent_pages != 0;
    if (!protect)
        extent_pages = pages;
    /* A residence with a user holds at least one page, or a lease; a detached one at least one
     * lease or copy. */
    *rs = (struct residences){.pages = pages,
                              .extents = (pages + extent_pages - 1) / extent_pages,
                              .extent_pages = extent_pages,
                              .protect = protect,
                              .capacity = pages + holders,
                              .first_free_residence = SKV_NONE,
                              .newest = SKV_NONE,
                              .oldest = SKV_NONE};
    rs->page = reserve((uint64_t)pages * sizeof *rs->page);
    rs->extent = reserve((uint64_t)rs->extents * sizeof *rs->extent);
    rs->all = reserve((uint64_t)rs->capacity * sizeof *rs->all);
    bool good = rs->page && rs->extent && rs->all;
    for (uint32_t class = 0; class < CLASSES && good; class ++) {
        /* An array of a class above 0 was grown into: it holds more than half its room, or belongs
         * to a holder. */
        uint32_t lists = class ? pages / ((CLASS_ROOM << class) / 2) + holders + 1 : rs->capacity;
        rs->arrays[class].capacity = lists;
        rs->arrays[class].first_free = SKV_NONE;
        rs->arrays[class].memory = reserve(lists * array_bytes(class));
        good = rs->arrays[class].memory != NULL;
    }
    if (!good) {
        skv_residences_fini(rs);
        return SKV_ENOMEM;
    }
    skv_pages_relink(rs);
    return SKV_OK;
}

void skv_residences_fini(struct residences *rs)
{
    if (rs->page)
        munmap(rs->page, (uint64_t)rs->pages * sizeof *rs->page);
    if (rs->extent)
        munmap(rs->extent, (uint64_t)rs->extents * sizeof *rs->extent);
    if (rs->all)
        munmap(rs->all, (uint64_t)rs->capacity * sizeof *rs->all);
    for (uint32_t class = 0; class < CLASSES; class ++)
        if (rs->arrays[class].memory)
            munmap(rs->arrays[class].memory, rs->arrays[class].capacity * array_bytes(class));
    *rs = (struct residences){0};
}

/* ---- pages and extents ---- */

static void link_extent(struct residences *rs, uint32_t index)
{
    struct extent *extent = &rs->extent[index];
    struct owner *owner = &rs->owners[extent->owner];
    extent->before = SKV_NONE;
    extent->behind = owner->first;
    if (owner->first != SKV_NONE)
        rs->extent[owner->first].before = index;
    owner->first = index;
}

static void unlink_extent(struct residences *rs, uint32_t index)
{
    struct extent *extent = &rs->extent[index];
    *(extent->before == SKV_NONE ? &rs->owners[extent->owner].first
                                 : &rs->extent[extent->before].behind) = extent->behind;
    if (extent->behind != SKV_NONE)
        rs->extent[extent->behind].before = extent->before;
}

void skv_extent_give(struct residences *rs, uint32_t index, uint32_t to)
{
    struct extent *extent = &rs->extent[index];
    if (extent->free)
        unlink_extent(rs, index);
    rs->owners[extent->owner].extents--;
    rs->owners[extent->owner].free_pages -= extent->free;
    extent->owner = (uint16_t)to;
    rs->owners[to].extents++;
    rs->owners[to].free_pages += extent->free;
    if (extent->free)
        link_extent(rs, index);
}

uint32_t skv_page_take(struct residences *rs, uint32_t owner, uint64_t generation)
{
    uint32_t from = rs->owners[owner].first;
    if (from == SKV_NONE)
        return SKV_NONE;
    struct extent *extent = &rs->extent[from];
    uint32_t index = extent->first_free;
    struct page *page = &rs->page[index];
    extent->first_free = page->next_free;
    if (--extent->free == 0)
        unlink_extent(rs, from);
    rs->owners[owner].free_pages--;
    rs->free_pages--;
    page->refs = 1;
    page->generation = generation;
    page->residence = SKV_NONE;
    return index;
}

bool skv_page_drop(struct residences *rs, uint32_t index)
{
    struct page *page = &rs->page[index];
    assert(page->refs > 0);
    if (--page->refs)
        return false;
    struct extent *extent = &rs->extent[page->extent];
    page->next_free = extent->first_free;
    extent->first_free = index;
    if (extent->free++ == 0)
        link_extent(rs, page->extent);
    rs->owners[extent->owner].free_pages++;
    rs->free_pages++;
    if (rs->protect && extent->free == extent->pages && extent->owner == EXTENT_COMMON)
        skv_extent_give(rs, page->extent, EXTENT_FREE);
    return true;
}

void skv_pages_relink(struct residences *rs)
{
    rs->free_pages = 0;
    for (uint32_t i = 0; i < EXTENT_OWNERS; i++)
        rs->owners[i] = (struct owner){.first = SKV_NONE};
    for (uint32_t e = rs->extents; e-- > 0;) {
        struct extent *extent = &rs->extent[e];
        uint32_t first = e * rs->extent_pages, left = rs->pages - first;
        *extent = (struct extent){.pages = left < rs->extent_pages ? left : rs->extent_pages,
                                  .first_free = SKV_NONE};
        for (uint32_t i = first + extent->pages; i-- > first;) {
            struct page *page = &rs->page[i];
            page->extent = (uint16_t)e;
            if (page->refs)
                continue;
            page->next_free = extent->first_free;
            extent->first_free = i;
            extent->free++;
        }
        bool used = !rs->protect || extent->free < extent->pages;
        extent->owner = used ? EXTENT_COMMON : EXTENT_FREE;
        rs->owners[extent->owner].extents++;
        rs->owners[extent->owner].free_pages += extent->free;
        rs->free_pages += extent->free;
        if (extent->free)
            link_extent(rs, e);
    }
}

/* An array of a class: its memory, or NULL. A free one begins with the index of the next. */
static uint8_t *array_take(struct residences *rs, uint32_t class)
{
    uint32_t index = rs->arrays[class].first_free;
    if (index != SKV_NONE)
        memcpy(&rs->arrays[class].first_free, rs->arrays[class].memory + index * array_bytes(class),
               sizeof index);
    else if (rs->arrays[class].used < rs->arrays[class].capacity)
        index = rs->arrays[class].used++;
    else
        return NULL;
    return rs->arrays[class].memory + index * array_bytes(class);
}

static void array_give(struct residences *rs, uint32_t class, uint8_t *array)
{
    uint32_t index = (uint32_t)((uint64_t)(array - rs->arrays[class].memory) / array_bytes(class));
    memcpy(array, &rs->arrays[class].first_free, sizeof index);
    rs->arrays[class].first_free = index;
}

static void set_array(struct residence *r, uint32_t class, uint8_t *array)
{
    r->room_class = (uint8_t) class;
    r->hash = (uint64_t *)(void *)array;
    r->page = (uint32_t *)(void *)(array + (CLASS_ROOM << class) * sizeof(uint64_t));
}

bool skv_residence_reserve(struct residences *rs, uint32_t index, uint32_t pages)
{
    struct residence *r = &rs->all[index];
    uint32_t class = r->room_class;
    while (CLASS_ROOM << class < pages)
        class ++;
    if (class == r->room_class)
        return true;
    uint8_t *array = class < CLASSES ? array_take(rs, class) : NULL;
    if (!array)
        return false;
    struct residence old = *r;
    set_array(r, class, array);
    memcpy(r->hash, old.hash, old.pages * sizeof *r->hash);
    memcpy(r->page, old.page, old.pages * sizeof *r->page);
    array_give(rs, old.room_class, (uint8_t *)old.hash);
    return true;
}

static void unlink_lru(struct residences *rs, uint32_t index)
{
    struct residence *r = &rs->all[index];
    *(r->newer == SKV_NONE ? &rs->newest : &rs->all[r->newer].older) = r->older;
    *(r->older == SKV_NONE ? &rs->oldest : &rs->all[r->older].newer) = r->newer;
}

static void link_newest(struct residences *rs, uint32_t index)
{
    struct residence *r = &rs->all[index];
    r->newer = SKV_NONE;
    r->older = rs->newest;
    *(rs->newest == SKV_NONE ? &rs->oldest : &rs->all[rs->newest].newer) = index;
    rs->newest = index;
}

uint32_t skv_residence_add(struct residences *rs, uint32_t record)
{
    uint32_t index = rs->first_free_residence;
    if (index == SKV_NONE && rs->used == rs->capacity)
        return SKV_NONE;
    uint8_t *array = array_take(rs, 0);
    if (!array)
        return SKV_NONE;
    if (index != SKV_NONE)
        rs->first_free_residence = rs->all[index].older;
    else
        index = rs->used++;
    struct residence *r = &rs->all[index];
    *r = (struct residence){
        .record = record, .appender = SKV_NONE, .before = SKV_NONE, .behind = SKV_NONE};
    set_array(r, 0, array);
    link_newest(rs, index);
    rs->count++;
    return index;
}

void skv_residence_push(struct residences *rs, uint32_t index, uint32_t page, uint64_t hash)
{
    struct residence *r = &rs->all[index];
    assert(r->pages < CLASS_ROOM << r->room_class);
    r->page[r->pages] = page;
    r->hash[r->pages++] = hash;
    if (rs->protect && page != SKV_NONE)
        rs->page[page].residence = index;
}

void skv_residence_touch(struct residences *rs, uint32_t index)
{
    if (rs->newest == index)
        return;
    unlink_lru(rs, index);
    link_newest(rs, index);
}

void skv_residence_detach(struct residences *rs, uint32_t index)
{
    assert(rs->all[index].record != SKV_NONE && !rs->all[index].queued);
    unlink_lru(rs, index);
    rs->all[index].record = SKV_NONE;
    rs->count--;
}

void skv_residence_remove(struct residences *rs, uint32_t index)
{
    struct residence *r = &rs->all[index];
    assert(!r->pages && !r->leases && !r->copies && !r->queued);
    if (r->record != SKV_NONE)
        skv_residence_detach(rs, index);
    array_give(rs, r->room_class, (uint8_t *)r->hash);
    r->hash = NULL;
    r->older = rs->first_free_residence;
    rs->first_free_residence = index;
}

void skv_backlog_push(struct residences *rs, struct backlog *queue, uint32_t index)
{
    struct residence *r = &rs->all[index];
    assert(!r->queued);
    r->queued = true;
    r->before = queue->last;
    r->behind = SKV_NONE;
    *(queue->last == SKV_NONE ? &queue->first : &rs->all[queue->last].behind) = index;
    queue->last = index;
    queue->count++;
}

void skv_backlog_remove(struct residences *rs, struct backlog *queue, uint32_t index)
{
    struct residence *r = &rs->all[index];
    assert(r->queued);
    r->queued = false;
    *(r->before == SKV_NONE ? &queue->first : &rs->all[r->before].behind) = r->behind;
    *(r->behind == SKV_NONE ? &queue->last : &rs->all[r->behind].before) = r->before;
    queue->count--;
}
