/* See threads.h.
 *
 * To be woken takes long: on a processor that has nothing else to do in a virtual machine as long
 * as to copy 64 KiB.  Requests that come one after the other bring work for a thread every few
 * hundred microseconds.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "threads.h"
#include "clock.h"

#include <sched.h>
#include <signal.h>

#define AWAKE_TIME (3 * SECOND / 10000)

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

void thread_be_patient(void)
{
    const struct sched_param none = {0};

    sched_setscheduler(0, SCHED_BATCH, &none); /* a container may forbid it: no harm */
}

static long long idle_time(const struct idling *idling)
{
    return nanoseconds(CLOCK_MONOTONIC) - idling->since;
}

void thread_idle(struct idling *idling, const int *work, pthread_cond_t *changed,
                 pthread_mutex_t *mutex)
{
    if (!idling->since)
        idling->since = nanoseconds(CLOCK_MONOTONIC);
    if (idling->last > AWAKE_TIME || idle_time(idling) > AWAKE_TIME) {
        pthread_cond_wait(changed, mutex);
        return;
    }
    pthread_mutex_unlock(mutex);
    while (!__atomic_load_n(work, __ATOMIC_RELAXED) && idle_time(idling) <= AWAKE_TIME)
        sched_yield(); /* who wants this processor gets it */
    pthread_mutex_lock(mutex);
}

void thread_work(struct idling *idling)
{
    if (idling->since)
        idling->last = idle_time(idling);
    idling->since = 0;
}
