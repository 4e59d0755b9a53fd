/*
 * Drives edu by VFIO without an IOMMU, in a guest inside the test machine.
 *
 * Factorials by MSI and by INTx, DMA both ways by physical address, then the driver is taken from the function and given
 * back and all is done again. It knows nothing of what is below the function.
 */
#include "edu.h"

static void
wait_for(int eventfd, uint32_t bit)
{
    wait_events(eventfd);
    if ((get(bar + IRQ_STATUS, 4) & bit) == 0) {
        errno = EIO;
        fail("looking at the interrupt's cause");
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
factorial(int eventfd, int n, const char *by)
{
    set(bar + STATUS, 4, 0x80);
    set(bar + FACTORIAL, 4, n);
    wait_for(eventfd, 1);
    printf("result: %d! by %s = %u\n", n, by, (unsigned)get(bar + FACTORIAL, 4));
}

static void
work(const char *when)
{
    unsigned char *memory = pages(2);
    int container, group, events = eventfd(0, 0);

    device = open_device(&container, &group);
    set(config + 4, 2, 6 | (get(config + 4, 2) & ~0x400));
    printf("result: %s, identification %#x\n", when, (unsigned)get(bar + ID, 4));
    interrupts(VFIO_PCI_MSI_IRQ_INDEX, VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER, 1, events);
    factorial(events, 10, "MSI");
    for (int at = 0; at < PAGE; at++) {
        memory[at] = (unsigned char)(at * 7 + at / 256);
    }
    memset(memory + PAGE, 0, PAGE);
    transfer(events, physical(memory), BUFFER, TO_DEVICE);
    transfer(events, BUFFER, physical(memory + PAGE), FROM_DEVICE);
    printf("result: DMA there and back %s\n", memcmp(memory, memory + PAGE, PAGE) == 0 ? "equal" : "differs");
    interrupts(VFIO_PCI_MSI_IRQ_INDEX, VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER, 0, -1);
    interrupts(VFIO_PCI_INTX_IRQ_INDEX, VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER, 1, events);
    factorial(events, 7, "INTx");
    interrupts(VFIO_PCI_INTX_IRQ_INDEX, VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER, 0, -1);
    close(device);
    close(group);
    close(container);
    close(events);
    munmap(memory, 2 * PAGE);
}

int
main(void)
{
    start("0x11e8");
    bind_function();
    work("bound");
    print_config();
    put("/sys/bus/pci/drivers/vfio-pci/unbind", bdf);
    put("/sys/bus/pci/drivers_probe", bdf);
    work("bound again");
    done();
}
