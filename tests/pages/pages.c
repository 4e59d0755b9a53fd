/*
 * A kernel with pages of 64 KiB, as a program sees it through libc: preloaded,
 * it answers the page size, and places, sizes and refuses mappings in such
 * pages. What libc maps for itself it does not see; that is nobody's contract.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGE ((uintptr_t)64 << 10)
#define WHOLE(size) (((size) + PAGE - 1) & ~(PAGE - 1))

long
sysconf(int name)
{
    static long (*real)(int);

    if (name == _SC_PAGESIZE) {
        return (long)PAGE;
    }
    if (real == NULL) {
        real = (long (*)(int))dlsym(RTLD_NEXT, "sysconf");
    }
    return real(name);
}

int
getpagesize(void)
{
    return (int)PAGE;
}

static void *
map(void *at, size_t size, int prot, int flags, int fd, off_t offset)
{
    return (void *)syscall(SYS_mmap, at, size, prot, flags, fd, offset);
}

void *
mmap(void *at, size_t size, int prot, int flags, int fd, off_t offset)
{
    uint8_t *room, *start;
    void *done;

    if ((uintptr_t)offset % PAGE != 0 || size == 0 ||
        ((flags & (MAP_FIXED | MAP_FIXED_NOREPLACE)) != 0 && (uintptr_t)at % PAGE != 0)) {
        errno = EINVAL;
        return MAP_FAILED;
    }
    if ((flags & (MAP_FIXED | MAP_FIXED_NOREPLACE)) != 0) {
        return map(at, size, prot, flags, fd, offset);
    }
    room = map(NULL, WHOLE(size) + PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED) {
        return MAP_FAILED;
    }
    start = (uint8_t *)WHOLE((uintptr_t)room);
    if (start != room) {
        syscall(SYS_munmap, room, start - room);
    }
    syscall(SYS_munmap, start + WHOLE(size), room + PAGE - start);
    done = map(start, size, prot, flags | MAP_FIXED, fd, offset);
    if (done == MAP_FAILED) {
        int error = errno;

        syscall(SYS_munmap, start, WHOLE(size));
        errno = error;
    }
    return done;
}

void *
mmap64(void *at, size_t size, int prot, int flags, int fd, off_t offset)
{
    return mmap(at, size, prot, flags, fd, offset);
}

int
munmap(void *at, size_t size)
{
    if ((uintptr_t)at % PAGE != 0) {
        errno = EINVAL;
        return -1;
    }
    return (int)syscall(SYS_munmap, at, WHOLE(size));
}
