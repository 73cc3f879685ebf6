"""Cluster ranges in flight: who overlaps whom, and waiting for them to end.

The same list serves copies (two writers to one cluster make one copy) and
frozen reads (a write waits for the snapshot reads that are still reading the
image there).  Names and idea follow QEMU's `block/reqlist.h`.

Adding, looking and removing are plain `def`, atomic under trio.  Lists are
short (at most the requests in flight), so they are searched in order.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Generic, TypeVar

import trio
from attrs import define, field


@define(eq=False)
class Request:
    """Clusters [first, stop) on which something is going on."""

    first: int
    stop: int
    _ended: trio.Event = field(factory=trio.Event, init=False)

    def overlaps(self, first: int, stop: int) -> bool:
        """Do the two ranges share a cluster?  An empty range overlaps nothing."""
        return self.first < stop and first < self.stop and first < stop

    async def wait(self) -> None:
        """Return when the request has ended."""
        await self._ended.wait()


R = TypeVar("R", bound=Request)


class RequestList(Generic[R]):
    """The requests of one kind that are in flight."""

    def __init__(self) -> None:
        self._requests: list[R] = []  # task-atomic: no await

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[R]:
        return iter(self._requests)

    def add(self, request: R) -> None:
        """Enter a request; it must be ended with `end`."""
        self._requests.append(request)

    def end(self, request: R) -> None:
        """Take a request out and wake who waits for it."""
        self._requests.remove(request)
        request._ended.set()

    def find(self, first: int, stop: int) -> R | None:
        """The oldest request that overlaps [first, stop), or None."""
        for request in self._requests:
            if request.overlaps(first, stop):
                return request
        return None

    def next_start(self, first: int, stop: int) -> int:
        """The first cluster of [first, stop) at which a request that overlaps begins, or `stop`."""
        starts = (each.first for each in self._requests if each.overlaps(first, stop))
        return max(first, min(starts, default=stop))

    async def wait_clear(self, first: int, stop: int) -> bool:
        """Wait until no request overlaps [first, stop); True if there was one.

        On return none does, and none can appear before the next checkpoint.
        No checkpoint if there was none.
        """
        waited = False
        while (request := self.find(first, stop)) is not None:
            waited = True
            await request.wait()
        return waited


@contextmanager
def entered(requests: RequestList[Request], first: int, stop: int) -> Iterator[Request]:
    """Enter [first, stop) for the length of a `with` block."""
    request = Request(first, stop)
    requests.add(request)
    try:
        yield request
    finally:
        requests.end(request)


class Gate:
    """Counts who is inside, and can be closed to wait until nobody is.

    Active writes enter it; creating a snapshot closes it for an instant.
    """

    def __init__(self) -> None:
        self._inside = 0  # task-atomic
        self._closed = False  # task-atomic
        self._waiting = trio.lowlevel.ParkingLot()  # who wants in
        self._drained = trio.Event()

    @property
    def idle(self) -> bool:
        """Nobody is inside and nobody has closed the gate."""
        return not self._inside and not self._closed

    @property
    def open(self) -> bool:
        """Can one get in without waiting?"""
        return not self._closed

    @asynccontextmanager
    async def inside(self) -> AsyncIterator[None]:
        """Be inside for the length of the block; waits while the gate is closed."""
        while self._closed:
            await self._waiting.park()
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._drained.set()

    @asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        """Nobody is inside, and nobody can get in, during the block.

        Two tasks must never close it at once: RuntimeError.
        """
        if self._closed:
            raise RuntimeError("the gate is closed already")
        self._closed = True
        try:
            while self._inside:
                self._drained = trio.Event()
                await self._drained.wait()
            yield
        finally:
            self._closed = False
            self._waiting.unpark_all()
