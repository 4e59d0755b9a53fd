/*
 * The door of a model: no device behind it, only the client's memory.
 *
 * A client may cut its file short after it was mapped; a plain load would
 * then raise SIGBUS. Copies go through process_vm_readv on ourselves instead:
 * the kernel answers EFAULT for a page that is not there.
 */
#include "door.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

static int
local_access(struct vs_door *door, unsigned region, uint64_t offset, void *buf, size_t count, bool write)
{
    (void)door, (void)region, (void)offset, (void)buf, (void)count, (void)write;
    return -ENXIO;
}

static int
local_map(struct vs_door *door, struct vs_map *map)
{
    int prot = (map->prot & 1 ? PROT_READ : 0) | (map->prot & 2 ? PROT_WRITE : 0);

    (void)door;
    if (map->fd < 0) {
        return 0;
    }
    map->vaddr = mmap(NULL, map->size, prot, MAP_SHARED, map->fd, (off_t)map->fd_offset);
    if (map->vaddr == MAP_FAILED) {
        map->vaddr = NULL;
        return -errno;
    }
    return 0;
}

static int
local_unmap(struct vs_door *door, struct vs_map *map)
{
    (void)door;
    return map->vaddr != NULL && munmap(map->vaddr, map->size) < 0 ? -errno : 0;
}

static void
local_close(struct vs_door *door)
{
    free(door);
}

static const struct vs_door_ops local_ops = {
    .access = local_access,
    .map = local_map,
    .unmap = local_unmap,
    .close = local_close,
    .by_messages = true,
};

struct vs_door *
vs_local_open(size_t max_maps)
{
    struct vs_door *door = calloc(1, sizeof(*door));

    if (door != NULL && vs_door_init(door, &local_ops, max_maps) < 0) {
        free(door);
        return NULL;
    }
    return door;
}

static int
copy_piece(const struct vs_map *map, uint64_t offset, void *buf, size_t len, bool write)
{
    struct iovec ours = { buf, len };
    struct iovec theirs = { (char *)map->vaddr + offset, len };
    ssize_t n = write ? process_vm_writev(getpid(), &ours, 1, &theirs, 1, 0)
                      : process_vm_readv(getpid(), &ours, 1, &theirs, 1, 0);

    if (n < 0) {
        return -errno;
    }
    return (size_t)n == len ? 0 : -EFAULT;
}

int
vs_local_copy(struct vs_door *door, uint64_t iova, void *buf, size_t len, bool write, size_t *done)
{
    int ret = 0;

    *done = 0;
    if (len > 0 && iova + (len - 1) < iova) {
        return -EFAULT;
    }
    pthread_mutex_lock(&door->dma_lock);
    for (size_t i = 0; i < door->nr_maps && *done < len && ret == 0; i++) {
        const struct vs_map *map = &door->maps[i];
        uint64_t at = iova + *done, offset;
        size_t piece;

        if (map->iova + (map->size - 1) < at) {
            continue;
        }
        if (map->iova > at) {
            break;
        }
        if ((map->prot & (write ? 2U : 1U)) == 0) {
            ret = -EACCES;
        } else if (map->vaddr == NULL) {
            ret = -EREMOTE;
        } else {
            offset = at - map->iova;
            piece = len - *done < map->size - offset ? len - *done : map->size - offset;
            ret = copy_piece(map, offset, (char *)buf + *done, piece, write);
            *done += ret == 0 ? piece : 0;
        }
    }
    pthread_mutex_unlock(&door->dma_lock);
    return ret == 0 && *done < len ? -EFAULT : ret;
}
