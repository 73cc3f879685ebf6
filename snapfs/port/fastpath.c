/* The fast path: READ and WRITE requests that need no policy, answered without Python.
 *
 * No policy is made here.  fastpath.py describes the engine's state as plain data, anew for
 * each drain of /dev/fuse (published.h), and this file answers what follows from it:
 *
 *   WRITE of `active`    inside the known size, no cluster pending, no frozen read and no
 *                        promise (durability.py) in the range, snapshots not being created:
 *                        sets the dirty bits, notes activity, writes.  With pending clusters
 *                        it is kept until the pool has copied them (waiting.c), then it goes
 *                        on like any other.  Not one that is to be durable (O_DSYNC): a sync
 *                        may block
 *   READ of `active`     data in the page cache
 *   READ of a snapshot   every cluster accessible, its source by the engine's rule (the first
 *                        done_j with j >= i, else the image), data in the page cache
 *
 * Data that is not in the page cache is waited for, a moment (waiting.c).  Anything else, and
 * whatever is odd about a request, is Python's: nothing has been sent then, and libfuse and the
 * engine judge it as if we were not there.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "fastpath.h"
#include "buffers.h"
#include "copypool.h"
#include "tally.h"
#include "waiting.h"

#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <string.h>

enum {
    ACTIVE_INODE = 2,
    /* Open files that are known at a time (handles.py has the number, too); of two in the same
     * slot the earlier one stays: a guest's disk is open for months, and others come and go. */
    HANDLES = 4096,
    /* Runs of one source that a READ may need: one for each of the smallest clusters. */
    MAX_PIECES = FASTPATH_MAX_READ / 4096 + 1,
};

/* With no task in a handler nobody but timers and the control socket waits for the end of a
 * drain; otherwise a trip through the event loop should not take much longer than it must. */
#define PATIENCE_IDLE (5 * SECOND / 1000)
#define PATIENCE_BUSY (SECOND / 4000)
/* While copies wait for syncs, which take about as long as an idle drain may: at its end all of
 * them are waited for, and nothing begins meanwhile. */
#define PATIENCE_SYNCING (50 * SECOND / 1000)

static PyObject *publisher, *finisher; /* both NULL: the fast path is off */

static struct {
    uint64_t number, inode;
} handles[HANDLES]; /* slot number % HANDLES; number 0: free */

static struct {
    unsigned long long reads, writes, snapshot_reads; /* answered */
} counters;

/* ---- the life of a drain --------------------------------------------------------------- */

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
    if (!callable || !transfer_prepare())
        return false;
    Py_INCREF(callable);
    published = PyObject_CallFunction(callable, "O", state.suspect ? Py_True : Py_False);
    if (published)
        state.suspect = false;
    if (published == Py_None) { /* not just now */
        Py_DECREF(published);
        Py_DECREF(callable);
        return false;
    }
    if (published)
        good = published_load(published);
    if (!good) { /* a bug; without the fast path everything works */
        PyErr_WriteUnraisable(callable);
        published_unload();
        fastpath_clear();
    }
    Py_XDECREF(published);
    Py_DECREF(callable);
    return good;
}

void fastpath_end(int device)
{
    PyObject *callable = finisher;

    published_unload();
    Py_XINCREF(callable);
    if (!waiting_finish(device, callable)) { /* a bug */
        PyErr_WriteUnraisable(callable);
        fastpath_clear();
    }
    Py_XDECREF(callable);
}

bool fastpath_may_linger(void)
{
    return state.loaded && !state.busy;
}

long long fastpath_patience(void)
{
    if (state.loaded && state.busy)
        return PATIENCE_BUSY;
    return state.loaded && state.done_file.durable && pool_count(false) ? PATIENCE_SYNCING
                                                                        : PATIENCE_IDLE;
}

/* ---- judging --------------------------------------------------------------------------- */

static bool is_inode_of(uint64_t number, uint64_t inode)
{
    return number && handles[number % HANDLES].number == number &&
           handles[number % HANDLES].inode == inode;
}

/* A READ of so many bytes from a file that ends at `size`: how many there are. */
static size_t readable(uint64_t offset, size_t length, uint64_t size)
{
    if (offset >= size)
        return 0;
    return length < size - offset ? length : (size_t)(size - offset);
}

static enum fastpath_verdict read_active(int device, uint64_t unique, uint64_t offset,
                                         size_t length)
{
    struct piece whole = {state.image, -1, offset, readable(offset, length, state.size)};
    enum fastpath_verdict verdict = transfer_read(device, unique, &whole, whole.length > 0);

    counters.reads += verdict == FASTPATH_ANSWERED;
    return verdict;
}

/* Where the snapshot state.layers[index] finds a cluster: a layer, in its temp image; NULL: in
 * the image. */
static const struct layer *source(int index, uint64_t cluster)
{
    for (; index < state.layer_count; index++)
        if (cluster < state.layers[index].clusters && bit(&state.layers[index].done, cluster))
            return &state.layers[index];
    return NULL;
}

/* Where a snapshot finds the range: runs of one source each. */
static int find_pieces(struct piece *pieces, int index, uint64_t offset, size_t length)
{
    const uint64_t stop = offset + length;
    int count = 0;

    while (offset < stop) {
        uint64_t cluster = offset >> state.shift, end;
        const struct layer *holder = source(index, cluster);
        do
            end = ++cluster << state.shift;
        while (end < stop && source(index, cluster) == holder);
        end = end < stop ? end : stop;
        pieces[count++] = (struct piece){holder ? holder->temp : state.image,
                                         holder ? holder->watch : state.watch, offset,
                                         (size_t)(end - offset)};
        offset = end;
    }
    return count;
}

static enum fastpath_verdict read_snapshot(int device, const struct fuse_in_header *in,
                                           uint64_t offset, size_t length)
{
    struct piece pieces[MAX_PIECES];
    const struct layer *layer;
    enum fastpath_verdict verdict;
    int index = 0, count;

    while (index < state.layer_count && state.layers[index].inode != in->nodeid)
        index++;
    if (index == state.layer_count)
        return FASTPATH_PYTHONS;
    layer = &state.layers[index];
    if (!layer->readable || state.suspect)
        return FASTPATH_PYTHONS;
    length = readable(offset, length, layer->size);
    if (length && !all_set(&layer->access, offset >> state.shift, clusters_of(offset + length)))
        return FASTPATH_PYTHONS;
    count = find_pieces(pieces, index, offset, length);
    if (!published_is_sound())
        return FASTPATH_PYTHONS;
    verdict = transfer_read(device, in->unique, pieces, count);
    if (verdict == FASTPATH_ANSWERED) {
        counters.snapshot_reads++;
        tally_read(offset, length);
    }
    return verdict;
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

/* The kernel's flags change nothing here: a page that the writeback cache writes is data as
 * any other, and the image has no set-user-ID bits. */
#define KNOWN_WRITE_FLAGS (FUSE_WRITE_CACHE | FUSE_WRITE_LOCKOWNER | FUSE_WRITE_KILL_SUIDGID)

static enum fastpath_verdict answer_write(int device, const struct fuse_in_header *in,
                                          size_t size, void **buffer)
{
    const struct fuse_write_in *arg = (const void *)(in + 1);
    struct fuse_write_out out = {0};
    uint64_t first, stop;
    enum fastpath_verdict verdict;

    if (size < sizeof(*in) + sizeof(*arg) || size - sizeof(*in) - sizeof(*arg) != arg->size ||
        in->nodeid != ACTIVE_INODE || !is_inode_of(arg->fh, ACTIVE_INODE) ||
        arg->flags & O_DSYNC || arg->write_flags & ~(uint32_t)KNOWN_WRITE_FLAGS)
        return FASTPATH_PYTHONS;
    if (!state.writable || !arg->size || arg->offset >= state.size ||
        arg->size > state.size - arg->offset)
        return FASTPATH_PYTHONS;
    first = arg->offset >> state.shift;
    stop = clusters_of(arg->offset + arg->size);
    if (overlaps(&state.frozen, first, stop) || overlaps(&state.promised, first, stop))
        return FASTPATH_PYTHONS;
    for (int i = 0; i < state.dirty_count; i++)
        if (!holds(&state.dirty[i], stop) || /* the image has just grown */
            (state.dirty_durable && !all_set(&state.dirty[i], first, stop)))
            return FASTPATH_PYTHONS;
    if (any_set(&state.pending, first, stop))
        return waiting_preserve(first, stop) ? FASTPATH_KEPT : FASTPATH_PYTHONS;
    if (pool_is_promised(first, stop))
        return FASTPATH_KEPT;
    for (int i = 0; i < state.dirty_count; i++)
        set_bits(&state.dirty[i], first, stop);
    published_note_write();
    if (!published_is_sound())
        return FASTPATH_PYTHONS;
    if (buffer && transfer_may_take(arg->size, arg->offset)) {
        fastpath_collect();
        if (!waiting_has_refused() && transfer_take(device, buffer, size))
            return FASTPATH_ANSWERED;
    }
    verdict = transfer_write(arg + 1, arg->size, arg->offset);
    if (verdict != FASTPATH_ANSWERED)
        return verdict;
    counters.writes++;
    out.size = arg->size;
    transfer_reply(device, in->unique, 0, &out, sizeof(out));
    return FASTPATH_ANSWERED;
}

static bool waits_for_copy(const struct fuse_in_header *in)
{
    const struct fuse_write_in *arg = (const void *)(in + 1);
    uint64_t first, stop;

    if (in->opcode != FUSE_WRITE)
        return false;
    first = arg->offset >> state.shift;
    stop = clusters_of(arg->offset + arg->size);
    return any_set(&state.pending, first, stop) || pool_is_promised(first, stop);
}

enum fastpath_verdict fastpath_consider(int device, const void *request, size_t size,
                                        void **buffer, bool *cold)
{
    const struct fuse_in_header *in = request;
    enum fastpath_verdict verdict = in->opcode == FUSE_READ
                                        ? answer_read(device, in, size)
                                        : answer_write(device, in, size, buffer);

    *cold = verdict == FASTPATH_KEPT && !waits_for_copy(request);
    return verdict;
}

bool fastpath_wants(const void *request, size_t size)
{
    const struct fuse_in_header *in = request;

    if (size < sizeof(*in) || in->len != size)
        return false;
    return in->opcode == FUSE_READ || in->opcode == FUSE_WRITE;
}

enum fastpath_verdict fastpath_answer(int device, const void *request, size_t size,
                                      void **buffer)
{
    enum fastpath_verdict verdict;
    bool cold;

    if (!state.loaded || !fastpath_wants(request, size))
        return FASTPATH_PYTHONS;
    verdict = fastpath_consider(device, request, size, buffer, &cold);
    if (verdict == FASTPATH_KEPT && !waiting_keep(request, size, buffer, cold))
        return FASTPATH_PYTHONS;
    return verdict;
}

void fastpath_collect(void)
{
    void *buffer;
    size_t size;
    bool good;

    if (transfer_collect(&buffer, &size, &good)) {
        counters.writes += good;
        if (good)
            buffer_free(buffer);
        else
            waiting_refuse(buffer, size);
    }
}

/* ---- for the Python module ------------------------------------------------------------- */

void fastpath_forget(void)
{
    memset(handles, 0, sizeof(handles));
}

int fastpath_traverse(visitproc visit, void *arg)
{
    Py_VISIT(publisher);
    Py_VISIT(finisher);
    return waiting_traverse(visit, arg);
}

void fastpath_clear(void)
{
    Py_CLEAR(publisher);
    Py_CLEAR(finisher);
    waiting_set_lender(NULL);
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
    if (waiting_is_busy() || state.loaded) {
        PyErr_SetString(PyExc_RuntimeError, "a drain is under way");
        return NULL;
    }
    fastpath_clear();
    transfer_reset();
    if (publish != Py_None && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__) { /* the record */
        publisher = Py_NewRef(publish);
        finisher = Py_NewRef(finish);
        waiting_set_lender(lend);
    }
    return PyBool_FromLong(publisher != NULL);
}

PyObject *fastpath_handle_opened(PyObject *module, PyObject *args)
{
    unsigned long long number, inode;
    (void)module;

    if (!PyArg_ParseTuple(args, "KK:handle_opened", &number, &inode))
        return NULL;
    if (!handles[number % HANDLES].number) {
        handles[number % HANDLES].number = number;
        handles[number % HANDLES].inode = inode;
    }
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
    struct pollfd more = {.events = POLLIN};
    int device, patient;
    (void)module;

    if (!PyArg_ParseTuple(args, "iO!p:try_requests", &device, &PyList_Type, &requests, &patient))
        return NULL;
    more.fd = device;
    verdicts = PyList_New(0);
    if (!verdicts || !fastpath_begin())
        return verdicts;
    transfer_any_speed(true);
    for (Py_ssize_t i = 0; verdicts && i < PyList_GET_SIZE(requests); i++) {
        PyObject *request = PyList_GET_ITEM(requests, i), *verdict = NULL;
        void *buffer = buffer_new();
        char *bytes;
        Py_ssize_t size;
        if (!PyBytes_AsStringAndSize(request, &bytes, &size)) {
            bool fits = buffer && size <= BUFFER_SIZE; /* as what was received */
            enum fastpath_verdict found;
            Py_BEGIN_ALLOW_THREADS
            found = fastpath_answer(device, fits ? memcpy(buffer, bytes, (size_t)size) : bytes,
                                    (size_t)size, fits ? &buffer : NULL);
            Py_END_ALLOW_THREADS
            verdict = PyLong_FromLong((long)found);
        }
        buffer_free(buffer);
        if (!verdict || PyList_Append(verdicts, verdict))
            Py_CLEAR(verdicts);
        Py_XDECREF(verdict);
    }
    Py_BEGIN_ALLOW_THREADS
    while (patient && poll(&more, 1, 0) == 0 && waiting_wait(device, 300 * SECOND))
        ;
    waiting_settle(device, false);
    published_rest();
    Py_END_ALLOW_THREADS
    transfer_any_speed(false);
    fastpath_end(device);
    return verdicts;
}

PyObject *fastpath_statistics(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return Py_BuildValue("{sOsKsKsKsKsKsKsK}", "on", publisher ? Py_True : Py_False, "reads",
                         counters.reads, "writes", counters.writes, "snapshot_reads",
                         counters.snapshot_reads, "piped", carried.piped, "slow_writes",
                         carried.slow_writes, "failed_replies", carried.failed_replies, "cold",
                         waiting_cold_count());
}
