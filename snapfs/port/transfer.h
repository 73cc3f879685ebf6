/* How the bytes of a request get from and to the files, and its reply to the kernel.
 *
 * No judgement: what may be read or written is decided before.  Trio thread, without the GIL.
 */
#ifndef SNAPFS_TRANSFER_H
#define SNAPFS_TRANSFER_H

#include "published.h"

#include <stddef.h>

enum transfer_limits {
    /* The largest READ that is answered; larger ones do not occur (max_pages 256). */
    FASTPATH_MAX_READ = 1 << 20,
};

enum fastpath_verdict {
    FASTPATH_PYTHONS,  /* nothing was sent, and nothing changed but dirty bits */
    FASTPATH_ANSWERED,
    FASTPATH_KEPT,     /* it waits for copies or for data; it will be answered */
};

struct transfer_counters {
    unsigned long long slow_writes, failed_replies, piped;
};

extern INTERNAL struct transfer_counters carried;

/* A part of a READ: bytes of one file. */
struct piece {
    int fd;
    int watch; /* to be asked after reading: see is_lost() in transfer.c; -1: need not be */
    uint64_t offset;
    size_t length;
};

/* Get what it takes; false: there is no memory. */
INTERNAL bool transfer_prepare(void);

/* Forget what was found about the image's file system and disk: it may be another one. */
INTERNAL void transfer_reset(void);

/* Whether no write counts as slow, for tests: what they see must not depend on the machine. */
INTERNAL void transfer_any_speed(bool any);

/* Send a reply: a header, and the data if there is any.  Whatever the kernel says to it, the
 * request has been answered: it was interrupted, or the mount is gone.  Returns whether it took
 * it. */
INTERNAL bool transfer_reply(int device, uint64_t unique, int error, const void *data,
                          size_t length);

/* Answer a READ with the pieces, one after the other, if all are in the page cache.
 * FASTPATH_KEPT: they are not.  A large one may be under way until transfer_collect().  If what
 * was read may not be what was written, it is Python's, and the state is suspect. */
INTERNAL enum fastpath_verdict transfer_read(int device, uint64_t unique, const struct piece *pieces,
                                          int count);

/* Write to the image, all of it, without waiting for the disk as far as that can be known.  If it
 * is Python's, some of it may have been written.  FASTPATH_KEPT: nothing has, a page is cold. */
INTERNAL enum fastpath_verdict transfer_write(const void *data, size_t length, uint64_t offset);

/* Would it be good to have the helper carry a WRITE? */
INTERNAL bool transfer_may_take(size_t length, uint64_t offset);

/* Have it carry the WRITE in the buffer, which is taken, and answer it if that went well.  False:
 * nothing has happened. */
INTERNAL bool transfer_take(int device, void **buffer, size_t size);

/* Is there a WRITE that has not been collected? */
INTERNAL bool transfer_is_writing(void);

/* Wait for what the helper carries.  True: that was a WRITE, in this buffer of the caller's now,
 * and was it carried?  If not, some of it may have been written. */
INTERNAL bool transfer_collect(void **buffer, size_t *size, bool *good);

#endif
