/*
 * Which messages are ours, and in which order they are served.
 *
 * Messages of the ordered kind (SET_IRQS, DMA_MAP, DMA_UNMAP, DEVICE_RESET,
 * DEVICE_FEATURE, MIG_DATA_*, a config write that resets) are served one
 * after the other: while Python has one, or one waits for the migration
 * ring, later ones are held. Everything else is never held.
 */
#include "device.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "libvfio-user.h"
#include "private.h"
#include "vfio-user.h"

#define REGION_CONFIG 7

enum served { SERVED, TO_PYTHON, WAITS };

static void
refuse(struct vs_device *device, const struct vs_header *header, int error, const char *why)
{
    vs_notice(device, "message %#x, command %u: %s", header->id, header->command, why);
    vs_send(device, header, NULL, 0, NULL, 0, NULL, 0, error);
}

/* --- what is answered from the declarations --- */

static void
get_info(struct vs_device *device, const struct vs_message *message)
{
    struct vfio_user_device_info info;

    if (message->body_len < sizeof(info)) {
        refuse(device, &message->header, EINVAL, "DEVICE_GET_INFO is too short");
        return;
    }
    memcpy(&info, message->body, sizeof(info));
    if (info.argsz < sizeof(info)) {
        refuse(device, &message->header, EINVAL, "DEVICE_GET_INFO has no room for its reply (argsz)");
        return;
    }
    info = (struct vfio_user_device_info){ .argsz = sizeof(info), .flags = device->flags,
                                           .num_regions = VS_NUM_REGIONS, .num_irqs = VS_NUM_IRQS };
    vs_send(device, &message->header, &info, sizeof(info), NULL, 0, NULL, 0, 0);
}

static void
get_irq_info(struct vs_device *device, const struct vs_message *message)
{
    struct vfio_irq_info info;

    if (message->body_len < sizeof(info)) {
        refuse(device, &message->header, EINVAL, "DEVICE_GET_IRQ_INFO is too short");
        return;
    }
    memcpy(&info, message->body, sizeof(info));
    if (info.argsz < sizeof(info) || info.index >= VS_NUM_IRQS) {
        refuse(device, &message->header, EINVAL, "DEVICE_GET_IRQ_INFO asks for an index that does not exist, or has no room");
        return;
    }
    info.argsz = sizeof(info);
    info.flags = device->irqs[info.index].flags;
    info.count = device->irqs[info.index].count;
    vs_send(device, &message->header, &info, sizeof(info), NULL, 0, NULL, 0, 0);
}

/* --- DMA maps --- */

static enum served
dma_map(struct vs_device *device, struct vs_event *held)
{
    struct vfio_user_dma_map map;
    struct stat st;
    int ret;

    if (held->len < sizeof(map) || held->nr_fds > 1) {
        refuse(device, &held->header, EINVAL, "DMA_MAP is too short or has more than one fd");
        return SERVED;
    }
    memcpy(&map, held->data, sizeof(map));
    /* No fd, a device's fd, an odd flag: a decision, not a map. */
    if (held->nr_fds == 0 || (map.flags & ~3U) != 0 || fstat(held->fds[0], &st) < 0 || !S_ISREG(st.st_mode)) {
        return TO_PYTHON;
    }
    ret = vs_door_client_map(device->door, map.addr, map.size, map.flags, held->fds[0], map.offset);
    if (ret == -EAGAIN) {
        return TO_PYTHON;       /* to wait there */
    }
    if (ret == -ENOSPC || ret == -ENOMEM || ret == -EFAULT) {
        held->header.error = (uint32_t)-ret;    /* the host's limits, told with their cure; not tried again */
        return TO_PYTHON;
    }
    if (ret < 0) {
        char why[96];

        snprintf(why, sizeof(why), "DMA_MAP %#llx+%#llx was refused: %s", (unsigned long long)map.addr,
                 (unsigned long long)map.size, strerror(-ret));
        refuse(device, &held->header, -ret, why);
        return SERVED;
    }
    held->nr_fds = 0;   /* the door's now */
    vs_send(device, &held->header, NULL, 0, NULL, 0, NULL, 0, 0);
    return SERVED;
}

static enum served
dma_unmap(struct vs_device *device, struct vs_event *held)
{
    struct vfio_user_dma_unmap unmap;
    int ret;

    if (held->len < sizeof(unmap) || held->nr_fds > 0) {
        refuse(device, &held->header, EINVAL, "DMA_UNMAP is too short or came with an fd");
        return SERVED;
    }
    memcpy(&unmap, held->data, sizeof(unmap));
    if (atomic_load(&device->dma_to_python)) {
        return TO_PYTHON;
    }
    if (unmap.flags == 0) {
        ret = vs_door_client_unmap(device->door, unmap.addr, unmap.size);
    } else if (unmap.flags == 2 && unmap.addr == 0 && unmap.size == 0) {
        ret = vs_door_client_unmap_all(device->door);
    } else {
        ret = -EINVAL;
    }
    if (ret == -EAGAIN) {
        return TO_PYTHON;
    }
    if (ret < 0) {
        refuse(device, &held->header, -ret, "DMA_UNMAP was refused");
        return SERVED;
    }
    vs_send(device, &held->header, held->data, sizeof(unmap), NULL, 0, NULL, 0, 0);
    return SERVED;
}

/* --- migration data --- */

static enum served
mig_data_read(struct vs_device *device, struct vs_event *held)
{
    struct vfio_user_mig_data data;
    struct iovec iov[VS_RING_PIECES];
    size_t nr;
    long n;

    if (held->len < sizeof(data)) {
        refuse(device, &held->header, EINVAL, "MIG_DATA_READ is too short");
        return SERVED;
    }
    memcpy(&data, held->data, sizeof(data));
    if (data.size > device->ctx->client_max_data_xfer_size || data.argsz < sizeof(data)) {
        refuse(device, &held->header, EINVAL, "MIG_DATA_READ asks for more than one transfer may carry");
        return SERVED;
    }
    n = vs_ring_peek(&device->ring, iov, &nr, data.size);
    if (n == -EAGAIN) {
        return WAITS;
    }
    if (n < 0) {
        if (n != -ENOMSG) {     /* ENOMSG is the kernel's "nothing more for now" */
            vs_notice(device, "MIG_DATA_READ: %s", strerror((int)-n));
        }
        vs_send(device, &held->header, NULL, 0, NULL, 0, NULL, 0, (int)-n);
        return SERVED;
    }
    data.argsz = (uint32_t)(sizeof(data) + (size_t)n);
    data.size = (uint32_t)n;
    vs_send(device, &held->header, &data, sizeof(data), iov, nr, NULL, 0, 0);
    vs_ring_consume(&device->ring, (size_t)n);
    return SERVED;
}

/*
 * A small write is answered when its data were taken: what makes a target
 * refuse a state comes first and is small, and nothing may follow it for as
 * long as the source runs. Large ones are answered when there was room.
 */
#define SMALL_WRITE (64U << 10)

/* Goes on in another receive buffer; the present one, which it returns, is the caller's. NULL: there is no memory. */
static uint8_t *
detach_buffer(struct vs_device *device, const struct vs_message *message)
{
    size_t behind = (size_t)(message->body + message->body_len - device->buffer);
    uint8_t *buffer = device->buffer, *other = vs_ring_spare(&device->ring, VS_BUFFER_SIZE);

    if (other == NULL) {
        return NULL;
    }
    memcpy(other + behind, buffer + behind, device->end - behind);  /* read ahead: at the same place */
    device->buffer = other;
    return buffer;
}

/* `*buffer`, unless it is NULL, is what `body` lies in; it is NULL afterwards if the ring has it. */
static enum served
mig_data_write(struct vs_device *device, const struct vs_header *header, const uint8_t *body, size_t len,
               uint8_t **buffer)
{
    struct vfio_user_mig_data data;
    int ret;

    if (len < sizeof(data)) {
        refuse(device, header, EINVAL, "MIG_DATA_WRITE is too short");
        return SERVED;
    }
    memcpy(&data, body, sizeof(data));
    if (data.size != len - sizeof(data) || data.size > VS_MAX_XFER) {
        refuse(device, header, EINVAL, "MIG_DATA_WRITE does not carry what it says");
        return SERVED;
    }
    ret = device->data_put ? 0 : vs_ring_put(&device->ring, body + sizeof(data), data.size, *buffer);
    if (ret == 1) {
        *buffer = NULL;
        ret = 0;
    }
    if (ret == 0 && data.size <= SMALL_WRITE) {
        device->data_put = true;
        ret = vs_ring_taken(&device->ring);
    }
    if (ret == -EAGAIN) {
        return WAITS;
    }
    device->data_put = false;
    if (ret < 0) {
        refuse(device, header, -ret, "MIG_DATA_WRITE was refused");
    } else {
        vs_send(device, header, NULL, 0, NULL, 0, NULL, 0, 0);
    }
    return SERVED;
}

/* --- order --- */

static enum served
serve(struct vs_device *device, struct vs_event *held)
{
    switch (held->header.command) {
    case VFIO_USER_DMA_MAP:
        return dma_map(device, held);
    case VFIO_USER_DMA_UNMAP:
        return dma_unmap(device, held);
    case VFIO_USER_MIG_DATA_READ:
        return mig_data_read(device, held);
    case VFIO_USER_MIG_DATA_WRITE:
        return mig_data_write(device, &held->header, held->buffer != NULL ? held->body : held->data, held->len,
                              &held->buffer);
    default:
        return TO_PYTHON;
    }
}

static void
serve_now(struct vs_device *device, struct vs_event *held)
{
    switch (serve(device, held)) {
    case TO_PYTHON:
        device->busy = true;
        held->kind = VS_EVENT_MESSAGE;
        vs_post(device, held);
        break;
    case WAITS:
        device->data_wait = held;
        atomic_store(&device->data_wanted, true);
        break;
    default:
        vs_close_fds(device, held->fds, &held->nr_fds);
        vs_event_free(held);
    }
}

static void
ordered(struct vs_device *device, struct vs_message *message)
{
    bool behind = device->busy || device->data_wait != NULL || device->nr_held > 0;
    uint8_t *buffer = NULL;
    struct vs_event *held;

    /* The bulk of a load is not copied on its way into the ring: the buffer that it lies in changes hands. */
    if (message->header.command == VFIO_USER_MIG_DATA_WRITE && !behind && message->body_len >= VS_RING_GIVE) {
        buffer = detach_buffer(device, message);
    }
    held = vs_event_new(VS_EVENT_MESSAGE, message->body, buffer != NULL ? 0 : message->body_len);
    if (held == NULL) {
        free(buffer);
        vs_send(device, &message->header, NULL, 0, NULL, 0, NULL, 0, ENOMEM);
        return;
    }
    if (buffer != NULL) {
        held->buffer = buffer;
        held->body = message->body;
        held->len = message->body_len;
    }
    held->header = message->header;
    held->header.error = 0;     /* of a command it means nothing */
    memcpy(held->fds, message->fds, sizeof(held->fds));
    held->nr_fds = message->nr_fds;
    message->nr_fds = 0;
    if (behind) {
        *device->held_end = held;
        device->held_end = &held->next;
        device->nr_held++;
        device->held_bytes += held->len;
    } else {
        serve_now(device, held);
    }
}

/* After Python's answer, or when the ring may have moved: go on with what was held. */
void
vs_serve_held(struct vs_device *device)
{
    while (!device->busy) {
        struct vs_event *held = device->data_wait;

        if (held != NULL) {
            device->data_wait = NULL;
            atomic_store(&device->data_wanted, false);
        } else if (device->nr_held > 0) {
            held = device->held;
            device->held = held->next;
            device->held_bytes -= held->len;
            if (--device->nr_held == 0) {
                device->held_end = &device->held;
            }
            held->next = NULL;
        } else {
            return;
        }
        serve_now(device, held);
        if (device->data_wait != NULL) {
            return;
        }
    }
}

void
vs_drop_held(struct vs_device *device)
{
    struct vs_event *held = device->data_wait;

    device->data_wait = NULL;
    atomic_store(&device->data_wanted, false);
    while (held != NULL || device->held != NULL) {
        if (held == NULL) {
            held = device->held;
            device->held = held->next;
        }
        vs_close_fds(device, held->fds, &held->nr_fds);
        vs_event_free(held);
        held = NULL;
    }
    device->data_put = false;
    device->held_end = &device->held;
    device->nr_held = device->held_bytes = 0;
    device->busy = false;
}

/* Whether so much is held that no more is read: the client then waits in its send. */
bool
vs_held_full(const struct vs_device *device)
{
    return device->nr_held >= VS_MAX_HELD || device->held_bytes >= VS_MAX_HELD_BYTES;
}

/* Sends what Python has handed over. */
void
vs_serve_python(struct vs_device *device)
{
    struct vs_outgoing *out, *next;

    if (!device->busy && device->data_wait == NULL && device->nr_held == 0 &&
        atomic_load(&device->door->fdless_maps) == 0) {
        return; /* nothing of Python's can be here: the fast path */
    }
    pthread_mutex_lock(&device->lock);
    out = device->outgoing;
    device->outgoing = NULL;
    device->outgoing_end = &device->outgoing;
    pthread_mutex_unlock(&device->lock);
    for (; out != NULL; out = next) {
        struct iovec data = { out->data, out->len };

        next = out->next;
        if (out->ends_busy) {
            device->busy = false;
            vs_send(device, &out->header, NULL, 0, &data, 1, out->fds, out->nr_fds, (int)out->header.error);
        } else {
            vs_send_command(device, &out->header, &data);
        }
        vs_close_fds(device, out->fds, &out->nr_fds);
        free(out);
    }
}

/* --- replies of the client to our commands --- */

static void
take_reply(struct vs_device *device, const struct vs_message *message)
{
    struct vs_request **at;
    bool found = false;

    pthread_mutex_lock(&device->lock);
    for (at = &device->requests; *at != NULL; at = &(*at)->next) {
        struct vs_request *request = *at;

        if (request->id == message->header.id && request->command == message->header.command) {
            bool error = (message->header.flags & VFIO_USER_F_ERROR) != 0;

            request->error = error ? (int)message->header.error : 0;
            if (error && (message->header.error == 0 || message->header.error > 4095)) {
                request->error = EIO;
            } else if (!error && message->body_len > request->cap) {
                request->error = EMSGSIZE;
            } else if (!error) {
                memcpy(request->reply, message->body, message->body_len);
                request->len = message->body_len;
            }
            request->done = true;
            *at = request->next;
            pthread_cond_broadcast(&device->replied);
            found = true;
            break;
        }
    }
    pthread_mutex_unlock(&device->lock);
    if (!found) {
        vs_notice(device, "a reply to nothing that was asked (message %#x, command %u)", message->header.id,
                  message->header.command);
    }
}

/* Whether a write to config space sets an initiate-FLR bit. */
static bool
resets_function(const struct vs_device *device, const struct vs_message *message)
{
    struct vfio_user_region_access access;

    if (message->header.command != VFIO_USER_REGION_WRITE || message->body_len < sizeof(access)) {
        return false;
    }
    memcpy(&access, message->body, sizeof(access));
    if (access.region != REGION_CONFIG || access.count != message->body_len - sizeof(access)) {
        return false;
    }
    for (int i = 0; i < 2; i++) {
        int64_t at = device->flr_offset[i];

        if (at >= 0 && (uint64_t)at >= access.offset && (uint64_t)at - access.offset < access.count &&
            (message->body[sizeof(access) + ((uint64_t)at - access.offset)] & device->flr_mask[i]) != 0) {
            return true;
        }
    }
    return false;
}

enum vs_route
vs_route(struct vs_device *device, struct vs_message *message)
{
    uint32_t type = message->header.flags & VFIO_USER_F_TYPE_MASK;

    if (type == VFIO_USER_F_TYPE_REPLY) {
        take_reply(device, message);
        return VS_DONE;
    }
    if (type != VFIO_USER_F_TYPE_COMMAND) {
        refuse(device, &message->header, EINVAL, "neither a command nor a reply");
        return VS_DONE;
    }
    if (message->bad_fds) {
        refuse(device, &message->header, EINVAL, "more file descriptors than max_msg_fds allows, or than our table has room for");
        return VS_DONE;
    }
    switch (message->header.command) {
    case VFIO_USER_DEVICE_GET_INFO:
        get_info(device, message);
        return VS_DONE;
    case VFIO_USER_DEVICE_GET_IRQ_INFO:
        get_irq_info(device, message);
        return VS_DONE;
    case VFIO_USER_REGION_READ:
    case VFIO_USER_REGION_WRITE:
        if (!resets_function(device, message)) {
            vs_serve_access(device, message);
            return VS_DONE;
        }
        /* fallthrough */
    case VFIO_USER_DMA_MAP:
    case VFIO_USER_DMA_UNMAP:
    case VFIO_USER_DEVICE_SET_IRQS:
    case VFIO_USER_DEVICE_RESET:
    case VFIO_USER_DEVICE_FEATURE:
    case VFIO_USER_MIG_DATA_READ:
    case VFIO_USER_MIG_DATA_WRITE:
        ordered(device, message);
        return VS_DONE;
    default:
        return VS_TO_LIBRARY;
    }
}
