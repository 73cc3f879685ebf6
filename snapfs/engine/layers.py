"""The layers of one image, oldest first, and what follows from their bitmaps.

    source(i, c) = inaccessible      if not access_i[c]
                   temp_j            for the first j >= i with done_j[c]
                   active            otherwise
    pending[c]   = some i has access_i[c] and no j >= i has done_j[c]

Everything here is plain `def`: under trio it is atomic.  No I/O.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from bitarray import bitarray
from bitarray.util import ones, zeros

from . import bitmap
from .bitmap import Bitmap
from .layer import Layer

SLICE = 1 << 26  # clusters that are worked on at a time: 8 MiB of each bitmap

Run = tuple[int, int]  # clusters [first, stop)
Source = Layer | None  # a layer: in its temp image; None: in the image itself
Dropped = tuple[Layer, Iterable[Run]]  # clusters that a temp image need not keep


def shifted(bits: bitarray, first: int) -> Iterator[Run]:
    """Runs of set bits, as clusters, where bit 0 stands for cluster `first`.  Lazy."""
    return ((first + start, first + stop) for start, stop in bitmap.runs(bits, 0, len(bits)))


def _slices(first: int, stop: int) -> Iterator[Run]:
    return ((start, min(start + SLICE, stop)) for start in range(first, stop, SLICE))


class LayerStack:
    """All layers of an image and the pending bitmap derived from them.

    `clusters` is the number of clusters of the image now; `pending` may be
    longer after a shrink, with clear bits at its end.
    """

    def __init__(self, layers: Iterable[Layer], clusters: int) -> None:
        self._layers = list(layers)
        self._by_id = {layer.id: layer for layer in self._layers}
        self._by_name = {layer.name: layer for layer in self._layers if layer.name is not None}
        # set: some snapshot still needs the cluster from the image, so the
        # next write copies it.  A missing bit is a lost snapshot byte; a bit
        # too many costs a copy.
        self.pending = Bitmap(clusters)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __contains__(self, layer: Layer) -> bool:
        return self._by_id.get(layer.id) is layer

    def find_id(self, layer_id: int) -> Layer | None:
        """The layer of that number."""
        return self._by_id.get(layer_id)

    def find(self, name: str) -> Layer | None:
        """The layer of that name."""
        return self._by_name.get(name)

    def rename(self, layer: Layer, name: str | None) -> None:
        """Give a layer of the stack another name, that no other has, or none."""
        if layer.name is not None:
            del self._by_name[layer.name]
        layer.name = name
        if name is not None:
            self._by_name[name] = layer

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
        before = self.receiver
        if before is not None:
            before.received_all()
        self._layers.append(layer)
        self._by_id[layer.id] = layer
        if layer.name is not None:
            self._by_name[layer.name] = layer
        self.grow(layer.geometry.clusters)
        for first, stop in _slices(0, layer.geometry.clusters):
            wanted = self.pending.slice(first, stop)
            wanted |= layer.access.slice(first, stop)
            self.pending.assign(first, wanted)

    def remove(self, layer: Layer) -> None:
        """Take out a layer that is not live and holds nothing."""
        assert not layer.live and layer.is_empty()
        self._layers.remove(layer)
        del self._by_id[layer.id]
        if layer.name is not None:
            del self._by_name[layer.name]

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
        for part in _slices(first, stop):
            dropped += self._settle(*part)
        return dropped

    def _settle(self, first: int, stop: int) -> list[Dropped]:
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
                _clear(layer, first, excess)
                dropped.append((layer, shifted(excess, first)))
            wanted[: end - first] = wanting & ~done
        if first < len(self.pending):
            self.pending.assign(first, wanted[: len(self.pending) - first])
        return dropped

    def landed(self, layer: Layer, first: int, stop: int) -> list[Dropped]:
        """`settle` after a copy into `layer` has set its done bits in [first, stop).

        While all of it is pending, no newer layer has found it and some older one, or this,
        wants it here.  So nothing but pending follows, and no other layer is looked at.
        """
        if (
            layer is self.receiver
            and stop <= len(self.pending)
            and self.pending.all(first, stop)
            and layer.done.all(first, stop)
        ):
            self.pending.clear(first, stop)
            return []
        return self.settle(first, stop)

    def withdrawn(self, layer: Layer, first: int, bits: bitarray) -> list[Dropped]:
        """`settle` after access of one layer to `bits`, from cluster `first` on, has gone.

        Where an older layer wants a cluster here as well, nothing follows.  Elsewhere newer
        layers are looked at until one wants it or has it.  So few are, mostly.
        """
        dropped: list[Dropped] = []
        for start, stop in _slices(0, len(bits)):
            dropped += self._withdrawn(layer, first + start, bits[start:stop])
        return dropped

    def _withdrawn(self, layer: Layer, first: int, bits: bitarray) -> list[Dropped]:
        stop = first + len(bits)
        number = self._layers.index(layer)
        asking = bits.copy()  # does an older layer want them here?
        lost = zeros(len(bits), endian="little")  # none does
        for each in reversed(self._layers[:number]):
            if not asking.any():
                break
            done, access = _sliced(each, first, stop)
            lost |= asking & done
            asking &= ~(done | access)
        lost |= asking
        dropped: list[Dropped] = []
        for each in itertools.islice(self._layers, number, None):
            if not lost.any():
                return dropped
            done, access = _sliced(each, first, stop)
            excess = lost & done & ~access
            if excess.any():
                _clear(each, first, excess)
                dropped.append((each, shifted(excess, first)))
            lost &= ~(done | access)
        for run in shifted(lost, first):
            self.pending.clear(min(run[0], len(self.pending)), min(run[1], len(self.pending)))
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

    def finding(self, holder: Layer, unsure: bool = False) -> list[Layer]:
        """The live layers that find a cluster in the temp image of `holder`.

        `unsure`: what its done bits say is not sure, so those that may.
        """
        number = self._layers.index(holder)
        count = len(holder.done)
        # Clusters that a layer finds there which has none of its own.
        reach = ones(count, endian="little") if unsure else holder.done.slice(0, count)
        result = [holder] if (reach & holder.access.slice(0, count)).any() else []
        for layer in reversed(self._layers[:number]):
            if not reach.any():
                break
            count = min(len(reach), len(layer.done))
            reach[:count] &= ~layer.done.slice(0, count)
            if (reach[:count] & layer.access.slice(0, count)).any():
                result.append(layer)
        return result[::-1]

    def sources(self, layer: Layer, first: int, stop: int) -> Iterator[tuple[int, int, Source]]:
        """Where the clusters [first, stop) of a snapshot are found, as maximal runs.

        Says nothing about access.  Lazy; must not be resumed after a checkpoint.
        """
        layers = self._layers[self._layers.index(layer) :]
        waiting = [(0, first, stop)]  # ranges still to be found, the next one last, from a layer on
        while waiting:
            depth, first, stop = waiting.pop()
            found = None
            while depth < len(layers) and found is None:
                found = _first_run(layers[depth], first, stop)
                depth += found is None
            if found is None:
                yield first, stop, None
                continue
            start, end = found
            if first < start:
                waiting += (depth, start, stop), (depth + 1, first, start)
                continue
            yield start, end, layers[depth]
            if end < stop:
                waiting.append((depth, end, stop))

    def copied(self, layer: Layer, first: int, stop: int) -> bitarray:
        """Clusters of [first, stop) that a snapshot finds in some temp image, access aside."""
        result = zeros(stop - first, endian="little")
        for each in self._layers[self._layers.index(layer) :]:
            end = min(stop, len(each.done))
            if first < end:
                result[: end - first] |= each.done.slice(first, end)
        return result


def _sliced(layer: Layer, first: int, stop: int) -> tuple[bitarray, bitarray]:
    """The done and access bits of a layer in [first, stop), clear beyond its end."""
    count = len(layer.access)
    found = []
    for bits in (layer.done, layer.access):
        piece = bits.slice(min(first, count), min(stop, count))
        piece.extend(zeros(stop - first - len(piece), endian="little"))
        found.append(piece)
    return found[0], found[1]


def _clear(layer: Layer, first: int, bits: bitarray) -> None:
    """Clear those done bits, from cluster `first` on."""
    # Not by one assignment: in a mapped file that may set other bits for a moment.
    for run in shifted(bits, first):
        layer.done.clear(*run)


def _first_run(layer: Layer, first: int, stop: int) -> Run | None:
    """The first run of done bits of a layer in [first, stop), which may be beyond its end."""
    return next(layer.done.runs(first, min(stop, len(layer.done))), None)
