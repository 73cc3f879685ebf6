"""The layers of one image, oldest first, and what follows from their bitmaps.

    source(i, c) = inaccessible      if not access_i[c]
                   temp_j            for the first j >= i with done_j[c]
                   active            otherwise
    pending[c]   = some i has access_i[c] and no j >= i has done_j[c]

Everything here is plain `def`: under trio it is atomic.  No I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bitarray import bitarray
from bitarray.util import zeros

from . import bitmap
from .bitmap import Bitmap
from .layer import Layer

Run = tuple[int, int]  # clusters [first, stop)
Source = Layer | None  # a layer: in its temp image; None: in the image itself
Dropped = tuple[Layer, Iterable[Run]]  # clusters that a temp image need not keep


def shifted(bits: bitarray, first: int) -> Iterator[Run]:
    """Runs of set bits, as clusters, where bit 0 stands for cluster `first`.  Lazy."""
    return ((first + start, first + stop) for start, stop in bitmap.runs(bits, 0, len(bits)))


class LayerStack:
    """All layers of an image and the pending bitmap derived from them.

    `clusters` is the number of clusters of the image now; `pending` may be
    longer after a shrink, with clear bits at its end.
    """

    def __init__(self, layers: Iterable[Layer], clusters: int) -> None:
        self._layers = list(layers)
        # set: some snapshot still needs the cluster from the image, so the
        # next write copies it.  A missing bit is a lost snapshot byte; a bit
        # too many costs a copy.
        self.pending = Bitmap(clusters)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def receiver(self) -> Layer | None:
        """The newest live layer, whose temp image receives copies."""
        for layer in reversed(self._layers):
            if layer.live:
                return layer
        return None

    @property
    def clusters(self) -> int:
        """The most clusters that any layer or the image has had."""
        return max([len(self.pending), *(len(layer.access) for layer in self._layers)])

    def append(self, layer: Layer) -> None:
        """Add the newest layer; what it may read is pending from now on."""
        self._layers.append(layer)
        self.grow(layer.geometry.clusters)
        count = layer.geometry.clusters
        self.pending.assign(0, self.pending.slice(0, count) | layer.access.slice(0, count))

    def remove(self, layer: Layer) -> None:
        """Take out a layer that is not live and holds nothing."""
        assert not layer.live and layer.is_empty()
        self._layers.remove(layer)

    def grow(self, clusters: int) -> None:
        """The image has at least `clusters` clusters from now on; new ones are not pending."""
        self.pending.grow(clusters)

    def settle(self, first: int, stop: int) -> list[Dropped]:
        """Make pending and the done bitmaps right for [first, stop).

        To be called whenever access or done bits there changed in any way that
        may only lessen what is needed (discard, delete, a copy that landed).
        Clears the done bits of clusters that no snapshot finds there any more
        and returns them by layer: the caller punches them out of its temp
        image.  Walks the layers once, oldest first, with the set of clusters
        that some layer so far wants and has not found.
        """
        dropped: list[Dropped] = []
        wanted = zeros(stop - first, endian="little")
        for layer in self._layers:
            end = min(stop, len(layer.access))
            if end <= first:
                continue
            wanting = wanted[: end - first]
            wanting |= layer.access.slice(first, end)
            done = layer.done.slice(first, end)
            excess = done & ~wanting
            if excess.any():
                # Not by one assignment: in a mapped file that may set other bits for a moment.
                for run in shifted(excess, first):
                    layer.done.clear(*run)
                dropped.append((layer, shifted(excess, first)))
            wanted[: end - first] = wanting & ~done
        if first < len(self.pending):
            self.pending.assign(first, wanted[: len(self.pending) - first])
        return dropped

    def needing(self, first: int, stop: int) -> list[tuple[Layer, bitarray]]:
        """Live layers whose source is the image somewhere in [first, stop), with those bits."""
        result: list[tuple[Layer, bitarray]] = []
        covered = zeros(stop - first, endian="little")
        for layer in reversed(self._layers):
            end = min(stop, len(layer.access))
            if end <= first:
                continue
            covered[: end - first] |= layer.done.slice(first, end)
            bits = layer.access.slice(first, end) & ~covered[: end - first]
            if bits.any():
                result.append((layer, bits))
        return result

    def sources(self, layer: Layer, first: int, stop: int) -> Iterator[tuple[int, int, Source]]:
        """Where the clusters [first, stop) of a snapshot are found, as maximal runs.

        Says nothing about access.  Lazy; must not be resumed after a checkpoint.
        """
        below = self._layers[self._layers.index(layer) :]
        return self._search(below, 0, first, stop)

    def copied(self, layer: Layer, first: int, stop: int) -> bitarray:
        """Clusters of [first, stop) that a snapshot finds in some temp image, access aside."""
        result = zeros(stop - first, endian="little")
        for each in self._layers[self._layers.index(layer) :]:
            end = min(stop, len(each.done))
            if first < end:
                result[: end - first] |= each.done.slice(first, end)
        return result

    def _search(
        self, layers: list[Layer], depth: int, first: int, stop: int
    ) -> Iterator[tuple[int, int, Source]]:
        while depth < len(layers) and not layers[depth].done.any(
            min(first, len(layers[depth].done)), min(stop, len(layers[depth].done))
        ):
            depth += 1
        if depth == len(layers):
            yield first, stop, None
            return
        layer = layers[depth]
        position = first
        for start, end in layer.done.runs(first, min(stop, len(layer.done))):
            if position < start:
                yield from self._search(layers, depth + 1, position, start)
            yield start, end, layer
            position = end
        if position < stop:
            yield from self._search(layers, depth + 1, position, stop)
