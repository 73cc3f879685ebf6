"""How much room the temp images may take, and warning before it is gone.

Reaching the limit, or the reserve that is kept free for the sparse image
beside the temp images, is a failure of the copy like ENOSPC of the file
system: the copy-before-write policy decides what happens then.

Only the storage of the temp images knows the numbers, and it may take its time
to tell, or never answer.  So it is asked in the background.  Copies that the
last answer has room for wait for nobody; others, and those that come when it
is old, wait for the answer to a question that is put after them, which knows of
all that was freed before.  Temp images grow by copies only, so what is left is

    what the answer left - claims of copies under way - what landed since the question

which may be too little, but is never too much.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio
from attrs import define, field, frozen

from .sharedcall import SharedCall

log = logging.getLogger(__name__)

WARNING_LEVELS = (80, 95)  # per cent
RATE_WINDOW = 60.0  # seconds of copying that the estimate looks back on
CREDIT_SHARE = 16  # an answer is good for this part of what it left on the file system,
CREDIT_SECONDS = 1.0  # and for so long: others use that, too
PATIENCE = 1.0  # seconds that who only wants to tell the numbers waits for new ones


@frozen
class Usage:
    """What the storage answers, in bytes: what temp images take, and what is free for them."""

    used: int
    free: int


@frozen
class SpaceStatus:
    """Room of the temp images, in bytes.

    `warning`: the highest level reached, 80 or 95 per cent, else None.
    `rate`: bytes a second that copies have written lately.  `seconds_left`: at that
    rate, None if there is none.  `age`: seconds since the storage was asked for these
    numbers, None if it never answered.
    """

    used: int
    limit: int | None
    room: int
    warning: int | None
    seconds_left: float | None
    age: float | None
    rate: float = 0.0


@frozen
class _Answer:
    usage: Usage
    landed: int  # by the time of the question
    when: float  # it was put


@define(eq=False)
class TempSpace:
    """Bytes for temp images: what is used, claimed and left.

    `ask` puts the question to the storage, in a task of `nursery`.  `limit`
    None: none of our own.  What is plain `def` is task-atomic.
    """

    ask: Callable[[], Awaitable[Usage]]
    nursery: trio.Nursery
    limit: int | None = None
    reserve: int = 0
    clock: Callable[[], float] = time.monotonic
    on_warning: Callable[[SpaceStatus], None] = lambda _status: None
    _shared: SharedCall = field(init=False)
    _answer: _Answer | None = field(default=None, init=False)
    _claimed: int = field(default=0, init=False)  # by copies under way
    _landed: int = field(default=0, init=False)  # by copies that have ended
    _credit: int = field(default=0, init=False)  # may be claimed by the last answer
    _waiting: trio.lowlevel.ParkingLot = field(factory=trio.lowlevel.ParkingLot, init=False)
    _warned: int | None = field(default=None, init=False)
    _since: float | None = field(default=None, init=False)  # start of the rate window
    _written: int = field(default=0, init=False)  # bytes copied in it

    def __attrs_post_init__(self) -> None:
        self._shared = SharedCall(self._put_question)

    # The numbers

    async def look(self) -> None:
        """Have numbers that are no older than this call.  Raises OSError of the storage."""
        await self._shared.run(self.nursery)

    async def refresh(self) -> None:
        """`look`; but if the storage does not answer in time the last numbers must do."""
        with trio.move_on_after(PATIENCE), suppress(OSError):
            await self.look()

    async def _put_question(self) -> None:
        landed, when = self._landed, self.clock()
        self._answer = _Answer(await self.ask(), landed, when)
        self._credit = self._left(CREDIT_SHARE)
        self._warn()

    def set_limit(self, limit: int | None) -> None:
        """Change the limit; what is used already stays."""
        self.limit = limit
        self._credit = 0
        self._warned = None

    def room(self) -> int:
        """Bytes that a copy may still claim, as far as is known; never negative."""
        return self._left(1)

    def _left(self, share: int) -> int:
        """`room`, with only one part in `share` of what others may take, too."""
        if self._answer is None:
            return 0
        usage = self._answer.usage
        left = (usage.free - self.reserve - self._uncertain) // share
        if self.limit is not None:
            left = min(left, self.limit - usage.used - self._uncertain)
        return max(0, left)

    @property
    def _uncertain(self) -> int:
        """Bytes that the answer may have counted, or not."""
        return self._claimed + self._landed - (self._answer.landed if self._answer else 0)

    # Claims

    async def claim(self, length: int) -> int:
        """Hold up to `length` bytes for a copy until `release`; how many it is.

        Less than that only if there is no room for more once no other copy may
        give room back.  Raises OSError of the storage.
        """
        while length > self._lendable:
            await self.look()
            if length <= self.room() or not self._uncertain:
                return self.hold(min(length, self.room()))
            if self._claimed:
                await self._waiting.park()
        return self.hold(length)

    def lend(self, length: int) -> int:
        """`claim` without waiting, of what the last answer is good for: maybe nothing."""
        return self.hold(min(length, self._lendable))

    @property
    def _lendable(self) -> int:
        if self._answer is None or self.clock() - self._answer.when > CREDIT_SECONDS:
            return 0
        return self._credit

    def hold(self, length: int) -> int:
        """Count a claim that was granted; returns its length."""
        self._claimed += length
        self._credit = max(0, self._credit - length)
        return length

    def release(self, held: int, landed: int) -> None:
        """A copy has ended, which held so much; `landed` bytes of it, at most, are there."""
        self._claimed -= held
        self._landed += landed
        self._credit = min(self._credit + held - landed, self._left(CREDIT_SHARE))
        self._waiting.unpark_all()
        if landed:
            self._warn()

    def explain(self) -> str:
        """Why a claim was not granted."""
        usage = self._answer.usage if self._answer else Usage(0, 0)
        if self.limit is not None and self.limit - usage.used <= usage.free - self.reserve:
            return f"temp-limit={self.limit} is reached"
        return f"no space left for temp images, of which temp-reserve={self.reserve} is kept free"

    # Warnings and estimates

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
        """The numbers as they are known."""
        if self._answer is None:
            return SpaceStatus(0, self.limit, 0, None, None, None)
        now, room = self.clock(), self.room()
        used = self._answer.usage.used + self._landed - self._answer.landed
        total = used + room
        share = 100 * used / total if total else 100.0
        reached = [level for level in WARNING_LEVELS if share >= level]
        elapsed = 0.0 if self._since is None else now - self._since
        rate = self._written / elapsed if 1 <= elapsed <= 2 * RATE_WINDOW else 0.0
        return SpaceStatus(
            used, self.limit, room, max(reached, default=None), room / rate if rate else None,
            now - self._answer.when, rate,
        )  # fmt: skip
