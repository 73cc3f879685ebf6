/* One thread, the helper, that carries a large request while the trio thread goes on to the next.
 *
 * All functions are the trio thread's.  Of what an errand uses nothing may change or go away
 * before large_wait(); and no errand outlives the drain in which it began.
 */
#ifndef SNAPFS_LARGEREQUESTS_H
#define SNAPFS_LARGEREQUESTS_H

#include <stdbool.h>

#define LARGE_INTERNAL __attribute__((visibility("hidden")))

/* Run `errand` in the thread.  False: it cannot, as it has not been waited for since. */
LARGE_INTERNAL bool large_start(void (*errand)(void));

/* Has it been started, and not been waited for since? */
LARGE_INTERNAL bool large_is_out(void);

/* Has it been started, and is over? */
LARGE_INTERNAL bool large_is_back(void);

/* Return when it is over; at once if there is none. */
LARGE_INTERNAL void large_wait(void);

#endif
