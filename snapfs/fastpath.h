/* The fast path of the request filter: what requestfilter.c calls.
 *
 * All of it runs in the trio thread.  Functions with `with the GIL` are called holding it,
 * the others without.
 */
#ifndef SNAPFS_FASTPATH_H
#define SNAPFS_FASTPATH_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <stddef.h>

/* Not for the global scope that the extension is loaded into. */
#define INTERNAL __attribute__((visibility("hidden")))

enum fastpath_limits {
    /* The largest READ that is answered; larger ones do not occur (max_pages 256). */
    FASTPATH_MAX_READ = 1 << 20,
};

enum fastpath_verdict {
    FASTPATH_PYTHONS,  /* nothing was sent, and nothing changed but dirty bits */
    FASTPATH_ANSWERED,
    FASTPATH_KEPT,     /* it waits for copies or for data; it will be answered */
};

/* A READ or WRITE that may be answered here?  Looks at the kind only. */
INTERNAL bool fastpath_wants(const void *request, size_t size);

/* Is there somebody to ask for the engine's state?  With the GIL, or in the trio thread. */
INTERNAL bool fastpath_is_on(void);

/* Ask for the engine's state, which stays as it is until fastpath_end(): only the trio
 * thread changes it, and that is here.  Returns false if there is none to be had; the
 * request then is Python's.  With the GIL. */
INTERNAL bool fastpath_begin(void);

/* Answer one request, of `size` bytes as they were read from `device`.  After
 * fastpath_begin(). */
INTERNAL enum fastpath_verdict fastpath_answer(int device, const void *request, size_t size);

/* Go on with the writes if copies have ended. */
INTERNAL void fastpath_progress(int device);

/* Wait for a copy to end, data to come, or a request, and go on with what is kept.  Returns
 * false when nothing is, or the time is over. */
INTERNAL bool fastpath_wait(int device, long long nanoseconds);

/* The drain ends: give copies and cold requests a moment, if `patient`; what is left becomes
 * the engine's. */
INTERNAL void fastpath_settle(int device, bool patient);

/* May the filter wait a moment for the next request?  Not while Python has work. */
INTERNAL bool fastpath_may_linger(void);

/* A clock that only runs forward, in nanoseconds. */
INTERNAL long long fastpath_now(void);

/* How long one drain may keep the trio thread, in nanoseconds. */
INTERNAL long long fastpath_patience(void);

/* The record of activity is to say that nothing is under way, if that is so. */
INTERNAL void fastpath_rest(void);

/* Let go of the engine's state.  With the GIL. */
INTERNAL void fastpath_end(void);

/* After that: tell Python what was copied, and what it takes over.  With the GIL. */
INTERNAL void fastpath_finish(int device);

/* The session is gone: no handle is valid.  With the GIL. */
INTERNAL void fastpath_forget(void);

/* At the end of the module's life.  With the GIL. */
INTERNAL int fastpath_traverse(visitproc visit, void *arg);
INTERNAL void fastpath_clear(void);

/* Functions of the module. */
INTERNAL PyObject *fastpath_set(PyObject *module, PyObject *args);
INTERNAL PyObject *fastpath_ended_copies(PyObject *module, PyObject *unused);
INTERNAL PyObject *fastpath_copies_fd(PyObject *module, PyObject *unused);
INTERNAL PyObject *fastpath_handle_opened(PyObject *module, PyObject *args);
INTERNAL PyObject *fastpath_handle_closed(PyObject *module, PyObject *number);
INTERNAL PyObject *fastpath_try(PyObject *module, PyObject *args);
INTERNAL PyObject *fastpath_statistics(PyObject *module, PyObject *unused);

#endif
