"""Taking points out: those that nothing stands on are deleted, others folded into the next.

The steps of folding, and their crash windows, are in chain.py.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterator

from attrs import evolve

from ..errors import NoRoom, PointDamaged
from . import qemu, records
from .chain import Chain, Directory, Fold, Point
from .extents import Extents
from .keys import Key, secret_of
from .layers import Layer
from .plan import pieces
from .qcow2 import Kind, Qcow2File
from .sums import UNIT_BYTES, Part, Unit, damaged, digest_of, dump, left_of, unit_of

METADATA_BYTES = 2 << 20  # what a fold takes besides: checksums, the manifest, odds and ends


def loose(chain: Chain, kept: Collection[str]) -> list[str]:
    """The points that none of `kept` stands on: whole chains, and the ends of others."""
    needed = {each.name for name in kept for each in chain.lineage(chain.find(name))}
    return [point.name for point in chain.points if point.name not in needed]


def delete(directory: Directory, names: Collection[str]) -> None:
    """Delete points that no other one stands on, whatever state their files are in.

    What is freed first are the files, if there is not even room for the manifest that says
    so: should we die then, the points are damaged ones that are deleted the next time.
    """
    if not names:
        return
    chain = directory.chain
    points = tuple(point for point in chain.points if point.name not in names)
    garbage = (*chain.garbage, *names)
    begun = chain.fold
    if begun is not None and begun.into in names:
        garbage = (*garbage, begun.old)
        begun = None
    without = evolve(chain, points=points, garbage=garbage, fold=begun)
    try:
        directory.save(without)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        for name in names:
            records.remove(directory.image_of(name))
        directory.save(without)
    directory.sweep()


def fold(directory: Directory, name: str) -> None:
    """Fold a point into the one on top of it; all others read as before, whatever happens."""
    chain = directory.chain
    child = chain.child(name)
    assert child is not None
    old = chain.find(name)
    for each in chain.lineage(child):  # which qemu-img opens, all of them
        directory.refuse_partial(each)
    _check_room(directory, old.name, child.name)
    _begin(directory, old, child)
    finish(directory)


def _check_room(directory: Directory, old: str, into: str) -> None:
    """Raises NoRoom if the file of `old` cannot take what that of `into` has."""
    there = _overwritable(directory.image_of(old), directory.key)
    with Layer([directory.image_of(into)], directory.key) as layer:
        new = Extents(span for span, zero in layer.spans() if not zero)
    tables = os.stat(directory.image_of(into)).st_blocks * 512 - new.total()
    needed = METADATA_BYTES + max(new.total() >> 12, tables)
    for start, stop in new:
        needed += sum(end - first for first, end in there.outside(start, stop))
    if _takes_encrypting(directory, old, into):
        needed += os.stat(directory.image_of(old)).st_blocks * 512
    room = os.statvfs(directory.path)
    free = room.f_bavail * room.f_frsize
    if needed > free:
        raise NoRoom(
            f"folding {old} into {into} takes up to {needed} bytes, and "
            f"{directory.path} has {free} free; keep fewer points of other chains, or make room"
        )


def _overwritable(path: str, key: Key | None) -> Extents:
    """Where a file can take other data without growing: not where it is compressed."""
    with Qcow2File(path) as file:
        if file.plain:
            return Extents(
                (each.start, each.stop) for each in file.extents() if each.kind is Kind.PLAIN
            )
    with Layer([path], key) as layer:
        return Extents(span for span, zero in layer.spans() if not zero)


def _takes_encrypting(directory: Directory, old: str, into: str) -> bool:
    """Would a fold put what is encrypted into a file that is not?"""
    return qemu.is_encrypted(directory.image_of(into)) and not qemu.is_encrypted(
        directory.image_of(old)
    )


def _begin(directory: Directory, old: Point, into: Point) -> None:
    """Work the checksums out, as long as `old` reads as it did, and put the fold on record."""
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
    sums = iter(_sums_of_parts(directory, old, into, cut))
    kept = [unit if unit is not None else next(sums) for unit in below]
    yield from sorted([*new, *kept])


def _sums_of_parts(
    directory: Directory, old: Point, into: Point, parts: list[Part]
) -> Iterator[Unit]:
    """What is left of units that newer ones cut; what is damaged of them must not be left."""
    if not any(part.unit.digest for part in parts):
        for part in parts:
            yield Unit(part.start, part.stop - part.start, None)
        return
    secret = secret_of(directory.key)
    encrypted = directory.is_encrypted(old) or directory.is_encrypted(into)
    with directory.layer(old) as layer:
        for part in parts:
            unit = part.unit
            if unit.digest is None:
                yield Unit(part.start, part.stop - part.start, None)
                continue
            data = memoryview(layer.content(unit.start, unit.stop))
            for first, stop in damaged(unit, data, secret):
                if first < part.stop and part.start < stop:
                    raise PointDamaged(f"point {old.name} is damaged at {first}; it was not folded")
            left = data[part.start - unit.start : part.stop - unit.start]
            yield unit_of(part.start, left, secret if encrypted else None)


def _size(path: str) -> int:
    with Qcow2File(path) as file:
        return file.size


def _commit(directory: Directory, point: Point, old: str, into: str) -> None:
    """Have `old` get what `into`, the file of a point, has."""
    below = [directory.image_of(each.name) for each in directory.chain.lineage(point)[-2::-1]]
    key = directory.key
    if _size(old) < point.size:
        qemu.resize([old, *below], point.size, key)
    files = [into, old]
    with Qcow2File(old) as one, Qcow2File(into) as other:
        if one.cluster_size > other.cluster_size:
            files += below  # what of a cluster is in neither comes from there
    # -d: leave `into` as it is, it must read the same until it is replaced.
    qemu.run_on(files, key, "commit", "-q", "-d")
    if _size(old) > point.size:
        qemu.resize([old, *below], point.size, key)


def _zero_leftovers(directory: Directory, point: Point, path: str) -> None:
    """Overwrite data where a point has zeros, which its file did not need to say.

    It is what a smaller image cut off, in the middle of a cluster, and a larger one shows again.
    """
    with Layer([path], directory.key) as layer:
        data = Extents(span for span, zero in layer.spans() if not zero)
    left = [
        each
        for unit in directory.units(point)
        if unit.digest is None
        for each in data.inside(unit.start, unit.stop)
    ]
    if left:
        with qemu.Server(path, alone=True, unordered=True, key=directory.key) as server:
            for start, stop in left:
                server.client.zero(start, stop - start)
            server.client.flush()


def _encrypt(directory: Directory, path: str) -> None:
    """Replace a file by an encrypted one that has the same, over the same."""
    key = directory.key
    assert key is not None
    new = f"{path}.new"
    records.remove(new)
    with Qcow2File(path) as file:
        size, cluster = file.size, file.cluster_size
        below = None if file.backing is None else os.path.join(directory.path, file.backing)
    qemu.create(new, size, below, alone=True, cluster=cluster, key=key)
    with (
        Layer([path]) as layer,
        qemu.Server(new, alone=True, unordered=True, key=key) as server,
    ):
        for (start, stop), zero in layer.spans():
            if zero:
                server.client.zero(start, stop - start)
                continue
            for first, end in pieces(start, stop, UNIT_BYTES):
                server.client.write(first, layer.content(first, end))
        server.client.flush()
    records.sync_file(new)
    os.rename(new, path)
    records.sync_directory(directory.path)


def finish(directory: Directory) -> None:
    """Do the rest of a fold that is on record; nothing if there is none.

    Raises what is in the way; all points read as they should meanwhile.
    """
    fold = directory.chain.fold
    if fold is None:
        return
    old, into = directory.image_of(fold.old), directory.image_of(fold.into)
    if os.path.exists(old):
        _check_room(directory, fold.old, fold.into)
        if _takes_encrypting(directory, fold.old, fold.into):
            _encrypt(directory, old)
        point = directory.chain.find(fold.into)
        _commit(directory, point, old, into)
        _zero_leftovers(directory, point, old)
        records.sync_file(old)
        os.rename(old, into)
    sums = directory.sums_of(fold.into)
    if os.path.exists(f"{sums}.fold"):
        os.rename(f"{sums}.fold", sums)
    records.sync_directory(directory.path)
    garbage = (*directory.chain.garbage, fold.old)
    directory.save(evolve(directory.chain, fold=None, garbage=garbage))
    directory.sweep()
