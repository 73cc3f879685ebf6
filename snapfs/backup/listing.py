"""`snapfs points`: what a directory has.  Takes no lock: the manifest is replaced as a whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from . import verified
from .chain import Directory, Point


def points(path: str) -> list[dict[str, Any]]:
    """The points, oldest first; `time` is one that --at takes, sizes are bytes."""
    directory = Directory(path)
    known = verified.found(directory.path, directory.chain)
    numbers = {point.name: point.number for point in directory.chain.points}
    return [
        _row(directory, point, numbers, known.get(point.name)) for point in directory.chain.points
    ]


def _row(
    directory: Directory,
    point: Point,
    numbers: Mapping[str, int],
    record: verified.Verified | None,
) -> dict[str, Any]:
    return {
        "number": point.number,
        "name": point.name,
        "time": point.created,
        "kind": "full" if point.parent is None else "incremental",
        "size": point.size,
        "data_bytes": point.data_bytes,
        "disk_bytes": disk_bytes(directory, point.name),
        "encrypted": directory.is_encrypted(point),
        "parent": None if point.parent is None else numbers[point.parent],
        "image": point.image,
        "verified": None if record is None else {"time": record.when, "good": record.good},
    }


def disk_bytes(directory: Directory, name: str) -> int:
    """What the files of a point take on the disk; what is missing takes nothing."""
    used = 0
    for path in (directory.image_of(name), directory.sums_of(name)):
        try:
            used += os.stat(path).st_blocks * 512
        except FileNotFoundError:
            continue
    return used
