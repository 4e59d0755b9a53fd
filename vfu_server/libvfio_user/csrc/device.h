/*
 * One device presented to one client at a time: its connection, the thread
 * that serves it, and the two queues between that thread and Python.
 *
 * The pump's thread owns the connection: it alone reads and writes the
 * socket and runs the library. Python hands work over and sleeps on an eventfd.
 */
#ifndef VS_DEVICE_H
#define VS_DEVICE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "access.h"
#include "door.h"
#include "ring.h"

#define VS_NUM_IRQS 5
#define VS_MAX_XFER (1U << 20)
/* The largest message there is: a header, a region access and the largest transfer. */
#define VS_MAX_MESSAGE (16U + 32U + VS_MAX_XFER)
#define VS_READ_AHEAD (64U << 10)
#define VS_BUFFER_SIZE (VS_MAX_MESSAGE + VS_READ_AHEAD)
/* What we tell the client (max_msg_fds, fixed in the library); the kernel may deliver up to 253. */
#define VS_MAX_FDS 8
#define VS_RECV_FDS 253
/* Messages of the ordered kind that wait behind one that Python has; beyond it we stop reading. */
#define VS_MAX_HELD 4096
#define VS_MAX_HELD_BYTES (4U << 20)
#define VS_HALF_MESSAGE_MS 5000

struct vfu_ctx;

struct vs_header {
    uint16_t id, command;
    uint32_t size, flags, error;
};

/* A message as it lies in the receive buffer, with its fds. */
struct vs_message {
    struct vs_header header;
    const uint8_t *body;
    size_t body_len;
    int fds[VS_MAX_FDS];
    size_t nr_fds;
    bool bad_fds;               /* more than we take: they are closed, the message is refused */
};

struct vs_fd_batch {
    uint64_t at;                /* stream offset of the message it belongs to */
    int fds[VS_MAX_FDS];
    size_t nr_fds;
    bool bad;
};

enum vs_event_kind {
    VS_EVENT_MESSAGE = 1,
    VS_EVENT_CONNECTED = 2,
    VS_EVENT_DISCONNECTED = 3,
    VS_EVENT_NOTICE = 4,
};

/* What Python is told. `data` is the message's body or a text. */
struct vs_event {
    struct vs_event *next;
    int kind;
    struct vs_header header;
    size_t len, nr_fds;
    int fds[VS_MAX_FDS];
    uint8_t *buffer;            /* a MIG_DATA_WRITE that waits: its `len` bytes lie at `body` in this receive buffer */
    const uint8_t *body;
    uint8_t data[];
};

/* What Python hands to the pump to be sent. */
struct vs_outgoing {
    struct vs_outgoing *next;
    struct vs_header header;
    size_t len, nr_fds;
    int fds[VS_MAX_FDS];
    bool ends_busy;             /* the reply to the one message that Python had */
    uint8_t data[];
};

/* A command of ours to the client, waiting for its reply. */
struct vs_request {
    struct vs_request *next;
    uint16_t id, command;
    void *reply;
    size_t cap, len;
    int error;                  /* errno of the reply */
    bool done;
};

struct vs_region {
    uint64_t size, fd_offset;
    uint32_t flags;             /* VFIO_REGION_INFO_FLAG_* */
    int fd;
    size_t nr_areas;
    struct { uint64_t offset, size; } *areas;
};

struct vs_irq {
    uint32_t count, flags;
};

struct vs_counters {
    uint64_t messages, replies, errors, notices, notices_lost, fds_closed, connections;
};

struct vs_device {
    char *name;
    struct vs_table table;
    struct vs_door *door;
    struct vs_region regions[VS_NUM_REGIONS];
    struct vs_irq irqs[VS_NUM_IRQS];
    uint32_t flags;             /* VFIO_DEVICE_FLAGS_* */
    int64_t flr_offset[2];      /* config byte with an initiate-FLR bit, or -1 (PCIe, AF) */
    uint8_t flr_mask[2];
    struct vs_ring ring;
    int wake_fd;                /* Python -> pump */
    int event_fd;               /* pump -> Python */
    atomic_bool dma_to_python;  /* dirty logging is on: unmaps go up, their bits are collected first */
    pthread_mutex_t lock;       /* the queues below */
    pthread_cond_t replied;
    struct vs_event *events, **events_end;
    size_t nr_notices;
    struct vs_outgoing *outgoing, **outgoing_end;
    struct vs_request *requests;
    uint16_t next_request;
    bool connected;
    int sock;                   /* for shutdown() by Python; the pump closes it */
    struct vs_counters counters;
    pthread_t thread;
    bool thread_started;

    /* the pump's own */
    struct vfu_ctx *ctx;
    uint8_t *buffer;            /* VS_BUFFER_SIZE bytes, received into */
    size_t start, end;          /* unread bytes of the buffer */
    uint64_t consumed;          /* stream offset of `start` */
    uint64_t begun;             /* stream offset of the newest message that has begun */
    struct vs_fd_batch batches[3];
    size_t nr_batches;
    struct vs_message current;  /* what the library works on */
    size_t current_size;        /* bytes of it to drop at the next header */
    struct vs_event *held, **held_end;  /* ordered messages that wait */
    size_t nr_held, held_bytes;
    bool busy;                  /* Python has one */
    atomic_bool data_wanted;    /* `data_wait` is set, for Python to see */
    struct vs_event *data_wait; /* a MIG_DATA message that waits for the ring */
    bool data_put;              /* the data of the MIG_DATA_WRITE at hand is in the ring already */
    bool negotiated;
    bool protocol_error;
    uint64_t half_since;        /* ms, 0: no half message */
    bool refusals_told[VS_NUM_REGIONS][VS_NUM_CLASSES][2];
    char reason[160];           /* why the connection ended */
};

/* device.c: life, and the queues */
struct vs_device *vs_device_new(const char *name, struct vs_door *door, void *handle, size_t ring_size);
void vs_device_free(struct vs_device *device);
int vs_device_set_region(struct vs_device *device, unsigned index, uint64_t size, uint32_t flags, int fd,
                         uint64_t fd_offset);
int vs_device_add_area(struct vs_device *device, unsigned index, uint64_t offset, uint64_t size);
void vs_device_set_irq(struct vs_device *device, unsigned index, uint32_t count, uint32_t flags);
void vs_device_set_flags(struct vs_device *device, uint32_t flags);
void vs_device_set_flr(struct vs_device *device, unsigned which, int64_t offset, uint8_t mask);

/* What Python reaches of the table, the ring and the trace: thin, so that cffi needs no layout of a device. */
void vs_device_dma_to_python(struct vs_device *device, bool up);
int vs_device_add_rule(struct vs_device *device, unsigned region, const struct vs_rule *rule);
int vs_device_switch(struct vs_device *device, unsigned state_class);
size_t vs_device_take_kept(struct vs_device *device, struct vs_kept_write *kept, size_t max);
/* Before the first client; the trace is closed after the device is freed. */
void vs_device_set_trace(struct vs_device *device, struct vs_trace *trace);
void vs_device_counts(struct vs_device *device, struct vs_counters *counters, uint64_t accesses[60]);
int vs_device_event_fd(struct vs_device *device);
int vs_device_ring_fd(struct vs_device *device);
/* Only while no message of the ordered kind is in the pump's hands: from its handler, or without a connection. */
int vs_device_ring_open(struct vs_device *device, int mode, bool nowait);
void vs_device_ring_nowait(struct vs_device *device, bool nowait);
void vs_device_ring_excuse(struct vs_device *device);
void vs_device_ring_eof(struct vs_device *device);
void vs_device_ring_error(struct vs_device *device, int error);
long vs_device_ring_write(struct vs_device *device, const void *data, size_t len, bool lend);
long vs_device_ring_look(struct vs_device *device, size_t least, size_t len, struct vs_piece *pieces, size_t *nr);
void vs_device_ring_consume(struct vs_device *device, size_t len);
/* Whether a MIG_DATA_READ waits for bytes that are not there. */
bool vs_device_ring_wanted(struct vs_device *device);
size_t vs_device_ring_used(struct vs_device *device);
uint64_t vs_device_ring_total(struct vs_device *device);

/* Takes the socket over and starts the pump's thread. */
int vs_device_attach(struct vs_device *device, int sock);
void vs_device_shutdown(struct vs_device *device);
int vs_device_join(struct vs_device *device);
int vs_device_peer_gone(struct vs_device *device);

struct vs_event *vs_device_next_event(struct vs_device *device);
void vs_event_free(struct vs_event *event);
/* Answers the message that Python has. `fds` are duplicated. `error` overrides the header's. */
int vs_device_reply(struct vs_device *device, const struct vs_header *header, const void *data, size_t len, int error,
                    const int *fds, size_t nr_fds);
/* Sends a command to the client and waits for its reply; not from the pump's thread. Length of the reply or -errno. */
long vs_device_request(struct vs_device *device, unsigned command, const void *data, size_t len, void *reply,
                       size_t cap, int timeout_ms);

void vs_post(struct vs_device *device, struct vs_event *event);
struct vs_event *vs_event_new(int kind, const void *data, size_t len);
__attribute__((format(printf, 2, 3))) void vs_notice(struct vs_device *device, const char *format, ...);

/* transport.c: framing; the library's transport */
int vs_next_message(struct vs_device *device, struct vs_message *message);
void vs_drop_message(struct vs_device *device, struct vs_message *message);
int vs_fill(struct vs_device *device, bool may_block);
bool vs_held_full(const struct vs_device *device);
int vs_send(struct vs_device *device, const struct vs_header *request, const void *head, size_t head_len,
            const struct iovec *data, size_t nr_data, const int *fds, size_t nr_fds, int error);
int vs_send_command(struct vs_device *device, const struct vs_header *command, const struct iovec *data);
uint64_t vs_now_ms(void);
void vs_close_socket(int sock);
void vs_close_fds(struct vs_device *device, int *fds, size_t *nr_fds);

/* route.c: which messages are ours, and in which order */
enum vs_route { VS_TO_LIBRARY, VS_DONE };
enum vs_route vs_route(struct vs_device *device, struct vs_message *message);
void vs_serve_python(struct vs_device *device);
void vs_serve_held(struct vs_device *device);
void vs_drop_held(struct vs_device *device);

/* region.c: accesses */
void vs_serve_access(struct vs_device *device, const struct vs_message *message);

/* pump.c */
void *vs_pump_main(void *device);

#endif
