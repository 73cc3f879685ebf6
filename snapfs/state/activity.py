"""What survives of the writes in flight when the daemon dies.

A mapped page holds how many changes of the image are under way, and how the
image looked after the newest one.  With it the next mount can tell our own
last write from one that somebody made behind our back.

When nothing was under way the image must look exactly as recorded.  When
something was, its times and size may be newer; but a change of ours sets the
times when it begins, so they cannot be later than the last sign of life by
more than `GRACE`.  The daemon gives one when a change begins, and every half
second while one is under way.  Somebody else's write within that grace after
a crash in mid-write is the one thing that is not noticed.
"""

from __future__ import annotations

import mmap
import os
import struct
import time

from attrs import evolve

from ..errors import StateError
from ..storage.mapping import Mapping, map_file
from .manifest import ImageStamp
from .statefiles import open_file

_LAYOUT = struct.Struct("<8sqqqqqq")
_MAGIC = b"snapfs1\n"
FILE_BYTES = 4096
BEAT_SECONDS = 0.5
GRACE_NS = 2_000_000_000
SYNC_SECONDS = 20  # between two durable signs of life, with durability=power
POWER_GRACE_NS = 60_000_000_000


class Activity:
    """Changes of the image under way; see the module's text.

    The methods for changes are plain `def`, task-atomic, and do not block but
    for the page fault of a mapped page and an fstat(2).
    """

    def __init__(self, mapping: Mapping | mmap.mmap, fd: int) -> None:
        self._mapping = mapping
        self._fd = fd  # of the image; the store's
        self._under_way = 0
        self._size = 0
        self._least = 0  # size of the image when all is done: between these two
        self._most = 0

    @classmethod
    def open(cls, directory: int, image_fd: int) -> Activity:
        """Map the file, made if need be.  Blocks.  The record is kept until `begin`."""
        fd = open_file(directory, "activity", os.O_RDWR | os.O_CREAT)
        try:
            size = os.fstat(fd).st_size
            if size not in (0, FILE_BYTES):
                raise StateError(f"activity has {size} bytes and must have {FILE_BYTES}")
            return cls(map_file(fd, FILE_BYTES), image_fd)
        finally:
            os.close(fd)

    @property
    def page(self) -> Mapping | mmap.mmap:
        """The mapped record, for whoever writes to the image beside us.

        A change inside the image's size that begins while nothing is under way may
        count itself as one, and must record as we do at its end, both between two
        calls of ours; when something is under way a sign of life will do.
        """
        return self._mapping

    def begin(self) -> None:
        """Start recording: nothing is under way."""
        self._record()

    def change_since(self, known: ImageStamp, image: ImageStamp) -> str | None:
        """How the image differs from what the dead daemon left, None if it does not.

        `known`: its stamp when that daemon started.  Raises StateError if there
        is no record.
        """
        magic, under_way, least, most, mtime, ctime, alive = _LAYOUT.unpack_from(self._mapping)
        if magic != _MAGIC or least < 0:
            raise StateError("activity in the state directory holds no record")
        if not under_way:
            return image.change_since(evolve(known, size=least, mtime_ns=mtime, ctime_ns=ctime))
        if not least <= image.size <= most:
            return f"it has {image.size} bytes and had {least} to {most}"
        newest = image.mtime_ns
        if image.is_where(known):
            newest = max(newest, image.ctime_ns)
        if newest > alive + GRACE_NS:
            return "it was modified after the daemon had died"
        return None

    def change_since_boot(self, known: ImageStamp, image: ImageStamp) -> str | None:
        """`change_since` after a power cut, when only a durable sign of life is left.

        Our own writes ended before this boot, and within `POWER_GRACE_NS` of
        the sign.  What somebody else wrote before that is not noticed.
        """
        magic, _, _, _, _, _, alive = _LAYOUT.unpack_from(self._mapping)
        if magic != _MAGIC:
            raise StateError("activity in the state directory holds no record")
        newest = image.mtime_ns
        if image.is_where(known):
            newest = max(newest, image.ctime_ns)
        booted = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        if newest >= min(booted, alive + POWER_GRACE_NS):
            return "it was modified after the power cut"
        return None

    def started(self, size: int) -> None:
        """A change begins after which the image may have `size` bytes."""
        if not self._under_way:
            self._least = self._most = self._size
        self._under_way += 1
        self._least = min(self._least, size)
        self._most = max(self._most, size)
        self._write(0, 0)

    def finished(self) -> None:
        """A change has ended."""
        self._under_way -= 1
        if not self._under_way:
            self._record()

    def beat(self, always: bool = False) -> None:
        """Give a sign of life while changes are under way, or `always`."""
        if self._under_way:
            self._write(0, 0)
        elif always:
            self._record()

    def _record(self) -> None:
        status = os.fstat(self._fd)
        self._size = self._least = self._most = status.st_size
        self._write(status.st_mtime_ns, status.st_ctime_ns)

    def _write(self, mtime: int, ctime: int) -> None:
        _LAYOUT.pack_into(
            self._mapping, 0, _MAGIC, self._under_way, self._least, self._most, mtime, ctime,
            time.time_ns(),
        )  # fmt: skip

    def close(self) -> None:
        """Unmap the file."""
        self._mapping.close()
