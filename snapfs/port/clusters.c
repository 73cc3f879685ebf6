/* Copying clusters from one file to another, the inner loop of
 * copy-before-write.
 *
 * It reads and writes; it does not use copy_file_range(2), which reflinks on
 * XFS and btrfs and so makes later in-place writes of the image allocate.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "clusters.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>
#include <unistd.h>

static bool is_zero(const char *data, size_t size)
{
    return size == 0 || (data[0] == 0 && memcmp(data, data + 1, size - 1) == 0);
}

/* Returns the number of bytes read, less than `size` only at the end of the
 * file, or -1 with errno set. */
static ssize_t read_full(int fd, char *data, size_t size, off_t offset)
{
    size_t done = 0;

    while (done < size) {
        ssize_t count = pread(fd, data + done, size - done, offset + (off_t)done);
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0)
            return -1;
        if (count == 0)
            break;
        done += (size_t)count;
    }
    return (ssize_t)done;
}

static int write_full(int fd, const char *data, size_t size, off_t offset)
{
    while (size > 0) {
        ssize_t count = pwrite(fd, data, size, offset);
        if (count < 0 && errno == EINTR)
            continue;
        if (count == 0)
            errno = EIO; /* no progress */
        if (count <= 0)
            return -1;
        data += count;
        size -= (size_t)count;
        offset += count;
    }
    return 0;
}

/* Write `size` bytes from `start` of the data for copy->offset on. */
static int write_run(struct cluster_copy *copy, const char *data, size_t start, size_t size)
{
    if ((off_t)size > copy->budget - copy->written) {
        errno = ENOSPC;
        return -1;
    }
    if (write_full(copy->target, data + start, size, copy->offset + (off_t)start))
        return -1;
    copy->written += (off_t)size;
    return 0;
}

/* Write the clusters of `data` that are not all zeros, each run of them at once. */
static int write_nonzero(struct cluster_copy *copy, const char *data, size_t size)
{
    size_t start = 0, position = 0;

    while (position < size) {
        size_t left = size - position;
        size_t cluster = left < copy->cluster_size ? left : copy->cluster_size;
        bool zero = is_zero(data + position, cluster);

        if (zero) {
            if (write_run(copy, data, start, position - start))
                return -1;
            start = position + cluster;
        }
        position += cluster;
    }
    return write_run(copy, data, start, size - start);
}

int copy_clusters_of(struct cluster_copy *copy, char *buffer)
{
    off_t step = (off_t)cluster_copy_step(copy->cluster_size);
    off_t size;
    int error = 0;

    while (copy->offset < copy->end) {
        off_t data = lseek(copy->source, copy->offset, SEEK_DATA);
        ssize_t count;

        if (data < 0 && errno == ENXIO)
            break; /* nothing but a hole up to the end */
        if (data < 0) {
            error = errno;
            break;
        }
        data -= data % (off_t)copy->cluster_size;
        if (data > copy->offset)
            copy->offset = data;
        if (copy->offset >= copy->end)
            break;
        size = copy->end - copy->offset;
        count = read_full(copy->source, buffer, (size_t)(size < step ? size : step),
                          copy->offset);
        if (count < 0 || write_nonzero(copy, buffer, (size_t)count)) {
            error = errno;
            break;
        }
        if (count == 0)
            break; /* the end of the file */
        copy->offset += count;
    }
    return error;
}
