/* See transfer.h.
 *
 * What may block.  Reads use RWF_NOWAIT.  One that finds a page missing has begun to read
 * ahead (filemap_get_pages() in mm/filemap.c), so that trying again makes sense.  A large read
 * is sent as references to the pages of the page cache, and so is copied once, not twice; a page
 * that is not there would be waited for, so mincore(2) is asked before whether all is, for a
 * mapping.  When mapping itself may wait is at may_map().
 *
 * Writes use RWF_NOWAIT where the file system can (XFS, btrfs).  ext4 cannot: there a write of
 * a part of a page first makes sure that the page is cached, since it would be read otherwise;
 * and when a write has taken long, for dirty-page throttling or a journal that waits for the
 * disk, the following ones go to Python's threads for a while.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "transfer.h"
#include "buffers.h"
#include "largerequests.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

enum {
    PAGE = 4096,
    REPLY_ALIGNMENT = 2 << 20, /* a huge page, if there is one */
    /* From here on references take less time than a second copy; as long as it is in few parts.
     * A pipe has room for as many pages, those of the ends of the pieces, and the header. */
    LEAST_PIPED = 128 << 10,
    MOST_PIPED = 512 << 10,
    MOST_PIECES = 16,
    PIPE_SIZE = 2 * MOST_PIPED, /* what anybody may ask for: /proc/sys/fs/pipe-max-size */
    /* From here on the helper carries a request while the trio thread goes on to the next: that
     * takes longer than to wake it. */
    LEAST_ERRAND = 256 << 10,
};

/* A write that took longer was not one to the page cache alone. */
#define SLOW_WRITE (10 * SECOND / 1000)
#define SLOW_PAUSE (SECOND / 2)

struct transfer_counters carried;

static char *reply;              /* FASTPATH_MAX_READ bytes, or NULL until needed */
static bool no_pipes;            /* they could not be had */
static bool write_nowait = true; /* until the file system says it cannot */
static long long slow_until;     /* writes go to Python before this time; atomic */
static bool any_speed;           /* not then either; atomic */

bool transfer_prepare(void)
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

void transfer_reset(void)
{
    write_nowait = true;
    no_pipes = false;
    __atomic_store_n(&slow_until, 0, __ATOMIC_RELAXED);
}

void transfer_any_speed(bool any)
{
    __atomic_store_n(&any_speed, any, __ATOMIC_RELAXED);
}

bool transfer_reply(int device, uint64_t unique, int error, const void *data, size_t length)
{
    struct fuse_out_header out = {
        .len = (uint32_t)(sizeof(out) + length), .error = -error, .unique = unique};
    struct iovec parts[2] = {{&out, sizeof(out)}, {(void *)data, length}};

    if (writev(device, parts, length ? 2 : 1) >= 0)
        return true;
    __atomic_fetch_add(&carried.failed_replies, 1, __ATOMIC_RELAXED);
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

/* Not without RWF_NOWAIT: a network file system may ask its server when a file is mapped.  Not
 * while no write may pass: of a file that we may not write mincore(2) says that all of it is
 * there (can_do_mincore() in mm/mincore.c). */
static bool may_map(const struct piece *piece)
{
    const struct piece first = {piece->fd, -1, piece->offset, 1};
    char byte;

    return state.writable && read_cached(&first, &byte) == FASTPATH_ANSWERED;
}

/* Is all of it in the page cache, and not just on its way there?  Nobody touches the mapping. */
static bool is_cached(const struct piece *piece)
{
    unsigned char present[FASTPATH_MAX_READ / PAGE + 1];
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), before = piece->offset % page;
    const size_t size = before + piece->length, pages = (size + page - 1) / page;
    void *start;
    bool good;

    if (pages > sizeof(present) || !may_map(piece))
        return false;
    start = mmap(NULL, size, PROT_READ, MAP_SHARED, piece->fd, (off_t)(piece->offset - before));
    if (start == MAP_FAILED)
        return false;
    good = !mincore(start, size, present);
    for (size_t i = 0; good && i < pages; i++)
        good = present[i] & 1;
    munmap(start, size);
    return good;
}

/* ---- what could not be written back ------------------------------------------------------- */

#define BEYOND (1LL << 62) /* a place at which no file has a page; the same in watch.py */

/* Neither writes nor waits (storage/watch.py).  A container may forbid it. */
static void ask(int watch)
{
    if (sync_file_range(watch, BEYOND, 1, SYNC_FILE_RANGE_WAIT_BEFORE) && errno != ENOSYS &&
        errno != EPERM)
        state.suspect = true;
}

/* The same of what holds the files: ext4 loses some without a word to them, but has counted an
 * error before (storage/systemerrors.py). */
static void ask_system(const struct file_system *system)
{
    char text[32];
    ssize_t length = pread(system->fd, text, sizeof(text) - 1, 0);

    text[length > 0 ? length : 0] = 0;
    if (strtoll(text, NULL, 10) != system->first)
        state.suspect = true;
}

/* Was something of these files not written back since they were asked last, or of the image, of
 * which they have copies?  To be called when the data is there: a page is gone only after the
 * kernel has noted the error, so what was read in its place is noticed. */
static bool is_lost(const struct piece *pieces, int count)
{
    bool asked = false;

    for (int i = 0; i < count; i++) {
        if (pieces[i].watch < 0)
            continue;
        asked = true;
        if (pieces[i].watch != state.watch)
            ask(pieces[i].watch);
    }
    if (asked && state.watch >= 0)
        ask(state.watch);
    for (int i = 0; asked && i < state.system_count; i++)
        ask_system(&state.systems[i]);
    return asked && state.suspect;
}

/* ---- large reads: from the page cache to the kernel through a pipe ----------------------- */

/* A reply, as references to pages, on its way to the kernel.  One is being filled while the
 * helper sends the other. */
struct pipeful {
    bool open;
    int ends[2];
    int device;
    uint64_t unique;
    uint64_t offset; /* of the request, as its length */
    size_t length;
};

static struct pipeful pipes[2];
static int filling; /* which one is not the helper's */

static void close_pipe(struct pipeful *pipeful)
{
    if (pipeful->open) {
        close(pipeful->ends[0]);
        close(pipeful->ends[1]);
    }
    pipeful->open = false;
}

static bool open_pipe(struct pipeful *pipeful)
{
    if (pipeful->open)
        return true;
    pipeful->open = !pipe2(pipeful->ends, O_CLOEXEC | O_NONBLOCK);
    if (pipeful->open && fcntl(pipeful->ends[1], F_SETPIPE_SZ, PIPE_SIZE) < PIPE_SIZE)
        close_pipe(pipeful);
    return pipeful->open;
}

/* The one to fill, and if the helper, which may just be closing it, has not the other, that, too:
 * without it the first would be of no use when the helper has it. */
static bool open_pipes(void)
{
    no_pipes = no_pipes || !open_pipe(&pipes[filling]) ||
               (!large_is_out() && !open_pipe(&pipes[!filling]));
    return !no_pipes;
}

/* Puts the references there; false: not all.  Copies nothing, and waits for nothing but a page
 * that has gone since, and where the file system locks out readers while it writes, for that. */
static bool fill_pipe(struct pipeful *pipeful, uint64_t unique, const struct piece *pieces,
                      int count)
{
    const struct fuse_out_header header = {
        .len = (uint32_t)(sizeof(header) + pipeful->length), .unique = unique};

    if (write(pipeful->ends[1], &header, sizeof(header)) != sizeof(header))
        return false;
    for (int i = 0; i < count; i++) {
        loff_t position = (loff_t)pieces[i].offset;
        size_t left = pieces[i].length;
        while (left) {
            ssize_t moved = splice(pieces[i].fd, &position, pipeful->ends[1], NULL, left,
                                   SPLICE_F_NONBLOCK);
            if (moved <= 0)
                return false;
            left -= (size_t)moved;
        }
    }
    return true;
}

/* What is sent is sent, whatever the kernel says to it; see transfer_reply(). */
static void send_pipe(struct pipeful *pipeful)
{
    const size_t size = sizeof(struct fuse_out_header) + pipeful->length;

    if (splice(pipeful->ends[0], NULL, pipeful->device, NULL, size, 0) == (ssize_t)size)
        return;
    /* The kernel may not have come to look for the request (ENOMEM, for one).  If it has, the
     * request has been answered, and this is nobody's, and counted there. */
    if (transfer_reply(pipeful->device, pipeful->unique, EIO, NULL, 0))
        __atomic_fetch_add(&carried.failed_replies, 1, __ATOMIC_RELAXED);
    close_pipe(pipeful); /* with what is left in it */
}

/* What the helper carries, while it is out. */
static struct {
    struct pipeful *pipeful; /* a READ, else NULL */
    void *buffer;            /* a WRITE, until it is collected, else NULL */
    size_t size;
    int device;
    bool good;
} errand;

static void send_answer(void)
{
    send_pipe(errand.pipeful);
}

/* Lets the helper send it; false: it is not here. */
static bool let_helper_send(struct pipeful *pipeful)
{
    if (large_is_back() && !errand.buffer)
        large_wait();
    if (errand.buffer || large_is_out())
        return false;
    errand.pipeful = pipeful;
    return large_start(send_answer);
}

/* Answers with the pages of the page cache themselves.  False: nothing was sent.
 *
 * Not beside Python's tasks: one may punch or zero a part of the file, which on XFS locks readers
 * out for as long as it takes. */
static bool read_piped(int device, uint64_t unique, const struct piece *pieces, int count,
                       size_t length)
{
    struct pipeful *pipeful = &pipes[filling];
    bool good = !state.busy && count <= MOST_PIECES && length <= MOST_PIPED && open_pipes();

    for (int i = 0; good && i < count; i++)
        good = is_cached(&pieces[i]);
    if (!good)
        return false;
    pipeful->device = device;
    pipeful->unique = unique;
    pipeful->offset = pieces[0].offset;
    pipeful->length = length;
    if (!fill_pipe(pipeful, unique, pieces, count) || is_lost(pieces, count)) {
        close_pipe(pipeful);
        return false;
    }
    carried.piped++;
    if (length >= LEAST_ERRAND && let_helper_send(pipeful))
        filling = !filling;
    else
        send_pipe(pipeful);
    return true;
}

enum fastpath_verdict transfer_read(int device, uint64_t unique, const struct piece *pieces,
                                 int count)
{
    size_t length = 0, done = 0;

    for (int i = 0; i < count; i++)
        length += pieces[i].length;
    if (length >= LEAST_PIPED && read_piped(device, unique, pieces, count, length))
        return FASTPATH_ANSWERED;
    for (int i = 0; i < count; i++) {
        enum fastpath_verdict verdict = read_cached(&pieces[i], reply + done);
        if (verdict != FASTPATH_ANSWERED)
            return verdict;
        done += pieces[i].length;
    }
    if (is_lost(pieces, count))
        return FASTPATH_PYTHONS;
    transfer_reply(device, unique, 0, reply, length);
    return FASTPATH_ANSWERED;
}

/* ---- writing --------------------------------------------------------------------------- */

/* Whether a page that is written in part at this place is there. */
static enum fastpath_verdict page_cached(uint64_t offset)
{
    struct piece piece = {state.image, -1, offset, 1};
    char byte;

    return read_cached(&piece, &byte);
}

static ssize_t put(const void *data, size_t length, uint64_t offset)
{
    long long started = nanoseconds(CLOCK_MONOTONIC);
    ssize_t written = pwrite(state.image, data, length, (off_t)offset);

    if (nanoseconds(CLOCK_MONOTONIC) - started > SLOW_WRITE) {
        __atomic_fetch_add(&carried.slow_writes, 1, __ATOMIC_RELAXED);
        __atomic_store_n(&slow_until, nanoseconds(CLOCK_MONOTONIC) + SLOW_PAUSE,
                         __ATOMIC_RELAXED);
    }
    return written;
}

static bool is_slow(void)
{
    return !__atomic_load_n(&any_speed, __ATOMIC_RELAXED) &&
           nanoseconds(CLOCK_MONOTONIC) < __atomic_load_n(&slow_until, __ATOMIC_RELAXED);
}

/* Nothing is overwritten that the helper sends: it may be for a snapshot. */
static void mind_the_reader(size_t length, uint64_t offset)
{
    const struct pipeful *reader = large_is_out() ? errand.pipeful : NULL;

    if (reader && reader->offset < offset + length && offset < reader->offset + reader->length)
        large_wait();
}

enum fastpath_verdict transfer_write(const void *data, size_t length, uint64_t offset)
{
    struct iovec part = {(void *)data, length};
    enum fastpath_verdict cached = FASTPATH_ANSWERED;

    mind_the_reader(length, offset);
    if (write_nowait) {
        ssize_t written = pwritev2(state.image, &part, 1, (off_t)offset, RWF_NOWAIT);
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
    if (is_slow())
        return FASTPATH_PYTHONS;
    return put(data, length, offset) == (ssize_t)length ? FASTPATH_ANSWERED : FASTPATH_PYTHONS;
}

/* Not where writes with RWF_NOWAIT work: two at once would get in each other's way. */
bool transfer_may_take(size_t length, uint64_t offset)
{
    return length >= LEAST_ERRAND && !write_nowait && offset % PAGE == 0 &&
           (offset + length) % PAGE == 0 && !is_slow() && (!large_is_out() || large_is_back());
}

static void transfer_request(void)
{
    const struct fuse_in_header *in = errand.buffer;
    const struct fuse_write_in *arg = (const void *)(in + 1);
    const struct fuse_write_out out = {.size = arg->size};

    errand.good = put(arg + 1, arg->size, arg->offset) == (ssize_t)arg->size;
    if (errand.good)
        transfer_reply(errand.device, in->unique, 0, &out, sizeof(out));
}

bool transfer_take(int device, void **buffer, size_t size)
{
    void *taken;

    if (errand.buffer || large_is_out() || !(taken = buffer_take(buffer)))
        return false;
    errand.pipeful = NULL;
    errand.buffer = taken;
    errand.size = size;
    errand.device = device;
    if (large_start(transfer_request))
        return true;
    buffer_free(*buffer);
    *buffer = taken;
    errand.buffer = NULL;
    return false;
}

bool transfer_is_writing(void)
{
    return errand.buffer != NULL;
}

bool transfer_collect(void **buffer, size_t *size, bool *good)
{
    large_wait();
    *buffer = errand.buffer;
    *size = errand.size;
    *good = errand.good;
    errand.buffer = NULL;
    return *buffer != NULL;
}
