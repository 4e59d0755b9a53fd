#include "ring.h"
#include "eventfd.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

static void
tell_python(struct vs_ring *ring)
{
    if (ring->python_waits) {
        ring->python_waits = false;
        vs_signal_fd(ring->python_fd);
    }
}

static void
tell_pump(struct vs_ring *ring)
{
    if (ring->pump_waits) {
        ring->pump_waits = false;
        vs_signal_fd(ring->pump_fd);
    }
}

int
vs_ring_init(struct vs_ring *ring, size_t size, int pump_fd)
{
    memset(ring, 0, sizeof(*ring));
    ring->size = size;
    ring->pump_fd = pump_fd;
    ring->python_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return ring->python_fd < 0 ? -errno : -pthread_mutex_init(&ring->lock, NULL);
}

/* All segments go, and the buffers with them. The lock is held, or nobody else is there. */
static void
drop_all(struct vs_ring *ring)
{
    for (; ring->nr > 0; ring->nr--) {
        free(ring->segments[ring->first].buffer);
        ring->first = (ring->first + 1) % VS_RING_SEGMENTS;
    }
    while (ring->nr_spares > 0) {
        free(ring->spares[--ring->nr_spares]);
    }
    ring->first = ring->head = ring->copied = ring->used = 0;
}

void
vs_ring_fini(struct vs_ring *ring)
{
    drop_all(ring);
    free(ring->bytes);
    ring->bytes = NULL;
    close(ring->python_fd);
    pthread_mutex_destroy(&ring->lock);
}

int
vs_ring_open(struct vs_ring *ring, enum vs_ring_mode mode, bool option)
{
    int ret = 0;

    pthread_mutex_lock(&ring->lock);
    drop_all(ring);
    if (mode == VS_RING_CLOSED) {
        free(ring->bytes);      /* a device that does not migrate holds no buffer */
        ring->bytes = NULL;
    } else if (ring->bytes == NULL && (ring->bytes = malloc(ring->size)) == NULL) {
        ret = -ENOMEM;
    }
    ring->total = 0;
    ring->mode = ret == 0 ? mode : VS_RING_CLOSED;
    ring->eof = false;
    ring->error = 0;
    ring->nowait = option && mode == VS_RING_SAVE;
    ring->judged = option && mode == VS_RING_LOAD;
    ring->excuse = ring->hasty = false;
    tell_python(ring);
    tell_pump(ring);
    pthread_mutex_unlock(&ring->lock);
    return ret;
}

void
vs_ring_set_nowait(struct vs_ring *ring, bool nowait)
{
    pthread_mutex_lock(&ring->lock);
    ring->nowait = nowait;
    ring->excuse = false;
    tell_pump(ring);
    pthread_mutex_unlock(&ring->lock);
}

void
vs_ring_excuse(struct vs_ring *ring)
{
    pthread_mutex_lock(&ring->lock);
    ring->excuse = true;
    tell_pump(ring);
    pthread_mutex_unlock(&ring->lock);
}

void
vs_ring_set_eof(struct vs_ring *ring)
{
    pthread_mutex_lock(&ring->lock);
    ring->eof = true;
    tell_python(ring);
    tell_pump(ring);
    pthread_mutex_unlock(&ring->lock);
}

void
vs_ring_set_error(struct vs_ring *ring, int error)
{
    pthread_mutex_lock(&ring->lock);
    ring->error = error;
    tell_python(ring);
    tell_pump(ring);
    pthread_mutex_unlock(&ring->lock);
}

static struct vs_segment *
segment(struct vs_ring *ring, size_t n)
{
    return &ring->segments[(ring->first + n) % VS_RING_SEGMENTS];
}

/* Copies `n` bytes behind those that are there; there is room. */
static void
copy_in(struct vs_ring *ring, const void *data, size_t n)
{
    size_t at = (ring->head + ring->copied) % ring->size;
    size_t first = ring->size - at < n ? ring->size - at : n;

    memcpy(ring->bytes + at, data, first);
    memcpy(ring->bytes, (const char *)data + first, n - first);
    ring->copied += n;
}

/* A segment more. Copied bytes go on with the last one, if that is of copied bytes too. False: none is free. */
static bool
append(struct vs_ring *ring, const void *data, size_t n, void *buffer)
{
    struct vs_segment *last = ring->nr > 0 ? segment(ring, ring->nr - 1) : NULL;

    if (n > 0 && data == NULL && last != NULL && last->data == NULL) {
        last->len += n;
    } else if (n > 0) {
        if (ring->nr == VS_RING_SEGMENTS) {
            return false;
        }
        *segment(ring, ring->nr++) = (struct vs_segment){ data, n, buffer };
    }
    ring->used += n;
    ring->total += n;
    return true;
}

/* Whether `append` would take copied bytes. */
static bool
takes_copies(struct vs_ring *ring)
{
    return ring->nr < VS_RING_SEGMENTS || segment(ring, ring->nr - 1)->data == NULL;
}

long
vs_ring_write(struct vs_ring *ring, const void *data, size_t len, bool lend)
{
    long ret;

    pthread_mutex_lock(&ring->lock);
    if (ring->mode != VS_RING_SAVE || ring->eof) {
        ret = -EPIPE;
    } else if (ring->error != 0) {
        ret = -ring->error;
    } else {
        size_t room = ring->size - ring->used, n = room < len ? room : len;

        if (lend) {
            n = append(ring, data, n, NULL) ? n : 0;
        } else if (takes_copies(ring)) {
            copy_in(ring, data, n);
            append(ring, NULL, n, NULL);
        } else {
            n = 0;
        }
        ring->python_waits = n < len;
        if (n > 0) {
            tell_pump(ring);
        }
        ret = (long)n;
    }
    pthread_mutex_unlock(&ring->lock);
    return ret;
}

/* The first bytes of segment `n`, whose copied bytes begin `skip` bytes behind the head; at most `len`. */
static struct iovec
start_of(struct vs_ring *ring, size_t n, size_t skip, size_t len)
{
    struct vs_segment *found = segment(ring, n);
    size_t at = (ring->head + skip) % ring->size, most = found->len;

    if (found->data != NULL) {
        return (struct iovec){ (void *)(uintptr_t)found->data, most < len ? most : len };
    }
    most = ring->size - at < most ? ring->size - at : most;
    return (struct iovec){ ring->bytes + at, most < len ? most : len };
}

size_t
vs_ring_used(struct vs_ring *ring)
{
    size_t used;

    pthread_mutex_lock(&ring->lock);
    used = ring->used;
    pthread_mutex_unlock(&ring->lock);
    return used;
}

/* Fills `iov` with the first `len` bytes, or fewer if they lie in more pieces. */
static size_t
pieces(struct vs_ring *ring, struct iovec *iov, size_t *nr, size_t len)
{
    size_t got = 0, skip = 0;

    *nr = 0;
    for (size_t n = 0; n < ring->nr && *nr < VS_RING_PIECES && got < len; n++) {
        size_t left = segment(ring, n)->len;

        iov[*nr] = start_of(ring, n, skip, len - got);
        got += iov[*nr].iov_len;
        left -= iov[*nr].iov_len;
        if (segment(ring, n)->data == NULL) {
            skip += iov[*nr].iov_len;
            if (left > 0 && got < len && *nr + 1 < VS_RING_PIECES) {    /* around the end of `bytes` */
                iov[++*nr] = (struct iovec){ ring->bytes, left < len - got ? left : len - got };
                got += iov[*nr].iov_len;
                skip += iov[*nr].iov_len;
                left -= iov[*nr].iov_len;
            }
        }
        ++*nr;
        if (left > 0) {
            break;
        }
    }
    return got;
}

long
vs_ring_look(struct vs_ring *ring, size_t least, size_t len, struct vs_piece found[VS_RING_PIECES], size_t *nr)
{
    struct iovec iov[VS_RING_PIECES];
    long ret;

    *nr = 0;
    pthread_mutex_lock(&ring->lock);
    if (ring->mode != VS_RING_LOAD) {
        ret = -EPIPE;
    } else if (ring->error != 0) {
        ret = -ring->error;
    } else if (ring->used == 0 && ring->eof) {
        ret = -ENODATA;
    } else if (ring->used == 0 || (ring->used < least && !ring->eof && !ring->hasty)) {
        ret = 0;
        ring->python_waits = true;
        ring->python_needs = least;
    } else {
        ret = (long)pieces(ring, iov, nr, len);
    }
    pthread_mutex_unlock(&ring->lock);
    for (size_t i = 0; i < *nr; i++) {
        found[i] = (struct vs_piece){ iov[i].iov_base, iov[i].iov_len };
    }
    return ret;
}

long
vs_ring_peek(struct vs_ring *ring, struct iovec iov[VS_RING_PIECES], size_t *nr, size_t len)
{
    long ret;

    *nr = 0;
    pthread_mutex_lock(&ring->lock);
    if (ring->mode != VS_RING_SAVE) {
        ret = -EINVAL;
    } else if (ring->used > 0) {
        ret = (long)pieces(ring, iov, nr, len);
    } else if (ring->error != 0) {
        ret = -ring->error;
    } else if (ring->eof) {
        ret = 0;
    } else {
        ret = ring->nowait || ring->excuse ? -ENOMSG : -EAGAIN;
        ring->excuse = false;
        ring->pump_waits = ret == -EAGAIN;
    }
    pthread_mutex_unlock(&ring->lock);
    return ret;
}

/* A buffer that was read: kept for the next message, if there are not enough of them. */
static void
put_aside(struct vs_ring *ring, void *buffer)
{
    if (buffer != NULL && ring->nr_spares < VS_RING_SPARES) {
        ring->spares[ring->nr_spares++] = buffer;
    } else {
        free(buffer);
    }
}

void
vs_ring_consume(struct vs_ring *ring, size_t len)
{
    pthread_mutex_lock(&ring->lock);
    /* The session may have been closed while the bytes were on their way. */
    if (ring->mode != VS_RING_CLOSED && ring->used >= len) {
        ring->used -= len;
        ring->hasty = ring->hasty && ring->used > 0;
        while (len > 0) {
            struct vs_segment *first = segment(ring, 0);
            size_t n = first->len < len ? first->len : len;

            if (first->data == NULL) {
                ring->head = (ring->head + n) % ring->size;
                ring->copied -= n;
            } else {
                first->data += n;
            }
            first->len -= n;
            len -= n;
            if (first->len == 0) {
                put_aside(ring, first->buffer);
                ring->first = (ring->first + 1) % VS_RING_SEGMENTS;
                ring->nr--;
            }
        }
        if (ring->mode == VS_RING_SAVE) {
            /* A wake-up costs as much as copying many pages: not before there is room for much. */
            if (ring->used <= ring->size / 4) {
                tell_python(ring);
            }
        } else {
            tell_pump(ring);
        }
    }
    pthread_mutex_unlock(&ring->lock);
}

int
vs_ring_put(struct vs_ring *ring, const void *data, size_t len, void *buffer)
{
    int ret = 0;

    pthread_mutex_lock(&ring->lock);
    if (ring->mode != VS_RING_LOAD || ring->eof || len > ring->size) {
        ret = -EINVAL;
    } else if (ring->error != 0) {
        ret = -ring->error;
    } else if (ring->size - ring->used < len || !takes_copies(ring)) {
        ret = -EAGAIN;
        ring->pump_waits = true;
    } else {
        if (buffer != NULL && len > 0 && append(ring, data, len, buffer)) {
            ret = 1;
        } else {
            copy_in(ring, data, len);
            append(ring, NULL, len, NULL);
        }
        if (ring->used >= ring->python_needs || ring->nr == VS_RING_SEGMENTS) {
            tell_python(ring);
        }
    }
    pthread_mutex_unlock(&ring->lock);
    return ret;
}

int
vs_ring_taken(struct vs_ring *ring)
{
    int ret = 0;

    pthread_mutex_lock(&ring->lock);
    if (ring->mode != VS_RING_LOAD) {
        ret = -EPIPE;
    } else if (ring->error != 0) {
        ret = -ring->error;
    } else if (ring->judged && ring->used > 0) {
        ret = -EAGAIN;
        ring->pump_waits = ring->hasty = true;
        tell_python(ring);
    }
    pthread_mutex_unlock(&ring->lock);
    return ret;
}

void *
vs_ring_spare(struct vs_ring *ring, size_t room)
{
    void *found = NULL;

    pthread_mutex_lock(&ring->lock);
    if (ring->nr_spares > 0) {
        found = ring->spares[--ring->nr_spares];
    }
    pthread_mutex_unlock(&ring->lock);
    return found != NULL ? found : malloc(room);
}
