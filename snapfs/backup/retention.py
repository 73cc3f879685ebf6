"""Which points, or snapshots, stay: rules, of which each keeps some."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Protocol

from attrs import frozen

from ..errors import UsageError

# Months and years are as long as the longest, so that nothing goes too early.
_UNITS = {"h": 1 / 24, "d": 1, "w": 7, "m": 31, "y": 366}  # days


class Moment(Protocol):
    """What is kept or not."""

    @property
    def name(self) -> str:
        """Its name, which no other has."""

    @property
    def time(self) -> datetime:
        """When it was taken."""


_PERIODS: dict[str, Callable[[datetime], Hashable]] = {
    "hourly": lambda time: (time.date(), time.hour),
    "daily": lambda time: time.date(),
    "weekly": lambda time: time.isocalendar()[:2],
    "monthly": lambda time: (time.year, time.month),
    "yearly": lambda time: time.year,
}


@frozen
class Policy:
    """How many to keep.

    `last`: of the newest; hourly to yearly: the newest of each of the last hours, days and so
    on (UTC) that have any; `within`: all that are not older than the newest one by more.
    """

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: timedelta | None = None

    def refuse_empty(self) -> None:
        """Raises UsageError if nothing was said; only the newest one would stay."""
        if not (self.last or self.within or any(getattr(self, rule) for rule in _PERIODS)):
            raise UsageError(
                "say what to keep: --keep-last, --keep-within or --keep-hourly to --keep-yearly"
            )

    def kept(self, moments: Sequence[Moment]) -> dict[str, list[str]]:
        """The names that stay, and the rules that keep them; the newest, which is last, does."""
        newest_first = moments[::-1]
        rules: dict[str, list[str]] = {each.name: [] for each in newest_first[:1]}

        def keep(rule: str, names: Sequence[str]) -> None:
            for name in names:
                rules.setdefault(name, []).append(rule)

        keep("last", [each.name for each in newest_first[: self.last]])
        if self.within is not None and newest_first:
            since = newest_first[0].time - self.within
            keep("within", [each.name for each in newest_first if each.time >= since])
        for rule, period in _PERIODS.items():
            keep(rule, _newest_of_each(newest_first, getattr(self, rule), period))
        return rules


def _newest_of_each(
    newest_first: Sequence[Moment], count: int, period: Callable[[datetime], Hashable]
) -> list[str]:
    found: dict[Hashable, str] = {}
    for each in newest_first:
        key = period(each.time.astimezone(UTC))
        if len(found) == count and key not in found:
            break
        found.setdefault(key, each.name)
    return list(found.values())


def parse_within(text: str) -> timedelta:
    """A time span such as 30d, 36h or 1y6m; raises UsageError."""
    if not re.fullmatch(r"(\d{1,6}[hdwmy])+", text, re.ASCII):
        raise UsageError(f"{text!r} is no time span; write 36h, 30d, 8w, 6m or 1y")
    parts = re.findall(r"(\d+)([hdwmy])", text)
    return timedelta(days=sum(int(number) * _UNITS[unit] for number, unit in parts))
