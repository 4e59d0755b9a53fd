/*
 * The first and only process of a guest that is migrated: a program that keeps edu busy by VFIO without an IOMMU, and
 * checks every byte and every interrupt.
 *
 * Each round fills a page with bytes that follow from the round's number, has the device fetch it and write it to another
 * page, and compares. Each transfer ends with one message-signalled interrupt. Prints a line for each round: its number,
 * how many interrupts came, and how many of them found nothing done. It knows nothing of being moved.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/vfio.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#define ID 0x00
#define IRQ_STATUS 0x24
#define IRQ_ACK 0x64
#define DMA_SOURCE 0x80
#define DMA_DESTINATION 0x88
#define DMA_COUNT 0x90
#define DMA_COMMAND 0x98
#define BUFFER 0x40000
#define PAGE 4096
#define SECONDS 20

static char bdf[256];
static int device;
static uint64_t bar, config;

static void
fail(const char *what)
{
    printf("failed: %s: %s\n", what, strerror(errno));
    for (;;) {
        pause();
    }
}

static void
put(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY);

    if (fd < 0 || write(fd, text, strlen(text)) < 0) {
        fail(path);
    }
    close(fd);
}

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

static void
find_edu(void)
{
    DIR *all = opendir("/sys/bus/pci/devices");
    struct dirent *one;

    while (all != NULL && (one = readdir(all)) != NULL) {
        char path[512], text[16] = "";
        int fd;

        snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/device", one->d_name);
        fd = open(path, O_RDONLY);
        if (fd >= 0 && read(fd, text, sizeof(text) - 1) > 0 && strncmp(text, "0x11e8", 6) == 0) {
            snprintf(bdf, sizeof(bdf), "%s", one->d_name);
        }
        close(fd);
    }
    closedir(all);
    if (bdf[0] == '\0') {
        errno = ENODEV;
        fail("looking for edu");
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

static unsigned long events, idle;

/* The interrupt of one transfer. A move may signal one again that is still pending: it finds nothing done, or is it. */
static void
wait_for(int eventfd, uint32_t bit)
{
    struct pollfd ready = { .fd = eventfd, .events = POLLIN };
    uint64_t count;

    for (;;) {
        if (poll(&ready, 1, SECONDS * 1000) != 1 || read(eventfd, &count, sizeof(count)) != sizeof(count)) {
            errno = ETIMEDOUT;
            fail("waiting for an interrupt");
        }
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
    unsigned char *memory = mmap(NULL, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_LOCKED, -1, 0);
    int container, group, interrupt = eventfd(0, 0);
    uint64_t from, to;

    device = open_device(&container, &group);
    set(config + 4, 2, 6 | (get(config + 4, 2) & ~0x400));
    if (get(bar + ID, 4) != 0x010000ed) {
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
        transfer(interrupt, from, BUFFER, 0);
        fill(memory + 2 * PAGE, round);
        if (memcmp(memory, memory + 2 * PAGE, PAGE) != 0) {
            errno = EIO;
            fail("comparing what the device has only read");
        }
        transfer(interrupt, BUFFER, to, 2);
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
    char path[512];

    setvbuf(stdout, NULL, _IOLBF, 0);
    mkdir("/proc", 0755);
    mkdir("/sys", 0755);
    mkdir("/dev", 0755);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sysfs", "/sys", "sysfs", 0, NULL);
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    find_edu();
    put("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "1");
    snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/driver_override", bdf);
    put(path, "vfio-pci");
    put("/sys/bus/pci/drivers_probe", bdf);
    work();
}
