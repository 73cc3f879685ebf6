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
from typing import Any, Literal

from attrs import field, frozen

from ..errors import BackupError, KeyRefused, PointDamaged, SnapfsError, UsageError
from . import devices, qemu, received, records
from .chain import Directory, Point, opened
from .choosing import choose
from .copies import VERSION, Journal
from .copying import check_room, split_zeros
from .devices import DeviceTarget
from .extents import Extents, Range
from .keys import secret_of
from .layers import Layer, Located, in_turn, scratch
from .plan import pieces
from .progress import Progress
from .source import refuse_served
from .sums import PIECE_BYTES, UNIT_BYTES, Unit, damaged
from .targets import RawTarget
from .verified import note_damage

_UNPROVEN = ""  # the digest of what is there and has none


@frozen
class RestoreOptions:
    """What the command line says."""

    at: str | None = None
    key_file: str | None = None
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
    with opened(path, change=False, wait=options.wait, key_file=options.key_file) as directory:
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
        taken: list[Point] = []
        for point, needed in self:
            found = sum(
                stop - start
                for unit, parts in needed
                for start, stop in parts
                if unit.digest is not None
            )
            if found and not self._salvage:
                self._directory.refuse_partial(point)
            if found:
                taken.append(point)
            data += found
        self._directory.refuse_key(taken)
        return data

    def _units(self, point: Point, seen: Extents, size: int) -> list[Unit]:
        try:
            return self._directory.units(point)
        except (BackupError, PointDamaged, OSError):
            if not self._salvage:
                raise
        try:
            with self._directory.layer(point) as layer:
                found = [span for span, _ in layer.spans()]
        except (BackupError, OSError):
            for start, stop in seen.outside(0, size):
                self.stale.add(start, stop)
            return []
        return [
            Unit(first, end - first, _UNPROVEN)
            for start, stop in found
            for first, end in pieces(start, min(point.size, stop), UNIT_BYTES)
        ]


_Task = tuple[Unit, list[Range], Located | None]  # None: it cannot be read as a whole


def _replay(
    directory: Directory, layers: _Layers, target: RawTarget, options: RestoreOptions
) -> Extents:
    """Write everything; returns what is not the point's."""
    size = layers.size
    bad = Extents()
    target.truncate(size)
    with Progress("restore", size, options) as progress:
        for point, needed in layers:
            for unit, parts in needed:
                if unit.digest is None:
                    for start, stop in parts:
                        target.zero(start, stop - start)
                        progress.advance(stop - start)
            with _Reader(directory, point, target, salvage=options.salvage) as reader:
                for length, spoilt in reader.restore(needed):
                    progress.advance(length)
                    for start, stop in spoilt:
                        bad.add(start, stop)
        for start, stop in layers.rest:
            target.zero(start, stop - start)
            progress.advance(stop - start)
    for start, stop in layers.stale:
        bad.add(start, stop)
    return bad


class _Reader:
    """The data of one layer, which is opened when something is read.  A context manager."""

    def __init__(
        self, directory: Directory, point: Point, target: RawTarget, *, salvage: bool
    ) -> None:
        self._directory = directory
        self._point = point
        self._target = target
        self._salvage = salvage
        self._secret = secret_of(directory.key)
        self._layer: Layer | None = None
        self._broken: SnapfsError | OSError | None = None

    def restore(self, needed: list[Needed]) -> Iterator[tuple[int, Extents]]:
        """Write what is data; yields of each unit how much that was and what is not the point's.

        Raises PointDamaged if something is damaged, unless we salvage.
        """
        tasks = (self._task(*each) for each in needed if each[0].digest is not None)
        if self._salvage:  # what is damaged is read with one server after the other
            return map(self._restore_unit, tasks)
        return in_turn(self._restore_unit, ((task, task[0].length) for task in tasks))

    def _task(self, unit: Unit, parts: list[Range]) -> _Task:
        try:
            return unit, parts, self._opened().locate(unit.start, unit.stop)
        except KeyRefused:
            raise
        except (SnapfsError, OSError) as error:
            if not self._salvage:
                raise self._unreadable(unit, error) from None
            return unit, parts, None

    def _unreadable(self, unit: Unit, error: SnapfsError | OSError) -> PointDamaged:
        return PointDamaged(f"point {self._point.name} cannot be read at {unit.start}: {error}")

    def _restore_unit(self, task: _Task) -> tuple[int, Extents]:
        """For any thread, unless we salvage."""
        unit, parts, located = task
        view = scratch(unit.length)
        spoilt = self._read(unit, parts, located, view)
        if not spoilt and unit.digest != _UNPROVEN:
            for start, stop in parts:
                _write_sparsely(self._target, start, view[start - unit.start : stop - unit.start])
            return sum(stop - start for start, stop in parts), spoilt
        bad = Extents(parts if unit.digest == _UNPROVEN else [])
        for start, stop in parts:
            for first, end in spoilt.outside(start, stop):
                _write_sparsely(self._target, first, view[first - unit.start : end - unit.start])
            for first, end in spoilt.inside(start, stop):
                self._target.zero(first, end - first)
                bad.add(first, end)
        return sum(stop - start for start, stop in parts), bad

    def _read(
        self, unit: Unit, parts: list[Range], located: Located | None, view: memoryview
    ) -> Extents:
        """Read a unit; returns what of it is damaged, and raises PointDamaged if that is needed.

        With `salvage` it raises nothing.
        """
        try:
            if located is None:
                return self._read_what_is_left(unit, view)
            self._opened().read(located, view)
            spoilt = Extents([] if unit.digest == _UNPROVEN else damaged(unit, view, self._secret))
        except KeyRefused:
            raise
        except (SnapfsError, OSError) as error:
            if not self._salvage:
                raise self._unreadable(unit, error) from None
            spoilt = self._read_what_is_left(unit, view)
        if not spoilt:
            return spoilt
        needed = Extents(each for part in parts for each in spoilt.inside(*part))
        if needed and not self._salvage:
            note_damage(self._directory, self._point)
            raise PointDamaged(
                f"point {self._point.name} is damaged at "
                + ", ".join(f"{start}+{stop - start}" for start, stop in list(needed)[:10])
                + " (offset+length); try another point, see snapfs verify, or restore what is "
                "good with --salvage"
            )
        return spoilt

    def _opened(self) -> Layer:
        if self._broken is not None:
            raise self._broken
        if self._layer is None:
            try:
                self._directory.refuse_partial(self._point)
                self._layer = self._directory.layer(self._point)
            except (SnapfsError, OSError) as error:
                self._broken = error
                raise
        return self._layer

    def _read_what_is_left(self, unit: Unit, view: memoryview) -> Extents:
        """Piece by piece, each as good as can be proven; returns what is not."""
        view[:] = bytes(len(view))
        unread = Extents()
        for start, stop in pieces(unit.start, unit.stop, PIECE_BYTES):
            piece = view[start - unit.start : stop - unit.start]
            try:
                layer = self._opened()
                layer.read(layer.locate(start, stop), piece)
            except KeyRefused:
                raise
            except (SnapfsError, OSError):
                piece[:] = bytes(len(piece))
                unread.add(start, stop)
        if not unread or unit.pieces is not None:
            for start, stop in (
                [] if unit.digest == _UNPROVEN else damaged(unit, view, self._secret)
            ):
                unread.add(start, stop)
        elif unit.digest != _UNPROVEN:
            unread.add(unit.start, unit.stop)  # nothing proves the rest
        return unread

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_exception: object) -> Literal[False]:
        if self._layer is not None:
            self._layer.close()
        return False


def _write_sparsely(target: RawTarget, start: int, view: memoryview) -> None:
    for (first, end), zero in split_zeros(view):
        if zero:
            target.zero(start + first, end - first)
        else:
            target.write(start + first, view[first:end])
