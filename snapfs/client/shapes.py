"""Whether an answer has all that those who show it rely on.

Who answers for a mount is a program of whoever mounted it, and root asks all mounts: what is not
of the right shape is no answer of snapfs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

LARGEST = 1 << 64  # number: beyond it some cannot be printed

Shape = Callable[[Any], bool] | Mapping[str, Any] | list[Any]  # of each value; [of each item]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < LARGEST


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.encode(errors="surrogateescape") or True)


def _time(value: Any) -> bool:
    return value.isprintable() and datetime.fromisoformat(value).tzinfo is not None


def _or_none(shape: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or shape(value)


def _all(shape: Callable[[Any], bool], keys: str) -> Mapping[str, Any]:
    return dict.fromkeys(keys.split(), shape)


def _buckets(value: Any) -> bool:
    return bool(value) and all(
        (bound is None or (_number(bound) and not isinstance(bound, bool))) and _number(count)
        for bound, count in value
    )


SNAPSHOT: Shape = {
    **_all(_text, "name state"),
    **_all(_number, "id size temp_bytes open pinned"),
    "note": _or_none(_text),
    "created": _time,
    "clusters": _all(_number, "total accessible copied lost discarded"),
}
LIST: Shape = {"snapshots": [SNAPSHOT]}
STATUS: Shape = {
    "image": {"path": _text, **_all(_number, "size cluster_size")},
    "mount": {
        **_all(_text, "mountpoint durability"),
        **_all(_number, "pid healthy fastpath"),
        "since": _or_none(_time),
        "reason": _or_none(_text),
    },
    "snapshots": [SNAPSHOT],
    "bitmaps": [{"name": _text, **_all(_number, "inconsistent count"), "reason": _or_none(_text)}],
    "temp": {
        "directory": _text,
        **_all(_number, "used_bytes room_bytes bytes_per_second"),
        **_all(_or_none(_number), "limit_bytes warning_percent seconds_left age_seconds"),
    },
    "copies": {**_all(_number, "count seconds"), "buckets": _buckets},
    "counters": _all(
        _number,
        "reads writes snapshot_reads discarded_bytes cbw_copies cbw_bytes cbw_errors write_errors "
        "fastpath_requests",
    ),
    "open": _all(_number, "readers writers"),
    "problems": [_all(_text, "severity kind message remedy")],
}


def fits(value: Any, shape: Shape) -> bool:
    """Has it that shape?"""
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(each, shape[0]) for each in value)
    if isinstance(shape, Mapping):
        return isinstance(value, dict) and all(
            key in value and fits(value[key], each) for key, each in shape.items()
        )
    try:
        return shape(value)
    except (TypeError, ValueError, AttributeError):
        return False
