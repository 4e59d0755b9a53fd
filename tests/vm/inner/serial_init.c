/*
 * Keeps a card with two serial ports busy, in a guest that is migrated: the kernel's own driver, 16550 ports that give
 * back what they are given (mtty, 4348:3253).
 *
 * Each round writes a text that follows from its number to both ports, reads as much from each, and compares; then asks
 * the driver what it has counted. Prints a line for each round: its number, the bytes that came to each port by the
 * driver's count, and errors of any kind. It knows nothing of being moved.
 */
#include "inner.h"

#include <linux/serial.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <termios.h>

#define PORTS 2
/* With a sixteenth byte in its FIFO, mtty takes it for empty. */
#define LENGTH 15

static int ports[PORTS];

static int
open_port(const char *name)
{
    struct termios line;
    char path[300];
    int fd;

    snprintf(path, sizeof(path), "/dev/%s", name);
    fd = open(path, O_RDWR | O_NOCTTY);
    if (fd < 0 || tcgetattr(fd, &line)) {
        fail(path);
    }
    cfmakeraw(&line);
    line.c_cflag |= CLOCAL;
    cfsetspeed(&line, B115200);
    if (tcsetattr(fd, TCSANOW, &line)) {
        fail(path);
    }
    return fd;
}

/* The terminals below the function, in the order of their names. */
static int
open_ports(void)
{
    struct dirent **names;
    int count = scandir("/sys/class/tty", &names, NULL, alphasort), found = 0;

    for (int at = 0; at < count; at++) {
        char path[300], link[512] = "";

        snprintf(path, sizeof(path), "/sys/class/tty/%s", names[at]->d_name);
        if (readlink(path, link, sizeof(link) - 1) > 0 && strstr(link, bdf) != NULL && found < PORTS) {
            ports[found++] = open_port(names[at]->d_name);
        }
    }
    return found;
}

static void
text_of(char *text, unsigned long round, int port)
{
    snprintf(text, LENGTH + 1, "%c%014lx", 'A' + port, round * 0x9e3779b97f4aUL);
}

static void
read_all(int fd, char *text)
{
    for (int length = 0; length < LENGTH;) {
        struct pollfd ready = { .fd = fd, .events = POLLIN };
        ssize_t got;

        if (poll(&ready, 1, SECONDS * 1000) != 1) {
            errno = ETIMEDOUT;
            fail("waiting for what was sent");
        }
        got = read(fd, text + length, LENGTH - length);
        if (got <= 0) {
            fail("reading");
        }
        length += got;
    }
}

static void
work(unsigned long round)
{
    char sent[LENGTH + 1], came[LENGTH + 1] = "";
    int received[PORTS], errors = 0;

    for (int port = 0; port < PORTS; port++) {
        text_of(sent, round, port);
        if (write(ports[port], sent, LENGTH) != LENGTH) {
            fail("writing");
        }
    }
    for (int port = 0; port < PORTS; port++) {
        struct serial_icounter_struct count;

        text_of(sent, round, port);
        read_all(ports[port], came);
        if (memcmp(sent, came, LENGTH) != 0) {
            errno = EIO;
            fail("comparing what came with what was sent");
        }
        if (ioctl(ports[port], TIOCGICOUNT, &count)) {
            fail("asking the driver for its counts");
        }
        received[port] = count.rx;
        errors += count.frame + count.overrun + count.parity + count.brk + count.buf_overrun + (count.tx != count.rx);
    }
    printf("round %lu first %d second %d errors %d\n", round, received[0], received[1], errors);
}

int
main(void)
{
    start("0x3253");
    for (int tries = 0; open_ports() < PORTS; tries++) {
        look_again(tries, "the card's ports");
    }
    for (unsigned long round = 1;; round++) {
        work(round);
    }
}
