/* Copying clusters from one file to another; no Python. */
#ifndef SNAPFS_CLUSTERS_H
#define SNAPFS_CLUSTERS_H

#include <stddef.h>
#include <sys/types.h>

struct cluster_copy {
    int source, target;
    off_t offset, end; /* what is left to do; the offset is a multiple of the cluster size */
    size_t cluster_size;
    off_t written, budget; /* bytes */
};

/* Bytes held in memory at a time. */
static inline size_t cluster_copy_step(size_t cluster_size)
{
    return cluster_size > (size_t)1 << 20 ? cluster_size : (size_t)1 << 20;
}

/* Copies; returns 0, or an errno.  `buffer` has a step, or the whole length if that is less.
 * Holes of the source are skipped without reading, clusters that are all zeros not written.
 * Stops early where the source ends.  Blocks. */
__attribute__((visibility("hidden"))) int copy_clusters_of(struct cluster_copy *copy,
                                                           char *buffer);

#endif
