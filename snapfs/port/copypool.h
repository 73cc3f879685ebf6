/* Copies of old data for the fast path, in threads of their own.
 *
 * Everything but the copying happens in the trio thread.  A copy is the fast path's until it
 * is landed, or handed to Python, which lands it then.
 *
 * What a copy can be, and what holds then; `durable` ones must survive a power cut:
 *
 *   QUEUED    waits for a thread
 *   RUNNING   a thread copies.  It takes several durable ones at once, and then makes the temp
 *             image durable, once for all of them
 *   ENDED     with an error; or all of it is there, durable if it must be.  Done bits are not set
 *   PROMISED  durable ones only: done bits are set, also in the mapped file, but that is not
 *             durable.  The image must not be overwritten there
 *   FREE      done bits are set, durable if they must be; or Python makes them so
 *
 *   QUEUED -> RUNNING -> ENDED -> FREE, and if durable ENDED -> PROMISED -> FREE
 */
#ifndef SNAPFS_COPYPOOL_H
#define SNAPFS_COPYPOOL_H

#include "clusters.h"

#include <stdbool.h>
#include <stdint.h>

#define POOL_INTERNAL __attribute__((visibility("hidden")))

enum { POOL_SIZE = 128 }; /* copies, those included that are Python's */

enum copy_state { COPY_FREE, COPY_QUEUED, COPY_RUNNING, COPY_ENDED, COPY_PROMISED };

struct copy {
    uint64_t number;           /* never used again */
    uint64_t first, stop;      /* clusters */
    struct cluster_copy work;  /* the thread's from QUEUED to ENDED */
    long long nanoseconds;     /* that it took */
    int error;                 /* errno, 0: all is there */
    enum copy_state state;     /* under the pool's mutex */
    bool handed;               /* to Python */
    bool durable;
    bool covered;              /* PROMISED: by the sync that is under way */
};

/* Begin one.  False if that cannot be; then nothing has happened. */
POOL_INTERNAL bool pool_start(uint64_t first, uint64_t stop, const struct cluster_copy *work,
                              bool durable);

/* How many are the fast path's, and how many Python's. */
POOL_INTERNAL int pool_count(bool handed);

/* Does one that is the fast path's touch the cluster?  Where it stops, else 0. */
POOL_INTERNAL uint64_t pool_covers(uint64_t cluster);

/* Has one of them ENDED? */
POOL_INTERNAL bool pool_has_ended(void);

/* One that has ENDED, of the fast path's or of those handed to Python; NULL: none. */
POOL_INTERNAL struct copy *pool_ended(bool handed);

/* Any that is the fast path's, of those that are PROMISED or of the others; NULL: none. */
POOL_INTERNAL struct copy *pool_any(bool promised);

/* From now on it is Python's. */
POOL_INTERNAL void pool_hand_over(struct copy *copy);

/* Forget one that is over. */
POOL_INTERNAL void pool_free(struct copy *copy);

/* One that has ENDED is PROMISED from now on. */
POOL_INTERNAL void pool_promise(struct copy *copy);

/* Does one that is PROMISED overlap the clusters? */
POOL_INTERNAL bool pool_is_promised(uint64_t first, uint64_t stop);

/* A sync of the done bits begins, which covers all that are PROMISED; false: none is. */
POOL_INTERNAL bool pool_cover(void);

/* It has succeeded: forget those that it covers. */
POOL_INTERNAL void pool_keep_promises(void);

/* Wait until one has ENDED, or somebody calls pool_wake(), or `device` (-1: none) has a request;
 * false: nothing of that in time. */
POOL_INTERNAL bool pool_wait(int device, long long nanoseconds);

/* Return when none is queued or running any more; blocks. */
POOL_INTERNAL void pool_settle(void);

/* Readable when a copy has ended since pool_clear(); -1: there was never one. */
POOL_INTERNAL int pool_descriptor(void);
POOL_INTERNAL void pool_clear(void);

/* As if a copy had ended.  In any thread; after pool_start(). */
POOL_INTERNAL void pool_wake(void);

#endif
