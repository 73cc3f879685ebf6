"""Folding an old point into the next one; the steps and their crash windows are in chain.py."""

from __future__ import annotations

import os
from collections.abc import Iterator

from attrs import evolve

from ..errors import PointDamaged
from . import qemu, records
from .chain import Directory, Fold, Point
from .sums import Part, Unit, digest_of, dump, left_of


def drop(directory: Directory, name: str) -> None:
    """Take a point out; all others read as before, whatever happens meanwhile."""
    chain = directory.chain
    child = chain.child(name)
    if child is None:
        points = tuple(point for point in chain.points if point.name != name)
        directory.save(evolve(chain, points=points, garbage=(*chain.garbage, name)))
        directory.sweep()
        return
    _begin(directory, chain.find(name), child)
    finish(directory)


def _begin(directory: Directory, old: Point, into: Point) -> None:
    """Work the checksums out, as long as `old` reads as it did, and put the fold on record."""
    directory.refuse_partial(old)
    directory.refuse_partial(into)
    merged = list(_merge(directory, old, into))
    sums = dump(merged)
    records.replace_durably(f"{directory.sums_of(into.name)}.fold", sums)
    folded = evolve(
        into,
        parent=old.parent,
        data_bytes=sum(unit.length for unit in merged if unit.digest is not None),
        zero_bytes=sum(unit.length for unit in merged if unit.digest is None),
        digest=digest_of(sums),
    )
    points = tuple(
        folded if point.name == into.name else point
        for point in directory.chain.points
        if point.name != old.name
    )
    directory.save(evolve(directory.chain, points=points, fold=Fold(old.name, into.name)))


def _merge(directory: Directory, old: Point, into: Point) -> Iterator[Unit]:
    """The units of both, those of `into` above, ascending."""
    new = directory.units(into)
    left = list(left_of(directory.units(old), new, into.size))
    below = [part.unit if part.whole else None for part in left]
    cut = [part for part in left if not part.whole]
    sums = iter(_sums_of_parts(directory.image_of(old.name), cut))
    kept = [unit if unit is not None else next(sums) for unit in below]
    yield from sorted([*new, *kept])


def _sums_of_parts(image: str, parts: list[Part]) -> Iterator[Unit]:
    """What is left of units that newer ones cut, checked as a whole before they are cut."""
    if not any(part.unit.digest for part in parts):
        for part in parts:
            yield Unit(part.start, part.stop - part.start, None)
        return
    with qemu.Server(image, read_only=True) as server:
        for part in parts:
            unit = part.unit
            digest = None
            if unit.digest is not None:
                data = memoryview(server.client.read(unit.start, unit.length))
                if digest_of(data) != unit.digest:
                    raise PointDamaged(f"{image} is damaged at {unit.start}; nothing was pruned")
                digest = digest_of(data[part.start - unit.start : part.stop - unit.start])
            yield Unit(part.start, part.stop - part.start, digest)


def finish(directory: Directory) -> None:
    """Do the rest of a fold that is on record; nothing if there is none."""
    fold = directory.chain.fold
    if fold is None:
        return
    old, into = directory.image_of(fold.old), directory.image_of(fold.into)
    size = directory.chain.find(fold.into).size
    if os.path.exists(old):
        if qemu.info(old)["virtual-size"] < size:
            qemu.resize(old, size)
        # -d: leave `into` as it is, it must read the same until it is replaced.
        qemu.run("commit", "-q", "-d", "-f", "qcow2", qemu.image_name(into))
        if qemu.info(old)["virtual-size"] > size:
            qemu.resize(old, size)
        records.sync_file(old)
        os.rename(old, into)
    sums = directory.sums_of(fold.into)
    if os.path.exists(f"{sums}.fold"):
        os.rename(f"{sums}.fold", sums)
    records.sync_directory(directory.path)
    garbage = (*directory.chain.garbage, fold.old)
    directory.save(evolve(directory.chain, fold=None, garbage=garbage))
    directory.sweep()
