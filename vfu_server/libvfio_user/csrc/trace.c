/*
 * One producer, one consumer, no lock: head and tail count records since the
 * begin and never wrap. The pump (one after another, each joined before the
 * next begins) moves the head; the writer's thread moves the tail, and the head
 * only at the very end, when there is no pump any more. A reset is noted by
 * Python as a time, and put down by the pump before the next access.
 *
 * The writer sleeps until it is woken for the first record, then empties the
 * ring at intervals for as long as it finds something: a busy device costs a
 * wake-up each interval, an idle one none.
 */
#include "trace.h"
#include "eventfd.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define CAPACITY (1U << 16)
#define AT_ONCE (1U << 14)
#define INTERVAL_MS 20

_Static_assert(sizeof(struct vs_trace_record) == 40, "the file's record");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the file is little-endian");

struct vs_trace {
    int fd;
    int wake_fd;                /* for the writer: records, or the end */
    int failed_fd;              /* for Python */
    uint64_t pending_lost;      /* the producer's: lost since the last record that was added */
    atomic_uint_fast64_t reset; /* when the device was reset, if that is not put down yet */
    atomic_uint_fast64_t head;
    atomic_bool asleep;         /* the writer waits to be woken */
    atomic_bool stopping;
    atomic_int error;
    atomic_uint_fast64_t lost, written, bytes;
    pthread_t thread;
    atomic_uint_fast64_t tail;
    struct vs_trace_record records[CAPACITY];
};

uint64_t
vs_trace_now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000U + (uint64_t)t.tv_nsec;
}

/* --- the producer --- */

static struct vs_trace_record *
slot(struct vs_trace *trace, uint64_t at)
{
    return &trace->records[at % CAPACITY];
}

/* Room for `n` records and for what goes before them; false: they are lost as well. */
static bool
begin(struct vs_trace *trace, size_t n, uint64_t *head)
{
    uint64_t used, reset = 0;

    *head = atomic_load_explicit(&trace->head, memory_order_relaxed);
    used = *head - atomic_load_explicit(&trace->tail, memory_order_acquire);
    if (atomic_load_explicit(&trace->error, memory_order_relaxed) != 0 || CAPACITY - used < n + 2) {
        trace->pending_lost++;
        atomic_fetch_add_explicit(&trace->lost, 1, memory_order_relaxed);
        return false;
    }
    if (atomic_load_explicit(&trace->reset, memory_order_relaxed) != 0) {
        reset = atomic_exchange(&trace->reset, 0);
    }
    if (reset != 0) {
        *slot(trace, (*head)++) = (struct vs_trace_record){ .time = reset, .kind = VS_TRACE_RESET };
    }
    if (trace->pending_lost > 0) {
        *slot(trace, (*head)++) = (struct vs_trace_record){ .time = vs_trace_now(), .kind = VS_TRACE_LOST,
                                                           .value = trace->pending_lost };
        trace->pending_lost = 0;
    }
    return true;
}

static void
publish(struct vs_trace *trace, uint64_t head)
{
    atomic_store_explicit(&trace->head, head, memory_order_release);
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(&trace->asleep, memory_order_relaxed) && atomic_exchange(&trace->asleep, false)) {
        vs_signal_fd(trace->wake_fd);
    }
}

void
vs_trace_access(struct vs_trace *trace, const struct vs_trace_record *access, const void *data)
{
    size_t nr_more = access->width > 8 && data != NULL ? (access->width - 1) / 8 : 0;
    const uint8_t *bytes = data;
    struct vs_trace_record *record;
    uint64_t head, took;

    if (!begin(trace, 1 + nr_more, &head)) {
        return;
    }
    record = slot(trace, head++);
    took = vs_trace_now() - access->time;
    *record = *access;
    record->took = took < UINT32_MAX ? (uint32_t)took : UINT32_MAX;
    if (data != NULL) {
        memcpy(&record->value, bytes, access->width < 8 ? access->width : 8);
    }
    for (size_t i = 1; i <= nr_more; i++) {
        size_t left = access->width - 8 * i;

        record = slot(trace, head++);
        *record = (struct vs_trace_record){ .time = access->time, .offset = access->offset + 8 * i,
                                            .region = access->region, .kind = VS_TRACE_MORE };
        memcpy(&record->value, bytes + 8 * i, left < 8 ? left : 8);
    }
    publish(trace, head);
}

void
vs_trace_client(struct vs_trace *trace)
{
    uint64_t head;

    if (trace != NULL && begin(trace, 1, &head)) {
        *slot(trace, head++) = (struct vs_trace_record){ .time = vs_trace_now(), .kind = VS_TRACE_CLIENT };
        publish(trace, head);
    }
}

void
vs_trace_reset(struct vs_trace *trace)
{
    atomic_store(&trace->reset, vs_trace_now());
}

/* --- the writer --- */

static uint64_t
accesses(const struct vs_trace_record *records, size_t n)
{
    uint64_t found = 0;

    for (size_t i = 0; i < n; i++) {
        found += records[i].kind <= VS_TRACE_WRITE;
    }
    return found;
}

/* Writing is over: a torn record is cut off, what waits and what comes is lost. */
static void
fail(struct vs_trace *trace, int error)
{
    off_t at = lseek(trace->fd, 0, SEEK_CUR);
    uint64_t bytes = atomic_load(&trace->bytes);

    if (at >= 0) {
        (void)!ftruncate(trace->fd, at - (off_t)(bytes % sizeof(struct vs_trace_record)));
    }
    atomic_fetch_sub(&trace->bytes, bytes % sizeof(struct vs_trace_record));
    atomic_store(&trace->error, error);
    vs_signal_fd(trace->failed_fd);
}

/* All of `n` records, which lie one behind the other; -1: no more can be written. */
static int
put(struct vs_trace *trace, const struct vs_trace_record *records, size_t n)
{
    const char *at = (const char *)records;
    size_t left = n * sizeof(*records);

    while (left > 0) {
        ssize_t done = write(trace->fd, at, left);

        if (done <= 0) {
            if (done < 0 && errno == EINTR) {
                continue;
            }
            n -= (left + sizeof(*records) - 1) / sizeof(*records);
            atomic_fetch_add(&trace->written, accesses(records, n));
            fail(trace, done < 0 ? errno : EIO);
            return -1;
        }
        at += done;
        left -= (size_t)done;
        atomic_fetch_add(&trace->bytes, (uint64_t)done);
    }
    atomic_fetch_add(&trace->written, accesses(records, n));
    return 0;
}

/* Empties the ring; whether there was anything. */
static bool
drain(struct vs_trace *trace)
{
    uint64_t tail = atomic_load_explicit(&trace->tail, memory_order_relaxed);
    uint64_t head = atomic_load_explicit(&trace->head, memory_order_acquire);
    bool any = head != tail;

    while (tail != head) {
        size_t n = CAPACITY - tail % CAPACITY;
        uint64_t before = atomic_load(&trace->written);

        n = head - tail < n ? head - tail : n;
        n = n < AT_ONCE ? n : AT_ONCE;
        if (atomic_load(&trace->error) != 0 || put(trace, slot(trace, tail), n) < 0) {
            uint64_t here = accesses(slot(trace, tail), n) - (atomic_load(&trace->written) - before);

            atomic_fetch_add(&trace->lost, here);
        }
        tail += n;
        atomic_store_explicit(&trace->tail, tail, memory_order_release);
    }
    return any;
}

/* What waits for an access that will never come. */
static void
last_words(struct vs_trace *trace)
{
    uint64_t head;

    if (atomic_load(&trace->error) == 0 && (trace->pending_lost > 0 || atomic_load(&trace->reset) != 0) &&
        begin(trace, 0, &head)) {
        atomic_store_explicit(&trace->head, head, memory_order_release);
    }
    drain(trace);
}

static void *
writer(void *arg)
{
    struct vs_trace *trace = arg;
    struct pollfd wake = { .fd = trace->wake_fd, .events = POLLIN };
    sigset_t all;

    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, NULL);
    prctl(PR_SET_NAME, "vfu-trace");
    for (;;) {
        bool last = atomic_load(&trace->stopping);  /* before the ring: nothing is added after it was said */
        bool any = drain(trace);

        if (last) {
            break;
        }
        atomic_store(&trace->asleep, !any);
        /* Only now look again: who adds after this look finds us asleep and wakes us. */
        if (any || (atomic_load(&trace->head) == atomic_load(&trace->tail) && !atomic_load(&trace->stopping))) {
            poll(&wake, 1, any ? INTERVAL_MS : -1);
        }
        atomic_store(&trace->asleep, false);
        vs_drain_fd(trace->wake_fd);
    }
    last_words(trace);
    return NULL;
}

/* --- life --- */

struct vs_trace *
vs_trace_open(int fd)
{
    struct vs_trace *trace = calloc(1, sizeof(*trace));
    int error;

    if (trace == NULL) {
        return NULL;
    }
    trace->fd = fd;
    trace->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    trace->failed_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    error = trace->wake_fd < 0 || trace->failed_fd < 0 ? errno : 0;
    if (error == 0) {
        error = pthread_create(&trace->thread, NULL, writer, trace);
    }
    if (error != 0) {
        close(trace->wake_fd);
        close(trace->failed_fd);
        free(trace);
        errno = error;
        return NULL;
    }
    return trace;
}

void
vs_trace_numbers(struct vs_trace *trace, struct vs_trace_numbers *numbers)
{
    numbers->written = atomic_load(&trace->written);
    numbers->lost = atomic_load(&trace->lost);
    numbers->bytes = atomic_load(&trace->bytes);
    numbers->error = atomic_load(&trace->error);
}

void
vs_trace_close(struct vs_trace *trace, struct vs_trace_numbers *numbers)
{
    atomic_store(&trace->stopping, true);
    vs_signal_fd(trace->wake_fd);
    pthread_join(trace->thread, NULL);
    vs_trace_numbers(trace, numbers);
    close(trace->fd);
    close(trace->wake_fd);
    close(trace->failed_fd);
    free(trace);
}

int
vs_trace_fileno(struct vs_trace *trace)
{
    return trace->failed_fd;
}
