"""What a qcow2 file has itself, and where: read from its tables, as no program starts as fast.

The format is that of docs/interop/qcow2.txt in QEMU.  Only files are read that nobody writes;
what is in them is proven by checksums, so a mistake here cannot become a wrong byte.
"""

from __future__ import annotations

import os
import struct
import sys
from array import array
from collections.abc import Iterator
from enum import Enum
from typing import Literal, NamedTuple

from ..errors import BackupError

MAGIC = b"QFI\xfb"
_HEAD = struct.Struct(">4sIQIIQIIQ")
_FEATURES = struct.Struct(">Q")  # behind _FEATURES_AT, in version 3
_FEATURES_AT = 72
_DIRTY, _COMPRESSION = 1 << 0, 1 << 3  # incompatible features that leave the tables as they are
_OFFSET = 0x00FF_FFFF_FFFF_FE00
_COMPRESSED = 1 << 62
_ZERO = 1 << 0
_CRYPT_LUKS = 2
_NONE = array("Q", bytes(8 * 256))  # some entries of a table
_MAX_L1_BYTES = 32 << 20  # QEMU's limit


class Kind(Enum):
    """What a cluster of a file is."""

    ABSENT = 0  # as the file below has it
    ZERO = 1
    PLAIN = 2  # in the file as it is
    CODED = 3  # compressed, or encrypted


class Extent(NamedTuple):
    """Bytes [start, stop) of one kind; `host`: where they are in the file, if they are PLAIN."""

    start: int
    stop: int
    kind: Kind
    host: int = 0


def _present(entries: array[int], first: int) -> Iterator[tuple[int, int]]:
    """(number, entry) of those that are not 0; most of a small file's are."""
    for at in range(0, len(entries), len(_NONE)):
        block = entries[at : at + len(_NONE)]
        if block != _NONE:
            for number, entry in enumerate(block, first + at):
                if entry:
                    yield number, entry


class Qcow2File:
    """A qcow2 file, open for reading.  A context manager; reading is for any thread.

    `size`: the virtual one, in bytes; `backing`: the name of the file below, as it is stored.
    """

    def __init__(self, path: str) -> None:
        """Raises OSError, or BackupError if it is none."""
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._read_head()
        except BaseException:
            os.close(self._fd)
            raise

    def _read_head(self) -> None:
        self.size: int
        self.encrypted: bool
        head = os.pread(self._fd, 4096, 0).ljust(_HEAD.size, b"\0")
        (magic, version, name_at, name_length, self._bits, self.size, crypt, self._l1_size,
         self._l1_at) = _HEAD.unpack_from(head)  # fmt: skip
        if magic != MAGIC or len(head) < 104 or not 9 <= self._bits <= 21:
            raise BackupError(f"{self.path} is no qcow2 image any more")
        features = _FEATURES.unpack_from(head, _FEATURES_AT)[0] if version == 3 else 0
        self.zstd = bool(features & _COMPRESSION)  # the only one that is not the usual one
        self.encrypted = crypt == _CRYPT_LUKS
        self.plain = (
            version in (2, 3)
            and crypt == 0
            and not features & ~(_DIRTY | _COMPRESSION)
            and self._l1_size <= _MAX_L1_BYTES // 8
        )
        self.backing: str | None = None
        if name_at:
            name = os.pread(self._fd, min(name_length, 1023), min(name_at, 1 << 21))
            self.backing = os.fsdecode(name)
        self._tables: tuple[int, ...] | None = None
        self._last: tuple[int, array[int]] = (0, array("Q"))  # a table, and where it is

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return int(1 << self._bits)

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """What there is of [start, stop), ascending, merged, without a gap.

        Only if the file is `plain`.  Raises OSError, BackupError.
        """
        end = self.size if stop is None else min(stop, self.size)
        last: Extent | None = None
        for each in self._clusters(start, end):
            if last is None:
                last = each
            elif last.kind is each.kind and (
                each.kind is not Kind.PLAIN or last.host + last.stop - last.start == each.host
            ):
                last = last._replace(stop=each.stop)
            else:
                yield last
                last = each
        if last is not None:
            yield last

    def _clusters(self, start: int, stop: int) -> Iterator[Extent]:
        """The same, in pieces; each begins where the one before ended."""
        assert self.plain
        bits = self._bits
        covered = 1 << (2 * bits - 3)  # bytes of the image, by one table
        while start < stop:
            index = start // covered
            end = min(stop, (index + 1) * covered)
            first = start >> bits
            entries = self._entries(index, first % (covered >> bits), -(-end >> bits) - first)
            if entries is None:
                yield Extent(start, end, Kind.ABSENT)
                start = end
                continue
            for number, entry in _present(entries, first):
                here = number << bits
                if start < here:
                    yield Extent(start, here, Kind.ABSENT)
                    start = here
                upto = min(end, here + (1 << bits))
                yield self._extent(start, upto, here, entry)
                start = upto
            if start < end:
                yield Extent(start, end, Kind.ABSENT)
                start = end

    @staticmethod
    def _extent(start: int, stop: int, cluster: int, entry: int) -> Extent:
        if entry & _COMPRESSED:
            return Extent(start, stop, Kind.CODED)
        if entry & _ZERO:
            return Extent(start, stop, Kind.ZERO)
        host = entry & _OFFSET
        if not host:
            return Extent(start, stop, Kind.ABSENT)
        return Extent(start, stop, Kind.PLAIN, host + start - cluster)

    def _entries(self, index: int, first: int, count: int) -> array[int] | None:
        """Some entries of a table of the second level; None if there is no such table."""
        if self._tables is None:
            self._tables = tuple(self._numbers(self._l1_at, self._l1_size))
        table = self._tables[index] & _OFFSET if index < len(self._tables) else 0
        if not table:
            return None
        at, entries = self._last
        if at != table:  # one is kept: whoever asks goes on where they were
            entries = self._numbers(table, self.cluster_size // 8)
            self._last = table, entries
        return entries[first : first + count]

    def _numbers(self, offset: int, count: int) -> array[int]:
        data = os.pread(self._fd, 8 * count, offset)
        if len(data) < 8 * count:
            raise BackupError(f"{self.path} ends in the middle of its tables")
        numbers = array("Q", data)
        if sys.byteorder == "little":
            numbers.byteswap()
        return numbers

    def read(self, view: memoryview, host: int) -> None:
        """Bytes from `host` on in the file; zeros behind its end.  Raises OSError."""
        while view:
            count = os.preadv(self._fd, [view], host)
            if not count:
                view[:] = bytes(len(view))
                return
            view, host = view[count:], host + count

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def __enter__(self) -> Qcow2File:
        return self

    def __exit__(self, *_exception: object) -> Literal[False]:
        self.close()
        return False
