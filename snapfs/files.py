"""Small files that are written as a whole."""

from __future__ import annotations

import os


def write_and_close(fd: int, data: bytes) -> None:
    """Write all of `data`, make it durable, and close, also after an error.  Blocks."""
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)
