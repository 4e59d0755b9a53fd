/*
 * A function driven by VFIO without an IOMMU, in a guest inside the test machine: registers by read and write, interrupts
 * by eventfd, memory by physical address. One function, found by inner.h.
 */
#ifndef NOIOMMU_H
#define NOIOMMU_H

#include "inner.h"

#include <linux/vfio.h>
#include <poll.h>
#include <stdint.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#define PAGE 4096

static int device;
static uint64_t bar, config;

static inline uint64_t
get(uint64_t at, int width)
{
    uint64_t value = 0;

    if (pread(device, &value, width, at) != width) {
        fail("reading a register");
    }
    return value;
}

static inline void
set(uint64_t at, int width, uint64_t value)
{
    if (pwrite(device, &value, width, at) != width) {
        fail("writing a register");
    }
}

/* Give the function to vfio-pci. */
static inline void
bind_function(void)
{
    char path[512];

    put("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "1");
    snprintf(path, sizeof(path), DEVICES "/%s/driver_override", bdf);
    put(path, "vfio-pci");
    put("/sys/bus/pci/drivers_probe", bdf);
}

/* The file descriptors of container and group have to be kept; the device's is returned. */
static inline int
open_device(int *container, int *group)
{
    char path[512], link[512] = "";
    struct vfio_region_info region = { .argsz = sizeof(region) };
    int fd;

    snprintf(path, sizeof(path), DEVICES "/%s/iommu_group", bdf);
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
        fail("opening the function");
    }
    region.index = VFIO_PCI_BAR0_REGION_INDEX;
    ioctl(fd, VFIO_DEVICE_GET_REGION_INFO, &region);
    bar = region.offset;
    region.index = VFIO_PCI_CONFIG_REGION_INDEX;
    ioctl(fd, VFIO_DEVICE_GET_REGION_INFO, &region);
    config = region.offset;
    return fd;
}

static inline void
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

/* How often an eventfd was signalled since the last time, at least once. */
static inline uint64_t
wait_events(int eventfd)
{
    struct pollfd ready = { .fd = eventfd, .events = POLLIN };
    uint64_t count;

    if (poll(&ready, 1, SECONDS * 1000) != 1 || read(eventfd, &count, sizeof(count)) != sizeof(count)) {
        errno = ETIMEDOUT;
        fail("waiting for an interrupt");
    }
    return count;
}

static inline uint64_t
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

static inline unsigned char *
pages(int count)
{
    return mmap(NULL, count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_LOCKED, -1, 0);
}

#endif
