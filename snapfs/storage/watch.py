"""Hearing of what could not be written back.

When the kernel cannot store a page of the page cache it takes the page for clean all
the same: what was written is gone as soon as the page is.  It says so once to each
open file description that was open at that moment (and, if nobody has heard of it
yet, to the next one that is opened while the inode is in memory): the next call that
asks gets the error, whichever that is, and the one after it success (errseq_t,
lib/errseq.c).  So whoever must hear has a description of its own, opened before the
first write, and no two purposes share one.

The call that asks here is sync_file_range(2) for a byte that no file has, with
SYNC_FILE_RANGE_WAIT_BEFORE: it writes nothing and waits for nothing, and takes
less than 1 us (found on Linux 6.18 with ext4, XFS, btrfs and FUSE; a page is taken
for clean only after the error is noted).  Of what ext4 drops when its journal is aborted it
does not tell: for that the file system is asked (systemerrors.py).
"""

from __future__ import annotations

import errno
import os

from .linux import SYNC_FILE_RANGE_WAIT_BEFORE, sync_file_range
from .systemerrors import ErrorsSince

BEYOND = 1 << 62  # an offset at which no file has a page; the same in transfer.c


class Watch:
    """An open file description that hears of every page of its file that is not stored."""

    def __init__(self, fd: int) -> None:
        """`fd`: a descriptor that nobody else uses; owned from now on."""
        self.fd = fd
        self.system = ErrorsSince(fd)

    @classmethod
    def beside(cls, fd: int) -> Watch:
        """Of the file that is open as `fd`.  Raises OSError."""
        return cls(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))

    def failure(self) -> OSError | None:
        """What could not be written back since the last call, if anything.  Does not block.

        None, too, where the call is forbidden (a container's filter may): then only
        a sync tells.
        """
        found = _ask(self.fd), self.system.failure()  # both are asked
        return next((each for each in found if each is not None), None)

    def close(self) -> None:
        """Close the description.  Idempotent."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            _close(fd)


def failure_of(directory: int, name: str) -> OSError | None:
    """What of a file that is mapped could not be written back, and nobody has heard of yet.

    By a description that is opened for the question: it hears of what happened before, since
    the mapping keeps the inode in memory; so no descriptor has to wait for it.  None, too, where
    it cannot be opened: it is gone, or there are no descriptors; then the next call tells.
    """
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=directory)
    except OSError:
        return None
    found = _ask(fd), _close(fd)
    return next((each for each in found if each is not None), None)


def _close(fd: int) -> OSError | None:
    """Close a descriptor, which some file systems (FUSE, NFS) take for a question, too."""
    try:
        os.close(fd)  # on Linux it is closed whatever this says
    except OSError as error:
        return error
    return None


def _ask(fd: int) -> OSError | None:
    number = sync_file_range(fd, BEYOND, 1, SYNC_FILE_RANGE_WAIT_BEFORE)
    if number in (0, errno.ENOSYS, errno.EPERM):
        return None
    return OSError(number, os.strerror(number))
