/* The native request filter between libfuse and pyfuse3.
 *
 * pyfuse3 3.5 has no handlers for FALLOCATE and LSEEK, hides the flags of a READ, and
 * cannot invalidate a byte range.  Its extension module calls libfuse through the PLT, so
 * a shared object that is in the global scope before pyfuse3 is loaded stands in for
 *
 *   fuse_session_new[_versioned]  adds the two handlers, adjusts what is negotiated
 *   fuse_session_receive_buf      reads /dev/fuse itself, and answers what fastpath.c can
 *   fuse_session_process_buf      takes the receive buffer back
 *   fuse_session_destroy          forgets the session
 *
 * and passes everything on.  requestfilter.py loads it and describes the interface.
 *
 * What protects the state: pyfuse3 calls libfuse with the GIL held and Python calls the
 * module functions with the GIL held, so every static variable here is read and written
 * under the GIL, or in drain() by the trio thread, which is the only one to come there or to
 * look at what is counted there.
 *
 * The receive buffer.  There is one.  receive() lends it to pyfuse3 in buf->mem;
 * fuse_session_process_buf() takes it back once the handler has been started, since by
 * then pyfuse3 has copied what it needs into Python objects.  So a request that waits
 * keeps no buffer at all.  While it is lent it is an ordinary malloc block of pyfuse3's,
 * which may free() it at any time: nothing is wrong if process_buf is never called.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "fastpath.h"

#define FUSE_USE_VERSION 35
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <linux/fuse.h>
#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

enum {
    /* The largest WRITE we ask for: 256 pages of 4 KiB, the kernel's usual limit. */
    MAX_WRITE = 1 << 20,
    /* The kernel wants max_write and the headers (80 bytes), and at least 8 KiB. */
    BUFFER_SIZE = MAX_WRITE + (1 << 16),
    BUFFER_ALIGNMENT = 4096,
    /* How long to wait for one more request before Python gets its turn: a trip through the
     * event loop takes longer, and at queue depth 1 the next request comes within 20 us. */
    LINGER_NS = 50 * 1000,
    /* Readahead and asynchronous direct I/O in flight; the kernel's default is 12. */
    MAX_BACKGROUND = 64,
    CONGESTION_THRESHOLD = 48,
    /* fs/fuse/dev.c refuses replies with a larger errno, and then waits for ever. */
    MAX_ERRNO = 511,
};

#ifndef FUSE_HANDLE_KILLPRIV_V2
#define FUSE_HANDLE_KILLPRIV_V2 (1 << 28) /* linux/fuse.h since 5.11 */
#endif

#define INTERPOSED __attribute__((visibility("default")))

struct libfuse_version; /* only passed through; absent from older headers */

/* These two by their symbols.  libfuse 3.10 to 3.16 declares only the first, 3.17 makes it a
 * macro and adds the second, 3.19 declares that with another type. */
INTERPOSED struct fuse_session *session_new(struct fuse_args *args,
                                            const struct fuse_lowlevel_ops *ops, size_t size,
                                            void *userdata) __asm__("fuse_session_new");
INTERPOSED struct fuse_session *
session_new_versioned(struct fuse_args *args, const struct fuse_lowlevel_ops *ops, size_t size,
                      const struct libfuse_version *version,
                      void *userdata) __asm__("fuse_session_new_versioned");

/* libfuse's own functions; set once, at import. */
static struct {
    struct fuse_session *(*session_new)(struct fuse_args *, const struct fuse_lowlevel_ops *,
                                        size_t, void *);
    struct fuse_session *(*session_new_versioned)(struct fuse_args *,
                                                  const struct fuse_lowlevel_ops *, size_t,
                                                  const struct libfuse_version *, void *);
    int (*receive_buf)(struct fuse_session *, struct fuse_buf *);
    void (*process_buf)(struct fuse_session *, const struct fuse_buf *);
    void (*session_destroy)(struct fuse_session *);
} libfuse;

/* What the operations table held before we changed it. */
static struct {
    void (*init)(void *, struct fuse_conn_info *);
    void (*fallocate)(fuse_req_t, fuse_ino_t, int, off_t, off_t, struct fuse_file_info *);
    void (*lseek)(fuse_req_t, fuse_ino_t, off_t, int, struct fuse_file_info *);
} original;

static PyObject *owner;               /* the one module object, borrowed; NULL: none */
static struct fuse_session *session;  /* NULL: none, or destroyed */
static bool nonblocking;              /* O_NONBLOCK is set on the session's descriptor */
static bool receive_enabled = true;   /* the off switch: configure(receive=...) */
static bool last_was_direct_read;     /* of the request received last */
static void *spare;                   /* the receive buffer while it is ours, or NULL */
static void *lent;                    /* the receive buffer while pyfuse3 has it, or NULL */
static PyObject *fallocate_handler;   /* NULL: none set */
static PyObject *lseek_handler;       /* NULL: none set */

static struct {
    unsigned long long sessions;       /* created */
    unsigned long long received;       /* requests that receive() read */
    unsigned long long received_bytes; /* their bytes, headers included */
    unsigned long long empty_receives; /* nothing there to read after all */
    unsigned long long reads, direct_reads, writes; /* among received */
    unsigned long long fallocates, lseeks; /* however received */
    unsigned long long replies;        /* through reply_error and reply_offset */
    unsigned long long failed_replies; /* the kernel did not want them any more */
    unsigned long long invalidations;
} counters;

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

static void forget_requests(void)
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

/* Uses `want` and the 32-bit capabilities, as pyfuse3 does: libfuse 3.17+ merges them into
 * want_ext, but only if nobody changed both. */
static void on_init(void *userdata, struct fuse_conn_info *conn)
{
    /* With AUTO_INVAL_DATA each GETATTR that brings a new mtime drops the whole page cache
     * of `active`.  Nothing but we write there, and we invalidate what we change. */
    conn->want &= ~(unsigned)FUSE_CAP_AUTO_INVAL_DATA;
    conn->want |= conn->capable & (FUSE_CAP_EXPLICIT_INVAL_DATA | FUSE_CAP_ASYNC_READ |
                                   FUSE_CAP_ASYNC_DIO | FUSE_CAP_PARALLEL_DIROPS);
    conn->max_background = MAX_BACKGROUND;
    conn->congestion_threshold = CONGESTION_THRESHOLD;
    if (conn->max_write > MAX_WRITE) /* what BUFFER_SIZE allows for */
        conn->max_write = MAX_WRITE;
    /* max_readahead already is the most that the kernel offers. */
    if (original.init)
        original.init(userdata, conn);
}

/* ---- interposed: the life of the session ------------------------------------------- */

/* Returns a malloc'ed copy of the table with our handlers in it.  The caller of libfuse may
 * have been built with other headers than ours: the copy is as large as the larger of the
 * two, and no entry of the caller's is lost.  NULL with errno set if that is impossible. */
static struct fuse_lowlevel_ops *extend_operations(const struct fuse_lowlevel_ops *ops,
                                                   size_t *size)
{
    size_t extended_size = *size > sizeof(*ops) ? *size : sizeof(*ops);
    struct fuse_lowlevel_ops *extended = calloc(1, extended_size);

    if (!extended)
        return NULL;
    memcpy(extended, ops, *size);
    original.init = extended->init;
    original.fallocate = extended->fallocate;
    original.lseek = extended->lseek;
    extended->init = on_init;
    extended->fallocate = on_fallocate;
    extended->lseek = on_lseek;
    *size = extended_size;
    return extended;
}

static struct fuse_session *adopt_session(struct fuse_session *created)
{
    if (!created)
        return NULL;
    session = created;
    nonblocking = false;
    last_was_direct_read = false;
    forget_requests();
    fastpath_forget();
    counters.sessions++;
    return created;
}

/* Not for us: no table, too old to have an init, or libfuse 3.17+ whose fuse_session_new
 * calls fuse_session_new_versioned and so meets us a second time. */
static bool pass_on(const struct fuse_lowlevel_ops *ops, size_t size)
{
    return !ops || size < sizeof(ops->init) || ops->init == on_init;
}

struct fuse_session *session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *ops,
                                 size_t size, void *userdata)
{
    struct fuse_lowlevel_ops *extended;
    struct fuse_session *created;

    if (!libfuse.session_new) {
        errno = ENOSYS;
        return NULL;
    }
    if (pass_on(ops, size))
        return libfuse.session_new(args, ops, size, userdata);
    extended = extend_operations(ops, &size);
    if (!extended)
        return NULL;
    created = libfuse.session_new(args, extended, size, userdata);
    free(extended);
    return adopt_session(created);
}

struct fuse_session *session_new_versioned(struct fuse_args *args,
                                           const struct fuse_lowlevel_ops *ops, size_t size,
                                           const struct libfuse_version *version,
                                           void *userdata)
{
    struct fuse_lowlevel_ops *extended;
    struct fuse_session *created;

    if (!libfuse.session_new_versioned) {
        errno = ENOSYS;
        return NULL;
    }
    if (pass_on(ops, size))
        return libfuse.session_new_versioned(args, ops, size, version, userdata);
    extended = extend_operations(ops, &size);
    if (!extended)
        return NULL;
    created = libfuse.session_new_versioned(args, extended, size, version, userdata);
    free(extended);
    return adopt_session(created);
}

INTERPOSED void fuse_session_destroy(struct fuse_session *se)
{
    if (se == session) {
        session = NULL;
        last_was_direct_read = false;
        forget_requests(); /* they point into the session */
        fastpath_forget();
        free(spare);
        spare = NULL;
        lent = NULL; /* pyfuse3's */
    }
    libfuse.session_destroy(se);
}

/* ---- interposed: receiving a request ----------------------------------------------- */

/* `size` bytes have been read, at least a header. */
static void note_request(const struct fuse_in_header *header, size_t size)
{
    last_was_direct_read = false;
    counters.received++;
    counters.received_bytes += size;
    if (header->opcode == FUSE_WRITE) {
        counters.writes++;
    } else if (header->opcode == FUSE_READ) {
        const struct fuse_read_in *in = (const void *)(header + 1);
        counters.reads++;
        /* The kernel names the lock owner only in fuse_direct_io(), never when it fills
         * the page cache (fs/fuse/file.c). */
        if (size >= sizeof(*header) + sizeof(*in) && (in->read_flags & FUSE_READ_LOCKOWNER)) {
            counters.direct_reads++;
            last_was_direct_read = true;
        }
    }
}

/* Whatever an earlier request left in buf->mem: libfuse's buffer, if the switch has just
 * been turned on, or ours, if that request was never processed. */
static void drop_previous(struct fuse_buf *buf)
{
    if (buf->mem && buf->mem == lent && !spare)
        spare = buf->mem;
    else
        free(buf->mem);
    if (buf->mem == lent)
        lent = NULL;
    buf->mem = NULL;
}

/* Waits for copies under way, or a moment for one more request.  Returns whether to look for
 * one. */
static bool wait_for_more(int fd, long long started)
{
    struct pollfd device = {.fd = fd, .events = POLLIN};
    struct timespec moment = {.tv_nsec = LINGER_NS};
    long long left = started + fastpath_patience() - fastpath_now();

    if (left <= 0)
        return false;
    if (fastpath_wait(fd, left))
        return true;
    if (!fastpath_may_linger())
        return false;
    fastpath_rest();
    return ppoll(&device, 1, &moment, NULL) > 0;
}

/* Reads requests, answers those it can, and returns when one is Python's, or when there are
 * none, or when it has had its time: Python's tasks are waiting meanwhile.  Returns as
 * read(2) with errno set, EAGAIN in the last two cases.  Without the GIL, which `thread` gets
 * for a moment. */
static ssize_t drain(int fd, void *memory, PyThreadState **thread)
{
    long long started = fastpath_now();
    bool answered = false, begun = false;
    ssize_t size;

    for (;;) {
        size = read(fd, memory, BUFFER_SIZE);
        if (size < 0 && errno == ENOENT) { /* interrupted while we read it */
            counters.empty_receives++;
            continue;
        }
        if (size < 0) {
            if (errno != EAGAIN)
                break;
            if (answered && wait_for_more(fd, started))
                continue;
            errno = EAGAIN;
            break;
        }
        if (!fastpath_is_on() || !fastpath_wants(memory, (size_t)size))
            break;
        if (!begun) {
            PyEval_RestoreThread(*thread);
            begun = fastpath_begin();
            *thread = PyEval_SaveThread();
            if (!begun)
                break;
        }
        if (fastpath_answer(fd, memory, (size_t)size) == FASTPATH_PYTHONS)
            break;
        fastpath_progress(fd);
        note_request(memory, (size_t)size);
        answered = true;
        if (fastpath_now() - started > fastpath_patience()) {
            size = -1;
            errno = EAGAIN;
            break;
        }
    }
    if (begun) {
        int error = errno;
        fastpath_settle(fd, true);
        fastpath_rest();
        errno = error;
    }
    if (size < 0 && errno == EAGAIN && !answered)
        counters.empty_receives++;
    return size;
}

/* Reads one request for pyfuse3.  Returns its size or a negative errno, of which -EINTR makes
 * it wait for the descriptor again. */
static int receive(struct fuse_session *se, struct fuse_buf *buf)
{
    int fd = fuse_session_fd(se);
    void *memory;
    ssize_t size;
    int error;
    PyThreadState *thread;

    drop_previous(buf);
    memory = spare; /* taken: no other thread may meet it while the GIL is released */
    spare = NULL;
    if (!memory && posix_memalign(&memory, BUFFER_ALIGNMENT, BUFFER_SIZE))
        return -ENOMEM;

    thread = PyEval_SaveThread();
    size = drain(fd, memory, &thread);
    error = errno;
    PyEval_RestoreThread(thread);
    fastpath_end();
    fastpath_finish(fd);

    last_was_direct_read = false;
    if (size >= (ssize_t)sizeof(struct fuse_in_header)) {
        note_request(memory, (size_t)size);
        lent = memory;
        buf->mem = memory;
        buf->size = (size_t)size;
        buf->flags = 0;
        return (int)size;
    }
    spare = memory;
    if (size >= 0)
        return -EIO; /* not even a header: not a FUSE device */
    return error == EAGAIN ? -EINTR : -error;
}

/* What pyfuse3 is to hear of a receive.  The end of the connection is ENODEV, or
 * ECONNABORTED if it came while a request was being read: with many of them queued an
 * ordinary unmount does that (seen), and libfuse passes it on as an error, which would end
 * the main loop with an exception.  Without the exit flag the workers would spin. */
static int received(struct fuse_session *se, int result)
{
    if (result == -EAGAIN)
        return -EINTR;
    if (result == -ENODEV || result == -ECONNABORTED) {
        fuse_session_exit(se);
        return 0;
    }
    return result;
}

INTERPOSED int fuse_session_receive_buf(struct fuse_session *se, struct fuse_buf *buf)
{
    if (se != session)
        return libfuse.receive_buf(se, buf);
    last_was_direct_read = false;
    if (!nonblocking) {
        /* For libfuse's own receive too: a request that is interrupted between poll and
         * read would otherwise stop the event loop until the next one. */
        int fd = fuse_session_fd(se);
        int flags = fcntl(fd, F_GETFL);
        if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0)
            return -errno;
        nonblocking = true;
    }
    return received(se, receive_enabled ? receive(se, buf) : libfuse.receive_buf(se, buf));
}

/* Adds to the flags of an INIT reply what libfuse cannot be asked for before 3.17.  Without
 * HANDLE_KILLPRIV_V2 the kernel asks for security.capability before each write, with the
 * inode locked, so that no two writes are ever under way.  It makes the file system drop
 * set-user-ID bits on a write, which an image does not have. */
static void extend_init_reply(char *reply, size_t size, uint32_t offered)
{
    struct fuse_out_header header;
    struct fuse_init_out out;

    if (size < sizeof(header) + offsetof(struct fuse_init_out, flags) + sizeof(out.flags))
        return;
    memcpy(&header, reply, sizeof(header));
    if (header.error)
        return;
    reply += sizeof(header) + offsetof(struct fuse_init_out, flags);
    memcpy(&out.flags, reply, sizeof(out.flags));
    out.flags |= offered & (uint32_t)FUSE_HANDLE_KILLPRIV_V2;
    memcpy(reply, &out.flags, sizeof(out.flags));
}

/* Lets libfuse answer INIT into a pipe in place of the device, and passes the reply on with
 * what extend_init_reply() adds.  Any failure leaves the reply as libfuse makes it. */
static void process_init(struct fuse_session *se, const struct fuse_buf *buf)
{
    const struct fuse_init_in *in =
        (const void *)((const char *)buf->mem + sizeof(struct fuse_in_header));
    int fd = fuse_session_fd(se), device = fcntl(fd, F_DUPFD_CLOEXEC, 0), ends[2];
    uint32_t offered = in->flags; /* before libfuse sees, and may reuse, the buffer */
    char reply[512];
    ssize_t size;

    if (device < 0 || pipe2(ends, O_CLOEXEC | O_NONBLOCK) < 0) {
        libfuse.process_buf(se, buf);
    } else {
        if (dup3(ends[1], fd, O_CLOEXEC) < 0) {
            libfuse.process_buf(se, buf);
        } else {
            libfuse.process_buf(se, buf);
            size = read(ends[0], reply, sizeof(reply));
            dup3(device, fd, O_CLOEXEC);
            if (size > 0) {
                extend_init_reply(reply, (size_t)size, offered);
                if (write(fd, reply, (size_t)size) < 0)
                    fuse_session_exit(se); /* unmounted already */
            }
        }
        close(ends[0]);
        close(ends[1]);
    }
    if (device >= 0)
        close(device);
}

static bool is_init(const struct fuse_buf *buf)
{
    return buf->size >= sizeof(struct fuse_in_header) + offsetof(struct fuse_init_in, flags) +
                            sizeof(uint32_t) &&
           ((const struct fuse_in_header *)buf->mem)->opcode == FUSE_INIT;
}

INTERPOSED void fuse_session_process_buf(struct fuse_session *se, const struct fuse_buf *buf)
{
    /* Both may leave a Python exception set: no Python below. */
    if (lent && buf->mem == lent && is_init(buf))
        process_init(se, buf);
    else
        libfuse.process_buf(se, buf);
    if (lent && buf->mem == lent) {
        /* pyfuse3's struct is not const; it frees what it finds in there at the end */
        ((struct fuse_buf *)buf)->mem = NULL;
        if (spare)
            free(lent);
        else
            spare = lent;
        lent = NULL;
    }
}

/* ---- the Python module ------------------------------------------------------------- */

static void set_handler(PyObject **slot, PyObject *handler)
{
    PyObject *previous = *slot;

    *slot = handler == Py_None ? NULL : Py_NewRef(handler);
    Py_XDECREF(previous);
}

static PyObject *set_handlers(PyObject *module, PyObject *args, PyObject *keywords)
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

static PyObject *configure(PyObject *module, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"receive", NULL};
    int receive = receive_enabled;
    (void)module;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|$p:configure", names, &receive))
        return NULL;
    receive_enabled = receive;
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

/* There is nothing that a caller could do about a reply that failed: the request was
 * interrupted or the file system unmounted. */
static PyObject *replied(int result)
{
    counters.replies++;
    if (result)
        counters.failed_replies++;
    Py_RETURN_NONE;
}

static PyObject *reply_error(PyObject *module, PyObject *args)
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
    return replied(fuse_reply_err(take_request(entry), error));
}

static PyObject *reply_offset(PyObject *module, PyObject *args)
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
    return replied(fuse_reply_lseek(take_request(entry), (off_t)offset));
}

/* The answer to a READ that the fast path has handed over: libfuse does not know it. */
static PyObject *reply_read(PyObject *module, PyObject *args)
{
    struct fuse_out_header out = {0};
    unsigned long long unique;
    Py_buffer data;
    int error, result = -1;
    (void)module;

    if (!PyArg_ParseTuple(args, "Kiy*:reply_read", &unique, &error, &data))
        return NULL;
    if (error < 0 || error > MAX_ERRNO || data.len > FASTPATH_MAX_READ) {
        PyBuffer_Release(&data);
        return PyErr_Format(PyExc_ValueError, "this cannot answer a read");
    }
    out.unique = unique;
    out.error = -error;
    out.len = (uint32_t)(sizeof(out) + (error ? 0 : (size_t)data.len));
    if (session) {
        struct iovec parts[2] = {{&out, sizeof(out)}, {data.buf, (size_t)data.len}};
        result = writev(fuse_session_fd(session), parts, error || !data.len ? 1 : 2) < 0;
    }
    PyBuffer_Release(&data);
    return replied(result);
}

/* The answer to a WRITE that the fast path has handed over. */
static PyObject *reply_write(PyObject *module, PyObject *args)
{
    struct {
        struct fuse_out_header header;
        struct fuse_write_out body;
    } out = {.header = {.len = sizeof(out)}};
    unsigned long long unique;
    unsigned size;
    int error;
    (void)module;

    if (!PyArg_ParseTuple(args, "KiI:reply_write", &unique, &error, &size))
        return NULL;
    if (error < 0 || error > MAX_ERRNO)
        return PyErr_Format(PyExc_ValueError, "errno %d cannot answer a request", error);
    out.header.unique = unique;
    out.header.error = -error;
    out.body.size = size;
    if (error)
        out.header.len = sizeof(out.header);
    if (!session) {
        counters.failed_replies++;
        Py_RETURN_NONE;
    }
    return replied(write(fuse_session_fd(session), &out, out.header.len) < 0);
}

static PyObject *direct_read(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyBool_FromLong(last_was_direct_read);
}

static PyObject *attached(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyBool_FromLong(session != NULL);
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

    fd = session ? fcntl(fuse_session_fd(session), F_DUPFD_CLOEXEC, 0) : -1;
    if (fd < 0) {
        if (!session || errno == EBADF) /* destroyed, or unmounted */
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
    (void)module, (void)unused;
    return Py_BuildValue(
        "{sKsKsKsKsKsKsKsKsKsKsKsKsK}", "sessions", counters.sessions, "received",
        counters.received, "received_bytes", counters.received_bytes, "empty_receives",
        counters.empty_receives, "reads", counters.reads, "direct_reads",
        counters.direct_reads, "writes", counters.writes, "fallocates", counters.fallocates,
        "lseeks", counters.lseeks, "replies", counters.replies, "failed_replies",
        counters.failed_replies, "invalidations", counters.invalidations, "outstanding",
        (unsigned long long)outstanding_count);
}

static PyMethodDef methods[] = {
    {"set_handlers", (PyCFunction)(void (*)(void))set_handlers, METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("set_handlers(*, fallocate=None, lseek=None)")},
    {"configure", (PyCFunction)(void (*)(void))configure, METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("configure(*, receive=...)")},
    {"reply_error", reply_error, METH_VARARGS, PyDoc_STR("reply_error(request, errno)")},
    {"reply_offset", reply_offset, METH_VARARGS, PyDoc_STR("reply_offset(request, offset)")},
    {"direct_read", direct_read, METH_NOARGS, PyDoc_STR("direct_read() -> bool")},
    {"attached", attached, METH_NOARGS, PyDoc_STR("attached() -> bool")},
    {"invalidate_range", invalidate_range, METH_VARARGS,
     PyDoc_STR("invalidate_range(ino, offset, length)")},
    {"set_fastpath", fastpath_set, METH_VARARGS,
     PyDoc_STR("set_fastpath(publish=None, lend=None, finish=None) -> bool")},
    {"ended_copies", fastpath_ended_copies, METH_NOARGS, PyDoc_STR("ended_copies() -> list")},
    {"copies_fd", fastpath_copies_fd, METH_NOARGS, PyDoc_STR("copies_fd() -> int")},
    {"reply_read", reply_read, METH_VARARGS, PyDoc_STR("reply_read(unique, error, data)")},
    {"reply_write", reply_write, METH_VARARGS, PyDoc_STR("reply_write(unique, error, size)")},
    {"handle_opened", fastpath_handle_opened, METH_VARARGS,
     PyDoc_STR("handle_opened(number, inode)")},
    {"handle_closed", fastpath_handle_closed, METH_O, PyDoc_STR("handle_closed(number)")},
    {"try_requests", fastpath_try, METH_VARARGS,
     PyDoc_STR("try_requests(device, requests, patient) -> list")},
    {"fastpath_statistics", fastpath_statistics, METH_NOARGS,
     PyDoc_STR("fastpath_statistics() -> dict")},
    {"statistics", statistics, METH_NOARGS, PyDoc_STR("statistics() -> dict")},
    {NULL, NULL, 0, NULL},
};

/* libfuse keeps the oldest versions of some functions as non-default symbols, which
 * dlsym() does not find; the oldest one is what pyfuse3 imports. */
static void *next_function(const char *name)
{
    void *function = dlvsym(RTLD_NEXT, name, "FUSE_3.0");
    return function ? function : dlsym(RTLD_NEXT, name);
}

/* ISO C has no conversion from object to function pointers; POSIX has this one. */
#define FIND(member, name) (*(void **)(&libfuse.member) = next_function(name))

static int execute(PyObject *module)
{
    if (owner) {
        PyErr_SetString(PyExc_ImportError, "the request filter exists once in a process");
        return -1;
    }
    FIND(session_new, "fuse_session_new");
    FIND(session_new_versioned, "fuse_session_new_versioned");
    FIND(receive_buf, "fuse_session_receive_buf");
    FIND(process_buf, "fuse_session_process_buf");
    FIND(session_destroy, "fuse_session_destroy");
    if ((!libfuse.session_new && !libfuse.session_new_versioned) || !libfuse.receive_buf ||
        !libfuse.process_buf || !libfuse.session_destroy) {
        PyErr_SetString(PyExc_ImportError, "libfuse lacks the functions that pyfuse3 calls");
        return -1;
    }
    owner = module;
    return 0;
}

/* A module object that execute() refused owns nothing. */
static int traverse(PyObject *module, visitproc visit, void *arg)
{
    if (module == owner) {
        Py_VISIT(fallocate_handler);
        Py_VISIT(lseek_handler);
        return fastpath_traverse(visit, arg);
    }
    return 0;
}

static int clear(PyObject *module)
{
    if (module == owner) {
        Py_CLEAR(fallocate_handler);
        Py_CLEAR(lseek_handler);
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
    .m_name = "snapfs._requestfilter",
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
