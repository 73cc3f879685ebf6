/* See copypool.h.
 *
 * Two threads: the copying of one waits for the locks of the files, the page cache and, if
 * need be, the disk; with more of them first writes become slower.  A temp image that hangs
 * hangs them, and nothing else: the fast path starts no copies then.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "copypool.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

enum {
    THREADS = 2,
    STACK = 256 << 10,
};

#define BUFFER_SIZE ((size_t)4 << 20) /* the largest cluster; touched only as far as used */

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work_to_do = PTHREAD_COND_INITIALIZER;

static struct copy copies[POOL_SIZE];
static uint64_t last_number;  /* trio thread's */
static uint64_t last_taken;   /* under the mutex: copies are taken in the order of numbers */
static int counts[2];         /* trio thread's: by `handed` */
static int ended = -1;        /* eventfd */
static int threads;           /* trio thread's */
static int ended_count;       /* atomic: ended and not freed */

static long long now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static struct copy *next_copy(void)
{
    struct copy *found = NULL;

    if (last_taken == last_number)
        return NULL;
    for (int i = 0; i < POOL_SIZE && !found; i++)
        if (copies[i].state == COPY_QUEUED && copies[i].number == last_taken + 1)
            found = &copies[i];
    return found;
}

static void *run(void *unused)
{
    char *buffer = malloc(BUFFER_SIZE);
    (void)unused;

    pthread_mutex_lock(&mutex);
    for (;;) {
        struct copy *copy = next_copy();
        uint64_t one = 1;
        long long started;

        if (!copy) {
            pthread_cond_wait(&work_to_do, &mutex);
            continue;
        }
        last_taken++;
        copy->state = COPY_RUNNING;
        pthread_mutex_unlock(&mutex);
        started = now();
        copy->error = buffer ? copy_clusters_of(&copy->work, buffer) : ENOMEM;
        copy->nanoseconds = now() - started;
        pthread_mutex_lock(&mutex);
        copy->state = COPY_ENDED;
        __atomic_add_fetch(&ended_count, 1, __ATOMIC_RELEASE);
        if (write(ended, &one, sizeof(one)) < 0)
            abort(); /* an eventfd that takes 2^64 - 2 of them */
    }
    return NULL;
}

/* At the first copy: by then the daemon has become what it stays, and forks no more. */
static bool have_threads(void)
{
    pthread_attr_t attributes;
    sigset_t all, before;

    if (ended < 0)
        ended = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (ended < 0)
        return false;
    if (threads == THREADS)
        return true;
    sigfillset(&all); /* signals are Python's main thread's */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (!pthread_attr_init(&attributes)) {
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        pthread_attr_setstacksize(&attributes, STACK);
        while (threads < THREADS) {
            pthread_t thread;
            if (pthread_create(&thread, &attributes, run, NULL))
                break;
            threads++;
        }
        pthread_attr_destroy(&attributes);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return threads > 0;
}

bool pool_start(uint64_t first, uint64_t stop, const struct cluster_copy *work)
{
    struct copy *copy = NULL;

    if (!have_threads())
        return false;
    pthread_mutex_lock(&mutex);
    for (int i = 0; i < POOL_SIZE && !copy; i++)
        if (copies[i].state == COPY_FREE)
            copy = &copies[i];
    if (copy) {
        *copy = (struct copy){
            .number = ++last_number, .first = first, .stop = stop, .work = *work,
            .state = COPY_QUEUED};
        counts[false]++;
        pthread_cond_signal(&work_to_do);
    }
    pthread_mutex_unlock(&mutex);
    return copy != NULL;
}

int pool_count(bool handed)
{
    return counts[handed];
}

uint64_t pool_covers(uint64_t cluster)
{
    if (!counts[false])
        return 0;
    for (int i = 0; i < POOL_SIZE; i++) /* only the trio thread makes or frees them */
        if (copies[i].number && !copies[i].handed && copies[i].first <= cluster &&
            cluster < copies[i].stop)
            return copies[i].stop;
    return 0;
}

bool pool_has_ended(void)
{
    return __atomic_load_n(&ended_count, __ATOMIC_ACQUIRE) > 0;
}

struct copy *pool_ended(bool handed)
{
    struct copy *found = NULL;

    if (!pool_has_ended() || !counts[handed])
        return NULL;
    pthread_mutex_lock(&mutex);
    for (int i = 0; i < POOL_SIZE && !found; i++)
        if (copies[i].state == COPY_ENDED && copies[i].handed == handed)
            found = &copies[i];
    pthread_mutex_unlock(&mutex);
    return found;
}

struct copy *pool_any(void)
{
    for (int i = 0; i < POOL_SIZE; i++)
        if (copies[i].number && !copies[i].handed)
            return &copies[i];
    return NULL;
}

void pool_hand_over(struct copy *copy)
{
    counts[false]--;
    counts[true]++;
    pthread_mutex_lock(&mutex);
    copy->handed = true;
    pthread_mutex_unlock(&mutex);
}

void pool_free(struct copy *copy)
{
    counts[copy->handed]--;
    pthread_mutex_lock(&mutex);
    copy->state = COPY_FREE;
    copy->number = 0;
    pthread_mutex_unlock(&mutex);
    __atomic_sub_fetch(&ended_count, 1, __ATOMIC_RELEASE);
}

bool pool_wait(int device, long long nanoseconds)
{
    struct pollfd wanted[2] = {{.fd = ended, .events = POLLIN}, {.fd = device, .events = POLLIN}};
    struct timespec time = {.tv_sec = nanoseconds / 1000000000LL,
                            .tv_nsec = nanoseconds % 1000000000LL};

    if (nanoseconds <= 0)
        return false;
    if (ppoll(wanted, 2, &time, NULL) <= 0)
        return false;
    if (wanted[0].revents && !counts[true]) /* else Python's task must see it */
        pool_clear();
    return true;
}

void pool_settle(void)
{
    struct timespec nap = {.tv_nsec = 1000000};

    for (bool running = true; running; nanosleep(&nap, NULL)) {
        running = false;
        pthread_mutex_lock(&mutex);
        for (int i = 0; i < POOL_SIZE; i++)
            running |= copies[i].state == COPY_QUEUED || copies[i].state == COPY_RUNNING;
        pthread_mutex_unlock(&mutex);
    }
}

int pool_descriptor(void)
{
    return ended;
}

void pool_clear(void)
{
    uint64_t count;

    if (read(ended, &count, sizeof(count)) < 0) {
        /* none has ended since the last time */
    }
}
