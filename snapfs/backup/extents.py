"""Sets of bytes, as ranges: pure, and cheap to change at the end that grows."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

Range = tuple[int, int]  # start, stop


class Extents:
    """Ranges [start, stop): ascending, merged, disjoint.

    `_starts[i]` belongs to `_stops[i]`; both ascend strictly, and a stop is less than the
    next start.
    """

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for start, stop in ranges:
            self.add(start, stop)

    def __iter__(self) -> Iterator[Range]:
        return iter(zip(self._starts, self._stops, strict=True))

    def __bool__(self) -> bool:
        return bool(self._starts)

    def add(self, start: int, stop: int) -> None:
        """Have the range in it; nothing if it is empty."""
        if start >= stop:
            return
        first = bisect_left(self._stops, start)  # touching ones are merged
        last = bisect_right(self._starts, stop)
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def remove(self, start: int, stop: int) -> None:
        """Have nothing of the range in it."""
        if start >= stop:
            return
        first = bisect_right(self._stops, start)
        last = bisect_left(self._starts, stop)
        if first >= last:
            return
        left = [(self._starts[first], start)] if self._starts[first] < start else []
        right = [(stop, self._stops[last - 1])] if self._stops[last - 1] > stop else []
        kept = [*left, *right]
        self._starts[first:last] = [each for each, _ in kept]
        self._stops[first:last] = [each for _, each in kept]

    def cut(self, size: int) -> None:
        """Have nothing at or beyond `size` in it."""
        if self._stops and self._stops[-1] > size:
            self.remove(size, self._stops[-1])

    def inside(self, start: int, stop: int) -> Iterator[Range]:
        """What of a range is in it, ascending."""
        index = bisect_right(self._stops, start)
        while start < stop and index < len(self._starts) and self._starts[index] < stop:
            yield max(start, self._starts[index]), min(stop, self._stops[index])
            index += 1

    def outside(self, start: int, stop: int) -> Iterator[Range]:
        """What of a range is not in it, ascending."""
        for first, end in self.inside(start, stop):
            if start < first:
                yield start, first
            start = end
        if start < stop:
            yield start, stop

    def total(self) -> int:
        """Bytes in it."""
        return sum(self._stops) - sum(self._starts)
