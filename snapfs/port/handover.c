/* See handover.h. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "handover.h"

#include <linux/fuse.h>

/* ---- at the end of a drain --------------------------------------------------------------- */

static PyObject *promises_of(const struct handover *left)
{
    PyObject *list = PyList_New(left->promise_count);

    for (int i = 0; list && i < left->promise_count; i++) {
        PyObject *item = Py_BuildValue("KK", (unsigned long long)left->promises[i].first,
                                       (unsigned long long)left->promises[i].stop);
        if (!item)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, item);
    }
    return list;
}

static PyObject *copies_of(const struct handover *left)
{
    PyObject *list = PyList_New(left->copy_count);

    for (int i = 0; list && i < left->copy_count; i++) {
        PyObject *item = Py_BuildValue("KKK", (unsigned long long)left->numbers[i],
                                       (unsigned long long)left->copies[i].first,
                                       (unsigned long long)left->copies[i].stop);
        if (!item)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, item);
    }
    return list;
}

static PyObject *request_of(const struct fuse_in_header *in)
{
    const struct fuse_write_in *out = (const void *)(in + 1);
    const struct fuse_read_in *read = (const void *)(in + 1);

    if (in->opcode == FUSE_WRITE)
        return Py_BuildValue("KKLy#", (unsigned long long)in->unique,
                             (unsigned long long)out->fh, (long long)out->offset,
                             (const char *)(out + 1), (Py_ssize_t)out->size);
    return Py_BuildValue("KKLIO", (unsigned long long)in->unique, (unsigned long long)read->fh,
                         (long long)read->offset, (unsigned)read->size,
                         read->read_flags & FUSE_READ_LOCKOWNER ? Py_True : Py_False);
}

static PyObject *requests_of(const struct handover *left, uint32_t opcode)
{
    PyObject *list = PyList_New(0);

    for (int i = 0; list && i < left->kept_count; i++) {
        const struct fuse_in_header *in = left->kept[i].request;
        PyObject *item;
        if (in->opcode != opcode)
            continue;
        item = request_of(in);
        if (!item || PyList_Append(list, item))
            Py_CLEAR(list);
        Py_XDECREF(item);
    }
    return list;
}

PyObject *handover_tell(const struct handover *left, PyObject *finisher)
{
    PyObject *promises = promises_of(left);
    PyObject *copies = promises ? copies_of(left) : NULL;
    PyObject *writes = copies ? requests_of(left, FUSE_WRITE) : NULL;
    PyObject *reads = writes ? requests_of(left, FUSE_READ) : NULL;
    PyObject *result = NULL;

    if (reads)
        result = PyObject_CallFunction(
            finisher, "KKKKOOOO", (unsigned long long)left->lent, left->written, left->clusters,
            left->nanoseconds, promises, copies, writes, reads);
    Py_XDECREF(promises);
    Py_XDECREF(copies);
    Py_XDECREF(writes);
    Py_XDECREF(reads);
    return result;
}

/* ---- after it: copies that are Python's -------------------------------------------------- */

PyObject *handover_ended_copies(PyObject *module, PyObject *unused)
{
    PyObject *list = PyList_New(0);
    struct copy *copy;
    (void)module, (void)unused;

    if (list && pool_descriptor() >= 0)
        pool_clear(); /* first: one that ends after we looked makes it readable again */
    while (list && (copy = pool_ended(true))) {
        PyObject *item = Py_BuildValue("KiLL", (unsigned long long)copy->number, copy->error,
                                       (long long)copy->work.written, copy->nanoseconds);
        if (!item || PyList_Append(list, item)) {
            Py_XDECREF(item);
            Py_CLEAR(list);
            break;
        }
        Py_DECREF(item);
        pool_free(copy);
    }
    return list;
}

PyObject *handover_copies_fd(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyLong_FromLong(pool_descriptor());
}
