/*
 * The peer: a blocking server in C on the unmodified libvfio-user, its own
 * socket transport included. Region 0 is passed through to a file by pread
 * and pwrite, as a kernel VFIO pass-through would be; DMA is registered;
 * migration gives a buffer and takes one, at memory speed.
 *
 *     peer SOCKET FILE STATE_BYTES
 */
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "libvfio-user.h"

#define REGION_SIZE (64UL << 10)

static int file;
static uint64_t state_left, state_size;
static char *buffer;

static ssize_t
access_file(vfu_ctx_t *ctx, char *buf, size_t count, loff_t offset, bool write)
{
    (void)ctx;
    return write ? pwrite(file, buf, count, offset) : pread(file, buf, count, offset);
}

static void
dma_register(vfu_ctx_t *ctx, vfu_dma_info_t *info)
{
    (void)ctx, (void)info;
}

static void
dma_unregister(vfu_ctx_t *ctx, vfu_dma_info_t *info)
{
    (void)ctx, (void)info;
}

static int
transition(vfu_ctx_t *ctx, vfu_migr_state_t state)
{
    (void)ctx;
    if (state == VFU_MIGR_STATE_STOP_AND_COPY || state == VFU_MIGR_STATE_RESUME) {
        state_left = state_size;
    }
    return 0;
}

static ssize_t
read_data(vfu_ctx_t *ctx, void *buf, uint64_t count)
{
    uint64_t n = count < state_left ? count : state_left;

    (void)ctx;
    memcpy(buf, buffer, n);
    state_left -= n;
    return (ssize_t)n;
}

static ssize_t
write_data(vfu_ctx_t *ctx, void *buf, uint64_t count)
{
    (void)ctx;
    memcpy(buffer, buf, count);
    return (ssize_t)count;
}

static int
reset(vfu_ctx_t *ctx, vfu_reset_type_t type)
{
    (void)ctx, (void)type;
    return 0;
}

int
main(int argc, char **argv)
{
    const vfu_migration_callbacks_t migration = {
        .version = VFU_MIGR_CALLBACKS_VERS,
        .transition = transition,
        .read_data = read_data,
        .write_data = write_data,
    };
    int low_water = 1 << 30;
    vfu_ctx_t *ctx;

    if (argc != 4) {
        errx(2, "usage: peer SOCKET FILE STATE_BYTES");
    }
    file = open(argv[2], O_RDWR);
    state_size = strtoull(argv[3], NULL, 0);
    buffer = malloc(1 << 20);
    memset(buffer, 0x5a, 1 << 20);
    ctx = vfu_create_ctx(VFU_TRANS_SOCK, argv[1], 0, NULL, VFU_DEV_TYPE_PCI);
    if (file < 0 || ctx == NULL || vfu_pci_init(ctx, VFU_PCI_TYPE_CONVENTIONAL, 0, 0) < 0 ||
        vfu_setup_region(ctx, VFU_PCI_DEV_BAR0_REGION_IDX, REGION_SIZE, access_file,
                         VFU_REGION_FLAG_RW | VFU_REGION_FLAG_MEM, NULL, 0, -1, 0) < 0 ||
        vfu_setup_device_reset_cb(ctx, reset) < 0 ||
        vfu_setup_device_dma(ctx, 65535, dma_register, dma_unregister) < 0 ||
        vfu_setup_device_migration_callbacks(ctx, &migration) < 0 || vfu_realize_ctx(ctx) < 0) {
        err(1, "set-up");
    }
    puts("ready");
    fflush(stdout);
    while (vfu_attach_ctx(ctx) == 0) {
        /* Without it the library loses large messages (it takes a short read for an error). */
        setsockopt(vfu_get_poll_fd(ctx), SOL_SOCKET, SO_RCVLOWAT, &low_water, sizeof(low_water));
        while (vfu_run_ctx(ctx) >= 0) {
        }
        if (errno != ENOTCONN) {
            err(1, "serving");
        }
    }
    return 0;
}
