/* Threads of the fast path beside the trio thread. */
#ifndef SNAPFS_THREADS_H
#define SNAPFS_THREADS_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>

#define THREAD_INTERNAL __attribute__((visibility("hidden")))

/* How a thread waits for work: {.last = LLONG_MAX} at first. */
struct idling {
    long long since; /* nanoseconds; 0: it works */
    long long last;  /* how long it was idle before */
    bool awake;
};

/* Begin a thread that lives as long as the daemon; false: it cannot be.  At the first work, not
 * before: by then the daemon has become what it stays, and forks no more. */
THREAD_INTERNAL bool thread_begin(void *(*run)(void *), size_t stack);

/* Give way to whoever wants this processor.  False: to stay awake is no use now, as programs that
 * never sleep keep the processor for so long that who is woken comes sooner. */
THREAD_INTERNAL bool thread_give_way(void);

/* Wait for `*work` to be more than 0 or for `changed`, and like pthread_cond_wait() at times for
 * nothing.  Stays awake for a while, if the last work came that soon. */
THREAD_INTERNAL void thread_idle(struct idling *idling, const int *work, pthread_cond_t *changed,
                                 pthread_mutex_t *mutex);

/* There is work. */
THREAD_INTERNAL void thread_work(struct idling *idling);

#endif
