/* The fast path: READ and WRITE requests that need no policy, answered without Python.
 *
 * No policy is made here.  fastpath.py describes the engine's state as plain data, anew for
 * each drain of /dev/fuse, and this file answers what follows from it:
 *
 *   WRITE of `active`    inside the known size, no cluster pending, no frozen read in the
 *                        range, snapshots not being created: sets the dirty bits, notes
 *                        activity, writes
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
 * What may block.  Reads use RWF_NOWAIT.  So do writes where the file system can (XFS,
 * btrfs).  ext4 cannot: there a write of a part of a page first makes sure that the page is
 * cached, since it would be read otherwise; and when a write has taken long, for dirty-page
 * throttling or a journal that waits for the disk, the following ones go to Python's threads
 * for a while.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "fastpath.h"

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
    /* More of them than these, and everything goes to Python. */
    MAX_LAYERS = 64,
    MAX_BITMAPS = 64,
    MAX_FROZEN = 256,
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

struct range {
    uint64_t first, stop; /* clusters */
};

struct layer {
    uint64_t inode; /* 0: has none */
    uint64_t size;
    uint64_t clusters;
    int temp;
    bool readable;
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
    struct range frozen[MAX_FROZEN];
    struct layer layers[MAX_LAYERS]; /* oldest first */
    Py_buffer dirty[MAX_BITMAPS];
    int frozen_count, layer_count, dirty_count;
} state;

/* activity.py's record, in the mapped page. */
struct activity {
    char magic[8];
    int64_t under_way, least, most, mtime, ctime, alive;
};

static PyObject *publisher;   /* NULL: the fast path is off */
static char *reply;           /* FASTPATH_MAX_READ bytes, or NULL until needed */
static bool write_nowait = true; /* until the file system says it cannot */
static long long slow_until;  /* writes go to Python before this time */
static bool recorded;         /* we have set under_way, and must clear it */
static struct {
    uint64_t number, inode;
} handles[HANDLES]; /* slot number % HANDLES; number 0: free */

static struct {
    unsigned long long reads, writes, snapshot_reads; /* answered */
    unsigned long long slow_writes, failed_replies;
} counters;

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

static bool load_frozen(PyObject *ranges)
{
    if (!PyList_Check(ranges) || PyList_GET_SIZE(ranges) > MAX_FROZEN) {
        refuse("frozen reads");
        return false;
    }
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(ranges); i++) {
        unsigned long long first, stop;
        if (!PyArg_ParseTuple(PyList_GET_ITEM(ranges, i), "KK", &first, &stop))
            return false;
        state.frozen[state.frozen_count++] = (struct range){first, stop};
    }
    return true;
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
        int readable;
        if (!PyArg_ParseTuple(PyList_GET_ITEM(layers, i), "KKipw*w*", &inode, &size,
                              &layer->temp, &readable, &layer->access, &layer->done))
            return false;
        state.layer_count++;
        layer->inode = inode;
        layer->size = size;
        layer->readable = readable;
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
    PyObject *dirty, *frozen, *layers;
    unsigned long long size;
    int writable, busy;

    if (!PyTuple_Check(published)) {
        refuse("not a tuple");
        return false;
    }
    if (!PyArg_ParseTuple(published, "iKIppOOOw*w*", &state.image, &size, &state.shift, &writable,
                          &busy, &dirty, &frozen, &layers, &state.pending, &state.activity))
        return false;
    state.loaded = true; /* from here on fastpath_end() releases the buffers */
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
    return load_frozen(frozen) && load_dirty(dirty) && load_layers(layers);
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
        Py_CLEAR(publisher);
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
    state.frozen_count = state.layer_count = state.dirty_count = 0;
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
static bool send(int device, const struct iovec *parts, int count)
{
    if (writev(device, parts, count) < 0)
        counters.failed_replies++;
    return true;
}

static bool send_data(int device, uint64_t unique, size_t length)
{
    struct fuse_out_header out = {.len = (uint32_t)(sizeof(out) + length), .unique = unique};
    struct iovec parts[2] = {{&out, sizeof(out)}, {reply, length}};

    return send(device, parts, length ? 2 : 1);
}

/* All of [offset, offset+length) into the reply at `position`, from the page cache. */
static bool read_cached(int fd, size_t position, size_t length, uint64_t offset)
{
    struct iovec part = {reply + position, length};

    return preadv2(fd, &part, 1, (off_t)offset, RWF_NOWAIT) == (ssize_t)length;
}

static bool read_active(int device, uint64_t unique, uint64_t offset, size_t length)
{
    if (offset >= state.size)
        length = 0;
    else if (length > state.size - offset)
        length = (size_t)(state.size - offset);
    if (length && !read_cached(state.image, 0, length, offset))
        return false;
    counters.reads++;
    return send_data(device, unique, length);
}

/* The file in which the snapshot state.layers[index] finds a cluster. */
static int source(int index, uint64_t cluster)
{
    for (; index < state.layer_count; index++)
        if (cluster < state.layers[index].clusters && bit(&state.layers[index].done, cluster))
            return state.layers[index].temp;
    return state.image;
}

static bool read_snapshot(int device, const struct fuse_in_header *in, uint64_t offset,
                          size_t length)
{
    const struct layer *layer;
    size_t done = 0;
    int index = 0;

    while (index < state.layer_count && state.layers[index].inode != in->nodeid)
        index++;
    if (index == state.layer_count)
        return false;
    layer = &state.layers[index];
    if (!layer->readable)
        return false;
    if (offset >= layer->size)
        length = 0;
    else if (length > layer->size - offset)
        length = (size_t)(layer->size - offset);
    if (length && !all_set(&layer->access, offset >> state.shift, clusters_of(offset + length)))
        return false;
    while (done < length) { /* a run of one source at a time */
        uint64_t cluster = (offset + done) >> state.shift, end;
        size_t count;
        int fd = source(index, cluster);
        do
            end = ++cluster << state.shift;
        while (end < offset + length && source(index, cluster) == fd);
        count = (size_t)((end < offset + length ? end : offset + length) - (offset + done));
        if (!read_cached(fd, done, count, offset + done))
            return false;
        done += count;
    }
    counters.snapshot_reads++;
    return send_data(device, in->unique, length);
}

static bool answer_read(int device, const struct fuse_in_header *in, size_t size)
{
    const struct fuse_read_in *arg = (const void *)(in + 1);

    if (size != sizeof(*in) + sizeof(*arg) || arg->size > FASTPATH_MAX_READ ||
        arg->offset > INT64_MAX - FASTPATH_MAX_READ || !is_inode_of(arg->fh, in->nodeid))
        return false;
    if (in->nodeid == ACTIVE_INODE)
        return read_active(device, in->unique, arg->offset, arg->size);
    return read_snapshot(device, in, arg->offset, arg->size);
}

/* Is the page that holds the byte in the page cache? */
static bool is_cached(uint64_t offset)
{
    char byte;
    struct iovec part = {&byte, 1};

    return preadv2(state.image, &part, 1, (off_t)offset, RWF_NOWAIT) == 1;
}

/* Writes all of it, without waiting for the disk as far as that can be known; false: Python
 * is to write it, again or for the first time. */
static bool write_image(const void *data, size_t length, uint64_t offset)
{
    struct iovec part = {(void *)data, length};
    long long started;
    ssize_t written;

    if (write_nowait) {
        written = pwritev2(state.image, &part, 1, (off_t)offset, RWF_NOWAIT);
        if (written >= 0 || errno != EOPNOTSUPP)
            return written == (ssize_t)length;
        write_nowait = false;
    }
    if (offset % PAGE && !is_cached(offset))
        return false;
    if ((offset + length) % PAGE && !is_cached(offset + length - 1))
        return false;
    started = now(CLOCK_MONOTONIC);
    if (started < slow_until)
        return false;
    written = pwrite(state.image, data, length, (off_t)offset);
    if (now(CLOCK_MONOTONIC) - started > SLOW_WRITE) {
        counters.slow_writes++;
        slow_until = now(CLOCK_MONOTONIC) + SLOW_PAUSE;
    }
    return written == (ssize_t)length;
}

/* The kernel's flags change nothing here: a page that the writeback cache writes is data as
 * any other, and the image has no set-user-ID bits. */
#define KNOWN_WRITE_FLAGS (FUSE_WRITE_CACHE | FUSE_WRITE_LOCKOWNER | FUSE_WRITE_KILL_SUIDGID)

static bool answer_write(int device, const struct fuse_in_header *in, size_t size)
{
    const struct fuse_write_in *arg = (const void *)(in + 1);
    struct {
        struct fuse_out_header header;
        struct fuse_write_out body;
    } out = {.header = {.len = sizeof(out), .unique = in->unique}};
    struct iovec part = {&out, sizeof(out)};
    uint64_t first, stop;

    if (size < sizeof(*in) + sizeof(*arg) || size - sizeof(*in) - sizeof(*arg) != arg->size ||
        in->nodeid != ACTIVE_INODE || !is_inode_of(arg->fh, ACTIVE_INODE) ||
        arg->write_flags & ~(uint32_t)KNOWN_WRITE_FLAGS)
        return false;
    if (!state.writable || !arg->size || arg->offset >= state.size ||
        arg->size > state.size - arg->offset)
        return false;
    first = arg->offset >> state.shift;
    stop = clusters_of(arg->offset + arg->size);
    if (any_set(&state.pending, first, stop))
        return false;
    for (int i = 0; i < state.frozen_count; i++)
        if (state.frozen[i].first < stop && first < state.frozen[i].stop)
            return false;
    for (int i = 0; i < state.dirty_count; i++)
        if (!holds(&state.dirty[i], stop)) /* the image has just grown */
            return false;
    for (int i = 0; i < state.dirty_count; i++)
        set_bits(&state.dirty[i], first, stop);
    note_write();
    if (!write_image(arg + 1, arg->size, arg->offset))
        return false;
    counters.writes++;
    out.body.size = arg->size;
    return send(device, &part, 1);
}

bool fastpath_wants(const void *request, size_t size)
{
    const struct fuse_in_header *in = request;

    if (size < sizeof(*in) || in->len != size)
        return false;
    return in->opcode == FUSE_READ || in->opcode == FUSE_WRITE;
}

bool fastpath_answer(int device, const void *request, size_t size)
{
    const struct fuse_in_header *in = request;

    if (!state.loaded || !fastpath_wants(request, size))
        return false;
    return in->opcode == FUSE_READ ? answer_read(device, in, size)
                                   : answer_write(device, in, size);
}

/* ---- for the Python module ------------------------------------------------------------- */

void fastpath_forget(void)
{
    memset(handles, 0, sizeof(handles));
}

int fastpath_traverse(visitproc visit, void *arg)
{
    Py_VISIT(publisher);
    return 0;
}

void fastpath_clear(void)
{
    Py_CLEAR(publisher);
}

PyObject *fastpath_set(PyObject *module, PyObject *publish)
{
    PyObject *previous = publisher;
    (void)module;

    if (publish != Py_None && !PyCallable_Check(publish)) {
        PyErr_SetString(PyExc_TypeError, "a publisher must be callable or None");
        return NULL;
    }
    if (__BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__) /* the record of activity */
        publish = Py_None;
    publisher = publish == Py_None ? NULL : Py_NewRef(publish);
    Py_XDECREF(previous);
    return PyBool_FromLong(publisher != NULL);
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
    Py_buffer request;
    int device;
    bool answered;
    (void)module;

    if (!PyArg_ParseTuple(args, "iy*:try_request", &device, &request))
        return NULL;
    answered = fastpath_begin();
    if (answered) {
        answered = fastpath_answer(device, request.buf, (size_t)request.len);
        fastpath_rest();
        fastpath_end();
    }
    PyBuffer_Release(&request);
    return PyBool_FromLong(answered);
}

PyObject *fastpath_statistics(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return Py_BuildValue("{sOsKsKsKsKsK}", "on", publisher ? Py_True : Py_False, "reads",
                         counters.reads, "writes", counters.writes, "snapshot_reads",
                         counters.snapshot_reads, "slow_writes", counters.slow_writes,
                         "failed_replies", counters.failed_replies);
}
