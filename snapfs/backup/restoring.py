"""`snapfs restore`: a point, put together again and proven.

The layers are read from the newest down, and of each only what nothing newer has: every byte
of the image comes from one place, is compared with its checksum before it is written, and what
is damaged and was replaced by a later point does not matter.

With `salvage` what is damaged is written as zeros and named; what has no checksums any more
is written as it is, and named as well.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from attrs import field, frozen

from ..errors import BackupError, PointDamaged, SnapfsError, UsageError
from . import devices, qemu, received, records
from .chain import Directory, Point, opened
from .choosing import choose
from .copies import VERSION, Journal
from .copying import ZERO_BYTES, check_room
from .devices import DeviceTarget
from .extents import Extents, Range
from .plan import pieces
from .progress import Progress
from .source import refuse_served
from .sums import PIECE_BYTES, UNIT_BYTES, Unit, damaged
from .targets import RawTarget
from .verified import note_damage

_ZEROS = bytes(ZERO_BYTES)
_UNPROVEN = ""  # the digest of what is there and has none


@frozen
class RestoreOptions:
    """What the command line says."""

    at: str | None = None
    force: bool = False
    salvage: bool = False
    for_receive: bool = False
    wait: float = 0.0
    progress_fd: int | None = None
    json: bool = False
    quiet: bool = False
    say: Callable[[str], None] = field(default=print)


def restore(path: str, dest: str, options: RestoreOptions) -> dict[str, Any]:
    """Rebuild a point at DEST, with its exact size; returns the summary.

    `damaged` in it is what is not the point's, as (offset, length): only with `salvage`.
    """
    qemu.find_program("qemu-nbd")
    with opened(path, change=False, wait=options.wait) as directory:
        point = choose(directory.chain, options.at)
        _refuse_inside(directory, dest)
        layers = _Layers(directory, point, salvage=options.salvage)
        journal = Journal(VERSION, f"restore {directory.chain.id} {point.name}", point.size, "raw")
        _check_dest(dest, point, layers, options)
        target = _open(dest, point.size, journal)
        try:
            bad = _replay(directory, layers, target, options)
            if options.for_receive and not bad:
                received.finish_point(target, dest, point)
            else:
                target.finish()
        except BaseException:
            target.abandon()
            raise
    records.remove(Journal.path_of(dest))
    records.sync_directory(os.path.dirname(os.path.abspath(dest)))
    return {"point": point.name, "number": point.number, "created": point.created,
            "dest": dest, "size": point.size, "layers": layers.count,
            "damaged": [[start, stop - start] for start, stop in bad]}  # fmt: skip


def _open(dest: str, size: int, journal: Journal) -> RawTarget:
    if devices.is_device(dest):
        return DeviceTarget(dest, size, records.unstructure(journal), whole_head=True)
    return RawTarget(dest, 0, lambda: journal.write(dest))


def _refuse_inside(directory: Directory, dest: str) -> None:
    where = os.path.realpath(os.path.dirname(os.path.abspath(dest)))
    if where == os.path.realpath(directory.path):
        raise UsageError(f"{dest} is in the backup directory; restore to another place")
    refuse_served(dest, "restore")


def _check_dest(dest: str, point: Point, layers: _Layers, options: RestoreOptions) -> None:
    try:
        status = os.stat(dest)
    except FileNotFoundError:
        status = None
    empty = status is not None and stat.S_ISREG(status.st_mode) and not status.st_size
    if status is not None and not (options.force or empty):
        journal = Journal.read(dest)
        ours = journal is not None and journal.source.startswith("restore ")
        if not (ours and stat.S_ISREG(status.st_mode)):
            raise UsageError(f"{dest} exists; use --force to overwrite it")
    data = layers.look_over()
    if status is not None and stat.S_ISBLK(status.st_mode):
        available = devices.size_of(dest)
        if available < point.size:
            raise BackupError(
                f"{dest} has {available} bytes; the restore takes {point.size}: choose a larger one"
            )
    elif status is not None and not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{dest} is neither a regular file nor a block device")
    elif not options.force:
        room = os.statvfs(os.path.dirname(os.path.abspath(dest)))
        free = room.f_bavail * room.f_frsize + (status.st_blocks * 512 if status else 0)
        check_room(free, data, dest)


Needed = tuple[Unit, list[Range]]  # and what of the unit nothing newer has


class _Layers:
    """What a point takes of each of the points that it stands on, itself first.

    Iterated over, it reads the checksums of one layer at a time.  `stale` then has what is
    right only if a layer whose files are gone had nothing there, and `rest` what no layer has.
    """

    def __init__(self, directory: Directory, point: Point, *, salvage: bool) -> None:
        self._directory = directory
        self._lineage = directory.chain.lineage(point)
        self._salvage = salvage
        self.size = point.size
        self.stale = Extents()
        self.rest: list[Range] = []

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._lineage)

    def __iter__(self) -> Iterator[tuple[Point, list[Needed]]]:
        seen = Extents()
        size = self.size
        for point in reversed(self._lineage):
            size = min(size, point.size)  # what a smaller one cut off does not come back
            needed = []
            for unit in self._units(point, seen, size):
                parts = list(seen.outside(unit.start, min(unit.stop, size)))
                if parts:
                    needed.append((unit, parts))
                    seen.add(unit.start, min(unit.stop, size))
            yield point, needed
        self.rest = list(seen.outside(0, self.size))

    def look_over(self) -> int:
        """Bytes of data; raises, unless we salvage, if a file that has some is not there."""
        data = 0
        for point, needed in self:
            found = sum(
                stop - start
                for unit, parts in needed
                for start, stop in parts
                if unit.digest is not None
            )
            if found and not self._salvage:
                self._directory.refuse_partial(point)
            data += found
        return data

    def _units(self, point: Point, seen: Extents, size: int) -> list[Unit]:
        try:
            return self._directory.units(point)
        except (BackupError, PointDamaged, OSError):
            if not self._salvage:
                raise
        try:
            found = list(qemu.layer_map(*self._directory.layer_of(point)))
        except (BackupError, OSError):
            for start, stop in seen.outside(0, size):
                self.stale.add(start, stop)
            return []
        return [
            Unit(first, stop - first, _UNPROVEN)
            for each in found
            for first, stop in pieces(
                each["start"], min(point.size, each["start"] + each["length"]), UNIT_BYTES
            )
        ]


def _replay(
    directory: Directory, layers: _Layers, target: RawTarget, options: RestoreOptions
) -> Extents:
    """Write everything; returns what is not the point's."""
    size = layers.size
    bad = Extents()
    target.truncate(size)
    with Progress("restore", size, options) as progress:
        for point, needed in layers:
            with _Reader(directory, point, salvage=options.salvage) as reader:
                for unit, parts in needed:
                    for start, stop in parts:
                        if unit.digest is None:
                            target.zero(start, stop - start)
                        progress.advance(stop - start)
                    if unit.digest is not None:
                        _restore_unit(reader, unit, parts, target, bad)
        for start, stop in layers.rest:
            target.zero(start, stop - start)
            progress.advance(stop - start)
    for start, stop in layers.stale:
        bad.add(start, stop)
    return bad


def _restore_unit(
    reader: _Reader, unit: Unit, parts: list[Range], target: RawTarget, bad: Extents
) -> None:
    data, spoilt = reader.read(unit, parts)
    if unit.digest == _UNPROVEN:
        for start, stop in parts:
            bad.add(start, stop)
    with memoryview(data) as view:
        for start, stop in parts:
            for first, end in spoilt.outside(start, stop):
                _write_sparsely(target, first, view[first - unit.start : end - unit.start])
            for first, end in spoilt.inside(start, stop):
                target.zero(first, end - first)
                bad.add(first, end)


class _Reader:
    """The data of one layer.  Its server starts when something is read.  A context manager."""

    def __init__(self, directory: Directory, point: Point, *, salvage: bool) -> None:
        self._directory = directory
        self._point = point
        self._salvage = salvage
        self._server: qemu.Server | None = None
        self._broken: SnapfsError | None = None

    def read(self, unit: Unit, parts: list[Range]) -> tuple[bytearray, Extents]:
        """The data of a unit, and what of it is damaged; raises PointDamaged if that is needed.

        With `salvage` it raises nothing.
        """
        try:
            data = self._serving().client.read(unit.start, unit.length)
            spoilt = Extents([] if unit.digest == _UNPROVEN else damaged(unit, data))
        except (SnapfsError, OSError) as error:
            if not self._salvage:
                raise PointDamaged(
                    f"point {self._point.name} cannot be read at {unit.start}: {error}"
                ) from None
            data, spoilt = self._what_can_be_read(unit)
        needed = Extents(each for part in parts for each in spoilt.inside(*part))
        if needed and not self._salvage:
            note_damage(self._directory, self._point)
            raise PointDamaged(
                f"point {self._point.name} is damaged at "
                + ", ".join(f"{start}+{stop - start}" for start, stop in list(needed)[:10])
                + " (offset+length); try another point, see snapfs verify, or restore what is "
                "good with --salvage"
            )
        return data, spoilt

    def _serving(self) -> qemu.Server:
        if self._broken is not None:
            raise self._broken
        if self._server is None:
            try:
                self._directory.refuse_partial(self._point)
                files = self._directory.layer_of(self._point)
                self._server = qemu.Server(*files, alone=True, read_only=True)
            except SnapfsError as error:
                self._broken = error
                raise
        return self._server

    def _what_can_be_read(self, unit: Unit) -> tuple[bytearray, Extents]:
        """Piece by piece, each as good as can be proven."""
        data = bytearray(unit.length)
        unread = Extents()
        for start, stop in pieces(unit.start, unit.stop, PIECE_BYTES):
            try:
                piece = self._serving().client.read(start, stop - start)
            except (SnapfsError, OSError):
                unread.add(start, stop)
                self._forget()
            else:
                data[start - unit.start : stop - unit.start] = piece
        if not unread or unit.pieces is not None:
            for start, stop in [] if unit.digest == _UNPROVEN else damaged(unit, data):
                unread.add(start, stop)
        elif unit.digest != _UNPROVEN:
            unread.add(unit.start, unit.stop)  # nothing proves the rest
        return data, unread

    def _forget(self) -> None:
        """After an error: the next piece may be one that a new server can read."""
        server, self._server = self._server, None
        if server is not None:
            with suppress(SnapfsError, OSError):
                server.abandon()

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, kind: object, *_exception: object) -> None:
        if self._server is not None:
            if kind is None:
                self._server.finish()
            else:
                self._server.abandon()


def _write_sparsely(target: RawTarget, start: int, view: memoryview) -> None:
    for first, end in pieces(0, len(view), ZERO_BYTES):
        if view[first:end] != _ZEROS[: end - first]:
            target.write(start + first, view[first:end])
        else:
            target.zero(start + first, end - first)
