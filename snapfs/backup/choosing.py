"""Which point is meant: by number, name or time.

    7, 0007                    the point with that number
    0007-2026-11-29T02-47-02Z  its name
    2026-11-29T02-47-02Z       the time in its name
    2026-11-29T02:47:02        the point of that second, or the last one before it
    2026-11-29T02:47:02.25Z    the same to the microsecond
    2026-11-29                 the last point not later than that day
    latest                     the newest point, as without anything

Without a time zone a time is UTC.  In old directories the second in a name was taken before
the snapshot, and can be another than that of the snapshot: either is accepted.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from ..errors import NotFound, UsageError
from .chain import Chain, Point

LATEST = "latest"
_IN_NAMES = "%Y-%m-%dT%H-%M-%SZ"
_DATE = re.compile(r"\d{4}-?(\d\d-?\d\d|W\d\d(-?\d)?)")
_DAY, _SECOND, _NONE = timedelta(days=1), timedelta(seconds=1), timedelta()
_SHOWN = 20  # points in a message


def choose(chain: Chain, text: str | None) -> Point:
    """The point that a text means; raises NotFound, or UsageError that names two candidates."""
    points = chain.points
    if not points:
        raise NotFound("the backup has no points yet; snapfs backup adds one")
    if text is None or text == LATEST:
        return points[-1]
    for point in points:
        if text == point.name or (_is_number(text) and int(text) == point.number):
            return point
    wanted, length = _span(text, chain)
    if length == _SECOND:
        for time_of in (named_time, second_of):
            exact = [point for point in points if time_of(point) == wanted]
            if exact:
                return _only(exact[0], exact[-1], text)
    time_of = earliest if length else _instant
    before = [point for point in points if time_of(point) <= wanted + max(length - _SECOND, _NONE)]
    if not before:
        raise NotFound(
            f"the oldest point, {points[0].name}, is later than {text}; snapfs points lists them"
        )
    return _only(max(before, key=time_of), before[-1], text)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _only(first: Point, second: Point, text: str) -> Point:
    """Two there are in one second, or after a clock was set back."""
    if first != second:
        names = " or ".join(sorted((first.name, second.name)))
        raise UsageError(f"{text} can be point {names}; say which, by its number")
    return first


def _instant(point: Point) -> datetime:
    return point.time.astimezone(UTC)


def second_of(point: Point) -> datetime:
    """The second in which the snapshot was taken."""
    return point.time.astimezone(UTC).replace(microsecond=0)


def named_time(point: Point) -> datetime | None:
    """The time in the name of a point."""
    try:
        found = datetime.strptime(point.name.partition("-")[2], _IN_NAMES)
    except ValueError:
        return None
    return found.replace(tzinfo=UTC)


def earliest(point: Point) -> datetime:
    """From when on a time means this point."""
    return min(second_of(point), named_time(point) or second_of(point))


def _span(text: str, chain: Chain) -> tuple[datetime, timedelta]:
    """Beginning and length of what a text means: a day, a second, or an instant; in UTC."""
    try:
        return datetime.strptime(text, _IN_NAMES).replace(tzinfo=UTC), _SECOND
    except ValueError:
        pass
    try:
        wanted = datetime.fromisoformat(text)
    except ValueError:
        raise NotFound(
            f"{text} is neither a number, a name nor a time of a point; the points are "
            + ", ".join(point.name for point in chain.points[-_SHOWN:])
        ) from None
    wanted = (wanted if wanted.tzinfo else wanted.replace(tzinfo=UTC)).astimezone(UTC)
    if _DATE.fullmatch(text):
        return wanted, _DAY
    return wanted, _SECOND if not wanted.microsecond else _NONE
