"""The native request filter in front of pyfuse3: its loader and its typed face.

`snapfs.port._requestfilter` (requestfilter.c) stands in for some functions of libfuse that
pyfuse3 calls.  That works only if it is in the process's global symbol scope before
pyfuse3 is loaded, so `load()` comes first: before anything imports pyfuse3.

Everything here but `invalidate_range` is called from the trio thread and never blocks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..port import _requestfilter
else:

    class _NotLoaded:
        def __getattr__(self, name: str) -> object:
            raise RuntimeError("requestfilter.load() has not been called")

    _requestfilter = _NotLoaded()

__all__ = [
    "FallocateHandler",
    "LseekHandler",
    "activity_words",
    "attached",
    "configure",
    "copies_fd",
    "copy_times",
    "direct_read",
    "ended_copies",
    "fastpath_statistics",
    "handle_closed",
    "handle_opened",
    "invalidate_range",
    "load",
    "region_reads",
    "reply_error",
    "reply_offset",
    "reply_read",
    "reply_write",
    "set_fastpath",
    "set_handlers",
    "statistics",
    "synchronous_write",
    "try_requests",
    "unset_fastpath",
]

FallocateHandler = Callable[[int, int, int, int, int, int], object]
"""(request, ino, fh, mode, offset, length); offset and length in bytes."""

Published = tuple[
    int,
    int,
    int,
    int,
    bool,
    bool,
    list[object],
    bool,
    list[tuple[int, int]],
    list[tuple[int, int]],
    list[tuple[int, int]],
    list[tuple[int, int, int, int, bool, bool, object, object]],
    tuple[int, object] | None,
    object,
    object,
    object,
    int,
    list[tuple[int, int]],
]
"""The engine's state: descriptor of the image and of what hears that it was not written back (or
-1), its size, log2 of the cluster size, whether writes may pass, whether a task is in a handler;
dirty bitmaps, and whether their bits must be durable; ranges of clusters that are frozen, being
copied, and promised; layers, oldest first (inode, size, the same two descriptors of the temp
image, readable, live, access, done); if copies must survive a power cut, descriptor and bitmap
of the file of done bits of the layer that receives them; pending; the page with the record of
activity; mapped pages that have failed, where they are counted and how many had; and of the file
systems that count their errors a descriptor of the count, and what it was. Bitmaps and page are
writable buffers."""

LseekHandler = Callable[[int, int, int, int, int], object]
"""(request, ino, fh, offset, whence); whence is SEEK_DATA or SEEK_HOLE."""

_loaded = False


def load() -> None:
    """Load the extension into the global symbol scope; further calls do nothing.

    Raises RuntimeError if pyfuse3 is loaded already (it is then bound to libfuse itself)
    and ImportError, saying how to build it, if the extension is missing.
    """
    global _loaded, _requestfilter  # noqa: PLW0603 - once per process, as the extension
    if _loaded:
        return
    if "pyfuse3" in sys.modules:
        raise RuntimeError("snapfs.fuse.requestfilter.load() must run before pyfuse3 is imported")
    if "snapfs.port._requestfilter" in sys.modules:
        raise RuntimeError("snapfs.port._requestfilter was imported directly: use load()")
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_GLOBAL | os.RTLD_NOW)
    try:
        from ..port import _requestfilter  # noqa: PLC0415 - the flags matter
    except ImportError as error:
        raise ImportError(
            f"the extension snapfs.port._requestfilter cannot be loaded ({error}); it is built by"
            " 'pip install .' in the source tree, which needs a C compiler and the headers of"
            " Python and libfuse 3 (Debian: gcc python3-dev libfuse3-dev)",
            name="snapfs.port._requestfilter",
        ) from error
    finally:
        sys.setdlopenflags(flags)
    _loaded = True


def attached() -> bool:
    """Whether the filter stands in front of a live session.

    True from pyfuse3.init() to pyfuse3.close().  False after an init() means that pyfuse3
    went past the filter: do not serve anything then.
    """
    return _requestfilter.attached()


def configure(*, receive: bool) -> None:
    """Switch the filter's own reading of /dev/fuse on (the default) or off.

    Off, libfuse reads, and `direct_read` and `synchronous_write` are always False.  May be
    changed at any time.
    """
    _requestfilter.configure(receive=receive)


def set_handlers(
    *, fallocate: FallocateHandler | None = None, lseek: LseekHandler | None = None
) -> None:
    """Set both handlers; None removes one.

    They are called synchronously in the trio thread and must not block: they start a task.
    Each request must be answered exactly once, by `reply_error` or (lseek only)
    `reply_offset`; its number is valid until then and never used again.  If a handler raises,
    the exception goes to sys.unraisablehook and the request is answered with EIO.  Without a
    handler fallocate is EOPNOTSUPP and lseek EINVAL.
    """
    _requestfilter.set_handlers(fallocate=fallocate, lseek=lseek)


def reply_error(request: int, errno: int) -> None:
    """Answer `request` with an errno from 1 to 511, a fallocate also with 0: success.

    Never ENOSYS: the kernel would not ask again during the life of the mount.  A reply that
    the kernel no longer wants (interrupted, unmounted) is only counted.

    Raises ValueError, and sends nothing, if the request is not outstanding or the errno
    cannot answer it.
    """
    _requestfilter.reply_error(request, errno)


def reply_offset(request: int, offset: int) -> None:
    """Answer the lseek `request` with an offset in bytes.  Raises as `reply_error`."""
    _requestfilter.reply_offset(request, offset)


def activity_words() -> dict[str, int]:
    """The index of each word of the record of activity, by name, as native code has it."""
    return _requestfilter.activity_words()


def direct_read() -> bool:
    """Whether the request received last is a READ that bypasses the page cache.

    Valid in Operations.read until its first await.
    """
    return _requestfilter.direct_read()


def synchronous_write() -> bool:
    """Whether the request received last is a WRITE with O_DSYNC or O_SYNC, by whatever means.

    Valid in Operations.write until its first await.  The kernel itself syncs after a write
    through the page cache; what bypasses that is ours.
    """
    return _requestfilter.synchronous_write()


def invalidate_range(ino: int, offset: int, length: int) -> None:
    """Drop the kernel's cached pages that overlap [offset, offset + length), and attributes.

    Blocks while a page there is being read or written back, which may need the trio thread:
    call it from another thread.  An inode that the kernel does not know is fine.

    Raises ValueError unless offset >= 0 and length > 0, OSError with ENODEV when there is no
    session (any more), other OSErrors from the kernel.
    """
    _requestfilter.invalidate_range(ino, offset, length)


def set_fastpath(
    publish: Callable[[bool], Published | None],
    lend: Callable[[int], int],
    finish: Callable[
        [
            int,
            int,
            int,
            int,
            list[tuple[int, int]],
            list[tuple[int, int, int]],
            list[tuple[int, int, int, bytes]],
            list[tuple[int, int, int, int, bool]],
        ],
        None,
    ],
) -> bool:
    """Switch the fast path (fastpath.c) on; False if it cannot be on this machine.

    All three are called synchronously in the trio thread, within a call to pyfuse3 that drains
    /dev/fuse.  What `publish` returns is used until that call returns, and the buffers are held
    as long; None: not now.  `lend(bytes)` lends temp space for copies and returns how much.

    `finish` is called at the end of a drain in which space was lent or something is left:
    `finish(lent, written, clusters, nanoseconds, promises, copies, writes, reads)`, bytes lent, and
    written by copies that landed, of so many clusters, in that time; promises, ranges of clusters
    among them whose done bits are to be made durable; copies (number, first and last
    cluster, exclusive) that are Python's from now on, see `ended_copies`; and writes (unique,
    handle, offset, data) and reads (unique, handle, offset, length, direct) that Python is to
    carry out and answer by `reply_write` and `reply_read`.

    If `publish` or `finish` raises, or returns nonsense, the exception goes to
    sys.unraisablehook and the fast path is off from then on.
    """
    return _requestfilter.set_fastpath(publish, lend, finish)


def unset_fastpath() -> None:
    """Switch the fast path off."""
    _requestfilter.set_fastpath()


def ended_copies() -> list[tuple[int, int, int, int]]:
    """Copies that are Python's and have ended: (number, errno or 0, bytes, nanoseconds).

    Each is returned once.  No copies are made natively while one of Python's is left.
    """
    return _requestfilter.ended_copies()


def copies_fd() -> int:
    """A descriptor that is readable when a copy has ended since the last look."""
    return _requestfilter.copies_fd()


def reply_read(unique: int, error: int, data: bytes | bytearray | memoryview) -> None:
    """Answer a READ that was handed to `finish`: with an errno, or 0 and the data."""
    _requestfilter.reply_read(unique, error, data)


def reply_write(unique: int, error: int, size: int) -> None:
    """Answer a WRITE that was handed to `finish`: with an errno, or 0 and the bytes written."""
    _requestfilter.reply_write(unique, error, size)


def handle_opened(number: int, inode: int) -> None:
    """The reply to an open will carry this handle; the fast path serves only what it knows."""
    _requestfilter.handle_opened(number, inode)


def handle_closed(number: int) -> None:
    """The handle has been released."""
    _requestfilter.handle_closed(number)


def try_requests(device: int, requests: list[bytes], *, patient: bool = True) -> list[int]:
    """Answer requests as if they had been read from `device` in one drain.  For tests.

    For each 0: Python's, 1: answered, 2: kept until its copies had landed or its data had
    come.  Unless `patient` the drain ends before that can be; else when `device` has a request.
    """
    return _requestfilter.try_requests(device, requests, patient)


def fastpath_statistics() -> dict[str, int]:
    """Of the fast path since the process started.

    `on`: whether it is.  Requests answered: reads and writes of the image, snapshot_reads.
    slow_writes: those that took so long that the next ones were left to threads.
    piped: reads that were sent from the page cache itself, without a copy of ours.
    cold: those that waited for data from the disk.
    failed_replies: the kernel did not want them any more.
    """
    return _requestfilter.fastpath_statistics()


def region_reads() -> tuple[int, list[int]]:
    """Reads of snapshots by the fast path: bytes of a region of the image, and of each how many.

    0: there was none yet.  They begin anew when regions get another size (engine/regions.py).
    """
    return _requestfilter.region_reads()


def copy_times() -> list[int]:
    """Copies that the fast path has made since the process started, by `copytimes.BOUNDS`."""
    return _requestfilter.copy_times()


def statistics() -> dict[str, int]:
    """Counters since the process started; requests count once the filter has read them.

    sessions received received_bytes empty_receives reads direct_reads writes fallocates
    lseeks replies failed_replies invalidations, interrupts (they are no requests of anybody's:
    answered at once, and not received), and outstanding: how many fallocate and
    lseek requests wait for their reply now.
    """
    return _requestfilter.statistics()
