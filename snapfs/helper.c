/* See helper.h. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "helper.h"
#include "threads.h"

#include <pthread.h>
#include <stddef.h>

enum { STACK = 64 << 10 };

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

static bool have_thread;      /* trio thread's, as what follows */
static bool out;
static void (*errand)(void);  /* under the mutex; NULL: none, or it is over */

static void *run(void *unused)
{
    (void)unused;
    pthread_mutex_lock(&mutex);
    for (;;) {
        void (*current)(void) = errand;

        if (!current) {
            pthread_cond_wait(&changed, &mutex);
            continue;
        }
        pthread_mutex_unlock(&mutex);
        current();
        pthread_mutex_lock(&mutex);
        __atomic_store_n(&errand, NULL, __ATOMIC_RELEASE);
        pthread_cond_broadcast(&changed);
    }
    return NULL;
}

bool helper_start(void (*wanted)(void))
{
    if (out || !(have_thread = have_thread || thread_begin(run, STACK)))
        return false;
    pthread_mutex_lock(&mutex);
    errand = wanted;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&mutex);
    return out = true;
}

bool helper_is_out(void)
{
    return out;
}

bool helper_is_back(void)
{
    return out && !__atomic_load_n(&errand, __ATOMIC_ACQUIRE);
}

void helper_wait(void)
{
    if (!out)
        return;
    pthread_mutex_lock(&mutex);
    while (errand)
        pthread_cond_wait(&changed, &mutex);
    pthread_mutex_unlock(&mutex);
    out = false;
}
