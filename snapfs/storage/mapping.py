"""Files mapped into memory, made ready so that nothing can fail that need not.

What touches a page that cannot be had gets SIGBUS.  So before a file is mapped all of
its space is allocated, blocks that it shares with a copy (a reflink) become its own, and each
page is read once.  What fails all the same, later, does not end the process: the
page is replaced, and the mapping has `failed` (port/mappings.c).

Everything blocks.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable, Iterable

from ..port._mappings import Mapping, counter, failures

__all__ = [
    "Mapping",
    "counter",
    "failure_of_any",
    "failures",
    "map_file",
    "set_nocow",
    "shares_blocks",
    "unreadable",
]

FS_IOC_GETFLAGS = 0x80086601  # linux/fs.h
FS_IOC_SETFLAGS = 0x40086602
FS_NOCOW_FL = 0x00800000
FS_IOC_FIEMAP = 0xC020660B  # linux/fiemap.h
FIEMAP_FLAG_SYNC = 0x1
FIEMAP_EXTENT_LAST = 0x1
FIEMAP_EXTENT_SHARED = 0x2000
_FIEMAP = struct.Struct("=QQLLLL")
_FIEMAP_EXTENT = struct.Struct("=QQQ16xL12x")
_EXTENTS = 64  # at a time
_PIECE = 1 << 20  # read at a time


def set_nocow(fd: int) -> None:
    """Have an empty file rewritten in place: on btrfs an allocation is no promise else."""
    try:
        flags = struct.unpack("l", fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(8)))[0]
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("l", flags | FS_NOCOW_FL))
    except OSError:
        pass  # no such flag here: nor such a problem


def shares_blocks(fd: int) -> bool:
    """Does a file share blocks with another one?  False where that cannot be asked."""
    start = 0
    while True:
        request = bytearray(_FIEMAP.size + _EXTENTS * _FIEMAP_EXTENT.size)
        _FIEMAP.pack_into(
            request, 0, start, (1 << 64) - 1 - start, FIEMAP_FLAG_SYNC, 0, _EXTENTS, 0
        )
        try:
            fcntl.ioctl(fd, FS_IOC_FIEMAP, request)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL):
                return False
            raise
        found = _FIEMAP.unpack_from(request)[3]
        for index in range(found):
            offset = _FIEMAP.size + index * _FIEMAP_EXTENT.size
            logical, _, length, flags = _FIEMAP_EXTENT.unpack_from(request, offset)
            if flags & FIEMAP_EXTENT_SHARED:
                return True
            if flags & FIEMAP_EXTENT_LAST:
                return False
            start = logical + length
        if not found:
            return False


def map_file(fd: int, size: int) -> Mapping:
    """Map a file's first `size` bytes; the descriptor is not needed any more.

    Raises OSError: ENOSPC if there is no room for what is missing or shared, and
    whatever reading gives.
    """
    status = os.fstat(fd)
    if status.st_size == 0:
        set_nocow(fd)
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        # XFS wants as much free space again, even if nothing is left to allocate.
        if error.errno != errno.ENOSPC or status.st_size < size or status.st_blocks * 512 < size:
            raise
    if status.st_size > 0:
        _make_sound(fd, min(size, status.st_size))
    return Mapping(fd, size)


def _make_sound(fd: int, size: int) -> None:
    """Read all of it once, and write it back in place if its blocks are not its own.

    The same bytes: a death in between leaves what was there.
    """
    shared = shares_blocks(fd)
    for offset in range(0, size, _PIECE):
        piece = os.pread(fd, min(_PIECE, size - offset), offset)
        if shared:
            os.pwrite(fd, piece, offset)
    if shared:
        os.fdatasync(fd)


def unreadable() -> OSError:
    """What to say of a mapping that has failed."""
    return OSError(errno.EIO, "a page of its bitmaps cannot be had any more")


def failure_of_any(mappings: Iterable[Mapping]) -> Callable[[], OSError | None]:
    """What tells, once, that one of these mappings has failed."""
    mappings = tuple(mappings)
    told = False

    def failure() -> OSError | None:
        nonlocal told
        if told or not any(mapping.failed for mapping in mappings):
            return None
        told = True
        return unreadable()

    return failure
