/* The fast path: READ and WRITE requests that need no policy, answered without Python.
 *
 * No policy is made here.  fastpath.py describes the engine's state as plain data, anew for
 * each drain of /dev/fuse, and this file answers what follows from it:
 *
 *   WRITE of `active`    inside the known size, no cluster pending, no frozen read in the
 *                        range, snapshots not being created: sets the dirty bits, notes
 *                        activity, writes.  With pending clusters it is kept until the pool
 *                        (copypool.c) has copied them; the done bits are set and the pending
 *                        ones cleared here, then it goes on like any other
 *   READ of `active`     data in the page cache
 *   READ of a snapshot   every cluster accessible, its source by the engine's rule (the first
 *                        done_j with j >= i, else the image), data in the page cache
 *
 * Anything else, and whatever is odd about a request, is Python's: nothing has been sent
 * then, and libfuse and the engine judge it as if we were not there.
 *
 * What protects the state.  It changes in the trio thread only, and a drain runs in the trio
 * thread: nothing changes during one, though the GIL is released.  The buffers are held from
 * fastpath_begin() to fastpath_end() and no longer, so that a bitmap can grow, and a mapping
 * be closed, whenever Python runs.
 *
 * Copies.  Within a drain they are ours: as nothing else changes meanwhile, landing one means
 * to set done and to clear pending, which is all that LayerStack.settle() would do for a
 * cluster that was pending until then.  What is not landed at the end of the drain, because it
 * failed or takes long, is handed to the engine with the writes that wait for it, and nothing
 * is copied here before the engine has dealt with that.  So timeouts, failures and their
 * policy are Python's.
 *
 * What may block.  Reads use RWF_NOWAIT.  One that finds a page missing has begun to read
 * ahead (filemap_get_pages() in mm/filemap.c): the request is kept and tried again, by all
 * the rules, until the data is there; after 2 ms it is Python's, and so are cold requests for
 * a while, since that disk is slow.
 *
 * Writes use RWF_NOWAIT where the file system can (XFS, btrfs).  ext4 cannot: there a write of
 * a part of a page first makes sure that the page is cached, since it would be read otherwise,
 * and is kept like a read if it is not; and when a write has taken long, for dirty-page
 * throttling or a journal that waits for the disk, the following ones go to Python's threads
 * for a while.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "fastpath.h"
#include "copypool.h"

#include <errno.h>
#include <limits.h>
#include <linux/fuse.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum {
    ACTIVE_INODE = 2,
    PAGE = 4096,
    /* fastpath.py publishes nothing if there are more. */
    MAX_LAYERS = 256,
    MAX_BITMAPS = 256,
    MAX_RANGES = 256,
    /* Requests that wait for copies or data, and bytes of them.  The kernel sends no more than
     * max_background at once, and one for each thread that writes synchronously. */
    MAX_KEPT = 128,
    MAX_KEPT_BYTES = 16 << 20,
    /* Bytes of one copy, if a cluster is not more: a large write uses both threads. */
    COPY_BYTES = 256 << 10,
    LOAN = 16 << 20, /* bytes of temp space to ask for at a time */
    /* Open files that are known at a time; of two in the same slot the later one wins. */
    HANDLES = 4096,
    REPLY_ALIGNMENT = 2 << 20, /* a huge page, if there is one */
};

#define SECOND 1000000000LL
/* With no task in a handler nobody but timers and the control socket waits for the end of a
 * drain; otherwise a trip through the event loop should not take much longer than it must. */
#define PATIENCE_IDLE (2 * SECOND / 1000)
#define PATIENCE_BUSY (SECOND / 4000)
/* A write that took longer was not one to the page cache alone. */
#define SLOW_WRITE (10 * SECOND / 1000)
#define SLOW_PAUSE (SECOND / 2)
/* For copies to end after the drain has; then they are the engine's.  Long for a page cache, and
 * what a disk that hangs costs the others once: nothing is copied here until it is over. */
#define SETTLE_TIME (10 * SECOND / 1000)
/* For data to come from the disk after the drain has ended, how often to look, and how long
 * not to wait for any after some did not come. */
#define COLD_TIME (2 * SECOND / 1000)
#define COLD_NAP (30 * SECOND / 1000000)
#define COLD_PAUSE (SECOND / 2)

struct range {
    uint64_t first, stop; /* clusters */
};

struct ranges {
    int count;
    struct range items[MAX_RANGES];
};

struct layer {
    uint64_t inode; /* 0: has none */
    uint64_t size;
    uint64_t clusters;
    int temp;
    bool readable, live;
    Py_buffer access, done;
};

/* The engine's state during a drain. */
static struct {
    bool loaded;
    bool writable;   /* writes may pass: no snapshot is being created, not read-only */
    bool busy;       /* a task of Python's is in a handler */
    int image;
    unsigned shift;  /* log2 of the cluster size */
    uint64_t size;   /* of the image */
    Py_buffer pending;
    Py_buffer activity;
    struct ranges frozen, copying; /* snapshot reads of the image, and copies, of Python's */
    struct layer layers[MAX_LAYERS]; /* oldest first */
    Py_buffer dirty[MAX_BITMAPS];
    int layer_count, dirty_count;
    int receiver; /* index of the newest live layer, -1: none */
} state;

/* activity.py's record, in the mapped page. */
struct activity {
    char magic[8];
    int64_t under_way, least, most, mtime, ctime, alive;
};

static PyObject *publisher;   /* NULL: the fast path is off */
static PyObject *lender, *finisher; /* not NULL when publisher is not */
static char *reply;           /* FASTPATH_MAX_READ bytes, or NULL until needed */
static bool write_nowait = true; /* until the file system says it cannot */
static long long slow_until;  /* writes go to Python before this time */
static long long cold_until;  /* cold requests go to Python before this time */
static bool recorded;         /* we have set under_way, and must clear it */
static struct {
    uint64_t number, inode;
} handles[HANDLES]; /* slot number % HANDLES; number 0: free */

static struct {
    unsigned long long reads, writes, snapshot_reads; /* answered */
    unsigned long long slow_writes, failed_replies, cold; /* cold: kept for their data */
} counters;

/* Of the drain that is under way. */
static struct {
    struct kept {
        void *request;
        size_t size;
        bool refused; /* the engine is to carry it out */
        bool cold;    /* waits for data */
    } kept[MAX_KEPT];
    struct range handed[POOL_SIZE]; /* copies that are Python's now, and their numbers */
    uint64_t numbers[POOL_SIZE];
    int kept_count, handed_count;
    int cold_count; /* of kept */
    size_t kept_bytes;
    bool failed;      /* a copy has: no more copies here */
    uint64_t lent;    /* bytes of temp space that we may use */
    uint64_t claimed; /* by copies, those that have landed included */
    unsigned long long clusters, written, nanoseconds; /* landed */
} drain;

static long long now(clockid_t clock)
{
    struct timespec time;

    clock_gettime(clock, &time);
    return time.tv_sec * SECOND + time.tv_nsec;
}

long long fastpath_now(void)
{
    return now(CLOCK_MONOTONIC);
}

/* ---- bits: cluster c is bit c & 7 of byte c >> 3 --------------------------------------- */

static bool bit(const Py_buffer *bits, uint64_t index)
{
    return ((const uint8_t *)bits->buf)[index >> 3] >> (index & 7) & 1;
}

static bool any_set(const Py_buffer *bits, uint64_t first, uint64_t stop)
{
    for (; first < stop; first++)
        if (bit(bits, first))
            return true;
    return false;
}

static bool all_set(const Py_buffer *bits, uint64_t first, uint64_t stop)
{
    for (; first < stop; first++)
        if (!bit(bits, first))
            return false;
    return true;
}

static void set_bits(const Py_buffer *bits, uint64_t first, uint64_t stop)
{
    for (; first < stop; first++)
        if (!bit(bits, first)) /* a clean page of the mapping stays clean */
            ((uint8_t *)bits->buf)[first >> 3] |= (uint8_t)(1u << (first & 7));
}

static void clear_bits(const Py_buffer *bits, uint64_t first, uint64_t stop)
{
    for (; first < stop; first++)
        ((uint8_t *)bits->buf)[first >> 3] &= (uint8_t)~(1u << (first & 7));
}

static bool holds(const Py_buffer *bits, uint64_t count)
{
    return (uint64_t)bits->len >= (count + 7) / 8;
}

static uint64_t clusters_of(uint64_t size)
{
    return (size >> state.shift) + ((size & ((1ULL << state.shift) - 1)) != 0);
}

/* ---- the engine's state ---------------------------------------------------------------- */

static void refuse(const char *what)
{
    PyErr_Format(PyExc_ValueError, "the engine's state is not what the fast path expects: %s",
                 what);
}

static bool load_ranges(struct ranges *into, PyObject *ranges)
{
    if (!PyList_Check(ranges) || PyList_GET_SIZE(ranges) > MAX_RANGES) {
        refuse("ranges in flight");
        return false;
    }
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(ranges); i++) {
        unsigned long long first, stop;
        if (!PyArg_ParseTuple(PyList_GET_ITEM(ranges, i), "KK", &first, &stop))
            return false;
        into->items[into->count++] = (struct range){first, stop};
    }
    return true;
}

static bool overlaps(const struct ranges *ranges, uint64_t first, uint64_t stop)
{
    for (int i = 0; i < ranges->count; i++)
        if (ranges->items[i].first < stop && first < ranges->items[i].stop)
            return true;
    return false;
}

static bool load_dirty(PyObject *bitmaps)
{
    if (!PyList_Check(bitmaps) || PyList_GET_SIZE(bitmaps) > MAX_BITMAPS) {
        refuse("dirty bitmaps");
        return false;
    }
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(bitmaps); i++) {
        if (PyObject_GetBuffer(PyList_GET_ITEM(bitmaps, i), &state.dirty[state.dirty_count],
                               PyBUF_WRITABLE))
            return false;
        state.dirty_count++;
    }
    return true;
}

static bool load_layers(PyObject *layers)
{
    if (!PyList_Check(layers) || PyList_GET_SIZE(layers) > MAX_LAYERS) {
        refuse("layers");
        return false;
    }
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(layers); i++) {
        struct layer *layer = &state.layers[state.layer_count];
        unsigned long long inode, size;
        int readable, live;
        if (!PyArg_ParseTuple(PyList_GET_ITEM(layers, i), "KKippw*w*", &inode, &size,
                              &layer->temp, &readable, &live, &layer->access,
                              &layer->done))
            return false;
        state.layer_count++;
        layer->inode = inode;
        layer->size = size;
        layer->readable = readable;
        layer->live = live;
        if (live)
            state.receiver = (int)i;
        layer->clusters = clusters_of(size);
        if (size > INT64_MAX || layer->temp < 0 || !holds(&layer->access, layer->clusters) ||
            !holds(&layer->done, layer->clusters)) {
            refuse("a layer");
            return false;
        }
    }
    return true;
}

static bool load(PyObject *published)
{
    PyObject *dirty, *frozen, *copying, *layers;
    unsigned long long size;
    int writable, busy;

    if (!PyTuple_Check(published)) {
        refuse("not a tuple");
        return false;
    }
    if (!PyArg_ParseTuple(published, "iKIppOOOOw*w*", &state.image, &size, &state.shift, &writable,
                          &busy, &dirty, &frozen, &copying, &layers, &state.pending,
                          &state.activity))
        return false;
    state.loaded = true; /* from here on fastpath_end() releases the buffers */
    state.receiver = -1;
    state.size = size;
    state.writable = writable;
    state.busy = busy;
    if (state.image < 0 || size > INT64_MAX || state.shift < 12 || state.shift > 22 ||
        !holds(&state.pending, clusters_of(size)) ||
        state.activity.len < (Py_ssize_t)sizeof(struct activity) ||
        (uintptr_t)state.activity.buf % _Alignof(struct activity)) {
        refuse("the image");
        return false;
    }
    return load_ranges(&state.frozen, frozen) && load_ranges(&state.copying, copying) &&
           load_dirty(dirty) && load_layers(layers);
}

bool fastpath_is_on(void)
{
    return publisher != NULL;
}

bool fastpath_begin(void)
{
    PyObject *callable = publisher, *published;
    bool good = false;

    if (state.loaded)
        return true;
    if (!callable)
        return false;
    if (!reply) {
        if (posix_memalign((void **)&reply, REPLY_ALIGNMENT, FASTPATH_MAX_READ)) {
            reply = NULL;
            return false;
        }
        madvise(reply, FASTPATH_MAX_READ, MADV_HUGEPAGE);
    }
    Py_INCREF(callable);
    published = PyObject_CallNoArgs(callable);
    if (published == Py_None) { /* not just now */
        Py_DECREF(published);
        Py_DECREF(callable);
        return false;
    }
    if (published)
        good = load(published);
    if (!good) { /* a bug; without the fast path everything works */
        PyErr_WriteUnraisable(callable);
        fastpath_end();
        fastpath_clear();
    }
    Py_XDECREF(published);
    Py_DECREF(callable);
    return good;
}

void fastpath_end(void)
{
    if (!state.loaded)
        return;
    for (int i = 0; i < state.layer_count; i++) {
        PyBuffer_Release(&state.layers[i].access);
        PyBuffer_Release(&state.layers[i].done);
    }
    for (int i = 0; i < state.dirty_count; i++)
        PyBuffer_Release(&state.dirty[i]);
    PyBuffer_Release(&state.pending);
    PyBuffer_Release(&state.activity);
    state.frozen.count = state.copying.count = state.layer_count = state.dirty_count = 0;
    state.loaded = false;
}

bool fastpath_may_linger(void)
{
    return state.loaded && !state.busy;
}

long long fastpath_patience(void)
{
    return state.loaded && state.busy ? PATIENCE_BUSY : PATIENCE_IDLE;
}

/* ---- the record of activity: as Activity.started() and finished() ---------------------- */

/* Stores in this order, for a process that is killed between two of them. */
#define STORE(member, value) __atomic_store_n(&(member), (value), __ATOMIC_RELEASE)

/* A write inside the image begins.  The bounds of the size are what they were; a record of
 * Python's, with more under way, stays Python's. */
static void note_write(void)
{
    struct activity *record = state.activity.buf;

    STORE(record->alive, now(CLOCK_REALTIME));
    if (!record->under_way) {
        STORE(record->under_way, 1);
        recorded = true;
    }
}

/* Once for all the writes of a drain since the last time: between them something is under
 * way, which is the safe thing to say. */
void fastpath_rest(void)
{
    struct activity *record = state.activity.buf;
    struct stat status;

    if (!recorded || !state.loaded)
        return;
    recorded = false;
    if (fstat(state.image, &status))
        return; /* it stays under way until Python's next record */
    STORE(record->least, status.st_size);
    STORE(record->most, status.st_size);
    STORE(record->mtime, status.st_mtim.tv_sec * SECOND + status.st_mtim.tv_nsec);
    STORE(record->ctime, status.st_ctim.tv_sec * SECOND + status.st_ctim.tv_nsec);
    STORE(record->alive, now(CLOCK_REALTIME));
    STORE(record->under_way, 0);
}

/* ---- answering ------------------------------------------------------------------------- */

static bool is_inode_of(uint64_t number, uint64_t inode)
{
    return number && handles[number % HANDLES].number == number &&
           handles[number % HANDLES].inode == inode;
}

/* Whatever the kernel says to it, the request has been answered: it was interrupted, or the
 * mount is gone. */
static void send(int device, const struct iovec *parts, int count)
{
    if (writev(device, parts, count) < 0)
        counters.failed_replies++;
}

static void send_data(int device, uint64_t unique, size_t length)
{
    struct fuse_out_header out = {.len = (uint32_t)(sizeof(out) + length), .unique = unique};
    struct iovec parts[2] = {{&out, sizeof(out)}, {reply, length}};

    send(device, parts, length ? 2 : 1);
}

/* Reads all of [offset, offset+length) from the page cache; FASTPATH_KEPT: it is not there. */
static enum fastpath_verdict read_cached(int fd, void *data, size_t length, uint64_t offset)
{
    struct iovec part = {data, length};
    ssize_t count = preadv2(fd, &part, 1, (off_t)offset, RWF_NOWAIT);

    if (count == (ssize_t)length)
        return FASTPATH_ANSWERED;
    return count >= 0 || errno == EAGAIN ? FASTPATH_KEPT : FASTPATH_PYTHONS;
}

static enum fastpath_verdict read_active(int device, uint64_t unique, uint64_t offset,
                                         size_t length)
{
    enum fastpath_verdict verdict = FASTPATH_ANSWERED;

    if (offset >= state.size)
        length = 0;
    else if (length > state.size - offset)
        length = (size_t)(state.size - offset);
    if (length)
        verdict = read_cached(state.image, reply, length, offset);
    if (verdict == FASTPATH_ANSWERED) {
        counters.reads++;
        send_data(device, unique, length);
    }
    return verdict;
}

/* The file in which the snapshot state.layers[index] finds a cluster. */
static int source(int index, uint64_t cluster)
{
    for (; index < state.layer_count; index++)
        if (cluster < state.layers[index].clusters && bit(&state.layers[index].done, cluster))
            return state.layers[index].temp;
    return state.image;
}

static enum fastpath_verdict read_snapshot(int device, const struct fuse_in_header *in,
                                           uint64_t offset, size_t length)
{
    const struct layer *layer;
    size_t done = 0;
    int index = 0;

    while (index < state.layer_count && state.layers[index].inode != in->nodeid)
        index++;
    if (index == state.layer_count)
        return FASTPATH_PYTHONS;
    layer = &state.layers[index];
    if (!layer->readable)
        return FASTPATH_PYTHONS;
    if (offset >= layer->size)
        length = 0;
    else if (length > layer->size - offset)
        length = (size_t)(layer->size - offset);
    if (length && !all_set(&layer->access, offset >> state.shift, clusters_of(offset + length)))
        return FASTPATH_PYTHONS;
    while (done < length) { /* a run of one source at a time */
        uint64_t cluster = (offset + done) >> state.shift, end;
        size_t count;
        enum fastpath_verdict verdict;
        int fd = source(index, cluster);
        do
            end = ++cluster << state.shift;
        while (end < offset + length && source(index, cluster) == fd);
        count = (size_t)((end < offset + length ? end : offset + length) - (offset + done));
        verdict = read_cached(fd, reply + done, count, offset + done);
        if (verdict != FASTPATH_ANSWERED)
            return verdict;
        done += count;
    }
    counters.snapshot_reads++;
    send_data(device, in->unique, length);
    return FASTPATH_ANSWERED;
}

static enum fastpath_verdict answer_read(int device, const struct fuse_in_header *in,
                                         size_t size)
{
    const struct fuse_read_in *arg = (const void *)(in + 1);

    if (size != sizeof(*in) + sizeof(*arg) || arg->size > FASTPATH_MAX_READ ||
        arg->offset > INT64_MAX - FASTPATH_MAX_READ || !is_inode_of(arg->fh, in->nodeid))
        return FASTPATH_PYTHONS;
    if (in->nodeid == ACTIVE_INODE)
        return read_active(device, in->unique, arg->offset, arg->size);
    return read_snapshot(device, in, arg->offset, arg->size);
}

/* Writes all of it, without waiting for the disk as far as that can be known.  If it is
 * Python's, some of it may have been written.  FASTPATH_KEPT: nothing has, a page is cold. */
static enum fastpath_verdict write_image(const void *data, size_t length, uint64_t offset)
{
    struct iovec part = {(void *)data, length};
    long long started;
    ssize_t written;
    enum fastpath_verdict cached = FASTPATH_ANSWERED;
    char byte;

    if (write_nowait) {
        written = pwritev2(state.image, &part, 1, (off_t)offset, RWF_NOWAIT);
        if (written >= 0 || errno != EOPNOTSUPP)
            return written == (ssize_t)length ? FASTPATH_ANSWERED : FASTPATH_PYTHONS;
        write_nowait = false;
    }
    if (offset % PAGE)
        cached = read_cached(state.image, &byte, 1, offset);
    if (cached == FASTPATH_ANSWERED && (offset + length) % PAGE)
        cached = read_cached(state.image, &byte, 1, offset + length - 1);
    if (cached != FASTPATH_ANSWERED)
        return cached;
    started = now(CLOCK_MONOTONIC);
    if (started < slow_until)
        return FASTPATH_PYTHONS;
    written = pwrite(state.image, data, length, (off_t)offset);
    if (now(CLOCK_MONOTONIC) - started > SLOW_WRITE) {
        counters.slow_writes++;
        slow_until = now(CLOCK_MONOTONIC) + SLOW_PAUSE;
    }
    return written == (ssize_t)length ? FASTPATH_ANSWERED : FASTPATH_PYTHONS;
}

/* ---- step 1 of a write: copying -------------------------------------------------------- */

/* May copies take that many bytes of temp space more? */
static bool claim(uint64_t bytes)
{
    if (drain.lent - drain.claimed < bytes) {
        PyGILState_STATE gil = PyGILState_Ensure();
        PyObject *lent = PyObject_CallFunction(
            lender, "K", (unsigned long long)(bytes > LOAN ? bytes : LOAN));
        unsigned long long granted = lent ? PyLong_AsUnsignedLongLong(lent) : 0;
        if (PyErr_Occurred()) {
            PyErr_WriteUnraisable(lender);
            granted = 0;
        }
        Py_XDECREF(lent);
        PyGILState_Release(gil);
        drain.lent += granted;
        if (drain.lent - drain.claimed < bytes)
            return false;
    }
    drain.claimed += bytes;
    return true;
}

/* The next clusters of [first, stop) that are pending and not being copied here: from where
 * to where, at most `most`.  Returns false if there are none. */
static bool next_uncopied(uint64_t *first, uint64_t stop, uint64_t most, uint64_t *end)
{
    uint64_t covered;

    while (*first < stop) {
        if (!bit(&state.pending, *first)) {
            ++*first;
        } else if ((covered = pool_covers(*first))) {
            *first = covered;
        } else {
            *end = *first + 1;
            while (*end < stop && *end - *first < most && bit(&state.pending, *end) &&
                   !pool_covers(*end))
                ++*end;
            return true;
        }
    }
    return false;
}

/* See to it that the pending clusters of the range are being copied.  Returns false if the
 * engine has to. */
static bool preserve(uint64_t first, uint64_t stop)
{
    const struct layer *receiver;
    uint64_t cluster_size = 1ULL << state.shift, count = 0, position, end;
    uint64_t most = cluster_size < COPY_BYTES ? (uint64_t)COPY_BYTES >> state.shift : 1;

    if (state.receiver < 0 || drain.failed || pool_count(true))
        return false;
    receiver = &state.layers[state.receiver];
    if (stop > receiver->clusters || overlaps(&state.copying, first, stop))
        return false;
    for (position = first; next_uncopied(&position, stop, most, &end); position = end)
        count += end - position;
    if (count && !claim(count << state.shift))
        return false;
    for (position = first; next_uncopied(&position, stop, most, &end); position = end) {
        uint64_t limit = end << state.shift;
        struct cluster_copy work = {
            .source = state.image,
            .target = receiver->temp,
            .offset = (off_t)(position << state.shift),
            .end = (off_t)(limit < receiver->size ? limit : receiver->size),
            .cluster_size = (size_t)cluster_size,
            .budget = (off_t)((end - position) << state.shift),
        };
        if (!pool_start(position, end, &work))
            return false; /* what has begun goes on */
    }
    return true;
}

/* The kernel's flags change nothing here: a page that the writeback cache writes is data as
 * any other, and the image has no set-user-ID bits. */
#define KNOWN_WRITE_FLAGS (FUSE_WRITE_CACHE | FUSE_WRITE_LOCKOWNER | FUSE_WRITE_KILL_SUIDGID)

static enum fastpath_verdict answer_write(int device, const struct fuse_in_header *in,
                                          size_t size)
{
    const struct fuse_write_in *arg = (const void *)(in + 1);
    struct {
        struct fuse_out_header header;
        struct fuse_write_out body;
    } out = {.header = {.len = sizeof(out), .unique = in->unique}};
    struct iovec part = {&out, sizeof(out)};
    uint64_t first, stop;
    enum fastpath_verdict verdict;

    if (size < sizeof(*in) + sizeof(*arg) || size - sizeof(*in) - sizeof(*arg) != arg->size ||
        in->nodeid != ACTIVE_INODE || !is_inode_of(arg->fh, ACTIVE_INODE) ||
        arg->write_flags & ~(uint32_t)KNOWN_WRITE_FLAGS)
        return FASTPATH_PYTHONS;
    if (!state.writable || !arg->size || arg->offset >= state.size ||
        arg->size > state.size - arg->offset)
        return FASTPATH_PYTHONS;
    first = arg->offset >> state.shift;
    stop = clusters_of(arg->offset + arg->size);
    if (overlaps(&state.frozen, first, stop))
        return FASTPATH_PYTHONS;
    for (int i = 0; i < state.dirty_count; i++)
        if (!holds(&state.dirty[i], stop)) /* the image has just grown */
            return FASTPATH_PYTHONS;
    if (any_set(&state.pending, first, stop))
        return preserve(first, stop) ? FASTPATH_KEPT : FASTPATH_PYTHONS;
    for (int i = 0; i < state.dirty_count; i++)
        set_bits(&state.dirty[i], first, stop);
    note_write();
    verdict = write_image(arg + 1, arg->size, arg->offset);
    if (verdict != FASTPATH_ANSWERED)
        return verdict;
    counters.writes++;
    out.body.size = arg->size;
    send(device, &part, 1);
    return FASTPATH_ANSWERED;
}

/* ---- requests that wait for copies, or for data ---------------------------------------- */

static bool waits_for_copy(const struct fuse_in_header *in)
{
    const struct fuse_write_in *arg = (const void *)(in + 1);

    return in->opcode == FUSE_WRITE &&
           any_set(&state.pending, arg->offset >> state.shift,
                   clusters_of(arg->offset + arg->size));
}

/* What a request is now; FASTPATH_KEPT: it waits, and `cold` says whether for data. */
static enum fastpath_verdict consider(int device, const void *request, size_t size, bool *cold)
{
    const struct fuse_in_header *in = request;
    enum fastpath_verdict verdict =
        in->opcode == FUSE_READ ? answer_read(device, in, size) : answer_write(device, in, size);

    *cold = verdict == FASTPATH_KEPT && !waits_for_copy(request);
    return verdict;
}

static bool keep(const void *request, size_t size, bool cold)
{
    void *copy;

    /* With copies of Python's under way a wait would end at once, again and again. */
    if (cold && (pool_count(true) || now(CLOCK_MONOTONIC) < cold_until))
        return false;
    if (drain.kept_count == MAX_KEPT || drain.kept_bytes + size > MAX_KEPT_BYTES)
        return false;
    copy = malloc(size);
    if (!copy)
        return false;
    memcpy(copy, request, size);
    drain.kept[drain.kept_count++] = (struct kept){.request = copy, .size = size, .cold = cold};
    drain.kept_bytes += size;
    drain.cold_count += cold;
    counters.cold += cold;
    return true;
}

static void drop_kept(int index)
{
    drain.kept_bytes -= drain.kept[index].size;
    drain.cold_count -= drain.kept[index].cold;
    free(drain.kept[index].request);
    drain.kept_count--;
    memmove(&drain.kept[index], &drain.kept[index + 1],
            (size_t)(drain.kept_count - index) * sizeof(drain.kept[0]));
}

static void hand_over(struct copy *copy)
{
    drain.handed[drain.handed_count] = (struct range){copy->first, copy->stop};
    drain.numbers[drain.handed_count++] = copy->number;
    pool_hand_over(copy);
}

/* Step 2 of a write for the copies that have ended. */
static void land(void)
{
    const struct layer *receiver = &state.layers[state.receiver];
    struct copy *copy;

    while ((copy = pool_ended(false))) {
        if (copy->error) {
            drain.failed = true;
            hand_over(copy);
            continue;
        }
        set_bits(&receiver->done, copy->first, copy->stop);
        clear_bits(&state.pending, copy->first, copy->stop);
        drain.clusters += copy->stop - copy->first;
        drain.written += (unsigned long long)copy->work.written;
        drain.nanoseconds += (unsigned long long)copy->nanoseconds;
        pool_free(copy);
    }
}

/* Go through the kept requests. */
static void try_again(int device)
{
    for (int i = 0; i < drain.kept_count;) {
        struct kept *kept = &drain.kept[i];
        enum fastpath_verdict verdict = FASTPATH_PYTHONS;
        bool cold = false;
        if (!kept->refused)
            verdict = consider(device, kept->request, kept->size, &cold);
        if (verdict == FASTPATH_ANSWERED) {
            drop_kept(i);
            continue;
        }
        drain.cold_count += cold - kept->cold;
        kept->cold = cold;
        kept->refused = verdict == FASTPATH_PYTHONS;
        i++;
    }
}

void fastpath_progress(int device)
{
    if (pool_count(false) && pool_has_ended()) {
        land();
        try_again(device);
    }
}

bool fastpath_wait(int device, long long nanoseconds)
{
    bool cold = drain.cold_count > 0;

    if ((!pool_count(false) && !cold) || nanoseconds <= 0)
        return false;
    if (!pool_has_ended() &&
        !pool_wait(device, cold && nanoseconds > COLD_NAP ? COLD_NAP : nanoseconds) && !cold)
        return false;
    fastpath_progress(device);
    if (drain.cold_count)
        try_again(device);
    return true;
}

void fastpath_settle(int device, bool patient)
{
    long long started = fastpath_now();

    while (patient && (pool_count(false) || drain.cold_count)) {
        long long passed = fastpath_now() - started;
        if (passed > (pool_count(false) ? SETTLE_TIME : COLD_TIME))
            break;
        if (pool_has_ended() || pool_wait(-1, drain.cold_count ? COLD_NAP : SETTLE_TIME - passed))
            fastpath_progress(device);
        if (drain.cold_count)
            try_again(device);
    }
    if (patient && drain.cold_count)
        cold_until = fastpath_now() + COLD_PAUSE;
    for (struct copy *copy; (copy = pool_any());)
        hand_over(copy);
}

/* Lists for Python of what it takes over. */
static PyObject *handed_copies(void)
{
    PyObject *list = PyList_New(drain.handed_count);

    for (int i = 0; list && i < drain.handed_count; i++) {
        PyObject *item = Py_BuildValue("KKK", (unsigned long long)drain.numbers[i],
                                       (unsigned long long)drain.handed[i].first,
                                       (unsigned long long)drain.handed[i].stop);
        if (!item)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, item);
    }
    return list;
}

static PyObject *kept_requests(uint32_t opcode)
{
    PyObject *list = PyList_New(0);

    for (int i = 0; list && i < drain.kept_count; i++) {
        const struct fuse_in_header *in = drain.kept[i].request;
        const struct fuse_write_in *out = (const void *)(in + 1);
        const struct fuse_read_in *read = (const void *)(in + 1);
        PyObject *item;
        if (in->opcode != opcode)
            continue;
        if (opcode == FUSE_WRITE)
            item = Py_BuildValue("KKLy#", (unsigned long long)in->unique,
                                 (unsigned long long)out->fh, (long long)out->offset,
                                 (const char *)(out + 1), (Py_ssize_t)out->size);
        else
            item = Py_BuildValue("KKLIO", (unsigned long long)in->unique,
                                 (unsigned long long)read->fh, (long long)read->offset,
                                 (unsigned)read->size,
                                 read->read_flags & FUSE_READ_LOCKOWNER ? Py_True : Py_False);
        if (!item || PyList_Append(list, item))
            Py_CLEAR(list);
        Py_XDECREF(item);
    }
    return list;
}

void fastpath_finish(int device)
{
    PyObject *copies, *writes, *reads, *result = NULL;

    if (!drain.lent && !drain.handed_count && !drain.kept_count)
        return;
    copies = handed_copies();
    writes = copies ? kept_requests(FUSE_WRITE) : NULL;
    reads = writes ? kept_requests(FUSE_READ) : NULL;
    if (reads)
        result = PyObject_CallFunction(
            finisher, "KKKKOOO", (unsigned long long)drain.lent, drain.written, drain.clusters,
            drain.nanoseconds, copies, writes, reads);
    if (!result) { /* a bug; nobody must wait for ever */
        PyErr_WriteUnraisable(finisher);
        fastpath_clear();
        /* Nobody knows of these copies: they must not read what is written from now on. */
        Py_BEGIN_ALLOW_THREADS
        pool_settle();
        Py_END_ALLOW_THREADS
        for (int i = 0; i < drain.kept_count; i++) {
            const struct fuse_in_header *in = drain.kept[i].request;
            struct fuse_out_header out = {.len = sizeof(out), .error = -EIO,
                                          .unique = in->unique};
            struct iovec part = {&out, sizeof(out)};
            send(device, &part, 1);
        }
    }
    Py_XDECREF(result);
    Py_XDECREF(copies);
    Py_XDECREF(writes);
    Py_XDECREF(reads);
    while (drain.kept_count)
        drop_kept(drain.kept_count - 1);
    memset(&drain, 0, sizeof(drain));
}

bool fastpath_wants(const void *request, size_t size)
{
    const struct fuse_in_header *in = request;

    if (size < sizeof(*in) || in->len != size)
        return false;
    return in->opcode == FUSE_READ || in->opcode == FUSE_WRITE;
}

enum fastpath_verdict fastpath_answer(int device, const void *request, size_t size)
{
    enum fastpath_verdict verdict;
    bool cold;

    if (!state.loaded || !fastpath_wants(request, size))
        return FASTPATH_PYTHONS;
    verdict = consider(device, request, size, &cold);
    if (verdict == FASTPATH_KEPT && !keep(request, size, cold))
        return FASTPATH_PYTHONS;
    return verdict;
}

/* ---- for the Python module ------------------------------------------------------------- */

void fastpath_forget(void)
{
    memset(handles, 0, sizeof(handles));
}

int fastpath_traverse(visitproc visit, void *arg)
{
    Py_VISIT(publisher);
    Py_VISIT(lender);
    Py_VISIT(finisher);
    return 0;
}

void fastpath_clear(void)
{
    Py_CLEAR(publisher);
    Py_CLEAR(lender);
    Py_CLEAR(finisher);
}

PyObject *fastpath_set(PyObject *module, PyObject *args)
{
    PyObject *publish = Py_None, *lend = Py_None, *finish = Py_None;
    (void)module;

    if (!PyArg_ParseTuple(args, "|OOO:set_fastpath", &publish, &lend, &finish))
        return NULL;
    if (publish != Py_None && (!PyCallable_Check(publish) || !PyCallable_Check(lend) ||
                               !PyCallable_Check(finish))) {
        PyErr_SetString(PyExc_TypeError, "the fast path needs three callables, or nothing");
        return NULL;
    }
    if (drain.lent || state.loaded) {
        PyErr_SetString(PyExc_RuntimeError, "a drain is under way");
        return NULL;
    }
    fastpath_clear();
    if (publish != Py_None && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__) { /* the record */
        publisher = Py_NewRef(publish);
        lender = Py_NewRef(lend);
        finisher = Py_NewRef(finish);
    }
    return PyBool_FromLong(publisher != NULL);
}

PyObject *fastpath_ended_copies(PyObject *module, PyObject *unused)
{
    PyObject *list = PyList_New(0);
    struct copy *copy;
    (void)module, (void)unused;

    if (list && pool_descriptor() >= 0)
        pool_clear(); /* first: one that ends after we looked makes it readable again */
    while (list && (copy = pool_ended(true))) {
        PyObject *item = Py_BuildValue("KiLL", (unsigned long long)copy->number, copy->error,
                                       (long long)copy->work.written, copy->nanoseconds);
        if (!item || PyList_Append(list, item)) {
            Py_XDECREF(item);
            Py_CLEAR(list);
            break;
        }
        Py_DECREF(item);
        pool_free(copy);
    }
    return list;
}

PyObject *fastpath_copies_fd(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyLong_FromLong(pool_descriptor());
}

PyObject *fastpath_handle_opened(PyObject *module, PyObject *args)
{
    unsigned long long number, inode;
    (void)module;

    if (!PyArg_ParseTuple(args, "KK:handle_opened", &number, &inode))
        return NULL;
    handles[number % HANDLES].number = number;
    handles[number % HANDLES].inode = inode;
    Py_RETURN_NONE;
}

PyObject *fastpath_handle_closed(PyObject *module, PyObject *number)
{
    unsigned long long closed = PyLong_AsUnsignedLongLong(number);
    (void)module;

    if (PyErr_Occurred())
        return NULL;
    if (handles[closed % HANDLES].number == closed)
        handles[closed % HANDLES].number = 0;
    Py_RETURN_NONE;
}

PyObject *fastpath_try(PyObject *module, PyObject *args)
{
    PyObject *requests, *verdicts;
    int device, patient;
    (void)module;

    if (!PyArg_ParseTuple(args, "iO!p:try_requests", &device, &PyList_Type, &requests, &patient))
        return NULL;
    verdicts = PyList_New(0);
    if (!verdicts || !fastpath_begin())
        return verdicts;
    for (Py_ssize_t i = 0; verdicts && i < PyList_GET_SIZE(requests); i++) {
        PyObject *request = PyList_GET_ITEM(requests, i), *verdict = NULL;
        char *bytes;
        Py_ssize_t size;
        if (!PyBytes_AsStringAndSize(request, &bytes, &size))
            verdict = PyLong_FromLong((long)fastpath_answer(device, bytes, (size_t)size));
        if (!verdict || PyList_Append(verdicts, verdict))
            Py_CLEAR(verdicts);
        Py_XDECREF(verdict);
    }
    while (patient && fastpath_wait(device, SECOND))
        ;
    fastpath_settle(device, false);
    fastpath_rest();
    fastpath_end();
    fastpath_finish(device);
    return verdicts;
}

PyObject *fastpath_statistics(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return Py_BuildValue("{sOsKsKsKsKsKsK}", "on", publisher ? Py_True : Py_False, "reads",
                         counters.reads, "writes", counters.writes, "snapshot_reads",
                         counters.snapshot_reads, "slow_writes", counters.slow_writes,
                         "failed_replies", counters.failed_replies, "cold", counters.cold);
}
