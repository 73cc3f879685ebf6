"""`snapfs restore` and `snapfs verify`: the points of a directory, read and proven.

A point is rebuilt by replaying: the full one first, then each increment on top,
every piece read from the layer that holds it and compared with its checksum
before it is written.  So what is restored is proven, whatever the chain is.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from typing import Any

from attrs import field, frozen

from ..errors import BackupError, PointDamaged, SnapfsError, UsageError
from . import devices, qemu, records
from .chain import Directory, Point, opened
from .choosing import choose
from .copies import VERSION, Journal
from .copying import ZERO_BYTES, check_room
from .devices import DeviceTarget
from .plan import pieces
from .progress import Progress
from .source import refuse_served
from .sums import UNIT_BYTES, Unit, digest_of
from .targets import SECTOR, RawTarget

_ZEROS = bytes(ZERO_BYTES)
QCOW2_CLUSTER = 64 << 10  # what qemu-img creates; a write to a part fills up the rest


@frozen
class RestoreOptions:
    """What the command line says."""

    at: str | None = None
    force: bool = False
    progress_fd: int | None = None
    json: bool = False
    say: Callable[[str], None] = field(default=print)


def restore(path: str, dest: str, options: RestoreOptions) -> dict[str, Any]:
    """Rebuild a point at DEST, with its exact size; returns the summary."""
    qemu.find_program("qemu-nbd")
    with opened(path, change=False) as directory:
        point = choose(directory.chain, options.at)
        lineage = directory.chain.lineage(point)
        for each in lineage:
            directory.refuse_partial(each)
        _refuse_inside(directory, dest)
        layers = [(each, directory.units(each)) for each in lineage]
        journal = Journal(VERSION, f"restore {directory.chain.id} {point.name}", point.size, "raw")
        _check_dest(dest, point, layers, options)
        target = _open(dest, point.size, journal)
        try:
            _replay(directory, layers, target, options)
            target.finish()
        except BaseException:
            target.abandon()
            raise
    records.remove(Journal.path_of(dest))
    records.sync_directory(os.path.dirname(os.path.abspath(dest)))
    return {"point": point.name, "number": point.number, "created": point.created,
            "dest": dest, "size": point.size, "layers": len(layers)}  # fmt: skip


def _open(dest: str, size: int, journal: Journal) -> RawTarget:
    if devices.is_device(dest):
        return DeviceTarget(dest, size, records.unstructure(journal), whole_head=True)
    return RawTarget(dest, 0, lambda: journal.write(dest))


def _refuse_inside(directory: Directory, dest: str) -> None:
    where = os.path.realpath(os.path.dirname(os.path.abspath(dest)))
    if where == os.path.realpath(directory.path):
        raise UsageError(f"{dest} is in the backup directory; restore to another place")
    refuse_served(dest, "restore")


def _check_dest(
    dest: str, point: Point, layers: list[tuple[Point, list[Unit]]], options: RestoreOptions
) -> None:
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
    if status is not None and stat.S_ISBLK(status.st_mode):
        available = devices.size_of(dest)
        largest = max(each.size for each, _ in layers)
        if available < largest:
            raise BackupError(f"{dest} has {available} bytes; the restore takes {largest}")
    elif status is not None and not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{dest} is neither a regular file nor a block device")
    elif not options.force:
        data = sum(unit.length for _, units in layers for unit in units if unit.digest)
        room = os.statvfs(os.path.dirname(os.path.abspath(dest)))
        free = room.f_bavail * room.f_frsize + (status.st_blocks * 512 if status else 0)
        check_room(free, min(data, point.size), dest)


def _replay(
    directory: Directory,
    layers: list[tuple[Point, list[Unit]]],
    target: RawTarget,
    options: RestoreOptions,
) -> None:
    total = sum(unit.length for _, units in layers for unit in units)
    size = 0
    with Progress("restore", total, fd=options.progress_fd, json_lines=options.json) as progress:
        for point, units in layers:
            target.truncate(point.size)
            if point.size > size:
                target.zero(size, point.size - size)
            size = point.size
            with qemu.Server(directory.image_of(point.name), read_only=True) as server:
                for unit in units:
                    if unit.digest is None:
                        target.zero(unit.start, unit.length)
                    else:
                        data = server.client.read(unit.start, unit.length)
                        if digest_of(data) != unit.digest:
                            raise PointDamaged(
                                f"point {point.name} is damaged at offset {unit.start}, length "
                                f"{unit.length}; try another point, see snapfs verify"
                            )
                        _write_sparsely(target, unit.start, data)
                    progress.advance(unit.length)


def _write_sparsely(target: RawTarget, start: int, data: bytearray) -> None:
    with memoryview(data) as view:
        for first, end in pieces(0, len(view), ZERO_BYTES):
            if view[first:end] != _ZEROS[: end - first]:
                target.write(start + first, view[first:end])
            else:
                target.zero(start + first, end - first)


def verify(path: str, at: str | None, progress_fd: int | None, json: bool) -> dict[str, Any]:
    """Prove the checksums of all points, or of those that one stands on.

    Returns for each point whether it is good and what is wrong.  Raises nothing
    for damage: the caller looks at `damaged`.
    """
    qemu.find_program("qemu-nbd")
    found: list[dict[str, Any]] = []
    bad: set[str] = set()
    with opened(path, change=False) as directory:
        chain = directory.chain
        points = list(chain.points) if at is None else chain.lineage(choose(chain, at))
        total = sum(point.data_bytes + point.zero_bytes for point in points)
        with Progress("verify", total, fd=progress_fd, json_lines=json) as progress:
            for point in points:
                problems: list[str] = []
                try:
                    problems += _problems(directory, point, progress.advance)
                except (SnapfsError, OSError) as error:
                    problems.append(str(error))
                if problems:
                    bad.add(point.name)
                elif point.parent in bad:
                    problems.append(f"it stands on point {point.parent}, which is damaged")
                    bad.add(point.name)
                found.append(
                    {"point": point.name, "number": point.number, "ok": not problems,
                     "problems": problems[:20]}
                )  # fmt: skip
    return {"points": found, "damaged": len(bad)}


def _problems(directory: Directory, point: Point, advance: Callable[[int], None]) -> Iterator[str]:
    directory.refuse_partial(point)
    units = directory.units(point)
    path = directory.image_of(point.name)
    info = qemu.info(path)
    if info["virtual-size"] != -(-point.size // SECTOR) * SECTOR:
        yield f"the image has {info['virtual-size']} bytes, it had {point.size}"
        return
    folding = directory.chain.fold is not None and directory.chain.fold.into == point.name
    expected = None if point.parent is None else f"{point.parent}.qcow2"
    if not folding and info.get("backing-filename") != expected:
        yield f"the image stands on {info.get('backing-filename')}, it stood on {expected}"
        return
    extents = list(qemu.image_map(path))
    if not folding:
        yield from _strangers(extents, units)
    data = [(each["start"], each["start"] + each["length"]) for each in extents if not each["zero"]]
    with qemu.Server(path, read_only=True) as server:
        index = 0
        for unit in units:
            if unit.digest is not None:
                if digest_of(server.client.read(unit.start, unit.length)) != unit.digest:
                    yield f"offset {unit.start}, length {unit.length}: the checksum differs"
            else:
                while index < len(data) and data[index][1] <= unit.start:
                    index += 1
                yield from _nonzeros(server, unit, data, index)
            advance(unit.length)


def _nonzeros(
    server: qemu.Server, unit: Unit, data: list[tuple[int, int]], index: int
) -> Iterator[str]:
    """What is not zero of a range of zeros; only what may have data is read."""
    while index < len(data) and data[index][0] < unit.stop:
        first, stop = max(unit.start, data[index][0]), min(unit.stop, data[index][1])
        for start, end in pieces(first, stop, UNIT_BYTES):
            if server.client.read(start, end - start).count(0) != end - start:
                yield f"offset {start}, length {end - start}: not zeros any more"
        index += 1


def _strangers(extents: list[dict[str, Any]], units: list[Unit]) -> Iterator[str]:
    """Data in the file itself that no checksum covers, not even its qcow2 cluster."""
    index = 0
    for extent in extents:
        if extent["depth"] != 0 or extent["zero"] or not extent["data"]:
            continue
        position, stop = extent["start"], extent["start"] + extent["length"]
        while position < stop:
            while index < len(units) and _rounded_stop(units[index]) <= position:
                index += 1
            if index == len(units) or _rounded_start(units[index]) > position:
                yield f"offset {position}: there is data that was not backed up"
                break
            position = _rounded_stop(units[index])


def _rounded_start(unit: Unit) -> int:
    return unit.start // QCOW2_CLUSTER * QCOW2_CLUSTER


def _rounded_stop(unit: Unit) -> int:
    return -(-unit.stop // QCOW2_CLUSTER) * QCOW2_CLUSTER
