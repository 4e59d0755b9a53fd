#include "client.h"
#include "eventfd.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define MAX_BODY (32U + (1U << 20))
#define MAX_FDS 16
#define MAX_COMMANDS 64
#define ACCESS_TIMEOUT_MS 3000  /* QEMU gives up on us after 5 s */

enum { DMA_MAP = 2, DMA_UNMAP = 3, REGION_READ = 9, REGION_WRITE = 10 };
enum { FLAG_REPLY = 1, FLAG_TYPE = 0xf, FLAG_NO_REPLY = 0x10, FLAG_ERROR = 0x20 };

struct header {
    uint16_t id, command;
    uint32_t size, flags, error;
};

struct waiter {
    struct waiter *next;
    uint16_t id, command;
    void *reply;
    size_t cap, len;
    int *fds;
    size_t max_fds, nr_fds;
    int error;
    bool done;
};

struct vs_client {
    struct vs_door door;        /* first: the door is the client */
    int sock, event_fd;
    pthread_t reader;
    pthread_mutex_t send_lock;  /* whole messages only */
    pthread_mutex_t lock;       /* all below */
    pthread_cond_t done;
    struct waiter *waiters;
    struct vs_command *commands, **commands_end;
    size_t nr_commands;
    uint16_t next_id;
    size_t max_xfer;
    uint8_t *body;              /* the reader's */
};

void
vs_client_mark_gone(struct vs_client *client)
{
    atomic_store(&client->door.gone, true);
    shutdown(client->sock, SHUT_RDWR);
    pthread_mutex_lock(&client->lock);
    pthread_cond_broadcast(&client->done);
    pthread_mutex_unlock(&client->lock);
    vs_signal_fd(client->event_fd);
}

/* --- the reader --- */

static bool
read_all(int sock, void *data, size_t len)
{
    char *at = data;

    while (len > 0) {
        ssize_t n = recv(sock, at, len, 0);

        if (n == 0 || (n < 0 && errno != EINTR)) {
            return false;
        }
        if (n > 0) {
            at += n;
            len -= (size_t)n;
        }
    }
    return true;
}

static bool
read_header(int sock, struct header *header, int *fds, size_t *nr_fds)
{
    union {
        char bytes[CMSG_SPACE(MAX_FDS * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec iov = { header, sizeof(*header) };
    struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes,
                          .msg_controllen = sizeof(control.bytes) };
    ssize_t n = recvmsg(sock, &msg, MSG_CMSG_CLOEXEC);

    *nr_fds = 0;
    if (n <= 0) {
        return false;
    }
    for (struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg); cmsg != NULL; cmsg = CMSG_NXTHDR(&msg, cmsg)) {
        if (cmsg->cmsg_level == SOL_SOCKET && cmsg->cmsg_type == SCM_RIGHTS) {
            *nr_fds = (cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            memcpy(fds, CMSG_DATA(cmsg), *nr_fds * sizeof(int));
        }
    }
    return read_all(sock, (char *)header + n, sizeof(*header) - (size_t)n);
}

static void
give_reply(struct vs_client *client, const struct header *header, size_t len, int *fds, size_t *nr_fds)
{
    struct waiter **at;

    pthread_mutex_lock(&client->lock);
    for (at = &client->waiters; *at != NULL; at = &(*at)->next) {
        struct waiter *waiter = *at;

        if (waiter->id != header->id || waiter->command != header->command) {
            continue;
        }
        if ((header->flags & FLAG_ERROR) != 0) {
            waiter->error = header->error > 0 && header->error < 4096 ? (int)header->error : EIO;
        } else if (len > waiter->cap) {
            waiter->error = EMSGSIZE;
        } else {
            memcpy(waiter->reply, client->body, len);
            waiter->len = len;
        }
        while (*nr_fds > 0 && waiter->nr_fds < waiter->max_fds) {
            waiter->fds[waiter->nr_fds++] = fds[0];
            memmove(fds, fds + 1, --*nr_fds * sizeof(int));
        }
        waiter->done = true;
        *at = waiter->next;
        pthread_cond_broadcast(&client->done);
        break;      /* none found: its asker gave up, the reply is dropped whole */
    }
    pthread_mutex_unlock(&client->lock);
}

static bool
queue_command(struct vs_client *client, const struct header *header, size_t len)
{
    struct vs_command *command = malloc(sizeof(*command) + len);
    bool room;

    if (command == NULL) {
        return false;
    }
    *command = (struct vs_command){ .id = header->id, .command = header->command, .len = len };
    memcpy(command->data, client->body, len);
    pthread_mutex_lock(&client->lock);
    room = client->nr_commands < MAX_COMMANDS;
    if (room) {
        client->nr_commands++;
        *client->commands_end = command;
        client->commands_end = &command->next;
    }
    pthread_mutex_unlock(&client->lock);
    if (!room) {
        free(command);
        return vs_client_reply(client, header->command, header->id, NULL, 0, EBUSY) == 0;
    }
    vs_signal_fd(client->event_fd);
    return true;
}

static void *
reader_main(void *arg)
{
    struct vs_client *client = arg;
    struct header header;
    int fds[MAX_FDS];
    size_t nr_fds = 0;
    sigset_t all;
    bool good = true;

    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, NULL);
    prctl(PR_SET_NAME, "vfu-door");
    while (good && read_header(client->sock, &header, fds, &nr_fds)) {
        size_t len = header.size - sizeof(header);

        good = header.size >= sizeof(header) && len <= MAX_BODY && read_all(client->sock, client->body, len);
        if (good && (header.flags & FLAG_TYPE) == FLAG_REPLY) {
            give_reply(client, &header, len, fds, &nr_fds);
        } else if (good && (header.flags & FLAG_TYPE) == 0) {
            good = queue_command(client, &header, len);
        }
        for (size_t i = 0; i < nr_fds; i++) {
            close(fds[i]);
        }
        nr_fds = 0;
    }
    for (size_t i = 0; i < nr_fds; i++) {
        close(fds[i]);
    }
    vs_client_mark_gone(client);
    return NULL;
}

/* --- asking --- */

static int
send_message(struct vs_client *client, struct iovec *iov, size_t nr, const int *fds, size_t nr_fds)
{
    union {
        char bytes[CMSG_SPACE(MAX_FDS * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct msghdr msg = { .msg_iov = iov, .msg_iovlen = nr };
    int ret = 0;

    if (nr_fds > MAX_FDS) {
        return -EINVAL;
    }
    if (nr_fds > 0) {
        memset(&control, 0, sizeof(control));
        msg.msg_control = control.bytes;
        msg.msg_controllen = CMSG_SPACE(nr_fds * sizeof(int));
        control.align.cmsg_level = SOL_SOCKET;
        control.align.cmsg_type = SCM_RIGHTS;
        control.align.cmsg_len = CMSG_LEN(nr_fds * sizeof(int));
        memcpy(CMSG_DATA(&control.align), fds, nr_fds * sizeof(int));
    }
    pthread_mutex_lock(&client->send_lock);
    while (ret == 0 && msg.msg_iovlen > 0) {
        ssize_t n = sendmsg(client->sock, &msg, MSG_NOSIGNAL);

        if (n < 0) {
            ret = errno == EINTR ? 0 : -ENODEV;     /* a server that takes no more for seconds is gone, too */
            continue;
        }
        msg.msg_control = NULL;
        msg.msg_controllen = 0;
        while (msg.msg_iovlen > 0 && (size_t)n >= msg.msg_iov->iov_len) {
            n -= (ssize_t)msg.msg_iov->iov_len;
            msg.msg_iov++;
            msg.msg_iovlen--;
        }
        if (msg.msg_iovlen > 0) {
            msg.msg_iov->iov_base = (char *)msg.msg_iov->iov_base + n;
            msg.msg_iov->iov_len -= (size_t)n;
        }
    }
    pthread_mutex_unlock(&client->send_lock);
    if (ret < 0) {
        vs_client_mark_gone(client);
    }
    return ret;
}

static void
forget(struct vs_client *client, struct waiter *waiter)
{
    struct waiter **at = &client->waiters;

    while (*at != NULL && *at != waiter) {
        at = &(*at)->next;
    }
    if (*at != NULL) {
        *at = waiter->next;
    }
}

static long
request(struct vs_client *client, unsigned command, const void *head, size_t head_len, const void *data, size_t len,
        const int *send_fds, size_t nr_send_fds, struct waiter *waiter, int timeout_ms)
{
    struct header header = { .command = (uint16_t)command, .size = (uint32_t)(sizeof(header) + head_len + len) };
    struct iovec iov[3] = { { &header, sizeof(header) }, { (void *)(uintptr_t)head, head_len },
                            { (void *)(uintptr_t)data, len } };
    struct timespec until;
    int ret;

    if (atomic_load(&client->door.gone)) {
        return -ENODEV;
    }
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += timeout_ms / 1000;
    until.tv_nsec += (long)(timeout_ms % 1000) * 1000000L;
    until.tv_sec += until.tv_nsec / 1000000000L;
    until.tv_nsec %= 1000000000L;
    pthread_mutex_lock(&client->lock);
    header.id = waiter->id = ++client->next_id;
    waiter->command = header.command;
    waiter->next = client->waiters;
    client->waiters = waiter;
    pthread_mutex_unlock(&client->lock);
    ret = send_message(client, iov, 3, send_fds, nr_send_fds);
    pthread_mutex_lock(&client->lock);
    while (ret == 0 && !waiter->done && !atomic_load(&client->door.gone)) {
        ret = -pthread_cond_timedwait(&client->done, &client->lock, &until);
    }
    if (!waiter->done) {
        ret = ret == 0 ? -ENODEV : ret;
        forget(client, waiter);
    } else {
        ret = 0;
    }
    pthread_mutex_unlock(&client->lock);
    if (ret < 0) {
        return ret;
    }
    return waiter->error != 0 ? -(long)waiter->error : (long)waiter->len;
}

long
vs_client_request(struct vs_client *client, unsigned command, const void *data, size_t len, const int *send_fds,
                  size_t nr_send_fds, void *reply, size_t cap, int *fds, size_t *nr_fds, int timeout_ms)
{
    struct waiter waiter = { .reply = reply, .cap = cap, .fds = fds, .max_fds = nr_fds != NULL ? *nr_fds : 0 };
    long ret = request(client, command, data, len, NULL, 0, send_fds, nr_send_fds, &waiter, timeout_ms);

    if (nr_fds != NULL) {
        *nr_fds = waiter.nr_fds;
    }
    return ret;
}

int
vs_client_reply(struct vs_client *client, unsigned command, unsigned id, const void *data, size_t len, int error)
{
    struct header header = { .id = (uint16_t)id, .command = (uint16_t)command,
                             .size = (uint32_t)(sizeof(header) + (error == 0 ? len : 0)),
                             .flags = FLAG_REPLY | (error != 0 ? FLAG_ERROR : 0), .error = (uint32_t)error };
    struct iovec iov[2] = { { &header, sizeof(header) }, { (void *)(uintptr_t)data, error == 0 ? len : 0 } };

    return send_message(client, iov, 2, NULL, 0);
}

/* --- the door --- */

static int
client_access_piece(struct vs_client *client, unsigned region, uint64_t offset, void *buf, size_t count, bool write)
{
    struct { uint64_t offset; uint32_t region, count; } access = { offset, region, (uint32_t)count };
    struct { uint64_t offset; uint32_t region, count; uint8_t data[8]; } small;
    uint8_t *reply = count <= 8 ? (uint8_t *)&small : malloc(sizeof(access) + count);
    struct waiter waiter = { .reply = reply, .cap = sizeof(access) + (write ? 0 : count) };
    long ret;

    if (reply == NULL) {
        return -ENOMEM;
    }
    ret = request(client, write ? REGION_WRITE : REGION_READ, &access, sizeof(access), buf, write ? count : 0, NULL, 0,
                  &waiter, ACCESS_TIMEOUT_MS);
    if (ret == -ETIMEDOUT) {
        vs_client_mark_gone(client);    /* what it did with the access, nobody knows */
    } else if (ret >= 0 && (size_t)ret < waiter.cap) {
        ret = -EIO;                     /* a short access */
    } else if (ret >= 0 && !write) {
        memcpy(buf, reply + sizeof(access), count);
    }
    if (reply != (uint8_t *)&small) {
        free(reply);
    }
    return ret < 0 ? (int)ret : 0;
}

static int
client_access(struct vs_door *door, unsigned region, uint64_t offset, void *buf, size_t count, bool write)
{
    struct vs_client *client = (struct vs_client *)door;
    char *at = buf;

    while (count > 0) {
        size_t piece = count < client->max_xfer ? count : client->max_xfer;
        int ret = client_access_piece(client, region, offset, at, piece, write);

        if (ret < 0) {
            return ret;
        }
        offset += piece;
        at += piece;
        count -= piece;
    }
    return 0;
}

/* One message. A server that takes 8 bytes at most gets the halves as an emulator makes them, the low one first. */
static int
client_wide(struct vs_door *door, unsigned region, uint64_t offset, const uint8_t data[16])
{
    struct vs_client *client = (struct vs_client *)door;
    uint8_t copy[16];
    int ret;

    memcpy(copy, data, sizeof(copy));
    if (client->max_xfer >= sizeof(copy)) {
        ret = client_access_piece(client, region, offset, copy, sizeof(copy), true);
        if (ret != -EINVAL) {
            return ret;
        }
    }
    ret = client_access_piece(client, region, offset, copy, 8, true);
    return ret < 0 ? ret : client_access_piece(client, region, offset + 8, copy + 8, 8, true);
}

/* A server that leaves one of these unanswered is given up: thousands may follow, each as long, under the lock of the maps. */
static int
answer(struct vs_client *client, long ret)
{
    if (ret == -ETIMEDOUT) {
        vs_client_mark_gone(client);
    }
    return ret < 0 ? (int)ret : 0;
}

static int
client_map(struct vs_door *door, struct vs_map *map)
{
    struct { uint32_t argsz, flags; uint64_t offset, iova, size; } message = {
        sizeof(message), map->prot, map->fd < 0 ? 0 : map->fd_offset, map->iova, map->size };
    long ret = vs_client_request((struct vs_client *)door, DMA_MAP, &message, sizeof(message), &map->fd,
                                 map->fd >= 0, NULL, 0, NULL, NULL, ACCESS_TIMEOUT_MS);

    return answer((struct vs_client *)door, ret);
}

static int
client_unmap(struct vs_door *door, struct vs_map *map)
{
    struct { uint32_t argsz, flags; uint64_t iova, size; } message = { sizeof(message), 0, map->iova, map->size };
    uint8_t reply[sizeof(message)];
    long ret = vs_client_request((struct vs_client *)door, DMA_UNMAP, &message, sizeof(message), NULL, 0, reply,
                                 sizeof(reply), NULL, NULL, ACCESS_TIMEOUT_MS);

    return answer((struct vs_client *)door, ret);
}

static void
client_close(struct vs_door *door)
{
    struct vs_client *client = (struct vs_client *)door;
    struct vs_command *command, *next;

    vs_client_mark_gone(client);
    pthread_join(client->reader, NULL);
    for (command = client->commands; command != NULL; command = next) {
        next = command->next;
        free(command);
    }
    close(client->sock);
    close(client->event_fd);
    pthread_mutex_destroy(&client->send_lock);
    pthread_mutex_destroy(&client->lock);
    pthread_cond_destroy(&client->done);
    free(client->body);
    free(client);
}

static const struct vs_door_ops client_ops = {
    .access = client_access,
    .wide = client_wide,
    .map = client_map,
    .unmap = client_unmap,
    .close = client_close,
    .by_messages = true,
};

struct vs_client *
vs_client_open(int sock, size_t max_maps)
{
    struct vs_client *client = calloc(1, sizeof(*client));
    struct timeval send_timeout = { .tv_sec = ACCESS_TIMEOUT_MS / 1000 };
    pthread_condattr_t attr;

    if (client == NULL || vs_door_init(&client->door, &client_ops, max_maps) < 0) {
        free(client);
        return NULL;
    }
    client->sock = sock;
    client->max_xfer = 1U << 20;
    client->commands_end = &client->commands;
    client->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    client->body = malloc(MAX_BODY);
    setsockopt(sock, SOL_SOCKET, SO_SNDTIMEO, &send_timeout, sizeof(send_timeout));
    pthread_mutex_init(&client->send_lock, NULL);
    pthread_mutex_init(&client->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&client->done, &attr);
    pthread_condattr_destroy(&attr);
    if (client->event_fd < 0 || client->body == NULL ||
        pthread_create(&client->reader, NULL, reader_main, client) != 0) {
        close(client->event_fd);
        free(client->body);
        free(client);
        return NULL;
    }
    return client;
}

struct vs_door *
vs_client_door(struct vs_client *client)
{
    return &client->door;
}

int
vs_client_fileno(struct vs_client *client)
{
    return client->event_fd;
}

struct vs_command *
vs_client_next_command(struct vs_client *client)
{
    struct vs_command *command;
    uint64_t count;

    pthread_mutex_lock(&client->lock);
    command = client->commands;
    if (command != NULL) {
        client->commands = command->next;
        if (client->commands == NULL) {
            client->commands_end = &client->commands;
        }
        client->nr_commands--;
    } else if (!atomic_load(&client->door.gone)) {
        (void)!read(client->event_fd, &count, sizeof(count));   /* once gone it stays readable */
    }
    pthread_mutex_unlock(&client->lock);
    return command;
}

void
vs_command_free(struct vs_command *command)
{
    free(command);
}

void
vs_client_set_max_xfer(struct vs_client *client, size_t max_xfer)
{
    if (max_xfer > 0 && max_xfer < client->max_xfer) {
        client->max_xfer = max_xfer;
    }
}
