"""Long computations in the trio thread, which those who use the mount must not wait for."""

from __future__ import annotations

import time
from collections.abc import Callable

import trio
from attrs import define, field

WORK_SECONDS = 0.001  # at a time
REST = 4  # times as long as was worked


@define(eq=False)
class Turns:
    """A fifth of the thread's time, a millisecond at a time; `take` is called between pieces.

    A piece must be much shorter than that.  Whatever is looked at may change in `take`.
    """

    clock: Callable[[], float] = time.perf_counter
    _since: float | None = field(default=None, init=False)

    async def take(self) -> None:
        """Let others go on, if we have worked for a while."""
        now = self.clock()
        if self._since is None:
            self._since = now
        elif now - self._since >= WORK_SECONDS:
            await trio.sleep(min(1.0, REST * (now - self._since)))
            self._since = self.clock()
