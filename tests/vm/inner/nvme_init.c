/*
 * Uses a disk through the kernel's own nvme driver, in a guest inside the test machine.
 *
 * Writes a pattern past the page cache, reads it back, takes the driver from the function and gives it back, reads again.
 * After a reset of the machine it first looks for what it wrote before.
 */
#define _GNU_SOURCE
#include "inner.h"

#include <linux/fs.h>
#include <stdint.h>
#include <sys/ioctl.h>

#define DISK "/dev/nvme0n1"
#define CHUNK (64 * 1024)

static uint64_t size;

static int
open_disk(void)
{
    for (int tries = 0;; tries++) {
        int fd = open(DISK, O_RDWR | O_DIRECT);

        if (fd >= 0) {
            if (ioctl(fd, BLKGETSIZE64, &size)) {
                fail("asking for the size");
            }
            return fd;
        }
        look_again(tries, DISK);
    }
}

static void
pattern(unsigned char *to, uint64_t at)
{
    uint64_t state = at + 0x9e3779b97f4a7c15ULL;

    for (int i = 0; i < CHUNK; i++) {
        state = state * 6364136223846793005ULL + 1442695040888963407ULL;
        to[i] = (unsigned char)(state >> 56);
    }
}

/* The sum of what is on the disk (FNV-1a), and whether all of it is the pattern. */
static void
look(const char *when)
{
    unsigned char *read_to = aligned_alloc(4096, CHUNK), *wanted = aligned_alloc(4096, CHUNK);
    uint64_t sum = 0xcbf29ce484222325ULL;
    int fd = open_disk(), same = 1;

    for (uint64_t at = 0; at < size; at += CHUNK) {
        if (pread(fd, read_to, CHUNK, (off_t)at) != CHUNK) {
            fail("reading");
        }
        pattern(wanted, at);
        same = same && memcmp(read_to, wanted, CHUNK) == 0;
        for (int i = 0; i < CHUNK; i++) {
            sum = (sum ^ read_to[i]) * 0x100000001b3ULL;
        }
    }
    close(fd);
    free(read_to);
    free(wanted);
    printf("result: %s: %llu bytes, sum %016llx, %s\n", when, (unsigned long long)size, (unsigned long long)sum,
           same ? "the pattern" : "something else");
}

static void
fill(void)
{
    unsigned char *data = aligned_alloc(4096, CHUNK);
    int fd = open_disk();

    for (uint64_t at = 0; at < size; at += CHUNK) {
        pattern(data, at);
        if (pwrite(fd, data, CHUNK, (off_t)at) != CHUNK) {
            fail("writing");
        }
    }
    if (fsync(fd)) {
        fail("flushing");
    }
    close(fd);
    free(data);
}

static void
rebind(void)
{
    put("/sys/bus/pci/drivers/nvme/unbind", bdf);
    if (access(DISK, F_OK) == 0) {
        errno = EBUSY;
        fail("the disk is there without its driver");
    }
    put("/sys/bus/pci/drivers/nvme/bind", bdf);
}

int
main(void)
{
    start("0x0010");
    look("found");
    fill();
    look("written");
    print_config();
    rebind();
    look("bound again");
    done();
}
