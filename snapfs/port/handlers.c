/* Handlers that pyfuse3's table of operations lacks: FALLOCATE and LSEEK.
 *
 * They are called by libfuse and pass the request on to a Python function, which starts a
 * task; the task answers by number.  Everything here is under the GIL.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "requestfilter.h"

#include <errno.h>
#include <stdlib.h>

static PyObject *fallocate_handler; /* NULL: none set */
static PyObject *lseek_handler;     /* NULL: none set */

static struct {
    unsigned long long fallocates, lseeks; /* however received */
} counters;

/* What the operations table held before. */
static struct {
    void (*fallocate)(fuse_req_t, fuse_ino_t, int, off_t, off_t, struct fuse_file_info *);
    void (*lseek)(fuse_req_t, fuse_ino_t, off_t, int, struct fuse_file_info *);
} original;

/* ---- requests that Python has yet to answer ---------------------------------------- */

enum request_kind { REQUEST_FALLOCATE, REQUEST_LSEEK };

/* Python knows a request by a number that is never used twice, not by its address: malloc
 * gives the address of an answered request to the next one, and a second reply to the
 * first would then answer the wrong request. */
struct outstanding {
    unsigned long long token;
    fuse_req_t request;
    enum request_kind kind;
};

static struct outstanding *outstanding;
static size_t outstanding_count, outstanding_capacity;
static unsigned long long last_token;

/* Returns the token, or 0 if there is no memory. */
static unsigned long long remember_request(fuse_req_t request, enum request_kind kind)
{
    if (outstanding_count == outstanding_capacity) {
        size_t capacity = outstanding_capacity ? 2 * outstanding_capacity : 64;
        struct outstanding *grown = realloc(outstanding, capacity * sizeof(*grown));
        if (!grown)
            return 0;
        outstanding = grown;
        outstanding_capacity = capacity;
    }
    outstanding[outstanding_count++] = (struct outstanding){++last_token, request, kind};
    return last_token;
}

static struct outstanding *find_request(unsigned long long token)
{
    for (size_t i = 0; i < outstanding_count; i++)
        if (outstanding[i].token == token)
            return &outstanding[i];
    return NULL;
}

/* From here on the request must be answered by the caller; `entry` is invalid. */
static fuse_req_t take_request(struct outstanding *entry)
{
    fuse_req_t request = entry->request;
    *entry = outstanding[--outstanding_count];
    return request;
}

void handlers_forget(void)
{
    free(outstanding);
    outstanding = NULL;
    outstanding_count = outstanding_capacity = 0;
}

/* ---- handlers added to pyfuse3's table --------------------------------------------- */

/* `result` is what the handler returned, NULL if it raised.  A handler that raised after
 * it had replied has nothing left to be answered. */
static void finish_handler(PyObject *handler, PyObject *result, unsigned long long token)
{
    if (!result) {
        struct outstanding *entry;
        PyErr_WriteUnraisable(handler);
        entry = find_request(token);
        if (entry)
            fuse_reply_err(take_request(entry), EIO);
    }
    Py_XDECREF(result);
    Py_DECREF(handler);
}

static void on_fallocate(fuse_req_t request, fuse_ino_t ino, int mode, off_t offset,
                         off_t length, struct fuse_file_info *fi)
{
    PyGILState_STATE gil = PyGILState_Ensure();
    PyObject *handler = fallocate_handler;
    unsigned long long token;

    counters.fallocates++;
    if (!handler && original.fallocate) {
        original.fallocate(request, ino, mode, offset, length, fi);
    } else if (!handler) {
        fuse_reply_err(request, EOPNOTSUPP); /* ENOSYS would turn it off for good */
    } else if (!(token = remember_request(request, REQUEST_FALLOCATE))) {
        fuse_reply_err(request, ENOMEM);
    } else {
        Py_INCREF(handler); /* it may call set_handlers */
        finish_handler(handler,
                       PyObject_CallFunction(handler, "KKKiLL", token,
                                             (unsigned long long)ino,
                                             (unsigned long long)(fi ? fi->fh : 0), mode,
                                             (long long)offset, (long long)length),
                       token);
    }
    PyGILState_Release(gil);
}

static void on_lseek(fuse_req_t request, fuse_ino_t ino, off_t offset, int whence,
                     struct fuse_file_info *fi)
{
    PyGILState_STATE gil = PyGILState_Ensure();
    PyObject *handler = lseek_handler;
    unsigned long long token;

    counters.lseeks++;
    if (!handler && original.lseek) {
        original.lseek(request, ino, offset, whence, fi);
    } else if (!handler) {
        fuse_reply_err(request, EINVAL); /* ENOSYS would turn it off for good */
    } else if (!(token = remember_request(request, REQUEST_LSEEK))) {
        fuse_reply_err(request, ENOMEM);
    } else {
        Py_INCREF(handler); /* it may call set_handlers */
        finish_handler(handler,
                       PyObject_CallFunction(handler, "KKKLi", token,
                                             (unsigned long long)ino,
                                             (unsigned long long)(fi ? fi->fh : 0),
                                             (long long)offset, whence),
                       token);
    }
    PyGILState_Release(gil);
}

void handlers_install(struct fuse_lowlevel_ops *ops)
{
    original.fallocate = ops->fallocate;
    original.lseek = ops->lseek;
    ops->fallocate = on_fallocate;
    ops->lseek = on_lseek;
}

/* ---- for the Python module ------------------------------------------------------------- */

static void set_handler(PyObject **slot, PyObject *handler)
{
    PyObject *previous = *slot;

    *slot = handler == Py_None ? NULL : Py_NewRef(handler);
    Py_XDECREF(previous);
}

PyObject *handlers_set(PyObject *module, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"fallocate", "lseek", NULL};
    PyObject *fallocate = Py_None, *lseek = Py_None;
    (void)module;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|$OO:set_handlers", names, &fallocate,
                                     &lseek))
        return NULL;
    if ((fallocate != Py_None && !PyCallable_Check(fallocate)) ||
        (lseek != Py_None && !PyCallable_Check(lseek))) {
        PyErr_SetString(PyExc_TypeError, "a handler must be callable or None");
        return NULL;
    }
    set_handler(&fallocate_handler, fallocate);
    set_handler(&lseek_handler, lseek);
    Py_RETURN_NONE;
}

/* The entry of an outstanding request of that kind (any kind: -1), else ValueError. */
static struct outstanding *outstanding_of(PyObject *number, int kind)
{
    unsigned long long token = PyLong_AsUnsignedLongLong(number);
    struct outstanding *entry;

    if (token == (unsigned long long)-1 && PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_OverflowError))
            PyErr_Format(PyExc_ValueError, "request %R is not outstanding", number);
        return NULL;
    }
    entry = find_request(token);
    if (!entry)
        PyErr_Format(PyExc_ValueError, "request %R is not outstanding", number);
    else if (kind >= 0 && entry->kind != (enum request_kind)kind) {
        PyErr_Format(PyExc_ValueError, "request %R wants another kind of reply", number);
        return NULL;
    }
    return entry;
}

PyObject *handlers_reply_error(PyObject *module, PyObject *args)
{
    struct outstanding *entry;
    PyObject *number;
    int error;
    (void)module;

    if (!PyArg_ParseTuple(args, "Oi:reply_error", &number, &error))
        return NULL;
    entry = outstanding_of(number, -1);
    if (!entry)
        return NULL;
    if (error < 0 || error > MAX_ERRNO || (error == 0 && entry->kind == REQUEST_LSEEK)) {
        PyErr_Format(PyExc_ValueError, "errno %d cannot answer request %R", error, number);
        return NULL;
    }
    return filter_replied(fuse_reply_err(take_request(entry), error));
}

PyObject *handlers_reply_offset(PyObject *module, PyObject *args)
{
    struct outstanding *entry;
    PyObject *number;
    long long offset;
    (void)module;

    if (!PyArg_ParseTuple(args, "OL:reply_offset", &number, &offset))
        return NULL;
    entry = outstanding_of(number, REQUEST_LSEEK);
    if (!entry)
        return NULL;
    if (offset < 0) {
        PyErr_SetString(PyExc_ValueError, "offset must not be negative");
        return NULL;
    }
    return filter_replied(fuse_reply_lseek(take_request(entry), (off_t)offset));
}

int handlers_traverse(visitproc visit, void *arg)
{
    Py_VISIT(fallocate_handler);
    Py_VISIT(lseek_handler);
    return 0;
}

void handlers_clear(void)
{
    Py_CLEAR(fallocate_handler);
    Py_CLEAR(lseek_handler);
}

PyObject *handlers_statistics(void)
{
    return Py_BuildValue("{sKsKsK}", "fallocates", counters.fallocates, "lseeks", counters.lseeks,
                         "outstanding", (unsigned long long)outstanding_count);
}
