/* The rows of K and V in a session's pages, for tests that write rows of their own and know them
 * again, on any device. On the host backend the pool is memory, and a row is where it is. On a GPU
 * rows are in a pinned copy of the pages that a grant lists: page_bytes_fetch() before they are
 * read and page_bytes_store() after they are written bring them there and back, and return when the
 * copies have ended. SIDEKV_TEST_COPY=1 has the host backend go that way too, so that it is tested
 * without a GPU. */
#ifndef SKV_PAGE_BYTES_H
#define SKV_PAGE_BYTES_H

#include <stdlib.h>
#include <string.h>

#include "device.h"

#define PAGE_BYTES_WAIT_MS 20000u

struct page_bytes {
    struct skv *skv;
    struct skv_geometry geometry;
    struct skv_stream *stream; /* NULL: rows are in place */
    uint8_t *copy;             /* pinned, [pages] in the order of a grant's list */
    struct skv_copy *copies;   /* [pages][rows of a token] */
};

/* Rows of a token: layers x {K, V} x heads, of head_dim bf16 each. */
static inline uint32_t page_bytes_rows(const struct page_bytes *b)
{
    return b->geometry.layers * 2 * b->geometry.heads;
}

/* `pages`: of the longest list. Follow with page_bytes_close() before the session is closed. A
 * process opens its own, as it does its session: neither crosses a fork. */
static inline int page_bytes_open(struct page_bytes *b, struct skv *skv, uint32_t pages)
{
    struct skv_device *device = skv_session_device(skv);
    *b = (struct page_bytes){.skv = skv, .geometry = skv_server(skv)->geometry};
    if (skv_device_info(device)->kind == SKV_DEVICE_HOST && !getenv("SIDEKV_TEST_COPY"))
        return SKV_OK;
    b->copies = calloc((size_t)pages * page_bytes_rows(b), sizeof *b->copies);
    if (!b->copies)
        return SKV_ENOMEM;
    int status = skv_pinned_alloc(device, pages * skv_page_bytes(&b->geometry), (void **)&b->copy);
    return status ? status : skv_stream_open(device, &b->stream);
}

static inline void page_bytes_close(struct page_bytes *b)
{
    skv_stream_close(b->stream);
    if (b->copy)
        skv_pinned_free(skv_session_device(b->skv), b->copy);
    free(b->copies);
    *b = (struct page_bytes){0};
}

/* Where a row of a token lies, for reading or for writing. `pages`: a grant's list. */
static inline uint64_t *page_bytes_row(const struct page_bytes *b, const uint32_t *pages,
                                       uint32_t token, uint32_t row, bool write)
{
    const uint32_t size = b->geometry.page_tokens, index = token / size;
    uint8_t *base = b->stream ? b->copy
                    : write   ? skv_pool_append_base(b->skv)
                              : skv_pool_base(b->skv);
    uint8_t *page = base + (b->stream ? index : pages[index]) * skv_page_bytes(&b->geometry);
    return (uint64_t *)(void *)(page + (row * size + token % size) * b->geometry.head_dim * 2);
}

static inline int page_bytes_copy(struct page_bytes *b, enum skv_direction direction,
                                  uint32_t count)
{
    uint64_t mark;
    int status = skv_stream_copy(b->stream, direction, b->copies, count);
    if (!status)
        status = skv_stream_mark(b->stream, &mark);
    return status ? status : skv_stream_wait(b->stream, mark, PAGE_BYTES_WAIT_MS);
}

/* Before the rows of tokens [0, end) are read. */
static inline int page_bytes_fetch(struct page_bytes *b, const uint32_t *pages, uint32_t end)
{
    const uint64_t bytes = skv_page_bytes(&b->geometry);
    uint32_t count = 0;
    for (uint32_t token = 0; b->stream && token < end; token += b->geometry.page_tokens, count++)
        b->copies[count] =
            (struct skv_copy){.dst = b->copy + count * bytes,
                              .src = (uint8_t *)skv_pool_base(b->skv) + pages[count] * bytes,
                              .bytes = bytes};
    return count ? page_bytes_copy(b, SKV_TO_HOST, count) : SKV_OK;
}

/* After the rows of tokens [begin, end) are written: they and nothing else goes to the pool. */
static inline int page_bytes_store(struct page_bytes *b, const uint32_t *pages, uint32_t begin,
                                   uint32_t end)
{
    const uint32_t size = b->geometry.page_tokens;
    uint32_t count = 0;
    for (uint32_t token = begin; b->stream && token < end;) {
        uint32_t next = token - token % size + size;
        next = next < end ? next : end;
        for (uint32_t row = 0; row < page_bytes_rows(b); row++) {
            uint8_t *from = (uint8_t *)page_bytes_row(b, pages, token, row, true);
            uint64_t at = (uint64_t)(from - b->copy) % skv_page_bytes(&b->geometry);
            uint8_t *page = (uint8_t *)skv_pool_append_base(b->skv) +
                            pages[token / size] * skv_page_bytes(&b->geometry);
            b->copies[count++] = (struct skv_copy){
                .dst = page + at, .src = from, .bytes = (next - token) * b->geometry.head_dim * 2};
        }
        token = next;
    }
    return count ? page_bytes_copy(b, SKV_TO_DEVICE, count) : SKV_OK;
}

#endif
