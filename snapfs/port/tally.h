/* What is counted for pictures and metrics: where snapshots are read, and how long copies take.
 *
 * All of it in the trio thread.
 */
#ifndef SNAPFS_TALLY_H
#define SNAPFS_TALLY_H

#include "published.h"

/* A snapshot was read there.  During a drain. */
INTERNAL void tally_read(uint64_t offset, size_t length);

/* A copy has landed that took so long. */
INTERNAL void tally_copy(long long nanoseconds);

/* Functions of the module. */
INTERNAL PyObject *tally_region_reads(PyObject *module, PyObject *unused);
INTERNAL PyObject *tally_copy_times(PyObject *module, PyObject *unused);

#endif
