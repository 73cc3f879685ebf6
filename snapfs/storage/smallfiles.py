"""Small files that are written as a whole."""

from __future__ import annotations

import os


def write_synced(fd: int, data: bytes) -> None:
    """Write all of `data` and make it durable.  Blocks."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.fsync(fd)


def write_and_close(fd: int, data: bytes) -> None:
    """The same, and close, also after an error."""
    try:
        write_synced(fd, data)
    finally:
        os.close(fd)
