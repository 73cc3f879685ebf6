/* Requests that wait within a drain: writes for copies of old data, any for data from the disk.
 *
 * Trio thread.  Functions with `with the GIL` are called holding it, the others without.
 */
#ifndef SNAPFS_WAITING_H
#define SNAPFS_WAITING_H

#include "published.h"

#include <stddef.h>

/* See to it that the pending clusters of the range are being copied.  Returns false if the
 * engine has to; what has begun goes on. */
INTERNAL bool waiting_preserve(uint64_t first, uint64_t stop);

/* Keep a request; `cold`: for data; `buffer`: where it is, if that can be taken, else NULL.  False
 * if there is no room, or no use. */
INTERNAL bool waiting_keep(const void *request, size_t size, void **buffer, bool cold);

/* Keep one for Python, in its buffer, which is taken.  One in a drain, there is room for no more. */
INTERNAL void waiting_refuse(void *buffer, size_t size);
INTERNAL bool waiting_has_refused(void);

/* Go on with the writes if copies have ended. */
INTERNAL void waiting_progress(int device);

/* Wait for a copy to end, data to come, or a request, and go on with what is kept.  Returns
 * false when nothing is, or the time is over. */
INTERNAL bool waiting_wait(int device, long long nanoseconds);

/* The drain ends: give copies and cold requests a moment, if `patient`; what is left becomes
 * the engine's. */
INTERNAL void waiting_settle(int device, bool patient);

/* Tell `finisher` what was copied, and what it takes over.  False, with an exception set, if it
 * did not; then everything has been answered.  With the GIL. */
INTERNAL bool waiting_finish(int device, PyObject *finisher);

/* Whom to ask for temp space; NULL: nobody.  With the GIL. */
INTERNAL void waiting_set_lender(PyObject *lender);

INTERNAL int waiting_traverse(visitproc visit, void *arg);

/* Is there anything of a drain that has not been finished? */
INTERNAL bool waiting_is_busy(void);

/* How many requests have been kept for their data. */
INTERNAL unsigned long long waiting_cold_count(void);

#endif
