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
 *   fuse_reply_open               allows direct writes side by side (negotiate.c)
 *
 * and passes everything on.  requestfilter.py loads it and describes the interface.
 *
 * What protects the state: pyfuse3 calls libfuse with the GIL held and Python calls the
 * module functions with the GIL held, so every static variable here is read and written
 * under the GIL, or in drain() by the trio thread, which is the only one to come there or to
 * look at what is counted there.
 *
 * The receive buffer.  receive() lends one to pyfuse3 in buf->mem;
 * fuse_session_process_buf() takes it back once the handler has been started, since by
 * then pyfuse3 has copied what it needs into Python objects.  So a request that waits
 * for Python keeps no buffer at all.  While it is lent it is an ordinary malloc block of
 * pyfuse3's, which may free() it at any time: nothing is wrong if process_buf is never called.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "buffers.h"
#include "fastpath.h"
#include "requestfilter.h"
#include "waiting.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

enum {
    /* How long to wait for one more request before Python gets its turn: a trip through the
     * event loop takes longer, and at queue depth 1 the next request comes within 20 us, a large
     * one within 100. */
    LINGER_NS = 50 * 1000,
    LINGER_LARGE_NS = 200 * 1000,
    LARGE = 128 << 10,
};

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
    int (*reply_open)(fuse_req_t, const struct fuse_file_info *);
} libfuse;

struct filter filter = {.receive_enabled = true};

static bool nonblocking; /* O_NONBLOCK is set on the session's descriptor */
static void *lent;       /* the receive buffer that pyfuse3 has, or NULL */

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
    negotiate_install(extended);
    handlers_install(extended);
    *size = extended_size;
    return extended;
}

static struct fuse_session *adopt_session(struct fuse_session *created)
{
    if (!created)
        return NULL;
    filter.session = created;
    nonblocking = false;
    filter.last = (struct last_request){0};
    handlers_forget();
    fastpath_forget();
    filter.sessions++;
    return created;
}

/* Not for us: no table, too old to have an init, or libfuse 3.17+ whose fuse_session_new
 * calls fuse_session_new_versioned and so meets us a second time. */
static bool pass_on(const struct fuse_lowlevel_ops *ops, size_t size)
{
    return !ops || size < sizeof(ops->init) || negotiate_is_installed(ops);
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
    if (se == filter.session) {
        filter.session = NULL;
        filter.last = (struct last_request){0};
        handlers_forget(); /* they point into the session */
        fastpath_forget();
        buffer_free_all();
        lent = NULL; /* pyfuse3's */
    }
    libfuse.session_destroy(se);
}

/* ---- interposed: receiving a request ----------------------------------------------- */

/* `size` bytes have been read, at least a header. */
static void note_request(const struct fuse_in_header *header, size_t size)
{
    filter.last = (struct last_request){0};
    filter.received++;
    filter.received_bytes += size;
    if (header->opcode == FUSE_WRITE) {
        const struct fuse_write_in *in = (const void *)(header + 1);
        filter.writes++;
        /* O_SYNC includes it.  Of this write: by the open file, RWF_DSYNC, or the mount. */
        filter.last.synchronous_write =
            size >= sizeof(*header) + sizeof(*in) && (in->flags & O_DSYNC);
    } else if (header->opcode == FUSE_READ) {
        const struct fuse_read_in *in = (const void *)(header + 1);
        filter.reads++;
        /* The kernel names the lock owner only in fuse_direct_io(), never when it fills
         * the page cache (fs/fuse/file.c). */
        if (size >= sizeof(*header) + sizeof(*in) && (in->read_flags & FUSE_READ_LOCKOWNER)) {
            filter.direct_reads++;
            filter.last.direct_read = true;
        }
    }
}

static bool is_large(const void *request, size_t size)
{
    const struct fuse_in_header *header = request;
    const struct fuse_read_in *in = (const void *)(header + 1);

    return (header->opcode == FUSE_READ ? in->size : size) >= LARGE;
}

/* Whatever an earlier request left in buf->mem: libfuse's buffer, if the switch has just
 * been turned on, or ours, if that request was never processed. */
static void drop_previous(struct fuse_buf *buf)
{
    if (buf->mem && buf->mem == lent) {
        buffer_free(lent);
        lent = NULL;
    } else {
        free(buf->mem);
    }
    buf->mem = NULL;
}

/* Waits for copies under way, or a moment for one more request.  Returns whether to look for
 * one.  It stays awake for that moment: to sleep and to be woken on another processor takes
 * longer than a request; who wants this processor gets it. */
static bool wait_for_more(int fd, long long started, long long linger)
{
    struct pollfd device = {.fd = fd, .events = POLLIN};
    long long now = nanoseconds(CLOCK_MONOTONIC), until = now + linger;
    long long left = started + fastpath_patience() - now;

    if (left <= 0)
        return false;
    if (waiting_wait(fd, left))
        return true;
    if (!fastpath_may_linger())
        return false;
    if (!transfer_is_writing())
        published_rest();
    do {
        sched_yield();
        if (poll(&device, 1, 0) > 0)
            return true;
    } while (nanoseconds(CLOCK_MONOTONIC) < until);
    return false;
}

/* Reads requests, answers those it can, and returns when one is Python's, or when there are
 * none, or when it has had its time: Python's tasks are waiting meanwhile.  Returns as
 * read(2) with errno set, EAGAIN in the last two cases.  The buffer may be another one
 * after it.  Without the GIL, which `thread` gets for a moment. */
static ssize_t drain(int fd, void **memory, PyThreadState **thread)
{
    long long started = nanoseconds(CLOCK_MONOTONIC), linger = 0;
    bool answered = false, begun = false;
    ssize_t size;

    for (;;) {
        const void *request = *memory;

        size = read(fd, *memory, BUFFER_SIZE);
        if (size < 0 && errno == ENOENT) { /* interrupted while we read it */
            filter.empty_receives++;
            continue;
        }
        if (size < 0) {
            if (errno != EAGAIN)
                break;
            if (answered && wait_for_more(fd, started, linger))
                continue;
            errno = EAGAIN;
            break;
        }
        if (negotiate_interrupt(fd, request, (size_t)size))
            continue;
        if (!fastpath_is_on() || !fastpath_wants(request, (size_t)size))
            break;
        if (!begun) {
            PyEval_RestoreThread(*thread);
            begun = fastpath_begin();
            *thread = PyEval_SaveThread();
            if (!begun)
                break;
        }
        if (fastpath_answer(fd, request, (size_t)size, memory) == FASTPATH_PYTHONS)
            break;
        /* Before anything else is answered, which may free it. */
        note_request(request, (size_t)size);
        linger = is_large(request, (size_t)size) ? LINGER_LARGE_NS : LINGER_NS;
        waiting_progress(fd);
        answered = true;
        if (nanoseconds(CLOCK_MONOTONIC) - started > fastpath_patience()) {
            size = -1;
            errno = EAGAIN;
            break;
        }
    }
    if (begun) {
        int error = errno;
        waiting_settle(fd, true);
        published_rest();
        errno = error;
    }
    if (size < 0 && errno == EAGAIN && !answered)
        filter.empty_receives++;
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
    memory = buffer_new();
    if (!memory)
        return -ENOMEM;

    thread = PyEval_SaveThread();
    size = drain(fd, &memory, &thread);
    error = errno;
    PyEval_RestoreThread(thread);
    fastpath_end(fd);

    filter.last = (struct last_request){0};
    if (size >= (ssize_t)sizeof(struct fuse_in_header)) {
        note_request(memory, (size_t)size);
        lent = memory;
        buf->mem = memory;
        buf->size = (size_t)size;
        buf->flags = 0;
        return (int)size;
    }
    buffer_free(memory);
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
    if (se != filter.session)
        return libfuse.receive_buf(se, buf);
    filter.last = (struct last_request){0};
    if (!nonblocking) {
        /* For libfuse's own receive too: a request that is interrupted between poll and
         * read would otherwise stop the event loop until the next one. */
        int fd = fuse_session_fd(se);
        int flags = fcntl(fd, F_GETFL);
        if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0)
            return -errno;
        nonblocking = true;
    }
    return received(se, filter.receive_enabled ? receive(se, buf) : libfuse.receive_buf(se, buf));
}

INTERPOSED void fuse_session_process_buf(struct fuse_session *se, const struct fuse_buf *buf)
{
    if (!(buf->flags & FUSE_BUF_IS_FD) &&
        negotiate_interrupt(fuse_session_fd(se), buf->mem, buf->size))
        return; /* libfuse has read it: configure() */
    /* Both may leave a Python exception set: no Python below. */
    if (lent && buf->mem == lent && negotiate_is_init(buf))
        negotiate_init(se, buf, libfuse.process_buf);
    else
        libfuse.process_buf(se, buf);
    if (lent && buf->mem == lent) {
        /* pyfuse3's struct is not const; it frees what it finds in there at the end */
        ((struct fuse_buf *)buf)->mem = NULL;
        buffer_free(lent);
        lent = NULL;
    }
}

INTERPOSED int fuse_reply_open(fuse_req_t request, const struct fuse_file_info *fi)
{
    return fi->direct_io ? negotiate_open(request, fi) : libfuse.reply_open(request, fi);
}

/* ---- finding libfuse ------------------------------------------------------------------- */

/* libfuse keeps the oldest versions of some functions as non-default symbols, which
 * dlsym() does not find; the oldest one is what pyfuse3 imports. */
static void *next_function(const char *name)
{
    void *function = dlvsym(RTLD_NEXT, name, "FUSE_3.0");
    return function ? function : dlsym(RTLD_NEXT, name);
}

/* ISO C has no conversion from object to function pointers; POSIX has this one. */
#define FIND(member, name) (*(void **)(&libfuse.member) = next_function(name))

bool filter_find_libfuse(void)
{
    FIND(session_new, "fuse_session_new");
    FIND(session_new_versioned, "fuse_session_new_versioned");
    FIND(receive_buf, "fuse_session_receive_buf");
    FIND(process_buf, "fuse_session_process_buf");
    FIND(session_destroy, "fuse_session_destroy");
    FIND(reply_open, "fuse_reply_open");
    if ((libfuse.session_new || libfuse.session_new_versioned) && libfuse.receive_buf &&
        libfuse.process_buf && libfuse.session_destroy && libfuse.reply_open)
        return true;
    PyErr_SetString(PyExc_ImportError, "libfuse lacks the functions that pyfuse3 calls");
    return false;
}
