/*
 * A door to the device: what the pump needs of it without Python. Each kind
 * (kernel VFIO, another vfio-user server, plain memory for a model) fills in
 * the operations; the bookkeeping of the client's DMA maps is common.
 *
 * All functions return 0 (or a count) or a negative errno.
 */
#ifndef VS_DOOR_H
#define VS_DOOR_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define VS_PAGE_SIZE 4096ULL

struct vs_map {
    uint64_t iova;
    uint64_t size;
    uint64_t fd_offset;
    uint32_t prot;  /* VFIO_USER_F_DMA_REGION_READ 1, _WRITE 2 */
    int fd;         /* owned; -1: reachable by messages only */
    void *vaddr;    /* where the door has mapped it, or NULL */
};

struct vs_door;

struct vs_door_ops {
    int (*access)(struct vs_door *door, unsigned region, uint64_t offset, void *buf, size_t count, bool write);
    int (*wide)(struct vs_door *door, unsigned region, uint64_t offset, const uint8_t data[16]);    /* NULL: cannot */
    int (*map)(struct vs_door *door, struct vs_map *map);
    int (*unmap)(struct vs_door *door, struct vs_map *map);
    void (*close)(struct vs_door *door);
    bool by_messages;           /* maps without fd are reached by messages to the client, not never */
};

struct vs_door {
    const struct vs_door_ops *ops;
    atomic_bool gone;           /* the device will not come back */
    pthread_mutex_t dma_lock;   /* maps; held while the IOMMU or peer works on one */
    struct vs_map *maps;        /* sorted by iova, no overlap */
    size_t nr_maps, cap_maps, max_maps;
    unsigned lent;              /* scratch memory is among the maps, and some of the client's may have stepped aside */
    atomic_size_t fdless_maps;  /* those that are reached by messages */
    atomic_ullong dma_bytes;
    atomic_ullong requests, errors;
};

int vs_door_init(struct vs_door *door, const struct vs_door_ops *ops, size_t max_maps);
void vs_door_close(struct vs_door *door);

int vs_door_access(struct vs_door *door, unsigned region, uint64_t offset, void *buf, size_t count, bool write);
/* Writes an aligned 16 bytes in one access. -ENOTSUP: this door or this processor cannot. */
int vs_door_wide(struct vs_door *door, unsigned region, uint64_t offset, const uint8_t data[16]);

/* Takes `fd` over when it returns 0; the caller keeps it otherwise. */
int vs_door_dma_map(struct vs_door *door, uint64_t iova, uint64_t size, uint32_t prot, int fd, uint64_t fd_offset);
/* Removes every map inside the range; cutting one is -EINVAL and removes nothing. `*unmapped`: bytes. */
int vs_door_dma_unmap(struct vs_door *door, uint64_t iova, uint64_t size, uint64_t *unmapped);
int vs_door_dma_unmap_all(struct vs_door *door);
/*
 * The same for the client. While memory is lent to the device they do nothing
 * but answer -EAGAIN: what was lent must not go, and what has stepped aside
 * would come back after its unmap.
 */
int vs_door_client_map(struct vs_door *door, uint64_t iova, uint64_t size, uint32_t prot, int fd, uint64_t fd_offset);
int vs_door_client_unmap(struct vs_door *door, uint64_t iova, uint64_t size);
int vs_door_client_unmap_all(struct vs_door *door);
/* Begins (1) or ends (-1) a time in which memory is lent. */
void vs_door_lend(struct vs_door *door, int by);
/* Copies up to `max` maps that touch the range, in order; returns how many there are. fds stay the door's. */
size_t vs_door_dma_list(struct vs_door *door, uint64_t iova, uint64_t size, struct vs_map *maps, size_t max);

bool vs_door_gone(struct vs_door *door);
/* Maps, bytes mapped, requests, errors. */
void vs_door_numbers(struct vs_door *door, uint64_t numbers[4]);

/* Memory of the client, mapped into this process: what a model's DMA reaches. */
struct vs_door *vs_local_open(size_t max_maps);
/*
 * Copies between the client's memory and `buf`. -EFAULT: unmapped, or the
 * client cut its file short; -EACCES: not mapped for that direction;
 * -EREMOTE: the range begins in a map without fd, reachable by messages only.
 * `*done` counts the bytes that were copied before.
 */
int vs_local_copy(struct vs_door *door, uint64_t iova, void *buf, size_t len, bool write, size_t *done);

#endif
