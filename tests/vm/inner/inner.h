/*
 * What the programs of the inner machine share: each is its first and only process, and tells the console what it finds.
 *
 * A line "started" once the kernel has booted, "config ..." with the function's config space as `lspci -xxxx` prints it,
 * "result: ...", and "done", or "failed: ...". Then it waits: the machine is reset or ended from outside.
 */
#ifndef INNER_H
#define INNER_H

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define SECONDS 240
#define DEVICES "/sys/bus/pci/devices"

static char bdf[256];

static void
fail(const char *what)
{
    printf("failed: %s: %s\n", what, strerror(errno));
    for (;;) {
        pause();
    }
}

static inline void
put(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY);

    if (fd < 0 || write(fd, text, strlen(text)) < 0) {
        fail(path);
    }
    close(fd);
}

static inline ssize_t
get_text(const char *path, char *text, size_t size)
{
    int fd = open(path, O_RDONLY);
    ssize_t length = fd < 0 ? -1 : read(fd, text, size - 1);

    text[length > 0 ? length : 0] = '\0';
    close(fd);
    return length;
}

/* Some things come in their own time, and nobody tells of them: look again, `tries` from 0 on, until SECONDS are over. */
static inline void
look_again(int tries, const char *what)
{
    struct timespec between = { .tv_nsec = 50 * 1000 * 1000 };

    if (tries >= SECONDS * 20) {
        errno = ETIMEDOUT;
        fail(what);
    }
    nanosleep(&between, NULL);
}

/* The function with this device id, as sysfs writes it. */
static inline void
find_function(const char *id)
{
    DIR *all = opendir(DEVICES);
    struct dirent *one;

    while (all != NULL && (one = readdir(all)) != NULL) {
        char path[512], text[16];

        snprintf(path, sizeof(path), DEVICES "/%s/device", one->d_name);
        if (get_text(path, text, sizeof(text)) > 0 && strncmp(text, id, strlen(id)) == 0) {
            snprintf(bdf, sizeof(bdf), "%s", one->d_name);
        }
    }
    closedir(all);
    if (bdf[0] == '\0') {
        errno = ENODEV;
        fail(id);
    }
}

static inline void
start(const char *id)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    mkdir("/proc", 0755);
    mkdir("/sys", 0755);
    mkdir("/dev", 0755);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sysfs", "/sys", "sysfs", 0, NULL);
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    printf("started\n");
    find_function(id);
}

/* Config space in the form that `lspci -F` reads. */
static inline void
print_config(void)
{
    unsigned char space[4096];
    char path[512];
    ssize_t size;
    int fd;

    snprintf(path, sizeof(path), DEVICES "/%s/config", bdf);
    fd = open(path, O_RDONLY);
    size = fd < 0 ? -1 : read(fd, space, sizeof(space));
    if (size < 256) {
        fail(path);
    }
    close(fd);
    printf("config %s the function\n", bdf);
    for (int at = 0; at < size; at += 16) {
        char line[64], *end = line;

        end += sprintf(end, "%02x:", at);
        for (int byte = at; byte < at + 16; byte++) {
            end += sprintf(end, " %02x", space[byte]);
        }
        printf("config %s\n", line);
    }
}

static inline void
done(void)
{
    printf("done\n");
    for (;;) {
        pause();
    }
}

#endif
