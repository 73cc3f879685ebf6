/* Threads of the fast path beside the trio thread. */
#ifndef SNAPFS_THREADS_H
#define SNAPFS_THREADS_H

#include <stdbool.h>
#include <stddef.h>

/* Begin a thread that lives as long as the daemon; false: it cannot be.  At the first work, not
 * before: by then the daemon has become what it stays, and forks no more. */
__attribute__((visibility("hidden"))) bool thread_begin(void *(*run)(void *), size_t stack);

/* The calling thread never takes a processor from one that is at work there when it is woken: the
 * trio thread, which wakes it, would be stopped halfway through a drain, with others idle. */
__attribute__((visibility("hidden"))) void thread_be_patient(void);

#endif
