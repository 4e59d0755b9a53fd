/*
 * A bounded ring of migration data between the plugin's coroutine (Python)
 * and the pump: one side writes, the other reads, either may be either.
 *
 * Whoever finds it full or empty is told through an eventfd when that changes,
 * and nobody else: a wake-up costs as much as copying many pages.
 */
#ifndef VS_RING_H
#define VS_RING_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

enum vs_ring_mode {
    VS_RING_CLOSED = 0,
    VS_RING_SAVE = 1,   /* Python writes, the client reads */
    VS_RING_LOAD = 2,   /* the client writes, Python reads */
};

struct vs_ring {
    pthread_mutex_t lock;
    uint8_t *bytes;
    size_t size, head, used;    /* head: where reading goes on */
    enum vs_ring_mode mode;
    bool eof;                   /* the writer has said that this was all */
    bool nowait;                /* an empty ring is answered at once: nothing for now (PRE_COPY) */
    bool judged;                /* of a load: a small write is answered when its bytes were taken */
    bool excuse;                /* the same, for one read */
    int error;                  /* errno for everything from now on, 0: none */
    bool python_waits, pump_waits;
    int python_fd;              /* eventfd that trio waits on */
    int pump_fd;                /* eventfd that the pump polls; not owned */
    uint64_t total;             /* bytes that went through in this mode */
};

int vs_ring_init(struct vs_ring *ring, size_t size, int pump_fd);
void vs_ring_fini(struct vs_ring *ring);
/* Empties the ring and begins a new session in `mode`. `option`: of a save `nowait`, of a load `judged`. */
int vs_ring_open(struct vs_ring *ring, enum vs_ring_mode mode, bool option);
void vs_ring_set_nowait(struct vs_ring *ring, bool nowait);
/* The next read that finds the ring empty is told that there is nothing for now. */
void vs_ring_excuse(struct vs_ring *ring);
void vs_ring_set_eof(struct vs_ring *ring);
void vs_ring_set_error(struct vs_ring *ring, int error);
/* As much as fits; 0: full (then python_fd is signalled when there is room). Negative errno: over. */
long vs_ring_write(struct vs_ring *ring, const void *data, size_t len);
/*
 * Python's side of a load: up to `len` bytes in place, valid until they are
 * consumed or the session is closed. 0: empty (then python_fd is signalled
 * when something is there); -ENODATA: empty and at the end.
 */
long vs_ring_look(struct vs_ring *ring, size_t len, const uint8_t **data);
size_t vs_ring_used(struct vs_ring *ring);

/* The pump's side of a save: bytes in place, sent from where they lie, then consumed. */
long vs_ring_peek(struct vs_ring *ring, struct iovec iov[2], size_t len);
/* Done with `len` bytes that were looked or peeked at; whoever waits for room is told. */
void vs_ring_consume(struct vs_ring *ring, size_t len);
/* The pump's side of a load: all or -EAGAIN. */
int vs_ring_put(struct vs_ring *ring, const void *data, size_t len);
/* In a load that is `judged`: whether all that was put was taken. 0, -EAGAIN (then pump_fd is signalled), or a refusal. */
int vs_ring_taken(struct vs_ring *ring);

#endif
