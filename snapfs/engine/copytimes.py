"""How long copies take: a histogram, as Prometheus has them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from attrs import define, field

# Seconds; tally.c has the numbers, too.
BOUNDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@define(eq=False)
class CopyTimes:
    """Copies that have landed, each of a run of clusters: how many took up to each of BOUNDS.

    `counts`: one for each bound, not cumulative, and those that took longer.  A copy's time is that
    of reading and writing, with `durability=power` also of its part of a sync, and not of
    waiting for its turn.  Task-atomic.
    """

    counts: list[int] = field(factory=lambda: [0] * (len(BOUNDS) + 1))
    seconds: float = 0.0

    def note(self, seconds: float) -> None:
        """One copy took so long."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds

    def add(self, counts: Iterable[int]) -> None:
        """Others have counted so many, whose seconds were added before."""
        for index, count in enumerate(counts):
            self.counts[index] += count


def within(counts: Sequence[int], share: float) -> float | None:
    """The bound within which that share of copies was; inf beyond the last, None without any."""
    wanted, seen = share * sum(counts), 0
    for bound, count in zip((*BOUNDS, float("inf")), counts, strict=True):
        seen += count
        if seen and seen >= wanted:
            return bound
    return None
