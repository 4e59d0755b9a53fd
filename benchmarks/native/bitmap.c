/*
 * The least that telling dirty pages can cost: for each report the bits are
 * copied out of the hardware's table and set in the reply. Prints nanoseconds.
 *
 *     bitmap REPORTS BYTES ROUNDS
 */
#include <err.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static uint64_t
now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000U + (uint64_t)t.tv_nsec;
}

static void
report(uint64_t *reply, uint64_t *read, const uint64_t *hardware, size_t bytes)
{
    memcpy(read, hardware, bytes);
    for (size_t i = 0; i < bytes / 8; i++) {
        reply[i] |= read[i];
    }
}

int
main(int argc, char **argv)
{
    long reports = argc == 4 ? atol(argv[1]) : 0, rounds = argc == 4 ? atol(argv[3]) : 0;
    size_t bytes = argc == 4 ? strtoul(argv[2], NULL, 0) : 0;
    uint64_t *hardware = malloc(bytes), *read = malloc(bytes), *reply = malloc(bytes), sum = 0;

    if (reports <= 0 || bytes < 8 || rounds <= 0) {
        errx(2, "usage: bitmap REPORTS BYTES ROUNDS");
    }
    memset(hardware, 0x11, bytes);
    for (long round = 0; round < rounds; round++) {
        uint64_t began = now();

        for (long i = 0; i < reports; i++) {
            memset(reply, 0, bytes);
            report(reply, read, hardware, bytes);
            sum += reply[i % (long)(bytes / 8)];
        }
        printf("%lu\n", now() - began);
    }
    return sum == 0;
}
