/* The fast path of the request filter: what requestfilter.c calls.
 *
 * All of it runs in the trio thread.  Functions with `with the GIL` are called holding it,
 * the others without.
 */
#ifndef SNAPFS_FASTPATH_H
#define SNAPFS_FASTPATH_H

#include "transfer.h"

/* A READ or WRITE that may be answered here?  Looks at the kind only. */
INTERNAL bool fastpath_wants(const void *request, size_t size);

/* Is there somebody to ask for the engine's state?  With the GIL, or in the trio thread. */
INTERNAL bool fastpath_is_on(void);

/* Ask for the engine's state, which stays as it is until fastpath_end(): only the trio
 * thread changes it, and that is here.  Returns false if there is none to be had; the
 * request then is Python's.  With the GIL. */
INTERNAL bool fastpath_begin(void);

/* Answer one request, of `size` bytes as they were read from `device`.  After
 * fastpath_begin().  `buffer`: where it is, if that can be taken (buffer_take()), else NULL. */
INTERNAL enum fastpath_verdict fastpath_answer(int device, const void *request, size_t size,
                                               void **buffer);

/* The same for one that was kept: what is it now?  FASTPATH_KEPT: it waits on, and `cold` says
 * whether for data. */
INTERNAL enum fastpath_verdict fastpath_consider(int device, const void *request, size_t size,
                                                 void **buffer, bool *cold);

/* Wait for what is being carried by the helper.  A WRITE that failed is kept for Python. */
INTERNAL void fastpath_collect(void);

/* May the filter wait a moment for the next request?  Not while Python has work. */
INTERNAL bool fastpath_may_linger(void);

/* How long one drain may keep the trio thread, in nanoseconds. */
INTERNAL long long fastpath_patience(void);

/* Let go of the engine's state; then tell Python what was copied, and what it takes over.  With
 * the GIL. */
INTERNAL void fastpath_end(int device);

/* The session is gone: no handle is valid.  With the GIL. */
INTERNAL void fastpath_forget(void);

/* At the end of the module's life, and after a bug: everything is Python's.  With the GIL. */
INTERNAL int fastpath_traverse(visitproc visit, void *arg);
INTERNAL void fastpath_clear(void);

/* Functions of the module. */
INTERNAL PyObject *fastpath_set(PyObject *module, PyObject *args);
INTERNAL PyObject *fastpath_handle_opened(PyObject *module, PyObject *args);
INTERNAL PyObject *fastpath_handle_closed(PyObject *module, PyObject *number);
INTERNAL PyObject *fastpath_try(PyObject *module, PyObject *args);
INTERNAL PyObject *fastpath_statistics(PyObject *module, PyObject *unused);

#endif
