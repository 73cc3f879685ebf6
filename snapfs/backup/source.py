"""A snapshot as a source: what it has, its bytes, and giving up what was read."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

from ..client import mountinfo
from ..client.older import complete_list
from ..client.wire import Client
from ..errors import (
    NotMounted,
    PartialCopy,
    Pinned,
    SnapshotLost,
    SnapshotNotFound,
    UsageError,
)
from ..storage.linux import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from .plan import Kind, Plan


def refuse_served(path: str, what: str) -> None:
    """Raises UsageError if a destination lies in a snapfs mount, or on a disk that is in one.

    Files made in a mount would be snapshots; and a disk cannot hold its own backup.
    """
    directory = os.path.realpath(os.path.dirname(os.path.abspath(path)))
    while not os.path.lexists(directory) and directory != os.path.dirname(directory):
        directory = os.path.dirname(directory)  # where it is going to be made
    for each in (directory, *mountinfo.lives_on(directory)):
        try:
            found, _ = mountinfo.split(each)
        except NotMounted:
            continue
        where = "is in" if each == directory else "lies on a disk that is in"
        raise UsageError(f"{path} {where} the mount {found.mountpoint}; {what} to another place")


class Source:
    """A snapshot's file, open.  A context manager.  Every method blocks."""

    def __init__(self, path: str, *, discard: bool = False) -> None:
        """Raises SnapshotLost, SnapshotNotFound, NotMounted, UsageError."""
        found, inside = mountinfo.split(path)
        directory, _, self.name = inside.partition("/")
        if directory != "snapshots" or not self.name:
            raise UsageError(
                f"{path} is not a snapshot; take one first: snapfs create {found.mountpoint}"
            )
        self.path = path
        self.mountpoint = found.mountpoint
        self._inside = inside
        self.described = self.look()
        if self.described["state"] == "lost":
            reason = self.described["reason"] or "its data is gone"
            raise SnapshotLost(f"snapshot {self.name} is lost: {reason}; copy a newer one")
        if discard and self.described["pinned"]:
            raise Pinned(
                f"snapshot {self.name} is pinned, and would be given up: leave --discard out, or "
                f"snapfs unpin {found.mountpoint} {self.name}"
            )
        with Client(self.mountpoint) as client:
            self.image: dict[str, Any] = client.call("status")["image"]
        try:
            flags = os.O_RDWR if discard else os.O_RDONLY
            self._fd = os.open(path, flags | os.O_CLOEXEC)
        except FileNotFoundError:
            raise SnapshotNotFound(f"there is no snapshot {self.name}") from None
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        self._given_up = 0

    @property
    def size(self) -> int:
        """Bytes of the snapshot."""
        return int(self.described["size"])

    @property
    def key(self) -> str:
        """What tells this snapshot from every other one, by whatever name."""
        return f"{self.image['path']} {self.described['id']} {self.described['created']}"

    def look(self) -> dict[str, Any]:
        """What the daemon says of the snapshot now."""
        with Client(self.mountpoint) as client:
            shown: dict[str, Any] = client.call("show", name=self.name)["snapshot"]
        complete_list({"snapshots": [shown]})
        return shown

    def plan(self, start: int = 0, stop: int | None = None) -> Plan:
        """The whole map from `start` on, up to `stop`."""
        plan = Plan()
        end = self.size if stop is None else stop
        offset: int | None = start
        with Client(self.mountpoint) as client:
            while offset is not None and offset < end:
                answer = client.call("map", file=self._inside, offset=offset, rows=True)
                for first, length, data, accessible, *_ in answer["extents"]:
                    if first < end:
                        kind = Kind.DATA if data else Kind.ZERO
                        kind = kind if accessible else Kind.MISSING
                        plan.add(first, min(length, end - first), kind)
                offset = answer["next"]
        if plan.end != end and start < end:
            raise PartialCopy(f"the map of {self.path} ends at {plan.end} of {self.size} bytes")
        return plan

    @contextmanager
    def _daemon_lives(self) -> Iterator[None]:
        """Raises NotMounted, which says what to do, if it does not any more."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
                raise
            raise NotMounted(
                f"the daemon of {self.mountpoint} is gone; mount the image again, then give the "
                "same command again"
            ) from None

    def read(self, offset: int, length: int) -> bytearray:
        """Exactly these bytes; raises OSError, with EACCES for what may not be read."""
        buffer = bytearray(length)
        view = memoryview(buffer)
        while view:
            with self._daemon_lives():
                count = os.preadv(self._fd, [view], offset)
            if not count:
                raise PartialCopy(f"{self.path} ends at {offset} of {self.size} bytes")
            view, offset = view[count:], offset + count
        return buffer

    def give_up_to(self, position: int) -> None:
        """Discard everything up to `position`; a cluster that is cut there is kept."""
        cluster = int(self.image["cluster_size"])
        stop = position if position == self.size else position // cluster * cluster
        if stop > self._given_up:
            self._discard(self._given_up, stop)

    def spare(self, stop: int) -> None:
        """Have `give_up_to` leave everything before `stop` alone."""
        self._given_up = max(self._given_up, stop)

    def give_up_all(self) -> None:
        """Discard everything, what was spared included."""
        if self.size:
            self._discard(0, self.size)

    def _discard(self, start: int, stop: int) -> None:
        with self._daemon_lives():
            fallocate(self._fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start, stop - start)
        self._given_up = stop

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # the flush that a dead mount fails: nothing was written
            os.close(self._fd)

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_exception: object) -> Literal[False]:
        self.close()
        return False
