"""A backup directory: its manifest, its points, its locks.

    DIR/snapfs-backup.json      the manifest; a directory without it is no backup
    DIR/snapfs-backup.lock      held by the one that changes DIR
    DIR/snapfs-backup.readers   shared by those that read points, held by the one that takes
                                points out or folds them; a point is added beside readers
    DIR/POINT.qcow2             what changed up to a point, over the point before
    DIR/POINT.sums              its checksums (sums.py)
    DIR/POINT.*.partial         of the full point that is `begun` (unfinished.py)

The manifest is replaced atomically and is the truth: a file that it does not
name as a point does not count.  Names of files that may be there and are no
points are in `garbage`, or `begun`, *before* the files are made, so the next run can
remove exactly those and never a file of somebody else's.

Folding point OLD into the next one, INTO, is on record in `fold` from before
the first byte of OLD.qcow2 changes:

    INTO.sums.fold written, then the manifest: OLD is no point any more
    OLD.qcow2 gets what INTO.qcow2 has (which stays as it is and reads the same)
    OLD.qcow2 is renamed to INTO.qcow2, INTO.sums.fold to INTO.sums
    the manifest: no fold

Whatever the moment it stops, INTO and all later points read the same, and doing
the steps again finishes it.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from attrs import evolve, field, frozen
from attrs.validators import ge, matches_re

from ..errors import BackupError, InUse, NotFound, PartialCopy, PointDamaged
from . import records
from .copies import Journal
from .extents import Extents
from .keys import Key
from .layers import Layer
from .qcow2 import Qcow2File
from .qemu import is_encrypted, try_key
from .source import refuse_served
from .sums import Unit, digest_of, load, spans

VERSION = 1
MANIFEST = "snapfs-backup.json"
LOCK = "snapfs-backup.lock"
READERS = "snapfs-backup.readers"
LOCK_SECONDS = 0.2  # between two looks at a lock that is waited for

_NAME = r"\d{4,}-[0-9TZ-]+"
_TOKEN = r"[0-9a-f]{12}"


@frozen
class Point:
    """One moment of the image.  `parent`: the point below, None for a full one; sizes in bytes.

    `token` is in the name of the bitmap that began to record at this moment.
    """

    number: int = field(validator=ge(1))
    name: str = field(validator=matches_re(_NAME))
    token: str = field(validator=matches_re(_TOKEN))
    created: str
    size: int = field(validator=ge(0))
    parent: str | None
    image: str
    data_bytes: int = field(validator=ge(0))
    zero_bytes: int = field(validator=ge(0))
    digest: str  # of POINT.sums
    machine: str = ""  # on which `image` was, see belonging.py

    def __attrs_post_init__(self) -> None:
        if self.time.tzinfo is None:
            raise ValueError(f"{self.created!r} has no time zone")

    @property
    def time(self) -> datetime:
        """When the snapshot was taken."""
        return datetime.fromisoformat(self.created)


@frozen
class Begun:
    """A full point that is being copied, or was when the run was interrupted; see unfinished.py.

    Its snapshot and the bitmap that began with it have the token in their names.
    """

    name: str = field(validator=matches_re(_NAME))
    token: str = field(validator=matches_re(_TOKEN))
    image: str
    machine: str = ""


@frozen
class Fold:
    """Point `old`, which is none any more, is being folded into `into`."""

    old: str = field(validator=matches_re(_NAME))
    into: str = field(validator=matches_re(_NAME))


@frozen
class Chain:
    """The manifest.  `points` oldest first; the last one is the one that bitmaps continue."""

    version: int
    id: str = field(validator=matches_re(_TOKEN))
    next_number: int = field(default=1, validator=ge(1))
    points: tuple[Point, ...] = ()
    garbage: tuple[str, ...] = ()
    fold: Fold | None = None
    begun: Begun | None = None

    def __attrs_post_init__(self) -> None:
        known: set[str] = set()
        parents: set[str] = set()
        last = 0
        for point in self.points:
            if not last < point.number < self.next_number:
                raise ValueError(f"the number of point {point.name} is out of order")
            if point.name in known:
                raise ValueError(f"two points are named {point.name}")
            if point.parent is not None and point.parent not in known:
                raise ValueError(f"the point below {point.name}, {point.parent}, is missing")
            if point.parent in parents:
                raise ValueError(f"two points are on top of {point.parent}")
            known.add(point.name)
            last = point.number
            if point.parent is not None:
                parents.add(point.parent)
        if self.fold is not None and (self.fold.into not in known or self.fold.old in known):
            raise ValueError("its fold is of points that cannot be folded")
        if self.begun is not None and self.begun.name in {*known, *self.garbage}:
            raise ValueError(f"{self.begun.name} is begun and something else as well")
        for name in self.garbage:
            if name in known or not re.fullmatch(_NAME, name):
                raise ValueError(f"{name} cannot be garbage")

    @property
    def prefix(self) -> str:
        """What the names of all our bitmaps and snapshots begin with."""
        return f"backup-{self.id}-"

    def find(self, name: str) -> Point:
        """A point by its file name."""
        for point in self.points:
            if point.name == name:
                return point
        raise NotFound(f"there is no point {name}")

    def child(self, name: str) -> Point | None:
        """The point on top of another."""
        return next((point for point in self.points if point.parent == name), None)

    def lineage(self, point: Point) -> list[Point]:
        """A point and all below it, the full one first."""
        found = [point]
        for each in reversed(self.points):  # a point comes behind the one that it stands on
            if each.name == found[-1].parent:
                found.append(each)
        return found[::-1]

    def new_name(self, now: datetime) -> str:
        """A name for the next point."""
        return f"{self.next_number:04d}-{now.astimezone(UTC):%Y-%m-%dT%H-%M-%SZ}"


records.register(Point, Begun, Fold, Chain)


def new_token() -> str:
    """Something that no other point, and no other directory, has."""
    return secrets.token_hex(6)


def split_label(name: str) -> tuple[str, str] | None:
    """The ids of the directory and the point in the name of a snapshot or a bitmap of a backup."""
    found = re.fullmatch(rf"backup-({_TOKEN})-({_TOKEN})", name)
    return None if found is None else (found[1], found[2])


def is_backups_own(name: str) -> bool:
    """Is it the name of a snapshot, or a bitmap, that some backup made?"""
    return split_label(name) is not None


class Directory:
    """A backup directory, locked.  `chain` is what its manifest says.

    `key` is that of the points that are encrypted, if it was given.
    """

    def __init__(self, path: str, key: Key | None = None) -> None:
        """Read the manifest; use `opened` to have the lock."""
        self.path = os.path.abspath(path)
        self.key = key
        self.chain = self._read()

    def _read(self) -> Chain:
        where = os.path.join(self.path, MANIFEST)
        try:
            with open(where, "rb") as file:
                return records.structure(file.read(), Chain, where, VERSION)
        except FileNotFoundError:
            raise BackupError(
                f"{self.path} is no backup directory: {MANIFEST} is missing.  Is the disk "
                f"mounted?  For a new one: snapfs backup --init {self.path}"
            ) from None

    @contextmanager
    def without_readers(self, wait: float = 0.0) -> Iterator[None]:
        """While points are folded or taken out; raises InUse if somebody reads them."""
        with _locked(self.path, READERS, fcntl.LOCK_EX, wait):
            yield

    def save(self, chain: Chain) -> None:
        """Replace the manifest, durably."""
        records.replace_durably(
            os.path.join(self.path, MANIFEST), records.unstructure(evolve(chain))
        )
        self.chain = chain

    def image_of(self, name: str) -> str:
        """The qcow2 file of a point."""
        return os.path.join(self.path, f"{name}.qcow2")

    def sums_of(self, name: str) -> str:
        """The checksums of a point."""
        return os.path.join(self.path, f"{name}.sums")

    def ledger_of(self, name: str) -> str:
        """How far a point that is begun is durable."""
        return f"{self.sums_of(name)}.partial"

    def files_of(self, name: str) -> Iterator[str]:
        """All that may be there of a name in `garbage`."""
        for suffix in (".qcow2", ".qcow2.partial", ".qcow2.new", ".sums", ".sums.partial",
                       ".sums.new", ".sums.fold", ".sums.fold.new"):  # fmt: skip
            yield os.path.join(self.path, name + suffix)

    def units(self, point: Point) -> list[Unit]:
        """What a point holds, with checksums; raises PointDamaged if that is not what it was."""
        return load(self.refuse_other_sums(point), point.size, self.sums_of(point.name))

    def refuse_other_sums(self, point: Point) -> bytes:
        """The file of checksums of a point; raises PointDamaged if it is not what it was."""
        path = self.sums_of(point.name)
        fold = self.chain.fold
        if fold is not None and fold.into == point.name and os.path.exists(f"{path}.fold"):
            path = f"{path}.fold"
        try:
            with open(path, "rb") as file:
                data = file.read()
        except FileNotFoundError:
            raise PointDamaged(f"point {point.name}: {path} is missing") from None
        if digest_of(data) != point.digest:
            raise PointDamaged(f"point {point.name}: {path} is not what it was")
        return data

    def data_of(self, point: Point) -> Extents:
        """What of a point may be other than zeros; raises PointDamaged as `units` does."""
        found = Extents()
        for each in self.chain.lineage(point):
            found.cut(each.size)
            for start, stop, data in spans(self.refuse_other_sums(each)):
                if data:
                    found.add(start, stop)
                else:
                    found.remove(start, stop)
        return found

    def layer_of(self, point: Point) -> tuple[str, ...]:
        """The files that have what a point has over the one below: two while it is folded."""
        path, fold = self.image_of(point.name), self.chain.fold
        if fold is not None and fold.into == point.name and os.path.exists(self.image_of(fold.old)):
            return path, self.image_of(fold.old)
        return (path,)

    def layer(self, point: Point) -> Layer:
        """What a point has over the one below, to be read; raises what `Layer` does."""
        return Layer(self.layer_of(point), self.key)

    def is_encrypted(self, point: Point) -> bool:
        """Does it take a key to read what a point has itself?"""
        return any(is_encrypted(path) for path in self.layer_of(point))

    def refuse_key(self, points: Iterable[Point]) -> None:
        """Raises KeyRefused if some points are encrypted and our key is not that of the first."""
        for point in points:
            if self.is_encrypted(point):
                try_key(self.layer_of(point), self.key)
                return

    def refuse_partial(self, point: Point) -> None:
        """Raises PartialCopy or PointDamaged unless the file of a point is there and whole."""
        path = self.image_of(point.name)
        if os.path.exists(Journal.path_of(path)):
            raise PartialCopy(f"{path} is marked as unfinished by {Journal.path_of(path)}")
        if not os.path.isfile(path):
            raise PointDamaged(f"point {point.name}: {path} is missing")
        try:
            Qcow2File(path).close()
        except BackupError as error:
            raise PointDamaged(f"point {point.name}: {error}") from None

    def drop_begun(self) -> None:
        """Have the full point that is begun be garbage."""
        begun = self.chain.begun
        if begun is not None:
            self.save(evolve(self.chain, begun=None, garbage=(*self.chain.garbage, begun.name)))

    def sweep(self) -> None:
        """Remove what interrupted runs left."""
        for name in self.chain.garbage:
            for path in self.files_of(name):
                records.remove(path)
        if self.chain.garbage:
            records.sync_directory(self.path)
            self.save(evolve(self.chain, garbage=()))
        if self.chain.points:  # a run that was killed when its point was complete
            records.remove(self.ledger_of(self.chain.points[-1].name))
        records.remove(os.path.join(self.path, f"{MANIFEST}.new"))


def init(path: str) -> Directory:
    """Make a directory a backup directory; one that is there already stays what it is."""
    path = os.path.abspath(path)
    refuse_served(os.path.join(path, MANIFEST), "back up")
    os.makedirs(path, mode=0o700, exist_ok=True)
    if os.path.exists(os.path.join(path, MANIFEST)):
        raise BackupError(
            f"{path} is a backup directory already; add a point: snapfs backup MOUNTPOINT {path}"
        )
    records.replace_durably(
        os.path.join(path, MANIFEST), records.unstructure(Chain(VERSION, new_token()))
    )
    records.sync_directory(os.path.dirname(path))
    return Directory(path)


@contextmanager
def opened(
    path: str, *, change: bool, wait: float = 0.0, key_file: str | None = None
) -> Iterator[Directory]:
    """A backup directory, locked: to change it, or to have its points stay as they are.

    `wait`: seconds for the lock.  Raises InUse, BackupError, KeyRefused.
    """
    Directory(path)  # first: a lock file in an empty mountpoint helps nobody
    key = None if key_file is None else Key.read(key_file)
    if change:
        with _locked(path, LOCK, fcntl.LOCK_EX, wait):
            yield Directory(path, key)
    else:
        with _locked(path, READERS, fcntl.LOCK_SH, wait):
            yield Directory(path, key)


@contextmanager
def _locked(path: str, name: str, kind: int, wait: float) -> Iterator[None]:
    fd = _open_lock(path, name, kind)
    try:
        end = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(fd, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise InUse(
                        f"another snapfs is working in {path}; try again when it is done, or "
                        "wait for it with --wait"
                    ) from None
            time.sleep(LOCK_SECONDS)
        yield
    finally:
        os.close(fd)


def _open_lock(path: str, name: str, kind: int) -> int:
    where = os.path.join(path, name)
    try:
        return os.open(where, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        if kind == fcntl.LOCK_EX:
            raise
    try:
        return os.open(where, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # a medium that is read-only: nobody changes it
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
