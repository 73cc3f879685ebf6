/* See buffers.h.
 *
 * Some are kept for later: malloc() would give them back to the system, and have each page of a
 * new one zeroed by the kernel when it is touched, which takes as long as to receive a request.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "buffers.h"

#include <stdlib.h>

enum {
    ALIGNMENT = 4096,
    MOST_SPARE = 8,
};

static void *spare[MOST_SPARE];
static int count;

void *buffer_new(void)
{
    void *buffer;

    if (count)
        return spare[--count];
    return posix_memalign(&buffer, ALIGNMENT, BUFFER_SIZE) ? NULL : buffer;
}

void *buffer_take(void **buffer)
{
    void *taken = *buffer, *other = buffer_new();

    if (!other)
        return NULL;
    *buffer = other;
    return taken;
}

void buffer_free(void *buffer)
{
    if (buffer && count < MOST_SPARE)
        spare[count++] = buffer;
    else
        free(buffer);
}

void buffer_free_all(void)
{
    while (count)
        free(spare[--count]);
}
