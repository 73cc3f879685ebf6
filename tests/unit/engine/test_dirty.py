"""Dirty bitmaps: every change is marked before it lands, whatever happens meanwhile."""

from __future__ import annotations

import errno

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from snapfs.engine.dirty import Selection, clusters_of, merged
from snapfs.engine.engine import Engine
from snapfs.engine.geometry import Geometry
from snapfs.errors import (
    AccessDenied,
    BitmapExists,
    BitmapNotFound,
    BitmapUnusable,
    InvalidName,
    InvalidRange,
    ReadOnly,
    UsageError,
)
from tests.support.fakes import Bench
from tests.support.images import CLUSTER

SIZE = 8 * CLUSTER
CONTENT = b"1" * SIZE


def dirty(engine: Engine, name: str = "b") -> list[int]:
    bits = engine.tracker.bitmaps.wanted(name, engine.geometry.clusters)
    return [cluster for cluster, bit in enumerate(bits) if bit]


@pytest.fixture
async def bench(nursery):
    bench = Bench.make(nursery, CONTENT)
    await bench.engine.tracker.add("b")
    return bench


async def test_every_kind_of_change_marks_its_clusters(bench):
    engine = bench.engine
    assert [] == dirty(engine)
    await engine.write(CLUSTER - 1, b"xy")
    assert [0, 1] == dirty(engine)
    await engine.punch(2 * CLUSTER, CLUSTER)
    await engine.zero(3 * CLUSTER + 5, 1)
    assert [0, 1, 2, 3] == dirty(engine)
    await engine.allocate(4 * CLUSTER, CLUSTER, keep_size=True)
    assert [0, 1, 2, 3] == dirty(engine)
    await engine.resize(7 * CLUSTER - 1)
    assert [0, 1, 2, 3, 6] == dirty(engine)
    await engine.resize(SIZE)
    assert [0, 1, 2, 3, 6, 7] == dirty(engine)
    await engine.allocate(SIZE, CLUSTER + 1, keep_size=False)
    assert [0, 1, 2, 3, 6, 7, 8, 9] == dirty(engine)


def began(engine: Engine, name: str) -> int | None:
    return engine.tracker.bitmaps.find(name).began_ns


async def test_a_bitmap_knows_the_snapshot_in_whose_instant_it_began(bench):
    engine = bench.engine
    added = began(engine, "b")
    one = await engine.create_snapshot("1", selection=Selection(next="c"))
    assert added < one.created_ns == began(engine, "c")
    two = await engine.create_snapshot("2", selection=Selection(bitmap="c", clear=True))
    assert two.created_ns == began(engine, "c") > one.created_ns
    await engine.tracker.merge("b", "c")
    assert two.created_ns == began(engine, "c")
    await engine.tracker.clear("c")
    assert two.created_ns < began(engine, "c")
    assert added == began(engine, "b")


async def test_a_write_beyond_the_end_marks_what_becomes_zeros_too(bench):
    await bench.engine.write(SIZE + 40 * CLUSTER, b"x")
    assert list(range(8, 49)) == dirty(bench.engine)


async def test_the_bit_is_set_before_the_data_lands(bench):
    stall = bench.image.stall("pwrite")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.engine.write, 0, b"x")
        await stall.reached.wait()
        assert [0] == dirty(bench.engine)
        stall.release()


async def test_a_write_in_flight_when_a_bitmap_is_cleared_is_in_one_of_them(bench):
    """Had its bit been cleared before it landed, the change would be in none."""
    engine = bench.engine
    stall = bench.image.stall("pwrite", times=1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.write, 0, b"x")
        await stall.reached.wait()
        nursery.start_soon(engine.tracker.clear, "b")
        await wait_all_tasks_blocked()
        assert [0] == dirty(engine)  # not cleared while the write is under way
        stall.release()
    assert [] == dirty(engine)
    await engine.write(CLUSTER, b"x")
    assert [1] == dirty(engine)


async def test_until_the_list_is_saved_the_old_bitmap_records_as_well(bench):
    engine, store = bench.engine, bench.store
    await engine.write(0, b"x")
    stall = store.stall("save")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.tracker.clear, "b")
        await stall.reached.wait()
        await engine.write(CLUSTER, b"y")
        (recovered,) = store.bitmaps.recover()  # the daemon dies now
        assert recovered.parts is not None
        assert [0, 1] == [c for c in range(8) if recovered.parts.bits.get(c)]
        assert [1] == dirty(engine)
        stall.release()
    (recovered,) = store.bitmaps.recover()
    assert recovered.parts is not None
    assert [1] == [c for c in range(8) if recovered.parts.bits.get(c)]
    assert 1 == len(store.bitmaps.files)


async def test_when_the_list_cannot_be_saved_nothing_changes(bench):
    engine, store = bench.engine, bench.store
    await engine.write(0, b"x")
    store.fail("save", errno=errno.ENOSPC)
    with pytest.raises(OSError, match="No space"):
        await engine.tracker.clear("b")
    with pytest.raises(OSError, match="No space"):
        await engine.tracker.add("c")
    with pytest.raises(OSError, match="No space"):
        await engine.tracker.remove("b")
    with pytest.raises(OSError, match="No space"):
        await engine.create_snapshot("s", selection=Selection("b", clear=True))
    assert [0] == dirty(engine)
    assert ["b"] == [bitmap.name for bitmap in engine.tracker.bitmaps]
    assert 1 == len(store.bitmaps.files)
    await engine.write(CLUSTER, b"x")
    assert [0, 1] == dirty(engine)
    assert [False] == [bitmap.busy for bitmap in engine.tracker.bitmaps]


async def test_a_bitmap_that_cannot_grow_is_inconsistent_and_the_write_goes_on(bench):
    engine, store = bench.engine, bench.store
    store.fail("grow", errno=errno.ENOSPC)
    await engine.write(100 * CLUSTER, b"x")
    assert b"x" == bytes(await engine.read(100 * CLUSTER, 1))
    for use in (
        lambda: engine.create_snapshot("s", selection=Selection("b")),
        lambda: engine.tracker.merge("b", "c"),
    ):
        with pytest.raises(BitmapUnusable, match=r"'b' is inconsistent.*a full copy is needed"):
            await use()
    assert () == engine.snapshots
    (recovered,) = store.bitmaps.recover()
    assert recovered.parts is None  # it lasts, although no list was saved since
    await engine.tracker.clear("b")
    await engine.write(100 * CLUSTER, b"x")
    assert [100] == dirty(engine)


async def test_two_writers_wait_for_one_growth(bench):
    stall = bench.store.stall("grow", times=1)
    async with trio.open_nursery() as nursery:
        for cluster in (20, 30):
            nursery.start_soon(bench.engine.write, cluster * CLUSTER, b"x")
        await stall.reached.wait()
        await wait_all_tasks_blocked()
        assert SIZE == bench.engine.size
        stall.release()
    assert list(range(8, 31)) == dirty(bench.engine)


async def test_a_snapshot_with_a_bitmap_gives_access_to_its_clusters_only(bench):
    engine, store = bench.engine, bench.store
    await engine.write(CLUSTER, b"2")
    layer = await engine.create_snapshot("s", selection=Selection("b", clear=True))
    assert ([], 1, "b") == (dirty(engine), layer.granted, layer.bitmap)
    for _ in range(2):
        assert b"2" == bytes(await engine.read_snapshot(layer, CLUSTER, CLUSTER))[:1]
        for cluster in (0, 2):
            with pytest.raises(AccessDenied):
                await engine.read_snapshot(layer, cluster * CLUSTER, 1)
        await engine.write(0, b"3" * SIZE)
    assert 1 == store.temp(layer).blocks() * 512 // CLUSTER
    assert list(range(8)) == dirty(engine)


async def test_next_begins_in_the_instant_of_the_snapshot(bench):
    engine = bench.engine
    await engine.write(0, b"2")
    stall = bench.store.stall("save", skip=1)  # the list with the snapshot's name
    async with trio.open_nursery() as nursery:

        async def create() -> None:
            await engine.create_snapshot("s", selection=Selection("b", next="c"))

        nursery.start_soon(create)
        await stall.reached.wait()
        await engine.write(CLUSTER, b"3")
        stall.release()
    assert ([0, 1], [1]) == (dirty(engine), dirty(engine, "c"))
    assert {0} == {c for c in range(8) if engine.find("s").access.get(c)}


async def test_extents_open_every_cluster_that_they_touch(bench):
    engine = bench.engine
    bits = clusters_of(engine.geometry, [(1, 1), (3 * CLUSTER - 1, 2), (5 * CLUSTER, 0)])
    layer = await engine.create_snapshot("s", selection=Selection(extents=bits))
    assert [0, 2, 3] == [c for c in range(8) if layer.access.get(c)]
    with pytest.raises(InvalidRange):
        clusters_of(engine.geometry, [(SIZE - 1, 2)])
    bits = clusters_of(engine.geometry, [(SIZE - 1, 1)])
    await engine.resize(CLUSTER)
    with pytest.raises(InvalidRange):
        await engine.create_snapshot("t", selection=Selection(extents=bits))
    await engine.resize(20 * CLUSTER)
    layer = await engine.create_snapshot("t", selection=Selection(extents=bits))
    assert (20, 1) == (layer.geometry.clusters, layer.accessible)


@pytest.mark.parametrize(
    ("selection", "error"),
    [
        (Selection("nothing"), BitmapUnusable),
        (Selection(clear=True), UsageError),
        (Selection("b", clear=True, next="c"), UsageError),
        (Selection(next="b"), BitmapExists),
        (Selection(next="a/b"), InvalidName),
        (Selection("b", clusters_of(Geometry(SIZE, CLUSTER), [])), UsageError),
        (Selection("nothing", clear=True), BitmapUnusable),
    ],
)
async def test_what_cannot_be_used_creates_nothing(bench, selection, error):
    with pytest.raises(error):
        await bench.engine.create_snapshot("s", selection=selection)
    assert ((), {}) == (bench.engine.layers, bench.store.parts)
    assert 1 == len(bench.store.bitmaps.files)


async def test_commands_on_bitmaps(bench):
    tracker, engine = bench.engine.tracker, bench.engine
    await tracker.add("c")
    await engine.write(0, b"x")
    await tracker.clear("c")
    await engine.write(CLUSTER, b"x")
    await tracker.clear("b")
    await tracker.merge("c", "b")
    assert ([1], [1]) == (dirty(engine), dirty(engine, "c"))
    for call in (tracker.clear, tracker.remove):
        with pytest.raises(BitmapNotFound):
            await call("nothing")
    for names in (("b", "nothing"), ("nothing", "b")):
        with pytest.raises(BitmapNotFound):
            await tracker.merge(*names)
    with pytest.raises(UsageError):
        await tracker.merge("b", "b")
    with pytest.raises(BitmapExists):
        await tracker.add("b")
    with pytest.raises(InvalidName):
        await tracker.add("..")
    await tracker.remove("b")
    assert ["c"] == [bitmap.name for bitmap in tracker.bitmaps]


async def test_growth_from_outside_is_dirty_or_makes_the_bitmap_inconsistent(bench):
    engine = bench.engine
    bench.store.bitmaps.files[1].bits.grow(12)
    bench.image._extend(SIZE + CLUSTER)
    engine.refresh()
    assert [8] == dirty(engine)
    bench.image._extend(SIZE + 10 * CLUSTER)
    engine.refresh()
    with pytest.raises(BitmapUnusable, match="grew from outside"):
        dirty(engine)


async def test_native_code_is_told_of_every_new_buffer(bench):
    bitmaps = bench.engine.tracker.bitmaps
    seen = []
    bitmaps.changed = lambda: seen.append(len(bitmaps.buffers()))
    await bench.engine.tracker.add("c")
    await bench.engine.write(50 * CLUSTER, b"x")
    await bench.engine.tracker.remove("b")
    assert [2, 2, 2, 1] == seen


async def test_a_read_only_mount_keeps_its_bitmaps_as_they_are(nursery):
    bench = Bench.make(nursery, CONTENT)
    bench.engine.tracker._read_only = True
    with pytest.raises(ReadOnly):
        await bench.engine.tracker.add("b")


def test_extents_are_merged_and_end_with_the_image():
    geometry = Geometry(3 * CLUSTER + 7, CLUSTER)
    bits = clusters_of(geometry, [(0, 1), (CLUSTER, 1), (3 * CLUSTER, 7)])
    assert [(0, 2 * CLUSTER), (3 * CLUSTER, 7)] == merged(bits, geometry)
    assert [] == merged(clusters_of(geometry, []), geometry)
