"""All snapfs mounts that this process sees, and what their daemons say.  Blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from ..errors import SnapfsError
from . import mountinfo, older
from .mountinfo import FS_TYPE, Mount
from .older import Answer
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


def ask(command: Literal["status", "list"]) -> Iterator[tuple[Mount, Answer | SnapfsError]]:
    """Each mount, and the answer of its daemon or why there is none."""
    complete = older.complete_status if command == "status" else older.complete_list
    for mount in mounts():
        try:
            with Client(mount) as client:
                client.be_patient(PATIENCE)
                answer: Answer | SnapfsError = complete(client.call(command))
        except SnapfsError as error:
            answer = error
        yield mount, answer
