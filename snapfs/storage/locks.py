"""Locks on the image, the temp images and the state directory.

Open file description locks: they belong to the descriptor and die with the
last process that holds it, whatever way it dies.  On images they are put on
the bytes that QEMU uses (block/file-posix.c), so that qemu-img and a virtual
machine refuse a live image, and snapfs one that they have open: a shared lock
on byte 100 + p for each permission p that is used, on byte 200 + p for each
that is not shared with others.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from collections.abc import Iterable
from enum import IntEnum

from ..errors import InUse, UsageError

F_OFD_GETLK = 36  # linux/fcntl.h; Python 3.11 has no names for them
F_OFD_SETLK = 37
_FLOCK = struct.Struct("hh4xqqi4x")  # struct flock: type, whence, start, length, pid

USED_BASE = 100
UNSHARED_BASE = 200


class Permission(IntEnum):
    """QEMU's permission bits (include/block/block-common.h)."""

    CONSISTENT_READ = 0
    WRITE = 1
    WRITE_UNCHANGED = 2
    RESIZE = 3


def _set(fd: int, kind: int, offset: int) -> None:
    fcntl.fcntl(fd, F_OFD_SETLK, _FLOCK.pack(kind, 0, offset, 1, 0))


def is_locked(fd: int, offset: int) -> bool:
    """Does another open file have a lock on that byte?"""
    answer = fcntl.fcntl(fd, F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, offset, 1, 0))
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK


def lock_image(fd: int, *, writable: bool) -> bool:
    """Lock an image as its only writer; False if somebody else has it open.

    Takes shared locks first and looks for conflicts then, as QEMU does, so of
    two that start at once at least one gives way.  Raises OSError where the
    file system has no such locks.
    """
    used: Iterable[Permission] = (Permission.CONSISTENT_READ,)
    if writable:
        used = (Permission.CONSISTENT_READ, Permission.WRITE, Permission.RESIZE)
    unshared = (Permission.WRITE, Permission.RESIZE)
    for permission in used:
        _set(fd, fcntl.F_RDLCK, USED_BASE + permission)
    for permission in unshared:
        _set(fd, fcntl.F_RDLCK, UNSHARED_BASE + permission)
    return not (
        any(is_locked(fd, UNSHARED_BASE + permission) for permission in used)
        or any(is_locked(fd, USED_BASE + permission) for permission in unshared)
    )


def lock_exclusively(fd: int, offset: int = 0) -> bool:
    """Lock a byte of a writable file; False if another descriptor has it."""
    try:
        _set(fd, fcntl.F_WRLCK, offset)
    except (BlockingIOError, PermissionError):
        return False
    return True


def open_image(path: str, *, read_only: bool) -> int:
    """Open and lock an image file.  Blocks.

    Raises UsageError or InUse, which name the remedy, and OSError.
    """
    try:
        kind = os.stat(path).st_mode
    except FileNotFoundError:
        raise UsageError(
            f"there is no image {path}; a new one is made by: truncate -s 10G {path}"
        ) from None
    if stat.S_ISBLK(kind):
        raise UsageError(f"{path} is a block device; snapfs serves image files only")
    if not stat.S_ISREG(kind):
        what = "a directory" if stat.S_ISDIR(kind) else "not a regular file"
        raise UsageError(f"{path} is {what}; snapfs serves image files")
    flags = os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR)
    try:
        fd = os.open(path, flags)
    except PermissionError:
        if not read_only and os.access(path, os.R_OK):
            raise UsageError(f"{path} cannot be written; mount it with -o ro") from None
        raise UsageError(
            f"{path} cannot be read: permission denied; be its owner, or root"
        ) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be opened: {error.strerror}") from None
    try:
        if not lock_image(fd, writable=not read_only):
            raise InUse(
                f"{path} is in use by another process, another snapfs or QEMU perhaps; end it"
            )
    except BaseException:
        os.close(fd)
        raise
    return fd
