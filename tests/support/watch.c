/* Loaded before all else (LD_PRELOAD): tells a test of the calls that matter to a disk, those
 * included that native threads make.
 *
 * `watch` is told before a call and after it, never of calls that it makes itself.  What it
 * returns after a sync or a hint is the errno that it gives, although it has been carried out;
 * what it returns before a splice, of whose target it is told, is what that gives instead.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/types.h>

enum kind { SYNC, WRITE, OPEN, HINT, SPLICE };

typedef int watch_t(int kind, int after, int fd, long long offset, long long size, int error);

static watch_t *told;
static __thread int inside;

void watch(watch_t *whom)
{
    told = whom;
}

static int tell(enum kind kind, int after, int fd, off_t offset, size_t size, int error)
{
    int result = 0, before = errno;

    if (told && !inside) {
        inside = 1;
        result = told(kind, after, fd, offset, (long long)size, error);
        inside = 0;
    }
    errno = before;
    return result;
}

#define REAL(name, ...)                                                                      \
    static int (*real)(__VA_ARGS__);                                                         \
    if (!real)                                                                               \
        real = (int (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

int fdatasync(int fd)
{
    REAL(fdatasync, int);
    int error, result;

    tell(SYNC, 0, fd, 0, 0, 0);
    result = real(fd);
    error = tell(SYNC, 1, fd, 0, 0, result ? errno : 0);
    if (!error)
        return result;
    errno = error;
    return -1;
}

int sync_file_range(int fd, off64_t offset, off64_t size, unsigned flags)
{
    REAL(sync_file_range, int, off64_t, off64_t, unsigned);
    int result = real(fd, offset, size, flags);
    int error = tell(HINT, 1, fd, offset, (size_t)size, result ? errno : 0);

    if (!error)
        return result;
    errno = error;
    return -1;
}

ssize_t splice(int from, off64_t *start, int to, off64_t *where, size_t size, unsigned flags)
{
    static ssize_t (*real)(int, off64_t *, int, off64_t *, size_t, unsigned);
    int error = tell(SPLICE, 0, to, 0, size, 0);

    if (!real)
        real = (ssize_t(*)(int, off64_t *, int, off64_t *, size_t, unsigned))dlsym(RTLD_NEXT,
                                                                                    "splice");
    if (!error)
        return real(from, start, to, where, size, flags);
    errno = error;
    return -1;
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset)
{
    static ssize_t (*real)(int, const void *, size_t, off64_t);
    ssize_t result;

    if (!real)
        real = (ssize_t(*)(int, const void *, size_t, off64_t))dlsym(RTLD_NEXT, "pwrite64");
    tell(WRITE, 0, fd, offset, size, 0);
    result = real(fd, data, size, offset);
    tell(WRITE, 1, fd, offset, size, result < 0 ? errno : 0);
    return result;
}

static mode_t mode_of(int flags, va_list more)
{
    return flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;
}

int open64(const char *path, int flags, ...)
{
    REAL(open64, const char *, int, ...);
    va_list more;
    int fd;

    va_start(more, flags);
    fd = real(path, flags, mode_of(flags, more));
    va_end(more);
    if (fd >= 0)
        tell(OPEN, 1, fd, 0, 0, 0);
    return fd;
}

int openat64(int directory, const char *path, int flags, ...)
{
    REAL(openat64, int, const char *, int, ...);
    va_list more;
    int fd;

    va_start(more, flags);
    fd = real(directory, path, flags, mode_of(flags, more));
    va_end(more);
    if (fd >= 0)
        tell(OPEN, 1, fd, 0, 0, 0);
    return fd;
}
