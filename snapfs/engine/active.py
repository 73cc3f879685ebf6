"""The live image: reading it, and changing it without harm to its snapshots.

Order of a write to `active`, which everything else relies on:

 1. copy the old data of pending clusters to the newest live temp image; two
    writers to one cluster make one copy, and if another's copy failed, try
    yourself (`copier.py`)
 2. set done, clear pending: new snapshot reads go to the temp image
 3. set the dirty bitmaps (`dirty.py`)
 4. wait until no frozen read overlaps; none new can appear, since no snapshot
    finds the range in the image any more
 5. write the image

Punching, zeroing and shrinking `active` are writes.  State changes only
between two checkpoints, in plain code; after each await it is looked at again.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import TypeVarTuple

import trio

from ..errors import ImageTooLarge, InvalidRange, ReadOnly, StateError
from ..storage.image import Buffer, Image
from ..storage.offload import in_thread
from .copier import Copier, Settings
from .counters import Counters
from .dirty import DirtyBitmap, DirtyBitmaps
from .geometry import Geometry
from .layer import Layer, LayerStore
from .layerkeeper import LayerKeeper
from .layers import LayerStack
from .losslist import LossList
from .regions import Survey, Traces
from .reqlist import Gate, Request, RequestList
from .sharedcall import SharedCall
from .snapshotreader import SnapshotReader
from .space import SpaceStatus, TempSpace
from .tracker import Tracker
from .writeback import WriteBack
from .writefailures import WriteFailures

log = logging.getLogger(__name__)

_Arguments = TypeVarTuple("_Arguments")

STEP = 64 << 20  # bytes of a long punch or zeroing that are made safe and done at a time
MAX_SIZE = (1 << 63) - 1  # of a file: off_t
# What the image may grow to if nothing else is said, or to so many times its size: its bitmaps
# grow with it, by 128 MiB each for as much with clusters of 64 KiB.
DEFAULT_MAX_SIZE = 64 << 40
DEFAULT_GROWTH = 4


class ActiveImage:
    """The live image of an engine, and the parts that its snapshots share with it.

    Takes over the image and the layers.  `nursery` runs copies and late
    clean-up; all must have ended before the nursery is left.
    """

    def __init__(
        self,
        image: Image,
        geometry: Geometry,
        store: LayerStore,
        nursery: trio.Nursery,
        *,
        layers: Sequence[Layer] = (),
        bitmaps: Sequence[DirtyBitmap] = (),
        next_id: int = 1,
        settings: Settings | None = None,
        read_only: bool = False,
    ) -> None:
        self.settings = settings or Settings()
        self.read_only = read_only
        self.counters = Counters()
        self.write_failures = WriteFailures(self.counters)
        # Awaited by create_snapshot: makes the kernel write back what it holds
        # of `active`.  Set by the FUSE face.
        self.barrier: Callable[[], Awaitable[None]] | None = None
        # Why the image cannot be trusted any more, None while it can.
        self.unhealthy: str | None = None
        self._image = image
        self._geometry = geometry  # task-atomic
        bound = max(DEFAULT_MAX_SIZE, DEFAULT_GROWTH * geometry.size)
        self.max_size = bound if self.settings.max_size is None else self.settings.max_size
        self._store = store
        self._nursery = nursery
        self._next_id = next_id
        self._stack = LayerStack(layers, geometry.clusters)
        self._stack.settle(0, self._stack.clusters)
        self._gate = Gate()  # writes are inside; closing it makes an instant
        self._creations = trio.Lock()  # held before the next one: ids ascend in the list
        self._transitions = trio.Lock()  # one change of the layer list at a time
        self._frozen_reads: RequestList[Request] = RequestList()
        dirty = DirtyBitmaps(bitmaps)
        self.traces = Traces()
        self.survey = Survey(
            self._stack,
            lambda: self._stack.pending,
            dirty.any_of,
            lambda: self._geometry,
            self.traces,
        )
        self._keeper = LayerKeeper(
            self._stack,
            dirty,
            store,
            lambda: self._geometry,
            self._start,
            self.settings.cbw_timeout or float("inf"),
        )
        self.tracker = Tracker(
            dirty,
            store.bitmaps,
            self._keeper,
            self._transitions,
            self._gate,
            lambda: self._geometry,
            self._take_id,
            self.flush,
            self._check_image,
            read_only,
        )
        self.space = TempSpace(
            self._keeper.usage,
            nursery,
            self.settings.temp_limit,
            self.settings.temp_reserve,
        )
        self.copier = Copier(
            image,
            self._stack,
            geometry.cluster_size,
            nursery,
            self.settings,
            self.counters,
            self.space,
            lambda layer: self._start(self._keeper.dispose, layer),
            self.traces,
        )
        self._keeper.copier = self.copier
        self.events = self.copier.events
        self.space.on_warning = self._warned_of_space
        dirty.promise, dirty.forget = self.copier.promises.make, self.copier.promises.forget
        self._losses = LossList(self._keeper, self._transitions, self._start)
        self.writeback = WriteBack(
            image,
            self._stack,
            dirty,
            self.copier,
            self._losses.changed,
            self._is_unhealthy,
            self._losses.save,
            store.failures,
        )
        self._flushes = SharedCall(self._flush)
        self._reader = SnapshotReader(
            image,
            self._stack,
            self._frozen_reads,
            self.copier.unpin,
            self.writeback.check_source,
        )

    def _is_unhealthy(self, reason: str) -> None:
        if self.unhealthy is None:
            self.unhealthy = reason
            self.events.record("unhealthy", reason=reason)

    def mend(self) -> None:
        """Have the saved list tell what is lost with mapped pages, some time."""
        self._losses.mend(self.writeback)

    def _warned_of_space(self, status: SpaceStatus) -> None:
        self.events.record("temp-space", percent=status.warning, used_bytes=status.used)

    def _start(
        self, call: Callable[[*_Arguments], Awaitable[None]], *arguments: *_Arguments
    ) -> None:
        """Run something in the background; a bug in it makes the mount unhealthy, not end."""

        async def guarded() -> None:
            try:
                await call(*arguments)
            except Exception as error:
                log.exception("unexpected error in the background")
                self._is_unhealthy(f"unexpected error: {error!r}")

        self._nursery.start_soon(guarded)

    def _take_id(self) -> int:
        """An id that no layer and no bitmap has had."""
        self._next_id += 1
        return self._next_id - 1

    # The live image

    @property
    def geometry(self) -> Geometry:
        """Size of the image now, and the cluster size."""
        return self._geometry

    @property
    def size(self) -> int:
        """Size of the image now, in bytes."""
        return self._geometry.size

    async def read(self, offset: int, length: int) -> Buffer:
        """Read from the image; waits for nobody.  Short only at the end, empty beyond it."""
        self.counters.reads += 1
        length = min(length, self.size - offset)
        return await self._image.pread(offset, length) if length > 0 else b""

    async def write(self, offset: int, data: Buffer) -> int:
        """Write to the image, which grows if need be; returns len(data).

        Raises OSError of the image, or of a copy under break-guest-write; then
        nothing of `data` has reached the image in the latter case.
        """
        self._check_range(offset, len(data))
        self.counters.writes += 1
        if not len(data):
            return 0
        self._reserve(offset + len(data))
        write = partial(self._image.pwrite, offset, data)
        with self.write_failures:
            await self._change(offset, len(data), write, offset + len(data))
        return len(data)

    async def punch(self, offset: int, length: int) -> None:
        """Free a range of the image; it reads as zeros.  The size stays."""
        self._check_range(offset, length)
        end = min(offset + length, self.size)
        with self.write_failures:
            for start, count in _steps(offset, end):
                await self._change(start, count, partial(self._image.punch, start, count))

    async def zero(self, offset: int, length: int, keep_size: bool = False) -> None:
        """Make a range read as zeros; the image grows unless `keep_size`."""
        self._check_range(offset, length)
        end = offset + length
        if keep_size:
            end = min(end, self.size)
        with self.write_failures:
            await self._make_room(end)
            for start, count in _steps(offset, end):
                zero = partial(self._image.zero, start, count)
                await self._change(start, count, zero, start + count)

    async def allocate(self, offset: int, length: int, keep_size: bool) -> None:
        """Reserve space; changes no data, but the image grows unless `keep_size`."""
        self._check_range(offset, length)
        with self.write_failures:
            await self._allocate(offset, length, keep_size)

    async def _allocate(self, offset: int, length: int, keep_size: bool) -> None:
        if not keep_size:
            await self._make_room(offset + length)
        async with self._gate.inside():
            size = self.size if keep_size else max(self.size, offset + length)
            await self._record(self.size, size - self.size)
            self._store.write_started(size)
            try:
                await self._image.allocate(offset, length, keep_size)
                self._extended(size)
            except OSError:
                self._extended(self._image.size())  # part of it may be there
                raise
            finally:
                self._store.write_finished()

    async def resize(self, size: int) -> None:
        """Set the size of the image; what a shrink cuts off is copied first.

        Growing does not change existing snapshots.
        """
        self._check_range(0, size)
        with self.write_failures:
            await self._make_room(size)
            while not await self._resize(size):
                await self.writeback.mend()

    async def _resize(self, size: int) -> bool:
        """`resize`, unless what is cut off became pending before it could begin, or bits failed."""
        clusters = self._geometry.touched(size, self.size - size)
        step = max(1, STEP // self._geometry.cluster_size)
        await self.copier.preserve_long(clusters.start, clusters.stop, step)
        async with self._transitions, self._gate.closed():
            old = self._geometry
            if self._is_pending(size, old.size - size):
                return False
            await self._prepare(min(old.size, size), abs(old.size - size))
            if not self.writeback.is_sound():
                return False
            self._store.write_started(size)
            try:
                await self._image.truncate(size)
                self._geometry = old.resized(size)
                self._stack.grow(self._geometry.clusters)
            finally:
                self._store.write_finished()
            await self._keeper.try_save()  # the size has changed: that cannot fail any more
        return True

    async def write_back(self) -> None:
        """Have in the image what was written to `active` before, what the kernel holds included."""
        if self.barrier is not None and not self.read_only:
            await self.barrier()

    async def flush(self) -> None:
        """Make the data of the image durable.

        Raises OSError if something that was written to it since the mount may be gone,
        whoever has been told before.  One sync serves all who came before it began.
        """
        await self._flushes.run(self._nursery)

    async def _flush(self) -> None:
        self.writeback.check_image()
        self.writeback.refuse()
        layers = list(self._stack)
        try:
            await self._image.flush()
        except OSError as error:
            self.writeback.image_failed(error)
            raise
        self.writeback.check_image()
        self.writeback.refuse()
        for layer in layers:
            layer.settled = True

    def check_storage(self) -> None:
        """Ask all files whether they could be written back.  Does not block.

        To be called before anything is read, and regularly.
        """
        self.writeback.check()

    def _check_image(self) -> None:
        """Raise StateError if the image is not what was written to it."""
        self.writeback.check_image()
        if self.unhealthy is not None:
            raise StateError(self.unhealthy)

    async def alter(self, change: Callable[[], None]) -> None:
        """Run a blocking change of the image's owner, mode or times; no data changes."""
        if self.read_only:
            raise ReadOnly("the mount is read-only")
        self._store.write_started(self.size)
        try:
            await in_thread(change)
        finally:
            self._store.write_finished()

    async def _change(
        self, offset: int, length: int, change: Callable[[], Awaitable[None]], size: int = 0
    ) -> None:
        """Steps 1 to 5 for a change of [offset, offset+length).

        `size`: the image has at least that many bytes afterwards.
        """
        begun = False
        while not begun:
            await self.writeback.mend()
            try:
                # Outside the gate: who creates a snapshot, and all who then have to wait for
                # that, must not wait for a temp image that takes its time.
                await self._preserve(offset, length)
                async with self._gate.inside():
                    if not self._is_pending(offset, length):  # no snapshot was created meanwhile
                        await self._prepare(offset, length)
                        begun = self.writeback.is_sound()
                        if begun:
                            await self._carry_out(change, size)
            except OSError:
                # What cannot be stored of bits that are lost anyway is no reason to fail.
                if begun or self.writeback.is_sound():
                    raise

    async def _carry_out(self, change: Callable[[], Awaitable[None]], size: int) -> None:
        """Step 5."""
        self._store.write_started(max(size, self.size))
        try:
            await change()
            self._extended(size)
        except OSError:
            # Part of it may have landed.  As everywhere, a look at the image's size is done
            # here: the file system has it in memory, or else nothing of the image is served.
            self._extended(self._image.size())
            raise
        finally:
            self._store.write_finished()

    async def _preserve(self, offset: int, length: int) -> None:
        """Steps 1 and 2."""
        clusters = self._geometry.touched(offset, length)
        await self.copier.preserve(clusters.start, clusters.stop)

    def _is_pending(self, offset: int, length: int) -> bool:
        """Has some cluster of the range to be copied before it changes?"""
        clusters = self._geometry.touched(offset, length)
        pending = self._stack.pending
        return pending.any(clusters.start, min(clusters.stop, len(pending)))

    async def _prepare(self, offset: int, length: int) -> None:
        """Steps 3 and 4.  On return the range may be overwritten, until a snapshot is created.

        The gate is held, or closed by the caller.
        """
        # What lies between the end and a write beyond it becomes zeros of the image.
        start = min(offset, self.size)
        await self._record(start, offset + length - start)
        clusters = self._geometry.touched(offset, length)
        if await self._frozen_reads.wait_clear(clusters.start, clusters.stop):
            self.counters.frozen_waits += 1

    async def _record(self, offset: int, length: int) -> None:
        """Step 3.  Waits for a bitmap that has to grow, or to be durable."""
        clusters = self._geometry.touched(offset, length)
        if not self.tracker.bitmaps.mark(clusters.start, clusters.stop):
            await self.tracker.record(clusters.start, clusters.stop)
        await self.copier.promises.kept(clusters.start, clusters.stop)

    async def _make_room(self, size: int) -> None:
        """`_reserve`, and room in the dirty bitmaps, for who asks for nothing but a size.

        A write that makes the image grow is not to fail for want of that.
        Raises OSError, too; then nothing has changed.
        """
        self._reserve(size)
        if size > self.size:
            await self.tracker.make_room(self._geometry.resized(size).clusters)

    def _reserve(self, size: int) -> None:
        """All that can fail in memory when the image grows to `size` bytes, before it does.

        Raises ImageTooLarge and MemoryError; then nothing has changed.
        """
        if size <= self.size:
            return
        if size > self.max_size:
            raise ImageTooLarge(f"{size} bytes are more than max-size={self.max_size}")
        self._stack.grow(self._geometry.resized(size).clusters)

    def _extended(self, size: int) -> None:
        """The image has grown, if it has; there is room."""
        if size > self.size:
            self._geometry = self._geometry.resized(size)
            self._stack.grow(self._geometry.clusters)

    def _check_range(self, offset: int, length: int) -> None:
        if self.read_only:
            raise ReadOnly("the mount is read-only")
        if offset < 0 or length < 0 or offset + length > MAX_SIZE:
            raise InvalidRange(f"offset {offset}, length {length} is outside what a file can have")

    def refresh(self) -> None:
        """Notice a size that was changed from outside: growth is adopted, a shrink is trouble.

        Does nothing while a change of our own is under way.
        """
        if self._gate.idle:
            self._notice_size()

    def _notice_size(self) -> None:
        size = self._image.size()
        if size > max(self.size, self.max_size) and self.unhealthy is None:
            self.unhealthy = f"the image grew to {size} bytes from outside, beyond max-size"
            self.events.record("unhealthy", reason=self.unhealthy)
            log.error("%s", self.unhealthy)
        elif self.size < size <= self.max_size:
            log.warning("the image grew from %d to %d bytes from outside", self.size, size)
            before = self._geometry
            self._extended(size)
            self.tracker.grew(before, self._geometry)
        elif size < self.size and self.unhealthy is None:
            self._is_unhealthy(
                f"the image was cut from {self.size} to {size} bytes from outside; "
                "data that snapshots need is gone"
            )
            self.tracker.shrank()
            log.error("%s", self.unhealthy)


def _steps(offset: int, end: int) -> Iterator[tuple[int, int]]:
    """[offset, end) as (offset, length) pieces of at most STEP bytes."""
    return ((start, min(STEP, end - start)) for start in range(offset, end, STEP))
