"""What a file system loses without a word to whoever wrote it.

ext4 drops dirty pages that it has no place for yet once its journal is aborted
(`invalidate_dirty_pages` in fs/ext4/inode.c): holes are read there, and neither a
description of the file nor syncfs(2) is told.  Only a sync says that the journal is
aborted.  But it has counted an error of the file system before.  XFS refuses every read
then, and btrfs tells of each page.

No error of a file system says what it was of, so whoever asks has lost what was not synced.
"""

from __future__ import annotations

import errno
import os
import weakref

from . import filesystems


class SystemErrors:
    """The errors that one mounted file system has counted.  One for all who ask of it."""

    def __init__(self, path: str) -> None:
        """`path`: of the count.  Raises OSError."""
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.fd)
        self.first = self.count()

    @classmethod
    def of(cls, fd: int) -> SystemErrors | None:
        """Of the file system that holds the file; None: it is of another kind, or hidden.  Blocks.

        None, too, where there is no descriptor left.
        """
        try:
            directory = filesystems.directory_of(fd)
            if directory is None or filesystems.kind_of(fd) != filesystems.EXT4:
                return None
            key = directory, os.stat(directory).st_ino  # another one after each mount
            found = _known.get(key)
            if found is None:
                found = _known[key] = cls(f"{directory}/errors_count")
            return found
        except OSError:
            return None

    def count(self) -> int:
        """How many there have been; -1 once it is not mounted any more.  Does not block."""
        try:
            return int(os.pread(self.fd, 32, 0))
        except OSError:
            return -1


_known: weakref.WeakValueDictionary[tuple[str, int], SystemErrors] = weakref.WeakValueDictionary()


class ErrorsSince:
    """The same for one who asks: has there been one since the last question?"""

    def __init__(self, fd: int) -> None:
        """From now on, of what holds the file.  Blocks."""
        self.system = SystemErrors.of(fd)
        self._seen = self.system.count() if self.system is not None else 0

    def failure(self) -> OSError | None:
        """What is to be said of it.  Does not block."""
        if self.system is None:
            return None
        before, self._seen = self._seen, self.system.count()
        return None if before == self._seen else OSError(errno.EIO, os.strerror(errno.EIO))
