/* The request filter between libfuse and pyfuse3: what its parts share.
 *
 * requestfilter.c stands in for libfuse's functions, negotiate.c agrees with the kernel on what
 * libfuse does not know, handlers.c adds the requests that pyfuse3 does not know, pymodule.c is the
 * face to Python; fastpath.h answers requests by itself.
 */
#ifndef SNAPFS_REQUESTFILTER_H
#define SNAPFS_REQUESTFILTER_H

#include "published.h"

#define FUSE_USE_VERSION 35
#include <fuse_lowlevel.h>
#include <stdbool.h>

enum {
    /* fs/fuse/dev.c refuses replies with a larger errno, and then waits for ever. */
    MAX_ERRNO = 511,
};

/* ---- requestfilter.c; the GIL protects it ---------------------------------------------- */

/* Of the request received last: what pyfuse3 does not tell of it. */
struct last_request {
    bool direct_read;       /* it is a READ that bypasses the page cache */
    bool synchronous_write; /* it is a WRITE to be made durable before it is answered */
};

struct filter {
    struct fuse_session *session; /* NULL: none, or destroyed */
    bool receive_enabled;         /* the off switch: configure(receive=...) */
    struct last_request last;
    unsigned long long sessions;       /* created */
    unsigned long long received;       /* requests that receive() read */
    unsigned long long received_bytes; /* their bytes, headers included */
    unsigned long long empty_receives; /* nothing there to read after all */
    unsigned long long reads, direct_reads, writes; /* among received */
    unsigned long long interrupts; /* not among received: answered at once */
};

extern INTERNAL struct filter filter;

/* Find libfuse's own functions; false, with an exception set, if they are not there. */
INTERNAL bool filter_find_libfuse(void);

/* ---- negotiate.c; with the GIL --------------------------------------------------------- */

/* Put our init into a table of operations; the one that was there is called by it. */
INTERNAL void negotiate_install(struct fuse_lowlevel_ops *ops);
INTERNAL bool negotiate_is_installed(const struct fuse_lowlevel_ops *ops);

/* Is this the INIT request? */
INTERNAL bool negotiate_is_init(const struct fuse_buf *buf);

/* Let libfuse process it, by `process`, and add to its reply what the kernel offers.  May leave
 * a Python exception set. */
INTERNAL void negotiate_init(struct fuse_session *se, const struct fuse_buf *buf,
                             void (*process)(struct fuse_session *, const struct fuse_buf *));

/* Answer the request if it is an INTERRUPT, which then is nobody else's.  Returns whether it was. */
INTERNAL bool negotiate_interrupt(int device, const void *request, size_t size);

/* The reply to an open of a file that bypasses the page cache; as fuse_reply_open(). */
INTERNAL int negotiate_open(fuse_req_t request, const struct fuse_file_info *fi);

/* ---- handlers.c; with the GIL ---------------------------------------------------------- */

/* Put the handlers into a table of operations; what was there is called when none is set. */
INTERNAL void handlers_install(struct fuse_lowlevel_ops *ops);

/* The session is gone, and its requests with it. */
INTERNAL void handlers_forget(void);

INTERNAL int handlers_traverse(visitproc visit, void *arg);
INTERNAL void handlers_clear(void);

/* fallocates, lseeks, outstanding. */
INTERNAL PyObject *handlers_statistics(void);

/* Functions of the module. */
INTERNAL PyObject *handlers_set(PyObject *module, PyObject *args, PyObject *keywords);
INTERNAL PyObject *handlers_reply_error(PyObject *module, PyObject *args);
INTERNAL PyObject *handlers_reply_offset(PyObject *module, PyObject *args);

/* ---- pymodule.c; with the GIL ------------------------------------------------------------ */

/* Count a reply of Python's; `result` is 0, or else it failed.  Returns None. */
INTERNAL PyObject *filter_replied(int result);

#endif
