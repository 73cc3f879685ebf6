"""All snapfs mounts that this process sees, and what their daemons say.  Blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from ..errors import NotMounted, SnapfsError
from . import mountinfo, older, shapes
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
    for mount in mounts():
        try:
            with Client(mount) as client:
                client.be_patient(PATIENCE)
                answer: Answer | SnapfsError = _complete(command, client.call(command))
        except SnapfsError as error:
            answer = error
        yield mount, answer


def _complete(command: Literal["status", "list"], answer: Answer) -> Answer:
    """An answer with what it lacks, if it has the rest; raises NotMounted."""
    complete, shape = {
        "status": (older.complete_status, shapes.STATUS),
        "list": (older.complete_list, shapes.LIST),
    }[command]
    try:
        found = complete(answer)
    except (LookupError, TypeError, AttributeError):
        found = {}
    if not shapes.fits(found, shape):
        raise NotMounted("what answers is no snapfs: it says something else")
    return found
