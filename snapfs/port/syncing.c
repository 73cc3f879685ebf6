/* See syncing.h.
 *
 * The open file description is its own, and is opened before a bit is set that it is to make
 * durable.  An error of writing back is told once to each description that was open then, and
 * the page is clean afterwards: the next sync of the others' would succeed.  Whoever else syncs
 * the file meanwhile, as Python may, thus takes no error from us, nor we from them.
 *
 * A sync that hangs keeps the thread, and the file, for as long as it does; meanwhile nothing
 * is opened.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "syncing.h"
#include "copypool.h"
#include "threads.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <unistd.h>

enum { STACK = 64 << 10 };

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wanted = PTHREAD_COND_INITIALIZER;

static bool have_thread;               /* trio thread's */
static int file = -1;                  /* under the mutex, as what follows */
static enum sync_state state = SYNC_NONE;
static bool closed;                    /* the thread is to close the file */

int sync_reopen(int fd)
{
    char path[64];

    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    return open(path, O_RDWR | O_CLOEXEC);
}

static void *run(void *unused)
{
    (void)unused;
    pthread_mutex_lock(&mutex);
    for (;;) {
        int fd = file;
        bool good;

        if (state != SYNC_UNDER_WAY) {
            pthread_cond_wait(&wanted, &mutex);
            continue;
        }
        pthread_mutex_unlock(&mutex);
        good = !fdatasync(fd);
        pthread_mutex_lock(&mutex);
        state = good ? SYNC_GOOD : SYNC_FAILED;
        if (closed) {
            file = -1;
            state = SYNC_NONE;
            closed = false;
            /* Without the mutex, which the trio thread takes: the file may have been removed
             * meanwhile, and goes now. */
            pthread_mutex_unlock(&mutex);
            close(fd);
            pthread_mutex_lock(&mutex);
        } else {
            pool_wake();
        }
    }
    return NULL;
}

bool sync_open(int fd)
{
    bool good;

    if (!(have_thread = have_thread || thread_begin(run, STACK)))
        return false;
    pthread_mutex_lock(&mutex);
    if (file < 0)
        file = sync_reopen(fd);
    good = file >= 0 && !closed;
    pthread_mutex_unlock(&mutex);
    return good;
}

void sync_begin(void)
{
    pthread_mutex_lock(&mutex);
    state = SYNC_UNDER_WAY;
    pthread_cond_signal(&wanted);
    pthread_mutex_unlock(&mutex);
}

bool sync_has_ended(void)
{
    enum sync_state found = __atomic_load_n(&state, __ATOMIC_RELAXED);

    return found == SYNC_GOOD || found == SYNC_FAILED;
}

enum sync_state sync_look(void)
{
    enum sync_state found;

    pthread_mutex_lock(&mutex);
    found = state;
    if (state != SYNC_UNDER_WAY)
        state = SYNC_NONE;
    pthread_mutex_unlock(&mutex);
    return found;
}

void sync_close(void)
{
    pthread_mutex_lock(&mutex);
    if (state == SYNC_UNDER_WAY) {
        closed = true;
    } else {
        if (file >= 0)
            close(file);
        file = -1;
        state = SYNC_NONE;
    }
    pthread_mutex_unlock(&mutex);
}
