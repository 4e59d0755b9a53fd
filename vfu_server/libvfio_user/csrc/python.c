/* What Python reaches of a device's table, ring and trace. */
#include <string.h>

#include "device.h"

void
vs_device_dma_to_python(struct vs_device *device, bool up)
{
    atomic_store(&device->dma_to_python, up);
}

int
vs_device_add_rule(struct vs_device *device, unsigned region, const struct vs_rule *rule)
{
    return vs_table_add(&device->table, region, rule);
}

int
vs_device_switch(struct vs_device *device, unsigned state_class)
{
    return vs_table_switch(&device->table, state_class);
}

size_t
vs_device_take_kept(struct vs_device *device, struct vs_kept_write *kept, size_t max)
{
    return vs_table_take_kept(&device->table, kept, max);
}

void
vs_device_set_trace(struct vs_device *device, struct vs_trace *trace)
{
    device->table.trace = trace;
}

void
vs_device_counts(struct vs_device *device, struct vs_counters *counters, uint64_t accesses[60])
{
    _Static_assert(sizeof(device->table.counts) == 60 * sizeof(uint64_t), "answers x classes x directions");

    /* Torn between two counters, never within one: they are statistics. */
    *counters = device->counters;
    memcpy(accesses, device->table.counts, sizeof(device->table.counts));
}

int
vs_device_event_fd(struct vs_device *device)
{
    return device->event_fd;
}

int
vs_device_ring_fd(struct vs_device *device)
{
    return device->ring.python_fd;
}

int
vs_device_ring_open(struct vs_device *device, int mode, bool nowait)
{
    return vs_ring_open(&device->ring, (enum vs_ring_mode)mode, nowait);
}

void
vs_device_ring_nowait(struct vs_device *device, bool nowait)
{
    vs_ring_set_nowait(&device->ring, nowait);
}

void
vs_device_ring_excuse(struct vs_device *device)
{
    vs_ring_excuse(&device->ring);
}

void
vs_device_ring_eof(struct vs_device *device)
{
    vs_ring_set_eof(&device->ring);
}

void
vs_device_ring_error(struct vs_device *device, int error)
{
    vs_ring_set_error(&device->ring, error);
}

long
vs_device_ring_write(struct vs_device *device, const void *data, size_t len, bool lend)
{
    return vs_ring_write(&device->ring, data, len, lend);
}

long
vs_device_ring_look(struct vs_device *device, size_t least, size_t len, struct vs_piece *pieces, size_t *nr)
{
    return vs_ring_look(&device->ring, least, len, pieces, nr);
}

void
vs_device_ring_consume(struct vs_device *device, size_t len)
{
    vs_ring_consume(&device->ring, len);
}

bool
vs_device_ring_wanted(struct vs_device *device)
{
    return atomic_load(&device->data_wanted);
}

size_t
vs_device_ring_used(struct vs_device *device)
{
    return vs_ring_used(&device->ring);
}

uint64_t
vs_device_ring_total(struct vs_device *device)
{
    uint64_t total;

    pthread_mutex_lock(&device->ring.lock);
    total = device->ring.total;
    pthread_mutex_unlock(&device->ring.lock);
    return total;
}
