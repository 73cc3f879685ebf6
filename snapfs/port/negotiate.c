/* What is agreed on with the kernel: when the session begins, and at each open.
 *
 * libfuse before 3.17 cannot be asked for some of it.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "requestfilter.h"
#include "buffers.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <stddef.h>
#include <string.h>
#include <unistd.h>

enum {
    /* Readahead and asynchronous direct I/O in flight; the kernel's default is 12. */
    MAX_BACKGROUND = 64,
    CONGESTION_THRESHOLD = 48,
};

#ifndef FUSE_HANDLE_KILLPRIV_V2
#define FUSE_HANDLE_KILLPRIV_V2 (1 << 28) /* linux/fuse.h since 5.11 */
#endif
#ifndef FOPEN_PARALLEL_DIRECT_WRITES
#define FOPEN_PARALLEL_DIRECT_WRITES (1 << 6) /* since 6.2; older kernels do not look at it */
#endif

static void (*original)(void *, struct fuse_conn_info *); /* the caller's init; NULL: none */

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
    if (conn->max_write > MAX_WRITE)
        conn->max_write = MAX_WRITE;
    /* max_readahead already is the most that the kernel offers. */
    if (original)
        original(userdata, conn);
}

void negotiate_install(struct fuse_lowlevel_ops *ops)
{
    original = ops->init;
    ops->init = on_init;
}

bool negotiate_is_installed(const struct fuse_lowlevel_ops *ops)
{
    return ops->init == on_init;
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
void negotiate_init(struct fuse_session *se, const struct fuse_buf *buf,
                    void (*process)(struct fuse_session *, const struct fuse_buf *))
{
    const struct fuse_init_in *in =
        (const void *)((const char *)buf->mem + sizeof(struct fuse_in_header));
    int fd = fuse_session_fd(se), device = fcntl(fd, F_DUPFD_CLOEXEC, 0), ends[2];
    uint32_t offered = in->flags; /* before libfuse sees, and may reuse, the buffer */
    char reply[512];
    ssize_t size;

    if (device < 0 || pipe2(ends, O_CLOEXEC | O_NONBLOCK) < 0) {
        process(se, buf);
    } else {
        if (dup3(ends[1], fd, O_CLOEXEC) < 0) {
            process(se, buf);
        } else {
            process(se, buf);
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

bool negotiate_is_init(const struct fuse_buf *buf)
{
    return buf->size >= sizeof(struct fuse_in_header) + offsetof(struct fuse_init_in, flags) +
                            sizeof(uint32_t) &&
           ((const struct fuse_in_header *)buf->mem)->opcode == FUSE_INIT;
}

/* Says that interrupts are not for us: nobody here ends a request early.  The kernel takes that, and
 * sends no more of them, if the request is still under way; else the next one is told.  libfuse must
 * not see them: it keeps those whose request it does not know, and looks through them at each request. */
bool negotiate_interrupt(int device, const void *request, size_t size)
{
    const struct fuse_in_header *in = request;
    struct fuse_out_header out = {.len = sizeof(out), .error = -ENOSYS};

    if (size < sizeof(*in) || in->opcode != FUSE_INTERRUPT)
        return false;
    out.unique = in->unique;
    filter.interrupts++;
    (void)!write(device, &out, sizeof(out));
    return true;
}

/* Without the flag each write(2) holds the kernel's lock of the inode until it is answered, so
 * that one whose old data takes long to copy holds up all others.  The kernel allows them side by
 * side only through handles that bypass the page cache, as long as none uses it. */
int negotiate_open(fuse_req_t request, const struct fuse_file_info *fi)
{
    struct fuse_open_out out = {
        .fh = fi->fh, .open_flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES};

    if (fi->keep_cache)
        out.open_flags |= FOPEN_KEEP_CACHE;
    return fuse_reply_buf(request, (const char *)&out, sizeof(out));
}
