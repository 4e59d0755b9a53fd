/*
 * The access table: what is answered to an access, by byte range, direction
 * and class of states. Compiled by Python from a plugin's policy, walked here
 * without Python; only TRAP goes up.
 */
#ifndef VS_ACCESS_H
#define VS_ACCESS_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "door.h"
#include "trace.h"

#define VS_NUM_REGIONS 9
#define VS_NUM_CLASSES 5

/* The numbers are policy.Answer's. */
enum vs_answer {
    VS_REFUSE = 0,
    VS_PASS = 1,
    VS_TRAP = 2,
    VS_SHADOW = 3,
    VS_DISCARD = 4,
    VS_MMAP = 5,
    VS_NUM_ANSWERS = 6,
};

#define VS_CLASS_RUNNING 0
#define VS_CLASS_ERROR 4
#define VS_WIDTH_ANY 16

struct vs_rule {
    uint64_t start, end;
    uint8_t read[VS_NUM_CLASSES];
    uint8_t write[VS_NUM_CLASSES];
    uint16_t error;     /* errno of REFUSE */
    uint8_t widths;     /* 1 | 2 | 4 | 8 | VS_WIDTH_ANY */
    uint8_t *shadow;    /* the snapshot, end - start bytes, or NULL */
};

/* A write that was kept while its range was shadowed. */
struct vs_kept_write {
    uint64_t offset, value;
    uint32_t region, width;
};

#define VS_MAX_KEPT 4096

struct vs_outcome {
    enum vs_answer answer;
    unsigned state_class;
};

/* A trapped access: 0 or a negative errno. `write`: data in `buf`, else to `buf`. */
typedef int vs_trap_fn(void *handle, bool write, unsigned region, uint64_t offset, void *buf, size_t count);

struct vs_table {
    struct vs_rule *rules[VS_NUM_REGIONS];
    size_t nr_rules[VS_NUM_REGIONS];
    struct vs_door *door;
    vs_trap_fn *trap;
    void *handle;
    /* Held during an access: a class is switched between accesses, never within one. Uncontended in the steady state. */
    pthread_mutex_t lock;
    unsigned state_class;
    struct vs_kept_write *kept;
    size_t nr_kept;
    struct vs_trace *trace;     /* or NULL; set before the first access */
    uint64_t counts[VS_NUM_ANSWERS][VS_NUM_CLASSES][2];
};

int vs_table_init(struct vs_table *table, struct vs_door *door, vs_trap_fn *trap, void *handle);
void vs_table_fini(struct vs_table *table);
/* Rules must come sorted by region and start, without overlap. */
int vs_table_add(struct vs_table *table, unsigned region, const struct vs_rule *rule);
/* 0, or a negative errno. `outcome`: what answered, also where it is an error. */
int vs_table_access(struct vs_table *table, unsigned region, uint64_t offset, void *buf, size_t count, bool write,
                    struct vs_outcome *outcome);
/*
 * Waits for the access in flight, takes the snapshots of the ranges that are
 * shadowed in the new class, switches. An unreadable range is snapshot as all ones.
 * -EAGAIN: kept writes must be taken and applied before the device runs.
 */
int vs_table_switch(struct vs_table *table, unsigned state_class);
/* Moves up to `max` kept writes out, oldest first. */
size_t vs_table_take_kept(struct vs_table *table, struct vs_kept_write *kept, size_t max);

#endif
