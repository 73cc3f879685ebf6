"""All snapfs mounts that this process sees, and what their daemons say.  Blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import SnapfsError
from . import mountinfo
from .mountinfo import FS_TYPE, Mount
from .wire import Client

PATIENCE = 5.0  # seconds for each: one that does not answer must not hide the others


def mounts() -> list[Mount]:
    """One mount of each snapfs, the oldest first: others of the same file system are left out."""
    found: dict[str, Mount] = {}
    for each in mountinfo.mounts():
        if each.fs_type == FS_TYPE:
            known = found.setdefault(each.device, each)
            if known.root != "/" and each.root == "/":
                found[each.device] = each
    return list(found.values())


def ask(command: str, **arguments: Any) -> Iterator[tuple[Mount, Mapping[str, Any] | SnapfsError]]:
    """Each mount, and the answer of its daemon or why there is none."""
    for mount in mounts():
        try:
            with Client(mount) as client:
                client.be_patient(PATIENCE)
                yield mount, client.call(command, **arguments)
        except SnapfsError as error:
            yield mount, error
