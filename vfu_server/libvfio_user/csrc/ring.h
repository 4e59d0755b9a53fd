/*
 * A bounded ring of migration data between the plugin's coroutine (Python)
 * and the pump: one side writes, the other reads, either may be either.
 *
 * Small pieces are copied in. Large ones stay where they are, and the ring
 * refers to them: in a save to memory that Python keeps until it was consumed,
 * in a load to the pump's receive buffers, which change hands. So the lock is
 * never held for longer than it takes to copy a small piece.
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

/* Pieces of at least so many bytes are not copied. */
#define VS_RING_LEND (64U << 10)
/* Received messages of so many bytes change hands: a buffer is of a whole message, whatever is in it. */
#define VS_RING_GIVE (512U << 10)
#define VS_RING_SEGMENTS 256U
#define VS_RING_SPARES 2U
/* As many pieces as one read is answered with, at most. */
#define VS_RING_PIECES 8U

struct vs_segment {
    const uint8_t *data;        /* NULL: the next `len` bytes of `bytes` */
    size_t len;
    void *buffer;               /* what `data` lies in, if that was given to the ring */
};

struct vs_ring {
    pthread_mutex_t lock;
    uint8_t *bytes;             /* the copied ones */
    size_t size, head, copied;  /* head: where reading of them goes on */
    size_t used;                /* bytes of all segments, at most `size` */
    struct vs_segment segments[VS_RING_SEGMENTS];
    size_t first, nr;           /* of the segments, in order */
    void *spares[VS_RING_SPARES];   /* buffers that were read and may be used again */
    size_t nr_spares;
    enum vs_ring_mode mode;
    bool eof;                   /* the writer has said that this was all */
    bool nowait;                /* an empty ring is answered at once: nothing for now (PRE_COPY) */
    bool judged;                /* of a load: a small write is answered when its bytes were taken */
    bool excuse;                /* the same, for one read */
    int error;                  /* errno for everything from now on, 0: none */
    bool python_waits, pump_waits;
    size_t python_needs;        /* of a load: so many bytes, or the end */
    bool hasty;                 /* of a load: a write waits to be taken, so Python gets what there is */
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
/*
 * As much as fits; 0: full (then python_fd is signalled when there is room).
 * Negative errno: over. `lend`: the bytes stay where they are, and the caller
 * keeps them until that many were consumed or the session is closed.
 */
long vs_ring_write(struct vs_ring *ring, const void *data, size_t len, bool lend);
struct vs_piece {
    const uint8_t *data;
    size_t len;
};

/*
 * Python's side of a load: up to `len` bytes in place, in `*nr` pieces, valid
 * until they are consumed or the session is closed. 0: less than `least` is
 * there (then python_fd is signalled when it is, or no more will come);
 * -ENODATA: empty and at the end.
 */
long vs_ring_look(struct vs_ring *ring, size_t least, size_t len, struct vs_piece pieces[VS_RING_PIECES], size_t *nr);
size_t vs_ring_used(struct vs_ring *ring);

/* The pump's side of a save: bytes in place, sent from where they lie, then consumed. */
long vs_ring_peek(struct vs_ring *ring, struct iovec iov[VS_RING_PIECES], size_t *nr, size_t len);
/* Done with `len` bytes that were looked or peeked at; whoever waits for room is told. */
void vs_ring_consume(struct vs_ring *ring, size_t len);
/* In a load that is `judged`: whether all that was put was taken. 0, -EAGAIN (then pump_fd is signalled), or a refusal. */
int vs_ring_taken(struct vs_ring *ring);
/*
 * The pump's side of a load: all or -EAGAIN. `buffer`, if there is one, is what
 * `data` lies in, made by malloc: 1 says that the ring has it now, 0 that the
 * bytes were copied.
 */
int vs_ring_put(struct vs_ring *ring, const void *data, size_t len, void *buffer);
/* A buffer to receive into when the present one is given away: `room` bytes, one that was read already or a new one; NULL. */
void *vs_ring_spare(struct vs_ring *ring, size_t room);

#endif
