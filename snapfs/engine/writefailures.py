"""Writes to `active` that failed: what a guest has been told, for whoever looks at status.

A guest that got an error may have made its file system read-only, so that it writes no more.
So failures are a thing of the past only when none came for a while although others wrote.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable

from attrs import define, field

from .counters import Counters

PAST_SECONDS = 600.0

# What tells a guest that it cannot be done so, and not that it was not done.
REFUSALS = frozenset(
    {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EFBIG, errno.EINTR, errno.EAGAIN}
)


@define(eq=False)
class WriteFailures:
    """A context manager around each change of `active` that a guest asks for.  Task-atomic."""

    _counters: Counters
    _clock: Callable[[], float] = time.monotonic
    newest: OSError | None = field(default=None, init=False)
    newest_ns: int = field(default=0, init=False)  # when, since 1970
    _when: float = field(default=0.0, init=False)
    _writes: int = field(default=0, init=False)  # that there had been

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, OSError) and error.errno not in REFUSALS:
            self._counters.write_errors += 1
            self.newest, self.newest_ns = OSError(error.errno, error.strerror), time.time_ns()
            self._when, self._writes = self._clock(), self._counters.writes

    @property
    def present(self) -> bool:
        """Did one fail lately, or nobody write since?"""
        if self.newest is None:
            return False
        passed = self._clock() - self._when > PAST_SECONDS
        return not (passed and self._counters.writes > self._writes)
