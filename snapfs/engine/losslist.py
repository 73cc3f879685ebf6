"""The saved list, in so far as it tells what was lost by storage that failed.

What is lost is so at once, in plain code (writeback.py); here it becomes persistent, in
the background, one save for all that was lost before it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from .layerkeeper import LayerKeeper
from .layers import Dropped
from .writeback import WriteBack

log = logging.getLogger(__name__)

MEND_SECONDS = 1.0  # after which the list is tried to be saved again, if nobody writes


class LossList:
    """Saves what is lost.

    `transitions`: the engine's lock; `start` runs a call in the background.
    """

    def __init__(
        self, keeper: LayerKeeper, transitions: trio.Lock, start: Callable[..., None]
    ) -> None:
        self._keeper = keeper
        self._transitions = transitions
        self._start = start
        self._ended = False
        self._saving = False  # a save waits for its turn
        self._mending = False  # `mend` is under way

    def end(self) -> None:
        """Nothing runs in the background from now on: who ends the engine saves the list."""
        self._ended = True

    def changed(self, dropped: list[Dropped]) -> None:
        """Something is lost; `dropped` is what temp images need not keep any more."""
        if not self._ended:
            self._start(self._save, dropped)

    async def _save(self, dropped: list[Dropped]) -> None:
        await self._keeper.copier.trash(dropped)
        if self._saving:
            return  # the one that waits will have it
        self._saving = True
        async with self._transitions:
            self._saving = False
            await self._keeper.try_save()

    async def save(self) -> None:
        """Save the list now.  Raises OSError."""
        async with self._transitions:
            await self._keeper.save()

    def mend(self, writeback: WriteBack) -> None:
        """Have the saved list tell what is lost with mapped pages, some time."""
        if not self._mending and not writeback.is_sound():
            self._mending = True
            self._start(self._mend, writeback)

    async def _mend(self, writeback: WriteBack) -> None:
        try:
            await writeback.mend()
        except OSError as error:
            log.error("cannot record the state of the snapshots: %s", error)
            await trio.sleep(MEND_SECONDS)
        finally:
            self._mending = False
