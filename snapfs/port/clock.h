/* Time, in nanoseconds. */
#ifndef SNAPFS_CLOCK_H
#define SNAPFS_CLOCK_H

#include <time.h>

#define SECOND 1000000000LL

static inline long long nanoseconds(clockid_t clock)
{
    struct timespec time;

    clock_gettime(clock, &time);
    return time.tv_sec * SECOND + time.tv_nsec;
}

#endif
