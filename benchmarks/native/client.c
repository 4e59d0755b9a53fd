/*
 * The load: one client that measures one thing and prints nanoseconds, one
 * number a line; the last line of a throughput test is its whole time.
 *
 *     client SOCKET TEST COUNT [BYTES [FILE]]
 *     read, write    round trips of a 4-byte access of region 0 at offset BYTES
 *     posted         COUNT posted 4-byte writes, then one read: the whole time
 *     dma            COUNT times DMA_MAP and DMA_UNMAP of 4 KiB: the whole time
 *     save           migration data in messages of BYTES up to its end, COUNT bytes at least, to FILE if named
 *     flow           as save, the time counted from the first message that is full: what comes before was not ready yet
 *     load           COUNT bytes of FILE as migration data in messages of BYTES, until the device has taken it
 *     drain          COUNT bytes from a server that speaks no protocol
 */
#include <err.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

struct header {
    uint16_t id, command;
    uint32_t size, flags, error;
};

enum state { STOP = 1, RUNNING = 2, STOP_COPY = 3, RESUMING = 4 };

static int sock;
static uint16_t next_id;
static char *room;

static uint64_t
now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000U + (uint64_t)t.tv_nsec;
}

static void
receive(void *data, size_t len)
{
    char *at = data;

    while (len > 0) {
        ssize_t n = recv(sock, at, len, 0);

        if (n <= 0) {
            err(1, "the server has gone");
        }
        at += n;
        len -= (size_t)n;
    }
}

static void
post(unsigned command, const void *body, size_t len, const void *data, size_t data_len, int fd, uint32_t flags)
{
    struct header header = { ++next_id, (uint16_t)command, (uint32_t)(sizeof(header) + len + data_len), flags, 0 };
    struct iovec iov[3] = { { &header, sizeof(header) }, { (void *)body, len }, { (void *)data, data_len } };
    char control[CMSG_SPACE(sizeof(int))] = { 0 };
    struct msghdr msg = { .msg_iov = iov, .msg_iovlen = 3 };
    size_t left = header.size;

    if (fd >= 0) {
        struct cmsghdr *cmsg = (struct cmsghdr *)control;

        msg.msg_control = control;
        msg.msg_controllen = sizeof(control);
        *cmsg = (struct cmsghdr){ CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS };
        memcpy(CMSG_DATA(cmsg), &fd, sizeof(int));
    }
    while (left > 0) {
        ssize_t n = sendmsg(sock, &msg, MSG_NOSIGNAL);

        if (n < 0) {
            err(1, "send");
        }
        left -= (size_t)n;
        msg.msg_controllen = 0;
        while (msg.msg_iovlen > 0 && (size_t)n >= msg.msg_iov->iov_len) {
            n -= (ssize_t)msg.msg_iov->iov_len;
            msg.msg_iov++;
            msg.msg_iovlen--;
        }
        if (msg.msg_iovlen > 0) {
            msg.msg_iov->iov_base = (char *)msg.msg_iov->iov_base + n;
            msg.msg_iov->iov_len -= (size_t)n;
        }
    }
}

/* The reply's body goes to `room`; its length. */
static size_t
reply(int may_fail)
{
    struct header header;

    receive(&header, sizeof(header));
    receive(room, header.size - sizeof(header));
    if ((header.flags & 0x20) != 0 && !may_fail) {
        errx(1, "command %u was refused: %s", header.command, strerror((int)header.error));
    }
    return header.size - sizeof(header);
}

static void
access_region(int write, uint64_t offset, uint32_t flags)
{
    struct { uint64_t offset; uint32_t region, count, data; } __attribute__((packed)) access = { offset, 0, 4, 42 };

    post(write ? 10 : 9, &access, write ? 20 : 16, NULL, 0, -1, flags);
}

static void
set_state(enum state state)
{
    struct { uint32_t argsz, flags, state; int32_t fd; } feature = { 16, 0x20002, state, -1 };

    post(16, &feature, sizeof(feature), NULL, 0, -1, 0);
    reply(0);
}

static void
negotiate(void)
{
    static const char caps[] = "\0\0\0\0{\"capabilities\":{\"max_msg_fds\":8,\"max_data_xfer_size\":1048576}}";

    post(1, caps, sizeof(caps), NULL, 0, -1, 0);
    reply(0);
}

static void
round_trips(int write, long count, uint64_t offset)
{
    uint64_t *times = calloc((size_t)count, sizeof(*times));

    for (long i = -count / 50; i < count; i++) {
        uint64_t began = now();

        access_region(write, offset, 0);
        reply(1);
        if (i >= 0) {
            times[i] = now() - began;
        }
    }
    for (long i = 0; i < count; i++) {
        printf("%lu\n", times[i]);
    }
}

static void
dma(long count)
{
    int fd = memfd_create("bench", 0);
    struct { uint32_t argsz, flags; uint64_t offset, iova, size; } map = { 32, 3, 0, 0x100000, 4096 };
    struct { uint32_t argsz, flags; uint64_t iova, size; } unmap = { 24, 0, 0x100000, 4096 };

    if (ftruncate(fd, 4096) < 0) {
        err(1, "memfd");
    }
    for (long i = 0; i < count; i++) {
        post(2, &map, sizeof(map), NULL, 0, fd, 0);
        reply(0);
        post(3, &unmap, sizeof(unmap), NULL, 0, -1, 0);
        reply(0);
    }
}

/* Returns when the first message came that is full. */
static uint64_t
save(uint64_t bytes, uint32_t chunk, const char *path)
{
    FILE *file = path != NULL ? fopen(path, "wb") : NULL;
    uint32_t message[2] = { 8 + chunk, chunk };
    uint64_t got = 0, flows = 0;

    if (path != NULL && file == NULL) {
        err(1, "%s", path);
    }

    for (;;) {
        uint32_t size;

        post(17, message, sizeof(message), NULL, 0, -1, 0);
        reply(0);
        memcpy(&size, room + 4, 4);
        if (size == 0) {
            break;
        }
        got += size;
        if (flows == 0 && size == chunk) {
            flows = now();
        }
        if (file != NULL && fwrite(room + 8, 1, size, file) != size) {
            err(1, "%s", path);
        }
    }
    if (got < bytes || (file != NULL && fclose(file) != 0)) {
        errx(1, "%lu bytes came, %lu were to come", got, bytes);
    }
    return flows;
}

static const char *
map_file(const char *path, uint64_t bytes)
{
    int fd = path != NULL ? open(path, O_RDONLY) : -1;
    const char *data = mmap(NULL, bytes, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);

    if (fd < 0 || data == MAP_FAILED) {
        err(1, "%s", path != NULL ? path : "load needs a file");
    }
    return data;
}

/* The last word is a state change: a server that keeps what it was given for later has used it by then. */
static void
load(const char *data, uint64_t bytes, uint32_t chunk)
{
    while (bytes > 0) {
        uint32_t size = bytes < chunk ? (uint32_t)bytes : chunk;
        uint32_t message[2] = { 8 + size, size };

        post(18, message, sizeof(message), data, size, -1, 0);
        reply(0);
        data += size;
        bytes -= size;
    }
    set_state(STOP);
}

int
main(int argc, char **argv)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    const char *test = argc > 2 ? argv[2] : "";
    long count = argc > 3 ? atol(argv[3]) : 0;
    uint64_t bytes = argc > 4 ? strtoull(argv[4], NULL, 0) : 0, began;
    const char *path = argc > 5 ? argv[5] : NULL, *data;

    if (count <= 0) {
        errx(2, "usage: client SOCKET TEST COUNT [BYTES [FILE]]");
    }
    room = malloc((1 << 20) + 64);
    strncpy(address.sun_path, argv[1], sizeof(address.sun_path) - 1);
    sock = socket(AF_UNIX, SOCK_STREAM, 0);
    if (connect(sock, (struct sockaddr *)&address, sizeof(address)) < 0) {
        err(1, "%s", argv[1]);
    }
    if (strcmp(test, "drain") != 0) {
        negotiate();
    }
    began = now();
    if (strcmp(test, "read") == 0 || strcmp(test, "write") == 0) {
        round_trips(test[0] == 'w', count, bytes);
        return 0;
    } else if (strcmp(test, "posted") == 0) {
        for (long i = 0; i < count; i++) {
            access_region(1, bytes, 0x10);
        }
        access_region(0, bytes, 0);
        reply(0);
    } else if (strcmp(test, "dma") == 0) {
        dma(count);
    } else if (strcmp(test, "save") == 0) {
        set_state(STOP_COPY);
        began = now();
        save((uint64_t)count, (uint32_t)bytes, path);
    } else if (strcmp(test, "flow") == 0) {
        set_state(STOP_COPY);
        began = save((uint64_t)count, (uint32_t)bytes, path);
    } else if (strcmp(test, "load") == 0) {
        data = map_file(path, (uint64_t)count);
        set_state(RESUMING);
        began = now();
        load(data, (uint64_t)count, (uint32_t)bytes);
    } else if (strcmp(test, "drain") == 0) {
        for (uint64_t left = (uint64_t)count; left > 0; left -= bytes < left ? bytes : left) {
            receive(room, bytes < left ? bytes : left);
        }
    } else {
        errx(2, "no test %s", test);
    }
    printf("%lu\n", now() - began);
    return 0;
}
