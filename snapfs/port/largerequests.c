/* See largerequests.h. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "largerequests.h"
#include "threads.h"

#include <limits.h>
#include <pthread.h>
#include <stddef.h>

enum { STACK = 64 << 10 };

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

static bool have_thread;      /* trio thread's, as what follows */
static bool out;
static void (*errand)(void);  /* under the mutex */
static int under_way;         /* changed under the mutex, atomic: 0: none, or it is over */

static void *run(void *unused)
{
    struct idling idling = {.last = LLONG_MAX};
    (void)unused;

    pthread_mutex_lock(&mutex);
    for (;;) {
        void (*current)(void) = errand;

        if (!under_way) {
            thread_idle(&idling, &under_way, &changed, &mutex);
            continue;
        }
        pthread_mutex_unlock(&mutex);
        thread_work(&idling);
        current();
        pthread_mutex_lock(&mutex);
        __atomic_store_n(&under_way, 0, __ATOMIC_RELEASE);
        pthread_cond_broadcast(&changed);
    }
    return NULL;
}

bool large_start(void (*wanted)(void))
{
    if (out || !(have_thread = have_thread || thread_begin(run, STACK)))
        return false;
    pthread_mutex_lock(&mutex);
    errand = wanted;
    __atomic_store_n(&under_way, 1, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&mutex);
    pthread_cond_broadcast(&changed);
    return out = true;
}

bool large_is_out(void)
{
    return out;
}

bool large_is_back(void)
{
    return out && !__atomic_load_n(&under_way, __ATOMIC_ACQUIRE);
}

void large_wait(void)
{
    if (!out)
        return;
    pthread_mutex_lock(&mutex);
    while (under_way)
        pthread_cond_wait(&changed, &mutex);
    pthread_mutex_unlock(&mutex);
    out = false;
}
