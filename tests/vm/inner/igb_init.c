/*
 * Uses a network card's virtual function through the kernel's own igbvf driver, in a guest inside the test machine.
 *
 * Frames of all lengths go to the card and each comes back with its contents turned over; then the driver is taken from
 * the function and given back and all is done again. Who answers is a program outside that has the card's own interface.
 */
#define _GNU_SOURCE
#include "inner.h"

#include <arpa/inet.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

/* For experiments in one place (IEEE 802). */
#define PROTOCOL 0x88b5
#define HEADER 14
#define SHORTEST 60
#define LONGEST 1514
#define STEP 23
#define GREETING_MS 1000
/* Of 50 ms. */
#define RESET_TRIES 300

static char name[IFNAMSIZ + 1];
static unsigned char here[6], there[6] = { 0xff, 0xff, 0xff, 0xff, 0xff, 0xff };

/* The interface that the driver makes. */
static int
find_interface(void)
{
    char path[512];
    struct dirent *one;
    DIR *all;

    snprintf(path, sizeof(path), DEVICES "/%s/net", bdf);
    name[0] = '\0';
    if ((all = opendir(path)) == NULL) {
        return 0;
    }
    while ((one = readdir(all)) != NULL) {
        if (one->d_name[0] != '.') {
            snprintf(name, sizeof(name), "%.*s", IFNAMSIZ, one->d_name);
        }
    }
    closedir(all);
    return name[0] != '\0';
}

static void
switch_interface(int fd, bool on)
{
    struct ifreq request;

    memset(&request, 0, sizeof(request));
    memcpy(request.ifr_name, name, IFNAMSIZ);
    request.ifr_flags = on ? IFF_UP : 0;
    if (ioctl(fd, SIOCSIFFLAGS, &request)) {
        fail("switching the interface");
    }
}

static int
open_interface(void)
{
    struct sockaddr_ll address = { .sll_family = AF_PACKET, .sll_protocol = htons(PROTOCOL) };
    int fd = socket(AF_PACKET, SOCK_RAW, htons(PROTOCOL));
    char path[512], carrier[4] = "";
    struct ifreq request;

    for (int tries = 0; !find_interface(); tries++) {
        look_again(tries, "waiting for an interface");
    }
    memset(&request, 0, sizeof(request));
    memcpy(request.ifr_name, name, IFNAMSIZ);
    if (fd < 0 || ioctl(fd, SIOCGIFHWADDR, &request)) {
        fail("asking for the hardware address");
    }
    memcpy(here, request.ifr_hwaddr.sa_data, sizeof(here));
    switch_interface(fd, true);
    snprintf(path, sizeof(path), "/sys/class/net/%s/carrier", name);
    for (int tries = 0; get_text(path, carrier, sizeof(carrier)) < 0 || carrier[0] != '1'; tries++) {
        look_again(tries, "waiting for a link");
        /* The driver gives the card's driver a second to answer, and then asks nothing more until it is reset. */
        if (tries % RESET_TRIES == RESET_TRIES - 1) {
            printf("no link yet: the interface is switched off and on\n");
            switch_interface(fd, false);
            switch_interface(fd, true);
        }
    }
    address.sll_ifindex = (int)if_nametoindex(name);
    if (bind(fd, (struct sockaddr *)&address, sizeof(address))) {
        fail("listening on the interface");
    }
    return fd;
}

static void
send_frame(int fd, unsigned char *frame, int length)
{
    memcpy(frame, there, 6);
    memcpy(frame + 6, here, 6);
    frame[12] = PROTOCOL >> 8;
    frame[13] = PROTOCOL & 0xff;
    if (send(fd, frame, (size_t)length, 0) != length) {
        fail("sending");
    }
}

/* The next frame that is for us: its length, or 0 when none came in time. */
static int
receive_frame(int fd, unsigned char *frame, int milliseconds)
{
    struct pollfd ready = { .fd = fd, .events = POLLIN };

    while (poll(&ready, 1, milliseconds) == 1) {
        ssize_t length = recv(fd, frame, LONGEST, 0);

        if (length >= SHORTEST && memcmp(frame, here, 6) == 0) {
            return (int)length;
        }
    }
    return 0;
}

/* Until somebody answers: the first frames may be gone before the link is up on both sides. */
static void
greet(int fd)
{
    unsigned char frame[LONGEST], answer[LONGEST];

    memset(frame, 0, sizeof(frame));
    memset(there, 0xff, sizeof(there));
    for (int tries = 0; tries < SECONDS * 1000 / GREETING_MS; tries++) {
        send_frame(fd, frame, SHORTEST);
        if (receive_frame(fd, answer, GREETING_MS)) {
            memcpy(there, answer + 6, 6);
            /* Late answers to greetings that were not lost. */
            while (receive_frame(fd, answer, GREETING_MS)) {
                continue;
            }
            return;
        }
    }
    errno = ETIMEDOUT;
    fail("greeting");
}

static void
work(const char *when)
{
    unsigned char frame[LONGEST], answer[LONGEST];
    uint64_t sum = 0xcbf29ce484222325ULL, state = 1;
    int fd = open_interface(), frames = 0;

    printf("result: %s, address %02x:%02x:%02x:%02x:%02x:%02x\n", when, here[0], here[1], here[2], here[3], here[4],
           here[5]);
    greet(fd);
    for (int length = SHORTEST; length <= LONGEST; length += STEP, frames++) {
        for (int at = HEADER; at < length; at++) {
            state = state * 6364136223846793005ULL + 1442695040888963407ULL;
            frame[at] = (unsigned char)(state >> 56);
        }
        send_frame(fd, frame, length);
        if (receive_frame(fd, answer, SECONDS * 1000) != length) {
            errno = EIO;
            fail("waiting for a frame of the same length");
        }
        for (int at = HEADER; at < length; at++) {
            if ((answer[at] ^ frame[at]) != 0xff) {
                errno = EIO;
                fail("comparing what came back");
            }
            sum = (sum ^ answer[at]) * 0x100000001b3ULL;
        }
    }
    printf("result: %d frames of %d to %d bytes there and back, sum %016llx\n", frames, SHORTEST,
           SHORTEST + (frames - 1) * STEP, (unsigned long long)sum);
    close(fd);
}

int
main(void)
{
    start("0x10ca");
    work("bound");
    print_config();
    put("/sys/bus/pci/drivers/igbvf/unbind", bdf);
    if (find_interface()) {
        errno = EBUSY;
        fail("the interface is there without its driver");
    }
    printf("unbound\n");
    put("/sys/bus/pci/drivers/igbvf/bind", bdf);
    printf("bound\n");
    work("bound again");
    done();
}
