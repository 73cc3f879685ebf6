"""System calls that Python 3.11 does not have.  All of them block."""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections.abc import Callable

FALLOC_FL_KEEP_SIZE = 0x01  # linux/falloc.h
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10
SYNC_FILE_RANGE_ALL = 0x07  # sync_file_range(2): wait before, write, wait after
RENAME_EXCHANGE = 2  # linux/fs.h
SYNC_FILE_RANGE_WAIT_BEFORE = 1
PR_SET_PDEATHSIG = 1  # linux/prctl.h

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.sync_file_range.argtypes = (
    ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint,
)  # fmt: skip
_libc.renameat2.argtypes = (
    ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint,
)  # fmt: skip


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with a mode, which `os.posix_fallocate` does not take.

    Raises OSError; the GIL is released meanwhile.
    """
    while _libc.fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def kernel_version() -> tuple[int, int]:
    """The kernel's version, such as (6, 1)."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def write_back(fd: int, offset: int) -> None:
    """Write dirty pages from `offset` on to the file system, and wait for that; raises OSError.

    Neither makes them durable, nor takes the lock of the inode, as fsync(2) does.
    """
    number = sync_file_range(fd, offset, 0, SYNC_FILE_RANGE_ALL)
    if number:
        raise OSError(number, os.strerror(number))


def sync_file_range(fd: int, offset: int, length: int, flags: int) -> int:
    """sync_file_range(2); the errno, 0 for success."""
    if _libc.sync_file_range(fd, offset, length, flags):
        return ctypes.get_errno()
    return 0


def exchange(directory: int, one: str, other: str) -> None:
    """Let two files of a directory change their names, atomically; raises OSError."""
    names = os.fsencode(one), os.fsencode(other)
    if _libc.renameat2(directory, names[0], directory, names[1], RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), other)


def end_with_parent(number: int) -> Callable[[], None]:
    """What a child runs before it executes a program, so that it gets the signal when we die.

    To be called in the parent, right before the fork.
    """
    parent = os.getpid()

    def prepare() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)  # it died before we asked for the signal

    return prepare


def close_all_but(*kept: int) -> None:
    """Close every descriptor but those given, standard input, output and error."""
    first = 3
    for fd in sorted(each for each in kept if each >= 3):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, 1 << 20)
