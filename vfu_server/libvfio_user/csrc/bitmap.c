/* Bitmaps of pages are merged and filled here: up to a megabyte of each, while other threads want the GIL. */
#include "bitmap.h"

#include <stdbool.h>
#include <string.h>

#define WORD 64U

void
vs_bitmap_fill(uint8_t *bits, uint64_t first, uint64_t end, int value)
{
    while (first < end) {
        if (first % 8 == 0 && end - first >= 8) {
            uint64_t bytes = (end - first) / 8;

            memset(bits + first / 8, value ? 0xff : 0, bytes);
            first += bytes * 8;
            continue;
        }
        if (value) {
            bits[first / 8] |= (uint8_t)(1U << first % 8);
        } else {
            bits[first / 8] &= (uint8_t)~(1U << first % 8);
        }
        first++;
    }
}

/* The 64 pages from `at` on, a multiple of 64; none behind the end. */
static uint64_t
word_at(const struct vs_bitmap *map, uint64_t at)
{
    uint64_t word = 0, left = map->pages - at;
    size_t bytes = (size_t)((left < WORD ? left + 7 : WORD) / 8);

    for (size_t i = 0; i < bytes; i++) {
        word |= (uint64_t)map->bits[at / 8 + i] << 8 * i;
    }
    return left < WORD ? word & ((1ULL << left) - 1) : word;
}

/* One page of `from` in `to`: the pages from that of its first byte to that of its last one. */
static void
put(const struct vs_bitmap *to, uint64_t iova, uint64_t page_size)
{
    uint64_t end = to->iova + (to->pages * to->page_size - 1);  /* the last byte: the end may be that of addresses */
    uint64_t last = iova + (page_size - 1);

    if (last < to->iova || iova > end) {
        return;
    }
    iova = iova < to->iova ? to->iova : iova;
    last = last > end ? end : last;
    vs_bitmap_fill(to->bits, (iova - to->iova) / to->page_size, (last - to->iova) / to->page_size + 1, 1);
}

/* Four words at a time: byte by byte it took longer than all the rest of a report. */
static void
or_bytes(uint8_t *restrict to, const uint8_t *restrict from, uint64_t len)
{
    uint64_t a[4], b[4];

    for (; len >= sizeof(a); len -= sizeof(a), to += sizeof(a), from += sizeof(a)) {
        memcpy(a, to, sizeof(a));
        memcpy(b, from, sizeof(b));
        for (int i = 0; i < 4; i++) {
            a[i] |= b[i];
        }
        memcpy(to, a, sizeof(a));
    }
    for (; len > 0; len--) {
        *to++ |= *from++;
    }
}

/* Both on one grid of pages, bytes on bytes: the usual case. */
static bool
merge_bytes(const struct vs_bitmap *to, const struct vs_bitmap *from)
{
    uint64_t first, whole;

    if (to->page_size != from->page_size || from->iova < to->iova ||
        (from->iova - to->iova) % (8 * to->page_size) != 0) {
        return false;
    }
    first = (from->iova - to->iova) / to->page_size;
    if (first > to->pages || from->pages > to->pages - first) {
        return false;
    }
    whole = from->pages / 8;
    or_bytes(to->bits + first / 8, from->bits, whole);
    if (from->pages % 8 != 0) {
        to->bits[first / 8 + whole] |= from->bits[whole] & (uint8_t)((1U << from->pages % 8) - 1);
    }
    return true;
}

void
vs_bitmap_merge(const struct vs_bitmap *to, const struct vs_bitmap *from)
{
    if (to->pages == 0 || from->pages == 0 || merge_bytes(to, from)) {
        return;
    }
    for (uint64_t at = 0; at < from->pages; at += WORD) {
        for (uint64_t word = word_at(from, at); word != 0; word &= word - 1) {
            uint64_t page = at + (uint64_t)__builtin_ctzll(word);

            put(to, from->iova + page * from->page_size, from->page_size);
        }
    }
}
