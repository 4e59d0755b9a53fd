/*
 * The least that a server can do with a kernel driver's data fd: read it and
 * send what was read. The fd is a file in memory, which is as fast as any.
 *
 *     loop SOCKET BYTES
 */
#include <err.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define CHUNK (1UL << 20)

static void
serve(int client, int file, char *buffer, uint64_t left)
{
    while (left > 0) {
        size_t want = left < CHUNK ? left : CHUNK;
        ssize_t have = pread(file, buffer, want, 0);

        if (have <= 0) {
            err(1, "read");
        }
        for (ssize_t sent = 0, n; sent < have; sent += n) {
            n = send(client, buffer + sent, (size_t)(have - sent), MSG_NOSIGNAL);
            if (n < 0) {
                return;     /* the client has seen enough */
            }
        }
        left -= (uint64_t)have;
    }
}

int
main(int argc, char **argv)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int listener = socket(AF_UNIX, SOCK_STREAM, 0), file = memfd_create("state", 0), client;
    char *buffer = malloc(CHUNK);

    if (argc != 3 || strlen(argv[1]) >= sizeof(address.sun_path)) {
        errx(2, "usage: loop SOCKET BYTES");
    }
    strcpy(address.sun_path, argv[1]);
    memset(buffer, 0x5a, CHUNK);
    if (write(file, buffer, CHUNK) != (ssize_t)CHUNK ||
        bind(listener, (struct sockaddr *)&address, sizeof(address)) < 0 || listen(listener, 1) < 0) {
        err(1, "set-up");
    }
    puts("ready");
    fflush(stdout);
    while ((client = accept(listener, NULL, NULL)) >= 0) {
        serve(client, file, buffer, strtoull(argv[2], NULL, 0));
        close(client);
    }
    return 0;
}
