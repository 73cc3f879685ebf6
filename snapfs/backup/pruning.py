"""`snapfs prune`: which points stay, and folding the others into the next ones."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from datetime import UTC
from typing import Any

from attrs import frozen

from ..errors import UsageError
from . import folding, qemu
from .chain import Point, opened


@frozen
class Policy:
    """How many to keep: the newest ones, and the newest of each day and week (UTC) with points."""

    last: int = 0
    daily: int = 0
    weekly: int = 0

    def kept(self, points: Sequence[Point]) -> set[str]:
        """The names of the points that stay; the newest one always does."""
        newest_first = sorted(points, key=lambda point: point.number, reverse=True)
        kept = {point.name for point in newest_first[: max(1, self.last)]}
        kept |= _newest_of_each(newest_first, self.daily, _day)
        kept |= _newest_of_each(newest_first, self.weekly, _week)
        return kept


def _newest_of_each(
    newest_first: list[Point], count: int, period: Callable[[Point], Hashable]
) -> set[str]:
    found: dict[Hashable, str] = {}
    for point in newest_first:
        if len(found) == count and period(point) not in found:
            break
        found.setdefault(period(point), point.name)
    return set(found.values())


def _day(point: Point) -> Hashable:
    return point.time.astimezone(UTC).date()


def _week(point: Point) -> Hashable:
    return point.time.astimezone(UTC).isocalendar()[:2]


def prune(
    path: str, policy: Policy, *, dry_run: bool, say: Callable[[str], None], wait: float = 0.0
) -> dict[str, Any]:
    """Take out the points that the policy does not keep; returns what was kept and dropped."""
    if not (policy.last or policy.daily or policy.weekly):
        raise UsageError("say what to keep: --keep-last, --keep-daily or --keep-weekly")
    qemu.find_program("qemu-img")
    with opened(path, change=not dry_run, wait=wait) as directory:
        chain = directory.chain
        points = chain.points
        kept = policy.kept(points)
        deleted = folding.loose(chain, kept)
        folded = [each.name for each in points if each.name not in kept | set(deleted)]
        verb = "would drop" if dry_run else "dropping"
        for name in (*deleted, *folded):
            say(f"{verb} {name}")
        if not dry_run:
            # What frees space comes before anything that needs some.
            directory.sweep()
            with directory.without_readers(wait):
                folding.delete(directory, deleted)
                folding.finish(directory)
                for name in folded:
                    folding.fold(directory, name)
        return {
            "kept": [point.name for point in points if point.name in kept],
            "dropped": [point.name for point in points if point.name not in kept],
            "dry_run": dry_run,
        }
