"""What an image holds that was received, or restored for that: a record beside it.

    IMAGE.received                              beside a file
    state_directory()/DIGEST.received           of a block device, the digest of its name

It is written when the image is whole and durable, and counts only while nothing has been
written to the image since: `proof` says what it looked like then.  While something is being
received IMAGE.partial lies beside it (copies.py), or the device is marked (devices.py), and
the record tells of a moment that is gone.
"""

from __future__ import annotations

import os
import stat

from attrs import frozen

from ..errors import BackupError
from . import devices, records
from .chain import Point
from .moments import Moment
from .sums import digest_of
from .targets import RawTarget

VERSION = 1
BOOT_ID = "/proc/sys/kernel/random/boot_id"
DEVICES = "/sys/dev/block"
_WRITTEN, _DISCARDED = 6, 13  # fields of `stat` of a device, Documentation/block/stat.rst


@frozen
class Received:
    """`image`, `host`, `snapshot`: where the moment comes from, for people."""

    version: int
    moment: Moment
    snapshot: str
    image: str
    host: str
    proof: str

    def is_unchanged(self, path: str) -> bool:
        """Has nobody written to the image since?  False if that cannot be known."""
        return bool(self.proof) and self.proof == proof_of(path)

    @property
    def words(self) -> str:
        """The moment, for people."""
        return describe(self.snapshot, self.moment)


records.register(Received)


def describe(snapshot: str, moment: Moment) -> str:
    """A moment, for people."""
    return f"{snapshot} ({moment.created})"


def path_of(image: str) -> str:
    """Where the record of an image is."""
    image = os.path.realpath(image)
    if not devices.is_device(image):
        return f"{image}.received"
    name = digest_of(os.fsencode(image))[:16]
    return os.path.join(devices.state_directory(), f"{name}.received")


def read(image: str) -> Received | None:
    """The record of an image, None if there is none; raises BackupError if it is damaged."""
    where = path_of(image)
    try:
        with open(where, "rb") as file:
            return records.structure(file.read(), Received, where, VERSION)
    except FileNotFoundError:
        return None


def proof_of(path: str) -> str:
    """What changes when an image is written to; "" if nothing tells.

    Of a file its size and its time.  Of a block device, of which no time tells, what the kernel
    has counted; it counts anew when it boots, or when the device comes back.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISBLK(status.st_mode):
            return f"size {status.st_size}, mtime {status.st_mtime_ns}"
        records.sync_file(path)  # what is still in memory is not counted
        device = os.path.realpath(
            f"{DEVICES}/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        )
        counts = _text(f"{device}/stat").split()
        disk = device if os.path.exists(f"{device}/diskseq") else os.path.dirname(device)
        counted = [counts[field] for field in (_WRITTEN, _DISCARDED)]
        return f"boot {_text(BOOT_ID)}, disk {_text(f'{disk}/diskseq')}, sectors {counted}"
    except (OSError, LookupError):
        return ""


def _text(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read().strip()


def finish(target: RawTarget, path: str, moment: Moment, **source: str) -> None:
    """`target.finish`, and note what the image holds now; `source` is for people, see Received.

    A file is still locked then.  Of a device the head comes last, and the note is made after it.
    """
    is_file = not isinstance(target, devices.DeviceTarget)
    target.flush() if is_file else target.finish()
    where = path_of(path)
    os.makedirs(os.path.dirname(where), mode=0o700, exist_ok=True)
    record = Received(VERSION, moment, proof=proof_of(path), **source)
    if not record.proof:
        raise BackupError(f"{path} is whole, but nothing tells whether it changes from now on")
    records.replace_durably(where, records.unstructure(record))
    if is_file:
        target.finish()


def finish_point(target: RawTarget, path: str, point: Point) -> None:
    """The same, when a point of a backup was restored."""
    source = {"snapshot": f"point {point.name}", "image": point.image, "host": ""}
    finish(target, path, Moment(point.created, point.size), **source)
