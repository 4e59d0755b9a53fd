/*
 * The first and only process of a guest inside the test machine: it uses a disk through the kernel's own nvme driver.
 *
 * Writes a pattern past the page cache, reads it back, takes the driver from the function and gives it back, reads again.
 * After a reset of the machine it first looks for what it wrote before. Prints a line for each result and "done".
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <linux/fs.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define DISK "/dev/nvme0n1"
#define CHUNK (64 * 1024)
#define SECONDS 20

static uint64_t size;

static void
fail(const char *what)
{
    printf("failed: %s: %s\n", what, strerror(errno));
    for (;;) {
        pause();
    }
}

static void
put(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY);

    if (fd < 0 || write(fd, text, strlen(text)) < 0) {
        fail(path);
    }
    close(fd);
}

static int
open_disk(void)
{
    struct timespec pause_between = { .tv_nsec = 50 * 1000 * 1000 };

    /* The driver looks for namespaces in its own time, and devtmpfs tells nobody. */
    for (int tries = 0; tries < SECONDS * 20; tries++) {
        int fd = open(DISK, O_RDWR | O_DIRECT);

        if (fd >= 0) {
            if (ioctl(fd, BLKGETSIZE64, &size)) {
                fail("asking for the size");
            }
            return fd;
        }
        nanosleep(&pause_between, NULL);
    }
    fail(DISK);
    return -1;
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
    DIR *all = opendir("/sys/bus/pci/drivers/nvme");
    struct dirent *one;
    char bdf[256] = "";

    while (all != NULL && (one = readdir(all)) != NULL) {
        if (strchr(one->d_name, ':') != NULL) {
            snprintf(bdf, sizeof(bdf), "%s", one->d_name);
        }
    }
    closedir(all);
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
    setvbuf(stdout, NULL, _IOLBF, 0);
    mkdir("/sys", 0755);
    mkdir("/dev", 0755);
    mount("sysfs", "/sys", "sysfs", 0, NULL);
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    look("found");
    fill();
    look("written");
    rebind();
    look("bound again");
    printf("done\n");
    for (;;) {
        pause();
    }
}
