"""What a write-back that failed has taken, and from whom.

A write that has returned is in the page cache.  When the kernel cannot store it, it
says so once (storage/watch.py), and the data is gone as soon as the page is: the file
then has what it had before.  Which part of the file that was nobody says.  So, at once
and for good:

 - of a *temp image*, or of what tells what it holds: every snapshot is lost that finds
   a cluster there, older ones included.  Copies that are under way do not land
 - of the *image*: no sync of it succeeds any more until it is mounted anew, whoever
   asks (one handle hears of an error once, the others never, and create(2) of a
   snapshot may have been the first to ask).  Dirty bitmaps are inconsistent: one that
   began after the write that is gone lacks its cluster.  A snapshot that is not
   *settled* is lost, and none can be made
 - of a *dirty bitmap*: it is inconsistent

A mapped page that cannot be had at all (port/mappings.c) is as a file that could not be
written back, and worse: its bits may be wrong now.  So whoever acts on bits asks first
(`is_sound`), and the image is written only when the list is saved that says what is lost.

A snapshot is settled when a sync of the image has succeeded that began after its
moment.  A cluster that it finds in the image was not written since its moment (that
would have copied it first), so what it finds there is durable, and the write that is
gone was of another cluster.  Without that, the write may be one from before its moment,
which belongs to it, and which the file does not have any more; a copy that was made of
it meanwhile may be of the older data, too, so it does not matter what was copied.

With durability=power temp images, and the bitmaps of layers, are not asked for here:
nothing counts there before a sync has said that it is durable (durability.py).

Whoever has read for a snapshot asks afterwards, before the answer counts: a page is gone
only after the kernel has noted the error, so who read what was there instead, and asks
then, hears of it.  The image is asked by all of them: what is in a temp image was read
from it.  Everything here is plain `def`, waits for nothing, and is task-atomic.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable

from ..storage.image import Image
from .copier import Copier
from .dirty import DirtyBitmap, DirtyBitmaps
from .durability import GroupCommit
from .layer import Layer
from .layers import Dropped, LayerStack, Source

log = logging.getLogger(__name__)

AT_ONCE = 256  # layers that are asked without a pause: half a millisecond


class WriteBack:
    """Asks the files of an engine whether they could be written back, and draws the conclusions.

    `changed` is called with what temp images need not keep any more, after something was
    lost: the list is to be saved, by `save`.  `unhealthy` is told why the image is.
    `failures`: how many mapped pages have failed (`LayerStore.failures`).
    """

    def __init__(
        self,
        image: Image,
        stack: LayerStack,
        bitmaps: DirtyBitmaps,
        copier: Copier,
        changed: Callable[[list[Dropped]], None],
        unhealthy: Callable[[str], None],
        save: Callable[[], Awaitable[None]],
        failures: Callable[[], int],
    ) -> None:
        self.image_error: OSError | None = None  # the first of the image; it stays
        self._image = image
        self._stack = stack
        self._bitmaps = bitmaps
        self._copier = copier
        self._changed = changed
        self._unhealthy = unhealthy
        self._save = save
        self._failures = failures
        self._mended = failures()  # so many of them are in the saved list
        self._hopeless: list[GroupCommit] = []  # of what is lost; their promises can go
        self._next = 0  # the layer to be asked next, by its place in the stack
        self._lost: list[tuple[Layer | DirtyBitmap, str]] = []  # in this mount

    # Asking

    def check(self) -> None:
        """Ask every file; if there are very many layers, the next `AT_ONCE` of them."""
        self.check_image()
        layers = list(self._stack)
        first = self._next % max(1, len(layers))
        asked = (layers[first:] + layers[:first])[:AT_ONCE]
        self._next = first + len(asked)
        for layer in asked:
            self._check_layer(layer)
        self._check_bitmaps()

    def check_image(self) -> None:
        """Ask the image."""
        error = self._image.failure()
        if error is not None:
            self.image_failed(error)

    def check_source(self, source: Source) -> None:
        """Ask what a snapshot was read from: the image, and a layer that has a copy of it."""
        if not self.is_sound():
            self._check_mapped()
        self.check_image()
        if source is not None:
            self._check_layer(source)

    def _check_layer(self, layer: Layer) -> None:
        error = layer.temp.failure()
        if error is not None:
            self.temp_failed(layer, error)
        error = layer.failure()
        if error is not None:
            self.layer_failed(layer, error)

    # Mapped pages that have failed: their bits are not what they were to be

    def is_sound(self) -> bool:
        """Are all bits right that were read, and stored that were set, but for what the saved list
        tells of?  To be asked before the image is written."""
        return self._failures() == self._mended

    async def mend(self) -> None:
        """Have the saved list tell what is lost with mapped pages that have failed.

        Raises OSError if it cannot be saved: then nothing may be written that relies on bits.
        """
        while not self.is_sound():
            seen = self._failures()
            self._check_mapped()
            hopeless = list(self._hopeless)  # what is lost while the list is saved is not in it
            await self._save()
            self._copier.promises.forget(*hopeless)
            self._hopeless = [each for each in self._hopeless if each not in hopeless]
            self._mended = seen

    def _check_mapped(self) -> None:
        for layer in list(self._stack):
            error = layer.failure()
            if error is not None:
                self.layer_failed(layer, error)
        self._check_bitmaps()

    def _check_bitmaps(self) -> None:
        for bitmap in self._bitmaps.recording():
            assert bitmap.parts is not None
            error = bitmap.parts.failure()
            if error is not None:
                self.bitmap_failed(bitmap, error)

    def refuse(self) -> None:
        """Raise OSError if something that was written to the image may be gone."""
        if self.image_error is not None:
            raise OSError(self.image_error.errno, self.image_error.strerror)

    def complaints(self) -> list[str]:
        """What was lost, and nobody has removed since: a line each."""
        texts = []
        if self.image_error is not None:
            texts.append(self._image_text(self.image_error))
        layers, bitmaps = list(self._stack), list(self._bitmaps)
        for what, text in self._lost:
            if isinstance(what, Layer):
                if what in layers and what.name is not None:
                    texts.append(f"snapshot {what.name!r} is lost: {text}")
            elif what in bitmaps:
                texts.append(f"bitmap {what.name!r} is inconsistent: {text}")
        return texts

    # Conclusions

    @staticmethod
    def _image_text(error: OSError) -> str:
        return f"the image could not be written back: {error.strerror}"

    def image_failed(self, error: OSError) -> None:
        """Something that was written to the image may be gone."""
        text = self._image_text(error)
        if self.image_error is None:
            self.image_error = OSError(error.errno, error.strerror)
            log.error("%s; every sync of it fails until it is mounted anew", text)
            self._unhealthy(text)
        self._lose([each for each in self._stack if not each.settled], error, text)
        for bitmap in self._bitmaps.recording():
            self._spoil(bitmap, text)
        self._changed(self._stack.settle(0, self._stack.clusters))

    def temp_failed(self, layer: Layer, error: OSError) -> None:
        """Something that was written to a temp image may be gone."""
        text = f"its temp image could not be written back: {error.strerror}"
        finders = self._stack.finding(layer)
        self._conclude(layer, finders, error, text)

    def layer_failed(self, layer: Layer, error: OSError) -> None:
        """The same of any file of a layer: what it says that its temp image has is not sure."""
        text = f"what was copied could not be written back: {error.strerror}"
        finders = self._stack.finding(layer, unsure=True)
        self._conclude(layer, finders if layer in finders else [*finders, layer], error, text)

    def _conclude(self, layer: Layer, lost: list[Layer], error: OSError, text: str) -> None:
        log.log(logging.WARNING if lost else logging.INFO, "snapshot %s: %s", layer.name, text)
        self._copier.void(layer)
        self._lose(lost, error, text)
        self._changed(self._stack.settle(0, self._stack.clusters))

    def bitmap_failed(self, bitmap: DirtyBitmap, error: OSError) -> None:
        """Bits of a dirty bitmap may be gone."""
        self._spoil(bitmap, f"it could not be written back: {error.strerror}")
        self._changed([])

    def _spoil(self, bitmap: DirtyBitmap, text: str) -> None:
        log.error("bitmap %s is inconsistent: %s", bitmap.name, text)
        if bitmap.parts is not None and bitmap.parts.commit is not None:
            self._hopeless.append(bitmap.parts.commit)
        self._bitmaps.spoil(bitmap, text)
        bitmap.listed_reason = text
        self._lost.append((bitmap, text))
        self._copier.events.record("inconsistent", bitmap=bitmap.name, reason=text)

    def _lose(self, layers: list[Layer], error: OSError, text: str) -> None:
        for layer in layers:
            if not layer.live or layer.state == "lost":
                continue
            log.error("snapshot %s is lost: %s", layer.name, text)
            layer.lose_all(text, error.errno)
            layer.withdraw(0, layer.geometry.clusters)
            if layer.commits is not None:
                self._copier.promises.make(layer.commits.access, 0, layer.geometry.clusters)
                self._hopeless += [layer.commits.done, layer.commits.access]
            self._lost.append((layer, text))
            self._copier.events.record(
                "lost", snapshot=layer.name, errno=error.errno, reason=os.strerror(error.errno or 0)
            )
