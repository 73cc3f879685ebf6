/* What Python takes over from the fast path when a drain ends, and how it is told.
 *
 * With the GIL.
 */
#ifndef SNAPFS_HANDOVER_H
#define SNAPFS_HANDOVER_H

#include "copypool.h"
#include "published.h"

#include <stdbool.h>
#include <stddef.h>

enum { MAX_KEPT = 128 }; /* requests that wait */

/* What a drain leaves, and what it has done and the engine counts. */
struct handover {
    struct kept {
        void *request;
        size_t size;
        bool refused; /* the engine is to carry it out */
        bool cold;    /* waits for data */
        bool taken;   /* it is a buffer */
    } kept[MAX_KEPT + 1];             /* and one that was refused */
    struct range copies[POOL_SIZE];   /* that are Python's now, and their numbers */
    uint64_t numbers[POOL_SIZE];
    struct range promises[POOL_SIZE]; /* clusters whose done bits Python is to make durable */
    int kept_count, copy_count, promise_count;
    uint64_t lent; /* bytes of temp space that copies may have used */
    unsigned long long clusters, written, nanoseconds; /* of the copies that have landed */
};

/* Tell `finisher`.  What it returns; NULL with an exception set if it was not told, or failed. */
INTERNAL PyObject *handover_tell(const struct handover *left, PyObject *finisher);

/* Functions of the module. */
INTERNAL PyObject *handover_ended_copies(PyObject *module, PyObject *unused);
INTERNAL PyObject *handover_copies_fd(PyObject *module, PyObject *unused);

#endif
