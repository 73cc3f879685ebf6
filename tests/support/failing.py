"""Storage that cannot keep what it was given, and tells it once.

`failing`: a FUSE file system in a process of its own (memoryfs.py) to which the kernel writes
back later, and that fails on command.  `thin`: ext4 on a loop device on a tmpfs that is smaller.
Both are real file systems: what was written can be read until the pages are dropped.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class Failing:
    """Such a file system, mounted on `where`."""

    def __init__(self, where: Path) -> None:
        self.where = where

    @contextmanager
    def broken(self, *patterns: str) -> Iterator[None]:
        """Files with such names cannot be written back during the block.

        At its end all that was dirty has been tried, and what is clean has been dropped.
        """
        self.break_down(*patterns)
        try:
            yield
            write_back(self.where)
        finally:
            self.break_down()
        drop(self.where)

    def break_down(self, *patterns: str) -> None:
        """From now on files with such names, and no others, cannot be written back."""
        os.setxattr(self.where, "user.fail", " ".join(patterns).encode())

    def fail_fsync(self, name: str) -> None:
        """The next fsync(2) of a file of that name fails."""
        os.setxattr(self.where, "user.fail_fsync", name.encode())


def write_back(where: Path) -> None:
    """Have the kernel try to store all that is dirty there; nobody is told for it."""
    subprocess.run(["sync", "-f", where], check=False, capture_output=True)


def drop(where: Path) -> None:
    """Drop the clean pages of all files there, as memory pressure does."""
    for path in where.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            with suppress(OSError):  # FUSE tells it there, too
                os.close(fd)


@contextmanager
def failing(where: Path) -> Iterator[Failing]:
    """Mounted during the block."""
    where.mkdir()
    process = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("memoryfs.py"), where, "writeback"],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"mounted\n"
    try:
        yield Failing(where)
    finally:
        subprocess.run(["umount", "-l", where], check=False)
        process.kill()
        process.communicate()


@contextmanager
def thin(where: Path, size: int, real: int) -> Iterator[Path]:
    """ext4 that says that it has `size` bytes and can keep `real`."""
    below = where.with_name(f"{where.name}-below")
    for directory in (below, where):
        directory.mkdir()
    commands = (
        ["mount", "-t", "tmpfs", "-o", f"size={real}", "tmpfs", below],
        ["truncate", "-s", str(size), below / "device"],
        ["mkfs.ext4", "-q", "-O", "^has_journal", below / "device"],
        ["mount", "-o", "loop", below / "device", where],
    )
    try:
        for command in commands:
            subprocess.run(command, check=True, capture_output=True)
        yield where
    finally:
        for path in (where, below):
            subprocess.run(["umount", path], check=False, capture_output=True)


@contextmanager
def journaled(where: Path) -> Iterator[Callable[[], None]]:
    """ext4 with a journal; what it yields takes all space that it has not used yet."""
    below = where.with_name(f"{where.name}-below")
    for directory in (below, where):
        directory.mkdir()

    def fill() -> None:
        with suppress(OSError), open(below / "filler", "wb", buffering=0) as file:
            while file.write(bytes(1 << 16)):
                pass

    for command in (
        ["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", below],
        ["truncate", "-s", "400m", below / "device"],
        ["mkfs.ext4", "-q", below / "device"],
        ["mount", "-o", "loop", below / "device", where],
    ):
        subprocess.run(command, check=True, capture_output=True)
    try:
        yield fill
    finally:
        for path in (where, below):
            subprocess.run(["umount", "-l", path], check=False, capture_output=True)


def told(fd: int) -> int:
    """What fsync(2) says: an errno, 0 for success."""
    try:
        os.fsync(fd)
    except OSError as error:
        assert error.errno in (errno.EIO, errno.ENOSPC, errno.EROFS)
        return error.errno
    return 0
