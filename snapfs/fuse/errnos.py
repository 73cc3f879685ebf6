"""What callers, the log and status hear of exceptions: the one table of errnos."""

from __future__ import annotations

import errno
import logging
import math

import trio

from .. import errors
from ..engine.events import Events

log = logging.getLogger(__name__)

REPEAT_SECONDS = 60.0  # between two lines of the log about one kind of failure

ERRNOS: tuple[tuple[type[errors.SnapfsError], int], ...] = (
    (errors.SnapshotExists, errno.EEXIST),
    (errors.NotFound, errno.ENOENT),
    (errors.AccessDenied, errno.EACCES),
    (errors.SnapshotLost, errno.EIO),
    (errors.ReadOnly, errno.EROFS),
    (errors.NotSupported, errno.EOPNOTSUPP),
    (errors.NotPermitted, errno.EPERM),
    (errors.InUse, errno.EBUSY),
    (errors.UsageError, errno.EINVAL),
    (errors.SnapfsError, errno.EIO),
)


class Errnos:
    """Of the requests of one mount.  Task-atomic."""

    def __init__(self, events: Events) -> None:
        self.unhealthy: str | None = None  # the first unexpected exception
        self._events = events
        self._logged: dict[tuple[str, int | None], float] = {}  # failures, and when

    def errno_of(self, error: Exception, what: str) -> int:
        """The errno that tells a caller of an exception; unexpected ones are logged."""
        if isinstance(error, errors.SnapfsError):
            return next(number for kind, number in ERRNOS if isinstance(error, kind))
        if isinstance(error, OSError) and error.errno:
            if error.errno in (errno.EIO, errno.ENOSPC):
                self._log(what, error)
            return error.errno
        log.error("unexpected error in %s", what, exc_info=error)
        if self.unhealthy is None:
            self.unhealthy = f"unexpected error in {what}: {error!r}"
            self._events.record("unhealthy", reason=self.unhealthy)
        return errno.EIO

    def _log(self, what: str, error: OSError) -> None:
        """One line for a kind of failure in `REPEAT_SECONDS`; a full disk fails every request."""
        now = trio.current_time()
        repeated = now - self._logged.get((what, error.errno), -math.inf) < REPEAT_SECONDS
        if not repeated:
            self._logged[what, error.errno] = now
        log.log(logging.DEBUG if repeated else logging.ERROR, "%s: %s", what, error)
