"""Streams as `snapfs send` writes them, made without a mount."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from snapfs.backup.moments import Moment
from snapfs.backup.stream import VERSION, Header, StreamTarget

START = datetime(2026, 11, 2, 12, tzinfo=UTC)

Change = tuple[int, bytes | int]  # offset, and data or how many zeros


def moment(hour: int, size: int) -> Moment:
    created = START + timedelta(hours=hour)
    return Moment(created.isoformat(timespec="microseconds").replace("+00:00", "Z"), size)


def stream(
    at: Moment, changes: Sequence[Change], *, base: Moment | None = None, start: int = 0
) -> bytes:
    """A whole stream up to a moment."""
    assert at.size is not None
    data = sum(len(what) for _, what in changes if isinstance(what, bytes))
    header = Header(
        VERSION, image="/vm/disk.img", host="vm", snapshot="s", moment=at, size=at.size,
        start=start, data_bytes=data, base=base,
    )  # fmt: skip
    with tempfile.TemporaryFile() as file:
        target = StreamTarget(file.fileno(), header)
        for offset, what in changes:
            if isinstance(what, bytes):
                target.write(offset, what)
            else:
                target.zero(offset, what)
        target.finish()
        return os.pread(file.fileno(), 1 << 30, 0)


def incoming(data: bytes) -> io.BytesIO:
    return io.BytesIO(data)


def applied(before: bytes, size: int, changes: Sequence[Change]) -> bytes:
    """What an image is when they have arrived."""
    now = bytearray(before[:size].ljust(size, b"\0"))
    for offset, what in changes:
        content = what if isinstance(what, bytes) else bytes(what)
        now[offset : offset + len(content)] = content
    return bytes(now)
