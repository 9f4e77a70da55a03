/* The views of a protected pool: the daemon lists the extents that are this session's to append to,
 * and only those are mapped where the caller writes.
 *
 * Off the request path: when a batch has ended, the list is looked at, what it names more is
 * mapped, what it names no more is unmapped, and the daemon is told so. A grant may name an extent
 * before that, the first time, or where the daemon had to find one in a hurry: then it is mapped at
 * once. An extent leaves the list only when no lease of ours writes to it. */
#include "skv_session.h"

#include <string.h>

static bool in_view(const struct skv *skv, uint32_t extent)
{
    return skv->viewed[extent / 64] >> extent % 64 & 1;
}

static int set_view(struct skv *skv, uint32_t extent, bool on)
{
    int status = skv_pool_view(skv->pool, extent, on);
    if (status) {
        skv_error("extent %u of the pool cannot be mapped for writing: %s", extent,
                  skv_strerror(status));
        return status;
    }
    skv->viewed[extent / 64] ^= UINT64_C(1) << extent % 64;
    return SKV_OK;
}

int skv_views_grant(struct skv *skv, const struct skv_batch *batch)
{
    const struct wire_welcome *w = &skv->link.welcome;
    if (!w->protect)
        return SKV_OK;
    uint32_t pages = (uint32_t)(w->extent_bytes / skv_page_bytes(&w->geometry));
    for (uint32_t i = 0; i < batch->count; i++) {
        const struct skv_grant *grant = &batch->grants[i];
        uint32_t first = grant->cached / w->geometry.page_tokens;
        for (uint32_t p = first; grant->flags & SKV_GRANT_APPEND && p < grant->page_count; p++) {
            uint32_t extent = grant->pages[p] / pages;
            int status = in_view(skv, extent) ? SKV_OK : set_view(skv, extent, true);
            if (status)
                return status;
        }
    }
    return SKV_OK;
}

void skv_views_look(struct skv *skv)
{
    if (!skv->link.welcome.protect)
        return;
    struct wire_ring *ring = (struct wire_ring *)(void *)skv->memory;
    const struct wire_views *views =
        (const struct wire_views *)(const void *)(skv->memory + WIRE_VIEWS_OFFSET);
    /* Pairs with the daemon's release: the list is that one, or a newer one that `begun` tells. */
    uint32_t sequence = __atomic_load_n(&views->sequence, __ATOMIC_ACQUIRE);
    if (sequence == skv->views_sequence)
        return;
    uint64_t list[WIRE_MAX_EXTENTS / 64];
    for (uint32_t i = 0; i < WIRE_MAX_EXTENTS / 64; i++)
        list[i] = __atomic_load_n(&views->extents[i], __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    if (__atomic_load_n(&views->begun, __ATOMIC_RELAXED) != sequence)
        return; /* it is being written: next time */
    for (uint32_t i = 0; i < skv->link.welcome.extents; i++) {
        bool on = list[i / 64] >> i % 64 & 1;
        if (in_view(skv, i) != on && set_view(skv, i, on))
            return;
    }
    skv->views_sequence = sequence;
    __atomic_store_n(&ring->viewed, sequence, __ATOMIC_RELEASE); /* the daemon takes it back */
}

void skv_views_drop(struct skv *skv)
{
    for (uint32_t i = 0; i < WIRE_MAX_EXTENTS; i++)
        if (skv->viewed[i / 64] && in_view(skv, i) && set_view(skv, i, false))
            return;
    skv->views_sequence = 0;
    if (skv->memory && skv->link.welcome.protect)
        __atomic_store_n(&((struct wire_ring *)(void *)skv->memory)->viewed, WIRE_NO_VIEWS,
                         __ATOMIC_RELEASE);
}
