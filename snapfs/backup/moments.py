"""Moments of an image, and what changed since one: a snapshot, a bitmap, a point of a backup.

    NAME                        the snapshot or the bitmap of the mount with that name
    MOUNTPOINT/snapshots/NAME   the snapshot
    MOUNTPOINT/bitmaps/NAME     the bitmap
    DIR/POINT                   the point of the backup directory DIR, as --at takes it

A moment is known by the time of its snapshot, which is kept to the microsecond: in the bitmap
that began in its instant, and in the point that was made of it.  No order is taken from times,
since clocks are set back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from attrs import field, frozen
from attrs.validators import ge, optional

from ..client import mountinfo
from ..client.wire import Client
from ..errors import BitmapUnusable, NotFound, NotMounted, UsageError
from . import records
from .chain import MANIFEST, Directory, opened
from .choosing import choose
from .extents import Extents
from .sums import spans


def _check_time(_moment: Any, _field: Any, value: str) -> None:
    if datetime.fromisoformat(value).tzinfo is None:
        raise ValueError(f"{value!r} has no time zone")


@frozen
class Moment:
    """One moment of an image.  `created`: of its snapshot.  `size`: bytes; None: not known."""

    created: str = field(validator=_check_time)
    size: int | None = field(default=None, validator=optional(ge(0)))

    def is_same(self, other: Moment) -> bool:
        """Is it that moment, as far as both say?"""
        if None not in (self.size, other.size) and self.size != other.size:
            return False
        return datetime.fromisoformat(self.created) == datetime.fromisoformat(other.created)


records.register(Moment)


@frozen
class Changes:
    """What may differ from how it was since; what is in neither is the same.

    `unknown`: nobody knows whether it differs.  `base`: the moment, None if that is not known.
    `bitmap`: the one that tells all of it, if it is one.
    """

    since: str
    base: Moment | None
    changed: Extents
    unknown: Extents
    bitmap: str | None = None


class _Asking:
    """Questions about one mount, up to one of its snapshots or (None) now."""

    def __init__(self, client: Client, snapshot: str | None) -> None:
        self._client = client
        self._snapshot = snapshot

    def since_snapshot(self, name: str) -> Changes:
        listed = self._client.call("list")["snapshots"]
        names = [each["name"] for each in listed]
        if self._snapshot in names and name in names[names.index(self._snapshot) :]:
            what = "itself" if name == self._snapshot else "newer"
            raise UsageError(f"snapshot {name} is no moment before {self._snapshot}: it is {what}")
        before = self._show(name)
        changed, unknown, _ = self._differences(a=name)
        if self._show(name) != before:
            raise UsageError(f"snapshot {name} was replaced meanwhile; begin again")
        return Changes(f"snapshot {name}", before, changed, unknown)

    def _show(self, name: str) -> Moment:
        shown = self._client.call("show", name=name)["snapshot"]
        return Moment(shown["created"], shown["size"])

    def since_bitmap(self, name: str) -> Changes:
        changed, unknown, began = self._differences(bitmap=name)
        base = None if began is None else Moment(began)
        return Changes(f"bitmap {name}", base, changed, unknown, name)

    def since_point(self, directory: Directory, text: str) -> Changes:
        """What its later points hold, and what changed since the newest one."""
        chain = directory.chain
        point = choose(chain, text)
        last = chain.points[-1]
        label = chain.prefix + last.token
        bitmaps = {each["name"] for each in self._client.call("bitmap_list")["bitmaps"]}
        if label not in bitmaps:
            raise BitmapUnusable(
                f"the image has no bitmap of point {last.name} of {directory.path}; "
                "a full copy is needed"
            )
        found = self.since_bitmap(label)
        for later in chain.points[chain.points.index(point) + 1 :]:
            for start, stop, _ in spans(directory.refuse_other_sums(later)):
                found.changed.add(start, stop)
        found.changed.cut(self._size())
        return Changes(
            f"point {point.name} of {directory.path}",
            Moment(point.created, point.size),
            found.changed,
            found.unknown,
            label if point == last else None,
        )

    def _size(self) -> int:
        if self._snapshot is not None:
            return int(self._client.call("show", name=self._snapshot)["snapshot"]["size"])
        return int(self._client.call("status")["image"]["size"])

    def _differences(self, **since: str) -> tuple[Extents, Extents, str | None]:
        """Changed, unknown, and when the bitmap began, if it is one."""
        found = {"changed": Extents(), "unknown": Extents()}
        began: set[str | None] = set()
        offset: int | None = 0
        while offset is not None:
            answer = self._client.call("diff", b=self._snapshot, offset=offset, **since)
            for each in answer["extents"]:
                found[each["state"]].add(each["start"], each["start"] + each["length"])
            began.add(answer.get("bitmap", {}).get("began"))
            offset = answer["next"]
        if len(began) > 1:
            raise UsageError(f"bitmap {since['bitmap']} was cleared meanwhile; begin again")
        return found["changed"], found["unknown"], began.pop()


def changes(mountpoint: str, snapshot: str | None, since: str) -> Changes:
    """What changed in the image, up to a snapshot or (None) now, since what `since` names.

    Raises UsageError if that can be two things, or is not before the snapshot; NotFound,
    SnapshotLost, BitmapUnusable, PointDamaged, BackupError.
    """
    with Client(mountpoint) as client:
        asking = _Asking(client, snapshot)
        if "/" not in since:
            return _since_name(client, asking, since)
        try:
            mount, inside = mountinfo.split(since)
        except NotMounted:
            return _since_point(asking, since)
        if mount.device != client.mount.device:
            raise UsageError(f"{since} is of another mount than {mountpoint}")
        kind, _, name = inside.partition("/")
        if kind == "snapshots" and name:
            return asking.since_snapshot(name)
        if kind == "bitmaps" and name:
            return asking.since_bitmap(name)
        raise UsageError(f"{since} is neither a snapshot nor a bitmap")


def _since_name(client: Client, asking: _Asking, name: str) -> Changes:
    where = client.mount.mountpoint
    is_snapshot = any(each["name"] == name for each in client.call("list")["snapshots"])
    is_bitmap = any(each["name"] == name for each in client.call("bitmap_list")["bitmaps"])
    if is_snapshot and is_bitmap:
        raise UsageError(
            f"{name} is a snapshot and a bitmap; say {where}/snapshots/{name} or "
            f"{where}/bitmaps/{name}"
        )
    if is_snapshot:
        return asking.since_snapshot(name)
    if is_bitmap:
        return asking.since_bitmap(name)
    raise NotFound(
        f"{where} has neither a snapshot nor a bitmap {name}; a point of a backup is DIR/POINT"
    )


def _since_point(asking: _Asking, text: str) -> Changes:
    with open_point(text) as (directory, name):
        return asking.since_point(directory, name)


@contextmanager
def open_point(text: str) -> Iterator[tuple[Directory, str]]:
    """The backup directory of DIR/POINT, its points staying as they are, and POINT.

    Raises NotFound, UsageError, InUse.
    """
    path, _, name = text.rpartition("/")
    path = path or "/"
    if not name or not os.path.exists(os.path.join(path, MANIFEST)):
        if os.path.exists(os.path.join(text, MANIFEST)):
            raise UsageError(f"{text} is a backup directory; say which point, as DIR/latest")
        raise NotFound(
            f"{text} is neither a snapshot or bitmap of a mount nor a point of a backup, DIR/POINT"
        )
    with opened(path, change=False) as directory:
        yield directory, name
