"""Hands the engine's state to the request filter, which answers what needs no policy.

The filter asks for it at the start of each drain of /dev/fuse; during the drain
the trio thread is in the filter, so that the state cannot change under it.  With
`-o no_fastpath`, or when the filter cannot, every request goes through Python.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio

from ..engine.copier import Copy
from ..engine.dirty import EVERYTHING
from ..engine.engine import Engine
from ..storage import mapping
from ..storage.image import FileImage, Image
from . import requestfilter
from .pagecache import PageCache

FIRST_SNAPSHOT = 4096  # inode of a layer with id 0; that of `active` is 2, in fastpath.c too

MOST = 256  # layers, dirty bitmaps or ranges in flight that fastpath.c has room for


class FastPath:
    """The fast path of one mount.

    `busy` counts the requests that tasks are working on: while there are some
    the filter does not wait for more.
    """

    def __init__(
        self,
        engine: Engine,
        page_cache: PageCache,
        activity: Any,
        nursery: trio.Nursery,
    ) -> None:
        self.busy = 0
        # Carry out what was handed over: unique, handle, offset, and data, or length and
        # whether it is a direct read.  Set by the FUSE face.
        self.write: Callable[[int, int, int, bytes], Awaitable[None]]
        self.read: Callable[[int, int, int, int, bool], Awaitable[None]]
        self._nursery = nursery
        self._copies: dict[int, Copy] = {}  # those taken over, by number; task-atomic
        self._engine = engine
        self._page_cache = page_cache
        self._activity = activity
        self._counted: dict[str, int] = requestfilter.fastpath_statistics()
        self._copy_times = requestfilter.copy_times()  # that were counted

    def start(self) -> bool:
        """Switch it on; False if the filter cannot."""
        return requestfilter.set_fastpath(self._publish, self._engine.copier.lend, self._finish)

    def stop(self) -> None:
        """Switch it off, before the engine goes."""
        requestfilter.unset_fastpath()
        self.collect()

    def _publish(self, suspect: bool) -> requestfilter.Published | None:
        """The state; `suspect`: native code has heard that something was not written back."""
        if suspect:
            self._engine.check_storage()
        if not self._engine.writeback.is_sound():
            self._engine.mend()
            return None
        if len(self._engine.layers) > MOST:
            return None  # before all of them are described, each time
        state = self._engine.published_state()
        if MOST < max(map(len, (state.layers, state.dirty, state.frozen, state.copying))):
            return None
        quarantined = self._page_cache.quarantined()
        done = state.done_file
        files = [_file(each) for each in (state.image, *(layer.temp for layer in state.layers))]
        systems = {file.system for file in files if file.system is not None}
        promised = state.promised if len(state.promised) <= MOST else [(0, EVERYTHING)]
        return (
            _file(state.image).fd,
            _file(state.image).native_watch,
            state.size,
            state.cluster_size.bit_length() - 1,
            state.writable,
            self.busy > 0,
            state.dirty,
            state.dirty_durable,
            state.frozen,
            state.copying,
            promised,
            [
                (
                    FIRST_SNAPSHOT + layer.id,
                    layer.size,
                    _file(layer.temp).fd,
                    _file(layer.temp).native_watch,
                    layer.readable and FIRST_SNAPSHOT + layer.id not in quarantined,
                    layer.live,
                    layer.access,
                    layer.done,
                )
                for layer in state.layers
            ],
            (done.fd, done.bits.bits) if done is not None else None,
            state.pending,
            self._activity,
            mapping.counter,
            state.failures,
            [(system.fd, system.first) for system in systems],
        )

    def _finish(
        self,
        lent: int,
        written: int,
        clusters: int,
        nanoseconds: int,
        promises: list[tuple[int, int]],
        copies: list[tuple[int, int, int]],
        writes: list[tuple[int, int, int, bytes]],
        reads: list[tuple[int, int, int, int, bool]],
    ) -> None:
        self._engine.copier.note_native(lent, written, clusters, nanoseconds / 1e9)
        for first, stop in promises:
            self._engine.copier.promise(first, stop)
        if copies and not self._copies:
            self._nursery.start_soon(self._conclude_copies)
        for number, first, stop in copies:
            self._copies[number] = self._engine.copier.adopt(first, stop)
        for write in writes:
            self._nursery.start_soon(self.write, *write)
        for read in reads:
            self._nursery.start_soon(self.read, *read)

    async def _conclude_copies(self) -> None:
        """End the copies that were taken over, as they end; never abandons one."""
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                while self._copies:
                    for number, error, written, nanoseconds in requestfilter.ended_copies():
                        copy = self._copies.pop(number, None)
                        if copy is None:
                            continue  # never taken over, after a bug
                        nursery.start_soon(
                            self._engine.copier.conclude, copy, error, written, nanoseconds / 1e9
                        )
                    if self._copies:
                        await trio.lowlevel.wait_readable(requestfilter.copies_fd())

    def collect(self) -> dict[str, int]:
        """Add what was answered since the last time to the engine's counters.

        Returns the totals of the process, their sum as `requests`, and `on`.
        """
        found = requestfilter.fastpath_statistics()
        found["requests"] = found["reads"] + found["writes"] + found["snapshot_reads"]
        counters = self._engine.counters
        counters.reads += found["reads"] - self._counted["reads"]
        counters.writes += found["writes"] - self._counted["writes"]
        counters.snapshot_reads += found["snapshot_reads"] - self._counted["snapshot_reads"]
        self._counted = found
        times = requestfilter.copy_times()
        self._engine.copier.times.add(
            now - before for now, before in zip(times, self._copy_times, strict=True)
        )
        self._copy_times = times
        return found

    def region_reads(self, region_size: int) -> list[int]:
        """Reads of snapshots that were answered here, by regions of that size; none are counted
        of regions that had another."""
        size, reads = requestfilter.region_reads()
        return reads if size == region_size else []


def _file(image: Image) -> FileImage:
    if not isinstance(image, FileImage):
        raise TypeError("the fast path serves files only")
    return image
