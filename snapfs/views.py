"""What a reader of a snapshot, or of `active`, finds: data and extents.

In extents, data means "must be read": what may not be read counts as data too,
so that a copying program fails there instead of storing zeros.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from attrs import evolve, frozen

from .errors import AccessDenied, SnapshotLost
from .image import Buffer, Image
from .layers import LayerStack, Source
from .reqlist import Request, RequestList, entered
from .snapshot import Layer

log = logging.getLogger(__name__)

SourceName = Literal["active", "temp", "none"]

BATCH = 4096  # extents that one look into a file returns at most


@frozen
class Extent:
    """Bytes [start, start+length) of one kind.  `data`: False for a hole that reads as zeros."""

    start: int
    length: int
    data: bool
    accessible: bool
    source: SourceName

    @property
    def stop(self) -> int:
        """End of the extent, exclusive."""
        return self.start + self.length


def _split(start: int, end: int, data: list[tuple[int, int]], source: SourceName) -> list[Extent]:
    """Extents that cover [start, end): `data` pairs and the holes between them."""
    extents: list[Extent] = []
    for first, stop in [*data, (end, end)]:
        if start < first:
            extents.append(Extent(start, first - start, False, True, source))
        if first < stop:
            extents.append(Extent(first, stop - first, True, True, source))
        start = stop
    return extents


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
    ) -> None:
        self._image = image
        self._stack = stack
        self._frozen_reads = frozen_reads
        self._unpin = unpin

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
        if layer.state == "lost":
            raise SnapshotLost(f"snapshot {layer.name!r} is lost: {layer.reason}")
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
        if len(data) != length:
            log.error("%s is shorter than it must be", "the image" if holder is None else "temp")
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return data

    async def look(
        self, layer: Layer | None, offset: int, end: int, limit: int = BATCH
    ) -> list[Extent]:
        """Some extents from `offset` on, at least one, contiguous, none beyond `end`.

        `layer` None is the image.  Neighbours may be of one kind.
        """
        if layer is None:
            data, known = await self._image.data_extents(offset, end - offset, limit)
            return _split(offset, known, data, "active")
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
        if not layer.access.all(start, stop):  # discarded meanwhile
            return await self.look(layer, offset, end, limit)
        return _split(offset, known, data, "active" if holder is None else "temp")

    async def seek(self, layer: Layer | None, offset: int, size: int, whence: int) -> int:
        """lseek(2) with SEEK_DATA or SEEK_HOLE; OSError ENXIO, EINVAL as there."""
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if not 0 <= offset < size:
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        wanted = whence == os.SEEK_DATA
        while offset < size:
            for extent in await self.look(layer, offset, size, limit=1):
                if extent.data == wanted:
                    return extent.start
                offset = extent.stop
        if wanted:
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        return size

    async def map(self, layer: Layer | None, offset: int, end: int) -> AsyncGenerator[Extent, None]:
        """Extents that cover [offset, end): ascending, maximal, not overlapping."""
        last: Extent | None = None
        while offset < end:
            for extent in await self.look(layer, offset, end):
                offset = extent.stop
                if last is None:
                    last = extent
                elif evolve(extent, start=last.start, length=last.length) == last:
                    last = evolve(last, length=last.length + extent.length)
                else:
                    yield last
                    last = extent
        if last is not None:
            yield last
