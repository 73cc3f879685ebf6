/* Copying clusters for Python (clusters.c has the loop).
 *
 * In C because a Python loop takes the GIL back after each system call, and
 * then waits for the event loop to let go of it: that, not the copying, was
 * nine tenths of the time of a first write.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "clusters.h"

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>

static PyObject *copy_clusters(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    struct cluster_copy copy = {0};
    size_t step;
    char *buffer;
    long long offset, length, cluster_size, budget;
    int error;

    if (!PyArg_ParseTuple(arguments, "iiLLLL", &copy.source, &copy.target, &offset, &length,
                          &cluster_size, &budget))
        return NULL;
    if (offset < 0 || length < 0 || offset > INT64_MAX - length || cluster_size <= 0 ||
        offset % cluster_size) {
        PyErr_SetString(PyExc_ValueError, "offset, length or cluster size out of range");
        return NULL;
    }
    if (length == 0)
        return PyLong_FromLong(0);
    copy.offset = (off_t)offset;
    copy.end = (off_t)(offset + length);
    copy.cluster_size = (size_t)cluster_size;
    copy.budget = (off_t)budget;
    Py_BEGIN_ALLOW_THREADS
    step = cluster_copy_step(copy.cluster_size);
    buffer = malloc((size_t)length < step ? (size_t)length : step);
    error = buffer ? copy_clusters_of(&copy, buffer) : ENOMEM;
    free(buffer);
    Py_END_ALLOW_THREADS
    if (error) {
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return PyLong_FromLongLong((long long)copy.written);
}

PyDoc_STRVAR(copy_clusters_doc,
"copy_clusters(source, target, offset, length, cluster_size, budget) -> int\n\n"
"Copy a range from one descriptor to the same offsets of another.\n\n"
"The offset is a multiple of the cluster size.  Clusters that are unallocated\n"
"or all zeros are not written.  Stops early where the source ends.  Returns the\n"
"bytes written; raises OSError, ENOSPC too when they would be more than budget.\n"
"Blocks, without the GIL.");

static PyMethodDef methods[] = {
    {"copy_clusters", copy_clusters, METH_VARARGS, copy_clusters_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "snapfs.port._clustercopy",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__clustercopy(void);

PyMODINIT_FUNC PyInit__clustercopy(void)
{
    return PyModuleDef_Init(&definition);
}
