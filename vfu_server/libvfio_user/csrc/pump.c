/*
 * The pump: a thread for each connection that runs the library on our
 * transport until the client has gone. It takes the GIL for TRAP alone.
 */
#include "device.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <syslog.h>
#include <unistd.h>

#include "libvfio-user.h"
#include "private.h"

static void
log_line(vfu_ctx_t *ctx, int level, const char *text)
{
    struct vs_device *device = vfu_get_private(ctx);

    if (level <= LOG_ERR) {
        vs_notice(device, "%s", text);
    }
}

static int
set_up_region(vfu_ctx_t *ctx, struct vs_device *device, unsigned index)
{
    const struct vs_region *region = &device->regions[index];
    /* BARs of memory have 16 bytes and more, smaller ones are of I/O ports: the library refuses them as memory. */
    bool memory = index < VFU_PCI_DEV_ROM_REGION_IDX && region->size >= 16;
    int flags = (int)(region->flags & 3) | (memory ? VFU_REGION_FLAG_MEM : 0);
    struct iovec *areas = NULL;
    int ret;

    if (region->size == 0) {
        return 0;
    }
    if (region->nr_areas > 0) {
        areas = calloc(region->nr_areas, sizeof(*areas));
        if (areas == NULL) {
            return -1;
        }
        for (size_t i = 0; i < region->nr_areas; i++) {
            areas[i].iov_base = (void *)(uintptr_t)region->areas[i].offset;
            areas[i].iov_len = region->areas[i].size;
        }
    }
    ret = vfu_setup_region(ctx, (int)index, region->size, NULL, flags, areas,
                           (uint32_t)region->nr_areas, areas != NULL ? region->fd : -1, region->fd_offset);
    free(areas);
    return ret;
}

static vfu_ctx_t *
set_up(struct vs_device *device)
{
    vfu_ctx_t *ctx = vfu_create_ctx(VFU_TRANS_SOCK, device->name, 0, device, VFU_DEV_TYPE_PCI);

    if (ctx == NULL) {
        return NULL;
    }
    vfu_setup_log(ctx, log_line, LOG_ERR);
    for (unsigned i = 0; i < VS_NUM_REGIONS; i++) {
        if (set_up_region(ctx, device, i) < 0) {
            vs_notice(device, "region %u cannot be presented: %s", i, strerror(errno));
            vfu_destroy_ctx(ctx);
            return NULL;
        }
    }
    if (vfu_realize_ctx(ctx) < 0) {
        vfu_destroy_ctx(ctx);
        return NULL;
    }
    return ctx;
}

static void
begin(struct vs_device *device)
{
    device->start = device->end = 0;
    device->consumed = device->begun = 0;
    device->nr_batches = 0;
    device->current_size = 0;
    device->negotiated = device->protocol_error = false;
    device->half_since = 0;
    device->reason[0] = 0;
    memset(device->refusals_told, 0, sizeof(device->refusals_told));
}

static void
end(struct vs_device *device)
{
    struct vs_outgoing *out, *next;

    if (device->current_size > 0) {
        vs_close_fds(device, device->current.fds, &device->current.nr_fds);
    }
    for (size_t i = 0; i < device->nr_batches; i++) {
        vs_close_fds(device, device->batches[i].fds, &device->batches[i].nr_fds);
    }
    vs_drop_held(device);
    pthread_mutex_lock(&device->lock);
    device->connected = false;
    out = device->outgoing;
    device->outgoing = NULL;
    device->outgoing_end = &device->outgoing;
    vs_close_socket(device->sock);
    device->sock = -1;
    pthread_cond_broadcast(&device->replied);
    pthread_mutex_unlock(&device->lock);
    for (; out != NULL; out = next) {
        next = out->next;
        vs_close_fds(device, out->fds, &out->nr_fds);
        free(out);
    }
    free(device->buffer);
    device->buffer = NULL;
}

void *
vs_pump_main(void *arg)
{
    struct vs_device *device = arg;
    const char *reason = "no memory for the connection";
    sigset_t all;

    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, NULL); /* a signal would cut a sendmsg short */
    prctl(PR_SET_NAME, "vfu-pump");
    begin(device);
    device->buffer = malloc(VS_BUFFER_SIZE);
    device->ctx = device->buffer == NULL ? NULL : set_up(device);
    if (device->ctx != NULL) {
        if (vfu_attach_ctx(device->ctx) == 0) {
            vs_trace_client(device->table.trace);
            vs_post(device, vs_event_new(VS_EVENT_CONNECTED, &device->ctx->client_max_data_xfer_size, sizeof(size_t)));
            while (vfu_run_ctx(device->ctx) >= 0 || errno != ENOTCONN) {
                if (device->protocol_error) {
                    break;
                }
            }
        } else if (device->reason[0] == 0) {
            reason = "the client did not negotiate a version that we speak";
        }
        /* Of the library's own nothing is left to quiesce: DMA and interrupts are not its. */
        vfu_destroy_ctx(device->ctx);
        device->ctx = NULL;
    }
    if (device->reason[0] != 0) {
        reason = device->reason;
    }
    end(device);
    vs_post(device, vs_event_new(VS_EVENT_DISCONNECTED, reason, strlen(reason)));
    return NULL;
}
