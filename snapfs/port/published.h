/* The engine's state during one drain of /dev/fuse, as fastpath.py publishes it.
 *
 * It changes in the trio thread only, and a drain runs in the trio thread: nothing changes
 * during one, though the GIL is released.  The buffers are held from published_load() to
 * published_unload() and no longer, so that a bitmap can grow, and a mapping be closed, whenever
 * Python runs.
 */
#ifndef SNAPFS_PUBLISHED_H
#define SNAPFS_PUBLISHED_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "clock.h"

#include <stdbool.h>
#include <stdint.h>

/* Not for the global scope that the extension is loaded into. */
#define INTERNAL __attribute__((visibility("hidden")))

enum published_limits {
    /* fastpath.py publishes nothing if there are more. */
    MAX_LAYERS = 256,
    MAX_BITMAPS = 256,
    MAX_RANGES = 256,
    MAX_SYSTEMS = 8, /* more are not asked here, but by Python now and then */
};

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
    int watch; /* a description of temp that is asked after reading for a snapshot; -1: none is */
    bool readable, live;
    Py_buffer access, done;
};

/* A file system that counts its errors (storage/systemerrors.py). */
struct file_system {
    int fd; /* of the count */
    long long first; /* what it was */
};

/* Of the receiver. */
struct done_file {
    bool durable;   /* must its copies survive a power cut?  Else the rest is nothing */
    int fd;
    Py_buffer bits; /* of the mapped file: what is set there may be on the disk at any moment */
};

struct state {
    bool loaded;
    bool writable;   /* writes may pass: no snapshot is being created, not read-only */
    bool dirty_durable; /* the bits of a write must be: those that are set are, if nothing is
                         * promised there */
    bool busy;       /* a task of Python's is in a handler */
    bool suspect;    /* something could not be written back, and Python has not been told: nothing
                      * is read for a snapshot */
    int image;
    int watch;       /* of the image, as above */
    unsigned shift;  /* log2 of the cluster size */
    uint64_t size;   /* of the image */
    Py_buffer pending;
    Py_buffer activity;
    Py_buffer failures;        /* of mapped pages, in the process (mappings.c): one uint64_t */
    uint64_t failures_known;   /* those that this state takes into account */
    struct ranges frozen, copying; /* snapshot reads of the image, and copies, of Python's */
    struct ranges promised;        /* bits have changed, and are not durable yet: as above */
    struct layer layers[MAX_LAYERS]; /* oldest first */
    Py_buffer dirty[MAX_BITMAPS];
    int layer_count, dirty_count;
    struct file_system systems[MAX_SYSTEMS];
    int system_count;
    int receiver; /* index of the newest live layer, -1: none */
    struct done_file done_file;
};

extern INTERNAL struct state state;

/* Take over what was published.  False, with an exception set, if it is not what it must be;
 * published_unload() is due all the same.  With the GIL. */
INTERNAL bool published_load(PyObject *published);

/* Let go of it.  With the GIL. */
INTERNAL void published_unload(void);

/* Is every bit that has been read, and set, what it was to be?  To be asked before acting on bits:
 * a mapped page may have failed meanwhile. */
INTERNAL bool published_is_sound(void);

/* A write inside the image begins: the record of activity (activity.py) says so. */
INTERNAL void published_note_write(void);

/* The record of activity is to say that nothing is under way, if that is so. */
INTERNAL void published_rest(void);

/* activity_words() -> dict: the index of each word of the record, by name. */
INTERNAL PyObject *published_activity_words(PyObject *module, PyObject *unused);

/* ---- bits: cluster c is bit c & 7 of byte c >> 3 ---------------------------------------- */

static inline bool bit(const Py_buffer *bits, uint64_t index)
{
    return ((const uint8_t *)bits->buf)[index >> 3] >> (index & 7) & 1;
}

static inline bool any_set(const Py_buffer *bits, uint64_t first, uint64_t stop)
{
    for (; first < stop; first++)
        if (bit(bits, first))
            return true;
    return false;
}

static inline bool all_set(const Py_buffer *bits, uint64_t first, uint64_t stop)
{
    for (; first < stop; first++)
        if (!bit(bits, first))
            return false;
    return true;
}

static inline void set_bits(const Py_buffer *bits, uint64_t first, uint64_t stop)
{
    for (; first < stop; first++)
        if (!bit(bits, first)) /* a clean page of the mapping stays clean */
            ((uint8_t *)bits->buf)[first >> 3] |= (uint8_t)(1u << (first & 7));
}

static inline void clear_bits(const Py_buffer *bits, uint64_t first, uint64_t stop)
{
    for (; first < stop; first++)
        ((uint8_t *)bits->buf)[first >> 3] &= (uint8_t)~(1u << (first & 7));
}

/* Has it room for so many bits? */
static inline bool holds(const Py_buffer *bits, uint64_t count)
{
    return (uint64_t)bits->len >= (count + 7) / 8;
}

static inline uint64_t clusters_of(uint64_t size)
{
    return (size >> state.shift) + ((size & ((1ULL << state.shift) - 1)) != 0);
}

static inline bool overlaps(const struct ranges *ranges, uint64_t first, uint64_t stop)
{
    for (int i = 0; i < ranges->count; i++)
        if (ranges->items[i].first < stop && first < ranges->items[i].stop)
            return true;
    return false;
}

#endif
