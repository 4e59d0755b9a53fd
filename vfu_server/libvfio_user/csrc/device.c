/* A device's life, and the queues between the pump's thread and Python. */
#include "device.h"
#include "eventfd.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_NOTICES 64

extern int vs_trap(void *handle, bool write, unsigned region, uint64_t offset, void *buf, size_t count);

struct vs_device *
vs_device_new(const char *name, struct vs_door *door, void *handle, size_t ring_size)
{
    struct vs_device *device = calloc(1, sizeof(*device));
    pthread_condattr_t attr;

    if (device == NULL) {
        return NULL;
    }
    device->name = strdup(name);
    device->door = door;
    device->sock = -1;
    device->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    device->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    device->events_end = &device->events;
    device->outgoing_end = &device->outgoing;
    device->held_end = &device->held;
    device->flr_offset[0] = device->flr_offset[1] = -1;
    for (unsigned i = 0; i < VS_NUM_REGIONS; i++) {
        device->regions[i].fd = -1;
    }
    pthread_mutex_init(&device->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&device->replied, &attr);
    pthread_condattr_destroy(&attr);
    if (device->name == NULL || device->wake_fd < 0 || device->event_fd < 0 ||
        vs_ring_init(&device->ring, ring_size, device->wake_fd) < 0 ||
        vs_table_init(&device->table, door, vs_trap, handle) < 0) {
        close(device->wake_fd);
        close(device->event_fd);
        free(device->name);
        free(device);
        return NULL;
    }
    return device;
}

void
vs_device_free(struct vs_device *device)
{
    struct vs_event *event;

    vs_device_shutdown(device);
    vs_device_join(device);
    while ((event = vs_device_next_event(device)) != NULL) {
        vs_close_fds(device, event->fds, &event->nr_fds);
        vs_event_free(event);
    }
    for (unsigned i = 0; i < VS_NUM_REGIONS; i++) {
        free(device->regions[i].areas);
    }
    vs_table_fini(&device->table);
    vs_ring_fini(&device->ring);
    pthread_cond_destroy(&device->replied);
    pthread_mutex_destroy(&device->lock);
    close(device->wake_fd);
    close(device->event_fd);
    free(device->buffer);
    free(device->name);
    free(device);
}

int
vs_device_set_region(struct vs_device *device, unsigned index, uint64_t size, uint32_t flags, int fd,
                     uint64_t fd_offset)
{
    if (index >= VS_NUM_REGIONS) {
        return -EINVAL;
    }
    device->regions[index].size = size;
    device->regions[index].flags = flags;
    device->regions[index].fd = fd;
    device->regions[index].fd_offset = fd_offset;
    return 0;
}

int
vs_device_add_area(struct vs_device *device, unsigned index, uint64_t offset, uint64_t size)
{
    struct vs_region *region;
    void *areas;

    if (index >= VS_NUM_REGIONS) {
        return -EINVAL;
    }
    region = &device->regions[index];
    areas = realloc(region->areas, (region->nr_areas + 1) * sizeof(*region->areas));
    if (areas == NULL) {
        return -ENOMEM;
    }
    region->areas = areas;
    region->areas[region->nr_areas].offset = offset;
    region->areas[region->nr_areas++].size = size;
    return 0;
}

void
vs_device_set_irq(struct vs_device *device, unsigned index, uint32_t count, uint32_t flags)
{
    if (index < VS_NUM_IRQS) {
        device->irqs[index] = (struct vs_irq){ .count = count, .flags = flags };
    }
}

void
vs_device_set_flags(struct vs_device *device, uint32_t flags)
{
    device->flags = flags;
}

void
vs_device_set_flr(struct vs_device *device, unsigned which, int64_t offset, uint8_t mask)
{
    if (which < 2) {
        device->flr_offset[which] = offset;
        device->flr_mask[which] = mask;
    }
}

int
vs_device_attach(struct vs_device *device, int sock)
{
    int ret;

    if (device->thread_started) {
        return -EBUSY;
    }
    /* The pump waits in recvmsg and sendmsg; a socket that comes out of an event loop does not. */
    fcntl(sock, F_SETFL, fcntl(sock, F_GETFL) & ~O_NONBLOCK);
    pthread_mutex_lock(&device->lock);
    device->sock = sock;
    device->connected = true;
    device->counters.connections++;
    pthread_mutex_unlock(&device->lock);
    ret = -pthread_create(&device->thread, NULL, vs_pump_main, device);
    device->thread_started = ret == 0;
    if (ret < 0) {
        device->connected = false;
        device->sock = -1;
        close(sock);
    }
    return ret;
}

void
vs_device_shutdown(struct vs_device *device)
{
    pthread_mutex_lock(&device->lock);
    if (device->sock >= 0) {
        shutdown(device->sock, SHUT_RDWR);
    }
    pthread_mutex_unlock(&device->lock);
    vs_signal_fd(device->wake_fd);
}

int
vs_device_join(struct vs_device *device)
{
    if (!device->thread_started) {
        return 0;
    }
    device->thread_started = false;
    return -pthread_join(device->thread, NULL);
}

int
vs_device_peer_gone(struct vs_device *device)
{
    struct pollfd pfd = { .events = 0 };
    int gone = 1;

    /* POLLHUP is told whatever lies unread before the end. */
    pthread_mutex_lock(&device->lock);
    if (device->sock >= 0) {
        pfd.fd = device->sock;
        gone = poll(&pfd, 1, 0) == 1 && (pfd.revents & (POLLHUP | POLLERR)) != 0;
    }
    pthread_mutex_unlock(&device->lock);
    return gone;
}

struct vs_event *
vs_event_new(int kind, const void *data, size_t len)
{
    struct vs_event *event = malloc(sizeof(*event) + len + 1);

    if (event != NULL) {
        memset(event, 0, sizeof(*event));
        event->kind = kind;
        event->len = len;
        memcpy(event->data, data, len);
        event->data[len] = 0;
    }
    return event;
}

void
vs_event_free(struct vs_event *event)
{
    free(event->buffer);
    free(event);
}

void
vs_post(struct vs_device *device, struct vs_event *event)
{
    if (event == NULL) {
        return;
    }
    pthread_mutex_lock(&device->lock);
    event->next = NULL;
    *device->events_end = event;
    device->events_end = &event->next;
    pthread_mutex_unlock(&device->lock);
    vs_signal_fd(device->event_fd);
}

void
vs_notice(struct vs_device *device, const char *format, ...)
{
    struct vs_event *event;
    char text[240];
    va_list args;
    bool room;
    int n;

    va_start(args, format);
    n = vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    pthread_mutex_lock(&device->lock);
    device->counters.notices++;
    room = device->nr_notices < MAX_NOTICES;
    device->nr_notices += room;
    device->counters.notices_lost += !room;
    pthread_mutex_unlock(&device->lock);
    if (room && (event = vs_event_new(VS_EVENT_NOTICE, text, n < (int)sizeof(text) ? (size_t)n : sizeof(text) - 1))) {
        vs_post(device, event);
    }
}

struct vs_event *
vs_device_next_event(struct vs_device *device)
{
    struct vs_event *event;
    uint64_t count;

    pthread_mutex_lock(&device->lock);
    event = device->events;
    if (event == NULL) {
        (void)!read(device->event_fd, &count, sizeof(count));
    } else {
        device->events = event->next;
        if (device->events == NULL) {
            device->events_end = &device->events;
        }
        device->nr_notices -= event->kind == VS_EVENT_NOTICE;
    }
    pthread_mutex_unlock(&device->lock);
    return event;
}

static struct vs_outgoing *
outgoing_new(const struct vs_header *header, const void *data, size_t len, const int *fds, size_t nr_fds)
{
    struct vs_outgoing *out = malloc(sizeof(*out) + len);

    if (out == NULL) {
        return NULL;
    }
    memset(out, 0, sizeof(*out));
    out->header = *header;
    out->len = len;
    memcpy(out->data, data, len);
    for (size_t i = 0; i < nr_fds && i < VS_MAX_FDS; i++) {
        int fd = fcntl(fds[i], F_DUPFD_CLOEXEC, 0);

        if (fd >= 0) {
            out->fds[out->nr_fds++] = fd;
        }
    }
    return out;
}

/* Hands `out` to the pump, or frees it where no client is left to get it. */
static int
hand_over(struct vs_device *device, struct vs_outgoing *out)
{
    bool connected;

    pthread_mutex_lock(&device->lock);
    connected = device->connected;
    if (connected) {
        *device->outgoing_end = out;
        device->outgoing_end = &out->next;
    }
    pthread_mutex_unlock(&device->lock);
    if (!connected) {
        vs_close_fds(device, out->fds, &out->nr_fds);
        free(out);
        return -ENOTCONN;
    }
    vs_signal_fd(device->wake_fd);
    return 0;
}

int
vs_device_reply(struct vs_device *device, const struct vs_header *header, const void *data, size_t len, int error,
                const int *fds, size_t nr_fds)
{
    struct vs_outgoing *out = outgoing_new(header, data, len, fds, nr_fds);

    if (out == NULL) {
        return -ENOMEM;
    }
    out->header.error = (uint32_t)error;
    out->ends_busy = true;
    return hand_over(device, out);
}

static void
forget_request(struct vs_device *device, struct vs_request *request)
{
    struct vs_request **at = &device->requests;

    while (*at != NULL && *at != request) {
        at = &(*at)->next;
    }
    if (*at != NULL) {
        *at = request->next;
    }
}

/* A command that was not sent yet and that nobody waits for any more. */
static struct vs_outgoing *
take_back(struct vs_device *device, uint16_t id)
{
    struct vs_outgoing **at = &device->outgoing, *out;

    while ((out = *at) != NULL && (out->ends_busy || out->header.id != id)) {
        at = &out->next;
    }
    if (out != NULL) {
        *at = out->next;
        if (out->next == NULL) {
            device->outgoing_end = at;
        }
    }
    return out;
}

long
vs_device_request(struct vs_device *device, unsigned command, const void *data, size_t len, void *reply, size_t cap,
                  int timeout_ms)
{
    struct vs_request request = { .command = (uint16_t)command, .reply = reply, .cap = cap };
    struct vs_header header = { .command = (uint16_t)command };
    struct vs_outgoing *out;
    struct timespec until;
    uint64_t connection;
    int ret = 0;

    if (pthread_equal(pthread_self(), device->thread)) {
        return -EDEADLK;
    }
    /* Only then does the pump look for work of ours while the client is silent. */
    if (atomic_load(&device->door->fdless_maps) == 0) {
        return device->thread_started ? -EFAULT : -ENOTCONN;
    }
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += timeout_ms / 1000;
    until.tv_nsec += (long)(timeout_ms % 1000) * 1000000L;
    if (until.tv_nsec >= 1000000000L) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000L;
    }
    pthread_mutex_lock(&device->lock);
    connection = device->counters.connections;
    header.id = request.id = ++device->next_request;
    request.next = device->requests;
    device->requests = &request;
    pthread_mutex_unlock(&device->lock);
    out = outgoing_new(&header, data, len, NULL, 0);
    ret = out == NULL ? -ENOMEM : hand_over(device, out);
    pthread_mutex_lock(&device->lock);
    while (ret == 0 && !request.done && device->connected && device->counters.connections == connection) {
        ret = -pthread_cond_timedwait(&device->replied, &device->lock, &until);
    }
    if (!request.done) {
        ret = ret == 0 ? -ENOTCONN : ret;
        forget_request(device, &request);
        out = take_back(device, request.id);
    } else {
        out = NULL;
    }
    pthread_mutex_unlock(&device->lock);
    free(out);
    if (ret < 0) {
        return ret;
    }
    return request.error != 0 ? -(long)request.error : (long)request.len;
}
