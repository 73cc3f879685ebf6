"""`snapfs points`: what a directory has.  Takes no lock: the manifest is replaced as a whole."""

from __future__ import annotations

import os
from typing import Any

from . import verified
from .chain import Directory, Point


def points(path: str) -> list[dict[str, Any]]:
    """The points, oldest first; `time` is one that --at takes, sizes are bytes."""
    directory = Directory(path)
    known = verified.found(directory.path, directory.chain)
    return [_row(directory, point, known.get(point.name)) for point in directory.chain.points]


def _row(directory: Directory, point: Point, record: verified.Verified | None) -> dict[str, Any]:
    parent = None if point.parent is None else directory.chain.find(point.parent)
    return {
        "number": point.number,
        "name": point.name,
        "time": point.created,
        "kind": "full" if parent is None else "incremental",
        "size": point.size,
        "data_bytes": point.data_bytes,
        "disk_bytes": disk_bytes(directory, point.name),
        "parent": None if parent is None else parent.number,
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
