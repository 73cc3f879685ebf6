"""One bit per cluster, in memory or in a mapped file.

Bit c stands for cluster c (see `geometry.py`).  Bits are numbered from the
least significant bit of each byte, so a mapped file means the same to C code
that tests `byte[c >> 3] & (1 << (c & 7))`.

All methods are plain `def`: under trio they are atomic.  Ranges are
[first, stop) in clusters and must lie inside the bitmap.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bitarray import bitarray

COUNTED = 1 << 17  # bits that are counted at a time


def buffer_size(bits: int) -> int:
    """Bytes that a buffer for `bits` bits must have at least."""
    return -(-bits // 8)


def runs(bits: bitarray, first: int, stop: int, value: bool = True) -> Iterator[tuple[int, int]]:
    """Maximal runs [start, end) of bits equal to `value` inside [first, stop), ascending."""
    wanted, other = (1, 0) if value else (0, 1)
    while first < stop:
        start = bits.find(wanted, first, stop)
        if start < 0:
            return
        end = bits.find(other, start, stop)
        first = stop if end < 0 else end
        yield start, first


class Bitmap:
    """A fixed number of bits over a buffer.

    `buffer` is a writable buffer (an mmap, say) of at least
    `buffer_size(bits)` bytes whose present content is taken over; without it
    the bits are in memory and clear.  Bits of the buffer beyond the end stay
    as they are and are never looked at.  The buffer cannot be closed before
    `release`.

    Raises ValueError if the buffer is too short.
    """

    def __init__(self, bits: int, buffer: Any = None) -> None:
        if buffer is None:
            self._bits = bitarray(bits, endian="little")
        else:
            if memoryview(buffer).nbytes < buffer_size(bits):
                raise ValueError(f"a buffer for {bits} bits needs {buffer_size(bits)} bytes")
            self._bits = bitarray(buffer=buffer, endian="little")
        self._length = bits
        self.changes = 0  # by us; native code changes the bits behind our back

    def __len__(self) -> int:
        return self._length

    @property
    def bits(self) -> bitarray:
        """The bits themselves, for their buffer; while that is held they can only be flipped."""
        return self._bits

    def get(self, cluster: int) -> bool:
        """The bit of one cluster."""
        return bool(self._bits[cluster])

    def set(self, first: int, stop: int) -> None:
        """Set [first, stop)."""
        assert 0 <= first <= stop <= self._length
        self.changes += 1
        self._bits[first:stop] = 1

    def clear(self, first: int, stop: int) -> None:
        """Clear [first, stop)."""
        assert 0 <= first <= stop <= self._length
        self.changes += 1
        self._bits[first:stop] = 0

    def any(self, first: int, stop: int) -> bool:
        """Is a bit of [first, stop) set?  False for an empty range."""
        return self._bits.find(1, first, stop) >= 0

    def all(self, first: int, stop: int) -> bool:
        """Are all bits of [first, stop) set?  True for an empty range."""
        return self._bits.find(0, first, stop) < 0

    def count(self, first: int = 0, stop: int | None = None) -> int:
        """Number of set bits in [first, stop), by default in all.

        Most have large parts of nothing but ones or zeros, which are looked through in a sixth of
        the time that it takes to count them.
        """
        end, found = self._length if stop is None else stop, 0
        for start in range(first, end, COUNTED):
            part = min(end, start + COUNTED)
            value = self._bits[start]
            if self._bits.find(not value, start, part) < 0:
                found += (part - start) * value
            else:
                found += self._bits.count(1, start, part)
        return found

    def runs(self, first: int, stop: int, value: bool = True) -> Iterator[tuple[int, int]]:
        """Maximal runs [start, end) of bits equal to `value` inside [first, stop).

        Ascending.  Lazy: bits that change behind the cursor do not matter.
        """
        return runs(self._bits, first, stop, value)

    def slice(self, first: int, stop: int) -> bitarray:
        """A copy of [first, stop)."""
        assert 0 <= first <= stop <= self._length
        return self._bits[first:stop]

    def assign(self, first: int, bits: bitarray) -> None:
        """Replace the bits from `first` on by `bits`."""
        assert first + len(bits) <= self._length
        self.changes += 1
        self._bits[first : first + len(bits)] = bits

    def grow(self, bits: int) -> None:
        """Lengthen a bitmap in memory; new bits are clear.  Never shortens.

        Raises MemoryError; then nothing has changed.
        """
        if bits > self._length:
            longer = bitarray(bits, endian="little")  # clear, and not larger than it must be
            longer[: self._length] = self._bits
            self._bits = longer
            self._length = bits

    def release(self) -> None:
        """Let go of the buffer; the bitmap has no bits from then on."""
        self.changes += 1
        self._bits = bitarray(endian="little")
        self._length = 0


class SetThrough(Bitmap):
    """Bits in memory; setting one sets it in `file` as well, clearing does not.

    For bits that only ever become wanted less: one too many in the file is
    found out later, one that is missing is not.  Takes over what `file` has.
    """

    def __init__(self, file: Bitmap) -> None:
        super().__init__(len(file))
        self._file = file
        self._bits[:] = file._bits[: len(file)]

    @property
    def file(self) -> Bitmap:
        """The bits in the file."""
        return self._file

    def set(self, first: int, stop: int) -> None:
        super().set(first, stop)
        self._file.set(first, stop)

    def set_again(self) -> None:
        """Write all that `file` must have: it may have lost some, though nobody cleared it."""
        for run in self.runs(0, len(self)):
            self._file.set(*run)

    def release(self) -> None:
        super().release()
        self._file.release()


class ClearLater(Bitmap):
    """Bits in memory; what was cleared reaches `file` by `cleared` and `apply` only.

    Everything else goes through.  Takes over what `file` has.
    """

    def __init__(self, file: Bitmap) -> None:
        super().__init__(len(file))
        self._file = file
        self._bits[:] = file._bits[: len(file)]
        self._cleared: list[tuple[int, int]] = []

    def set(self, first: int, stop: int) -> None:
        super().set(first, stop)
        self._file.set(first, stop)

    def assign(self, first: int, bits: bitarray) -> None:
        super().assign(first, bits)
        self._file.assign(first, bits)

    def clear(self, first: int, stop: int) -> None:
        super().clear(first, stop)
        self._cleared.append((first, stop))

    def cleared(self) -> list[tuple[int, int]]:
        """Ranges cleared since the last call, for `apply`."""
        taken, self._cleared = self._cleared, []
        return taken

    def apply(self, ranges: list[tuple[int, int]]) -> None:
        """Clear the ranges in the file."""
        for first, stop in ranges:
            self._file.clear(first, stop)

    def release(self) -> None:
        super().release()
        self._file.release()
