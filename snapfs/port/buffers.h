/* Memory for requests.  It changes hands: what has been received in it may be kept in it.
 *
 * Trio thread.  A buffer is an ordinary malloc block: who gets one may free() it, too.
 */
#ifndef SNAPFS_BUFFERS_H
#define SNAPFS_BUFFERS_H

#include <stddef.h>

#define BUFFERS_INTERNAL __attribute__((visibility("hidden")))

enum buffer_limits {
    /* The largest WRITE we ask for, a READ is as large: two of them make 1 MiB, which is what
     * programs like, and two processors carry them side by side. */
    MAX_WRITE = 512 << 10,
    /* The kernel wants room for the headers (80 bytes), and for 8 KiB at least. */
    BUFFER_SIZE = MAX_WRITE + (1 << 16),
};

/* BUFFER_SIZE bytes; NULL: there is no memory. */
BUFFERS_INTERNAL void *buffer_new(void);

/* Take one, and put another in its place; NULL: there is no other, and nothing has changed. */
BUFFERS_INTERNAL void *buffer_take(void **buffer);

/* One that is not needed any more, or NULL. */
BUFFERS_INTERNAL void buffer_free(void *buffer);

/* Keep none for later. */
BUFFERS_INTERNAL void buffer_free_all(void);

#endif
