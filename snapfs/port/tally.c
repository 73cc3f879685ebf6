/* What is counted for pictures and metrics: see tally.h. */
#include "tally.h"

#include <string.h>

enum {
    REGIONS = 2048, /* of the image, at most; regions.py has the number, too */
};

/* Nanoseconds, ascending; copytimes.py has the numbers, too. */
static const long long bounds[] = {
    100000,    300000,    1000000,    3000000,    10000000,   30000000,
    100000000, 300000000, 1000000000, 3000000000, 10000000000,
};

enum { BOUNDS = sizeof(bounds) / sizeof(*bounds) };

static struct {
    unsigned shift; /* log2 of the size of a region; 0: none was read yet */
    uint32_t reads[REGIONS];
} regions;

static unsigned long long copies[BOUNDS + 1]; /* that took up to each, and longer */

/* As in regions.py: the smallest regions that are not too many. */
static unsigned region_shift(void)
{
    unsigned shift = state.shift;

    while (state.size > (uint64_t)REGIONS << shift)
        shift++;
    return shift;
}

void tally_read(uint64_t offset, size_t length)
{
    const unsigned shift = region_shift();

    if (!length)
        return;
    if (shift != regions.shift) {
        memset(&regions, 0, sizeof(regions));
        regions.shift = shift;
    }
    for (uint64_t region = offset >> shift;
         region <= (offset + length - 1) >> shift && region < REGIONS; region++)
        regions.reads[region]++;
}

void tally_copy(long long nanoseconds)
{
    int index = 0;

    while (index < BOUNDS && nanoseconds > bounds[index])
        index++;
    copies[index]++;
}

PyObject *tally_region_reads(PyObject *module, PyObject *unused)
{
    PyObject *reads = PyList_New(REGIONS);
    (void)module, (void)unused;

    for (int i = 0; reads && i < REGIONS; i++) {
        PyObject *count = PyLong_FromUnsignedLong(regions.reads[i]);
        if (count)
            PyList_SET_ITEM(reads, i, count);
        else
            Py_CLEAR(reads);
    }
    return reads ? Py_BuildValue("(KN)", regions.shift ? 1ULL << regions.shift : 0ULL, reads) : NULL;
}

PyObject *tally_copy_times(PyObject *module, PyObject *unused)
{
    PyObject *times = PyList_New(BOUNDS + 1);
    (void)module, (void)unused;

    for (int i = 0; times && i <= BOUNDS; i++) {
        PyObject *count = PyLong_FromUnsignedLongLong(copies[i]);
        if (count)
            PyList_SET_ITEM(times, i, count);
        else
            Py_CLEAR(times);
    }
    return times;
}
