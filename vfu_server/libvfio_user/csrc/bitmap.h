/*
 * Bitmaps of pages: bit k of the little-endian bytes is the page at `iova + k * page_size`. Both page sizes of a merge
 * are powers of two; they, and where the bitmaps begin, need not fit together.
 */
#ifndef VS_BITMAP_H
#define VS_BITMAP_H

#include <stddef.h>
#include <stdint.h>

struct vs_bitmap {
    uint8_t *bits;
    uint64_t iova, page_size;
    uint64_t pages;             /* `bits` has room for whole bytes */
};

/* Sets in `to` each page that shares a byte with a page set in `from`. What lies outside of `to` is left out. */
void vs_bitmap_merge(const struct vs_bitmap *to, const struct vs_bitmap *from);
/* Sets or clears pages [first, end), whatever they stand for. */
void vs_bitmap_fill(uint8_t *bits, uint64_t first, uint64_t end, int value);

#endif
