"""Blocking calls in worker threads, several in one trip when they queue up.

No thread can be started when a limit is reached, of a user's processes or of a cgroup's.  That
is no failure of the call: it waits for one of the threads that there are, of which `keep_thread`
keeps one, while trio's end when they have had nothing to do for a while.

A trip from the event loop to a thread and back costs about 100 us, more than
a write to the page cache.  Calls that arrive while all trips of an
`Offloader` are under way wait and then travel together, in order.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar, TypeVarTuple

import outcome
import trio
from attrs import define, field

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")
_Arguments = TypeVarTuple("_Arguments")

BATCH = 16  # calls in one trip at most: what one slow call can hold up
TRIPS = 2  # at once; more would only make the batches smaller
RETRY_SECONDS = 0.05  # where no thread could be started
NO_THREAD = "can't start new thread"  # CPython's
KEEP_SECONDS = 5.0  # less than an idle thread of trio lives


async def in_thread(
    call: Callable[[*_Arguments], _Result],
    *arguments: *_Arguments,
    limiter: trio.CapacityLimiter | None = None,
) -> _Result:
    """`trio.to_thread.run_sync`, which waits while no thread can be started."""
    warned = False
    while True:
        try:
            return await trio.to_thread.run_sync(call, *arguments, limiter=limiter)
        except RuntimeError as error:
            if str(error) != NO_THREAD:
                raise
        if not warned:
            log.warning("no thread can be started; what blocks waits")
            warned = True
        await trio.sleep(RETRY_SECONDS)


async def keep_thread(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Have a thread for `in_thread`, whatever becomes of the limits."""
    await in_thread(bool)
    task_status.started()
    while True:
        await trio.sleep(KEEP_SECONDS)
        await in_thread(bool)


@define(eq=False)
class _Job:
    call: Callable[[], Any]
    result: outcome.Outcome[Any] | None = None  # written by the thread, read when it is back
    turn: trio.Event = field(factory=trio.Event)  # done, or first in the queue with a trip free


def _run_batch(batch: list[_Job], ending: Callable[[], None] | None) -> None:
    results: list[outcome.Outcome[Any]] = [outcome.capture(job.call) for job in batch]
    end = outcome.capture(ending) if ending is not None else None
    for job, result in zip(batch, results, strict=True):
        if isinstance(end, outcome.Error) and isinstance(result, outcome.Value):
            job.result = outcome.Error(end.error)  # one each: it is raised only once
        else:
            job.result = result


class Offloader:
    """A queue of blocking calls that share fate: use one for each file.

    A call that hangs holds up at most those of its own Offloader.  `limiter`
    bounds the threads of all that share it, `trips` how many are under way at
    once.  `ending` runs at the end of each trip; what it raises goes to every
    call of the trip that has succeeded.
    """

    def __init__(
        self,
        limiter: trio.CapacityLimiter,
        *,
        trips: int = TRIPS,
        ending: Callable[[], None] | None = None,
    ) -> None:
        self._limiter = limiter
        self._most = trips
        self._ending = ending
        self._queue: deque[_Job] = deque()  # task-atomic
        self._trips = 0  # task-atomic

    async def run(self, call: Callable[[*_Arguments], _Result], *arguments: *_Arguments) -> _Result:
        """Run `call(*arguments)` in a thread and return or raise what it does.

        Once a thread has begun the call is never abandoned; a cancelled caller
        waits for it.
        """
        job = _Job(lambda: call(*arguments))
        self._queue.append(job)
        try:
            while job.result is None:
                if self._trips < self._most and self._queue:
                    await self._travel()
                else:
                    await job.turn.wait()
                    if job.result is None:
                        job.turn = trio.Event()
        except Exception:  # without a thread: its caller is told, so it must not be done later
            if job in self._queue:
                self._queue.remove(job)
            raise
        except trio.Cancelled:
            if job in self._queue:
                self._queue.remove(job)
                self._wake_next()
                raise
            with trio.CancelScope(shield=True):
                while job.result is None:
                    await job.turn.wait()
                    if job in self._queue:  # who took it along was cancelled, too
                        self._queue.remove(job)
                        self._wake_next()
                        raise
                    if job.result is None:
                        job.turn = trio.Event()
        assert job.result is not None
        result: _Result = job.result.unwrap()
        return result

    async def _travel(self) -> None:
        """Take the head of the queue to a thread."""
        batch = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
        self._trips += 1
        try:
            await in_thread(_run_batch, batch, self._ending, limiter=self._limiter)
        finally:
            self._trips -= 1
            # Cancelled before the thread began: back to where they were.
            self._queue.extendleft(job for job in reversed(batch) if job.result is None)
            for job in batch:
                job.turn.set()
            self._wake_next()

    def _wake_next(self) -> None:
        if self._queue and self._trips < self._most:
            self._queue[0].turn.set()
