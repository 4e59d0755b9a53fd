/*
 * A register write of 16 bytes as one store, for mailboxes that take a command
 * only so. Compilers may split what C has for it, so it is written down.
 */
#ifndef VS_WIDE_H
#define VS_WIDE_H

#include <errno.h>
#include <stdint.h>

#define VS_WIDE 16

/* `to` is aligned to 16 bytes and uncached; earlier writes to memory are seen first. 0, or -ENOTSUP on other processors. */
static inline int
vs_store_wide(void *to, const uint8_t from[VS_WIDE])
{
#if defined(__x86_64__)
    __asm__ volatile("sfence\n\tmovdqu %1, %%xmm0\n\tmovdqa %%xmm0, %0"
                     : "=m"(*(uint8_t(*)[VS_WIDE])to)
                     : "m"(*(const uint8_t(*)[VS_WIDE])from)
                     : "xmm0", "memory");
    return 0;
#elif defined(__aarch64__)
    uint64_t low, high;

    __asm__ volatile("ldp %0, %1, [%3]\n\tdmb oshst\n\tstp %0, %1, [%2]"
                     : "=&r"(low), "=&r"(high)
                     : "r"(to), "r"(from)
                     : "memory");
    return 0;
#else
    (void)to;
    (void)from;
    return -ENOTSUP;
#endif
}

#endif
