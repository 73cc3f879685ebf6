"""The engine: copy-before-write on a live image with any number of snapshots.

Order of a write to `active`, which everything else relies on:

 1. copy the old data of pending clusters to the newest live temp image; two
    writers to one cluster make one copy, and if another's copy failed, try
    yourself (`copier.py`)
 2. set done, clear pending: new snapshot reads go to the temp image
 3. set the dirty bitmaps (`dirty.py`)
 4. wait until no frozen read overlaps; none new can appear, since no snapshot
    finds the range in the image any more
 5. write the image

Snapshot reads are never blocked: while a copy is in flight the old data is
still in the image.  A read from the image that may take a moment is *frozen*:
step 4 waits for it.  A snapshot is created while no write is between 1 and 5.

Punching, zeroing and shrinking `active` are writes.  State changes only
between two checkpoints, in plain code; after each await it is looked at again.
The engine knows no FUSE and no command line.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import TypeVarTuple

import trio

from .copier import Copier, Counters, Settings
from .dirty import DirtyBitmap, DirtyBitmaps, Selection
from .errors import (
    InvalidRange,
    ReadOnly,
    SnapshotExists,
    SnapshotLost,
    SnapshotNotFound,
    StateError,
)
from .geometry import Geometry
from .image import Buffer, Image
from .keeper import LayerKeeper
from .layers import LayerStack
from .moment import LayerMoment, Moment
from .reqlist import Gate, Request, RequestList
from .snapshot import Layer, LayerStore, Policy, check_name
from .space import SpaceStatus, TempSpace
from .tracker import Tracker
from .views import Extent, SnapshotReader

log = logging.getLogger(__name__)

_Arguments = TypeVarTuple("_Arguments")

STEP = 64 << 20  # bytes of a long punch or zeroing that are made safe and done at a time
MAX_SIZE = (1 << 63) - 1  # of a file: off_t


class Engine:
    """One live image and its snapshots.

    Takes over the image and the layers.  `nursery` runs copies and late
    clean-up; the engine must be closed before the nursery is left.
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
        # Awaited by create_snapshot: makes the kernel write back what it holds
        # of `active`.  Set by the FUSE face.
        self.barrier: Callable[[], Awaitable[None]] | None = None
        # Why the image cannot be trusted any more, None while it can.
        self.unhealthy: str | None = None
        self._image = image
        self._geometry = geometry  # task-atomic
        self._store = store
        self._nursery = nursery
        self._next_id = next_id
        self._stack = LayerStack(layers, geometry.clusters)
        self._stack.settle(0, self._stack.clusters)
        self._gate = Gate()  # writes are inside; closing it makes an instant
        self._transitions = trio.Lock()  # one change of the layer list at a time
        self._frozen_reads: RequestList[Request] = RequestList()
        dirty = DirtyBitmaps(bitmaps)
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
            image.flush,
            read_only,
        )
        self.space = TempSpace(
            self._keeper.temp_bytes,
            store.free_bytes,
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
        )
        self._keeper.copier = self.copier
        self.events = self.copier.events
        self.space.on_warning = self._warned_of_space
        dirty.promise, dirty.forget = self.copier.promises.make, self.copier.promises.forget
        self._reader = SnapshotReader(image, self._stack, self._frozen_reads, self.copier.unpin)

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
                self.unhealthy = self.unhealthy or f"unexpected error: {error!r}"
                self.events.record("unhealthy", reason=self.unhealthy)

        self._nursery.start_soon(guarded)

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
        async with self._gate.inside():
            await self._change(
                offset, len(data), partial(self._image.pwrite, offset, data), offset + len(data)
            )
        return len(data)

    async def punch(self, offset: int, length: int) -> None:
        """Free a range of the image; it reads as zeros.  The size stays."""
        self._check_range(offset, length)
        end = min(offset + length, self.size)
        for start, count in _steps(offset, end):
            async with self._gate.inside():
                await self._change(start, count, partial(self._image.punch, start, count))

    async def zero(self, offset: int, length: int, keep_size: bool = False) -> None:
        """Make a range read as zeros; the image grows unless `keep_size`."""
        self._check_range(offset, length)
        end = offset + length
        if keep_size:
            end = min(end, self.size)
        for start, count in _steps(offset, end):
            async with self._gate.inside():
                await self._change(
                    start, count, partial(self._image.zero, start, count), start + count
                )

    async def allocate(self, offset: int, length: int, keep_size: bool) -> None:
        """Reserve space; changes no data, but the image grows unless `keep_size`."""
        self._check_range(offset, length)
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
        async with self._transitions, self._gate.closed():
            old = self._geometry
            for start, count in _steps(size, old.size):
                await self._make_safe(start, count)
            await self._record(min(old.size, size), abs(old.size - size))
            self._store.write_started(size)
            try:
                await self._image.truncate(size)
                self._geometry = old.resized(size)
                self._stack.grow(self._geometry.clusters)
            finally:
                self._store.write_finished()
            await self._keeper.try_save()  # the size has changed: that cannot fail any more

    async def flush(self) -> None:
        """Make the data of the image durable."""
        await self._image.flush()

    async def alter(self, change: Callable[[], None]) -> None:
        """Run a blocking change of the image's owner, mode or times; no data changes."""
        if self.read_only:
            raise ReadOnly("the mount is read-only")
        self._store.write_started(self.size)
        try:
            await trio.to_thread.run_sync(change)
        finally:
            self._store.write_finished()

    async def _change(
        self, offset: int, length: int, change: Callable[[], Awaitable[None]], size: int = 0
    ) -> None:
        """Steps 1 to 5 for a change of [offset, offset+length); the gate is held.

        `size`: the image has at least that many bytes afterwards.
        """
        await self._make_safe(offset, length)
        self._store.write_started(max(size, self.size))
        try:
            await change()
            self._extended(size)
        except OSError:
            self._extended(self._image.size())  # part of it may have landed
            raise
        finally:
            self._store.write_finished()

    async def _make_safe(self, offset: int, length: int) -> None:
        """Steps 1 to 4.  On return the range may be overwritten, until a snapshot is created."""
        clusters = self._geometry.touched(offset, length)
        await self.copier.preserve(clusters.start, clusters.stop)
        # What lies between the end and a write beyond it becomes zeros of the image.
        start = min(offset, self.size)
        await self._record(start, offset + length - start)
        if await self._frozen_reads.wait_clear(clusters.start, clusters.stop):
            self.counters.frozen_waits += 1

    async def _record(self, offset: int, length: int) -> None:
        """Step 3.  Waits for a bitmap that has to grow, or to be durable."""
        clusters = self._geometry.touched(offset, length)
        if not self.tracker.bitmaps.mark(clusters.start, clusters.stop):
            await self.tracker.record(clusters.start, clusters.stop)
        await self.copier.promises.kept(clusters.start, clusters.stop)

    def _extended(self, size: int) -> None:
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
        if size > self.size:
            log.warning("the image grew from %d to %d bytes from outside", self.size, size)
            before = self._geometry
            self._extended(size)
            self.tracker.grew(before, self._geometry)
        elif size < self.size and self.unhealthy is None:
            self.unhealthy = (
                f"the image was cut from {self.size} to {size} bytes from outside; "
                "data that snapshots need is gone"
            )
            self.events.record("unhealthy", reason=self.unhealthy)
            self.tracker.shrank()
            log.error("%s", self.unhealthy)

    # Snapshots

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers, oldest first, nameless ones included."""
        return tuple(self._stack)

    @property
    def snapshots(self) -> tuple[Layer, ...]:
        """Snapshots that can be found by name, oldest first."""
        return tuple(layer for layer in self._stack if layer.visible and layer.name is not None)

    def find(self, name: str) -> Layer:
        """The snapshot of that name; raises SnapshotNotFound."""
        for layer in self._stack:
            if layer.visible and layer.name == name:
                return layer
        raise SnapshotNotFound(f"there is no snapshot {name!r}")

    async def create_snapshot(
        self, name: str, *, policy: Policy | None = None, selection: Selection | None = None
    ) -> Layer:
        """The image as it is now, as a snapshot; copies nothing.

        With a `selection` it gives access to some clusters only, and dirty
        bitmaps are cleared or begun in the same instant.

        Every write that returned before the call is in it, none that starts
        after the return is.  Writes in flight are waited for, new ones wait
        for an instant.  The list of layers is saved twice: before that
        instant with the new layer as a nameless one, since older snapshots
        may find old data in its temp image from then on; and with its name at
        the end.  Raises InvalidName, SnapshotExists, StateError (the image was
        cut from outside), BitmapUnusable, what `Tracker.check` does, OSError;
        then nothing is left behind.
        """
        check_name(name)
        selection = selection or Selection()
        self._check_new(name)
        self.tracker.check(selection)
        self.tracker.selected(selection)  # fail early
        # Without the lock: a resize may wait for that, holding what the kernel needs.
        if self.barrier is not None:
            await self.barrier()
        async with self._transitions:
            self._check_new(name)
            layer = await self._make_layer()
            try:
                async with self.tracker.switching(selection) as switch:
                    await self._keeper.save(layer)
                    async with self._gate.closed():
                        self._notice_size()
                        if self.unhealthy is not None:
                            raise StateError(self.unhealthy)
                        if layer.geometry.size != self.size:  # a write extended the image meanwhile
                            self._keeper.leave(layer)
                            layer = await self._make_layer()
                            await self._keeper.save(layer)
                        bits = self.tracker.selected(selection)
                        await self.tracker.begin(switch)
                        if bits is not None:
                            layer.restrict(bits, selection.bitmap)
                        layer.name, layer.policy = name, policy
                        layer.created_ns = time.time_ns()
                        layer.blocks = self._image.blocks()
                        self._stack.append(layer)
                    await self._make_durable(layer)
                    await self._keeper.save()
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self._keeper.discard_new(layer)
                raise
            layer.visible = True
            log.info("snapshot %s created", name)
            return layer

    async def _make_durable(self, layer: Layer) -> None:
        """What a new snapshot finds in the image must survive a power cut as its name will."""
        if layer.commits is not None:
            await self._image.flush()
            await layer.commits.access.commit(self._nursery)

    def _check_new(self, name: str) -> None:
        if any(layer.name == name for layer in self._stack):
            raise SnapshotExists(f"there is a snapshot {name!r} already")

    def _take_id(self) -> int:
        """An id that no layer and no bitmap has had."""
        self._next_id += 1
        return self._next_id - 1

    async def _make_layer(self) -> Layer:
        geometry = self._geometry
        layer_id = self._take_id()
        parts = await self._store.create(layer_id, geometry)
        parts.access.set(0, geometry.clusters)
        return Layer(
            layer_id, geometry, parts.access, parts.done, parts.temp, parts.losses,
            parts.commits, granted=geometry.clusters, visible=False,
        )  # fmt: skip

    async def rename_snapshot(self, old: str, new: str) -> None:
        """Give a snapshot another name.  Raises SnapshotNotFound, SnapshotExists, InvalidName."""
        check_name(new)
        async with self._transitions:
            layer = self.find(old)
            if old == new:
                return
            self._check_new(new)
            layer.name = new
            try:
                await self._keeper.save()
            except BaseException:
                layer.name = old
                raise

    async def delete_snapshot(self, name: str) -> None:
        """Delete a snapshot; older ones keep what they find in its temp image.

        Open handles can go on reading; the space is freed at the last close.
        """
        async with self._transitions:
            layer = self.find(name)
            layer.name = None
            try:
                await self._keeper.save()
            except BaseException:
                layer.name = name
                raise
            log.info("snapshot %s deleted", name)
            if not layer.openers:
                await self._keeper.retire(layer)

    def open_snapshot(self, layer: Layer) -> None:
        """Count an open handle.  Raises SnapshotLost if there is nothing to read."""
        if layer.state == "lost":
            raise SnapshotLost(f"snapshot {layer.name!r} is lost: {layer.reason}")
        layer.openers += 1

    async def close_snapshot(self, layer: Layer) -> None:
        """Uncount a handle; the last one of a deleted snapshot frees it."""
        layer.openers -= 1
        if layer.openers or layer.name is not None or not layer.live:
            return
        async with self._transitions:
            if layer.live and layer.name is None and not layer.openers:
                await self._keeper.retire(layer)

    async def read_snapshot(
        self, layer: Layer, offset: int, length: int, *, partial: bool = False
    ) -> Buffer:
        """Read the image as it was at the layer's moment; see `SnapshotReader.read`."""
        self.counters.snapshot_reads += 1
        return await self._reader.read(layer, offset, length, partial)

    async def discard(self, layer: Layer, offset: int, length: int) -> None:
        """Give up the clusters that lie inside the range as a whole.

        The end of the snapshot counts as aligned.  They are inaccessible at
        once, are not copied any more, and their temp space is freed unless an
        older snapshot finds data there.  An error of freeing is raised; access
        is gone all the same.
        """
        if offset < 0 or length < 0:
            raise InvalidRange(f"offset {offset}, length {length} is no range")
        clusters = layer.geometry.covered(offset, length)
        if not clusters:
            return
        self.counters.discards += 1
        self.counters.discarded_bytes += layer.geometry.span(clusters.start, clusters.stop)[1]
        layer.withdraw(clusters.start, clusters.stop)
        if layer.commits is not None:
            self.copier.promises.make(layer.commits.access, clusters.start, clusters.stop)
        dropped = self._stack.settle(clusters.start, clusters.stop)
        await self.copier.punch(dropped)
        await self.copier.promises.kept(clusters.start, clusters.stop)

    # For the fast path

    def moment(self) -> Moment:
        """All that it takes to answer what needs no policy, until the next checkpoint."""
        # What must be durable before a write lands takes a wait: promises, and bits that
        # would become some.
        promises = len(self.copier.promises) or any(
            bitmap.parts is not None and bitmap.parts.commit is not None
            for bitmap in self.tracker.bitmaps.recording()
        )
        return Moment(
            self._image,
            self._geometry.size,
            self._geometry.cluster_size,
            self._gate.open and not self.read_only and not promises,
            self._stack.pending.bits,
            [(read.first, read.stop) for read in self._frozen_reads],
            self.copier.ranges,
            self.tracker.bitmaps.buffers(),
            [
                LayerMoment(
                    layer.id, layer.geometry.size, layer.state != "lost",
                    layer.live and layer.commits is None, layer.temp,
                    layer.access.bits, layer.done.bits,
                )
                for layer in self._stack
            ],
        )  # fmt: skip

    # Extents

    async def seek(self, offset: int, whence: int) -> int:
        """SEEK_DATA or SEEK_HOLE on the image; OSError ENXIO as lseek(2)."""
        return await self._reader.seek(None, offset, self.size, whence)

    async def seek_snapshot(self, layer: Layer, offset: int, whence: int) -> int:
        """SEEK_DATA or SEEK_HOLE on a snapshot; what may not be read is data."""
        return await self._reader.seek(layer, offset, layer.geometry.size, whence)

    def map(
        self, layer: Layer | None, offset: int = 0, length: int = MAX_SIZE
    ) -> AsyncGenerator[Extent, None]:
        """Extents of a snapshot, or of the image (None): ascending, merged.

        The caller keeps the snapshot open meanwhile (`open_snapshot`).
        """
        size = self.size if layer is None else layer.geometry.size
        return self._reader.map(layer, offset, min(size, offset + length))

    async def map_page(
        self, layer: Layer | None, offset: int, limit: int
    ) -> tuple[list[Extent], int | None]:
        """Up to `limit` extents as `map` has them, and where the next one begins, or None."""
        size = self.size if layer is None else layer.geometry.size
        return await self._reader.page(layer, offset, size, limit)


def _steps(offset: int, end: int) -> Iterator[tuple[int, int]]:
    """[offset, end) as (offset, length) pieces of at most STEP bytes."""
    return ((start, min(STEP, end - start)) for start in range(offset, end, STEP))
