/* Wake-ups: an eventfd write fails only when its counter is full, and then it is readable already. */
#include "eventfd.h"

#include <stdint.h>
#include <unistd.h>

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
