"""What verify found out of the points of a directory, and when: a file beside the manifest.

    DIR/snapfs-backup.verified

It is advice: without it, or if it cannot be written or read, nothing is known, and a record
counts only while the point has the checksums that it was made of.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from attrs import evolve, field, frozen

from ..errors import BackupError
from . import records
from .chain import Chain, Directory, Point

VERSION = 1
NAME = "snapfs-backup.verified"


@frozen
class Verified:
    """`good`: the point can be restored.  `digest`: of its checksums then."""

    when: str
    good: bool
    digest: str

    def __attrs_post_init__(self) -> None:
        if self.time.tzinfo is None:
            raise ValueError(f"{self.when!r} has no time zone")

    @property
    def time(self) -> datetime:
        """When it was verified."""
        return datetime.fromisoformat(self.when)


@frozen
class _File:
    version: int
    points: dict[str, Verified] = field(factory=dict)


records.register(Verified, _File)


def found(path: str, chain: Chain) -> Mapping[str, Verified]:
    """What is known of the points of a directory, by name."""
    where = os.path.join(path, NAME)
    try:
        with open(where, "rb") as file:
            stored = records.structure(file.read(), _File, where, VERSION)
    except (OSError, BackupError):
        return {}
    digests = {point.name: point.digest for point in chain.points}
    return {name: each for name, each in stored.points.items() if digests.get(name) == each.digest}


def note(directory: Directory, goods: Mapping[Point, bool]) -> None:
    """Record what was found just now; nothing if that cannot be."""
    now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    with suppress(OSError, BackupError), _writing(directory.path):
        known = dict(found(directory.path, directory.chain))
        known |= {point.name: Verified(now, good, point.digest) for point, good in goods.items()}
        data = records.unstructure(evolve(_File(VERSION), points=known))
        records.replace_durably(os.path.join(directory.path, NAME), data)


def note_damage(directory: Directory, point: Point) -> None:
    """Record that a point does not have what some point needs of it."""
    note(directory, {point: False})


@contextmanager
def _writing(path: str) -> Iterator[None]:
    """One writer at a time; raises BlockingIOError if there is another."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def why_damaged(directory: Directory, point: Point) -> str | None:
    """What is known to be wrong with a point or one that it stands on, and not refuted since."""
    known = found(directory.path, directory.chain)
    itself = known.get(point.name)
    for each in directory.chain.lineage(point):
        record = known.get(each.name)
        if record is None or record.good:
            continue
        if itself is None or not itself.good or itself.time < record.time:
            return f"point {each.name} was found damaged on {record.when[:19]}Z"
    return None
