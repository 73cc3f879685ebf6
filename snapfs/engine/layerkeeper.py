"""The list of layers that the state directory has, and getting rid of layers.

A layer that nobody needs goes in this order: out of the stack; its temp space;
out of the saved list; its files, when no I/O on its temp image is in flight.
So a list never names files that are gone, and no descriptor is closed under
anybody.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import trio

from .copier import Copier
from .dirty import DirtyBitmaps
from .geometry import Geometry
from .layer import Layer, LayerStore
from .layers import Dropped, LayerStack
from .space import Usage

log = logging.getLogger(__name__)


class LayerKeeper:
    """Saves the list of layers, and retires layers.

    `start` runs a call in the background.  `patience`: seconds to wait for
    space to be freed.  Callers hold the engine's lock for changes of the list.
    """

    copier: Copier  # set by the engine: each needs the other

    def __init__(
        self,
        stack: LayerStack,
        bitmaps: DirtyBitmaps,
        store: LayerStore,
        geometry: Callable[[], Geometry],
        start: Callable[..., None],
        patience: float,
    ) -> None:
        self._stack = stack
        self._bitmaps = bitmaps
        self._store = store
        self._geometry = geometry
        self._start = start
        self._patience = patience
        self.leaving: list[Layer] = []  # out of the stack, but still in the saved list

    async def usage(self) -> Usage:
        """Ask the storage what all temp images take, and what is free for them; OSError.

        Each layer learns what its own takes.  It may never answer: nobody must wait for it
        who can do without.
        """
        layers = [*self._stack, *self.leaving]
        for layer in layers:
            layer.pins += 1
        try:
            taken, free = await self._store.usage([layer.temp for layer in layers])
        finally:
            for layer in layers:
                self.copier.unpin(layer)
        for layer, size in zip(layers, taken, strict=True):
            layer.temp_bytes = size
        return Usage(sum(taken), free)

    # The list

    async def save(self, *coming: Layer) -> None:
        """Record the layers and bitmaps; the files of layers that have left can go then."""
        leaving = list(self.leaving)
        records = [layer.record() for layer in (*self._stack, *coming)]
        await self._store.save(records, self._geometry(), self._bitmaps.records())
        for layer in leaving:
            self.leaving.remove(layer)
            self.copier.unpin(layer)

    async def try_save(self) -> None:
        """Save what may as well be saved later; the bitmaps hold what matters."""
        try:
            await self.save()
        except OSError as error:
            log.error("cannot record the state of the snapshots: %s", error)

    # Getting rid of layers

    def leave(self, layer: Layer) -> None:
        """Let go of a layer that is not in the stack, once a list without it is saved."""
        layer.removed = True
        if layer.commits is not None:
            self.copier.promises.forget(layer.commits.done, layer.commits.access)
        layer.pins += 1
        self.leaving.append(layer)

    async def discard_new(self, layer: Layer) -> None:
        """Undo a creation that failed half-way."""
        if layer in self._stack:
            self._stack.rename(layer, None)
            await self.retire(layer)
        elif not layer.removed:
            layer.name = None
            self.leave(layer)
            await self.try_save()

    async def retire(self, layer: Layer) -> None:
        """Drop a nameless layer: keep only what older snapshots find in it.

        Failures cost space until the next change of the list, or the next
        mount; they are logged.
        """
        layer.live = False
        gone_access = layer.withdraw(0, layer.geometry.clusters)
        dropped = self._stack.withdrawn(layer, 0, gone_access)
        gone = [each for each in self._stack if not each.live and each.is_empty()]
        for each in gone:
            self._stack.remove(each)
            self.leave(each)
        freed = trio.Event()
        self._start(self._free, dropped, gone, freed)
        with trio.move_on_after(self._patience):
            await freed.wait()  # the list may need the space; but not for ever
        if gone:
            await self.try_save()

    async def _free(
        self, dropped: Sequence[Dropped], gone: Sequence[Layer], freed: trio.Event
    ) -> None:
        """Free what nobody needs in temp images, all of it in those that have gone."""
        for layer in gone:
            layer.pins += 1
        try:
            await self.copier.trash(dropped)
            for layer in gone:
                try:
                    await self.copier.promises.kept(0, self._stack.clusters)
                    await layer.temp.truncate(0)
                except OSError as error:
                    log.warning("cannot free the temp image of a deleted snapshot: %s", error)
        finally:
            for layer in gone:
                self.copier.unpin(layer)
            freed.set()

    async def dispose(self, layer: Layer) -> None:
        """Close and remove the files of a layer that is in no list."""
        layer.access.release()
        layer.done.release()
        layer.losses = None
        try:
            await self._store.remove(layer.id)
        except OSError as error:  # the next mount removes them
            log.error("cannot remove the files of a deleted snapshot: %s", error)
