/* Copies of old data for the fast path, in threads of their own.
 *
 * Everything but the copying happens in the trio thread.  A copy is the fast path's until it
 * is landed, or handed to Python, which lands it then.
 */
#ifndef SNAPFS_COPYPOOL_H
#define SNAPFS_COPYPOOL_H

#include "clusters.h"

#include <stdbool.h>
#include <stdint.h>

#define POOL_INTERNAL __attribute__((visibility("hidden")))

enum { POOL_SIZE = 128 }; /* copies, those included that are Python's */

enum copy_state { COPY_FREE, COPY_QUEUED, COPY_RUNNING, COPY_ENDED };

struct copy {
    uint64_t number;           /* never used again */
    uint64_t first, stop;      /* clusters */
    struct cluster_copy work;  /* the thread's from QUEUED to ENDED */
    long long nanoseconds;     /* that it took */
    int error;                 /* errno, 0: all is there */
    enum copy_state state;     /* under the pool's mutex */
    bool handed;               /* to Python */
};

/* Begin one.  False if that cannot be; then nothing has happened. */
POOL_INTERNAL bool pool_start(uint64_t first, uint64_t stop, const struct cluster_copy *work);

/* How many are the fast path's, and how many Python's. */
POOL_INTERNAL int pool_count(bool handed);

/* Does one that is the fast path's touch the cluster?  Where it stops, else 0. */
POOL_INTERNAL uint64_t pool_covers(uint64_t cluster);

/* Is one of them over? */
POOL_INTERNAL bool pool_has_ended(void);

/* One that is over, of the fast path's or of those handed to Python; NULL: none. */
POOL_INTERNAL struct copy *pool_ended(bool handed);

/* Any that is the fast path's, over or not; NULL: none. */
POOL_INTERNAL struct copy *pool_any(void);

/* From now on it is Python's. */
POOL_INTERNAL void pool_hand_over(struct copy *copy);

/* Forget one that is over. */
POOL_INTERNAL void pool_free(struct copy *copy);

/* Wait until one is over, or `device` (-1: none) has a request; false: neither in time. */
POOL_INTERNAL bool pool_wait(int device, long long nanoseconds);

/* Return when none is queued or running any more; blocks. */
POOL_INTERNAL void pool_settle(void);

/* Readable when a copy has ended since pool_clear(); -1: there was never one. */
POOL_INTERNAL int pool_descriptor(void);
POOL_INTERNAL void pool_clear(void);

#endif
