/*
 * Drives edu by VFIO without an IOMMU, in a guest inside the test machine.
 *
 * Factorials by MSI and by INTx, DMA both ways by physical address, then the driver is taken from the function and given
 * back and all is done again. It knows nothing of what is below the function.
 */
#include "inner.h"

#include <linux/vfio.h>
#include <poll.h>
#include <stdint.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#define ID 0x00
#define FACTORIAL 0x08
#define STATUS 0x20
#define IRQ_STATUS 0x24
#define IRQ_ACK 0x64
#define DMA_SOURCE 0x80
#define DMA_DESTINATION 0x88
#define DMA_COUNT 0x90
#define DMA_COMMAND 0x98
#define BUFFER 0x40000
#define PAGE 4096

static int device;
static uint64_t bar, config;

static uint64_t
get(uint64_t at, int width)
{
    uint64_t value = 0;

    if (pread(device, &value, width, at) != width) {
        fail("reading a register");
    }
    return value;
}

static void
set(uint64_t at, int width, uint64_t value)
{
    if (pwrite(device, &value, width, at) != width) {
        fail("writing a register");
    }
}

static int
open_device(int *container, int *group)
{
    char path[512], link[512] = "";
    struct vfio_region_info region = { .argsz = sizeof(region) };
    int fd;

    snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/iommu_group", bdf);
    if (readlink(path, link, sizeof(link) - 1) < 0) {
        fail(path);
    }
    snprintf(path, sizeof(path), "/dev/vfio/noiommu-%s", strrchr(link, '/') + 1);
    *container = open("/dev/vfio/vfio", O_RDWR);
    *group = open(path, O_RDWR);
    if (*group < 0 || ioctl(*group, VFIO_GROUP_SET_CONTAINER, container) ||
        ioctl(*container, VFIO_SET_IOMMU, VFIO_NOIOMMU_IOMMU)) {
        fail(path);
    }
    fd = ioctl(*group, VFIO_GROUP_GET_DEVICE_FD, bdf);
    if (fd < 0) {
        fail("opening edu");
    }
    region.index = VFIO_PCI_BAR0_REGION_INDEX;
    ioctl(fd, VFIO_DEVICE_GET_REGION_INFO, &region);
    bar = region.offset;
    region.index = VFIO_PCI_CONFIG_REGION_INDEX;
    ioctl(fd, VFIO_DEVICE_GET_REGION_INFO, &region);
    config = region.offset;
    return fd;
}

static void
interrupts(int index, int flags, int count, int fd)
{
    char buffer[sizeof(struct vfio_irq_set) + sizeof(int)];
    struct vfio_irq_set *request = (struct vfio_irq_set *)buffer;

    *request = (struct vfio_irq_set){ .argsz = sizeof(buffer), .flags = flags, .index = index, .count = count };
    memcpy(request->data, &fd, sizeof(fd));
    if (ioctl(device, VFIO_DEVICE_SET_IRQS, request)) {
        fail("setting up interrupts");
    }
}

static void
wait_for(int eventfd, uint32_t bit)
{
    struct pollfd ready = { .fd = eventfd, .events = POLLIN };
    uint64_t count;

    if (poll(&ready, 1, SECONDS * 1000) != 1 || read(eventfd, &count, sizeof(count)) != sizeof(count)) {
        errno = ETIMEDOUT;
        fail("waiting for an interrupt");
    }
    if ((get(bar + IRQ_STATUS, 4) & bit) == 0) {
        errno = EIO;
        fail("looking at the interrupt's cause");
    }
    set(bar + IRQ_ACK, 4, bit);
}

static uint64_t
physical(const void *page)
{
    uint64_t entry = 0;
    int fd = open("/proc/self/pagemap", O_RDONLY);

    if (fd < 0 || pread(fd, &entry, 8, (uintptr_t)page / PAGE * 8) != 8 || !(entry >> 63)) {
        fail("/proc/self/pagemap");
    }
    close(fd);
    return (entry & ((1ULL << 55) - 1)) * PAGE;
}

static void
transfer(int eventfd, uint64_t source, uint64_t destination, int direction)
{
    set(bar + DMA_SOURCE, 8, source);
    set(bar + DMA_DESTINATION, 8, destination);
    set(bar + DMA_COUNT, 8, PAGE);
    set(bar + DMA_COMMAND, 8, 1 | direction | 4);
    wait_for(eventfd, 0x100);
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
    unsigned char *memory = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_LOCKED, -1, 0);
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
    transfer(events, physical(memory), BUFFER, 0);
    transfer(events, BUFFER, physical(memory + PAGE), 2);
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
    char path[512];

    start("0x11e8");
    put("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "1");
    snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/driver_override", bdf);
    put(path, "vfio-pci");
    put("/sys/bus/pci/drivers_probe", bdf);
    work("bound");
    print_config();
    put("/sys/bus/pci/drivers/vfio-pci/unbind", bdf);
    put("/sys/bus/pci/drivers_probe", bdf);
    work("bound again");
    done();
}
