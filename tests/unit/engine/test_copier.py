"""Steps 1 to 4 of a write: copies, frozen reads, and what happens when a copy fails."""

from __future__ import annotations

import errno
import os

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from snapfs.errors import AccessDenied, SnapshotExists
from tests.support.fakes import Bench, pattern
from tests.support.images import CLUSTER, Space
from tests.support.naive import check_quiet

SIZE = 8 * CLUSTER
OLD = pattern(1, SIZE)
NEW = pattern(2, SIZE)


def part(content: bytes, first: int, stop: int) -> bytes:
    return content[first * CLUSTER : stop * CLUSTER]


@pytest.fixture
async def bench(nursery) -> Bench:
    return Bench.make(nursery, OLD)


async def write(bench: Bench, first: int, stop: int) -> None:
    await bench.engine.write(first * CLUSTER, part(NEW, first, stop))


async def test_two_writers_to_one_cluster_make_one_copy(bench, nursery):
    layer = await bench.engine.create_snapshot("s")
    stall = bench.store.temp(layer).stall("pwrite")
    nursery.start_soon(write, bench, 2, 3)
    nursery.start_soon(write, bench, 1, 4)
    await stall.reached.wait()
    await wait_all_tasks_blocked()
    stall.release()
    await wait_all_tasks_blocked()
    copied = [call.offset // CLUSTER for call in bench.image.calls_of("copy")]
    assert [1, 2, 3] == sorted(copied)
    assert OLD == await bench.engine.read_snapshot(layer, 0, SIZE)
    check_quiet(bench.engine, bench.store)


async def test_a_reader_stalled_on_the_image_holds_up_only_writes_to_its_clusters(bench, nursery):
    layer = await bench.engine.create_snapshot("s")
    stall = bench.image.stall("pread", start=CLUSTER, stop=2 * CLUSTER, times=1)
    results = []

    async def read() -> None:
        results.append(await bench.engine.read_snapshot(layer, CLUSTER, CLUSTER))

    nursery.start_soon(read)
    await stall.reached.wait()
    written = trio.Event()

    async def write_there() -> None:
        await write(bench, 1, 2)
        written.set()

    nursery.start_soon(write_there)
    await wait_all_tasks_blocked()
    assert not written.is_set()
    assert part(OLD, 1, 2) == bench.image.data[CLUSTER : 2 * CLUSTER]
    await write(bench, 3, 4)  # another cluster: at once
    temp = bench.store.temp(layer)
    before = len(bench.image.calls_of("pread", "pread_nowait"))
    assert part(OLD, 1, 2) == await bench.engine.read_snapshot(layer, CLUSTER, CLUSTER)
    assert temp.calls_of("pread_nowait")
    assert before == len(bench.image.calls_of("pread", "pread_nowait"))
    stall.release()
    await written.wait()
    assert [part(OLD, 1, 2)] == results
    assert part(NEW, 1, 2) == await bench.engine.read(CLUSTER, CLUSTER)
    assert 1 == bench.engine.counters.frozen_waits


async def test_break_guest_write_leaves_the_image_and_a_retry_copies_what_failed(nursery):
    bench = Bench.make(nursery, OLD, on_cbw_error="break-guest-write")
    layer = await bench.engine.create_snapshot("s")
    bench.store.temp(layer).fail("pwrite", start=2 * CLUSTER, stop=3 * CLUSTER, errno=errno.ENOSPC)
    with pytest.raises(OSError, match="No space left") as caught:
        await write(bench, 1, 5)
    assert errno.ENOSPC == caught.value.errno
    assert OLD == bench.image.data
    assert ("ok", 0) == (layer.state, layer.lost)
    bench.store.temp(layer).faults.clear()
    bench.image.calls.clear()
    await write(bench, 1, 5)
    assert [2] == [call.offset // CLUSTER for call in bench.image.calls_of("copy")]
    assert OLD == await bench.engine.read_snapshot(layer, 0, SIZE)


async def test_break_snapshot_loses_exactly_the_clusters_that_could_not_be_kept(bench):
    old = await bench.engine.create_snapshot("old")
    await write(bench, 0, 1)
    new = await bench.engine.create_snapshot("new")
    bench.image.fail("copy", start=2 * CLUSTER, stop=3 * CLUSTER, errno=errno.EIO)
    await write(bench, 0, 5)
    assert part(NEW, 0, 5) == bench.image.data[: 5 * CLUSTER]
    for layer in (old, new):
        assert ("incomplete", errno.EIO, 1) == (layer.state, layer.errno, layer.lost)
        with pytest.raises(AccessDenied):
            await bench.engine.read_snapshot(layer, 2 * CLUSTER, 1)
        for first, stop in ((1, 2), (3, 8)):
            assert part(OLD, first, stop) == await bench.engine.read_snapshot(
                layer, first * CLUSTER, (stop - first) * CLUSTER
            )
    assert part(OLD, 0, 1) == await bench.engine.read_snapshot(old, 0, CLUSTER)
    check_quiet(bench.engine, bench.store)


async def test_a_full_temp_image_serves_again_when_space_was_freed(nursery):
    space = Space()
    bench = Bench.make(nursery, OLD, space=space, on_cbw_error="break-guest-write")
    layer = await bench.engine.create_snapshot("s")
    await write(bench, 0, 2)
    space.limit = space.used
    with pytest.raises(OSError, match="No space"):
        await write(bench, 2, 3)
    await bench.engine.discard(layer, 0, CLUSTER)
    await write(bench, 2, 3)
    assert part(OLD, 1, 8) == await bench.engine.read_snapshot(layer, CLUSTER, 7 * CLUSTER)


@pytest.mark.parametrize("policy", ["break-guest-write", "break-snapshot"])
async def test_a_copy_that_takes_too_long(autojump_clock, nursery, policy):
    bench = Bench.make(nursery, OLD, on_cbw_error=policy, cbw_timeout=2.5)
    layer = await bench.engine.create_snapshot("s")
    stall = bench.store.temp(layer).stall("pwrite")
    started = trio.current_time()
    if policy == "break-guest-write":
        with pytest.raises(OSError, match=os.strerror(errno.ETIMEDOUT)):
            await write(bench, 1, 2)
        assert OLD == bench.image.data
    else:
        await write(bench, 1, 2)
        assert ("incomplete", errno.ETIMEDOUT) == (layer.state, layer.errno)
    assert 2.5 == pytest.approx(trio.current_time() - started)
    await write(bench, 5, 5)
    stall.release()
    await wait_all_tasks_blocked()
    check_quiet(bench.engine, bench.store)
    if policy == "break-guest-write":
        await write(bench, 1, 2)  # the late copy serves
        assert 1 == len(bench.image.calls_of("copy"))
        assert OLD == await bench.engine.read_snapshot(layer, 0, SIZE)


async def test_a_late_copy_of_what_was_discarded_or_deleted_leaves_nothing(bench, nursery):
    layer = await bench.engine.create_snapshot("s")
    stall = bench.store.temp(layer).stall("pwrite")
    nursery.start_soon(write, bench, 1, 3)
    await stall.reached.wait()
    await bench.engine.discard(layer, CLUSTER, CLUSTER)
    stall.release()
    await wait_all_tasks_blocked()
    check_quiet(bench.engine, bench.store)
    again = bench.store.temp(layer).stall("pwrite")
    nursery.start_soon(write, bench, 4, 5)
    await again.reached.wait()
    await bench.engine.delete_snapshot("s")
    again.release()
    await wait_all_tasks_blocked()
    check_quiet(bench.engine, bench.store)
    assert 0 == bench.store.space.used
    assert part(NEW, 4, 5) == bench.image.data[4 * CLUSTER : 5 * CLUSTER]


async def test_errors_of_reading_are_not_sticky(bench):
    layer = await bench.engine.create_snapshot("s")
    bench.image.fail("pread", times=1)
    bench.image.cold = True
    with pytest.raises(OSError, match="Input/output"):
        await bench.engine.read_snapshot(layer, 0, SIZE)
    assert OLD == await bench.engine.read_snapshot(layer, 0, SIZE)
    await write(bench, 0, 8)  # no frozen range is left behind
    check_quiet(bench.engine, bench.store)


async def test_the_copy_timeout_must_be_a_number_of_seconds(nursery):
    with pytest.raises(ValueError, match="cbw_timeout"):
        Bench.make(nursery, OLD, cbw_timeout=-1)


async def test_stalled_temp_storage_holds_up_nobody_else(bench, nursery):
    layer = await bench.engine.create_snapshot("s")
    await write(bench, 0, 4)
    stall = bench.store.temp(layer).stall("pwrite")
    nursery.start_soon(write, bench, 4, 5)
    await stall.reached.wait()
    for number in range(1_000):
        cluster = number % 4
        assert part(NEW, cluster, cluster + 1) == await bench.engine.read(
            cluster * CLUSTER, CLUSTER
        )
        cluster = number % 8
        assert part(OLD, cluster, cluster + 1) == await bench.engine.read_snapshot(
            layer, cluster * CLUSTER, CLUSTER
        )
        await write(bench, number % 4, number % 4 + 1)
    assert part(OLD, 4, 5) == bench.image.data[4 * CLUSTER : 5 * CLUSTER]
    stall.release()
    await wait_all_tasks_blocked()
    assert part(NEW, 4, 5) == bench.image.data[4 * CLUSTER : 5 * CLUSTER]


async def test_a_snapshot_is_created_while_copies_hang_and_others_write_on(bench, nursery):
    old = await bench.engine.create_snapshot("old")
    stall = bench.store.temp(old).stall("pwrite")
    nursery.start_soon(write, bench, 4, 5)
    nursery.start_soon(bench.engine.resize, 7 * CLUSTER)
    await stall.reached.wait()
    await wait_all_tasks_blocked()
    new = await bench.engine.create_snapshot("new")
    await write(bench, 0, 4)
    assert part(OLD, 4, 8) == bench.image.data[4 * CLUSTER :]
    stall.release()
    await wait_all_tasks_blocked()
    assert part(NEW, 0, 5) + part(OLD, 5, 7) == bench.image.data
    for layer in (old, new):
        assert OLD == await bench.engine.read_snapshot(layer, 0, SIZE)
    check_quiet(bench.engine, bench.store)


@pytest.mark.parametrize("outcome", ["lands", "fails"])
async def test_a_cluster_has_one_copy_however_the_writers_overlap(bench, nursery, outcome):
    """A younger copy of the first cluster, an older one of the second, and a write to both."""
    layer = await bench.engine.create_snapshot("s")

    async def scribble(start: int, stop: int) -> None:
        await bench.engine.write(start, NEW[start:stop])

    second = bench.image.stall("copy", start=2 * CLUSTER, stop=3 * CLUSTER, times=1)
    nursery.start_soon(scribble, 2 * CLUSTER + 2048, 3 * CLUSTER)
    await second.reached.wait()
    first = bench.image.stall("copy", start=CLUSTER, stop=2 * CLUSTER, times=1)
    nursery.start_soon(scribble, CLUSTER, CLUSTER + 1024)
    await first.reached.wait()
    third = bench.image.stall("copy", start=CLUSTER, stop=2 * CLUSTER, times=1)
    nursery.start_soon(scribble, CLUSTER + 2048, 2 * CLUSTER + 2048)
    await wait_all_tasks_blocked()
    first.release()
    await wait_all_tasks_blocked()
    assert NEW[CLUSTER : CLUSTER + 1024] == bench.image.data[CLUSTER : CLUSTER + 1024]
    if outcome == "fails":
        bench.store.temp(layer).fail("pwrite", errno=errno.ENOSPC, times=1)
    third.release()
    second.release()
    await wait_all_tasks_blocked()
    found = await bench.engine.read_snapshot(layer, 0, 2 * CLUSTER)
    assert part(OLD, 0, 2) == found


async def test_a_resize_does_not_wait_for_who_waits_for_it(bench, nursery):
    """The kernel syncs active for a creation only when a truncate(2) in flight has ended."""
    resized = trio.Event()

    async def resize() -> None:
        await bench.engine.resize(SIZE + CLUSTER)
        resized.set()

    async def barrier() -> None:
        nursery.start_soon(resize)
        await resized.wait()

    bench.engine.barrier = barrier
    layer = await bench.engine.create_snapshot("s")
    assert SIZE + CLUSTER == layer.geometry.size


async def test_a_creation_that_waits_for_temp_storage_holds_up_no_deletion(bench, nursery):
    for name in ("old", "other"):
        await bench.engine.create_snapshot(name)
    stall = bench.store.stall("create", times=1)
    for name in ("new", "newer"):
        nursery.start_soon(bench.engine.create_snapshot, name)
    await stall.reached.wait()
    await bench.engine.delete_snapshot("old")
    await bench.engine.rename_snapshot("other", "another")
    await bench.engine.resize(SIZE + CLUSTER)
    stall.release()
    await wait_all_tasks_blocked()
    assert {"another", "new", "newer"} == {layer.name for layer in bench.engine.snapshots}
    ids = [layer.id for layer in bench.engine.layers]
    assert sorted(ids) == ids  # the state directory insists
    check_quiet(bench.engine, bench.store)


async def test_writes_do_not_wait_for_the_temp_image_of_an_image_that_grows(bench, nursery):
    listing = bench.store.stall("save", times=1)
    nursery.start_soon(bench.engine.create_snapshot, "s")
    await listing.reached.wait()
    await bench.engine.write(SIZE, b"longer")
    making = bench.store.stall("create", times=1)
    listing.release()
    await making.reached.wait()
    with trio.fail_after(60):
        await bench.engine.write(0, b"x")
        await bench.engine.write(SIZE + 6, b" and longer")
    making.release()
    await wait_all_tasks_blocked()
    (layer,) = bench.engine.layers
    assert b"x" == bytes(await bench.engine.read_snapshot(layer, 0, 1))
    assert b"longer and longer" == bytes(await bench.engine.read_snapshot(layer, SIZE, 100))
    check_quiet(bench.engine, bench.store)


async def test_a_snapshot_of_an_image_that_grows_and_grows(bench, monkeypatch):
    """At last the writes are held."""
    real = bench.store.create

    async def create(layer_id, geometry):
        if bench.engine._gate.open:
            await bench.engine.write(bench.engine.size, b"more")
        return await real(layer_id, geometry)

    monkeypatch.setattr(bench.store, "create", create)
    layer = await bench.engine.create_snapshot("s")
    assert (SIZE + 12, SIZE + 12) == (layer.geometry.size, bench.engine.size)
    await wait_all_tasks_blocked()  # the others are removed
    check_quiet(bench.engine, bench.store)


async def test_a_name_that_was_taken_meanwhile_leaves_nothing(bench, nursery):
    await bench.engine.create_snapshot("old")
    stall = bench.store.stall("create", times=1)

    async def create() -> None:
        with pytest.raises(SnapshotExists):
            await bench.engine.create_snapshot("s")

    nursery.start_soon(create)
    await stall.reached.wait()
    await bench.engine.rename_snapshot("old", "s")
    stall.release()
    await wait_all_tasks_blocked()
    assert ["s"] == [layer.name for layer in bench.engine.layers]
    check_quiet(bench.engine, bench.store)


async def test_a_snapshot_whose_deletion_fails_stays_when_its_reader_leaves(bench, nursery):
    layer = await bench.engine.create_snapshot("s")
    bench.engine.open_snapshot(layer)
    saving = bench.store.stall("save")

    async def delete() -> None:
        with pytest.raises(OSError, match="No space"):
            await bench.engine.delete_snapshot("s")

    bench.store.fail("save", errno=errno.ENOSPC, times=1)
    nursery.start_soon(delete)
    await saving.reached.wait()
    nursery.start_soon(bench.engine.close_snapshot, layer)
    await wait_all_tasks_blocked()
    saving.release()
    await wait_all_tasks_blocked()
    assert bench.engine.find("s") is layer
    await write(bench, 0, 3)
    assert OLD == await bench.engine.read_snapshot(layer, 0, SIZE)


async def test_an_allocation_that_fails_half_way_is_noticed(bench):
    real = bench.image.allocate

    async def allocate(offset: int, length: int, keep_size: bool) -> None:
        await real(offset, length // 2, keep_size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    bench.image.allocate = allocate
    with pytest.raises(OSError, match="No space"):
        await bench.engine.allocate(SIZE, 4 * CLUSTER, False)
    assert SIZE + 2 * CLUSTER == bench.engine.size
