"""What people name on a command line: a snapshot as MOUNTPOINT NAME or as a path, or a pattern."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ..errors import NotMounted, UsageError
from . import mountinfo
from .mountinfo import Mount

Directory = Literal["snapshots", "bitmaps"]
WILD = frozenset("*?[")


def split_names(
    words: Sequence[str], directory: Directory = "snapshots"
) -> tuple[Mount, list[str]]:
    """The mount and the names that are meant by MOUNTPOINT NAME..., or by paths.

    There may be no name.  Raises NotMounted, UsageError for another file of the mount, and for
    paths of two mounts.
    """
    first, *rest = words
    mount, inside = _look(first)
    names = [] if inside in ("", directory) else [_name(first, inside, directory)]
    for word in rest:
        if "/" not in word:
            names.append(word)
            continue
        try:
            other, inside = _look(word)
        except NotMounted as error:
            raise UsageError(f"{word!r} can be no name, and as a path: {error}") from None
        if other.id != mount.id:
            raise UsageError(f"{first} and {word} are of two mounts; name those of one at a time")
        names.append(_name(word, inside, directory))
    return mount, names


def _look(path: str) -> tuple[Mount, str]:
    """The mount, and a path in it; a mountpoint is not asked, whose daemon may be dead."""
    found = mountinfo.find(path)
    if found is not None and found.fs_type == mountinfo.FS_TYPE:
        return found, ""
    mountinfo.around(path)  # which says what there is instead
    return mountinfo.split(path)


def _name(path: str, inside: str, directory: Directory) -> str:
    above, _, name = inside.partition("/")
    if above != directory or not name:
        what = directory.removesuffix("s")
        raise UsageError(f"{path} is no {what}; those are MOUNTPOINT/{directory}/NAME")
    return name
