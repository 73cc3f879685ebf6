/* See published.h. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "published.h"

#include <stddef.h>
#include <sys/stat.h>

struct state state;

static bool recorded; /* we have set under_way, and must clear it */

static bool refuse(const char *what)
{
    PyErr_Format(PyExc_ValueError, "the engine's state is not what the fast path expects: %s",
                 what);
    return false;
}

static bool load_ranges(struct ranges *into, PyObject *ranges)
{
    if (!PyList_Check(ranges) || PyList_GET_SIZE(ranges) > MAX_RANGES)
        return refuse("ranges in flight");
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(ranges); i++) {
        unsigned long long first, stop;
        if (!PyArg_ParseTuple(PyList_GET_ITEM(ranges, i), "KK", &first, &stop))
            return false;
        into->items[into->count++] = (struct range){first, stop};
    }
    return true;
}

static bool load_dirty(PyObject *bitmaps)
{
    if (!PyList_Check(bitmaps) || PyList_GET_SIZE(bitmaps) > MAX_BITMAPS)
        return refuse("dirty bitmaps");
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
    if (!PyList_Check(layers) || PyList_GET_SIZE(layers) > MAX_LAYERS)
        return refuse("layers");
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(layers); i++) {
        struct layer *layer = &state.layers[state.layer_count];
        unsigned long long inode, size;
        int readable, live;
        if (!PyArg_ParseTuple(PyList_GET_ITEM(layers, i), "KKiippw*w*", &inode, &size,
                              &layer->temp, &layer->watch, &readable, &live, &layer->access,
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
            !holds(&layer->done, layer->clusters))
            return refuse("a layer");
    }
    return true;
}

static bool load_systems(PyObject *systems)
{
    if (!PyList_Check(systems))
        return refuse("file systems");
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(systems) && i < MAX_SYSTEMS; i++) {
        struct file_system *found = &state.systems[state.system_count++];
        if (!PyArg_ParseTuple(PyList_GET_ITEM(systems, i), "iL", &found->fd, &found->first))
            return false;
    }
    return true;
}

static bool load_done_file(PyObject *published)
{
    struct done_file *file = &state.done_file;

    if (published == Py_None)
        return true;
    if (!PyTuple_Check(published))
        return refuse("the file of done bits");
    if (!PyArg_ParseTuple(published, "iw*", &file->fd, &file->bits))
        return false;
    file->durable = true;
    if (file->fd < 0 || state.receiver < 0 ||
        !holds(&file->bits, state.layers[state.receiver].clusters))
        return refuse("the file of done bits");
    return true;
}

/* The record of activity, in the mapped page; what it means is at the head of activity.py. */
struct activity {
    int64_t magic, session, under_way, size, mtime, ctime, alive, failed;
};

/* For a test, which compares it with activitywords.py. */
PyObject *published_activity_words(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
#define WORD(member) #member, (int)(offsetof(struct activity, member) / sizeof(int64_t))
    return Py_BuildValue("{sisisisisisisisi}", WORD(magic), WORD(session), WORD(under_way),
                         WORD(size), WORD(mtime), WORD(ctime), WORD(alive), WORD(failed));
#undef WORD
}

bool published_load(PyObject *published)
{
    PyObject *dirty, *frozen, *copying, *promised, *layers, *done_file, *systems;
    unsigned long long size, failures;
    int writable, busy, dirty_durable;

    if (!PyTuple_Check(published))
        return refuse("not a tuple");
    if (!PyArg_ParseTuple(published, "iiKIppOpOOOOOw*w*y*KO", &state.image, &state.watch, &size,
                          &state.shift, &writable, &busy, &dirty, &dirty_durable, &frozen, &copying, &promised,
                          &layers, &done_file, &state.pending, &state.activity, &state.failures,
                          &failures, &systems))
        return false;
    state.loaded = true; /* from here on published_unload() releases the buffers */
    state.receiver = -1;
    state.size = size;
    state.failures_known = failures;
    state.writable = writable;
    state.busy = busy;
    state.dirty_durable = dirty_durable;
    if (state.image < 0 || size > INT64_MAX || state.shift < 12 || state.shift > 22 ||
        !holds(&state.pending, clusters_of(size)) ||
        state.activity.len < (Py_ssize_t)sizeof(struct activity) ||
        (uintptr_t)state.activity.buf % _Alignof(struct activity) ||
        state.failures.len != (Py_ssize_t)sizeof(uint64_t) ||
        (uintptr_t)state.failures.buf % _Alignof(uint64_t))
        return refuse("the image");
    return load_ranges(&state.frozen, frozen) && load_ranges(&state.copying, copying) &&
           load_ranges(&state.promised, promised) && load_dirty(dirty) && load_layers(layers) &&
           load_done_file(done_file) && load_systems(systems);
}

void published_unload(void)
{
    if (!state.loaded)
        return;
    for (int i = 0; i < state.layer_count; i++) {
        PyBuffer_Release(&state.layers[i].access);
        PyBuffer_Release(&state.layers[i].done);
    }
    for (int i = 0; i < state.dirty_count; i++)
        PyBuffer_Release(&state.dirty[i]);
    if (state.done_file.durable)
        PyBuffer_Release(&state.done_file.bits);
    state.done_file.durable = false;
    PyBuffer_Release(&state.pending);
    PyBuffer_Release(&state.activity);
    PyBuffer_Release(&state.failures);
    state.frozen.count = state.copying.count = state.promised.count = 0;
    state.layer_count = state.dirty_count = state.system_count = 0;
    state.loaded = false;
}

bool published_is_sound(void)
{
    return __atomic_load_n((const uint64_t *)state.failures.buf, __ATOMIC_SEQ_CST) ==
           state.failures_known;
}

/* ---- the record of activity: as Activity.started() and finished() ----------------------- */

/* Stores of 8 bytes in this order, for a process that is killed between two of them. */
#define STORE(member, value) __atomic_store_n(&(member), (value), __ATOMIC_RELEASE)

/* As storable() in activitywords.py: a file may have times that 64 bits do not hold. */
static int64_t storable(struct timespec time)
{
    const __int128 exact = (__int128)time.tv_sec * SECOND + time.tv_nsec;

    return exact < INT64_MIN ? INT64_MIN : exact > INT64_MAX ? INT64_MAX : (int64_t)exact;
}

/* A record of Python's, with something under way, stays Python's. */
void published_note_write(void)
{
    struct activity *record = state.activity.buf;

    if (!record->under_way) {
        STORE(record->under_way, 1);
        recorded = true;
    }
}

/* Once for all the writes of a drain since the last time: between them something is under
 * way, which is the safe thing to say. */
void published_rest(void)
{
    struct activity *record = state.activity.buf;
    struct stat status;

    if (!recorded || !state.loaded)
        return;
    recorded = false;
    if (fstat(state.image, &status))
        return; /* it stays under way until Python's next record */
    STORE(record->size, status.st_size);
    STORE(record->mtime, storable(status.st_mtim));
    STORE(record->ctime, storable(status.st_ctim));
    STORE(record->under_way, 0);
}
