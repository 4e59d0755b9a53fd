/* The registers of QEMU's edu (docs/specs/edu.rst), and its DMA. */
#ifndef EDU_H
#define EDU_H

#include "noiommu.h"

#define ID 0x00
#define IDENTIFICATION 0x010000ed
#define FACTORIAL 0x08
#define STATUS 0x20
#define IRQ_STATUS 0x24
#define IRQ_ACK 0x64
#define DMA_SOURCE 0x80
#define DMA_DESTINATION 0x88
#define DMA_COUNT 0x90
#define DMA_COMMAND 0x98
#define DMA_INTERRUPT 0x100
#define BUFFER 0x40000
#define TO_DEVICE 0
#define FROM_DEVICE 2

/* A page, with an interrupt at its end. */
static inline void
begin_transfer(uint64_t source, uint64_t destination, int direction)
{
    set(bar + DMA_SOURCE, 8, source);
    set(bar + DMA_DESTINATION, 8, destination);
    set(bar + DMA_COUNT, 8, PAGE);
    set(bar + DMA_COMMAND, 8, 1 | direction | 4);
}

#endif
