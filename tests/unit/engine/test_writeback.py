"""What a write-back that failed takes, and from whom."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import trio
import trio.testing
from attrs import evolve

from snapfs.engine.durability import GroupCommit
from snapfs.engine.geometry import Geometry
from snapfs.engine.layer import LayerParts
from snapfs.engine.losslist import MEND_SECONDS
from snapfs.errors import BitmapUnusable, SnapshotLost, StateError
from tests.support.fakes import Bench, MemoryStore, pattern
from tests.support.images import CLUSTER, MemoryImage, os_error
from tests.support.naive import check_bitmaps

OLD = pattern(1, 6 * CLUSTER)
EIO = errno.EIO


def fail(image: MemoryImage, number: int = EIO) -> None:
    """What was written to it is gone; who asks next is told."""
    image.not_written_back = os_error(number)


def states(bench: Bench) -> dict[str | None, str]:
    return {layer.name: layer.state for layer in bench.engine.snapshots}


async def test_all_are_lost_that_find_something_in_the_temp_image_and_nobody_else(nursery):
    bench = Bench.make(nursery, OLD)
    engine = bench.engine
    for number, name in enumerate("abcd"):
        await engine.create_snapshot(name)
        await engine.write(number * CLUSTER, b"x" * CLUSTER)
    # a has cluster 0, b 1, c 2, d 3; c is found by a, b and c, and b by a and b.
    await engine.discard(engine.find("a"), 2 * CLUSTER, CLUSTER)
    fail(bench.store.temp(engine.find("c")), errno.ENOSPC)
    engine.check_storage()
    assert {"a": "ok", "b": "lost", "c": "lost", "d": "ok"} == states(bench)
    assert errno.ENOSPC == engine.find("b").errno
    check_bitmaps(engine)
    await trio.testing.wait_all_tasks_blocked()
    assert ["ok", "lost", "lost", "ok"] == [each.state for each in bench.store.records]
    assert OLD[:CLUSTER] == bytes(await engine.read_snapshot(engine.find("a"), 0, CLUSTER))
    for name in "bc":
        with pytest.raises(SnapshotLost):
            engine.open_snapshot(engine.find(name))
    # What d needs is copied as before.
    await engine.write(4 * CLUSTER, b"y" * CLUSTER)
    data = await engine.read_snapshot(engine.find("d"), 4 * CLUSTER, CLUSTER)
    assert OLD[4 * CLUSTER : 5 * CLUSTER] == bytes(data)


async def test_the_record_beside_the_bitmaps_survives_alone(nursery):
    """The daemon dies before the list is saved."""
    bench = Bench.make(nursery, OLD)
    layer = await bench.engine.create_snapshot("s")
    await bench.engine.write(0, b"x")
    bench.store.fail("save")
    fail(bench.store.temp(layer))
    bench.engine.check_storage()
    await trio.testing.wait_all_tasks_blocked()
    assert "ok" == bench.store.records[0].state
    (found,) = bench.store.recover()
    assert ("lost", EIO, layer.reason) == (found.state, found.errno, found.reason)
    assert 0 == found.accessible


async def test_a_copy_under_way_does_not_land(nursery):
    bench = Bench.make(nursery, OLD)
    engine = bench.engine
    layer = await engine.create_snapshot("s")
    temp = bench.store.temp(layer)
    stall = temp.stall("pwrite", times=1)
    nursery.start_soon(engine.write, 0, b"x" * CLUSTER)
    await stall.reached.wait()
    fail(temp)
    engine.check_storage()
    assert "ok" == layer.state, "nothing was found there"
    stall.release()
    await trio.testing.wait_all_tasks_blocked()
    assert 2 == len(temp.calls_of("pwrite")), "it was copied once more"
    assert OLD[:CLUSTER] == bytes(await engine.read_snapshot(layer, 0, CLUSTER))


@pytest.mark.parametrize("cold", [False, True])
async def test_who_reads_what_is_there_instead_asks_before_the_answer(nursery, cold):
    bench = Bench.make(nursery, OLD)
    layer = await bench.engine.create_snapshot("s")
    await bench.engine.write(0, b"x" * CLUSTER)
    temp = bench.store.temp(layer)
    temp.cold = cold
    temp.data[:CLUSTER] = bytes(CLUSTER)
    fail(temp)
    with pytest.raises(SnapshotLost):
        await bench.engine.read_snapshot(layer, 0, 1)


async def test_extents_of_what_is_gone_are_not_told_as_holes(nursery):
    bench = Bench.make(nursery, OLD)
    layer = await bench.engine.create_snapshot("s")
    await bench.engine.write(0, b"x" * CLUSTER)
    temp = bench.store.temp(layer)
    temp.pages.clear()
    fail(temp)
    found = [each async for each in bench.engine.map(layer)]
    assert not any(extent.accessible and not extent.data for extent in found)
    with pytest.raises(SnapshotLost):
        await bench.engine.seek_snapshot(layer, 0, 3)


async def test_every_sync_of_the_image_fails_after_one_has(nursery):
    bench = Bench.make(nursery, OLD)
    bench.image.fail("flush", errno=errno.ENOSPC, times=1)
    for _ in range(3):
        with pytest.raises(OSError) as caught:
            await bench.engine.flush()
        assert errno.ENOSPC == caught.value.errno
    assert "could not be written back" in str(bench.engine.unhealthy)
    with pytest.raises(StateError):
        await bench.engine.create_snapshot("s")
    assert 1 == sum(event.kind == "unhealthy" for event in await bench.engine.events.after(0, 0))


async def test_who_syncs_at_the_same_time_is_told_too(nursery):
    bench = Bench.make(nursery, OLD)
    stall = bench.image.stall("flush", times=1)
    bench.image.fail("flush", times=1)
    told: list[int | None] = []

    async def sync() -> None:
        try:
            await bench.engine.flush()
            told.append(None)
        except OSError as error:
            told.append(error.errno)

    for _ in range(3):
        nursery.start_soon(sync)
        await trio.testing.wait_all_tasks_blocked()
    await stall.reached.wait()
    stall.release()
    await trio.testing.wait_all_tasks_blocked()
    assert [EIO] * 3 == told


async def test_a_write_that_is_gone_belonged_to_snapshots_since_the_last_sync(nursery):
    bench = Bench.make(nursery, OLD)
    engine = bench.engine
    await engine.create_snapshot("old")
    await engine.flush()
    await engine.tracker.add("bitmap")
    await engine.write(0, b"1" * CLUSTER)
    await engine.create_snapshot("new")
    await engine.write(0, b"2" * CLUSTER)
    fail(bench.image)
    with pytest.raises(OSError):
        await engine.flush()
    assert {"old": "ok", "new": "lost"} == states(bench)
    assert OLD == bytes(await engine.read_snapshot(engine.find("old"), 0, len(OLD)))
    with pytest.raises(BitmapUnusable, match="written back"):
        engine.tracker.bitmaps.find("bitmap").usable(1)
    await trio.testing.wait_all_tasks_blocked()
    assert "written back" in str(bench.store.bitmap_records[0].reason)
    assert [True] == [each.parts is None for each in bench.store.bitmaps.recover()]


async def test_a_sync_settles_only_what_was_there_when_it_began(nursery):
    bench = Bench.make(nursery, OLD)
    stall = bench.image.stall("flush", times=1)
    nursery.start_soon(bench.engine.flush)
    await stall.reached.wait()
    layer = await bench.engine.create_snapshot("s")
    stall.release()
    await trio.testing.wait_all_tasks_blocked()
    assert not layer.settled
    await bench.engine.flush()
    assert layer.settled


async def test_no_snapshot_is_made_of_what_is_gone_meanwhile(nursery):
    bench = Bench.make(nursery, OLD)
    await bench.engine.write(0, b"1" * CLUSTER)
    stall = bench.store.stall("save", skip=1, times=1)  # when it gets its name
    results: list[type] = []

    async def create() -> None:
        try:
            await bench.engine.create_snapshot("s")
        except StateError as error:
            results.append(type(error))

    nursery.start_soon(create)
    await stall.reached.wait()
    fail(bench.image)
    stall.release()
    await trio.testing.wait_all_tasks_blocked()
    assert [StateError] == results
    assert () == bench.engine.snapshots


async def test_what_cannot_be_synced_at_the_end_is_lost(nursery):
    bench = Bench.make(nursery, OLD)
    engine = bench.engine
    layer = await engine.create_snapshot("s")
    await engine.write(0, b"x")
    await engine.create_snapshot("t")
    await engine.tracker.add("b")
    bench.store.fail("sync", start=layer.id, stop=layer.id + 1)
    bench.store.fail("sync_bitmap")
    complaints = await engine.finish()
    assert ["snapshot 's' is lost", "bitmap 'b' is inconsistent"] == [
        each.partition(":")[0] for each in complaints
    ]
    assert ["lost", "ok"] == [each.state for each in bench.store.records]
    assert "written back" in str(bench.store.bitmap_records[0].reason)


async def test_what_was_lost_and_is_deleted_is_no_complaint(nursery):
    bench = Bench.make(nursery, OLD)
    layer = await bench.engine.create_snapshot("s")
    await bench.engine.write(0, b"x")
    fail(bench.store.temp(layer))
    bench.engine.check_storage()
    await bench.engine.delete_snapshot("s")
    await trio.testing.wait_all_tasks_blocked()
    assert [] == await bench.engine.finish()


# Mapped pages that cannot be had


def lose_page(bench: Bench, what: Any) -> None:
    """A page of its mapped bits is gone; it is told once."""
    told = iter([os_error(EIO)])
    what.failure = lambda: next(told, None)
    assert isinstance(bench.store, MemoryStore)
    bench.store.failed_pages += 1


async def test_the_image_is_written_only_when_the_list_says_what_is_lost(nursery):
    bench = Bench.make(nursery, OLD)
    engine = bench.engine
    layer = await engine.create_snapshot("a")
    stall = bench.store.stall("save")
    lose_page(bench, layer)
    async with trio.open_nursery() as writing:
        writing.start_soon(engine.write, 0, b"new")
        await stall.reached.wait()
        assert OLD[:3] == bytes(bench.image.data[:3])
        assert "lost" == layer.state
        stall.release()
    assert b"new" == bytes(bench.image.data[:3])
    assert ["lost"] == [record.state for record in bench.store.records]
    assert engine.writeback.is_sound()


async def test_a_write_fails_while_that_cannot_be_said(nursery):
    bench = Bench.make(nursery, OLD)
    engine = bench.engine
    layer = await engine.create_snapshot("a")
    fault = bench.store.fail("save")
    lose_page(bench, layer)
    with pytest.raises(OSError, match=r"injected|Input/output"):
        await engine.write(0, b"new")
    assert OLD[:3] == bytes(bench.image.data[:3])
    bench.store.faults.remove(fault)
    await engine.write(0, b"new")
    assert b"new" == bytes(bench.image.data[:3])
    assert ["lost"] == [record.state for record in bench.store.records]


async def test_a_page_that_fails_between_the_bits_and_the_write_is_noticed(nursery):
    """As when done was set in it, or dirty bits: nothing is written before that is dealt with."""
    bench = Bench.make(nursery, OLD)
    engine = bench.engine
    layer = await engine.create_snapshot("a")
    real = engine.tracker.bitmaps.mark

    def mark(first: int, stop: int) -> bool:
        engine.tracker.bitmaps.mark = real  # type: ignore[method-assign]
        lose_page(bench, layer)
        return real(first, stop)

    engine.tracker.bitmaps.mark = mark  # type: ignore[method-assign]
    await engine.write(0, b"new")
    assert b"new" == bytes(bench.image.data[:3])
    assert ["lost"] == [record.state for record in bench.store.records]


async def test_a_read_that_met_such_a_page_gives_nothing(nursery):
    bench = Bench.make(nursery, OLD)
    engine = bench.engine
    older = await engine.create_snapshot("a")
    newer = await engine.create_snapshot("b")
    await engine.write(0, b"new")
    lose_page(bench, newer)  # whose done bits the older one looks at
    with pytest.raises(SnapshotLost):
        await engine.read_snapshot(older, 0, CLUSTER)


async def test_a_bitmap_with_such_a_page_is_inconsistent(nursery):
    bench = Bench.make(nursery, OLD)
    engine = bench.engine
    bitmap = await engine.tracker.add("b")
    told = iter([os_error(EIO)])
    bitmap.parts = evolve(bitmap.parts, failure=lambda: next(told, None))
    bench.store.failed_pages += 1
    await engine.write(0, b"new")
    with pytest.raises(BitmapUnusable):
        bitmap.usable(1)
    assert bench.store.bitmap_records[0].reason is not None


async def test_what_is_lost_while_the_list_is_saved_keeps_its_promises(nursery):
    """The list that is being saved does not tell of it."""
    bench = Bench.make(nursery, OLD)
    engine = bench.engine
    layer = await engine.create_snapshot("a")
    commit = GroupCommit(trio.sleep_forever)
    stall = bench.store.stall("save")
    lose_page(bench, layer)
    async with trio.open_nursery() as writing:
        writing.start_soon(engine.writeback.mend)
        await stall.reached.wait()
        engine.copier.promises.make(commit, 0, 1)
        engine.writeback._hopeless.append(commit)
        stall.release()
    assert [(0, 1)] == engine.copier.promises.ranges


async def test_a_page_that_failed_before_the_snapshot_was_there_lets_its_creation_fail(nursery):
    bench = Bench.make(nursery, OLD)
    real = bench.store.create

    async def create(layer_id: int, geometry: Geometry) -> LayerParts:
        parts = await real(layer_id, geometry)
        told = iter([os_error(EIO)])
        bench.store.failed_pages += 1
        await bench.engine.writeback.mend()  # somebody else's, who does not know of this layer
        return evolve(parts, failure=lambda: next(told, None))

    bench.store.create = create  # type: ignore[method-assign]
    with pytest.raises(StateError):
        await bench.engine.create_snapshot("a")
    assert () == bench.engine.snapshots


async def test_a_list_that_cannot_be_saved_is_not_tried_at_each_request(nursery, autojump_clock):
    bench = Bench.make(nursery, OLD)
    layer = await bench.engine.create_snapshot("a")
    fault = bench.store.fail("save")
    lose_page(bench, layer)
    for _ in range(5):
        bench.engine.mend()
        await trio.testing.wait_all_tasks_blocked()
    assert 2 >= fault.caught  # ours, and that of what was lost
    bench.store.faults.remove(fault)
    await trio.sleep(2 * MEND_SECONDS)
    bench.engine.mend()
    await trio.testing.wait_all_tasks_blocked()
    assert bench.engine.writeback.is_sound()
