/* See copypool.h.
 *
 * Two threads: the copying of one waits for the locks of the files, the page cache and, if
 * need be, the disk; with more of them first writes become slower.  A temp image that hangs
 * hangs them, and nothing else: the fast path starts no copies then.
 *
 * Durable copies.  While one thread syncs the other copies: that is why nobody takes more than
 * half of what there is, if there are many.  Each group has an open file description of its own
 * for its sync, opened before anything of the group is written.  An error of writing back is
 * told once to each description that was open then, and the pages are clean afterwards: with a
 * description that two share, the one that syncs first would take the error of the other's data,
 * whose sync then succeeds.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "copypool.h"
#include "clock.h"
#include "syncing.h"
#include "threads.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum {
    THREADS = 2,
    STACK = 256 << 10,
    /* Durable copies that share a sync. */
    GROUP = 16,
    LEAST_SHARE = GROUP / 2, /* that a thread may take, however few there are */
};

#define COMPANY_TIME (SECOND / 10000) /* to wait for another copy to share a sync */
/* For copies that took no longer lately, to wait for them without sleeping: from the page cache,
 * or with a sync that several share.  To be woken may take as long as a copy. */
#define AWAKE_TIME (SECOND / 2500)

#define BUFFER_SIZE ((size_t)4 << 20) /* the largest cluster; touched only as far as used */

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work_to_do = PTHREAD_COND_INITIALIZER;

static struct copy copies[POOL_SIZE];
static uint64_t last_number;  /* the trio thread's, which changes it under the mutex */
static uint64_t last_taken;   /* under the mutex: copies are taken in the order of numbers */
static int queued_count;      /* changed under the mutex, atomic */
static int last_count;        /* under the mutex: how many shared the last sync */
static long long last_time;   /* atomic: what the last copy took, with its share of a sync */
static int counts[2];         /* trio thread's: by `handed` */
static int ended = -1;        /* eventfd */
static int threads;           /* trio thread's */
static int ended_count;       /* atomic: how many have ENDED */
static int promised_count;    /* trio thread's */

static long long now(void)
{
    return nanoseconds(CLOCK_MONOTONIC);
}

/* With the mutex. */
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

/* How many durable copies one thread may take.  With the mutex. */
static int share(void)
{
    int count = 0;

    for (int i = 0; i < POOL_SIZE; i++)
        count += copies[i].state == COPY_QUEUED || copies[i].state == COPY_RUNNING;
    count = (count + 1) / 2;
    return count < LEAST_SHARE ? LEAST_SHARE : count < GROUP ? count : GROUP;
}

/* The next copy for a thread: any for its first, then what can share the first one's sync; NULL:
 * none.  With the mutex. */
static struct copy *take(const struct copy *first, int count)
{
    struct copy *copy = next_copy();

    if (copy && first &&
        (!copy->durable || copy->work.target != first->work.target || count >= share()))
        copy = NULL;
    if (copy) {
        copy->state = COPY_RUNNING;
        last_taken++;
        __atomic_sub_fetch(&queued_count, 1, __ATOMIC_RELAXED);
    }
    return copy;
}

/* The next copy for a group, which may come a little later: those who write side by side do so
 * again, one after the other, as soon as they have been answered. */
static struct copy *take_next(const struct copy *first, int count)
{
    long long until = now() + COMPANY_TIME;
    struct timespec time = {.tv_sec = until / SECOND, .tv_nsec = until % SECOND};
    struct copy *copy;
    bool waits;

    pthread_mutex_lock(&mutex);
    waits = last_count > 1 && count < LEAST_SHARE;
    while (!(copy = take(first, count)) && waits && last_taken == last_number)
        waits = !pthread_cond_clockwait(&work_to_do, &mutex, CLOCK_MONOTONIC, &time);
    if (!copy && last_taken < last_number)
        pthread_cond_signal(&work_to_do); /* it may have been for the other thread */
    pthread_mutex_unlock(&mutex);
    return copy;
}

static void transfer_out(struct copy *copy, char *buffer)
{
    long long started = now();

    copy->error = buffer ? copy_clusters_of(&copy->work, buffer) : ENOMEM;
    copy->nanoseconds = now() - started;
}

/* A copy, and others that come meanwhile.  All of them are there and durable in the end, or have
 * an error.  Returns how many. */
static int transfer_out_durably(struct copy *group[GROUP], char *buffer)
{
    int fd = sync_reopen(group[0]->work.target), error = fd < 0 ? errno : 0, good = 0, count = 0;
    long long started;

    for (struct copy *copy = group[0]; copy; copy = error ? NULL : take_next(group[0], count)) {
        const off_t offset = copy->work.offset; /* of what is left to do */

        group[count++] = copy;
        copy->error = error;
        if (!error)
            transfer_out(copy, buffer);
        good += !copy->error;
        /* Let the disk begin.  It waits for nothing, so it takes no error from fdatasync(); its
         * own may be of any page that it meets.  A container may forbid it. */
        if (!copy->error && copy->work.written &&
            sync_file_range(fd, offset, copy->work.end - offset, SYNC_FILE_RANGE_WRITE) &&
            errno != ENOSYS && errno != EPERM)
            error = errno;
    }
    started = now();
    if (good && fdatasync(fd) && !error)
        error = errno;
    for (int i = 0; i < count; i++) {
        group[i]->nanoseconds += (now() - started) / count;
        if (!group[i]->error)
            group[i]->error = error;
    }
    if (fd >= 0)
        close(fd);
    return count;
}

/* The next copy for a thread that has none, when there is one. */
static struct copy *wait_for_copy(struct idling *idling)
{
    struct copy *copy;

    pthread_mutex_lock(&mutex);
    while (!(copy = take(NULL, 0)))
        thread_idle(idling, &queued_count, &work_to_do, &mutex);
    pthread_mutex_unlock(&mutex);
    thread_work(idling);
    return copy;
}

static void *run(void *unused)
{
    char *buffer = malloc(BUFFER_SIZE);
    struct idling idling = {.last = LLONG_MAX};
    (void)unused;

    for (;;) {
        struct copy *group[GROUP] = {wait_for_copy(&idling)};
        int count = 1;

        if (group[0]->durable)
            count = transfer_out_durably(group, buffer);
        else
            transfer_out(group[0], buffer);
        __atomic_store_n(&last_time, group[0]->nanoseconds, __ATOMIC_RELAXED);
        pthread_mutex_lock(&mutex);
        last_count = count;
        for (int i = 0; i < count; i++)
            group[i]->state = COPY_ENDED;
        __atomic_add_fetch(&ended_count, count, __ATOMIC_RELEASE);
        pthread_mutex_unlock(&mutex);
        pool_wake();
    }
    return NULL;
}

static bool have_threads(void)
{
    if (ended < 0)
        ended = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    while (ended >= 0 && threads < THREADS && thread_begin(run, STACK))
        threads++;
    return threads > 0;
}

bool pool_start(uint64_t first, uint64_t stop, const struct cluster_copy *work, bool durable)
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
            .state = COPY_QUEUED, .durable = durable};
        counts[false]++;
        __atomic_add_fetch(&queued_count, 1, __ATOMIC_RELAXED);
    }
    pthread_mutex_unlock(&mutex);
    if (copy)
        pthread_cond_signal(&work_to_do);
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

struct copy *pool_any(bool promised)
{
    struct copy *found = NULL;

    pthread_mutex_lock(&mutex);
    for (int i = 0; i < POOL_SIZE && !found; i++)
        if (copies[i].number && !copies[i].handed &&
            (copies[i].state == COPY_PROMISED) == promised)
            found = &copies[i];
    pthread_mutex_unlock(&mutex);
    return found;
}

void pool_hand_over(struct copy *copy)
{
    counts[false]--;
    counts[true]++;
    pthread_mutex_lock(&mutex);
    copy->handed = true;
    pthread_mutex_unlock(&mutex);
}

/* One that has ENDED, or is PROMISED, becomes something else.  With the mutex. */
static void become(struct copy *copy, enum copy_state state)
{
    if (copy->state == COPY_PROMISED)
        promised_count--;
    else
        __atomic_sub_fetch(&ended_count, 1, __ATOMIC_RELEASE);
    copy->state = state;
    if (state == COPY_PROMISED) {
        promised_count++;
    } else {
        copy->number = 0;
        counts[copy->handed]--;
    }
}

void pool_free(struct copy *copy)
{
    pthread_mutex_lock(&mutex);
    become(copy, COPY_FREE);
    pthread_mutex_unlock(&mutex);
}

void pool_promise(struct copy *copy)
{
    pthread_mutex_lock(&mutex);
    become(copy, COPY_PROMISED);
    pthread_mutex_unlock(&mutex);
}

bool pool_is_promised(uint64_t first, uint64_t stop)
{
    bool found = false;

    if (!promised_count)
        return false;
    pthread_mutex_lock(&mutex);
    for (int i = 0; i < POOL_SIZE && !found; i++)
        found = copies[i].state == COPY_PROMISED && copies[i].first < stop &&
                first < copies[i].stop;
    pthread_mutex_unlock(&mutex);
    return found;
}

bool pool_cover(void)
{
    if (!promised_count)
        return false;
    pthread_mutex_lock(&mutex);
    for (int i = 0; i < POOL_SIZE; i++)
        copies[i].covered = copies[i].state == COPY_PROMISED;
    pthread_mutex_unlock(&mutex);
    return true;
}

void pool_keep_promises(void)
{
    pthread_mutex_lock(&mutex);
    for (int i = 0; i < POOL_SIZE; i++)
        if (copies[i].state == COPY_PROMISED && copies[i].covered)
            become(&copies[i], COPY_FREE);
    pthread_mutex_unlock(&mutex);
}

bool pool_wait(int device, long long nanoseconds)
{
    struct pollfd wanted[2] = {{.fd = ended, .events = POLLIN}, {.fd = device, .events = POLLIN}};
    const long long until = now() + nanoseconds;
    long long left = nanoseconds, awake = 0;
    int found = 0;

    if (nanoseconds <= 0)
        return false;
    if (counts[false] && __atomic_load_n(&last_time, __ATOMIC_RELAXED) < AWAKE_TIME)
        awake = AWAKE_TIME < nanoseconds ? AWAKE_TIME : nanoseconds;
    while (!found && nanoseconds - left < awake) {
        found = poll(wanted, 2, 0);
        if (!found && !thread_give_way())
            awake = 0;
        left = until - now();
    }
    if (!found && left > 0) {
        struct timespec time = {.tv_sec = left / SECOND, .tv_nsec = left % SECOND};
        found = ppoll(wanted, 2, &time, NULL);
    }
    if (found <= 0)
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

void pool_wake(void)
{
    uint64_t one = 1;

    if (write(ended, &one, sizeof(one)) < 0)
        abort(); /* an eventfd that takes 2^64 - 2 of them */
}
