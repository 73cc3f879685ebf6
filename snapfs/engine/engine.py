"""The engine: copy-before-write on a live image with any number of snapshots.

What a write does is in `active.py`; this is the life of the snapshots.  A
snapshot is created while no write is between its steps 1 and 5.

Snapshot reads are never blocked: while a copy is in flight the old data is
still in the image.  A read from the image that may take a moment is *frozen*:
step 4 of a write waits for it.

State changes only between two checkpoints, in plain code; after each await it
is looked at again.  The engine knows no FUSE and no command line.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import AsyncGenerator

import trio
from attrs import frozen
from bitarray import bitarray

from ..errors import (
    InvalidRange,
    Pinned,
    SnapshotExists,
    SnapshotLost,
    SnapshotNotFound,
    StateError,
)
from ..storage.image import Buffer
from .active import MAX_SIZE, ActiveImage
from .dirty import Selection
from .layer import Layer, Policy, check_name, check_note
from .published import PublishedLayer, PublishedState
from .snapshotreader import Extent

log = logging.getLogger(__name__)

TRIES = 3  # to have a layer as large as an image that grows, before its writes wait for one


def check_pinned(layer: Layer) -> None:
    """Raise Pinned if the snapshot is not to be deleted or discarded."""
    if layer.pinned:
        raise Pinned(f"snapshot {layer.name!r} is pinned; to let go of it: snapfs unpin")


@frozen
class Wanted:
    """What is to be said of a new snapshot."""

    name: str
    policy: Policy | None
    note: str | None
    pinned: bool


class Engine(ActiveImage):
    """One live image and its snapshots."""

    # Snapshots

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers, oldest first, nameless ones included."""
        return tuple(self._stack)

    @property
    def snapshots(self) -> tuple[Layer, ...]:
        """Snapshots that can be found by name, oldest first."""
        return tuple(layer for layer in self._stack if layer.visible and layer.name is not None)

    def receiver(self) -> Layer | None:
        """The layer that gets copies now."""
        return self._stack.receiver

    def needs_copies(self) -> bool:
        """Is there a cluster whose next write copies it?"""
        return self._stack.pending.any(0, len(self._stack.pending))

    def find(self, name: str) -> Layer:
        """The snapshot of that name; raises SnapshotNotFound."""
        layer = self._stack.find(name)
        if layer is not None and layer.visible:
            return layer
        raise SnapshotNotFound(f"there is no snapshot {name!r}; snapfs list shows those there are")

    def find_id(self, layer_id: int) -> Layer | None:
        """The layer of that number, a nameless one included."""
        return self._stack.find_id(layer_id)

    async def create_snapshot(
        self,
        name: str,
        *,
        policy: Policy | None = None,
        selection: Selection | None = None,
        note: str | None = None,
        pinned: bool = False,
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
        if note is not None:
            check_note(note)
        selection = selection or Selection()
        self._check_new(name)
        self.tracker.check(selection)
        self.tracker.selected(selection)  # fail early
        self._check_image()
        # Without the lock: a resize may wait for that, holding what the kernel needs.
        if self.barrier is not None:
            await self.barrier()
        async with self._creations:
            # Before the other lock is taken: temp storage that hangs must not keep snapshots
            # from being deleted.  (Who is cancelled then leaves files to the next mount.)
            layer = await self._make_layer()
            layer = await self._create(layer, Wanted(name, policy, note, pinned), selection)
        log.info("snapshot %s created", name)
        return layer

    async def _create(self, layer: Layer, wanted: Wanted, selection: Selection) -> Layer:
        """Make the snapshot of a layer; returns that, or its successor.  Raises as above."""
        async with self._transitions:
            try:
                self._check_new(wanted.name)
                async with self.tracker.switching(selection) as switch:
                    await self._keeper.save(layer)
                    for left in reversed(range(TRIES)):
                        async with self._gate.closed():
                            self._notice_size()
                            self._check_image()
                            if layer.geometry.size != self.size and not left:
                                layer = await self._successor(layer)
                            if layer.geometry.size == self.size:
                                bits = self.tracker.selected(selection)
                                await self.tracker.begin(switch)
                                layer.name, layer.policy = wanted.name, wanted.policy
                                layer.note, layer.pinned = wanted.note, wanted.pinned
                                self._begin(layer, bits, selection)
                                if switch.fresh is not None:
                                    switch.fresh.began_ns = layer.created_ns
                                break
                        # A write extended the image meanwhile.  No write must wait for a
                        # new temp image, unless there is no end to it.
                        layer = await self._successor(layer)
                    await self._make_durable(layer)
                    # Its pages may have failed when nobody asked them: it was in no stack yet.
                    self.writeback.check_source(layer)
                    await self._keeper.save()
                    self._check_image()
                    if layer.state == "lost":
                        raise StateError(layer.reason or "the snapshot is lost")
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self._keeper.discard_new(layer)
                raise
            layer.visible = True
            return layer

    def _begin(self, layer: Layer, bits: bitarray | None, selection: Selection) -> None:
        """The instant; the gate is closed.  `bits`: the clusters to give access to, None: all."""
        if bits is not None:
            layer.restrict(bits, selection.bitmap)
        layer.created_ns = time.time_ns()
        layer.blocks = self._image.blocks()
        self._stack.append(layer)

    async def _successor(self, layer: Layer) -> Layer:
        """Make a layer in place of one that has not the size of the image, and list it."""
        self._keeper.leave(layer)
        layer = await self._make_layer()
        try:
            await self._keeper.save(layer)
        except BaseException:
            self._keeper.leave(layer)
            raise
        return layer

    async def _make_durable(self, layer: Layer) -> None:
        """What a new snapshot finds in the image must survive a power cut as its name will."""
        if layer.commits is not None:
            await self.flush()
            await layer.commits.access.commit(self._nursery)

    def _check_new(self, name: str) -> None:
        if self._stack.find(name) is not None:
            raise SnapshotExists(f"there is a snapshot {name!r} already; choose another name")

    async def _make_layer(self) -> Layer:
        geometry = self._geometry
        layer_id = self._take_id()
        parts = await self._store.create(layer_id, geometry)
        parts.access.set(0, geometry.clusters)
        return Layer(
            layer_id, geometry, parts.access, parts.done, parts.temp, parts.losses,
            parts.commits, parts.failure, granted=geometry.clusters, visible=False,
        )  # fmt: skip

    async def rename_snapshot(self, old: str, new: str) -> None:
        """Give a snapshot another name.  Raises SnapshotNotFound, SnapshotExists, InvalidName."""
        check_name(new)
        async with self._transitions:
            layer = self.find(old)
            if old == new:
                return
            self._check_new(new)
            self._stack.rename(layer, new)
            try:
                await self._keeper.save()
            except BaseException:
                self._stack.rename(layer, old)
                raise

    async def annotate_snapshot(
        self, name: str, *, note: str | None = None, pinned: bool | None = None
    ) -> None:
        """Say something else of a snapshot, "" for nothing; or pin it, or not.  None: as it is.

        Raises SnapshotNotFound, UsageError.
        """
        if note is not None:
            check_note(note)
        async with self._transitions:
            layer = self.find(name)
            before = layer.note, layer.pinned
            if note is not None:
                layer.note = note or None
            if pinned is not None:
                layer.pinned = pinned
            try:
                await self._keeper.save()
            except BaseException:
                layer.note, layer.pinned = before
                raise

    async def delete_snapshot(self, name: str) -> None:
        """Delete a snapshot; older ones keep what they find in its temp image.

        Open handles can go on reading; the space is freed at the last close.  Raises
        SnapshotNotFound, Pinned.
        """
        async with self._transitions:
            layer = self.find(name)
            check_pinned(layer)
            self._stack.rename(layer, None)
            try:
                await self._keeper.save()
            except BaseException:
                self._stack.rename(layer, name)
                raise
            log.info("snapshot %s deleted", name)
            if not layer.openers:
                await self._keeper.retire(layer)

    def open_snapshot(self, layer: Layer) -> None:
        """Count an open handle.  Raises SnapshotLost if there is nothing to read."""
        self.check_storage()
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
        if length > 0:
            self.traces.note_read(self._geometry, offset, length)
        return await self._reader.read(layer, offset, length, partial)

    async def discard(self, layer: Layer, offset: int, length: int) -> None:
        """Give up the clusters that lie inside the range as a whole.

        The end of the snapshot counts as aligned.  They are inaccessible at
        once, are not copied any more, and their temp space is freed unless an
        older snapshot finds data there.  An error of freeing is raised; access
        is gone all the same.  Raises Pinned.
        """
        if offset < 0 or length < 0:
            raise InvalidRange(f"offset {offset}, length {length} is no range")
        check_pinned(layer)
        clusters = layer.geometry.covered(offset, length)
        if not clusters:
            return
        self.counters.discards += 1
        self.counters.discarded_bytes += layer.geometry.span(clusters.start, clusters.stop)[1]
        gone = layer.withdraw(clusters.start, clusters.stop)
        self.traces.note(self.traces.discarded, clusters.start, gone)
        if layer.commits is not None:
            self.copier.promises.make(layer.commits.access, clusters.start, clusters.stop)
        dropped = self._stack.withdrawn(layer, clusters.start, gone)
        await self.copier.punch(dropped)
        await self.copier.promises.kept(clusters.start, clusters.stop)

    # The end

    async def finish(self) -> list[str]:
        """Make everything durable, when nothing runs in the nursery any more.

        What cannot be is lost, or inconsistent.  Returns what was lost for such a reason
        since the mount, and nobody has removed, a line each.  Raises OSError if the list
        of what was lost could not be saved.
        """
        self._losses.end()
        if not self.read_only and self.writeback.image_error is None:
            with contextlib.suppress(OSError):  # noted
                await self._flush()
        async with trio.open_nursery() as nursery:  # the store bounds how many at once
            for layer in self.layers:
                nursery.start_soon(self._sync_layer, layer)
        for dirty in self.tracker.bitmaps.recording():
            try:
                await self._store.bitmaps.sync(dirty.id)
            except OSError as error:
                self.writeback.bitmap_failed(dirty, error)
        if self.writeback.image_error is not None:
            # The next mount would take it for something that failed after this one: it
            # looks as after a death.  Here it is known what was lost.
            await self._store.take_errors()
        self.writeback.check()
        complaints = self.writeback.complaints()
        if complaints:
            records = [layer.record() for layer in self.layers]
            await self._store.save(records, self.geometry, self.tracker.bitmaps.records())
        self._store.errors_saved()
        return complaints

    async def _sync_layer(self, layer: Layer) -> None:
        try:
            await self._store.sync(layer.id)
        except OSError as error:
            self.writeback.layer_failed(layer, error)
        except StateError as error:
            log.error("%s", error)
            self.writeback.layer_failed(layer, OSError(errno.EIO, os.strerror(errno.EIO)))

    # For the fast path

    def published_state(self) -> PublishedState:
        """All that it takes to answer what needs no policy, until the next checkpoint."""
        receiver = self._stack.receiver
        commits = receiver.commits if receiver is not None else None
        return PublishedState(
            self._image,
            self._geometry.size,
            self._geometry.cluster_size,
            self._gate.open and not self.read_only,
            self._stack.pending.bits,
            [(read.first, read.stop) for read in self._frozen_reads],
            self.copier.ranges,
            self.copier.promises.ranges,
            self.tracker.bitmaps.buffers(),
            self.tracker.bitmaps.durable,
            [
                PublishedLayer(
                    layer.id, layer.geometry.size, layer.state != "lost",
                    layer.live, layer.temp, layer.access.bits, layer.done.bits,
                )
                for layer in self._stack
            ],
            commits.done_file if commits is not None else None,
            self._store.failures(),
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
