/*
 * REGION_READ and REGION_WRITE: checked, answered by the access table,
 * replied to. Done here and not by the library, whose four allocations for an
 * access cost as much as the access, and whose log line for a refused one
 * three times that.
 */
#include "device.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "libvfio-user.h"
#include "private.h"
#include "vfio-user.h"

#define SMALL 256

static const char *const class_names[VS_NUM_CLASSES] = { "running", "p2p", "stopped", "resuming", "error" };

/* 0, or EINVAL and a notice: accesses that no honest client makes. */
static int
check(struct vs_device *device, const struct vs_message *message, const struct vfio_user_region_access *access)
{
    bool write = message->header.command == VFIO_USER_REGION_WRITE;
    unsigned id = message->header.id;

    if (access->count > VS_MAX_XFER) {
        vs_notice(device, "message %#x: region access count too large (%u)", id, access->count);
    } else if (write && message->body_len - sizeof(*access) != access->count) {
        vs_notice(device, "message %#x: a region write of %u bytes carries %zu", id, access->count,
                  message->body_len - sizeof(*access));
    } else if (access->region >= VS_NUM_REGIONS) {
        vs_notice(device, "message %#x: bad region index %u", id, access->region);
    } else if (access->offset > device->regions[access->region].size ||
               access->count > device->regions[access->region].size - access->offset) {
        vs_notice(device, "message %#x: region %u ends before %#llx+%#x", id, access->region,
                  (unsigned long long)access->offset, access->count);
    } else {
        return 0;
    }
    return EINVAL;
}

/*
 * Refusals by the table are counted there; a guest may have millions, so only
 * the first of each region, class and direction is told. Other errors are the
 * device's or the plugin's, and all of them are.
 */
static void
tell(struct vs_device *device, const struct vfio_user_region_access *access, bool write,
     const struct vs_outcome *outcome, int error)
{
    bool *told = &device->refusals_told[access->region][outcome->state_class][write];

    if (outcome->answer == VS_REFUSE && *told) {
        return;
    }
    *told = *told || outcome->answer == VS_REFUSE;
    vs_notice(device, "%s region %u at %#llx, %u bytes, in state class %s: %s", write ? "write to" : "read of",
              access->region, (unsigned long long)access->offset, access->count, class_names[outcome->state_class],
              strerror(error));
}

void
vs_serve_access(struct vs_device *device, const struct vs_message *message)
{
    bool write = message->header.command == VFIO_USER_REGION_WRITE;
    struct vfio_user_region_access access;
    struct vs_outcome outcome;
    uint8_t small[SMALL], *data = small;
    struct iovec reply;
    int error = EINVAL;

    if (message->body_len < sizeof(access)) {
        vs_notice(device, "message %#x: a region access of %zu bytes", message->header.id, message->body_len);
        goto refuse;
    }
    memcpy(&access, message->body, sizeof(access));
    if ((error = check(device, message, &access)) != 0) {
        goto refuse;
    }
    if (access.count == 0) {
        vs_send(device, &message->header, NULL, 0, NULL, 0, NULL, 0, 0);
        return;
    }
    if (write) {
        data = (uint8_t *)(uintptr_t)message->body + sizeof(access);    /* the receive buffer: nobody else's */
    } else if (access.count > sizeof(small) && (data = malloc(access.count)) == NULL) {
        error = ENOMEM;
        goto refuse;
    }
    error = -vs_table_access(&device->table, access.region, access.offset, data, access.count, write, &outcome);
    if (error != 0) {
        tell(device, &access, write, &outcome, error);
    }
    reply = (struct iovec){ data, access.count };
    vs_send(device, &message->header, &access, sizeof(access), &reply, write ? 0 : 1, NULL, 0, error);
    if (!write && data != small) {
        free(data);
    }
    return;

refuse:
    vs_send(device, &message->header, NULL, 0, NULL, 0, NULL, 0, error);
}
