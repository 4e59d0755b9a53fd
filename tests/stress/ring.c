/*
 * The ring of migration data against a plain count of bytes, at random, to be built with sanitizers: whatever is copied,
 * lent or given, the bytes come out as they went in, and nobody reads memory that is gone.
 */
#include "ring.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define SIZE 70000U
#define LARGE 20000U
#define ROOM 25000U
#define STEPS 3000
#define ROUNDS 3
#define MAX_LENT 4096U

#define CHECK(holds)                                                            \
    do {                                                                        \
        if (!(holds)) {                                                         \
            fprintf(stderr, "line %d: %s does not hold\n", __LINE__, #holds);   \
            abort();                                                            \
        }                                                                       \
    } while (0)

static struct vs_ring ring;
static unsigned seed;
static uint64_t in, out;    /* bytes that went in and came out */
static struct { uint8_t *data; uint64_t end; } lent[MAX_LENT];
static unsigned first, last;

void
vs_signal_fd(int fd)
{
    uint64_t one = 1;

    (void)!write(fd, &one, sizeof(one));
}

void
vs_drain_fd(int fd)
{
    uint64_t count;

    (void)!read(fd, &count, sizeof(count));
}

static size_t
below(size_t n)
{
    return (size_t)rand_r(&seed) % n;
}

static uint8_t
byte_at(uint64_t n)
{
    return (uint8_t)(n * 2654435761U >> 13);
}

static uint8_t *
filled(uint8_t *data, size_t offset, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        data[offset + i] = byte_at(in + i);
    }
    return data;
}

static void
check_piece(const uint8_t *data, size_t len, uint64_t from)
{
    for (size_t i = 0; i < len; i++) {
        CHECK(data[i] == byte_at(from + i));
    }
}

static void
give_back(uint64_t until)
{
    while (first < last && lent[first % MAX_LENT].end <= until) {
        free(lent[first++ % MAX_LENT].data);
    }
}

static void
write_some(void)
{
    size_t len = below(3) ? below(300) : below(LARGE);
    uint8_t *data = filled(malloc(len + 1), 0, len);
    bool lend = len >= 1000 && below(2);
    long n = vs_ring_write(&ring, data, len, lend);

    CHECK(n >= 0 && (size_t)n <= len);
    in += (uint64_t)n;
    if (lend && n > 0) {
        CHECK(last - first < MAX_LENT);
        lent[last % MAX_LENT].data = data;
        lent[last++ % MAX_LENT].end = in;
    } else {
        free(data);
    }
}

static void
send_some(void)
{
    size_t len = 1 + (below(2) ? below(500) : below(2 * LARGE)), nr, sum = 0;
    struct iovec iov[VS_RING_PIECES];
    long n = vs_ring_peek(&ring, iov, &nr, len);

    if (in == out) {
        CHECK(n == -EAGAIN);
        return;
    }
    CHECK(n > 0 && (size_t)n <= len && nr <= VS_RING_PIECES);
    for (size_t i = 0; i < nr; i++) {
        check_piece(iov[i].iov_base, iov[i].iov_len, out + sum);
        sum += iov[i].iov_len;
    }
    CHECK(sum == (size_t)n);
    vs_ring_consume(&ring, sum);
    out += sum;
    give_back(out);
}

static void
put_some(void)
{
    size_t len = below(3) ? below(300) : below(LARGE), offset = below(40);
    uint8_t *buffer = filled(below(2) ? vs_ring_spare(&ring, ROOM) : malloc(ROOM), offset, len);
    int ret = vs_ring_put(&ring, buffer + offset, len, below(2) ? buffer : NULL);

    CHECK(ret == 1 || ret == 0 || ret == -EAGAIN);
    CHECK(ret != -EAGAIN || SIZE - (in - out) < len || ring.nr == VS_RING_SEGMENTS);
    in += ret >= 0 ? len : 0;
    if (ret == 0 && below(2)) {     /* whoever has written little may ask whether it was taken, and is not kept waiting */
        CHECK(vs_ring_taken(&ring) == (ring.judged && in > out ? -EAGAIN : 0));
        CHECK(ring.hasty == (ring.judged && in > out));
    }
    if (ret != 1) {
        free(buffer);
    }
}

static void
take_some(void)
{
    size_t least = below(4) ? 1 : 1 + below(ROOM), len = least + below(ROOM), nr, sum = 0, taken;
    struct vs_piece pieces[VS_RING_PIECES];
    long n = vs_ring_look(&ring, least, len, pieces, &nr);

    if (in == out || (in - out < least && !ring.hasty)) {
        CHECK(n == 0 && nr == 0);
        return;
    }
    CHECK(n > 0 && (size_t)n <= len && nr <= VS_RING_PIECES);
    for (size_t i = 0; i < nr; i++) {
        check_piece(pieces[i].data, pieces[i].len, out + sum);
        sum += pieces[i].len;
    }
    CHECK(sum == (size_t)n);
    taken = below(sum + 1);
    vs_ring_consume(&ring, taken);
    out += taken;
}

static void
session(enum vs_ring_mode mode, void (*give)(void), void (*take)(void))
{
    CHECK(vs_ring_open(&ring, mode, mode == VS_RING_LOAD && below(2)) == 0);
    in = out = 0;
    for (int i = 0; i < STEPS; i++) {
        (below(2) ? give : take)();
        CHECK(vs_ring_used(&ring) == in - out && in - out <= SIZE);
    }
    CHECK(ring.total == in);
    CHECK(vs_ring_open(&ring, VS_RING_CLOSED, false) == 0);     /* whatever is still inside */
    give_back(in);
}

int
main(int argc, char **argv)
{
    int fd = eventfd(0, EFD_NONBLOCK);

    seed = argc > 1 ? (unsigned)atoi(argv[1]) : 1;
    CHECK(vs_ring_init(&ring, SIZE, fd) == 0);
    for (int i = 0; i < ROUNDS; i++) {
        session(VS_RING_SAVE, write_some, send_some);
        session(VS_RING_LOAD, put_some, take_some);
    }
    vs_ring_fini(&ring);
    close(fd);
    puts("every byte as it went in");
    return 0;
}
