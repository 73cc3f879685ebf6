"""Discarding a range of a file in a mount, as fstrim(8) does with a file system."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ..storage.linux import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from . import mountinfo
from .wire import Client

Run = tuple[int, int]  # start, length


def trim(
    path: str,
    *,
    offset: int | None = None,
    length: int | None = None,
    minimum: int = 0,
    dry_run: bool = False,
) -> int:
    """Punch what the daemon says there is to punch in the range; how many bytes that was.  Blocks.

    Runs shorter than `minimum` bytes are left; with `dry_run` all are.  Raises NotMounted, what
    the daemon reports, and OSError.
    """
    found, inside = mountinfo.split(path)
    trimmed = 0
    with Client(found.mountpoint) as client:
        if inside == "active":
            _write_back(path)
        for runs in _runs(client, inside, offset, length, minimum):
            if runs and not dry_run:
                _punch(path, runs)
            trimmed += sum(count for _, count in runs)
    return trimmed


def _write_back(path: str) -> None:
    """Have in the image what is only in the page cache, so that it counts as data."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


def _runs(
    client: Client, inside: str, offset: int | None, length: int | None, minimum: int
) -> Iterator[list[Run]]:
    """What there is to punch, page by page."""
    request = {"offset": offset, "length": length}
    request = {key: value for key, value in request.items() if value is not None}
    end = None if length is None else (offset or 0) + length
    while True:
        answer = client.call("runs", file=inside, minimum=minimum, **request)
        yield answer["runs"]
        if answer["next"] is None:
            return
        request["offset"] = answer["next"]
        if end is not None:
            request["length"] = end - answer["next"]


def _punch(path: str, runs: list[Run]) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        for start, count in runs:
            fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start, count)
    finally:
        os.close(fd)
