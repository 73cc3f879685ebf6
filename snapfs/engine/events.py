"""What happens to the snapshots without anybody's asking: for those who wait for it.

Kinds: temp-space (80 or 95 per cent are used), incomplete (a snapshot could not
keep clusters for the first time), lost, inconsistent (of a bitmap), unhealthy.
Events are numbered from 1 on; the newest `KEPT` are kept.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import trio
from attrs import define, field, frozen

KEPT = 1000


@frozen
class Event:
    """`when_ns`: nanoseconds since 1970.  `details`: JSON values."""

    number: int
    when_ns: int
    kind: str
    details: dict[str, Any]


@define(eq=False)
class Events:
    """The newest events of a mount.  `record` is plain `def`, task-atomic."""

    newest: int = field(default=0, init=False)
    _kept: deque[Event] = field(factory=lambda: deque(maxlen=KEPT), init=False)
    _waiting: trio.Event = field(factory=trio.Event, init=False)

    def record(self, kind: str, **details: Any) -> None:
        """Something happened; wakes who waits."""
        self.newest += 1
        self._kept.append(Event(self.newest, time.time_ns(), kind, details))
        self._waiting.set()
        self._waiting = trio.Event()

    async def after(self, number: int, seconds: float) -> list[Event]:
        """Events with a higher number, oldest first; waits up to `seconds` for the first."""
        with trio.move_on_after(seconds):
            while self.newest <= number:
                await self._waiting.wait()
        return [event for event in self._kept if event.number > number]
