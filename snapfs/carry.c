/* See carry.h.
 *
 * What may block.  Reads use RWF_NOWAIT.  One that finds a page missing has begun to read
 * ahead (filemap_get_pages() in mm/filemap.c), so that trying again makes sense.  A large read
 * is sent from a mapping of the page cache, and so is copied once, not twice; a page that is not
 * there would be waited for, so mincore(2) is asked before whether all is.  When mapping itself
 * may wait, or fail, is at may_map().
 *
 * Writes use RWF_NOWAIT where the file system can (XFS, btrfs).  ext4 cannot: there a write of
 * a part of a page first makes sure that the page is cached, since it would be read otherwise;
 * and when a write has taken long, for dirty-page throttling or a journal that waits for the
 * disk, the following ones go to Python's threads for a while.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "carry.h"

#include <errno.h>
#include <linux/fuse.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

enum {
    PAGE = 4096,
    REPLY_ALIGNMENT = 2 << 20, /* a huge page, if there is one */
    /* From here on mapping takes less time than a second copy; as long as it is in few parts. */
    LEAST_MAPPED = 128 << 10,
    MOST_WINDOWS = 16,
};

/* A write that took longer was not one to the page cache alone. */
#define SLOW_WRITE (10 * SECOND / 1000)
#define SLOW_PAUSE (SECOND / 2)

struct carry_counters carried;

static char *reply;              /* FASTPATH_MAX_READ bytes, or NULL until needed */
static bool write_nowait = true; /* until the file system says it cannot */
static long long slow_until;     /* writes go to Python before this time */

bool carry_prepare(void)
{
    if (reply)
        return true;
    if (posix_memalign((void **)&reply, REPLY_ALIGNMENT, FASTPATH_MAX_READ)) {
        reply = NULL;
        return false;
    }
    madvise(reply, FASTPATH_MAX_READ, MADV_HUGEPAGE);
    return true;
}

void carry_reset(void)
{
    write_nowait = true;
    slow_until = 0;
}

bool carry_reply(int device, uint64_t unique, int error, const void *data, size_t length)
{
    struct fuse_out_header out = {
        .len = (uint32_t)(sizeof(out) + length), .error = -error, .unique = unique};
    struct iovec parts[2] = {{&out, sizeof(out)}, {(void *)data, length}};

    if (writev(device, parts, length ? 2 : 1) >= 0)
        return true;
    carried.failed_replies++;
    return false;
}

/* ---- reading --------------------------------------------------------------------------- */

/* Reads all of a piece from the page cache; FASTPATH_KEPT: it is not there. */
static enum fastpath_verdict read_cached(const struct piece *piece, void *data)
{
    struct iovec part = {data, piece->length};
    ssize_t count = preadv2(piece->fd, &part, 1, (off_t)piece->offset, RWF_NOWAIT);

    if (count == (ssize_t)piece->length)
        return FASTPATH_ANSWERED;
    return count >= 0 || errno == EAGAIN ? FASTPATH_KEPT : FASTPATH_PYTHONS;
}

/* A piece of a file, mapped where nothing but the kernel looks at it, on our behalf. */
struct window {
    void *start; /* of the mapping, at a page */
    size_t size;
    struct iovec data;
};

/* Not without RWF_NOWAIT: a network file system may ask its server when a file is mapped.  Not
 * while no write may pass: who cuts the image leaves nothing under the mapping, and the read
 * would fail; and of a file that we may not write mincore(2) says that all of it is there
 * (can_do_mincore() in mm/mincore.c). */
static bool may_map(const struct piece *piece)
{
    const struct piece first = {piece->fd, piece->offset, 1};
    char byte;

    return state.writable && read_cached(&first, &byte) == FASTPATH_ANSWERED;
}

static bool open_window(struct window *window, const struct piece *piece)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), before = piece->offset % page;

    window->size = before + piece->length;
    window->start = mmap(NULL, window->size, PROT_READ, MAP_SHARED, piece->fd,
                         (off_t)(piece->offset - before));
    window->data = (struct iovec){(char *)window->start + before, piece->length};
    return window->start != MAP_FAILED;
}

/* Is all of it in the page cache, and not just on its way there? */
static bool is_cached(const struct window *window)
{
    unsigned char present[FASTPATH_MAX_READ / PAGE + 1];
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    const size_t pages = (window->size + page - 1) / page;

    if (pages > sizeof(present) || mincore(window->start, window->size, present))
        return false;
    for (size_t i = 0; i < pages; i++)
        if (!(present[i] & 1))
            return false;
    return true;
}

/* Answers with the pages of the page cache themselves.  False: nothing was sent. */
static bool read_mapped(int device, uint64_t unique, const struct piece *pieces, int count,
                        size_t length)
{
    struct fuse_out_header out = {.len = (uint32_t)(sizeof(out) + length), .unique = unique};
    struct window windows[MOST_WINDOWS];
    struct iovec parts[MOST_WINDOWS + 1] = {{&out, sizeof(out)}};
    bool good = count <= MOST_WINDOWS;
    int opened = 0;

    while (good && opened < count) {
        good = may_map(&pieces[opened]) && open_window(&windows[opened], &pieces[opened]);
        if (good) {
            good = is_cached(&windows[opened]);
            parts[opened + 1] = windows[opened].data;
            opened++;
        }
    }
    if (good && writev(device, parts, count + 1) < 0)
        carried.failed_replies++;
    while (opened--)
        munmap(windows[opened].start, windows[opened].size);
    carried.mapped += good;
    return good;
}

enum fastpath_verdict carry_read(int device, uint64_t unique, const struct piece *pieces,
                                 int count)
{
    size_t length = 0, done = 0;

    for (int i = 0; i < count; i++)
        length += pieces[i].length;
    if (length >= LEAST_MAPPED && read_mapped(device, unique, pieces, count, length))
        return FASTPATH_ANSWERED;
    for (int i = 0; i < count; i++) {
        enum fastpath_verdict verdict = read_cached(&pieces[i], reply + done);
        if (verdict != FASTPATH_ANSWERED)
            return verdict;
        done += pieces[i].length;
    }
    carry_reply(device, unique, 0, reply, length);
    return FASTPATH_ANSWERED;
}

/* ---- writing --------------------------------------------------------------------------- */

/* Whether a page that is written in part at this place is there. */
static enum fastpath_verdict page_cached(uint64_t offset)
{
    struct piece piece = {state.image, offset, 1};
    char byte;

    return read_cached(&piece, &byte);
}

enum fastpath_verdict carry_write(const void *data, size_t length, uint64_t offset)
{
    struct iovec part = {(void *)data, length};
    long long started;
    ssize_t written;
    enum fastpath_verdict cached = FASTPATH_ANSWERED;

    if (write_nowait) {
        written = pwritev2(state.image, &part, 1, (off_t)offset, RWF_NOWAIT);
        if (written >= 0 || errno != EOPNOTSUPP)
            return written == (ssize_t)length ? FASTPATH_ANSWERED : FASTPATH_PYTHONS;
        write_nowait = false;
    }
    if (offset % PAGE)
        cached = page_cached(offset);
    if (cached == FASTPATH_ANSWERED && (offset + length) % PAGE)
        cached = page_cached(offset + length - 1);
    if (cached != FASTPATH_ANSWERED)
        return cached;
    started = nanoseconds(CLOCK_MONOTONIC);
    if (started < slow_until)
        return FASTPATH_PYTHONS;
    written = pwrite(state.image, data, length, (off_t)offset);
    if (nanoseconds(CLOCK_MONOTONIC) - started > SLOW_WRITE) {
        carried.slow_writes++;
        slow_until = nanoseconds(CLOCK_MONOTONIC) + SLOW_PAUSE;
    }
    return written == (ssize_t)length ? FASTPATH_ANSWERED : FASTPATH_PYTHONS;
}
