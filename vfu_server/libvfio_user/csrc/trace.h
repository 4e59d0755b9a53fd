/*
 * A record of each access that the table has answered, on its way to a file:
 * a ring that the pump fills and a thread of its own empties.
 *
 * Whoever adds never waits for the file: what finds no room is counted, and
 * the count is written at its place. Without a trace nothing of this runs.
 */
#ifndef VS_TRACE_H
#define VS_TRACE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum vs_trace_kind {
    VS_TRACE_READ = 0,
    VS_TRACE_WRITE = 1,
    VS_TRACE_MORE = 2,      /* eight further bytes of the access before */
    VS_TRACE_LOST = 3,      /* `value` accesses found no room here */
    VS_TRACE_CLIENT = 4,    /* a client has negotiated */
    VS_TRACE_RESET = 5,     /* the device was reset */
};

/* As it stands in the file, little-endian; trace_format.py reads it. */
struct vs_trace_record {
    uint64_t time;          /* CLOCK_MONOTONIC at the begin, in ns */
    uint64_t offset;
    uint64_t value;         /* the first eight bytes, as on the wire */
    uint32_t width;         /* bytes of the whole access */
    uint32_t took;          /* ns until it was answered, at most UINT32_MAX */
    uint16_t error;         /* errno of the answer, or 0 */
    uint8_t region, kind, answer, state_class;
    uint8_t reserved[2];
};

struct vs_trace_numbers {
    uint64_t written;       /* accesses that are in the file */
    uint64_t lost;          /* accesses that are not, and never will be */
    uint64_t bytes;         /* of records */
    int error;              /* errno that ended the writing, or 0 */
};

struct vs_trace;

/* Appends to `fd`, from its present offset, which is the trace's from then on. NULL with errno set: it is not. */
struct vs_trace *vs_trace_open(int fd);
/* Writes out what is there and closes the file; nothing may be added any more. `numbers`: as they are at the end. */
void vs_trace_close(struct vs_trace *trace, struct vs_trace_numbers *numbers);
uint64_t vs_trace_now(void);
/* From one pump at a time. */
void vs_trace_access(struct vs_trace *trace, const struct vs_trace_record *access, const void *data);
/* A client has negotiated, says its pump. Harmless without a trace. */
void vs_trace_client(struct vs_trace *trace);
/* The device was reset, says any thread; put down before the next access. */
void vs_trace_reset(struct vs_trace *trace);
void vs_trace_numbers(struct vs_trace *trace, struct vs_trace_numbers *numbers);
/* An eventfd, readable when the file cannot be written any more. */
int vs_trace_fileno(struct vs_trace *trace);

#endif
