"""`snapfs verify`: every point of a directory, compared with its checksums.

A point is good if all that it needs of the points below is; what a later point replaced is
its own affair no more.  So for each chain there are two sets of bytes while it is read from
its full point up: what is damaged, and what has data, as the newest point so far shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from attrs import define, field, frozen

from ..errors import KeyRefused, SnapfsError
from . import qemu
from .chain import Directory, Point, opened
from .choosing import choose
from .extents import Extents, Range
from .keys import secret_of
from .layers import Layer, Located, in_turn, scratch
from .plan import pieces
from .progress import Progress
from .sums import UNIT_BYTES, Unit, damaged
from .targets import QCOW2_CLUSTER, SECTOR
from .verified import note

_SHOWN = 20  # problems of one point


@define
class _Shown:
    """What a point shows: `bad` is not what it was, `data` is what is not zeros by right."""

    bad: Extents = field(factory=Extents)
    data: Extents = field(factory=Extents)


@define
class _Findings:
    """Of one point: what is wrong, in words and as ranges."""

    problems: list[str] = field(factory=list)
    bad: Extents = field(factory=Extents)

    def add(self, start: int, stop: int, what: str) -> None:
        self.bad.add(start, stop)
        self.problems.append(f"offset {start}, length {stop - start}: {what}")


@frozen
class VerifyOptions:
    """What the command line says."""

    at: str | None = None
    key_file: str | None = None
    wait: float = 0.0
    progress_fd: int | None = None
    json: bool = False
    quiet: bool = False


def verify(path: str, options: VerifyOptions) -> dict[str, Any]:
    """Prove the checksums of all points, or of those that one stands on.

    Returns for each point whether it is good and what is wrong, and from which one on all
    are good.  Raises nothing for damage: the caller looks at `damaged`.
    """
    qemu.find_program("qemu-nbd")
    rows: list[dict[str, Any]] = []
    goods: dict[Point, bool] = {}
    with opened(path, change=False, wait=options.wait, key_file=options.key_file) as directory:
        chain = directory.chain
        points = (
            list(chain.points) if options.at is None else chain.lineage(choose(chain, options.at))
        )
        directory.refuse_key(reversed(points))
        total = sum(point.data_bytes + point.zero_bytes for point in points)
        shown: dict[str | None, _Shown] = {}
        try:
            with Progress("verify", total, options) as progress:
                for point in points:
                    below = shown.pop(point.parent, _Shown()) if point.parent else _Shown()
                    problems = _look(directory, point, below, progress.advance)
                    shown[point.name] = below
                    goods[point] = not problems
                    rows.append(
                        {"point": point.name, "number": point.number, "ok": not problems,
                         "problems": problems[:_SHOWN]}
                    )  # fmt: skip
        finally:
            note(directory, goods)
    return {
        "points": rows,
        "damaged": sum(not row["ok"] for row in rows),
        "good_from": _good_from(rows),
    }


def _good_from(rows: list[dict[str, Any]]) -> str | None:
    """The first point from which on all are good."""
    found = None
    for row in reversed(rows):
        if not row["ok"]:
            break
        found = row["point"]
    return found


def _look(
    directory: Directory, point: Point, shown: _Shown, advance: Callable[[int], None]
) -> list[str]:
    """What is wrong with a point; `shown` is of the point below, and then of this one."""
    findings = _Findings()
    shown.bad.cut(point.size)
    shown.data.cut(point.size)
    try:
        units = directory.units(point)
    except (SnapfsError, OSError) as error:
        shown.bad.add(0, point.size)  # what of it is newer than the point below?
        return [str(error)]
    try:
        _examine(directory, point, units, shown, findings, advance)
    except KeyRefused:
        raise  # which is no damage
    except (SnapfsError, OSError) as error:
        findings.problems.append(str(error))
        findings.bad = Extents((unit.start, unit.stop) for unit in units if unit.digest)
    inherited = list(shown.bad)
    for unit in units:
        shown.bad.remove(unit.start, unit.stop)
        if unit.digest is None:
            shown.data.remove(unit.start, unit.stop)
        else:
            shown.data.add(unit.start, unit.stop)
    if inherited and shown.bad:
        first, stop = next(iter(shown.bad))
        findings.problems.append(
            f"it stands on point {point.parent}, which is damaged at offset {first}, "
            f"length {stop - first}"
        )
    for start, stop in findings.bad:
        shown.bad.add(start, stop)
    return findings.problems


def _examine(
    directory: Directory,
    point: Point,
    units: list[Unit],
    shown: _Shown,
    findings: _Findings,
    advance: Callable[[int], None],
) -> None:
    directory.refuse_partial(point)
    with directory.layer(point) as layer:
        if layer.size != -(-point.size // SECTOR) * SECTOR:
            findings.add(0, point.size, f"the image has {layer.size} bytes, it had {point.size}")
            return
        folding = directory.chain.fold is not None and directory.chain.fold.into == point.name
        expected = None if point.parent is None else f"{point.parent}.qcow2"
        if not folding and layer.backing != expected:
            findings.add(
                0, point.size, f"the image stands on {layer.backing}, it stood on {expected}"
            )
            return
        spans = list(layer.spans())
        data = Extents(span for span, zero in spans if not zero)
        if not folding:
            _find_strangers(data, units, findings)
        _prove(layer, units, secret_of(directory.key), findings, advance)
        present = Extents(span for span, _ in spans)
        for unit in units:
            if unit.digest is None:
                for start, stop in _nonzeros(layer, unit, data, present, shown.data):
                    findings.add(start, stop, "not zeros any more")
                advance(unit.length)


def _prove(
    layer: Layer,
    units: list[Unit],
    secret: bytes | None,
    findings: _Findings,
    advance: Callable[[int], None],
) -> None:
    """Compare all data with its checksums."""

    def look(task: tuple[Unit, Located]) -> tuple[Unit, list[Range]]:
        unit, located = task
        view = scratch(unit.length)
        layer.read(located, view)
        return unit, damaged(unit, view, secret)

    tasks = (
        ((unit, layer.locate(unit.start, unit.stop)), unit.length)
        for unit in units
        if unit.digest is not None
    )
    for unit, found in in_turn(look, tasks):
        for start, stop in found:
            findings.add(start, stop, "the checksum differs")
        advance(unit.length)


def _nonzeros(
    layer: Layer, unit: Unit, data: Extents, present: Extents, below: Extents
) -> Iterator[Range]:
    """What is not zero of a range of zeros; only what may have data is read."""
    for first, stop in data.inside(unit.start, unit.stop):
        for start, end in pieces(first, stop, UNIT_BYTES):
            if layer.content(start, end).count(0) != end - start:
                yield start, end
    for first, stop in present.outside(unit.start, unit.stop):
        yield from below.inside(first, stop)  # which shows through


def _find_strangers(data: Extents, units: list[Unit], findings: _Findings) -> None:
    """Data in the file itself that no checksum covers, not even its qcow2 cluster."""
    covered = Extents(
        (
            unit.start // QCOW2_CLUSTER * QCOW2_CLUSTER,
            -(-unit.stop // QCOW2_CLUSTER) * QCOW2_CLUSTER,
        )
        for unit in units
    )
    for each in data:
        for start, stop in covered.outside(*each):
            findings.add(start, stop, "there is data that was not backed up")
