"""The words of the record of activity, and the one way to note how the image was left.

What they mean is at the head of activity.py.  Here is what the witness needs, too, which
imports nothing of snapfs but this.
"""

from __future__ import annotations

import os
import sys

FILE_BYTES = 4096
WORDS = 8
MAGIC, SESSION, UNDER_WAY, SIZE, MTIME, CTIME, ALIVE, FAILED = range(WORDS)  # indexes
MAGIC_VALUE = int.from_bytes(b"snapfs2\n", sys.byteorder)


def words_of(page: object) -> memoryview:
    """The record in a mapped page.  Setting an item is one store of 8 bytes."""
    return memoryview(page)[: 8 * WORDS].cast("q")  # type: ignore[arg-type]


def storable(time_ns: int) -> int:
    """A time as a word, which has it from 1677 to 2262: what is outside of that is at its end.

    A file's times may be (touch -d 2300-01-01).  Then a change of mtime among them is not
    seen, but a write sets it to now, and setting it sets ctime, which is not for anybody to choose.
    """
    return max(-(1 << 63), min(time_ns, (1 << 63) - 1))


def note_image(words: memoryview, image_fd: int) -> None:
    """Note how the image looks, now that nothing is under way; UNDER_WAY must not be 0 before."""
    status = os.fstat(image_fd)
    words[SIZE] = status.st_size
    words[MTIME] = storable(status.st_mtime_ns)
    words[CTIME] = storable(status.st_ctime_ns)
    words[UNDER_WAY] = 0
