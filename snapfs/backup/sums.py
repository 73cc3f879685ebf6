"""The checksums of a point: one line for each range that it holds.

    OFFSET LENGTH DIGEST     data; the digest is XXH3-128 in hex
    OFFSET LENGTH zero       zeros

Offsets and lengths are bytes in decimal, lines ascend and do not overlap.  What
is in no line is as the point before has it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import xxhash

from ..errors import BackupError

UNIT_BYTES = 4 << 20  # data is read, and has a checksum, in pieces of this size at most

_LINE = re.compile(rb"(0|[1-9]\d{0,18}) ([1-9]\d{0,18}) ([0-9a-f]{32}|zero)")


class Unit(NamedTuple):
    """Bytes [start, start+length); `digest` None: zeros."""

    start: int
    length: int
    digest: str | None

    @property
    def stop(self) -> int:
        """End, exclusive."""
        return self.start + self.length


def digest_of(data: bytes | bytearray | memoryview) -> str:
    """The checksum of some bytes."""
    return xxhash.xxh3_128_hexdigest(data)


def dump(units: Iterable[Unit]) -> bytes:
    """The file that says so."""
    return b"".join(
        b"%d %d %s\n" % (unit.start, unit.length, (unit.digest or "zero").encode())
        for unit in units
    )


def load(data: bytes, size: int, where: str) -> list[Unit]:
    """Read a file of checksums of an image of `size` bytes; raises BackupError naming `where`."""
    units: list[Unit] = []
    end = 0
    for number, line in enumerate(data.splitlines(), 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise BackupError(f"{where}: line {number} is no checksum")
        digest = match[3].decode()
        unit = Unit(int(match[1]), int(match[2]), None if digest == "zero" else digest)
        if unit.start < end or unit.stop > size:
            raise BackupError(f"{where}: line {number} overlaps the one before or the end")
        if unit.digest is not None and unit.length > UNIT_BYTES:
            raise BackupError(f"{where}: line {number} is longer than {UNIT_BYTES} bytes")
        end = unit.stop
        units.append(unit)
    return units


class Part(NamedTuple):
    """What a newer point leaves of a unit of an older one: bytes [start, stop) of it."""

    unit: Unit
    start: int
    stop: int

    @property
    def whole(self) -> bool:
        """Is all of the unit left?"""
        return (self.start, self.stop) == (self.unit.start, self.unit.stop)


def left_of(old: Iterable[Unit], new: list[Unit], size: int) -> Iterator[Part]:
    """What is left of `old` below `new`, in an image that has `size` bytes now; ascending."""
    index = 0
    for unit in old:
        start, stop = unit.start, min(unit.stop, size)
        while start < stop:
            while index < len(new) and new[index].stop <= start:
                index += 1
            if index == len(new) or new[index].start >= stop:
                yield Part(unit, start, stop)
                break
            if start < new[index].start:
                yield Part(unit, start, new[index].start)
            start = new[index].stop
