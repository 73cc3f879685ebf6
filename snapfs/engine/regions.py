"""The image in some two thousand regions of one size: how many clusters of each are what.

For pictures of it.  An image may have millions of clusters and thousands of layers, so
whoever asks waits while the answer is put together piece by piece (turns.py), and those who ask
meanwhile get the same one.  What changes in that time is counted as before or as after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal, get_args

import trio
from attrs import define, field, frozen
from bitarray import bitarray
from bitarray.util import zeros

from .bitmap import Bitmap
from .geometry import Geometry
from .layer import Layer
from .turns import Turns

REGIONS = 2048  # at most; tally.c has the number, too
PIECE = 1 << 20  # clusters that are looked at at a time: some ten microseconds for each layer

Kind = Literal["needed", "copied", "dirty", "discarded", "lost"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def region_size(size: int, cluster_size: int) -> int:
    """Bytes of a region of an image of that size: a power of two, for `REGIONS` at most."""
    found = cluster_size
    while size > found * REGIONS:
        found *= 2
    return found


@frozen
class Regions:
    """Clusters of each region, by what they are; `reads`: since the mount, by any snapshot.

    needed: a snapshot finds it in the image, so the next write copies it.  copied: it is in a
    temp image.  dirty: in a dirty bitmap.  discarded: given up in a snapshot.  lost: could not be
    kept for one.  Of a snapshot that had access to some clusters only, from the beginning, what
    was discarded or lost before this mount is not known, and in none.
    """

    size: int
    region_size: int
    cluster_size: int
    clusters: dict[Kind, list[int]]
    reads: list[int]


@define(eq=False)
class Traces:
    """What bitmaps do not tell: clusters that were given up or lost since the mount, and reads.

    Task-atomic.  `reset` when there is no snapshot any more.
    """

    discarded: Bitmap = field(factory=lambda: Bitmap(0))
    lost: Bitmap = field(factory=lambda: Bitmap(0))
    _reads: list[int] = field(factory=list)
    _region_size: int = 0  # of those

    @staticmethod
    def note(noted: Bitmap, first: int, bits: bitarray) -> None:
        """The clusters of `bits`, which begin with cluster `first`, are such.

        Without memory the picture lacks them: whoever discards or loses them goes on.
        """
        stop = first + len(bits)
        try:
            if stop > len(noted):  # to more than that, since discards come one after the other
                noted.grow(max(stop, 2 * len(noted)))
            noted.assign(first, noted.slice(first, stop) | bits)
        except MemoryError:
            pass

    def note_read(self, geometry: Geometry, offset: int, length: int) -> None:
        """A snapshot is read there; `geometry` of the image now."""
        reads = self.reads(geometry)
        first, last = offset // self._region_size, (offset + length - 1) // self._region_size
        for region in range(min(first, len(reads) - 1), min(last + 1, len(reads))):
            reads[region] += 1

    def reads(self, geometry: Geometry) -> list[int]:
        """By region; they begin anew when regions get another size."""
        wanted = region_size(geometry.size, geometry.cluster_size)
        if wanted != self._region_size:
            self._region_size = wanted
            self._reads = [0] * REGIONS
        return self._reads

    def reset(self) -> None:
        """No snapshot is there: what was discarded does not matter any more."""
        self.discarded, self.lost = Bitmap(0), Bitmap(0)


class Survey:
    """Counts the clusters of regions, once for all who ask at a time."""

    def __init__(
        self,
        layers: Iterable[Layer],
        pending: Callable[[], Bitmap],
        dirty: Callable[[int, int], bitarray],
        geometry: Callable[[], Geometry],
        traces: Traces,
    ) -> None:
        """`layers` oldest first, as they are whenever they are looked at."""
        self._layers = layers
        self._pending = pending
        self._dirty = dirty  # `DirtyBitmaps.any_of`
        self._geometry = geometry
        self._traces = traces
        self._one = trio.Lock()
        self._begun = 0  # surveys
        self._newest: tuple[int, Regions] | None = None  # and the number of its survey

    async def take(self) -> Regions:
        """The regions as they are found from now on."""
        before = self._begun
        async with self._one:
            if self._newest is None or self._newest[0] <= before:
                self._begun += 1
                self._newest = self._begun, await self._survey()
            return self._newest[1]

    async def _survey(self) -> Regions:
        geometry = self._geometry()
        size = region_size(geometry.size, geometry.cluster_size)
        per_region = size // geometry.cluster_size
        count = -(-geometry.size // size)
        found: dict[Kind, list[int]] = {kind: [0] * count for kind in KINDS}
        turns = Turns()
        if not any(layer.live for layer in self._layers):
            self._traces.reset()
        for first in range(0, geometry.clusters, PIECE):
            stop = min(first + PIECE, geometry.clusters)
            for kind, bits in (await self._piece(first, stop, turns)).items():
                if not bits.any():
                    continue
                counts = found[kind]
                for start, end in _parts(first, stop, per_region):
                    counts[start // per_region] += bits.count(1, start - first, end - first)
                    if not start // per_region % 256:
                        await turns.take()
        reads = self._traces.reads(geometry)[:count]
        return Regions(geometry.size, size, geometry.cluster_size, found, reads)

    async def _piece(self, first: int, stop: int, turns: Turns) -> dict[Kind, bitarray]:
        copied, discarded, lost = (zeros(stop - first, endian="little") for _ in range(3))
        for layer in list(self._layers):
            await turns.take()
            end = min(stop, len(layer.access), len(layer.done))
            if end <= first:
                continue  # or it is gone meanwhile
            # Most have nothing of most pieces: to look is quicker than to copy.
            if layer.done.any(first, end):
                copied[: end - first] |= layer.done.slice(first, end)
            if layer.live and layer.granted and not layer.access.all(first, end):
                gone, given_up = self._closed(layer, first, end)
                lost[: end - first] |= gone
                discarded[: end - first] |= given_up
        await turns.take()
        return {
            "needed": _cut(self._pending(), first, stop),
            "copied": copied,
            "dirty": self._dirty(first, stop),
            "discarded": discarded & ~lost,
            "lost": lost,
        }

    def _closed(self, layer: Layer, first: int, stop: int) -> tuple[bitarray, bitarray]:
        """Clusters of a live layer that were lost, and that were given up, as far as is known."""
        closed = ~layer.access.slice(first, stop)
        nothing = zeros(stop - first, endian="little")
        if layer.state == "lost":
            return closed, nothing
        discarded = closed & _cut(self._traces.discarded, first, stop)
        if layer.granted < layer.geometry.clusters:  # others were never accessible
            return closed & _cut(self._traces.lost, first, stop) & ~discarded, discarded
        if not layer.lost:
            return nothing, closed
        if layer.lost == layer.granted - layer.accessible:
            return closed, nothing
        return closed & ~discarded, discarded


def _cut(bits: Bitmap, first: int, stop: int) -> bitarray:
    """[first, stop) of a bitmap, clear beyond its end."""
    found = bits.slice(min(first, len(bits)), min(stop, len(bits)))
    found.extend(zeros(stop - first - len(found), endian="little"))
    return found


def _parts(first: int, stop: int, per_region: int) -> Iterator[tuple[int, int]]:
    """[first, stop), cut where regions end."""
    while first < stop:
        end = min(stop, (first // per_region + 1) * per_region)
        yield first, end
        first = end
