"""Images in memory, with faults, stalls and a record of calls.

`MemoryImage` behaves as `FileImage` does where the engine could notice: calls
are full or fail, a call that has begun is never abandoned, freed pages read as
zeros.  It is nastier where that finds bugs: what a call reads or writes is
read or written at the last moment, after every stall; and using it after
`close`, or closing it in mid-call, is kept in `misuse`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from typing import Any

import trio
from attrs import define, field, frozen

from snapfs.storage.image import Buffer

PAGE = 4096
CLUSTER = 4096
EVERYWHERE = 1 << 62


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@frozen
class Call:
    """One call that an image has carried out or refused."""

    kind: str
    offset: int
    length: int


@define(eq=False)
class Trap:
    """Waits for calls of some kinds that touch [start, stop); none given: all.

    `skip` calls pass by first, then `times` (None: all) are caught.
    """

    kinds: tuple[str, ...] = ()
    start: int = 0
    stop: int = EVERYWHERE
    skip: int = 0
    times: int | None = None
    caught: int = field(default=0, init=False)

    def matches(self, call: Call) -> bool:
        """Would it catch such a call, now or later?"""
        return (
            (not self.kinds or call.kind in self.kinds)
            and self.start < call.offset + max(1, call.length)
            and call.offset < self.stop
            and (self.times is None or self.caught < self.times)
        )

    def catches(self, call: Call) -> bool:
        """Does it catch this call?  Counts."""
        if not self.matches(call):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.caught += 1
        return True


@define(eq=False)
class Fault(Trap):
    """Calls fail with `errno`; of a write `lands` bytes reach the file before.

    `errno` 0: a read returns only `lands` bytes, as if the file ended there.
    """

    errno: int = errno.EIO
    lands: int = 0


@define(eq=False)
class Stall(Trap):
    """Calls wait until `release`; `reached` is set when the first one does."""

    reached: trio.Event = field(factory=trio.Event, init=False)
    released: trio.Event = field(factory=trio.Event, init=False)

    def release(self) -> None:
        self.released.set()


@define(eq=False)
class Space:
    """A file system's room, in bytes; None: no limit."""

    limit: int | None = None
    used: int = 0

    def take(self, size: int) -> None:
        if self.limit is not None and size > 0 and self.used + size > self.limit:
            raise os_error(errno.ENOSPC)
        self.used += size


class MemoryImage:
    """An `Image` in memory; see the module's text.

    Kinds of calls: pread, pwrite, punch, zero, allocate, truncate, flush,
    extents, and copy for the reading of a cluster that is copied elsewhere
    (its writing is a pwrite of the target).
    """

    def __init__(self, content: Buffer = b"", *, space: Space | None = None) -> None:
        self.data = bytearray(content)
        self.space = space or Space()
        self.pages: set[int] = set()  # those that hold data
        self.cold = False  # pread_nowait finds nothing in the page cache
        self.faults: list[Fault] = []
        self.stalls: list[Stall] = []
        self.calls: list[Call] = []
        self.misuse: list[str] = []  # uses that would hit a closed, or another, descriptor
        self.on_fault: Callable[[Call], None] = lambda call: None
        self.in_flight = 0
        self.trips = 0  # calls of data_inside
        self.not_written_back: OSError | None = None  # what `failure` tells next
        self.closed = False
        for page in range(-(-len(content) // PAGE)):
            if any(self.data[page * PAGE : (page + 1) * PAGE]):
                self.pages.add(page)

    # For tests

    def fail(self, *kinds: str, **options: Any) -> Fault:
        fault = Fault(kinds, **options)
        self.faults.append(fault)
        return fault

    def stall(self, *kinds: str, **options: Any) -> Stall:
        stall = Stall(kinds, **options)
        self.stalls.append(stall)
        return stall

    def calls_of(self, *kinds: str) -> list[Call]:
        return [call for call in self.calls if call.kind in kinds]

    def has_data(self, start: int, stop: int) -> bool:
        return any(page in self.pages for page in range(start // PAGE, -(-stop // PAGE)))

    # What all calls share

    def _begin(self, call: Call) -> None:
        self.calls.append(call)
        if self.closed:
            self.misuse.append(f"{call} after close")
            raise os_error(errno.EBADF)

    async def _enter(self, kind: str, offset: int, length: int) -> Fault | None:
        """A fault that applies to the call when its time has come."""
        call = Call(kind, offset, length)
        self._begin(call)
        self.in_flight += 1
        try:
            await trio.lowlevel.checkpoint()
            with trio.CancelScope(shield=True):  # a thread is never abandoned
                for stall in list(self.stalls):
                    if stall.catches(call):
                        stall.reached.set()
                        await stall.released.wait()
        finally:
            self.in_flight -= 1
        for fault in self.faults:
            if fault.catches(call):
                self.on_fault(call)
                return fault
        return None

    def _touch(self, start: int, stop: int) -> None:
        wanted = set(range(start // PAGE, -(-stop // PAGE))) - self.pages
        self.space.take(len(wanted) * PAGE)
        self.pages |= wanted

    def _drop(self, start: int, stop: int) -> None:
        stop = min(stop, len(self.data))
        if start >= stop:
            return
        self.data[start:stop] = bytes(stop - start)
        end = -(-stop // PAGE) if stop == len(self.data) else stop // PAGE
        for page in range(-(-start // PAGE), end):
            if page in self.pages:
                self.pages.remove(page)
                self.space.take(-PAGE)

    def _extend(self, size: int) -> None:
        if size > len(self.data):
            self.data.extend(bytes(size - len(self.data)))

    # Image

    def pread_nowait(self, offset: int, length: int) -> Buffer | None:
        self._begin(Call("pread_nowait", offset, length))
        call = Call("pread", offset, length)
        if self.cold or any(trap.matches(call) for trap in (*self.stalls, *self.faults)):
            return None  # what is in the page cache neither waits nor fails
        if offset + length > len(self.data):
            return None
        return bytes(self.data[offset : offset + length])

    async def pread(self, offset: int, length: int) -> Buffer:
        fault = await self._enter("pread", offset, length)
        if fault is not None:
            if fault.errno:
                raise os_error(fault.errno)
            length = min(length, fault.lands)
        return bytes(self.data[offset : offset + length])

    async def pwrite(self, offset: int, data: Buffer) -> None:
        data = bytes(data)
        fault = await self._enter("pwrite", offset, len(data))
        if fault is not None:
            self._store(offset, data[: fault.lands])
            raise os_error(fault.errno)
        self._store(offset, data)

    def _store(self, offset: int, data: bytes) -> None:
        if data:
            self._touch(offset, offset + len(data))
            self._extend(offset + len(data))
            self.data[offset : offset + len(data)] = data

    async def _change(self, kind: str, offset: int, length: int) -> None:
        fault = await self._enter(kind, offset, length)
        if fault is not None:
            raise os_error(fault.errno)

    async def punch(self, offset: int, length: int) -> None:
        await self._change("punch", offset, length)
        self._drop(offset, offset + length)

    async def zero(self, offset: int, length: int) -> None:
        await self._change("zero", offset, length)
        self._drop(offset, offset + length)
        self._extend(offset + length)

    async def allocate(self, offset: int, length: int, keep_size: bool) -> None:
        await self._change("allocate", offset, length)
        if not keep_size:
            self._extend(offset + length)

    async def truncate(self, size: int) -> None:
        await self._change("truncate", size, max(0, len(self.data) - size))
        self._drop(size, len(self.data))
        del self.data[size:]
        self._extend(size)

    async def flush(self) -> None:
        await self._change("flush", 0, EVERYWHERE)

    async def data_extents(
        self, offset: int, length: int, limit: int
    ) -> tuple[list[tuple[int, int]], int]:
        await self._change("extents", offset, length)
        end = min(offset + length, len(self.data))
        extents: list[tuple[int, int]] = []
        position = offset
        while position < end and len(extents) < limit:
            if position // PAGE not in self.pages:
                position = min(end, (position // PAGE + 1) * PAGE)
                continue
            start = position
            while position < end and position // PAGE in self.pages:
                position = min(end, (position // PAGE + 1) * PAGE)
            extents.append((start, position))
        return extents, (position if position < end else offset + length)

    async def data_inside(
        self, ranges: Sequence[tuple[int, int]], limit: int
    ) -> tuple[list[tuple[int, int]], int]:
        found: list[tuple[int, int]] = []
        self.trips += 1
        for start, stop in ranges:
            pairs, known = await self.data_extents(start, stop - start, limit - len(found))
            found += pairs
            if known < stop or (len(found) == limit and (start, stop) != ranges[-1]):
                return found, known
        return found, ranges[-1][1]

    async def copy_to(
        self,
        target: MemoryImage,
        offset: int,
        length: int,
        cluster_size: int,
        budget: int,
        durable: bool = False,
    ) -> int:
        assert offset % cluster_size == 0
        written = 0
        for start in range(offset, min(offset + length, len(self.data)), cluster_size):
            count = min(cluster_size, offset + length - start)
            fault = await self._enter("copy", start, count)
            if fault is not None:
                raise os_error(fault.errno)
            data = bytes(self.data[start : start + count])
            if any(data):
                if written + len(data) > budget:
                    raise os_error(errno.ENOSPC)
                await target.pwrite(start, data)
                written += len(data)
        if durable:
            await target.flush()
        return written

    def failure(self) -> OSError | None:
        error, self.not_written_back = self.not_written_back, None
        return error

    def size(self) -> int:
        return len(self.data)

    def blocks(self) -> int:
        return len(self.pages) * PAGE // 512

    def close(self) -> None:
        if self.closed:
            self.misuse.append("closed twice")
        if self.in_flight:
            self.misuse.append(f"closed with {self.in_flight} calls in flight")
        self.closed = True
        self.space.take(-len(self.pages) * PAGE)
        self.pages.clear()
