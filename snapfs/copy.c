/* Copying clusters from one file to another, the inner loop of
 * copy-before-write.
 *
 * In C because a Python loop takes the GIL back after each system call, and
 * then waits for the event loop to let go of it: that, not the copying, was
 * nine tenths of the time of a first write.
 *
 * It reads and writes; it does not use copy_file_range(2), which reflinks on
 * XFS and btrfs and so makes later in-place writes of the image allocate.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define STEP ((size_t)1 << 20) /* bytes held in memory at a time */

struct copy {
    int source, target;
    off_t offset, end; /* what is left to do */
    size_t cluster_size;
    off_t written, budget; /* bytes */
};

static bool is_zero(const char *data, size_t size)
{
    return size == 0 || (data[0] == 0 && memcmp(data, data + 1, size - 1) == 0);
}

/* Returns the number of bytes read, less than `size` only at the end of the
 * file, or -1 with errno set. */
static ssize_t read_full(int fd, char *data, size_t size, off_t offset)
{
    size_t done = 0;

    while (done < size) {
        ssize_t count = pread(fd, data + done, size - done, offset + (off_t)done);
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0)
            return -1;
        if (count == 0)
            break;
        done += (size_t)count;
    }
    return (ssize_t)done;
}

static int write_full(int fd, const char *data, size_t size, off_t offset)
{
    while (size > 0) {
        ssize_t count = pwrite(fd, data, size, offset);
        if (count < 0 && errno == EINTR)
            continue;
        if (count == 0)
            errno = EIO; /* no progress */
        if (count <= 0)
            return -1;
        data += count;
        size -= (size_t)count;
        offset += count;
    }
    return 0;
}

/* Write `size` bytes from `start` of the data for copy->offset on. */
static int write_run(struct copy *copy, const char *data, size_t start, size_t size)
{
    if ((off_t)size > copy->budget - copy->written) {
        errno = ENOSPC;
        return -1;
    }
    if (write_full(copy->target, data + start, size, copy->offset + (off_t)start))
        return -1;
    copy->written += (off_t)size;
    return 0;
}

/* Write the clusters of `data` that are not all zeros, each run of them at once. */
static int write_nonzero(struct copy *copy, const char *data, size_t size)
{
    size_t start = 0, position = 0;

    while (position < size) {
        size_t left = size - position;
        size_t cluster = left < copy->cluster_size ? left : copy->cluster_size;
        bool zero = is_zero(data + position, cluster);

        if (zero) {
            if (write_run(copy, data, start, position - start))
                return -1;
            start = position + cluster;
        }
        position += cluster;
    }
    return write_run(copy, data, start, size - start);
}

/* Returns 0, or an errno.  Holes of the source are skipped without reading. */
static int run(struct copy *copy)
{
    off_t step = (off_t)(copy->cluster_size > STEP ? copy->cluster_size : STEP);
    off_t size = copy->end - copy->offset;
    char *buffer = malloc((size_t)(size < step ? size : step));
    int error = 0;

    if (!buffer)
        return ENOMEM;
    while (copy->offset < copy->end) {
        off_t data = lseek(copy->source, copy->offset, SEEK_DATA);
        ssize_t count;

        if (data < 0 && errno == ENXIO)
            break; /* nothing but a hole up to the end */
        if (data < 0) {
            error = errno;
            break;
        }
        data -= data % (off_t)copy->cluster_size;
        if (data > copy->offset)
            copy->offset = data;
        if (copy->offset >= copy->end)
            break;
        size = copy->end - copy->offset;
        count = read_full(copy->source, buffer, (size_t)(size < step ? size : step),
                          copy->offset);
        if (count < 0 || write_nonzero(copy, buffer, (size_t)count)) {
            error = errno;
            break;
        }
        if (count == 0)
            break; /* the end of the file */
        copy->offset += count;
    }
    free(buffer);
    return error;
}

static PyObject *copy_clusters(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    struct copy copy = {0};
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
    error = run(&copy);
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
    .m_name = "snapfs._copy",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__copy(void);

PyMODINIT_FUNC PyInit__copy(void)
{
    return PyModuleDef_Init(&definition);
}
