"""What is asked of snapshots, of bitmaps and of `active` beside its changes."""

from __future__ import annotations

import errno
import os
from itertools import pairwise

from hypothesis import event

from snapfs.engine.dirty import Selection, clusters_of
from snapfs.engine.layer import Layer
from snapfs.errors import (
    AccessDenied,
    BitmapNotFound,
    BitmapUnusable,
    InvalidRange,
    SnapshotExists,
    SnapshotNotFound,
)
from tests.support.images import CLUSTER
from tests.support.naive import covered_clusters, naive_content, touched_clusters
from tests.support.world.steps import Create, Delete, Discard, Map, Read, Rename, Seek, Track
from tests.support.world.world import Change, Wanted, World, bits_of


async def read(world: World, step: Read) -> None:
    wanted = world.pick(step.which - 1) if step.which else None
    if wanted is None:
        await read_active(world, step)
        return
    layer = wanted.layer
    world.engine.open_snapshot(layer)
    try:
        content = wanted.content[step.offset : step.offset + step.length]
        clusters = touched_clusters(step.offset, len(content))
        try:
            data = bytes(
                await world.engine.read_snapshot(
                    layer, step.offset, step.length, partial=step.partial
                )
            )
        except AccessDenied:
            first = {min(clusters)} if step.partial else clusters
            assert first - world.accessible(layer)
            event("a read was denied")
        except OSError:
            assert world.read_faulty
        else:
            assert content[: len(data)] == data
            if step.partial and len(data) < len(content):
                assert data and len(data) + step.offset in {
                    cluster * CLUSTER for cluster in clusters - world.accessible(layer)
                }
            else:
                assert len(content) == len(data)
            assert touched_clusters(step.offset, len(data)) <= world.accessible(layer)
    finally:
        await world.engine.close_snapshot(layer)


async def read_active(world: World, step: Read) -> None:
    beside = list(world.changes)
    world.creations.append(beside)  # collects what begins meanwhile
    before = bytes(world.active)
    try:
        data = bytes(await world.engine.read(step.offset, step.length))
    except OSError:
        assert world.read_faulty
        return
    finally:
        world.forget(beside)
    if not any(change.size >= 0 for change in beside):
        assert min(step.length, max(0, len(before) - step.offset)) == len(data)
    spared = set()
    for change in beside:
        spared |= set(range(change.start, change.stop))
    for index, byte in enumerate(data):
        position = step.offset + index
        if position not in spared and position < len(before):
            assert before[position] == byte


async def create(world: World, step: Create) -> None:
    world.names += 1
    name = f"s{world.names}"
    beside = list(world.changes)
    base = bytes(world.active)
    world.creations.append(beside)
    world.tick += 1
    selection = selection_of(world, step, f"n{world.names}")
    try:
        layer = await world.engine.create_snapshot(name, policy=step.policy, selection=selection)
    except OSError:
        assert world.store_faulty
        return
    except (BitmapUnusable, BitmapNotFound, InvalidRange):
        event("a bitmap was unusable")
        return
    finally:
        world.forget(beside)
    content = bytearray(naive_content(world.image, world.engine.layers, layer))
    size = layer.geometry.size
    assert size == len(content)
    sizes = {len(base)} | {change.size for change in beside if change.size >= 0}
    if world.image_faulty:
        sizes |= {world.image.size()}
    assert size in sizes
    expected = bytearray(base[:size].ljust(size, b"\0"))
    access = world.accessible(layer)
    absent: list[Change] = []
    present: list[Change] = []
    for change in beside:
        first, stop = change.start, min(change.stop, size)
        known = [index for index in range(first, stop) if index // CLUSTER in access]
        found = bytes(content[index] for index in known)
        old = bytes(change.old[index - first] for index in known)
        new = bytes(change.new[index - first] for index in known)
        if change.failed and world.image_faulty:
            expected[first:stop] = content[first:stop]  # it may have landed in part
            continue
        assert found == old or (found == new and not change.failed), "half a change"
        if old != new:
            (absent if found == old else present).append(change)
        expected[first:stop] = content[first:stop]
    for later in present:
        for earlier in absent:
            assert earlier.ended is None or later.begun < earlier.ended, "effect before cause"
    for cluster in access:
        start, length = layer.geometry.span(cluster, cluster + 1)
        assert expected[start : start + length] == content[start : start + length]
    wanted = Wanted(layer, name, bytes(content), granted(world, layer, selection))
    world.wanted.append(wanted)
    world.observe(wanted)


def selection_of(world: World, step: Create, following: str) -> Selection:
    names = [bitmap.name for bitmap in world.engine.tracker.bitmaps]
    name = names[step.which % len(names)] if names and step.access == "bitmap" else None
    extents = None
    if step.access == "extents":
        clusters = [each for each in step.clusters if each < world.engine.geometry.clusters]
        ranges = [world.engine.geometry.span(each, each + 1) for each in clusters]
        extents = clusters_of(world.engine.geometry, ranges)
    return Selection(
        name,
        extents,
        clear=step.after == "clear" and name is not None,
        next=following if step.after == "next" else None,
    )


def granted(world: World, layer: Layer, selection: Selection) -> set[int]:
    """The clusters that a new snapshot must give access to, of the instant that it has."""
    moment, dirty = world.moments[layer.id]
    clusters = set(range(layer.geometry.clusters))
    assert len(moment) == layer.geometry.size
    assert (selection.bitmap, layer.geometry.clusters) == (layer.bitmap, len(clusters))
    if selection.bitmap is not None:
        clusters &= dirty[selection.bitmap]
        event("a snapshot of a bitmap")
    elif selection.extents is not None:
        clusters &= {number for number, bit in enumerate(selection.extents) if bit}
    assert len(clusters) == layer.granted
    return clusters


async def track(world: World, step: Track) -> None:
    tracker = world.engine.tracker
    names = [bitmap.name for bitmap in tracker.bitmaps] or ["none"]
    name, other = names[step.which % len(names)], names[step.to % len(names)]
    world.names += 1
    try:
        match step.kind:
            case "add" if len(names) < 4:
                await tracker.add(f"b{world.names}")
            case "clear":
                await tracker.clear(name)
            case "remove":
                await tracker.remove(name)
            case "merge" if name != other:
                target = await tracker.merge(name, other)
                source = tracker.bitmaps.find(name)
                world.intervals[target.id].merged |= bits_of(source)
    except OSError:
        assert world.store_faulty
    except (BitmapNotFound, BitmapUnusable):
        event("a bitmap was unusable")


async def delete(world: World, step: Delete) -> None:
    wanted = world.pick(step.which)
    if wanted is None or wanted.name is None:
        return
    wanted.doomed = True
    alone = wanted.enter()
    try:
        await world.engine.delete_snapshot(wanted.name)
    except SnapshotNotFound:
        assert not alone()
    except OSError:
        assert world.store_faulty
        if wanted.layer.name is not None:
            wanted.doomed = False
    finally:
        wanted.busy -= 1
    if wanted.layer.name is not None and wanted.busy == 0:
        wanted.doomed = False
        wanted.name = wanted.layer.name
    world.forget_dead()


async def rename(world: World, step: Rename) -> None:
    wanted, other = world.pick(step.which), world.pick(step.to)
    if wanted is None or other is None or wanted.name is None or other.name is None:
        return
    world.names += 1
    name = other.name if step.to % 2 else f"r{world.names}"
    alone, alone_other = wanted.enter(), other.enter()
    try:
        await world.engine.rename_snapshot(wanted.name, name)
    except SnapshotExists:
        assert other is not wanted
    except SnapshotNotFound:
        assert not alone()
    except OSError:
        assert world.store_faulty
    else:
        if other is not wanted and step.to % 2:
            assert not alone_other() or other.doomed  # it had gone, or got another name
    finally:
        wanted.busy -= 1
        other.busy -= 1
    wanted.name = wanted.layer.name


async def close(world: World, wanted: Wanted) -> None:
    try:
        await world.engine.close_snapshot(wanted.layer)
    except OSError:
        assert world.store_faulty
    world.forget_dead()


async def discard(world: World, step: Discard) -> None:
    wanted = world.pick(step.which)
    if wanted is None:
        return
    layer = wanted.layer
    world.engine.open_snapshot(layer)
    world.observe(wanted)
    gone = covered_clusters(len(wanted.content), step.offset, step.length) & wanted.access
    wanted.discarded |= gone
    wanted.access -= gone
    try:
        await world.engine.discard(layer, step.offset, step.length)
    finally:
        await world.engine.close_snapshot(layer)


async def list_extents(world: World, step: Map) -> None:
    wanted = world.pick(step.which - 1) if step.which else None
    beside = list(world.changes)
    world.creations.append(beside)
    size = len(world.active) if wanted is None else len(wanted.content)
    content = bytes(world.active) if wanted is None else wanted.content
    access = set() if wanted is None else world.accessible(wanted.layer)
    layer = None if wanted is None else wanted.layer
    if layer is not None:
        world.engine.open_snapshot(layer)
    try:
        extents = [extent async for extent in world.engine.map(layer, step.offset, step.length)]
    except OSError:
        assert world.read_faulty
        return
    finally:
        world.forget(beside)
        if layer is not None:
            await world.engine.close_snapshot(layer)
    if wanted is None and beside:
        return
    position = step.offset
    for extent in extents:
        assert position == extent.start and extent.length > 0
        position = extent.stop
        clusters = touched_clusters(extent.start, extent.length)
        if not extent.data:
            assert not any(content[extent.start : extent.stop])
        if layer is not None:
            if extent.accessible:
                assert clusters <= access
            else:
                assert not clusters & world.accessible(layer)
                assert extent.data and extent.source == "none"
    assert position == max(step.offset, min(size, step.offset + step.length))
    kinds = [(extent.data, extent.accessible, extent.source) for extent in extents]
    assert all(first != second for first, second in pairwise(kinds))


async def seek(world: World, step: Seek) -> None:
    wanted = world.pick(step.which - 1) if step.which else None
    beside = list(world.changes)
    world.creations.append(beside)
    content = bytes(world.active) if wanted is None else wanted.content
    layer = None if wanted is None else wanted.layer
    engine = world.engine
    found: int | None
    if layer is not None:
        engine.open_snapshot(layer)
    try:
        whence = os.SEEK_DATA if step.data else os.SEEK_HOLE
        if layer is None:
            found = await engine.seek(step.offset, whence)
        else:
            found = await engine.seek_snapshot(layer, step.offset, whence)
    except OSError as error:
        if error.errno != errno.ENXIO:
            assert world.read_faulty
            return
        found = None
    finally:
        world.forget(beside)
        now = set() if layer is None else world.accessible(layer)
        if layer is not None:
            await engine.close_snapshot(layer)  # takes access away if it was deleted
    if wanted is None and beside:
        return
    size = len(content)
    if step.offset >= size:
        assert found is None
    elif step.data:
        skipped = content[step.offset : size if found is None else found]
        assert not any(skipped)  # inaccessible is data: never skipped ...
        if layer is not None:
            clusters = touched_clusters(step.offset, len(skipped))
            assert clusters <= now | wanted.lost | wanted.discarded  # type: ignore[union-attr]
    else:
        assert found is not None and step.offset <= found <= size
        if found < size:
            assert 0 == content[found]
