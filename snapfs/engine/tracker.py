"""The life of dirty bitmaps: made, cleared, merged, removed, with a snapshot or without.

Whatever begins a bitmap does so while no write is under way (the gate is
closed): a write that had set its bits in the old one and landed afterwards
would be in none.  The saved list changes at the end, in one replacement; until
then what the new bitmap replaces goes on recording:

    died before the save    the bitmaps as they were, with every bit
    died after it           the new ones, and files that the next mount removes
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio
from attrs import define, field
from bitarray import bitarray
from bitarray.util import zeros

from ..errors import BitmapExists, InvalidRange, ReadOnly, UsageError
from .dirty import BitmapStore, DirtyBitmap, DirtyBitmaps, Selection
from .geometry import Geometry
from .layer import check_name
from .layerkeeper import LayerKeeper
from .reqlist import Gate

log = logging.getLogger(__name__)


@define(eq=False)
class Switch:
    """Bitmaps that begin in the instant of a snapshot, or of a command.

    `fresh` replaces `replaced`, or is new (None).
    """

    fresh: DirtyBitmap | None = None
    replaced: DirtyBitmap | None = None
    begun: bool = field(default=False, init=False)


class Tracker:
    """Changes the dirty bitmaps of an engine.

    `transitions`: the lock for changes of the saved list.  `gate`: writes are
    inside.  `next_id` gives ids that nothing had before.  `flush` makes the
    image durable.
    """

    def __init__(
        self,
        bitmaps: DirtyBitmaps,
        store: BitmapStore,
        keeper: LayerKeeper,
        transitions: trio.Lock,
        gate: Gate,
        geometry: Callable[[], Geometry],
        next_id: Callable[[], int],
        flush: Callable[[], Awaitable[None]],
        check_image: Callable[[], None],
        read_only: bool,
    ) -> None:
        self.bitmaps = bitmaps
        self._store = store
        self._keeper = keeper
        self._transitions = transitions
        self._gate = gate
        self._geometry = geometry
        self._next_id = next_id
        self._flush = flush
        self._check_image = check_image
        self._read_only = read_only
        self._growing = trio.Lock()

    # Recording

    async def record(self, first: int, stop: int) -> None:
        """Set [first, stop) in all bitmaps; to be called by those inside the gate.

        On return every bitmap has the bits or is inconsistent, which one
        becomes that cannot get room for them: the guest's write goes on.
        """
        while not self.bitmaps.mark(first, stop):
            async with self._growing:
                for bitmap in self.bitmaps.short(stop):
                    await self._grow(bitmap, stop)

    async def _grow(self, bitmap: DirtyBitmap, stop: int) -> None:
        try:
            self.bitmaps.enlarge(bitmap, await self._store.grow(bitmap.id, stop))
        except OSError as error:
            if bitmap not in self.bitmaps.short(stop):
                return  # it was removed meanwhile
            log.error("bitmap %s cannot grow with the image: %s", bitmap.name, error.strerror)
            self.bitmaps.spoil(bitmap, f"it could not grow with the image: {error.strerror}")

    async def make_room(self, clusters: int) -> None:
        """Have room for so many clusters in all bitmaps; OSError: not in all."""
        async with self._growing:
            for bitmap in self.bitmaps.short(clusters):
                try:
                    self.bitmaps.enlarge(bitmap, await self._store.grow(bitmap.id, clusters))
                except OSError:
                    if bitmap in self.bitmaps.short(clusters):  # it was not removed meanwhile
                        raise

    def grew(self, old: Geometry, new: Geometry) -> None:
        """The image grew from outside, without a write of ours."""
        clusters = new.touched(old.size, new.size - old.size)
        self.bitmaps.mark(clusters.start, clusters.stop)
        for bitmap in self.bitmaps.short(clusters.stop):
            self.bitmaps.spoil(bitmap, "the image grew from outside")

    def shrank(self) -> None:
        """The image was cut from outside: what came in between nobody knows."""
        for bitmap in self.bitmaps.recording():
            self.bitmaps.spoil(bitmap, "the image was cut from outside")

    # Commands

    async def add(self, name: str) -> DirtyBitmap:
        """A new bitmap, which records from now on.

        Raises InvalidName, BitmapExists, ReadOnly, StateError (the image is not what was
        written to it), OSError; then nothing is left.
        """
        return await self._command(Selection(next=name))

    async def clear(self, name: str) -> DirtyBitmap:
        """Empty a bitmap, which makes an inconsistent one consistent.

        Raises BitmapNotFound, ReadOnly, StateError, OSError; then nothing has changed.
        """
        self.bitmaps.find(name)
        return await self._command(Selection(bitmap=name, clear=True))

    async def _command(self, selection: Selection) -> DirtyBitmap:
        async with self._transitions, self.switching(selection) as switch:
            async with self._gate.closed():
                await self.begin(switch)
            # What fails from now on is noticed; what has may not be in the image any more, though
            # it is still there to be read.
            self._check_image()
            assert switch.fresh is not None
            if switch.fresh.parts is not None and switch.fresh.parts.commit:
                await self._flush()  # a power cut must not change what it begins with
            await self._keeper.save()
            return switch.fresh

    async def remove(self, name: str) -> DirtyBitmap:
        """Remove a bitmap, whatever its state.  Raises BitmapNotFound, ReadOnly, OSError."""
        async with self._transitions:
            self._check_writable()
            bitmap = self.bitmaps.find(name)
            bitmap.listed = False
            try:
                await self._keeper.save()
            except BaseException:
                bitmap.listed = True
                raise
            await self._drop(bitmap)
            return bitmap

    async def merge(self, source: str, target: str) -> DirtyBitmap:
        """Add the clusters of one bitmap to another.

        Raises BitmapNotFound, BitmapUnusable, UsageError, ReadOnly.
        """
        async with self._transitions:
            self._check_writable()
            if source == target:
                raise UsageError(f"bitmap {source!r} cannot be merged into itself")
            count = self._geometry().clusters
            found = self.bitmaps.find(source).usable(count)
            bitmap = self.bitmaps.find(target)
            bits = bitmap.usable(count)
            bits.assign(0, bits.slice(0, count) | found.slice(0, count))
            assert bitmap.parts is not None
            if bitmap.parts.commit is not None:
                self.bitmaps.promise(bitmap.parts.commit, 0, count)
                await self._keeper.copier.promises.kept(0, count)
            return bitmap

    # Several at once

    def check(self, selection: Selection) -> None:
        """Refuse what cannot be done.

        Raises UsageError, InvalidName, BitmapExists, BitmapUnusable, ReadOnly.
        """
        self._check_writable()
        if selection.bitmap is not None and selection.extents is not None:
            raise UsageError("access comes from a bitmap or from extents, not from both")
        if selection.clear and selection.bitmap is None:
            raise UsageError("there is no bitmap to clear: name it")
        if selection.clear and selection.next is not None:
            raise UsageError("a bitmap is cleared or followed by another, not both")
        if selection.next is not None:
            check_name(selection.next)
            if any(bitmap.name == selection.next for bitmap in self.bitmaps):
                raise BitmapExists(f"there is a bitmap {selection.next!r} already")

    def _check_writable(self) -> None:
        if self._read_only:
            raise ReadOnly("the mount is read-only")

    @asynccontextmanager
    async def switching(self, selection: Selection) -> AsyncIterator[Switch]:
        """Make what the selection begins; inside, `begin` and then a save of the list.

        When the block fails all is as it was; else what was replaced goes.
        Raises as `check`, BitmapNotFound, and OSError, before the block.
        """
        self.check(selection)
        switch = Switch()
        if selection.clear and selection.bitmap is not None:
            switch.replaced = self.bitmaps.find(selection.bitmap)
        name = selection.bitmap if selection.clear else selection.next
        if name is not None:
            number = self._next_id()
            parts = await self._store.make(number, self._geometry().clusters)
            switch.fresh = DirtyBitmap(number, name, parts, listed=False)
        replaced = switch.replaced
        if replaced is not None:
            replaced.busy = True
        try:
            yield switch
        except BaseException:
            with trio.CancelScope(shield=True):
                if replaced is not None:
                    replaced.listed, replaced.busy = True, False
                await self._abandon(switch)
            raise
        with trio.CancelScope(shield=True):
            if replaced is not None:
                await self._drop(replaced)

    async def begin(self, switch: Switch) -> None:
        """The instant; the gate is closed.  May wait for room if the image grew meanwhile."""
        fresh = switch.fresh
        if fresh is None:
            return
        clusters = self._geometry().clusters
        assert fresh.parts is not None
        if len(fresh.parts.bits) < clusters:
            old, fresh.parts = fresh.parts, await self._store.grow(fresh.id, clusters)
            if old.bits is not fresh.parts.bits:
                old.bits.release()
        fresh.listed = True
        fresh.began_ns = time.time_ns()
        if switch.replaced is not None:
            switch.replaced.listed = False
        switch.begun = True
        self.bitmaps.begin(fresh)

    async def _abandon(self, switch: Switch) -> None:
        fresh = switch.fresh
        if fresh is None:
            return
        fresh.listed = False
        if switch.begun:
            await self._drop(fresh)
        else:
            if fresh.parts is not None:
                fresh.parts.bits.release()
            await self._remove_file(fresh)

    async def _drop(self, bitmap: DirtyBitmap) -> None:
        """Stop one that is in no saved list."""
        self.bitmaps.end(bitmap)
        await self._remove_file(bitmap)

    async def _remove_file(self, bitmap: DirtyBitmap) -> None:
        try:
            await self._store.remove(bitmap.id)
        except OSError as error:  # the next mount removes it
            log.error("cannot remove the file of a bitmap: %s", error.strerror)

    def selected(self, selection: Selection) -> bitarray | None:
        """The clusters that a snapshot taken now gives access to, None: all.

        Raises BitmapUnusable, and InvalidRange if the image was cut meanwhile.
        """
        count = self._geometry().clusters
        if selection.bitmap is not None:
            return self.bitmaps.wanted(selection.bitmap, count)
        if selection.extents is None:
            return None
        bits = selection.extents[:count]
        if selection.extents[count:].any():
            raise InvalidRange("the image was cut meanwhile: an extent is outside of it")
        bits.extend(zeros(count - len(bits), endian="little"))
        return bits
