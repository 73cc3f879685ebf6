/* See threads.h.
 *
 * To be woken takes long: on a processor that has nothing else to do in a virtual machine as long
 * as to copy 64 KiB.  Requests that come one after the other bring work for a thread every few
 * hundred microseconds.
 *
 * SCHED_BATCH would let the trio thread go on when it wakes another on its own processor, but
 * beside programs that never sleep such a thread waits for milliseconds.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "threads.h"
#include "clock.h"

#include <sched.h>
#include <signal.h>

#define AWAKE_TIME (3 * SECOND / 10000)
/* None of us keeps a processor for so long, but a program that does not sleep may: it has turns of
 * milliseconds.  And how long not to stay awake then. */
#define LONG_TURN (SECOND / 2000)
#define CROWDED_TIME (SECOND / 10)

static long long crowded_until; /* atomic */

bool thread_begin(void *(*run)(void *), size_t stack)
{
    pthread_attr_t attributes;
    pthread_t thread;
    sigset_t all, before;
    bool good;

    if (pthread_attr_init(&attributes))
        return false;
    sigfillset(&all); /* signals are Python's main thread's */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, stack);
    good = !pthread_create(&thread, &attributes, run, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return good;
}

bool thread_give_way(void)
{
    long long started = nanoseconds(CLOCK_MONOTONIC), ended;

    if (started < __atomic_load_n(&crowded_until, __ATOMIC_RELAXED))
        return false;
    sched_yield();
    ended = nanoseconds(CLOCK_MONOTONIC);
    if (ended - started < LONG_TURN)
        return true;
    __atomic_store_n(&crowded_until, ended + CROWDED_TIME, __ATOMIC_RELAXED);
    return false;
}

static long long idle_time(const struct idling *idling)
{
    return nanoseconds(CLOCK_MONOTONIC) - idling->since;
}

void thread_idle(struct idling *idling, const int *work, pthread_cond_t *changed,
                 pthread_mutex_t *mutex)
{
    if (!idling->since) {
        idling->since = nanoseconds(CLOCK_MONOTONIC);
        idling->awake = true;
    }
    if (idling->last > AWAKE_TIME || !idling->awake) {
        pthread_cond_wait(changed, mutex);
        return;
    }
    pthread_mutex_unlock(mutex);
    while (idling->awake && !__atomic_load_n(work, __ATOMIC_RELAXED))
        idling->awake = thread_give_way() && idle_time(idling) < AWAKE_TIME;
    pthread_mutex_lock(mutex);
}

void thread_work(struct idling *idling)
{
    if (idling->since)
        idling->last = idle_time(idling);
    idling->since = 0;
}
