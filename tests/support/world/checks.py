"""What must hold after each step, when all is quiet, and at the end."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import event
from trio.testing import wait_all_tasks_blocked

from snapfs.engine.dirty import DirtyBitmap
from snapfs.errors import AccessDenied
from tests.support.images import CLUSTER
from tests.support.naive import check_bitmaps, check_quiet, naive_content
from tests.support.world.operations import close
from tests.support.world.world import Wanted, World, bits_of


def check_intervals(world: World, bitmaps: Iterable[DirtyBitmap]) -> None:
    """Each cluster that differs from the beginning is in, and none that nobody touched."""
    now = bytes(world.image.data)
    for bitmap in bitmaps:
        if bitmap.parts is None:
            assert world.store_faulty, "inconsistent without a reason"
            event("a bitmap became inconsistent")
            continue
        interval = world.intervals[bitmap.id]
        found = bits_of(bitmap)
        for start in range(0, len(now), CLUSTER):
            if now[start : start + CLUSTER] != interval.base[start : start + CLUSTER]:
                assert start // CLUSTER in found, f"{bitmap.name} lacks {start // CLUSTER}"
        touched = set(interval.merged)
        for change in interval.changes:
            touched |= change.clusters
        assert found <= touched, f"{bitmap.name} has clusters that nobody changed"


def check(world: World) -> None:
    """Everything that can be seen without waiting."""
    check_bitmaps(world.engine)
    check_intervals(world, world.engine.tracker.bitmaps)
    assert [] == world.store.misuse() + world.image.misuse
    assert world.engine.unhealthy is None
    check_active(world)
    for wanted in world.wanted:
        layer = wanted.layer
        if not layer.live:
            continue
        world.observe(wanted)
        found = naive_content(world.image, world.engine.layers, layer)
        for cluster in wanted.access:
            start, length = layer.geometry.span(cluster, cluster + 1)
            assert wanted.content[start : start + length] == found[start : start + length], (
                f"{layer.name}: cluster {cluster} differs"
            )
    check_recovery(world)


def check_recovery(world: World) -> None:
    """Were the daemon killed now, the next mount would find the same in every snapshot."""
    check_intervals(world, world.store.bitmaps.recover())
    layers = world.store.recover()
    for layer in layers:
        for wanted in world.wanted:
            if wanted.layer.id != layer.id or not layer.live:
                continue
            found = naive_content(world.image, layers, layer)
            for cluster in world.accessible(layer):
                start, length = layer.geometry.span(cluster, cluster + 1)
                assert wanted.content[start : start + length] == found[start : start + length], (
                    f"{layer.name}: cluster {cluster} would differ after a crash"
                )


def check_active(world: World) -> None:
    size = len(world.active)
    spared = bytearray(max(size, world.image.size()))
    for change in world.changes:
        stop = len(spared) if change.size >= 0 else min(change.stop, len(spared))
        spared[change.start : stop] = b"\1" * (stop - change.start)
    if not any(change.size >= 0 for change in world.changes):
        assert size == world.image.size() == world.engine.size
    if not world.changes:
        assert world.active == world.image.data
        return
    for index in range(min(size, world.image.size())):
        if not spared[index]:
            assert world.active[index] == world.image.data[index]


async def settle(world: World) -> None:
    """Let everything end, and look at what is left."""
    world.mend()
    world.release()
    await wait_all_tasks_blocked()
    if world.running:  # those behind a cluster whose copy timed out and hangs no more
        await wait_all_tasks_blocked()
    assert 0 == world.running, "something waits for ever"
    check(world)
    check_quiet(world.engine, world.store)
    world.forget_dead()
    for image in (world.image, *world.store.temps):
        image.cold = False
    assert bytes(world.active) == bytes(await world.engine.read(0, len(world.active) + CLUSTER))
    for wanted in world.wanted:
        await read_all(world, wanted)
    for image in (world.image, *world.store.temps):
        image.cold = world.cold


async def read_all(world: World, wanted: Wanted) -> None:
    size = len(wanted.content)
    for cluster in range(wanted.clusters):
        start = cluster * CLUSTER
        length = min(CLUSTER, size - start)
        try:
            data = await world.engine.read_snapshot(wanted.layer, start, length)
        except AccessDenied:
            assert cluster not in wanted.access
        else:
            assert cluster in wanted.access
            assert wanted.content[start : start + length] == bytes(data)
    if len(wanted.access) == wanted.clusters:
        assert wanted.content == bytes(
            await world.engine.read_snapshot(wanted.layer, 0, size + CLUSTER)
        )


async def end(world: World) -> None:
    """Close and delete everything: nothing may remain."""
    await settle(world)
    for wanted in world.handles:
        await close(world, wanted)
    world.handles.clear()
    await world.engine.create_snapshot("last")  # and thereby save the list
    for layer in world.engine.snapshots:
        await world.engine.delete_snapshot(layer.name or "")
    for bitmap in list(world.engine.tracker.bitmaps):
        await world.engine.tracker.remove(bitmap.name)
    assert {} == world.store.bitmaps.files
    await wait_all_tasks_blocked()
    assert () == world.engine.layers
    assert {} == world.store.parts
    assert () == world.store.records
    assert 0 == world.store.space.used
    assert [] == world.store.misuse() + world.image.misuse
