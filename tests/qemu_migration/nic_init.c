/*
 * The first and only process of a guest that is migrated: frames go out by a network card and its own driver, and their
 * answers are compared.
 *
 * Each round sends some numbered frames of all lengths and waits for the answers, which have their contents turned over. A
 * frame whose answer does not come is sent again under the next number. Prints a line for each round: its number, how
 * many answers came in all, and how many were lost. It knows nothing of being moved.
 */
#define _GNU_SOURCE
#include "../vm/inner/inner.h"

#include <arpa/inet.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <poll.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>

/* For experiments in one place (IEEE 802). */
#define PROTOCOL 0x88b5
#define HEADER 14
#define SHORTEST 60
#define LONGEST 1514
#define FRAMES 8
#define LOST_MS 10000

static char name[IFNAMSIZ + 1];
static unsigned char own[6];
static uint64_t number;
static unsigned long answers, lost;

static void
load(const char *path)
{
    int fd = open(path, O_RDONLY);

    if (fd < 0 || syscall(SYS_finit_module, fd, "", 0)) {
        fail(path);
    }
    close(fd);
}

/* The interface that the driver makes. */
static int
find_interface(void)
{
    char path[512];
    struct dirent *one;
    DIR *all;

    snprintf(path, sizeof(path), DEVICES "/%s/net", bdf);
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
    memcpy(own, request.ifr_hwaddr.sa_data, sizeof(own));
    request.ifr_flags = IFF_UP;
    if (ioctl(fd, SIOCSIFFLAGS, &request)) {
        fail("switching the interface on");
    }
    snprintf(path, sizeof(path), "/sys/class/net/%s/carrier", name);
    for (int tries = 0; get_text(path, carrier, sizeof(carrier)) < 0 || carrier[0] != '1'; tries++) {
        look_again(tries, "waiting for a link");
    }
    address.sll_ifindex = (int)if_nametoindex(name);
    if (bind(fd, (struct sockaddr *)&address, sizeof(address))) {
        fail("listening on the interface");
    }
    return fd;
}

static int
make_frame(unsigned char *frame, uint64_t which)
{
    uint64_t state = which * 0x9e3779b97f4a7c15ULL + 1;
    int length = SHORTEST + (int)(state >> 33) % (LONGEST - SHORTEST + 1);

    memset(frame, 0xff, 6);
    memcpy(frame + 6, own, 6);
    frame[12] = PROTOCOL >> 8;
    frame[13] = PROTOCOL & 0xff;
    for (int at = 0; at < 8; at++) {
        frame[HEADER + at] = (unsigned char)(which >> 8 * (7 - at));
    }
    for (int at = HEADER + 8; at < length; at++) {
        state = state * 6364136223846793005ULL + 1442695040888963407ULL;
        frame[at] = (unsigned char)(state >> 56);
    }
    return length;
}

/* Take an answer: bit n for the n-th frame of the round that begins with number `first`, 0 for one of an earlier round. */
static unsigned
take(const unsigned char *answer, int length, uint64_t first)
{
    unsigned char sent[LONGEST];
    uint64_t which = 0;

    for (int at = 0; at < 8; at++) {
        which = which << 8 | (unsigned char)~answer[HEADER + at];
    }
    if (which >= number || make_frame(sent, which) != length || memcmp(answer, own, 6) != 0) {
        errno = EIO;
        fail("an answer to no frame");
    }
    for (int at = HEADER; at < length; at++) {
        if ((answer[at] ^ sent[at]) != 0xff) {
            errno = EIO;
            fail("comparing an answer");
        }
    }
    answers++;
    return which < first ? 0 : 1U << (which - first);
}

static void
work(int fd)
{
    unsigned char frame[LONGEST];
    struct pollfd ready = { .fd = fd, .events = POLLIN };

    for (unsigned long round = 1;; round++) {
        uint64_t first = number;
        unsigned missing = (1U << FRAMES) - 1;

        for (int at = 0; at < FRAMES; at++) {
            int length = make_frame(frame, number);

            if (send(fd, frame, (size_t)length, 0) != length) {
                fail("sending");
            }
            number++;
        }
        while (missing && poll(&ready, 1, LOST_MS) == 1) {
            ssize_t length = recv(fd, frame, LONGEST, 0);

            if (length < SHORTEST) {
                fail("receiving");
            }
            unsigned bit = take(frame, (int)length, first);

            if (bit && !(missing & bit)) {
                errno = EEXIST;
                fail("an answer that came before");
            }
            missing &= ~bit;
        }
        lost += (unsigned)__builtin_popcount(missing);
        printf("round %lu answers %lu lost %lu\n", round, answers, lost);
    }
}

int
main(void)
{
    start("0x10d3");
    load("/e1000e.ko");
    work(open_interface());
}
