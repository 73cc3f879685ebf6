"""How much room the temp images may take, and warning before it is gone.

Reaching the limit, or the reserve that is kept free for the sparse image
beside the temp images, is a failure of the copy like ENOSPC of the file
system: the copy-before-write policy decides what happens then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from attrs import define, field, frozen

log = logging.getLogger(__name__)

WARNING_LEVELS = (80, 95)  # per cent
RATE_WINDOW = 60.0  # seconds of copying that the estimate looks back on
CREDIT_SHARE = 16  # a look at the numbers is good for this part of the room found


@frozen
class SpaceStatus:
    """Room of the temp images, in bytes.

    `warning`: the highest level reached, 80 or 95 per cent, else None.
    `seconds_left`: at the present rate, None if there is none.
    """

    used: int
    limit: int | None
    room: int
    warning: int | None
    seconds_left: float | None


@define(eq=False)
class TempSpace:
    """Bytes for temp images: what is used, claimed and left.

    `used` and `free` look the numbers up: bytes that all temp images take, and
    bytes available on their file system.  `limit` None: none of our own.
    All methods are plain `def`, task-atomic.
    """

    used: Callable[[], int]
    free: Callable[[], int]
    limit: int | None = None
    reserve: int = 0
    clock: Callable[[], float] = time.monotonic
    on_warning: Callable[[SpaceStatus], None] = lambda _status: None
    _claimed: int = field(default=0, init=False)  # by copies in flight
    _credit: int = field(default=0, init=False)  # may be claimed without another look
    _warned: int | None = field(default=None, init=False)
    _since: float | None = field(default=None, init=False)  # start of the rate window
    _written: int = field(default=0, init=False)  # bytes copied in it

    def set_limit(self, limit: int | None) -> None:
        """Change the limit; what is used already stays."""
        self.limit = limit
        self._credit = 0
        self._warned = None

    def room(self) -> int:
        """Bytes that a copy may still claim; never negative."""
        left = self.free() - self.reserve
        if self.limit is not None:
            left = min(left, self.limit - self.used())
        return max(0, left - self._claimed)

    @contextmanager
    def claimed(self, length: int) -> Iterator[int]:
        """Hold up to `length` bytes for a copy during the block; gives how many."""
        granted = self.lend(length)
        try:
            yield granted
        finally:
            self.take_back(granted)

    def lend(self, length: int) -> int:
        """Hold up to `length` bytes for copies until `take_back`; how many it is."""
        if length > self._credit:
            room = self.room()
            granted = min(length, room)
            self._credit = granted + (room - granted) // CREDIT_SHARE
            self._warn()
        else:
            granted = length
        self._credit -= granted
        self._claimed += granted
        return granted

    def take_back(self, lent: int) -> None:
        """End a loan; what was not used of it takes another look at the numbers."""
        self._claimed -= lent

    def explain(self) -> str:
        """Why a claim was not granted."""
        if self.limit is not None and self.limit - self.used() <= self.free() - self.reserve:
            return f"temp-limit={self.limit} is reached"
        return f"no space left for temp images, of which temp-reserve={self.reserve} is kept free"

    def note(self, written: int) -> None:
        """Account for bytes that a copy wrote; status estimates the time left from it."""
        now = self.clock()
        if self._since is None or now - self._since > 2 * RATE_WINDOW:
            self._since, self._written = now, 0
        elif now - self._since > RATE_WINDOW:  # forget the older half
            self._since += RATE_WINDOW / 2
            self._written //= 2
        self._written += written

    def _warn(self) -> None:
        status = self.status()
        if status.warning is not None and (self._warned is None or status.warning > self._warned):
            left = "" if status.seconds_left is None else f", full in {status.seconds_left:.0f} s"
            log.warning(
                "temp images take %d bytes: %d %% of their room or more%s",
                status.used, status.warning, left,
            )  # fmt: skip
            self.on_warning(status)
        self._warned = status.warning

    def status(self) -> SpaceStatus:
        """The numbers now."""
        used, room = self.used(), self.room()
        total = used + room
        share = 100 * used / total if total else 100.0
        reached = [level for level in WARNING_LEVELS if share >= level]
        elapsed = 0.0 if self._since is None else self.clock() - self._since
        rate = self._written / elapsed if elapsed >= 1 else 0.0
        return SpaceStatus(
            used, self.limit, room, max(reached, default=None), room / rate if rate else None
        )
