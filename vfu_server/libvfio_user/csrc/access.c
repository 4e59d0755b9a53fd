#include "access.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int
vs_table_init(struct vs_table *table, struct vs_door *door, vs_trap_fn *trap, void *handle)
{
    memset(table, 0, sizeof(*table));
    table->door = door;
    table->trap = trap;
    table->handle = handle;
    return -pthread_mutex_init(&table->lock, NULL);
}

void
vs_table_fini(struct vs_table *table)
{
    for (unsigned region = 0; region < VS_NUM_REGIONS; region++) {
        for (size_t i = 0; i < table->nr_rules[region]; i++) {
            free(table->rules[region][i].shadow);
        }
        free(table->rules[region]);
    }
    free(table->kept);
    pthread_mutex_destroy(&table->lock);
}

static bool
uses(const uint8_t answers[VS_NUM_CLASSES], uint8_t answer)
{
    return memchr(answers, answer, VS_NUM_CLASSES) != NULL;
}

int
vs_table_add(struct vs_table *table, unsigned region, const struct vs_rule *rule)
{
    struct vs_rule *rules, *last;
    size_t n;

    if (region >= VS_NUM_REGIONS || rule->end <= rule->start) {
        return -EINVAL;
    }
    n = table->nr_rules[region];
    if (n > 0 && table->rules[region][n - 1].end > rule->start) {
        return -EINVAL;
    }
    rules = realloc(table->rules[region], (n + 1) * sizeof(*rules));
    if (rules == NULL) {
        return -ENOMEM;
    }
    table->rules[region] = rules;
    last = &rules[n];
    *last = *rule;
    last->shadow = NULL;
    if (uses(rule->read, VS_SHADOW) || uses(rule->write, VS_SHADOW)) {
        last->shadow = malloc(rule->end - rule->start);
        if (last->shadow == NULL) {
            return -ENOMEM;
        }
        memset(last->shadow, 0xff, rule->end - rule->start);
    }
    table->nr_rules[region] = n + 1;
    return 0;
}

static struct vs_rule *
find_rule(const struct vs_table *table, unsigned region, uint64_t offset)
{
    struct vs_rule *rules = table->rules[region];
    size_t low = 0, high = table->nr_rules[region];

    while (low < high) {
        size_t mid = low + (high - low) / 2;

        if (rules[mid].end <= offset) {
            low = mid + 1;
        } else {
            high = mid;
        }
    }
    return low < table->nr_rules[region] && rules[low].start <= offset ? &rules[low] : NULL;
}

static enum vs_answer
answer_of(const struct vs_table *table, const struct vs_rule *rule, bool write)
{
    return write ? rule->write[table->state_class] : rule->read[table->state_class];
}

static bool
width_allowed(const struct vs_rule *rule, size_t count)
{
    bool single = count == 1 || count == 2 || count == 4 || count == 8;

    return (single && (rule->widths & count) != 0) || (rule->widths & VS_WIDTH_ANY) != 0;
}

/* Whether the rules from `rule` on cover the access without a gap, allow its width and answer alike. */
static bool
covers(const struct vs_table *table, unsigned region, const struct vs_rule *rule, uint64_t end, size_t count,
       bool write)
{
    const struct vs_rule *stop = table->rules[region] + table->nr_rules[region];
    enum vs_answer answer = answer_of(table, rule, write);

    while (rule->end < end) {
        const struct vs_rule *next = rule + 1;

        if (next == stop || next->start != rule->end || answer_of(table, next, write) != answer ||
            !width_allowed(next, count)) {
            return false;
        }
        rule = next;
    }
    return true;
}

static int
keep_write(struct vs_table *table, unsigned region, uint64_t offset, const void *buf, size_t count)
{
    struct vs_kept_write *kept;

    if (count > 8) {
        return -EINVAL;
    }
    if (table->kept == NULL && (table->kept = malloc(VS_MAX_KEPT * sizeof(*kept))) == NULL) {
        return -ENOMEM;
    }
    if (table->nr_kept == VS_MAX_KEPT) {
        return -ENOSPC; /* refused aloud: a write that was answered is never lost */
    }
    kept = &table->kept[table->nr_kept++];
    *kept = (struct vs_kept_write){ .offset = offset, .region = region, .width = (uint32_t)count };
    memcpy(&kept->value, buf, count);
    return 0;
}

static int
shadow(struct vs_table *table, struct vs_rule *rule, unsigned region, uint64_t offset, void *buf, size_t count,
       bool write)
{
    int ret = write ? keep_write(table, region, offset, buf, count) : 0;
    char *bytes = buf;

    if (ret < 0) {
        return ret;
    }
    for (; count > 0; rule++) {
        size_t piece = rule->end - offset < count ? rule->end - offset : count;
        uint8_t *at = rule->shadow + (offset - rule->start);

        memcpy(write ? (void *)at : bytes, write ? bytes : (void *)at, piece);
        offset += piece;
        bytes += piece;
        count -= piece;
    }
    return 0;
}

static int
answer(struct vs_table *table, struct vs_rule *rule, enum vs_answer answer, unsigned region, uint64_t offset,
       void *buf, size_t count, bool write)
{
    switch (answer) {
    case VS_PASS:
    case VS_MMAP:
        return vs_door_access(table->door, region, offset, buf, count, write);
    case VS_TRAP:
        return table->trap(table->handle, write, region, offset, buf, count);
    case VS_SHADOW:
        return shadow(table, rule, region, offset, buf, count, write);
    case VS_DISCARD:
        if (!write) {
            memset(buf, 0xff, count);
        }
        return 0;
    default:
        return -(int)rule->error;
    }
}

static void
trace(struct vs_table *table, struct vs_trace_record *access, enum vs_answer kind, const void *buf, int ret)
{
    access->answer = (uint8_t)kind;
    access->state_class = (uint8_t)table->state_class;
    access->error = (uint16_t)-ret;
    vs_trace_access(table->trace, access, ret == 0 || access->kind == VS_TRACE_WRITE ? buf : NULL);
}

int
vs_table_access(struct vs_table *table, unsigned region, uint64_t offset, void *buf, size_t count, bool write,
                struct vs_outcome *outcome)
{
    struct vs_rule *rule;
    struct vs_trace_record access;
    enum vs_answer kind = VS_REFUSE;
    int ret;

    if (region >= VS_NUM_REGIONS) {
        *outcome = (struct vs_outcome){ VS_REFUSE, VS_CLASS_RUNNING };
        return -EINVAL;
    }
    if (table->trace != NULL) {
        access = (struct vs_trace_record){ .time = vs_trace_now(), .offset = offset, .width = (uint32_t)count,
                                           .region = (uint8_t)region, .kind = write };
    }
    pthread_mutex_lock(&table->lock);
    rule = find_rule(table, region, offset);
    if (rule == NULL) {
        ret = -EPERM;
    } else if (!width_allowed(rule, count) ||
               (rule->end < offset + count && !covers(table, region, rule, offset + count, count, write))) {
        ret = -EINVAL;
    } else {
        kind = answer_of(table, rule, write);
        ret = answer(table, rule, kind, region, offset, buf, count, write);
    }
    *outcome = (struct vs_outcome){ kind, table->state_class };
    table->counts[kind][table->state_class][write]++;
    if (table->trace != NULL) {
        trace(table, &access, kind, buf, ret);
    }
    pthread_mutex_unlock(&table->lock);
    return ret;
}

/* Reads a range that becomes shadowed, in the widest access that its rule allows. */
static void
snapshot(struct vs_table *table, unsigned region, struct vs_rule *rule)
{
    size_t width = rule->widths & 8 ? 8 : rule->widths & 4 ? 4 : rule->widths & 2 ? 2 : 1;

    for (uint64_t offset = rule->start; offset < rule->end;) {
        size_t piece = width;

        while (offset % piece != 0 || offset + piece > rule->end) {
            piece /= 2;
        }
        if (vs_door_access(table->door, region, offset, rule->shadow + (offset - rule->start), piece, false) < 0) {
            memset(rule->shadow + (offset - rule->start), 0xff, piece);
        }
        offset += piece;
    }
}

/* Puts a kept write into the snapshot again: who wrote it reads it back. */
static void
overlay(struct vs_table *table, const struct vs_kept_write *kept)
{
    const uint8_t *value = (const uint8_t *)&kept->value;

    for (uint32_t i = 0; i < kept->width; i++) {
        struct vs_rule *rule = find_rule(table, kept->region, kept->offset + i);

        if (rule != NULL && rule->shadow != NULL) {
            rule->shadow[kept->offset + i - rule->start] = value[i];
        }
    }
}

int
vs_table_switch(struct vs_table *table, unsigned state_class)
{
    if (state_class >= VS_NUM_CLASSES) {
        return -EINVAL;
    }
    pthread_mutex_lock(&table->lock);
    if (state_class == VS_CLASS_RUNNING && table->nr_kept > 0) {
        pthread_mutex_unlock(&table->lock);
        return -EAGAIN;
    }
    for (unsigned region = 0; region < VS_NUM_REGIONS && table->door != NULL; region++) {
        for (size_t i = 0; i < table->nr_rules[region]; i++) {
            struct vs_rule *rule = &table->rules[region][i];

            if (rule->read[state_class] == VS_SHADOW) {
                snapshot(table, region, rule);
            }
        }
    }
    for (size_t i = 0; i < table->nr_kept; i++) {
        overlay(table, &table->kept[i]);
    }
    table->state_class = state_class;
    pthread_mutex_unlock(&table->lock);
    return 0;
}

size_t
vs_table_take_kept(struct vs_table *table, struct vs_kept_write *kept, size_t max)
{
    size_t n;

    pthread_mutex_lock(&table->lock);
    n = table->nr_kept < max ? table->nr_kept : max;
    if (n > 0) {
        memcpy(kept, table->kept, n * sizeof(*kept));
        memmove(table->kept, table->kept + n, (table->nr_kept - n) * sizeof(*kept));
        table->nr_kept -= n;
    }
    pthread_mutex_unlock(&table->lock);
    return n;
}
