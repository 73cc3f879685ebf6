/* See waiting.h.
 *
 * Copies.  Within a drain they are ours: as nothing else changes meanwhile, landing one means
 * to set done and to clear pending, which is all that LayerStack.settle() would do for a
 * cluster that was pending until then.  What is not landed at the end of the drain, because it
 * failed or takes long, is handed to the engine with the writes that wait for it, and nothing
 * is copied here before the engine has dealt with that.  So timeouts, failures and their
 * policy are Python's.
 *
 * Copies that must survive a power cut.  For those to land means to set done in the mapped file,
 * too; their clusters stay closed to writes until a sync of that file, which syncing.c makes,
 * has succeeded.  What is not durable at the end of the drain is a promise of the engine's
 * (durability.py), which syncs it once more.
 *
 * Cold data.  A READ, or a WRITE of a part of a page, that has found a page missing is tried
 * again, by all the rules, until the data is there; after 2 ms it is Python's, and so are cold
 * requests for a while, since that disk is slow.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "waiting.h"
#include "buffers.h"
#include "fastpath.h"
#include "handover.h"
#include "syncing.h"
#include "tally.h"

#include <errno.h>
#include <linux/fuse.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    /* The kernel sends no more than max_background requests at once, and one for each thread that
     * writes synchronously. */
    MAX_KEPT_BYTES = 16 << 20,
    /* Bytes of one copy, if a cluster is not more: a large write uses both threads. */
    COPY_BYTES = 256 << 10,
    LOAN = 16 << 20, /* bytes of temp space to ask for at a time */
    LEAST_TAKEN = 64 << 10, /* a request as large as that is kept where it is, not copied */
};

/* For copies to end after the drain has; then they are the engine's.  Long for a page cache, and
 * what a disk that hangs costs the others once: nothing is copied here until it is over. */
#define SETTLE_TIME (10 * SECOND / 1000)
/* How long not to copy what must survive a power cut after a disk did not sync it in that time,
 * and twice as long each time it happens again: the engine waits for slow disks better. */
#define LEAST_PAUSE (SETTLE_TIME)
#define MOST_PAUSE (SECOND / 2)
/* For data to come from the disk after the drain has ended, how often to look, and how long
 * not to wait for any after some did not come. */
#define COLD_TIME (2 * SECOND / 1000)
#define COLD_NAP (30 * SECOND / 1000000)
#define COLD_PAUSE (SECOND / 2)

static PyObject *lender;
static long long cold_until; /* cold requests go to Python before this time */
static long long slow_until; /* and copies that must survive a power cut before this */
static long long slow_pause; /* the last one, 0: the disk was fast since */
static unsigned long long cold_kept;

/* Of the drain that is under way. */
static struct {
    struct handover left; /* for Python, as things are */
    int cold_count;       /* of kept */
    size_t kept_bytes;
    bool failed;      /* a copy or a sync has: no more copies here */
    bool refused;     /* something was: nothing more is carried aside */
    uint64_t claimed; /* of what is lent: by copies, those that have landed included */
} drain;

/* ---- step 1 of a write: copying -------------------------------------------------------- */

/* May copies take that many bytes of temp space more? */
static bool claim(uint64_t bytes)
{
    if (drain.left.lent - drain.claimed < bytes) {
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
        drain.left.lent += granted;
        if (drain.left.lent - drain.claimed < bytes)
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

/* Can what is copied now be made durable here, if it must be? */
static bool can_sync(void)
{
    return !state.done_file.durable ||
           (nanoseconds(CLOCK_MONOTONIC) >= slow_until && sync_open(state.done_file.fd));
}

bool waiting_preserve(uint64_t first, uint64_t stop)
{
    const struct layer *receiver;
    uint64_t cluster_size = 1ULL << state.shift, count = 0, position, end;
    uint64_t most = cluster_size < COPY_BYTES ? (uint64_t)COPY_BYTES >> state.shift : 1;

    if (state.receiver < 0 || drain.failed || pool_count(true))
        return false;
    receiver = &state.layers[state.receiver];
    if (stop > receiver->clusters || overlaps(&state.copying, first, stop) || !can_sync())
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
        if (!pool_start(position, end, &work, state.done_file.durable))
            return false;
    }
    return true;
}

static void hand_over(struct copy *copy)
{
    drain.left.copies[drain.left.copy_count] = (struct range){copy->first, copy->stop};
    drain.left.numbers[drain.left.copy_count++] = copy->number;
    pool_hand_over(copy);
}

/* A promise of ours becomes Python's.  Our sync may have failed, or may yet, and then the kernel
 * takes the pages for clean, and may have dropped them: they are written again for Python's. */
static void hand_over_promise(struct copy *copy)
{
    volatile uint8_t *bytes = state.done_file.bits.buf;
    const uint8_t *done = state.layers[state.receiver].done.buf;

    for (uint64_t i = copy->first >> 3; i <= (copy->stop - 1) >> 3; i++)
        bytes[i] = bytes[i] | done[i];
    drain.left.promises[drain.left.promise_count++] = (struct range){copy->first, copy->stop};
    pool_free(copy);
}

static void hand_over_promises(void)
{
    for (struct copy *copy; (copy = pool_any(true));)
        hand_over_promise(copy);
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
        if (copy->durable)
            set_bits(&state.done_file.bits, copy->first, copy->stop);
        clear_bits(&state.pending, copy->first, copy->stop);
        drain.left.clusters += copy->stop - copy->first;
        drain.left.written += (unsigned long long)copy->work.written;
        drain.left.nanoseconds += (unsigned long long)copy->nanoseconds;
        tally_copy(copy->nanoseconds);
        if (copy->durable)
            pool_promise(copy);
        else
            pool_free(copy);
    }
}

/* See to it that the done bits of what has landed become durable: those that were set when a
 * sync began are when it has succeeded, the others get the next one. */
static void keep_promises(void)
{
    enum sync_state found = sync_look();

    if (found == SYNC_UNDER_WAY)
        return;
    if (found == SYNC_GOOD)
        pool_keep_promises();
    if (found == SYNC_FAILED) {
        drain.failed = true;
        state.writable = false; /* what is promised is Python's; it does not take long */
    }
    if (!state.writable)
        hand_over_promises();
    else if (pool_cover())
        sync_begin();
}

/* ---- keeping requests ------------------------------------------------------------------ */

static void add_kept(struct kept kept)
{
    drain.left.kept[drain.left.kept_count++] = kept;
    drain.kept_bytes += kept.size;
    drain.cold_count += kept.cold;
}

bool waiting_keep(const void *request, size_t size, void **buffer, bool cold)
{
    bool taken = buffer && size >= LEAST_TAKEN;
    void *memory;

    /* With copies of Python's under way a wait would end at once, again and again. */
    if (cold && (pool_count(true) || nanoseconds(CLOCK_MONOTONIC) < cold_until))
        return false;
    if (drain.left.kept_count >= MAX_KEPT || drain.kept_bytes + size > MAX_KEPT_BYTES)
        return false;
    memory = taken ? buffer_take(buffer) : malloc(size);
    if (!memory)
        return false;
    if (!taken)
        memcpy(memory, request, size);
    add_kept((struct kept){.request = memory, .size = size, .cold = cold, .taken = taken});
    cold_kept += cold;
    return true;
}

void waiting_refuse(void *buffer, size_t size)
{
    drain.refused = true;
    add_kept((struct kept){.request = buffer, .size = size, .refused = true, .taken = true});
}

static void drop_kept(int index)
{
    drain.kept_bytes -= drain.left.kept[index].size;
    drain.cold_count -= drain.left.kept[index].cold;
    if (drain.left.kept[index].taken)
        buffer_free(drain.left.kept[index].request);
    else
        free(drain.left.kept[index].request);
    drain.left.kept_count--;
    memmove(&drain.left.kept[index], &drain.left.kept[index + 1],
            (size_t)(drain.left.kept_count - index) * sizeof(drain.left.kept[0]));
}

/* Go through the kept requests. */
static void try_again(int device)
{
    for (int i = 0; i < drain.left.kept_count;) {
        struct kept *kept = &drain.left.kept[i];
        enum fastpath_verdict verdict = FASTPATH_PYTHONS;
        bool cold = false;
        if (!kept->refused)
            verdict = fastpath_consider(device, kept->request, kept->size, NULL, &cold);
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

/* Is there something to go on with? */
static bool has_ended(void)
{
    return pool_has_ended() || sync_has_ended();
}

void waiting_progress(int device)
{
    if (pool_count(false) && has_ended()) {
        land();
        keep_promises();
        try_again(device);
    }
}

bool waiting_wait(int device, long long time)
{
    bool cold = drain.cold_count > 0;

    if ((!pool_count(false) && !cold) || time <= 0)
        return false;
    if (!has_ended() && !pool_wait(device, cold && time > COLD_NAP ? COLD_NAP : time) && !cold)
        return false;
    waiting_progress(device);
    if (drain.cold_count)
        try_again(device);
    return true;
}

/* ---- the end of the drain -------------------------------------------------------------- */

/* Has the disk been so slow that something is left? */
static void note_speed(bool slow)
{
    if (!slow) {
        slow_pause = drain.left.clusters ? 0 : slow_pause;
        return;
    }
    slow_pause = slow_pause ? 2 * slow_pause : LEAST_PAUSE;
    if (slow_pause > MOST_PAUSE)
        slow_pause = MOST_PAUSE;
    slow_until = nanoseconds(CLOCK_MONOTONIC) + slow_pause;
}

void waiting_settle(int device, bool patient)
{
    long long started = nanoseconds(CLOCK_MONOTONIC);

    while (patient && (pool_count(false) || drain.cold_count)) {
        long long passed = nanoseconds(CLOCK_MONOTONIC) - started;
        if (passed > (pool_count(false) ? SETTLE_TIME : COLD_TIME))
            break;
        if (has_ended() || pool_wait(-1, drain.cold_count ? COLD_NAP : SETTLE_TIME - passed))
            waiting_progress(device);
        if (drain.cold_count)
            try_again(device);
    }
    fastpath_collect(); /* not before: a READ that was cold may have begun to be sent */
    if (patient && drain.cold_count)
        cold_until = nanoseconds(CLOCK_MONOTONIC) + COLD_PAUSE;
    if (patient && state.done_file.durable)
        note_speed(pool_count(false) > 0);
    hand_over_promises();
    for (struct copy *copy; (copy = pool_any(false));)
        hand_over(copy);
    sync_close();
}

/* After a bug nobody knows of the copies: they must not read what is written from now on, nor
 * of what is promised.  And nobody must wait for ever. */
static void give_up(int device)
{
    Py_BEGIN_ALLOW_THREADS
    pool_settle();
    if (drain.left.promise_count && fdatasync(state.done_file.fd))
        abort(); /* to go on might make a snapshot wrong; the next mount goes on without loss */
    Py_END_ALLOW_THREADS
    for (int i = 0; i < drain.left.kept_count; i++) {
        const struct fuse_in_header *in = drain.left.kept[i].request;
        transfer_reply(device, in->unique, EIO, NULL, 0);
    }
}

bool waiting_finish(int device, PyObject *finisher)
{
    PyObject *result;

    if (!waiting_is_busy())
        return true;
    result = handover_tell(&drain.left, finisher);
    if (!result)
        give_up(device);
    Py_XDECREF(result);
    while (drain.left.kept_count)
        drop_kept(drain.left.kept_count - 1);
    memset(&drain, 0, sizeof(drain));
    return result != NULL;
}

bool waiting_has_refused(void)
{
    return drain.refused;
}

bool waiting_is_busy(void)
{
    const struct handover *left = &drain.left;

    return left->lent || left->promise_count || left->copy_count || left->kept_count;
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
