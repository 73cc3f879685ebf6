"""What callers, the log and status hear of exceptions: the one table of errnos."""

from __future__ import annotations

import errno
import logging
import math

import trio

from .. import errors
from ..engine.events import Events

log = logging.getLogger(__name__)

MAX_ERRNO = 511  # of an answer: fuse_dev_do_write() in fs/fuse/dev.c
REPEAT_SECONDS = 60.0  # between two lines of the log about one kind of failure

ERRNOS: tuple[tuple[type[errors.SnapfsError], int], ...] = (
    (errors.SnapshotExists, errno.EEXIST),
    (errors.NotFound, errno.ENOENT),
    (errors.AccessDenied, errno.EACCES),
    (errors.SnapshotLost, errno.EIO),
    (errors.ReadOnly, errno.EROFS),
    (errors.NotSupported, errno.EOPNOTSUPP),
    (errors.ImageTooLarge, errno.EFBIG),
    (errors.NotPermitted, errno.EPERM),
    (errors.InUse, errno.EBUSY),
    (errors.NameTooLong, errno.ENAMETOOLONG),
    (errors.LimitReached, errno.ENFILE),  # not EMFILE: it is not the caller that has too many
    (errors.UsageError, errno.EINVAL),
    (errors.SnapfsError, errno.EIO),
)


class Errnos:
    """Of the requests of one mount.  Task-atomic."""

    def __init__(self, events: Events) -> None:
        self.unhealthy: str | None = None  # the first unexpected exception
        self._events = events
        self._logged: dict[tuple[str, int], float] = {}  # failures, and when

    def errno_of(self, error: Exception, what: str) -> int:
        """The errno that tells a caller of an exception; unexpected ones are logged."""
        if isinstance(error, errors.SnapfsError):
            return next(number for kind, number in ERRNOS if isinstance(error, kind))
        if isinstance(error, OSError) and error.errno:
            number = _answerable(error.errno)
            if number in (errno.EIO, errno.ENOSPC):
                self._log(what, error, error.errno)
            return number
        if isinstance(error, MemoryError):  # nothing has been changed then
            self._log(what, error, errno.ENOMEM)
            return errno.ENOMEM
        log.error("unexpected error in %s", what, exc_info=error)
        if self.unhealthy is None:
            self.unhealthy = f"unexpected error in {what}: {error!r}"
            self._events.record("unhealthy", reason=self.unhealthy)
        return errno.EIO

    def _log(self, what: str, error: Exception, number: int) -> None:
        """One line for a kind of failure in `REPEAT_SECONDS`; a full disk fails every request."""
        now = trio.current_time()
        repeated = now - self._logged.get((what, number), -math.inf) < REPEAT_SECONDS
        if not repeated:
            self._logged[what, number] = now
        level = logging.DEBUG if repeated else logging.ERROR
        log.log(level, "%s: %s", what, str(error) or repr(error))


def _answerable(number: int) -> int:
    """The errno of a failed system call, as the kernel takes it for an answer.

    It refuses those of its own, of which storage may let one out (NFS's 524,
    for one), and would wait for another answer for ever.  ENOSYS it would take
    for good: no fsync, for one, would be asked for again, and each succeed.
    """
    if number == errno.ENOSYS:
        return errno.EOPNOTSUPP
    return number if 0 < number <= MAX_ERRNO else errno.EIO
