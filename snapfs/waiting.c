/* See waiting.h.
 *
 * Copies.  Within a drain they are ours: as nothing else changes meanwhile, landing one means
 * to set done and to clear pending, which is all that LayerStack.settle() would do for a
 * cluster that was pending until then.  What is not landed at the end of the drain, because it
 * failed or takes long, is handed to the engine with the writes that wait for it, and nothing
 * is copied here before the engine has dealt with that.  So timeouts, failures and their
 * policy are Python's.
 *
 * Cold data.  A READ, or a WRITE of a part of a page, that has found a page missing is tried
 * again, by all the rules, until the data is there; after 2 ms it is Python's, and so are cold
 * requests for a while, since that disk is slow.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "waiting.h"
#include "copypool.h"
#include "fastpath.h"

#include <errno.h>
#include <linux/fuse.h>
#include <stdlib.h>
#include <string.h>

enum {
    /* Requests that wait for copies or data, and bytes of them.  The kernel sends no more than
     * max_background at once, and one for each thread that writes synchronously. */
    MAX_KEPT = 128,
    MAX_KEPT_BYTES = 16 << 20,
    /* Bytes of one copy, if a cluster is not more: a large write uses both threads. */
    COPY_BYTES = 256 << 10,
    LOAN = 16 << 20, /* bytes of temp space to ask for at a time */
};

/* For copies to end after the drain has; then they are the engine's.  Long for a page cache, and
 * what a disk that hangs costs the others once: nothing is copied here until it is over. */
#define SETTLE_TIME (10 * SECOND / 1000)
/* For data to come from the disk after the drain has ended, how often to look, and how long
 * not to wait for any after some did not come. */
#define COLD_TIME (2 * SECOND / 1000)
#define COLD_NAP (30 * SECOND / 1000000)
#define COLD_PAUSE (SECOND / 2)

static PyObject *lender;
static long long cold_until; /* cold requests go to Python before this time */
static unsigned long long cold_kept;

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

bool waiting_preserve(uint64_t first, uint64_t stop)
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
            return false;
    }
    return true;
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

/* ---- keeping requests ------------------------------------------------------------------ */

bool waiting_keep(const void *request, size_t size, bool cold)
{
    void *copy;

    /* With copies of Python's under way a wait would end at once, again and again. */
    if (cold && (pool_count(true) || nanoseconds(CLOCK_MONOTONIC) < cold_until))
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
    cold_kept += cold;
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

/* Go through the kept requests. */
static void try_again(int device)
{
    for (int i = 0; i < drain.kept_count;) {
        struct kept *kept = &drain.kept[i];
        enum fastpath_verdict verdict = FASTPATH_PYTHONS;
        bool cold = false;
        if (!kept->refused)
            verdict = fastpath_consider(device, kept->request, kept->size, &cold);
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

void waiting_progress(int device)
{
    if (pool_count(false) && pool_has_ended()) {
        land();
        try_again(device);
    }
}

bool waiting_wait(int device, long long time)
{
    bool cold = drain.cold_count > 0;

    if ((!pool_count(false) && !cold) || time <= 0)
        return false;
    if (!pool_has_ended() && !pool_wait(device, cold && time > COLD_NAP ? COLD_NAP : time) && !cold)
        return false;
    waiting_progress(device);
    if (drain.cold_count)
        try_again(device);
    return true;
}

/* ---- the end of the drain -------------------------------------------------------------- */

void waiting_settle(int device, bool patient)
{
    long long started = nanoseconds(CLOCK_MONOTONIC);

    while (patient && (pool_count(false) || drain.cold_count)) {
        long long passed = nanoseconds(CLOCK_MONOTONIC) - started;
        if (passed > (pool_count(false) ? SETTLE_TIME : COLD_TIME))
            break;
        if (pool_has_ended() || pool_wait(-1, drain.cold_count ? COLD_NAP : SETTLE_TIME - passed))
            waiting_progress(device);
        if (drain.cold_count)
            try_again(device);
    }
    if (patient && drain.cold_count)
        cold_until = nanoseconds(CLOCK_MONOTONIC) + COLD_PAUSE;
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

static PyObject *kept_request(const struct fuse_in_header *in)
{
    const struct fuse_write_in *out = (const void *)(in + 1);
    const struct fuse_read_in *read = (const void *)(in + 1);

    if (in->opcode == FUSE_WRITE)
        return Py_BuildValue("KKLy#", (unsigned long long)in->unique,
                             (unsigned long long)out->fh, (long long)out->offset,
                             (const char *)(out + 1), (Py_ssize_t)out->size);
    return Py_BuildValue("KKLIO", (unsigned long long)in->unique, (unsigned long long)read->fh,
                         (long long)read->offset, (unsigned)read->size,
                         read->read_flags & FUSE_READ_LOCKOWNER ? Py_True : Py_False);
}

static PyObject *kept_requests(uint32_t opcode)
{
    PyObject *list = PyList_New(0);

    for (int i = 0; list && i < drain.kept_count; i++) {
        const struct fuse_in_header *in = drain.kept[i].request;
        PyObject *item;
        if (in->opcode != opcode)
            continue;
        item = kept_request(in);
        if (!item || PyList_Append(list, item))
            Py_CLEAR(list);
        Py_XDECREF(item);
    }
    return list;
}

/* After a bug nobody knows of the copies: they must not read what is written from now on.  And
 * nobody must wait for ever. */
static void give_up(int device)
{
    Py_BEGIN_ALLOW_THREADS
    pool_settle();
    Py_END_ALLOW_THREADS
    for (int i = 0; i < drain.kept_count; i++)
        carry_reply(device, ((const struct fuse_in_header *)drain.kept[i].request)->unique, EIO,
                    NULL, 0);
}

bool waiting_finish(int device, PyObject *finisher)
{
    PyObject *copies, *writes, *reads, *result = NULL;

    if (!waiting_is_busy())
        return true;
    copies = handed_copies();
    writes = copies ? kept_requests(FUSE_WRITE) : NULL;
    reads = writes ? kept_requests(FUSE_READ) : NULL;
    if (reads)
        result = PyObject_CallFunction(
            finisher, "KKKKOOO", (unsigned long long)drain.lent, drain.written, drain.clusters,
            drain.nanoseconds, copies, writes, reads);
    if (!result)
        give_up(device);
    Py_XDECREF(result);
    Py_XDECREF(copies);
    Py_XDECREF(writes);
    Py_XDECREF(reads);
    while (drain.kept_count)
        drop_kept(drain.kept_count - 1);
    memset(&drain, 0, sizeof(drain));
    return result != NULL;
}

bool waiting_is_busy(void)
{
    return drain.lent || drain.handed_count || drain.kept_count;
}

/* ---- for the Python module ------------------------------------------------------------- */

void waiting_set_lender(PyObject *callable)
{
    PyObject *previous = lender;

    lender = Py_XNewRef(callable);
    Py_XDECREF(previous);
}

int waiting_traverse(visitproc visit, void *arg)
{
    Py_VISIT(lender);
    return 0;
}

unsigned long long waiting_cold_count(void)
{
    return cold_kept;
}

PyObject *waiting_ended_copies(PyObject *module, PyObject *unused)
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

PyObject *waiting_copies_fd(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyLong_FromLong(pool_descriptor());
}
