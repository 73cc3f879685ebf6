"""Whether a run can go on with the full point that an interrupted one has begun."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from attrs import frozen

from ..client.wire import Client
from ..errors import KeyRefused, SnapfsError
from . import belonging, qemu
from .chain import Begun, Directory, Point
from .qcow2 import Qcow2File
from .targets import Coding
from .unfinished import Ledger


@frozen
class Wanted:
    """What this run is to make: over `parent`, of the image at a path, as it is mounted."""

    mountpoint: str
    image: str
    parent: Point | None
    coding: Coding
    keep_snapshot: timedelta


def go_on_or_give_up(directory: Directory, wanted: Wanted, say: Callable[[str], None]) -> None:
    """Have what is begun be what can be gone on with; says why something is given up.

    Raises KeyRefused for another key than that of the image.
    """
    begun = directory.chain.begun
    if begun is None:
        return
    why, position = _why_not(directory, begun, wanted)
    if why is None:
        return
    if position:
        say(f"the full point {begun.name}, which was begun, is given up: {why}")
    directory.drop_begun()


def _why_not(directory: Directory, begun: Begun, wanted: Wanted) -> tuple[str | None, int]:
    """Why not, or None; and how many bytes are safe, as far as that is known."""
    label = directory.chain.prefix + begun.token
    with Client(wanted.mountpoint) as client:
        snapshots = {each["name"]: each for each in client.call("list")["snapshots"]}
    snapshot = snapshots.get(label)
    if snapshot is None or belonging.is_another_file(begun.image, wanted.image):
        return (
            f"{wanted.image} has no such snapshot; if {begun.image} is another image "
            f"and still has it, it stays there until snapfs delete MOUNTPOINT {label}"
        ), 1
    try:
        with Ledger(directory.ledger_of(begun.name), snapshot["size"]) as ledger:
            position = ledger.position
    except (SnapfsError, OSError) as error:
        return str(error), 1
    if snapshot["state"] != "ok":
        return f"its snapshot is {snapshot['state']} ({snapshot['reason']})", position
    age = datetime.now(UTC) - datetime.fromisoformat(snapshot["created"])
    if age > wanted.keep_snapshot or not wanted.keep_snapshot:
        return (
            f"its snapshot was taken on {snapshot['created'][:19]}Z, which is longer ago than "
            "--keep-snapshot-for says"
        ), position
    if wanted.parent is not None:
        return f"the image can be backed up on top of point {wanted.parent.name}", position
    if not position:
        return "nothing of it is safe", 0
    try:
        why = _prepare(directory, begun, snapshot["size"], position, wanted.coding)
    except KeyRefused:
        raise
    except (SnapfsError, OSError) as error:
        why = str(error)
    return why, position


def _prepare(
    directory: Directory, begun: Begun, size: int, position: int, coding: Coding
) -> str | None:
    """Have the image as it is written on; returns what of it is not as it should be."""
    final = directory.image_of(begun.name)
    partial = f"{final}.partial"
    if not os.path.exists(partial) and os.path.exists(final):
        os.rename(final, partial)  # all was copied
    with Qcow2File(partial) as file:
        if file.encrypted != (coding.key is not None):
            return f"it is {'' if file.encrypted else 'not '}encrypted"
        if file.cluster_size != coding.cluster:
            return f"{partial} has clusters of {file.cluster_size} bytes"
        if coding.compress and not (file.zstd and position in (size, coding.floor(position))):
            return "it is not compressed"
        now = file.size
    qemu.free_leaks(partial, coding.key)
    if now != coding.size_of(size):
        qemu.resize([partial], coding.size_of(size), coding.key)
    return None
