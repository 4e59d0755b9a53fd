/*
 * The first and only process of a guest that is migrated: a program that keeps edu busy by VFIO without an IOMMU, and
 * checks every byte and every interrupt.
 *
 * Each round fills a page with bytes that follow from the round's number, has the device fetch it and write it to another
 * page, and compares. Each transfer ends with one message-signalled interrupt. Prints a line for each round: its number,
 * how many interrupts came, and how many of them found nothing done. It knows nothing of being moved.
 */
#include "edu.h"

static unsigned long events, idle;

/* The interrupt of one transfer. A move may signal one again that is still pending: it finds nothing done, or is it. */
static void
wait_for(int eventfd, uint32_t bit)
{
    for (;;) {
        uint64_t count = wait_events(eventfd);

        events += count;
        if (get(bar + IRQ_STATUS, 4) & bit) {
            break;
        }
        idle += count;
    }
    if (get(bar + DMA_COMMAND, 4) & 1) {
        errno = EBUSY;
        fail("an interrupt before its transfer's end");
    }
    set(bar + IRQ_ACK, 4, bit);
}

static void
transfer(int eventfd, uint64_t source, uint64_t destination, int direction)
{
    begin_transfer(source, destination, direction);
    wait_for(eventfd, DMA_INTERRUPT);
}

static void
fill(unsigned char *page, unsigned long round)
{
    uint64_t state = round * 0x9e3779b97f4a7c15ULL + 1;

    for (int at = 0; at < PAGE; at++) {
        state = state * 6364136223846793005ULL + 1442695040888963407ULL;
        page[at] = state >> 56;
    }
}

static void
work(void)
{
    unsigned char *memory = pages(3);
    int container, group, interrupt = eventfd(0, 0);
    uint64_t from, to;

    device = open_device(&container, &group);
    set(config + 4, 2, 6 | (get(config + 4, 2) & ~0x400));
    if (get(bar + ID, 4) != IDENTIFICATION) {
        errno = ENXIO;
        fail("the device's identification");
    }
    interrupts(VFIO_PCI_MSI_IRQ_INDEX, VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER, 1, interrupt);
    memset(memory, 0, 3 * PAGE);
    from = physical(memory);
    to = physical(memory + PAGE);
    for (unsigned long round = 1;; round++) {
        fill(memory, round);
        memset(memory + PAGE, (int)~round, PAGE);
        transfer(interrupt, from, BUFFER, TO_DEVICE);
        fill(memory + 2 * PAGE, round);
        if (memcmp(memory, memory + 2 * PAGE, PAGE) != 0) {
            errno = EIO;
            fail("comparing what the device has only read");
        }
        transfer(interrupt, BUFFER, to, FROM_DEVICE);
        if (memcmp(memory + PAGE, memory + 2 * PAGE, PAGE) != 0) {
            errno = EIO;
            fail("comparing what the device has written");
        }
        if (get(bar + IRQ_STATUS, 4) != 0) {
            errno = EIO;
            fail("an interrupt's cause is left");
        }
        printf("round %lu interrupts %lu idle %lu\n", round, events, idle);
    }
}

int
main(void)
{
    start("0x11e8");
    bind_function();
    work();
}
