/* What Python sees of csrc/: the compiler checks each line against the headers. */

/* crc32c.h */
uint32_t vs_crc32c(uint32_t crc, const void *data, size_t len);
uint32_t vs_crc32c_table(uint32_t crc, const void *data, size_t len);

/* bitmap.h */
struct vs_bitmap {
    uint8_t *bits;
    uint64_t iova, page_size, pages;
};
void vs_bitmap_merge(const struct vs_bitmap *to, const struct vs_bitmap *from);
void vs_bitmap_fill(uint8_t *bits, uint64_t first, uint64_t end, int value);

/* eventfd.h */
void vs_signal_fd(int fd);
void vs_drain_fd(int fd);

/* door.h */
struct vs_map {
    uint64_t iova, size, fd_offset;
    uint32_t prot;
    int fd;
    ...;
};
struct vs_door;
void vs_door_close(struct vs_door *door);
int vs_door_access(struct vs_door *door, unsigned region, uint64_t offset, void *buf, size_t count, bool write);
int vs_door_wide(struct vs_door *door, unsigned region, uint64_t offset, const uint8_t data[16]);
int vs_door_dma_map(struct vs_door *door, uint64_t iova, uint64_t size, uint32_t prot, int fd, uint64_t fd_offset);
int vs_door_dma_unmap(struct vs_door *door, uint64_t iova, uint64_t size, uint64_t *unmapped);
int vs_door_dma_unmap_all(struct vs_door *door);
size_t vs_door_dma_list(struct vs_door *door, uint64_t iova, uint64_t size, struct vs_map *maps, size_t max);
void vs_door_lend(struct vs_door *door, int by);
bool vs_door_gone(struct vs_door *door);
void vs_door_numbers(struct vs_door *door, uint64_t numbers[4]);
struct vs_door *vs_local_open(size_t max_maps);
int vs_local_copy(struct vs_door *door, uint64_t iova, void *buf, size_t len, bool write, size_t *done);

/* client.h */
struct vs_client;
struct vs_command {
    uint16_t id, command;
    size_t len;
    uint8_t data[];
    ...;
};
struct vs_client *vs_client_open(int sock, size_t max_maps);
struct vs_door *vs_client_door(struct vs_client *client);
long vs_client_request(struct vs_client *client, unsigned command, const void *data, size_t len, const int *send_fds,
                       size_t nr_send_fds, void *reply, size_t cap, int *fds, size_t *nr_fds, int timeout_ms);
int vs_client_fileno(struct vs_client *client);
struct vs_command *vs_client_next_command(struct vs_client *client);
void vs_command_free(struct vs_command *command);
int vs_client_reply(struct vs_client *client, unsigned command, unsigned id, const void *data, size_t len, int error);
void vs_client_set_max_xfer(struct vs_client *client, size_t max_xfer);
void vs_client_mark_gone(struct vs_client *client);

/* kernel.h */
struct vs_kernel_calls {
    int (*ioctl)(int fd, unsigned long request, void *arg);
    long (*pread)(int fd, void *buf, size_t count, uint64_t offset);
    long (*pwrite)(int fd, const void *buf, size_t count, uint64_t offset);
};
int vs_ioctl(int fd, unsigned long request, void *arg);
struct vs_door *vs_kernel_open(int device_fd, int iommu_fd, uint32_t ioas_id, size_t max_maps,
                               const struct vs_kernel_calls *calls);
int vs_kernel_set_region(struct vs_door *door, unsigned index, uint64_t offset, uint64_t size);
void vs_kernel_mark_gone(struct vs_door *door);

/* access.h */
#define VS_NUM_CLASSES 5
#define VS_NUM_ANSWERS 6
struct vs_rule {
    uint64_t start, end;
    uint8_t read[5], write[5];
    uint16_t error;
    uint8_t widths;
    ...;
};
struct vs_kept_write {
    uint64_t offset, value;
    uint32_t region, width;
};

/* trace.h */
struct vs_trace_numbers {
    uint64_t written, lost, bytes;
    int error;
};
struct vs_trace;
struct vs_trace *vs_trace_open(int fd);
void vs_trace_close(struct vs_trace *trace, struct vs_trace_numbers *numbers);
void vs_trace_reset(struct vs_trace *trace);
void vs_trace_numbers(struct vs_trace *trace, struct vs_trace_numbers *numbers);
int vs_trace_fileno(struct vs_trace *trace);

/* ring.h */
#define VS_RING_CLOSED ...
#define VS_RING_SAVE ...
#define VS_RING_LOAD ...
#define VS_RING_PIECES ...
struct vs_piece {
    const uint8_t *data;
    size_t len;
};

/* device.h */
#define VS_MAX_FDS 8
#define VS_EVENT_MESSAGE ...
#define VS_EVENT_CONNECTED ...
#define VS_EVENT_DISCONNECTED ...
#define VS_EVENT_NOTICE ...
struct vs_header {
    uint16_t id, command;
    uint32_t size, flags, error;
};
struct vs_event {
    int kind;
    struct vs_header header;
    size_t len, nr_fds;
    int fds[8];
    uint8_t data[];
    ...;
};
struct vs_counters {
    uint64_t messages, replies, errors, notices, notices_lost, fds_closed, connections;
};
struct vs_device;
struct vs_device *vs_device_new(const char *name, struct vs_door *door, void *handle, size_t ring_size);
void vs_device_free(struct vs_device *device);
int vs_device_set_region(struct vs_device *device, unsigned index, uint64_t size, uint32_t flags, int fd,
                         uint64_t fd_offset);
int vs_device_add_area(struct vs_device *device, unsigned index, uint64_t offset, uint64_t size);
void vs_device_set_irq(struct vs_device *device, unsigned index, uint32_t count, uint32_t flags);
void vs_device_set_flags(struct vs_device *device, uint32_t flags);
void vs_device_set_flr(struct vs_device *device, unsigned which, int64_t offset, uint8_t mask);
void vs_device_dma_to_python(struct vs_device *device, bool up);
int vs_device_add_rule(struct vs_device *device, unsigned region, const struct vs_rule *rule);
int vs_device_switch(struct vs_device *device, unsigned state_class);
size_t vs_device_take_kept(struct vs_device *device, struct vs_kept_write *kept, size_t max);
void vs_device_set_trace(struct vs_device *device, struct vs_trace *trace);
void vs_device_counts(struct vs_device *device, struct vs_counters *counters, uint64_t accesses[60]);
void vs_close_socket(int sock);
int vs_device_attach(struct vs_device *device, int sock);
void vs_device_shutdown(struct vs_device *device);
int vs_device_join(struct vs_device *device);
int vs_device_peer_gone(struct vs_device *device);
int vs_device_event_fd(struct vs_device *device);
struct vs_event *vs_device_next_event(struct vs_device *device);
void vs_event_free(struct vs_event *event);
int vs_device_reply(struct vs_device *device, const struct vs_header *header, const void *data, size_t len, int error,
                    const int *fds, size_t nr_fds);
long vs_device_request(struct vs_device *device, unsigned command, const void *data, size_t len, void *reply,
                       size_t cap, int timeout_ms);
int vs_device_ring_fd(struct vs_device *device);
int vs_device_ring_open(struct vs_device *device, int mode, bool nowait);
void vs_device_ring_nowait(struct vs_device *device, bool nowait);
void vs_device_ring_excuse(struct vs_device *device);
void vs_device_ring_eof(struct vs_device *device);
void vs_device_ring_error(struct vs_device *device, int error);
long vs_device_ring_write(struct vs_device *device, const void *data, size_t len, bool lend);
long vs_device_ring_look(struct vs_device *device, size_t least, size_t len, struct vs_piece *pieces, size_t *nr);
void vs_device_ring_consume(struct vs_device *device, size_t len);
bool vs_device_ring_wanted(struct vs_device *device);
size_t vs_device_ring_used(struct vs_device *device);
uint64_t vs_device_ring_total(struct vs_device *device);

extern "Python+C" int vs_trap(void *handle, bool write, unsigned region, uint64_t offset, void *buf, size_t count);
