/* How the sequences of a batch lie one behind the other, and what follows for each query row. The
 * CPU writes the layout, pull works out the rows: a launch costs the CPU a token a row, no more. */
#ifndef HSTU_CUDA_LAYOUT_H
#define HSTU_CUDA_LAYOUT_H

#include <assert.h>

#include "hstu.h"
#include "table_rows.h"

struct hstu_layout {
    uint32_t row_start[SKV_MAX_BATCH + 1];  /* first query row; at [batch]: the number of rows */
    uint32_t page_start[SKV_MAX_BATCH + 1]; /* into the list of pages */
    uint32_t history[SKV_MAX_BATCH];        /* h */
    uint32_t cached[SKV_MAX_BATCH];         /* c */
    uint32_t appended[SKV_MAX_BATCH];       /* its first rows, whose K and V go to pages */
    uint32_t batch, pages;                  /* sequences, page ids */
    uint32_t work, last_work;               /* work items, and those of the last layer */
    uint32_t reserved[2];                   /* the size is a multiple of 16 */
};
static_assert(sizeof(struct hstu_layout) % 16 == 0, "pull copies 16 bytes at a time");

/* UINT32_MAX in an index: there is none. */
struct hstu_place {
    uint32_t sequence; /* none: padding */
    uint32_t position; /* row of the position table */
    uint32_t page;     /* index into the list of pages of where K and V go */
    uint32_t slot;     /* in that page */
};

/* Of row `row` of the graph; page_tokens is a power of two. */
HSTU_EITHER_SIDE struct hstu_place hstu_place_row(const struct hstu_layout *l, uint32_t row,
                                                  uint32_t page_tokens, uint32_t position_buckets)
{
    struct hstu_place place = {UINT32_MAX, 0, UINT32_MAX, 0};
    if (row >= l->row_start[l->batch])
        return place;
    /* row_start[first] <= row < row_start[end]; sequences without rows are passed over. */
    uint32_t first = 0, end = l->batch;
    while (end - first > 1) {
        uint32_t middle = (first + end) / 2;
        if (l->row_start[middle] <= row)
            first = middle;
        else
            end = middle;
    }
    const uint32_t local = row - l->row_start[first], token = l->cached[first] + local;
    place.sequence = first;
    place.position = hstu_position(local, l->cached[first], l->history[first], position_buckets);
    if (local < l->appended[first]) {
        place.page = l->page_start[first] + token / page_tokens;
        place.slot = token & (page_tokens - 1);
    }
    return place;
}

#endif
