/*
 * Our transport below libvfio-user: whole messages only, each fd with its
 * message, every limit ours. It takes the place of the library's socket file,
 * whose one symbol (tran_sock_ops) it defines.
 *
 * A client may send anything in any pieces: nothing here waits for the rest
 * of a message longer than VS_HALF_MESSAGE_MS.
 */
#include "device.h"
#include "eventfd.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "libvfio-user.h"
#include "private.h"
#include "tran.h"
#include "tran_sock.h"

_Static_assert(sizeof(struct vfio_user_header) == sizeof(struct vs_header), "the wire's header");
_Static_assert(VFU_MIGR_CALLBACKS_VERS == 2, "libvfio-user is too old: migration protocol v2 is needed");

uint64_t
vs_now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

void
vs_close_fds(struct vs_device *device, int *fds, size_t *nr_fds)
{
    for (size_t i = 0; i < *nr_fds; i++) {
        if (fds[i] >= 0) {
            close(fds[i]);
            device->counters.fds_closed++;
        }
    }
    *nr_fds = 0;
}

static int
end_connection(struct vs_device *device, const char *reason)
{
    if (device->reason[0] == 0) {
        snprintf(device->reason, sizeof(device->reason), "%s", reason);
    }
    device->protocol_error = true;
    return -1;
}

/* --- sending --- */

static int
send_all(struct vs_device *device, struct iovec *iov, size_t nr, const int *fds, size_t nr_fds)
{
    union {
        char bytes[CMSG_SPACE(VS_MAX_FDS * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct msghdr msg = { .msg_iov = iov, .msg_iovlen = nr };

    if (nr_fds > 0) {
        struct cmsghdr *cmsg = &control.align;

        memset(&control, 0, sizeof(control));
        msg.msg_control = control.bytes;
        msg.msg_controllen = CMSG_SPACE(nr_fds * sizeof(int));
        cmsg->cmsg_level = SOL_SOCKET;
        cmsg->cmsg_type = SCM_RIGHTS;
        cmsg->cmsg_len = CMSG_LEN(nr_fds * sizeof(int));
        memcpy(CMSG_DATA(cmsg), fds, nr_fds * sizeof(int));
    }
    while (msg.msg_iovlen > 0) {
        ssize_t n = sendmsg(device->sock, &msg, MSG_NOSIGNAL);

        if (n < 0) {
            if (errno == EINTR) {
                continue;
            }
            errno = ECONNRESET;
            return end_connection(device, "the client has gone while it was answered");
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
    return 0;
}

static int
send_message(struct vs_device *device, struct vs_header *header, const struct iovec *parts, size_t nr_parts,
             const int *fds, size_t nr_fds)
{
    struct iovec iov[2 + VS_RING_PIECES];
    size_t nr = 0, size = sizeof(*header);

    iov[nr++] = (struct iovec){ header, sizeof(*header) };
    for (size_t i = 0; i < nr_parts; i++) {
        if (parts[i].iov_len > 0) {
            iov[nr++] = parts[i];
            size += parts[i].iov_len;
        }
    }
    header->size = (uint32_t)size;
    return send_all(device, iov, nr, fds, nr_fds);
}

/* Replies to `request`: `head`, then `data` (at most VS_RING_PIECES pieces). An error reply is its header alone. */
int
vs_send(struct vs_device *device, const struct vs_header *request, const void *head, size_t head_len,
        const struct iovec *data, size_t nr_data, const int *fds, size_t nr_fds, int error)
{
    struct vs_header header = { .id = request->id, .command = request->command, .error = (uint32_t)error };
    struct iovec parts[1 + VS_RING_PIECES] = { { (void *)(uintptr_t)head, head_len } };

    device->counters.errors += error != 0;
    if ((request->flags & VFIO_USER_F_NO_REPLY) != 0) {
        return 0;
    }
    device->counters.replies++;
    header.flags = VFIO_USER_F_TYPE_REPLY | (error != 0 ? VFIO_USER_F_ERROR : 0);
    if (error != 0) {
        return send_message(device, &header, NULL, 0, NULL, 0);
    }
    if (nr_data > VS_RING_PIECES) {
        return end_connection(device, "a reply in too many pieces");
    }
    for (size_t i = 0; i < nr_data; i++) {
        parts[1 + i] = data[i];
    }
    return send_message(device, &header, parts, 1 + nr_data, fds, nr_fds);
}

/* Sends a command of ours; its reply finds its way by the id. */
int
vs_send_command(struct vs_device *device, const struct vs_header *command, const struct iovec *data)
{
    struct vs_header header = { .id = command->id, .command = command->command, .flags = VFIO_USER_F_TYPE_COMMAND };

    return send_message(device, &header, data, 1, NULL, 0);
}

/*
 * Ends a connection without leaving unread bytes: closing on them resets the
 * peer's end, and QEMU 11.1 aborts on ECONNRESET (hw/vfio-user/proxy.c sets
 * the same error twice), while it lives on after an end of file.
 */
void
vs_close_socket(int sock)
{
    char rest[4096];

    shutdown(sock, SHUT_RDWR);      /* from here on nothing more comes in */
    while (recv(sock, rest, sizeof(rest), MSG_DONTWAIT) > 0) {
        /* fds that ride along are dropped by the kernel */
    }
    close(sock);
}

/* --- receiving --- */

/* The fds of one recvmsg belong to the newest message that began in what it brought; to none if none did. */
static void
keep_fds(struct vs_device *device, const int *fds, size_t nr_fds, bool cut, uint64_t from)
{
    size_t max = sizeof(device->batches) / sizeof(device->batches[0]);
    struct vs_fd_batch *batch = &device->batches[device->nr_batches];

    if (device->begun < from || device->nr_batches == max) {
        for (size_t i = 0; i < nr_fds; i++) {
            close(fds[i]);
            device->counters.fds_closed++;
        }
        vs_notice(device, "%zu file descriptors came without a message of their own", nr_fds);
        return;
    }
    device->nr_batches++;
    *batch = (struct vs_fd_batch){ .at = device->begun, .bad = cut || nr_fds > VS_MAX_FDS };
    for (size_t i = 0; i < nr_fds; i++) {
        if (batch->bad) {
            close(fds[i]);
            device->counters.fds_closed++;
        } else {
            batch->fds[batch->nr_fds++] = fds[i];
        }
    }
}

/* Walks the headers in the buffer up to the newest message that has begun; stops at one whose size is wrong. */
static void
find_newest(struct vs_device *device)
{
    for (;;) {
        uint64_t stream_end = device->consumed + (device->end - device->start);
        struct vs_header header;

        if (stream_end - device->begun < sizeof(header)) {
            return;
        }
        memcpy(&header, device->buffer + device->start + (device->begun - device->consumed), sizeof(header));
        if (header.size < sizeof(header) || header.size > VS_MAX_MESSAGE ||
            device->begun + header.size >= stream_end) {
            return;
        }
        device->begun += header.size;
    }
}

/* MSG_CTRUNC: the kernel could not give us all fds (our table is full): their message must not pass for one with fewer. */
static void
take_control(struct vs_device *device, struct msghdr *msg, uint64_t from)
{
    bool cut = (msg->msg_flags & MSG_CTRUNC) != 0;
    int fds[VS_RECV_FDS];
    size_t nr_fds = 0;

    for (struct cmsghdr *cmsg = CMSG_FIRSTHDR(msg); cmsg != NULL; cmsg = CMSG_NXTHDR(msg, cmsg)) {
        if (cmsg->cmsg_level == SOL_SOCKET && cmsg->cmsg_type == SCM_RIGHTS) {
            nr_fds = (cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            memcpy(fds, CMSG_DATA(cmsg), nr_fds * sizeof(int));
        }
    }
    if (nr_fds > 0 || cut) {
        keep_fds(device, fds, nr_fds, cut, from);
    }
}

static int
receive(struct vs_device *device, int flags)
{
    union {
        char bytes[CMSG_SPACE(VS_RECV_FDS * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec iov;
    struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes,
                          .msg_controllen = sizeof(control.bytes) };
    uint64_t from;
    ssize_t n;

    if (device->start == device->end) {
        device->start = device->end = 0;
    } else if (device->start > 0 && VS_BUFFER_SIZE - device->end < VS_MAX_MESSAGE) {
        memmove(device->buffer, device->buffer + device->start, device->end - device->start);
        device->end -= device->start;
        device->start = 0;
    }
    iov.iov_base = device->buffer + device->end;
    iov.iov_len = VS_BUFFER_SIZE - device->end;
    n = recvmsg(device->sock, &msg, flags | MSG_CMSG_CLOEXEC);
    if (n <= 0) {
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
            return 0;
        }
        return end_connection(device, n == 0 ? (device->start == device->end ? "the client has closed its end"
                                                                             : "the client has gone in the middle of a message")
                                             : "the client has gone");
    }
    from = device->consumed + (device->end - device->start);
    device->end += (size_t)n;
    /* A message begins where the one before ends: step there once its first byte is in. */
    find_newest(device);
    take_control(device, &msg, from);
    return 0;
}

/*
 * Waits for more bytes, or for Python. Where nothing is under way a plain
 * blocking recvmsg saves the poll; shutdown() ends it. -1: the connection is over.
 */
int
vs_fill(struct vs_device *device, bool may_block)
{
    bool full = vs_held_full(device);
    bool half = !full && (device->start != device->end || !device->negotiated);
    struct pollfd pfds[2] = { { .fd = device->wake_fd, .events = POLLIN },
                              { .fd = full ? -1 : device->sock, .events = POLLIN } };
    uint64_t now, waited;
    int timeout = -1;

    if (!half) {
        device->half_since = 0;
    }
    if (may_block && !half && !full) {
        return receive(device, 0);
    }
    if (half) {
        now = vs_now_ms();
        if (device->half_since == 0) {
            device->half_since = now;
        }
        waited = now - device->half_since;
        if (waited >= VS_HALF_MESSAGE_MS) {
            return end_connection(device, device->negotiated ? "half a message, and the rest did not come in time"
                                                             : "no VERSION message came in time");
        }
        timeout = (int)(VS_HALF_MESSAGE_MS - waited);
    }
    if (poll(pfds, 2, timeout) < 0 && errno != EINTR) {
        return end_connection(device, "poll failed");
    }
    /* Drained before anyone looks what it was for; left readable, the next poll would not wait. */
    if (pfds[0].revents != 0) {
        vs_drain_fd(device->wake_fd);
    }
    return (pfds[1].revents & (POLLIN | POLLHUP | POLLERR)) != 0 ? receive(device, MSG_DONTWAIT) : 0;
}

/* 1: `message` is whole; 0: more bytes are needed; -1: the stream makes no sense any more. */
int
vs_next_message(struct vs_device *device, struct vs_message *message)
{
    size_t have = device->end - device->start;
    struct vs_fd_batch *batch = &device->batches[0];

    if (have < sizeof(message->header)) {
        return 0;
    }
    memset(message, 0, sizeof(*message));
    memcpy(&message->header, device->buffer + device->start, sizeof(message->header));
    if (message->header.size < sizeof(message->header) || message->header.size > VS_MAX_MESSAGE) {
        struct vs_header header = message->header;

        header.flags &= VFIO_USER_F_NO_REPLY;
        vs_notice(device, "message %#x claims a size of %u bytes; 16 to %u are possible", header.id, header.size,
                  VS_MAX_MESSAGE);
        vs_send(device, &header, NULL, 0, NULL, 0, NULL, 0, header.size < sizeof(header) ? EINVAL : EMSGSIZE);
        return end_connection(device, "the client sent a message of impossible size");
    }
    if (have < message->header.size) {
        return 0;
    }
    message->body = device->buffer + device->start + sizeof(message->header);
    message->body_len = message->header.size - sizeof(message->header);
    if (device->nr_batches > 0 && batch->at == device->consumed) {
        memcpy(message->fds, batch->fds, sizeof(message->fds));
        message->nr_fds = batch->nr_fds;
        message->bad_fds = batch->bad;
        device->nr_batches--;
        memmove(batch, batch + 1, device->nr_batches * sizeof(*batch));
    }
    device->half_since = 0;
    device->counters.messages++;
    return 1;
}

void
vs_drop_message(struct vs_device *device, struct vs_message *message)
{
    vs_close_fds(device, message->fds, &message->nr_fds);
    device->start += message->header.size;
    device->consumed += message->header.size;
    if (device->begun < device->consumed) {
        device->begun = device->consumed;
    }
    find_newest(device);
}

/* --- the library's side --- */

static struct vs_device *
device_of(vfu_ctx_t *ctx)
{
    return vfu_get_private(ctx);
}

static int
tran_init(vfu_ctx_t *ctx)
{
    (void)ctx;
    return 0;
}

static int
tran_get_poll_fd(vfu_ctx_t *ctx)
{
    return device_of(ctx)->sock;
}

static int
tran_attach(vfu_ctx_t *ctx)
{
    int ret = tran_negotiate(ctx, NULL);

    /* What a client declares bounds what we send it, never what we allocate. */
    if (ret == 0 && (ctx->client_max_data_xfer_size == 0 || ctx->client_max_data_xfer_size > VS_MAX_XFER)) {
        ctx->client_max_data_xfer_size = VS_MAX_XFER;
    }
    device_of(ctx)->negotiated = ret == 0;
    return ret;
}

static int
wait_for_message(struct vs_device *device, struct vs_message *message)
{
    int ret;

    while ((ret = vs_next_message(device, message)) == 0) {
        if (device->protocol_error || vs_fill(device, false) < 0) {
            return -1;
        }
    }
    return ret;
}

static int
tran_recv_msg(vfu_ctx_t *ctx, vfu_msg_t *msg)
{
    struct vs_device *device = device_of(ctx);
    struct vs_message message;

    if (wait_for_message(device, &message) < 0) {
        errno = ECONNRESET;
        return -1;
    }
    memcpy(&msg->hdr, &message.header, sizeof(msg->hdr));
    msg->in.iov.iov_len = message.body_len;
    msg->in.iov.iov_base = malloc(message.body_len + 1);
    msg->in.nr_fds = message.nr_fds + message.bad_fds;
    msg->in.fds = NULL;
    if (msg->in.nr_fds > 0) {
        /* Refused by the caller, who forgets the array. */
        vs_close_fds(device, message.fds, &message.nr_fds);
        msg->in.nr_fds = 0;
        msg->hdr.cmd = 0;
        vs_notice(device, "VERSION came with file descriptors");
    }
    if (msg->in.iov.iov_base == NULL) {
        vs_drop_message(device, &message);
        errno = ENOMEM;
        return -1;
    }
    memcpy(msg->in.iov.iov_base, message.body, message.body_len);
    if ((message.header.flags & VFIO_USER_F_TYPE_MASK) != VFIO_USER_F_TYPE_COMMAND) {
        msg->hdr.cmd = 0;
    }
    vs_drop_message(device, &message);
    return 0;
}

static int
tran_get_request_header(vfu_ctx_t *ctx, struct vfio_user_header *hdr, int *fds, size_t *nr_fds)
{
    struct vs_device *device = device_of(ctx);
    struct vs_message *message = &device->current;
    int ret;

    if (device->current_size > 0) {
        device->current_size = 0;
        vs_drop_message(device, message);
    }
    for (;;) {
        if (device->protocol_error) {
            break;
        }
        vs_serve_python(device);
        vs_serve_held(device);
        ret = device->protocol_error ? -1 : vs_held_full(device) ? 0 : vs_next_message(device, message);
        if (ret < 0) {
            break;
        }
        if (ret == 0) {
            bool idle = !device->busy && device->data_wait == NULL && device->nr_held == 0 &&
                        atomic_load(&device->door->fdless_maps) == 0;

            if (vs_fill(device, idle) < 0) {
                break;
            }
        } else if (vs_route(device, message) == VS_TO_LIBRARY) {
            memcpy(hdr, &message->header, sizeof(*hdr));
            *nr_fds = message->nr_fds;
            memcpy(fds, message->fds, message->nr_fds * sizeof(int));
            message->nr_fds = 0;    /* the library closes them */
            device->current_size = message->header.size;
            return 0;
        } else {
            vs_drop_message(device, message);
        }
    }
    errno = ECONNRESET;
    return -1;
}

static int
tran_recv_body(vfu_ctx_t *ctx, vfu_msg_t *msg)
{
    struct vs_device *device = device_of(ctx);

    msg->in.iov.iov_base = malloc(msg->in.iov.iov_len);
    if (msg->in.iov.iov_base == NULL) {
        errno = ENOMEM;
        return -1;
    }
    memcpy(msg->in.iov.iov_base, device->current.body, msg->in.iov.iov_len);
    return 0;
}

static int
tran_reply(vfu_ctx_t *ctx, vfu_msg_t *msg, int err)
{
    struct vs_device *device = device_of(ctx);
    struct vs_header header;

    memcpy(&header, &msg->hdr, sizeof(header));
    if (msg->out_iovecs != NULL) {
        return vs_send(device, &header, NULL, 0, msg->out_iovecs, msg->nr_out_iovecs, msg->out.fds, msg->out.nr_fds, err);
    }
    return vs_send(device, &header, NULL, 0, &msg->out.iov, 1, msg->out.fds, msg->out.nr_fds, err);
}

static int
tran_send_msg(vfu_ctx_t *ctx, uint16_t msg_id, enum vfio_user_command cmd, void *send_data, size_t send_len,
              struct vfio_user_header *hdr, void *recv_data, size_t recv_len)
{
    /* The library sends only for its own DMA, which is not set up. */
    (void)ctx, (void)msg_id, (void)cmd, (void)send_data, (void)send_len, (void)hdr, (void)recv_data, (void)recv_len;
    errno = ENOTSUP;
    return -1;
}

struct transport_ops tran_sock_ops = {
    .init = tran_init,
    .get_poll_fd = tran_get_poll_fd,
    .attach = tran_attach,
    .get_request_header = tran_get_request_header,
    .recv_body = tran_recv_body,
    .reply = tran_reply,
    .recv_msg = tran_recv_msg,
    .send_msg = tran_send_msg,
};
