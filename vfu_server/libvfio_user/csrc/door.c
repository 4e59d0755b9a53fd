/* What all doors share: the sorted table of the client's DMA maps, and the guards around the operations. */
#include "door.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int
vs_door_init(struct vs_door *door, const struct vs_door_ops *ops, size_t max_maps)
{
    memset(door, 0, sizeof(*door));
    door->ops = ops;
    door->max_maps = max_maps;
    return -pthread_mutex_init(&door->dma_lock, NULL);
}

void
vs_door_close(struct vs_door *door)
{
    vs_door_dma_unmap_all(door);
    free(door->maps);
    door->maps = NULL;
    pthread_mutex_destroy(&door->dma_lock);
    door->ops->close(door);
}

int
vs_door_access(struct vs_door *door, unsigned region, uint64_t offset, void *buf, size_t count, bool write)
{
    int ret;

    if (atomic_load_explicit(&door->gone, memory_order_relaxed)) {
        return -ENODEV;
    }
    atomic_fetch_add_explicit(&door->requests, 1, memory_order_relaxed);
    ret = door->ops->access(door, region, offset, buf, count, write);
    if (ret < 0) {
        atomic_fetch_add_explicit(&door->errors, 1, memory_order_relaxed);
    }
    return ret;
}

int
vs_door_wide(struct vs_door *door, unsigned region, uint64_t offset, const uint8_t data[16])
{
    int ret;

    if (offset % 16 != 0) {
        return -EINVAL;
    }
    if (atomic_load_explicit(&door->gone, memory_order_relaxed)) {
        return -ENODEV;
    }
    atomic_fetch_add_explicit(&door->requests, 1, memory_order_relaxed);
    ret = door->ops->wide != NULL ? door->ops->wide(door, region, offset, data) : -ENOTSUP;
    if (ret < 0) {
        atomic_fetch_add_explicit(&door->errors, 1, memory_order_relaxed);
    }
    return ret;
}

/* Index of the first map that ends behind `iova`. */
static size_t
first_behind(const struct vs_door *door, uint64_t iova)
{
    size_t low = 0, high = door->nr_maps;

    while (low < high) {
        size_t mid = low + (high - low) / 2;
        const struct vs_map *map = &door->maps[mid];

        if (map->iova + (map->size - 1) < iova) {
            low = mid + 1;
        } else {
            high = mid;
        }
    }
    return low;
}

static int
grow(struct vs_door *door)
{
    size_t cap = door->cap_maps == 0 ? 64 : door->cap_maps * 2;
    struct vs_map *maps;

    if (door->nr_maps < door->cap_maps) {
        return 0;
    }
    maps = realloc(door->maps, cap * sizeof(*maps));
    if (maps == NULL) {
        return -ENOMEM;
    }
    door->maps = maps;
    door->cap_maps = cap;
    return 0;
}

static int
check_range(uint64_t iova, uint64_t size)
{
    if (size == 0 || (iova | size) % VS_PAGE_SIZE != 0) {
        return -EINVAL;
    }
    /* The last byte must have an address; a range that ends at 2^64 is fine. */
    return iova + (size - 1) < iova ? -EOVERFLOW : 0;
}

static int
add_map(struct vs_door *door, uint64_t iova, uint64_t size, uint32_t prot, int fd, uint64_t fd_offset, bool client)
{
    struct vs_map map = { .iova = iova, .size = size, .prot = prot, .fd = fd, .fd_offset = fd_offset };
    size_t at;
    int ret = check_range(iova, size);

    if (ret < 0) {
        return ret;
    }
    if (prot == 0 || (prot & ~3U) != 0 || fd_offset % VS_PAGE_SIZE != 0) {
        return -EINVAL;
    }
    if (fd_offset + size < size || fd_offset + size > INT64_MAX) {
        return -EOVERFLOW;
    }
    pthread_mutex_lock(&door->dma_lock);
    at = first_behind(door, iova);
    if (client && door->lent > 0) {
        ret = -EAGAIN;
    } else if (at < door->nr_maps && door->maps[at].iova <= iova + (size - 1)) {
        ret = -EEXIST;
    } else if (door->nr_maps >= door->max_maps) {
        ret = -ENOSPC;
    } else {
        ret = grow(door);
    }
    /* A device that is gone reaches no memory: the client's books are kept, so that it can go on. */
    if (ret == 0 && !atomic_load(&door->gone)) {
        ret = door->ops->map(door, &map);
    }
    if (ret == 0) {
        memmove(&door->maps[at + 1], &door->maps[at], (door->nr_maps - at) * sizeof(map));
        door->maps[at] = map;
        door->nr_maps++;
        atomic_fetch_add(&door->dma_bytes, size);
        if (fd < 0 && door->ops->by_messages) {
            atomic_fetch_add(&door->fdless_maps, 1);
        }
    }
    pthread_mutex_unlock(&door->dma_lock);
    return ret;
}

int
vs_door_dma_map(struct vs_door *door, uint64_t iova, uint64_t size, uint32_t prot, int fd, uint64_t fd_offset)
{
    return add_map(door, iova, size, prot, fd, fd_offset, false);
}

int
vs_door_client_map(struct vs_door *door, uint64_t iova, uint64_t size, uint32_t prot, int fd, uint64_t fd_offset)
{
    return add_map(door, iova, size, prot, fd, fd_offset, true);
}

/* Removes maps [first, last). The first error is reported, but every map leaves the table: the client's view must not differ. */
static int
remove_maps(struct vs_door *door, size_t first, size_t last, uint64_t *unmapped)
{
    int ret = 0;

    if (first == last) {
        return 0;   /* also where there is no table yet */
    }
    for (size_t i = first; i < last; i++) {
        struct vs_map *map = &door->maps[i];
        int err = door->ops->unmap(door, map);

        if (err < 0 && ret == 0 && !atomic_load(&door->gone)) {
            ret = err;
        }
        *unmapped += map->size;
        if (map->fd >= 0) {
            close(map->fd);
        } else if (door->ops->by_messages) {
            atomic_fetch_sub(&door->fdless_maps, 1);
        }
    }
    atomic_fetch_sub(&door->dma_bytes, *unmapped);
    memmove(&door->maps[first], &door->maps[last], (door->nr_maps - last) * sizeof(*door->maps));
    door->nr_maps -= last - first;
    return ret;
}

static int
remove_range(struct vs_door *door, uint64_t iova, uint64_t size, uint64_t *unmapped, bool client)
{
    size_t first, last;
    int ret = check_range(iova, size);

    *unmapped = 0;
    if (ret < 0) {
        return ret;
    }
    pthread_mutex_lock(&door->dma_lock);
    first = first_behind(door, iova);
    last = first;
    ret = client && door->lent > 0 ? -EAGAIN : 0;
    while (ret == 0 && last < door->nr_maps && door->maps[last].iova <= iova + (size - 1)) {
        const struct vs_map *map = &door->maps[last];

        if (map->iova < iova || map->iova + (map->size - 1) > iova + (size - 1)) {
            ret = -EINVAL;
            break;
        }
        last++;
    }
    if (ret == 0) {
        ret = remove_maps(door, first, last, unmapped);
    }
    pthread_mutex_unlock(&door->dma_lock);
    return ret;
}

int
vs_door_dma_unmap(struct vs_door *door, uint64_t iova, uint64_t size, uint64_t *unmapped)
{
    return remove_range(door, iova, size, unmapped, false);
}

int
vs_door_client_unmap(struct vs_door *door, uint64_t iova, uint64_t size)
{
    uint64_t unmapped;

    return remove_range(door, iova, size, &unmapped, true);
}

static int
remove_all(struct vs_door *door, bool client)
{
    uint64_t unmapped = 0;
    int ret;

    pthread_mutex_lock(&door->dma_lock);
    ret = client && door->lent > 0 ? -EAGAIN : remove_maps(door, 0, door->nr_maps, &unmapped);
    pthread_mutex_unlock(&door->dma_lock);
    return ret;
}

int
vs_door_dma_unmap_all(struct vs_door *door)
{
    return remove_all(door, false);
}

int
vs_door_client_unmap_all(struct vs_door *door)
{
    return remove_all(door, true);
}

void
vs_door_lend(struct vs_door *door, int by)
{
    pthread_mutex_lock(&door->dma_lock);
    door->lent += (unsigned)by;
    pthread_mutex_unlock(&door->dma_lock);
}

size_t
vs_door_dma_list(struct vs_door *door, uint64_t iova, uint64_t size, struct vs_map *maps, size_t max)
{
    size_t n = 0;

    if (size == 0) {
        return 0;
    }
    pthread_mutex_lock(&door->dma_lock);
    for (size_t i = first_behind(door, iova); i < door->nr_maps && door->maps[i].iova <= iova + (size - 1); i++, n++) {
        if (n < max) {
            maps[n] = door->maps[i];
        }
    }
    pthread_mutex_unlock(&door->dma_lock);
    return n;
}

bool
vs_door_gone(struct vs_door *door)
{
    return atomic_load(&door->gone);
}

void
vs_door_numbers(struct vs_door *door, uint64_t numbers[4])
{
    pthread_mutex_lock(&door->dma_lock);
    numbers[0] = door->nr_maps;
    pthread_mutex_unlock(&door->dma_lock);
    numbers[1] = atomic_load(&door->dma_bytes);
    numbers[2] = atomic_load(&door->requests);
    numbers[3] = atomic_load(&door->errors);
}
