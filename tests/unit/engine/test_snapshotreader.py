"""Extents: looked up many at a time, true whatever is written meanwhile."""

from __future__ import annotations

import os

import trio

from snapfs.engine.bitmap import Bitmap
from snapfs.engine.geometry import Geometry
from snapfs.engine.snapshotreader import Extent, marked
from snapfs.storage.image import FileImage
from tests.support.fakes import Bench
from tests.support.images import CLUSTER

SIZE = 64 * CLUSTER


async def scattered(bench: Bench):
    """A snapshot of which every third cluster was copied."""
    layer = await bench.engine.create_snapshot("s")
    for cluster in range(0, 64, 3):
        await bench.engine.write(cluster * CLUSTER, b"x")
    return layer


async def test_a_page_of_many_runs_takes_one_trip_for_each_file(nursery):
    bench = Bench.make(nursery, b"1" * SIZE)
    layer = await scattered(bench)
    bench.image.calls.clear()
    found, following = await bench.engine.map_page(layer, 0, 1000)
    expected = [
        Extent(0, CLUSTER, True, True, "temp"),
        Extent(CLUSTER, 2 * CLUSTER, True, True, "active"),
    ]
    assert (expected, 43, None) == (found[:2], len(found), following)
    assert 1 == bench.image.trips == bench.store.temp(layer).trips


async def test_pages_are_maximal_and_go_on_where_they_stop(nursery):
    bench = Bench.make(nursery, b"1" * SIZE)
    layer = await scattered(bench)
    whole, _ = await bench.engine.map_page(layer, 0, 1000)
    pieces: list[Extent] = []
    offset: int | None = 0
    while offset is not None:
        found, offset = await bench.engine.map_page(layer, offset, 5)
        assert len(found) <= 5
        pieces += found
    assert whole == pieces


async def test_what_is_copied_during_a_look_is_looked_at_again(nursery):
    """The image may be overwritten with zeros before we see it; that is no hole of the snapshot."""
    bench = Bench.make(nursery, b"1" * SIZE)
    layer = await bench.engine.create_snapshot("s")
    stall = bench.image.stall("extents", times=1)
    result = []

    async def look() -> None:
        result.extend((await bench.engine.map_page(layer, 0, 1000))[0])

    async with trio.open_nursery() as inner:
        inner.start_soon(look)
        await stall.reached.wait()
        await bench.engine.punch(4 * CLUSTER, 4 * CLUSTER)  # does not wait for the look
        await bench.engine.discard(layer, 10 * CLUSTER, CLUSTER)
        stall.release()
    assert [
        Extent(0, 4 * CLUSTER, True, True, "active"),
        Extent(4 * CLUSTER, 4 * CLUSTER, True, True, "temp"),
        Extent(8 * CLUSTER, 2 * CLUSTER, True, True, "active"),
        Extent(10 * CLUSTER, CLUSTER, True, False, "none"),
        Extent(11 * CLUSTER, 53 * CLUSTER, True, True, "active"),
    ] == result


async def test_a_change_at_the_very_start_of_a_look_does_not_keep_it_from_ending(nursery):
    bench = Bench.make(nursery, b"1" * SIZE)
    layer = await bench.engine.create_snapshot("s")
    stall = bench.image.stall("extents", times=1)
    result = []

    async def look() -> None:
        result.extend((await bench.engine.map_page(layer, 0, 1000))[0])

    async with trio.open_nursery() as inner:
        inner.start_soon(look)
        await stall.reached.wait()
        await bench.engine.punch(0, CLUSTER)
        stall.release()
    assert [
        Extent(0, CLUSTER, True, True, "temp"),
        Extent(CLUSTER, 63 * CLUSTER, True, True, "active"),
    ] == result


def test_extents_are_cut_where_dirty_changes():
    geometry = Geometry(4 * CLUSTER + 7, CLUSTER)
    bits = Bitmap(5)
    whole = [Extent(0, 4 * CLUSTER + 7, True, True, "active")]
    assert whole == list(marked(whole, bits.slice(0, 5), geometry))
    bits.set(1, 2)
    bits.set(4, 5)
    assert [
        (0, CLUSTER, False),
        (CLUSTER, CLUSTER, True),
        (2 * CLUSTER, 2 * CLUSTER, False),
        (4 * CLUSTER, 7, True),
    ] == [
        (each.start, each.length, each.dirty) for each in marked(whole, bits.slice(0, 5), geometry)
    ]
    half = [Extent(100, CLUSTER, False, True, "temp")]
    assert [(100, CLUSTER - 100, False), (CLUSTER, 100, True)] == [
        (each.start, each.length, each.dirty) for each in marked(half, bits.slice(0, 5), geometry)
    ]


async def test_data_inside_ranges_of_a_file(tmp_path):
    path = tmp_path / "file"
    with open(path, "wb") as file:
        file.truncate(1 << 20)
        for offset in (0, 1 << 18, 1 << 19):
            os.pwrite(file.fileno(), b"x" * 8192, offset)
    image = FileImage(os.open(path, os.O_RDONLY), limiter=trio.CapacityLimiter(1))
    ranges = [(0, 4096), (8192, 1 << 18), ((1 << 18) + 4096, 1 << 20)]
    pairs = [(0, 4096), ((1 << 18) + 4096, (1 << 18) + 8192), (1 << 19, (1 << 19) + 8192)]
    assert (pairs, 1 << 20) == await image.data_inside(ranges, 10)
    assert (pairs[:1], 8192) == await image.data_inside(ranges, 1)
    assert (pairs[:2], (1 << 18) + 8192) == await image.data_inside(ranges, 2)
    assert ([], 8 << 20) == await image.data_inside([(4 << 20, 8 << 20)], 1)
    image.close()
