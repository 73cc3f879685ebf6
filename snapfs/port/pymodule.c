/* The Python module of the request filter: its functions, and its life. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "fastpath.h"
#include "handover.h"
#include "published.h"
#include "requestfilter.h"
#include "tally.h"
#include "waiting.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <unistd.h>

static PyObject *owner; /* the one module object, borrowed; NULL: none */

static struct {
    unsigned long long replies;        /* that Python has made */
    unsigned long long failed_replies; /* the kernel did not want them any more */
    unsigned long long invalidations;
} counters;

static PyObject *configure(PyObject *module, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"receive", NULL};
    int receive = filter.receive_enabled;
    (void)module;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|$p:configure", names, &receive))
        return NULL;
    filter.receive_enabled = receive;
    Py_RETURN_NONE;
}

/* There is nothing that a caller could do about a reply that failed: the request was
 * interrupted or the file system unmounted. */
PyObject *filter_replied(int result)
{
    counters.replies++;
    if (result)
        counters.failed_replies++;
    Py_RETURN_NONE;
}

/* Answer a request that the fast path has handed over: libfuse does not know it. */
static PyObject *reply(unsigned long long unique, int error, const void *data, size_t size)
{
    bool sent = false;

    if (error < 0 || error > MAX_ERRNO || size > FASTPATH_MAX_READ)
        return PyErr_Format(PyExc_ValueError, "this cannot answer a request");
    if (filter.session)
        sent = transfer_reply(fuse_session_fd(filter.session), unique, error, data,
                           error ? 0 : size);
    return filter_replied(!sent);
}

static PyObject *reply_read(PyObject *module, PyObject *args)
{
    unsigned long long unique;
    PyObject *result;
    Py_buffer data;
    int error;
    (void)module;

    if (!PyArg_ParseTuple(args, "Kiy*:reply_read", &unique, &error, &data))
        return NULL;
    result = reply(unique, error, data.buf, (size_t)data.len);
    PyBuffer_Release(&data);
    return result;
}

static PyObject *reply_write(PyObject *module, PyObject *args)
{
    struct fuse_write_out out = {0};
    unsigned long long unique;
    int error;
    (void)module;

    if (!PyArg_ParseTuple(args, "KiI:reply_write", &unique, &error, &out.size))
        return NULL;
    return reply(unique, error, &out, sizeof(out));
}

static PyObject *direct_read(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyBool_FromLong(filter.last.direct_read);
}

static PyObject *synchronous_write(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyBool_FromLong(filter.last.synchronous_write);
}

static PyObject *attached(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyBool_FromLong(filter.session != NULL);
}

/* Sends the message of fuse_lowlevel_notify_inval_inode() itself: that function uses the
 * session without the GIL, while another thread may be destroying it, and its descriptor
 * may by then be another file.  A duplicate made under the GIL has neither problem. */
static PyObject *invalidate_range(PyObject *module, PyObject *args)
{
    struct {
        struct fuse_out_header header;
        struct fuse_notify_inval_inode_out body;
    } message = {.header = {.len = sizeof(message), .error = FUSE_NOTIFY_INVAL_INODE}};
    PyObject *ino;
    long long offset, length;
    ssize_t written;
    int fd, error;
    (void)module;

    _Static_assert(sizeof(message) == sizeof(message.header) + sizeof(message.body),
                   "the message has no padding");
    if (!PyArg_ParseTuple(args, "O!LL:invalidate_range", &PyLong_Type, &ino, &offset, &length))
        return NULL;
    message.body.ino = PyLong_AsUnsignedLongLong(ino);
    if (PyErr_Occurred())
        return NULL;
    /* To the kernel a negative offset means attributes only, and length 0 the whole rest. */
    if (offset < 0 || length <= 0 || offset > INT64_MAX - length) {
        PyErr_Format(PyExc_ValueError, "no byte range: offset %lld, length %lld", offset,
                     length);
        return NULL;
    }
    message.body.off = offset;
    message.body.len = length;

    fd = filter.session ? fcntl(fuse_session_fd(filter.session), F_DUPFD_CLOEXEC, 0) : -1;
    if (fd < 0) {
        if (!filter.session || errno == EBADF) /* destroyed, or unmounted */
            errno = ENODEV;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    counters.invalidations++;
    Py_BEGIN_ALLOW_THREADS
    written = write(fd, &message, sizeof(message));
    error = errno;
    close(fd);
    Py_END_ALLOW_THREADS
    if (written < 0 && error != ENOENT) { /* ENOENT: the kernel has nothing of that inode */
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}

static PyObject *statistics(PyObject *module, PyObject *unused)
{
    PyObject *found = handlers_statistics(), *own;
    (void)module, (void)unused;

    if (!found)
        return NULL;
    own = Py_BuildValue("{sKsKsKsKsKsKsKsKsKsKsK}", "sessions", filter.sessions, "received",
                        filter.received, "received_bytes", filter.received_bytes,
                        "empty_receives", filter.empty_receives, "reads", filter.reads,
                        "direct_reads", filter.direct_reads, "writes", filter.writes, "interrupts",
                        filter.interrupts, "replies", counters.replies, "failed_replies", counters.failed_replies,
                        "invalidations", counters.invalidations);
    if (!own || PyDict_Update(found, own))
        Py_CLEAR(found);
    Py_XDECREF(own);
    return found;
}

static PyMethodDef methods[] = {
    {"set_handlers", (PyCFunction)(void (*)(void))handlers_set, METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("set_handlers(*, fallocate=None, lseek=None)")},
    {"configure", (PyCFunction)(void (*)(void))configure, METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("configure(*, receive=...)")},
    {"reply_error", handlers_reply_error, METH_VARARGS, PyDoc_STR("reply_error(request, errno)")},
    {"reply_offset", handlers_reply_offset, METH_VARARGS, PyDoc_STR("reply_offset(request, offset)")},
    {"direct_read", direct_read, METH_NOARGS, PyDoc_STR("direct_read() -> bool")},
    {"synchronous_write", synchronous_write, METH_NOARGS,
     PyDoc_STR("synchronous_write() -> bool")},
    {"attached", attached, METH_NOARGS, PyDoc_STR("attached() -> bool")},
    {"invalidate_range", invalidate_range, METH_VARARGS,
     PyDoc_STR("invalidate_range(ino, offset, length)")},
    {"set_fastpath", fastpath_set, METH_VARARGS,
     PyDoc_STR("set_fastpath(publish=None, lend=None, finish=None) -> bool")},
    {"ended_copies", handover_ended_copies, METH_NOARGS, PyDoc_STR("ended_copies() -> list")},
    {"copies_fd", handover_copies_fd, METH_NOARGS, PyDoc_STR("copies_fd() -> int")},
    {"reply_read", reply_read, METH_VARARGS, PyDoc_STR("reply_read(unique, error, data)")},
    {"reply_write", reply_write, METH_VARARGS, PyDoc_STR("reply_write(unique, error, size)")},
    {"handle_opened", fastpath_handle_opened, METH_VARARGS,
     PyDoc_STR("handle_opened(number, inode)")},
    {"handle_closed", fastpath_handle_closed, METH_O, PyDoc_STR("handle_closed(number)")},
    {"try_requests", fastpath_try, METH_VARARGS,
     PyDoc_STR("try_requests(device, requests, patient) -> list")},
    {"activity_words", published_activity_words, METH_NOARGS,
     PyDoc_STR("activity_words() -> dict: where each word of the record of activity is")},
    {"fastpath_statistics", fastpath_statistics, METH_NOARGS,
     PyDoc_STR("fastpath_statistics() -> dict")},
    {"region_reads", tally_region_reads, METH_NOARGS,
     PyDoc_STR("region_reads() -> (size of a region or 0, list)")},
    {"copy_times", tally_copy_times, METH_NOARGS, PyDoc_STR("copy_times() -> list")},
    {"statistics", statistics, METH_NOARGS, PyDoc_STR("statistics() -> dict")},
    {NULL, NULL, 0, NULL},
};

static int execute(PyObject *module)
{
    if (owner) {
        PyErr_SetString(PyExc_ImportError, "the request filter exists once in a process");
        return -1;
    }
    if (!filter_find_libfuse())
        return -1;
    owner = module;
    return 0;
}

/* A module object that execute() refused owns nothing. */
static int traverse(PyObject *module, visitproc visit, void *arg)
{
    int result = 0;

    if (module == owner)
        result = handlers_traverse(visit, arg);
    if (module == owner && !result)
        result = fastpath_traverse(visit, arg);
    return result;
}

static int clear(PyObject *module)
{
    if (module == owner) {
        handlers_clear();
        fastpath_clear();
    }
    return 0;
}

static void release(void *module)
{
    if (module == owner) {
        clear(module);
        owner = NULL;
    }
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, execute},
#ifdef Py_mod_multiple_interpreters
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "snapfs.port._requestfilter",
    .m_doc = PyDoc_STR("Request filter between libfuse and pyfuse3; see requestfilter.py."),
    .m_size = 0,
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = traverse,
    .m_clear = clear,
    .m_free = release,
};

PyMODINIT_FUNC PyInit__requestfilter(void)
{
    return PyModuleDef_Init(&definition);
}
