/*
 * The door to a function under kernel VFIO: registers by pread and pwrite on
 * the device fd, guest memory by the ioctls of a type1 container or an
 * iommufd. Opening, interrupts and everything else is Python's.
 */
#ifndef VS_KERNEL_H
#define VS_KERNEL_H

#include <stddef.h>
#include <stdint.h>

#include "door.h"

/*
 * The ways into the kernel, so that a test can stand in its place. Each
 * returns what the call returns, or a negative errno.
 */
struct vs_kernel_calls {
    int (*ioctl)(int fd, unsigned long request, void *arg);
    long (*pread)(int fd, void *buf, size_t count, uint64_t offset);
    long (*pwrite)(int fd, const void *buf, size_t count, uint64_t offset);
};

/* ioctl(2), begun again after a signal: its result or a negative errno. */
int vs_ioctl(int fd, unsigned long request, void *arg);

/*
 * The fds stay the caller's and must outlive the door. `iommu_fd` is a type1
 * container when `ioas_id` is 0 (no IOAS has that id), else an iommufd.
 * `calls` NULL: the kernel.
 */
struct vs_door *vs_kernel_open(int device_fd, int iommu_fd, uint32_t ioas_id, size_t max_maps,
                               const struct vs_kernel_calls *calls);
/* `offset`: where the region lies in the device fd. */
int vs_kernel_set_region(struct vs_door *door, unsigned index, uint64_t offset, uint64_t size);
/* The device does not answer any more: accesses fail, maps are only written down. */
void vs_kernel_mark_gone(struct vs_door *door);

#endif
