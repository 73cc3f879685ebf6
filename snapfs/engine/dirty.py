"""Dirty bitmaps: which clusters of the image were written since a moment.

A bit is set before the data that it tells of can land (step 3 of a write) and
is never cleared in place: clearing a bitmap puts an empty one of the same name
beside it, and until the saved list names that one both record.  So whatever a
crash leaves is right, or has too many bits.

A bitmap that may lack a bit is *inconsistent*: it does not record, has no bits,
and can only be cleared or removed.

Everything here is plain `def`: under trio it is atomic.  No I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from attrs import define, field, frozen
from bitarray import bitarray
from bitarray.util import intervals, zeros

from ..errors import BitmapNotFound, BitmapUnusable, InvalidRange
from .bitmap import Bitmap
from .durability import GroupCommit
from .geometry import Geometry

EVERYTHING = 1 << 62  # clusters
REMEDY = "a full copy is needed"


@frozen
class BitmapRecord:
    """What the manifest keeps of a dirty bitmap; the rest is in its file.

    `reason`: why it is inconsistent, if its file cannot be relied upon to say so.  `began_ns`:
    see DirtyBitmap; None in what was saved before that was known.
    """

    id: int
    name: str
    reason: str | None = None
    began_ns: int | None = None


@frozen
class DirtyParts:
    """Where the bits of a bitmap are.

    `buffer` is what native code may set bits in, least significant bit first;
    it has the bits of `bits`, which is as long as the room for it: the bits
    beyond the end of the image have no meaning until the image grows, which
    sets them.  `spoil` notes lastingly why the bitmap is inconsistent.
    `commit`: None if all that need not survive a power cut.  `failure`: what of the
    file could not be written back since the last call; does not block.
    """

    bits: Bitmap
    buffer: Any
    spoil: Callable[[str], None]
    commit: GroupCommit | None = None
    failure: Callable[[], OSError | None] = lambda: None


class BitmapStore(Protocol):
    """Where dirty bitmaps are kept: the state directory, or memory in tests."""

    async def make(self, bitmap_id: int, clusters: int) -> DirtyParts:
        """Make the file of a bitmap, all clear, for at least that many clusters.

        On failure (OSError) nothing is left behind.
        """

    async def grow(self, bitmap_id: int, clusters: int) -> DirtyParts:
        """Make room for more clusters; the parts used so far show the same bits.  OSError."""

    async def remove(self, bitmap_id: int) -> None:
        """Remove the file of a bitmap that is in no saved list.  Idempotent."""

    async def sync(self, bitmap_id: int) -> None:
        """Make the file durable; OSError also if it could not be written back before."""


@define(eq=False)
class DirtyBitmap:
    """One bitmap.  Fields change only in plain `def` functions (task-atomic)."""

    id: int  # set in the constructor; never used again
    name: str
    parts: DirtyParts | None  # None: inconsistent
    reason: str | None = None  # why it is inconsistent
    listed_reason: str | None = None  # the same, if the saved list must have it
    listed: bool = True  # found by name and in the list that is saved next
    busy: bool = False  # a command is about to replace it
    # Since when it has every change, as nanoseconds since 1970: created_ns of the snapshot in
    # whose instant it began, if there was one.
    began_ns: int | None = None

    def spoil(self, reason: str) -> None:
        """It may lack a bit from now on."""
        if self.parts is not None:
            self.parts.spoil(reason)
            self.parts.bits.release()
            self.parts, self.reason = None, reason

    def record(self) -> BitmapRecord:
        """What the manifest keeps."""
        return BitmapRecord(self.id, self.name, self.listed_reason, self.began_ns)

    def usable(self, clusters: int) -> Bitmap:
        """Its bits, for an image of that many clusters; BitmapUnusable if there are none."""
        if self.parts is None:
            raise BitmapUnusable(f"bitmap {self.name!r} is inconsistent: {self.reason}; {REMEDY}")
        if len(self.parts.bits) < clusters:
            raise BitmapUnusable(
                f"bitmap {self.name!r} covers {len(self.parts.bits)} clusters and the image has "
                f"{clusters}; {REMEDY}"
            )
        return self.parts.bits

    def count(self, clusters: int) -> int:
        """Dirty clusters of an image of that many clusters; 0 if inconsistent."""
        if self.parts is None:
            return 0
        return self.parts.bits.count(0, min(clusters, len(self.parts.bits)))


class DirtyBitmaps:
    """All dirty bitmaps of an image, those included that are coming or going."""

    def __init__(self, bitmaps: Iterable[DirtyBitmap]) -> None:
        self._bitmaps = list(bitmaps)
        # Called when `buffers` would answer something else, before the next
        # checkpoint; for native code that sets bits itself.
        self.changed: Callable[[], None] = lambda: None
        # Where to tell of what must be durable before [first, stop) is written,
        # and what need not be any more: `Promises.make` and `forget`.
        self.promise: Callable[[GroupCommit, int, int], None] = lambda *_: None
        self.forget: Callable[[GroupCommit], None] = lambda *_: None

    def __iter__(self) -> Iterator[DirtyBitmap]:
        """Those that can be found by name, oldest first."""
        return iter([bitmap for bitmap in self._bitmaps if bitmap.listed])

    def find(self, name: str) -> DirtyBitmap:
        """The bitmap of that name; raises BitmapNotFound."""
        for bitmap in self:
            if bitmap.name == name:
                return bitmap
        raise BitmapNotFound(
            f"there is no bitmap {name!r}; snapfs bitmap list shows those there are"
        )

    def wanted(self, name: str, clusters: int) -> bitarray:
        """A copy of the bits of a bitmap; BitmapUnusable if there is none or it cannot be used."""
        try:
            return self.find(name).usable(clusters).slice(0, clusters)
        except BitmapNotFound:
            raise BitmapUnusable(f"there is no bitmap {name!r}; {REMEDY}") from None

    def any_of(self, first: int, stop: int) -> bitarray:
        """Clusters of [first, stop) that some bitmap has."""
        result = zeros(stop - first, endian="little")
        for bitmap in self:
            if bitmap.parts is not None:
                end = min(stop, len(bitmap.parts.bits))
                if first < end:
                    result[: end - first] |= bitmap.parts.bits.slice(first, end)
        return result

    def buffers(self) -> list[Any]:
        """The bits of all that record, for native code: see `DirtyParts.buffer`.

        A write may be carried out natively only if all of its clusters have
        their bit in each of them, or room for it that is set before the write;
        the latter not if they must be `durable`.
        """
        return [bitmap.parts.buffer for bitmap in self._bitmaps if bitmap.parts is not None]

    def records(self) -> tuple[BitmapRecord, ...]:
        """The list to save."""
        return tuple(bitmap.record() for bitmap in self)

    # Recording

    def mark(self, first: int, stop: int) -> bool:
        """Set [first, stop) in all that record; False if one of them is too short for it.

        Those that must survive a power cut make a promise first.

        Then nothing may be written before `short` names none any more and it is
        called again.
        """
        enough = True
        for bitmap in self._bitmaps:
            if bitmap.parts is not None:
                if len(bitmap.parts.bits) < stop:
                    enough = False
                else:
                    if bitmap.parts.commit and not bitmap.parts.bits.all(first, stop):
                        self.promise(bitmap.parts.commit, first, stop)
                    bitmap.parts.bits.set(first, stop)
        return enough

    @property
    def durable(self) -> bool:
        """Must bits be durable before what they tell of is written?"""
        return any(bitmap.parts.commit for bitmap in self._bitmaps if bitmap.parts is not None)

    def short(self, stop: int) -> list[DirtyBitmap]:
        """Those that record and have no room for clusters up to `stop`."""
        return [
            bitmap
            for bitmap in self._bitmaps
            if bitmap.parts is not None and len(bitmap.parts.bits) < stop
        ]

    def recording(self) -> list[DirtyBitmap]:
        """All that record, those included that are coming or going."""
        return [bitmap for bitmap in self._bitmaps if bitmap.parts is not None]

    def enlarge(self, bitmap: DirtyBitmap, parts: DirtyParts) -> None:
        """Take over parts with more room, that show the same bits."""
        if bitmap.parts is not None and bitmap in self._bitmaps:
            old, bitmap.parts = bitmap.parts, parts
            self.changed()
            if old.bits is not parts.bits:
                old.bits.release()

    def spoil(self, bitmap: DirtyBitmap, reason: str) -> None:
        """Mark one as inconsistent."""
        if bitmap.parts is not None and bitmap.parts.commit:
            self.promise(bitmap.parts.commit, 0, EVERYTHING)  # before any more is written
        bitmap.spoil(reason)
        self.changed()

    def begin(self, bitmap: DirtyBitmap) -> None:
        """A new one records from now on; not found by name unless `listed`."""
        self._bitmaps.append(bitmap)
        self.changed()

    def end(self, bitmap: DirtyBitmap) -> None:
        """Take one out; its file can go when it is in no saved list."""
        self._bitmaps.remove(bitmap)
        self.changed()
        if bitmap.parts is not None:
            bitmap.parts.bits.release()
            if bitmap.parts.commit:
                self.forget(bitmap.parts.commit)


def clusters_of(geometry: Geometry, extents: Iterable[tuple[int, int]]) -> bitarray:
    """The clusters that (offset, length) ranges touch, as one bit each.

    Raises InvalidRange for one that does not lie inside the image.
    """
    bits = zeros(geometry.clusters, endian="little")
    for offset, length in extents:
        if offset < 0 or length < 0 or offset + length > geometry.size:
            raise InvalidRange(
                f"offset {offset}, length {length} is outside the image, "
                f"which has {geometry.size} bytes"
            )
        clusters = geometry.touched(offset, length)
        bits[clusters.start : clusters.stop] = 1
    return bits


def merged(bits: bitarray, geometry: Geometry) -> list[tuple[int, int]]:
    """(offset, length) of each run of set bits, in bytes, cut at the end of the image."""
    size, end = geometry.cluster_size, geometry.size
    return [
        (first * size, min(stop * size, end) - first * size)
        for value, first, stop in intervals(bits)
        if value
    ]


@frozen
class Selection:
    """What a new snapshot gives access to, and what becomes of bitmaps in that instant.

    `bitmap`: a dirty bitmap whose clusters are accessible.  `extents`: clusters
    that are, as bits; None: all.  `clear`: empty that bitmap.  `next`: a new
    bitmap that begins to record.
    """

    bitmap: str | None = None
    extents: bitarray | None = field(default=None, eq=False)
    clear: bool = False
    next: str | None = None
