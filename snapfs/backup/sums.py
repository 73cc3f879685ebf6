"""The checksums of a point: one line for each range that it holds.

    OFFSET LENGTH DIGEST PIECES    data; the digest is XXH3-128 in hex
    OFFSET LENGTH kDIGEST PIECES   data of an encrypted point, see below
    OFFSET LENGTH DIGEST           data, as old versions wrote it
    OFFSET LENGTH zero             zeros

PIECES has the low 32 bits of XXH3-64 of each piece, eight hex digits each; pieces end at the
multiples of PIECE_BYTES.  They prove nothing while the digest is right: they tell which
pieces of damaged data are good, and so what a point that has newer data for the others reads.

Of encrypted points the checksums tell nothing without the key: those of the pieces are BLAKE2b
with its secret, of 128 bits, of which PIECES has the first 32, and the digest is that of them.

Offsets and lengths are bytes in decimal, lines ascend and do not overlap.  What
is in no line is as the point before has it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import xxhash

from ..errors import BackupError, KeyRefused
from .plan import pieces

UNIT_BYTES = 4 << 20  # data is read, and has a checksum, in pieces of this size at most

PIECE_BYTES = 64 << 10  # of data that is damaged, this much is given up

_LINE = re.compile(
    rb"(0|[1-9]\d{0,18}) ([1-9]\d{0,18}) (?:zero|(k?[0-9a-f]{32})(?: ((?:[0-9a-f]{8})+))?)"
)


class Unit(NamedTuple):
    """Bytes [start, start+length); `digest` None: zeros.  `pieces`: four bytes for each."""

    start: int
    length: int
    digest: str | None
    pieces: bytes | None = None

    @property
    def stop(self) -> int:
        """End, exclusive."""
        return self.start + self.length


def digest_of(data: bytes | bytearray | memoryview) -> str:
    """The checksum of some bytes."""
    return xxhash.xxh3_128_hexdigest(data)


def _keyed(data: bytes | memoryview, secret: bytes) -> bytes:
    return hashlib.blake2b(data, key=secret, digest_size=16).digest()


def unit_of(start: int, data: bytes | bytearray | memoryview, secret: bytes | None = None) -> Unit:
    """The unit of some data; `secret` of that of an encrypted point."""
    view = memoryview(data)
    parts = [
        view[first - start : end - start]
        for first, end in pieces(start, start + len(view), PIECE_BYTES)
    ]
    if secret is not None:
        digests = [_keyed(part, secret) for part in parts]
        digest = f"k{_keyed(b''.join(digests), secret).hex()}"
        return Unit(start, len(view), digest, b"".join(each[:4] for each in digests))
    found = b"".join((xxhash.xxh3_64_intdigest(part) & 0xFFFFFFFF).to_bytes(4) for part in parts)
    return Unit(start, len(view), digest_of(data), found)


def damaged(
    unit: Unit, data: bytes | bytearray | memoryview, secret: bytes | None = None
) -> list[tuple[int, int]]:
    """(start, stop) of what is not what it was of the data of a unit, ascending.

    Raises KeyRefused if that takes the secret and it is None.
    """
    keyed = unit.digest is not None and unit.digest.startswith("k")
    if keyed and secret is None:
        raise KeyRefused("the checksums are those of an encrypted point; give its --key-file")
    if not keyed and digest_of(data) == unit.digest:
        return []
    now = unit_of(unit.start, data, secret if keyed else None)
    if now.digest == unit.digest:
        return []
    if unit.pieces is None or now.pieces is None:
        return [(unit.start, unit.stop)]
    found = [
        each
        for index, each in enumerate(pieces(unit.start, unit.stop, PIECE_BYTES))
        if now.pieces[4 * index : 4 * index + 4] != unit.pieces[4 * index : 4 * index + 4]
    ]
    return found or [(unit.start, unit.stop)]


def dump(units: Iterable[Unit]) -> bytes:
    """The file that says so."""
    return b"".join(
        b"%d %d %s%s\n"
        % (
            unit.start,
            unit.length,
            (unit.digest or "zero").encode(),
            b" " + unit.pieces.hex().encode() if unit.pieces else b"",
        )
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
        digest = None if match[3] is None else match[3].decode()
        parts = None if match[4] is None else bytes.fromhex(match[4].decode())
        unit = Unit(int(match[1]), int(match[2]), digest, parts)
        if unit.start < end or unit.stop > size:
            raise BackupError(f"{where}: line {number} overlaps the one before or the end")
        if unit.digest is not None and unit.length > UNIT_BYTES:
            raise BackupError(f"{where}: line {number} is longer than {UNIT_BYTES} bytes")
        if parts is not None and len(parts) != 4 * _count(unit):
            raise BackupError(f"{where}: line {number} has checksums of {len(parts) // 4} pieces")
        end = unit.stop
        units.append(unit)
    return units


def spans(data: bytes) -> Iterator[tuple[int, int, bool]]:
    """(start, stop, is it data) of a file of checksums that is what it was; neighbours merged."""
    start = stop = 0
    kind = False
    for line in data.splitlines():
        first, length, digest = line.split(b" ", 3)[:3]
        offset, is_data = int(first), digest != b"zero"
        if offset != stop or is_data != kind:
            if start < stop:
                yield start, stop, kind
            start, kind = offset, is_data
        stop = offset + int(length)
    if start < stop:
        yield start, stop, kind


def _count(unit: Unit) -> int:
    return (unit.stop - 1) // PIECE_BYTES - unit.start // PIECE_BYTES + 1


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
