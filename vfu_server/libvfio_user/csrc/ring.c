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

void
vs_ring_fini(struct vs_ring *ring)
{
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
    if (mode == VS_RING_CLOSED) {
        free(ring->bytes);      /* a device that does not migrate holds no buffer */
        ring->bytes = NULL;
    } else if (ring->bytes == NULL && (ring->bytes = malloc(ring->size)) == NULL) {
        ret = -ENOMEM;
    }
    ring->head = ring->used = 0;
    ring->total = 0;
    ring->mode = ret == 0 ? mode : VS_RING_CLOSED;
    ring->eof = false;
    ring->error = 0;
    ring->nowait = option && mode == VS_RING_SAVE;
    ring->judged = option && mode == VS_RING_LOAD;
    ring->excuse = false;
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

/* Fills `iov` with the free (`room`) or used part, at most `len` bytes; at most two pieces. */
static size_t
pieces(const struct vs_ring *ring, bool room, struct iovec iov[2], size_t len)
{
    size_t start = room ? (ring->head + ring->used) % ring->size : ring->head;
    size_t n = room ? ring->size - ring->used : ring->used;
    size_t first;

    n = n < len ? n : len;
    first = ring->size - start < n ? ring->size - start : n;
    iov[0] = (struct iovec){ ring->bytes + start, first };
    iov[1] = (struct iovec){ ring->bytes, n - first };
    return n;
}

static void
copy_in(struct vs_ring *ring, const void *data, size_t n, const struct iovec iov[2])
{
    memcpy(iov[0].iov_base, data, iov[0].iov_len);
    memcpy(iov[1].iov_base, (const char *)data + iov[0].iov_len, iov[1].iov_len);
    ring->used += n;
    ring->total += n;
}

long
vs_ring_write(struct vs_ring *ring, const void *data, size_t len)
{
    struct iovec iov[2];
    long ret;

    pthread_mutex_lock(&ring->lock);
    if (ring->mode != VS_RING_SAVE || ring->eof) {
        ret = -EPIPE;
    } else if (ring->error != 0) {
        ret = -ring->error;
    } else {
        size_t n = pieces(ring, true, iov, len);

        copy_in(ring, data, n, iov);
        ring->python_waits = n < len;
        if (n > 0) {
            tell_pump(ring);
        }
        ret = (long)n;
    }
    pthread_mutex_unlock(&ring->lock);
    return ret;
}

long
vs_ring_look(struct vs_ring *ring, size_t len, const uint8_t **data)
{
    struct iovec iov[2];
    long ret;

    pthread_mutex_lock(&ring->lock);
    if (ring->mode != VS_RING_LOAD) {
        ret = -EPIPE;
    } else if (ring->error != 0) {
        ret = -ring->error;
    } else if (ring->used == 0) {
        ret = ring->eof ? -ENODATA : 0;
        ring->python_waits = !ring->eof;
    } else {
        pieces(ring, false, iov, len);
        *data = iov[0].iov_base;
        ret = (long)iov[0].iov_len;
    }
    pthread_mutex_unlock(&ring->lock);
    return ret;
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

long
vs_ring_peek(struct vs_ring *ring, struct iovec iov[2], size_t len)
{
    long ret;

    pthread_mutex_lock(&ring->lock);
    if (ring->mode != VS_RING_SAVE) {
        ret = -EINVAL;
    } else if (ring->used > 0) {
        ret = (long)pieces(ring, false, iov, len);
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

void
vs_ring_consume(struct vs_ring *ring, size_t len)
{
    pthread_mutex_lock(&ring->lock);
    /* The session may have been closed while the bytes were on their way. */
    if (ring->mode != VS_RING_CLOSED && ring->used >= len) {
        ring->head = (ring->head + len) % ring->size;
        ring->used -= len;
        if (ring->mode == VS_RING_SAVE) {
            tell_python(ring);
        } else {
            tell_pump(ring);
        }
    }
    pthread_mutex_unlock(&ring->lock);
}

int
vs_ring_put(struct vs_ring *ring, const void *data, size_t len)
{
    struct iovec iov[2];
    int ret = 0;

    pthread_mutex_lock(&ring->lock);
    if (ring->mode != VS_RING_LOAD || ring->eof || len > ring->size) {
        ret = -EINVAL;
    } else if (ring->error != 0) {
        ret = -ring->error;
    } else if (ring->size - ring->used < len) {
        ret = -EAGAIN;
        ring->pump_waits = true;
    } else {
        copy_in(ring, data, pieces(ring, true, iov, len), iov);
        tell_python(ring);
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
        ring->pump_waits = true;
    }
    pthread_mutex_unlock(&ring->lock);
    return ret;
}
