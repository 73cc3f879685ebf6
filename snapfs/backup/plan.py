"""What there is to copy, worked out before the first byte is: pure, and small in memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from enum import IntEnum

from .extents import Extents

ALIGNMENT = 4096  # data extents begin and end there, except at the end of the image


class Kind(IntEnum):
    """What a copy does with a range."""

    MISSING = 0  # may not be read: left alone
    ZERO = 1  # written as zeros
    DATA = 2  # read and written


class Plan:
    """Extents of one kind each: ascending, merged, contiguous from the first one on.

    Kept in arrays: a map of millions of extents takes 17 bytes for each.
    """

    def __init__(self) -> None:
        self._starts = array("q")
        self._kinds = array("b")
        self.end = 0

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, start: int, length: int, kind: Kind) -> None:
        """Append an extent.  Data spreads over neighbouring zeros to aligned borders."""
        assert length > 0
        assert not self._starts or start == self.end, (start, self.end)
        stop = start + length
        last = Kind(self._kinds[-1]) if self._kinds else None
        if last is Kind.DATA and kind is Kind.ZERO:
            start = min(stop, -(-start // ALIGNMENT) * ALIGNMENT)
        elif last is Kind.ZERO and kind is Kind.DATA:
            start = max(self._starts[-1], start // ALIGNMENT * ALIGNMENT)
            if start == self._starts[-1]:  # nothing is left of the zeros
                self._starts.pop()
                self._kinds.pop()
                last = Kind(self._kinds[-1]) if self._kinds else None
        self.end = stop
        if start < stop and last is not kind:
            self._starts.append(start)
            self._kinds.append(kind)

    def __iter__(self) -> Iterator[tuple[int, int, Kind]]:
        """(start, stop, kind), ascending."""
        for index, start in enumerate(self._starts):
            last = index + 1 == len(self._starts)
            yield start, self.end if last else self._starts[index + 1], Kind(self._kinds[index])

    def total(self, kind: Kind) -> int:
        """Bytes of one kind."""
        return sum(stop - start for start, stop, each in self if each is kind)

    def ranges(self, kind: Kind) -> list[tuple[int, int]]:
        """(start, length) of all extents of one kind."""
        return [(start, stop - start) for start, stop, each in self if each is kind]


def within(plan: Plan, wanted: Extents) -> Plan:
    """A plan of the same length in which all that is not wanted is left alone."""
    found = Plan()
    for start, stop, kind in plan:
        position = start
        for first, end in wanted.inside(start, stop):
            if position < first:
                found.add(position, first - position, Kind.MISSING)
            found.add(first, end - first, kind)
            position = end
        if position < stop:
            found.add(position, stop - position, Kind.MISSING)
    return found


def pieces(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Split [start, stop) at the multiples of `size`."""
    while start < stop:
        end = min(stop, (start // size + 1) * size)
        yield start, end
        start = end
