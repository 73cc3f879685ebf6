"""What a reader of a snapshot, or of `active`, finds: data and extents.

In extents, data means "must be read": what may not be read counts as data too,
so that a copying program fails there instead of storing zeros.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal, NamedTuple

from attrs import frozen
from bitarray import bitarray

from ..errors import AccessDenied, SnapshotLost
from ..storage.image import Buffer, Image
from . import bitmap
from .geometry import Geometry
from .layer import Layer
from .layers import SLICE, LayerStack, Source
from .reqlist import Request, RequestList, entered

log = logging.getLogger(__name__)

SourceName = Literal["active", "temp", "none"]

BATCH = 4096  # extents that are looked up at a time
LEAST = 64  # and at least, where some are known already


class Extent(NamedTuple):
    """Bytes [start, start+length) of one kind.  `data`: False for a hole that reads as zeros.

    `dirty`: in a dirty bitmap that was asked for.
    """

    start: int
    length: int
    data: bool
    accessible: bool
    source: SourceName
    dirty: bool = False

    @property
    def stop(self) -> int:
        """End of the extent, exclusive."""
        return self.start + self.length


@frozen
class _Piece:
    """Bytes [start, stop) of a snapshot that one file holds; `closed`: not accessible."""

    start: int
    stop: int
    holder: Source
    closed: bool = False


def _refuse_lost(layer: Layer) -> None:
    if layer.state == "lost":
        raise SnapshotLost(f"snapshot {layer.name!r} is lost: {layer.reason}")


def _split(
    start: int, end: int, data: Iterable[tuple[int, int]], source: SourceName
) -> Iterator[Extent]:
    """Extents that cover [start, end): `data` pairs and the holes between them."""
    for first, stop in data:
        if start < first:
            yield Extent(start, first - start, False, True, source)
        if first < stop:
            yield Extent(first, stop - first, True, True, source)
        start = stop
    if start < end:
        yield Extent(start, end - start, False, True, source)


def marked(extents: Iterable[Extent], bits: bitarray, geometry: Geometry) -> Iterator[Extent]:
    """The extents, cut where `bits`, one for each cluster from 0 on, change; with `dirty` set.

    Clusters beyond the bits are not dirty.
    """
    if not bits.any():
        yield from extents
        return
    for extent in extents:
        clusters = geometry.touched(extent.start, extent.length)
        position = extent.start
        for first, stop in bitmap.runs(bits, clusters.start, min(clusters.stop, len(bits))):
            start = max(position, first * geometry.cluster_size)
            end = min(extent.stop, stop * geometry.cluster_size)
            if position < start:
                yield extent._replace(start=position, length=start - position)
            yield extent._replace(start=start, length=end - start, dirty=True)
            position = end
        if position == extent.start:
            yield extent
        elif position < extent.stop:
            yield extent._replace(start=position, length=extent.stop - position)


class SnapshotReader:
    """Reads snapshots, and looks up extents of snapshots and of the image.

    What is read from the image and may take a moment is entered in
    `frozen_reads`; a layer whose temp image is in use is pinned.
    """

    def __init__(
        self,
        image: Image,
        stack: LayerStack,
        frozen_reads: RequestList[Request],
        unpin: Callable[[Layer], None],
        check: Callable[[Source], None],
    ) -> None:
        self._image = image
        self._stack = stack
        self._frozen_reads = frozen_reads
        self._unpin = unpin
        self._check = check  # `WriteBack.check_source`: to be called after a file was asked

    @contextmanager
    def _using(self, holder: Source, first: int, stop: int) -> Iterator[Image]:
        """The file that holds [first, stop), kept from changing or closing meanwhile."""
        if holder is None:
            with entered(self._frozen_reads, first, stop):
                yield self._image
        else:
            holder.pins += 1
            try:
                yield holder.temp
            finally:
                self._unpin(holder)

    async def read(self, layer: Layer, offset: int, length: int, partial: bool) -> Buffer:
        """Read the image as it was at the layer's moment; waits for nobody.

        Short only at the end of the snapshot, empty beyond it.  Raises
        AccessDenied if a byte of the range may not be read; with `partial` the
        accessible bytes before it are returned, if there are any.  Raises
        SnapshotLost, and OSError of the file that holds the data.
        """
        _refuse_lost(layer)
        length = min(length, layer.geometry.size - offset)
        if length <= 0:
            return b""
        length = self._readable(layer, offset, length, partial)
        pieces: list[Buffer] = []
        position, end = offset, offset + length
        while position < end:
            piece = await self._read_piece(layer, position, end)
            pieces.append(piece)
            position += len(piece)
        _refuse_lost(layer)
        # What was discarded while we read may have been punched under us.
        length = self._readable(layer, offset, length, partial)
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return data if len(data) == length else memoryview(data)[:length]

    def _readable(self, layer: Layer, offset: int, length: int, partial: bool) -> int:
        """Length of the accessible bytes from `offset` on; AccessDenied if that will not do."""
        clusters = layer.geometry.touched(offset, length)
        closed = next(layer.access.runs(clusters.start, clusters.stop, False), None)
        if closed is None:
            return length
        available = closed[0] * layer.geometry.cluster_size - offset
        if not partial or available <= 0:
            raise AccessDenied(
                f"offset {offset}, length {length} of snapshot {layer.name!r} may not be read"
            )
        return available

    async def _read_piece(self, layer: Layer, offset: int, end: int) -> Buffer:
        """Read from one source, from `offset` up to where it ends; never empty."""
        clusters = layer.geometry.touched(offset, end - offset)
        first, stop, holder = next(self._stack.sources(layer, clusters.start, clusters.stop))
        length = min(end, layer.geometry.end_of(stop)) - offset
        file = self._image if holder is None else holder.temp
        data = file.pread_nowait(offset, length)
        if data is None:
            with self._using(holder, first, stop):
                data = await file.pread(offset, length)
        self._check(holder)
        if len(data) != length:
            log.error("%s is shorter than it must be", "the image" if holder is None else "temp")
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return data

    async def look(
        self, layer: Layer | None, offset: int, end: int, limit: int = BATCH
    ) -> list[Extent]:
        """Some extents from `offset` on, at least one, contiguous, none beyond `end`.

        `layer` None is the image.  Neighbours may be of one kind.  About `limit`
        extents: that many at most if data and holes take turns.
        """
        if layer is not None:
            _refuse_lost(layer)
        if layer is None:
            data, known = await self._image.data_extents(offset, end - offset, limit // 2 + 1)
            return list(_split(offset, known, data, "active"))
        clusters = layer.geometry.touched(offset, end - offset)[:SLICE]
        end = min(end, layer.geometry.end_of(clusters.stop))
        pieces = self._pieces(layer, offset, end, limit // 2 + 1)
        stop = layer.geometry.touched(pieces[-1].stop - 1, 1).stop
        before = self._answers(layer, clusters.start, stop)
        found = await self._look_inside(pieces, limit // 2 + 1)
        now = self._answers(layer, clusters.start, stop)
        # Where a cluster was copied or discarded meanwhile the image may have
        # changed before we looked; elsewhere nobody could write it.
        wrong = [changed for changed in map(_first_change, before, now) if changed is not None]
        edge = (clusters.start + min(wrong)) * layer.geometry.cluster_size if wrong else end
        if edge <= offset:
            return await self._look_frozen(layer, offset, end, limit)
        return [
            extent if extent.stop <= edge else extent._replace(length=edge - extent.start)
            for extent in found
            if extent.start < edge
        ]

    def _answers(self, layer: Layer, first: int, stop: int) -> tuple[bitarray, bitarray]:
        """What decides where clusters are found; no more than this can change."""
        return layer.access.slice(first, stop), self._stack.copied(layer, first, stop)

    def _pieces(self, layer: Layer, offset: int, end: int, limit: int) -> list[_Piece]:
        """Up to `limit` pieces from `offset` on, at least one."""
        clusters = layer.geometry.touched(offset, end - offset)
        pieces: list[_Piece] = []
        start, first = offset, clusters.start
        while first < clusters.stop and len(pieces) < limit:
            open_ = layer.access.get(first)
            stop = next(layer.access.runs(first, clusters.stop, open_))[1]
            sources: Iterable[tuple[int, int, Source]] = [(first, stop, None)]
            if open_:
                sources = self._stack.sources(layer, first, stop)
            for _, stop_, holder in itertools.islice(sources, limit - len(pieces)):
                edge = min(end, layer.geometry.end_of(stop_))
                pieces.append(_Piece(start, edge, holder, not open_))
                start, first = edge, stop_
        return pieces

    async def _look_inside(self, pieces: list[_Piece], limit: int) -> list[Extent]:
        """Extents of the pieces, one trip for each file that holds some; maybe not of all."""
        ranges: dict[Source, list[tuple[int, int]]] = {}
        for piece in pieces:
            if not piece.closed:
                ranges.setdefault(piece.holder, []).append((piece.start, piece.stop))
        data: dict[Source, deque[tuple[int, int]]] = {}
        known = pieces[-1].stop
        with ExitStack() as stack:
            for holder in ranges:
                if holder is not None:
                    stack.enter_context(self._using(holder, 0, 0))
            for holder, wanted in ranges.items():
                file = self._image if holder is None else holder.temp
                pairs, upto = await file.data_inside(wanted, limit)
                self._check(holder)
                data[holder] = deque(pairs)
                if upto < wanted[-1][1]:
                    known = min(known, upto)
        extents: list[Extent] = []
        for piece in pieces:
            stop = min(piece.stop, known)
            if piece.start >= stop:
                break
            if piece.closed:
                extents.append(Extent(piece.start, stop - piece.start, True, False, "none"))
                continue
            rest, inside = data[piece.holder], []
            while rest and rest[0][0] < stop:
                first, last = rest.popleft()
                inside.append((first, min(last, stop)))
            source: SourceName = "active" if piece.holder is None else "temp"
            extents.extend(_split(piece.start, stop, inside, source))
        return extents

    async def _look_frozen(self, layer: Layer, offset: int, end: int, limit: int) -> list[Extent]:
        """`look` at the first run only, while writes to it wait: it cannot fail again and again."""
        geometry = layer.geometry
        clusters = geometry.touched(offset, end - offset)
        accessible = layer.access.get(clusters.start)
        start, stop = next(layer.access.runs(clusters.start, clusters.stop, accessible))
        if not accessible:
            edge = min(end, geometry.end_of(stop))
            return [Extent(offset, edge - offset, True, False, "none")]
        start, stop, holder = next(self._stack.sources(layer, start, stop))
        edge = min(end, geometry.end_of(stop))
        with self._using(holder, start, stop) as file:
            data, known = await file.data_extents(offset, edge - offset, limit)
        self._check(holder)
        if not layer.access.all(start, stop):  # discarded meanwhile
            return await self.look(layer, offset, end, limit)
        return list(_split(offset, known, data, "active" if holder is None else "temp"))

    async def seek(self, layer: Layer | None, offset: int, size: int, whence: int) -> int:
        """lseek(2) with SEEK_DATA or SEEK_HOLE; OSError ENXIO, EINVAL as there."""
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if not 0 <= offset < size:
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        wanted = whence == os.SEEK_DATA
        limit = 1
        while offset < size:
            for extent in await self.look(layer, offset, size, limit):
                if extent.data == wanted:
                    return extent.start
                offset = extent.stop
            limit = min(BATCH, 8 * limit)
        if wanted:
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        return size

    async def page(
        self, layer: Layer | None, offset: int, end: int, limit: int
    ) -> tuple[list[Extent], int | None]:
        """Up to `limit` extents of [offset, end), and where the next one begins, or None.

        Ascending, maximal, not overlapping.
        """
        found: list[Extent] = []
        while offset < end:
            missing = limit + 2 - len(found)
            for extent in await self.look(layer, offset, end, max(missing, LEAST)):
                if found and extent[2:] == found[-1][2:]:
                    last = found[-1]
                    found[-1] = last._replace(length=last.length + extent.length)
                else:
                    found.append(extent)
            offset = found[-1].stop
            if len(found) > limit:
                return found[:limit], found[limit].start
        return found, None

    async def map(self, layer: Layer | None, offset: int, end: int) -> AsyncGenerator[Extent, None]:
        """All extents of [offset, end), as `page` has them."""
        following: int | None = offset
        while following is not None:
            found, following = await self.page(layer, following, end, BATCH)
            for extent in found:
                yield extent


def _first_change(before: bitarray, now: bitarray) -> int | None:
    """The first bit in which two bitmaps of one length differ."""
    if before == now:
        return None
    return (before ^ now).find(1)
