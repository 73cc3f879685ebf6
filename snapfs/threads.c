/* See threads.h. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

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
