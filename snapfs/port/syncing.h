/* Syncs of the done bits for the fast path, in a thread of its own; no Python.
 *
 * Trio thread.  One sync is under way at a time.  A drain opens the file, and closes it whether
 * a sync is under way or not.
 */
#ifndef SNAPFS_SYNCING_H
#define SNAPFS_SYNCING_H

#include <stdbool.h>

#define SYNC_INTERNAL __attribute__((visibility("hidden")))

enum sync_state { SYNC_NONE, SYNC_UNDER_WAY, SYNC_GOOD, SYNC_FAILED };

/* An open file description of its own of the file that is open as `fd`, and a descriptor of it;
 * -1 with errno.  In any thread. */
SYNC_INTERNAL int sync_reopen(int fd);

/* Have that file open from now on, for the rest of the drain.  False if that cannot be, or the
 * sync of an earlier drain is still under way. */
SYNC_INTERNAL bool sync_open(int fd);

/* Begin to make durable what the file has now.  It is open, and no sync is under way. */
SYNC_INTERNAL void sync_begin(void);

/* Has a sync ended that nobody has looked at? */
SYNC_INTERNAL bool sync_has_ended(void);

/* What has become of it; SYNC_NONE the next time if it has ended. */
SYNC_INTERNAL enum sync_state sync_look(void);

/* The file is not needed any more.  What a sync that is under way gives is nobody's. */
SYNC_INTERNAL void sync_close(void);

#endif
