"""bitmaps/ in the mount: each dirty bitmap as a text file.

    0 65536
    1048576 196608

One "offset length" a line, in bytes, ascending and merged; the last extent ends
with the image.  What is read is the bitmap as it was at open(2).  A part of the
FUSE face (fusefs.py); it does no FUSE itself.
"""

from __future__ import annotations

import errno
import os
import stat

import trio
from bitarray import bitarray

from .. import errors
from ..engine.dirty import DirtyBitmap, merged
from ..engine.engine import Engine
from ..engine.geometry import Geometry
from ..storage.offload import in_thread

DIRECTORY = 5  # inode of bitmaps/
FIRST = 1 << 40  # inode of the bitmap with id 0, far beyond those of snapshots


# Bytes of texts that may be open before nobody but the owner may open more: each is in memory,
# and that of a large image may have hundreds of MiB.
MOST_TEXT = 256 << 20
MOST_WAITING = 8  # opens, before nobody but the owner may wait: requests at once are bounded


def is_bitmap(inode: int) -> bool:
    """Is it the inode of a file in bitmaps/?"""
    return inode >= FIRST


def _format(bits: bitarray, geometry: Geometry) -> bytes:
    return b"".join(b"%d %d\n" % extent for extent in merged(bits, geometry))


class BitmapTree:
    """The files in bitmaps/."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._formatting = trio.CapacityLimiter(1)  # what it takes is in memory, too

    def entries(self) -> list[tuple[int, str]]:
        """Inodes and names, by inode."""
        return sorted((FIRST + each.id, each.name) for each in self._engine.tracker.bitmaps)

    def lookup(self, name: str) -> int:
        """The inode of a name; raises BitmapNotFound."""
        return FIRST + self._engine.tracker.bitmaps.find(name).id

    def find(self, inode: int) -> DirtyBitmap:
        """The bitmap of an inode; raises OSError ESTALE."""
        for bitmap in self._engine.tracker.bitmaps:
            if bitmap.id == inode - FIRST:
                return bitmap
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    @staticmethod
    def mode(image_mode: int) -> int:
        """Type and mode of a bitmap's file: who may read the image may read it."""
        return stat.S_IFREG | (image_mode & 0o444)

    async def open(self, inode: int, flags: int, *, owner: bool) -> bytes:
        """The text of a bitmap now, for the owner or somebody else; waits for others.

        Raises OSError EIO if it is inconsistent, and LimitReached.
        """
        if flags & (os.O_ACCMODE | os.O_TRUNC) != os.O_RDONLY:
            raise errors.ReadOnly("bitmaps are changed by snapfs bitmap only")
        if self._formatting.statistics().tasks_waiting >= MOST_WAITING and not owner:
            raise errors.LimitReached("too many bitmaps are being opened")
        async with self._formatting:
            geometry = self._engine.geometry
            try:
                bits = self.find(inode).usable(geometry.clusters).slice(0, geometry.clusters)
            except errors.BitmapUnusable:
                raise OSError(errno.EIO, os.strerror(errno.EIO)) from None
            return await in_thread(_format, bits, geometry)

    @staticmethod
    def seek(content: bytes, offset: int, whence: int) -> int:
        """lseek(2) in the text of an open file: all of it is data."""
        if not 0 <= offset < len(content):
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        return offset if whence == os.SEEK_DATA else len(content)

    async def remove(self, name: str) -> None:
        """Remove a bitmap.  Raises as `Tracker.remove`."""
        await self._engine.tracker.remove(name)
