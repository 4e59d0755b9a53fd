/*
 * Kernel VFIO. Layouts and numbers: linux/vfio.h and linux/iommufd.h, written
 * down here because the headers of the oldest system that we build on lack
 * the second one.
 *
 * A client may cut its file short after the map. The pages stay pinned and the
 * device goes on; this process never loads or stores through a mapping of its
 * memory. Through one of a BAR it stores in wide writes alone: the caller sees
 * to it that memory space is on.
 */
#include "kernel.h"
#include "wide.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define NUM_REGIONS 9
#define PROT_BITS 3U

#define VFIO_IOMMU_MAP_DMA 0x3b71UL
#define VFIO_IOMMU_UNMAP_DMA 0x3b72UL
#define IOMMU_IOAS_MAP 0x3b85UL
#define IOMMU_IOAS_UNMAP 0x3b86UL
#define IOMMU_IOAS_MAP_FILE 0x3b8fUL

#define MAP_FIXED_IOVA 1U
#define MAP_WRITEABLE 2U
#define MAP_READABLE 4U

struct type1_map {
    uint32_t argsz, flags;
    uint64_t vaddr, iova, size;
};
struct type1_unmap {
    uint32_t argsz, flags;
    uint64_t iova, size;
};
struct ioas_map {
    uint32_t size, flags, ioas_id, reserved;
    uint64_t user_va, length, iova;
};
struct ioas_map_file {
    uint32_t size, flags, ioas_id;
    int32_t fd;
    uint64_t start, length, iova;
};
struct ioas_unmap {
    uint32_t size, ioas_id;
    uint64_t iova, length;
};
_Static_assert(sizeof(struct type1_map) == 32, "vfio_iommu_type1_dma_map");
_Static_assert(sizeof(struct type1_unmap) == 24, "vfio_iommu_type1_dma_unmap");
_Static_assert(sizeof(struct ioas_map) == 40, "iommu_ioas_map");
_Static_assert(sizeof(struct ioas_map_file) == 40, "iommu_ioas_map_file");
_Static_assert(sizeof(struct ioas_unmap) == 24, "iommu_ioas_unmap");

struct vs_kernel {
    struct vs_door door;        /* first: a door is cast to it */
    struct vs_kernel_calls calls;
    int device_fd, iommu_fd;
    uint32_t ioas_id;
    bool no_map_file;           /* this kernel has no IOMMU_IOAS_MAP_FILE; guarded by the door's dma_lock */
    struct { uint64_t offset, size; } regions[NUM_REGIONS];
    pthread_mutex_t wide_lock;
    char *wide_page;            /* the page of the last wide write, or NULL */
    uint64_t wide_at;           /* where it lies in the device fd */
};

int
vs_ioctl(int fd, unsigned long request, void *arg)
{
    int ret;

    do {
        ret = ioctl(fd, request, arg);
    } while (ret < 0 && errno == EINTR);
    return ret < 0 ? -errno : ret;
}

static long
kernel_pread(int fd, void *buf, size_t count, uint64_t offset)
{
    ssize_t n;

    do {
        n = pread(fd, buf, count, (off_t)offset);
    } while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : n;
}

static long
kernel_pwrite(int fd, const void *buf, size_t count, uint64_t offset)
{
    ssize_t n;

    do {
        n = pwrite(fd, buf, count, (off_t)offset);
    } while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : n;
}

static const struct vs_kernel_calls the_kernel = { vs_ioctl, kernel_pread, kernel_pwrite };

/* One call for one access: the kernel makes an aligned 1, 2, 4 or 8 bytes one access of the device, and splits the rest. */
static int
kernel_access(struct vs_door *door, unsigned region, uint64_t offset, void *buf, size_t count, bool write)
{
    struct vs_kernel *kernel = (struct vs_kernel *)door;
    bool single = count <= 8;
    char *at = buf;

    if (region >= NUM_REGIONS || offset > kernel->regions[region].size ||
        count > kernel->regions[region].size - offset) {
        return -EINVAL;
    }
    offset += kernel->regions[region].offset;
    while (count > 0) {
        long n = write ? kernel->calls.pwrite(kernel->device_fd, at, count, offset)
                       : kernel->calls.pread(kernel->device_fd, at, count, offset);

        if (n < 0) {
            return (int)n;
        }
        if (n == 0 || (size_t)n > count || (single && (size_t)n != count)) {
            return -EIO;    /* half a register is nothing to go on from */
        }
        at += n;
        offset += (uint64_t)n;
        count -= (size_t)n;
    }
    return 0;
}

/* --- 16 bytes --- */

/* The kernel's write is 8 bytes at most, so the store goes through a mapping: the last one is kept. */
static int
wide_page(struct vs_kernel *kernel, uint64_t at, uint64_t size)
{
    void *page;

    if (kernel->wide_page != NULL && kernel->wide_at == at) {
        return 0;
    }
    page = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, kernel->device_fd, (off_t)at);
    if (page == MAP_FAILED) {
        return -errno;
    }
    madvise(page, size, MADV_DONTDUMP);
    if (kernel->wide_page != NULL) {
        munmap(kernel->wide_page, size);
    }
    kernel->wide_page = page;
    kernel->wide_at = at;
    return 0;
}

static int
kernel_wide(struct vs_door *door, unsigned region, uint64_t offset, const uint8_t data[16])
{
    struct vs_kernel *kernel = (struct vs_kernel *)door;
    uint64_t size = (uint64_t)sysconf(_SC_PAGESIZE), within = offset % size;
    int ret;

    if (region >= NUM_REGIONS || offset > kernel->regions[region].size ||
        VS_WIDE > kernel->regions[region].size - offset) {
        return -EINVAL;
    }
    pthread_mutex_lock(&kernel->wide_lock);
    ret = wide_page(kernel, kernel->regions[region].offset + offset - within, size);
    if (ret == 0) {
        ret = vs_store_wide(kernel->wide_page + within, data);
    }
    pthread_mutex_unlock(&kernel->wide_lock);
    return ret;
}

/* --- guest memory --- */

static int
type1_map(struct vs_kernel *kernel, const struct vs_map *map)
{
    struct type1_map arg = { .argsz = sizeof(arg), .flags = map->prot & PROT_BITS,  /* the same bits: 1 read, 2 write */
                             .vaddr = (uintptr_t)map->vaddr, .iova = map->iova, .size = map->size };

    return kernel->calls.ioctl(kernel->iommu_fd, VFIO_IOMMU_MAP_DMA, &arg);
}

static int
type1_unmap(struct vs_kernel *kernel, const struct vs_map *map)
{
    struct type1_unmap arg = { .argsz = sizeof(arg), .iova = map->iova, .size = map->size };
    int ret = kernel->calls.ioctl(kernel->iommu_fd, VFIO_IOMMU_UNMAP_DMA, &arg);

    return ret == 0 && arg.size != map->size ? -EIO : ret;
}

static uint32_t
ioas_flags(const struct vs_map *map)
{
    return MAP_FIXED_IOVA | (map->prot & 1 ? MAP_READABLE : 0) | (map->prot & 2 ? MAP_WRITEABLE : 0);
}

/* -ENOTTY: this kernel cannot; -EINVAL: perhaps this kind of file cannot. */
static int
ioas_map_file(struct vs_kernel *kernel, const struct vs_map *map)
{
    struct ioas_map_file arg = { .size = sizeof(arg), .flags = ioas_flags(map), .ioas_id = kernel->ioas_id,
                                 .fd = map->fd, .start = map->fd_offset, .length = map->size, .iova = map->iova };
    int ret;

    if (kernel->no_map_file) {
        return -ENOTTY;
    }
    ret = kernel->calls.ioctl(kernel->iommu_fd, IOMMU_IOAS_MAP_FILE, &arg);
    kernel->no_map_file = ret == -ENOTTY;
    return ret;
}

static int
ioas_map(struct vs_kernel *kernel, const struct vs_map *map)
{
    struct ioas_map arg = { .size = sizeof(arg), .flags = ioas_flags(map), .ioas_id = kernel->ioas_id,
                            .user_va = (uintptr_t)map->vaddr, .length = map->size, .iova = map->iova };

    return kernel->calls.ioctl(kernel->iommu_fd, IOMMU_IOAS_MAP, &arg);
}

static int
ioas_unmap(struct vs_kernel *kernel, const struct vs_map *map)
{
    struct ioas_unmap arg = { .size = sizeof(arg), .ioas_id = kernel->ioas_id, .iova = map->iova,
                              .length = map->size };
    int ret = kernel->calls.ioctl(kernel->iommu_fd, IOMMU_IOAS_UNMAP, &arg);

    return ret == 0 && arg.length != map->size ? -EIO : ret;
}

static void
forget_vaddr(struct vs_map *map)
{
    if (map->vaddr != NULL) {
        munmap(map->vaddr, map->size);
        map->vaddr = NULL;
    }
}

/*
 * mmap is asked in any case, also where the kernel takes the file itself: it
 * checks what the client's fd may be used for (open mode, seals), which
 * IOMMU_IOAS_MAP_FILE does not. The pages are pinned where the kernel finds
 * them through the mapping, so that one stays as long as the map.
 */
static int
kernel_map(struct vs_door *door, struct vs_map *map)
{
    struct vs_kernel *kernel = (struct vs_kernel *)door;
    int prot = (map->prot & 1 ? PROT_READ : 0) | (map->prot & 2 ? PROT_WRITE : 0);
    int ret;

    if (map->fd < 0) {
        return 0;   /* a peer's BAR, or memory that is not shared: written down, and out of the device's reach */
    }
    map->vaddr = mmap(NULL, map->size, prot, MAP_SHARED, map->fd, (off_t)map->fd_offset);
    if (map->vaddr == MAP_FAILED) {
        map->vaddr = NULL;
        return -errno;
    }
    madvise(map->vaddr, map->size, MADV_DONTDUMP);
    if (kernel->ioas_id == 0) {
        ret = type1_map(kernel, map);
    } else {
        ret = ioas_map_file(kernel, map);
        if (ret == 0) {
            forget_vaddr(map);
        } else if (ret == -ENOTTY || ret == -EINVAL) {
            ret = ioas_map(kernel, map);
        }
    }
    if (ret < 0) {
        forget_vaddr(map);
    }
    return ret < 0 ? ret : 0;
}

static int
kernel_unmap(struct vs_door *door, struct vs_map *map)
{
    struct vs_kernel *kernel = (struct vs_kernel *)door;
    int ret;

    if (map->fd < 0) {
        return 0;
    }
    ret = kernel->ioas_id == 0 ? type1_unmap(kernel, map) : ioas_unmap(kernel, map);
    forget_vaddr(map);
    return ret < 0 ? ret : 0;
}

static void
kernel_close(struct vs_door *door)
{
    struct vs_kernel *kernel = (struct vs_kernel *)door;

    if (kernel->wide_page != NULL) {
        munmap(kernel->wide_page, (size_t)sysconf(_SC_PAGESIZE));
    }
    pthread_mutex_destroy(&kernel->wide_lock);
    free(door);
}

static const struct vs_door_ops kernel_ops = {
    .access = kernel_access,
    .wide = kernel_wide,
    .map = kernel_map,
    .unmap = kernel_unmap,
    .close = kernel_close,
};

struct vs_door *
vs_kernel_open(int device_fd, int iommu_fd, uint32_t ioas_id, size_t max_maps, const struct vs_kernel_calls *calls)
{
    struct vs_kernel *kernel = calloc(1, sizeof(*kernel));

    if (kernel == NULL || pthread_mutex_init(&kernel->wide_lock, NULL) != 0 || vs_door_init(&kernel->door, &kernel_ops, max_maps) < 0) {
        free(kernel);
        return NULL;
    }
    kernel->calls = calls != NULL ? *calls : the_kernel;
    kernel->device_fd = device_fd;
    kernel->iommu_fd = iommu_fd;
    kernel->ioas_id = ioas_id;
    return &kernel->door;
}

int
vs_kernel_set_region(struct vs_door *door, unsigned index, uint64_t offset, uint64_t size)
{
    struct vs_kernel *kernel = (struct vs_kernel *)door;

    if (index >= NUM_REGIONS || offset + size < offset || offset + size > INT64_MAX) {
        return -EINVAL;
    }
    kernel->regions[index].offset = offset;
    kernel->regions[index].size = size;
    return 0;
}

void
vs_kernel_mark_gone(struct vs_door *door)
{
    atomic_store(&door->gone, true);
}
