"""Whose backups a directory holds: those of one image, and how it is known again.

The image of the newest point has, in its state directory, the bitmap that began to
record at that point; its name has the point's token, which nothing else has.  So an
image is the same wherever it is mounted, moved or renamed to, and

    a copy of it, state directory and all   has the bitmap as well, but the path of the
                                            newest point is still there and another file;
                                            once either is backed up the other has an
                                            older bitmap
    its state directory was lost, or        has no bitmap, but lies where the image of the
    it was restored in place                newest point lay, on the same machine

Everything else is another image.  One that was restored to another place is, too: the
first one may well be in use still.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Container

from .chain import Begun, Chain, Point

MACHINE_ID = "/etc/machine-id"  # machine-id(5)


def machine_id() -> str:
    """What tells this machine from others; "" if it has nothing of the kind."""
    try:
        with open(MACHINE_ID, encoding="ascii") as file:
            return file.read(64).strip()
    except (OSError, ValueError):
        return ""


def newest(chain: Chain) -> Point | Begun | None:
    """What says whose the directory is: its newest point, or the first one that is begun."""
    return chain.points[-1] if chain.points else chain.begun


def why_strange(chain: Chain, image: str, bitmaps: Container[str]) -> str | None:
    """Why an image, with these bitmaps, is not the one of the newest point; None if it is."""
    last = newest(chain)
    if last is None:
        return None
    here = machine_id()
    moved_in = bool(last.machine and here and last.machine != here)
    if chain.prefix + last.token in bitmaps:
        if not moved_in and is_another_file(last.image, image):
            return f"it is a copy of {last.image}, which is still there"
        return None
    if moved_in:
        return f"it has no bitmap of point {last.name}, which was made on another machine"
    if last.image != image:
        return f"it has no bitmap of point {last.name}"
    return None


def is_another_file(one: str, other: str) -> bool:
    """Are there two files by these names?  False if that cannot be known."""
    try:
        first, second = os.stat(one), os.stat(other)
    except (OSError, ValueError):
        return False
    if stat.S_ISBLK(first.st_mode) and stat.S_ISBLK(second.st_mode):
        return first.st_rdev != second.st_rdev
    return not os.path.samestat(first, second)
