"""How far a full point is that was begun: what an interrupted run leaves to the next one.

    DIR/POINT.qcow2.partial   the image as far as it is copied
    DIR/POINT.sums.partial    how far that is durable

The latter has lines as in sums.py and, behind those of each checkpoint,

    at POSITION DIGEST        DIGEST: of the lines since the last such line

It only grows.  A line that a power cut tore, and what is behind it, counts for nothing; what
counts is in the image, durably, and may have been given up in the snapshot since.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from types import TracebackType

from ..storage.smallfiles import write_synced
from .sums import Unit, digest_of, dump, load

_MARK = re.compile(rb"at (0|[1-9]\d{0,18}) ([0-9a-f]{32})\n")


class Ledger:
    """The file, open.  A context manager.  `position` and `units`: what is safe so far."""

    def __init__(self, path: str, size: int) -> None:
        """Open it, new if it is not there; `size`: of the image.  Raises OSError, BackupError."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(os.dup(self._fd), "rb") as file:
                safe, lines, self.position = _good_part(file.read(), size)
            self.units = load(lines, size, path)
            os.ftruncate(self._fd, safe)
            os.lseek(self._fd, safe, os.SEEK_SET)
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, position: int, units: Sequence[Unit]) -> None:
        """Everything before `position` is durable at the target; these units are new of it."""
        if position <= self.position:
            return
        lines = dump(units)
        write_synced(self._fd, lines + b"at %d %s\n" % (position, digest_of(lines).encode()))
        self.position = position
        self.units += units

    def close(self) -> None:
        """Close the file; it stays."""
        os.close(self._fd)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.close()


def _good_part(data: bytes, size: int) -> tuple[int, bytes, int]:
    """How long it is, the checksums in it, and the position that it says."""
    parts: list[bytes] = []
    start = position = 0
    for mark in _MARK.finditer(data):
        lines = data[start : mark.start()]
        reached = int(mark[1])
        if digest_of(lines) != mark[2].decode() or not position < reached <= size:
            break
        parts.append(lines)
        start, position = mark.end(), reached
    return start, b"".join(parts), position
