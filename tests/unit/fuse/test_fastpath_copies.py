"""Writes that the fast path copies for, alone or together with the engine."""

from __future__ import annotations

import errno
import os
import select
import threading

import pytest
import trio

from snapfs.engine.reqlist import entered
from snapfs.fuse import requestfilter
from snapfs.fuse.fastpath import FIRST_SNAPSHOT
from tests.support.fastpaths import (
    ACTIVE,
    ACTIVE_HANDLE,
    CLUSTER,
    NEW,
    OLD,
    SIZE,
    Rig,
    full,
    read_request,
    until_quiet,
    write_request,
    written,
)
from tests.support.naive import check_bitmaps


async def test_a_pending_cluster_is_copied_before_it_is_written(image):
    async with Rig.make(image) as rig:
        layer = await rig.engine.create_snapshot("s")
        request = write_request(ACTIVE_HANDLE, 3 * CLUSTER + 5, NEW)
        assert [2] == rig.drain(request)
        assert {8: written(CLUSTER)} == rig.replies()
        assert [(3, 5)] == list(layer.done.runs(0, 17))
        assert [(0, 3), (5, 17)] == list(rig.engine._stack.pending.runs(0, 17))
        assert [1] == rig.drain(request)
        assert {8: written(CLUSTER)} == rig.replies()
        assert (0, OLD) == rig.send(
            read_request(FIRST_SNAPSHOT + layer.id, rig.handle(layer), 0, SIZE)
        )
        rig.fast.collect()
        counters = rig.engine.counters
        assert (2, 2, 2 * CLUSTER) == (counters.writes, counters.cbw_copies, counters.cbw_bytes)
        assert 0 < counters.cbw_seconds
        times = rig.engine.copier.times
        assert (1, counters.cbw_seconds) == (sum(times.counts), pytest.approx(times.seconds))
        assert 0 == rig.engine.space._claimed
        assert rig.settled_activity() == rig.activity()
        check_bitmaps(rig.engine)


@pytest.mark.parametrize("durability", ["process", "power"])
async def test_writes_to_one_cluster_share_a_copy(image, durability):
    async with Rig.make(image, durability=durability) as rig:
        layer = await rig.engine.create_snapshot("s")
        requests = [
            write_request(ACTIVE_HANDLE, 5 * CLUSTER + 100 * n, bytes([n]) * 100, unique=n)
            for n in range(1, 11)
        ]
        assert [2] * 10 == rig.drain(*requests)
        assert set(range(1, 11)) == set(rig.replies())
        assert (1, 0) == (rig.engine.counters.cbw_copies, len(rig.engine.copier._copies))
        assert [(5, 6)] == list(layer.done.runs(0, 17))
        assert OLD == bytes(await rig.engine.read_snapshot(layer, 0, SIZE))
    assert b"".join(bytes([n]) * 100 for n in range(1, 11)) in image.read_bytes()


@pytest.mark.parametrize("durability", ["process", "power"])
async def test_one_write_of_everything_copies_in_pieces(tmp_path, durability):
    image = tmp_path / "large.img"
    content = os.urandom(1 << 20)
    image.write_bytes(content)
    async with Rig.make(image, durability=durability) as rig:
        layer = await rig.engine.create_snapshot("s")
        await rig.engine.write(100 * CLUSTER, NEW)
        assert [2] == rig.drain(write_request(ACTIVE_HANDLE, 0, bytes(1 << 20)))
        assert 256 == rig.engine.counters.cbw_copies
        assert content == bytes(await rig.engine.read_snapshot(layer, 0, 1 << 20))
    assert bytes(1 << 20) == image.read_bytes()


@pytest.mark.parametrize("durability", ["process", "power"])
async def test_zeros_and_holes_take_no_room(image, durability):
    with open(image, "r+b") as file:
        file.truncate(40 * CLUSTER)
        os.pwrite(file.fileno(), bytes(CLUSTER), 2 * CLUSTER)
        os.pwrite(file.fileno(), NEW, 35 * CLUSTER)  # a hole before data, and one at the end
    async with Rig.make(image, durability=durability) as rig:
        layer = await rig.engine.create_snapshot("s")
        for cluster in (2, 30, 39):
            assert [2] == rig.drain(write_request(ACTIVE_HANDLE, cluster * CLUSTER, NEW))
        assert 0 == await rig.temp_bytes(layer) == rig.engine.counters.cbw_bytes
        assert [(2, 3), (30, 31), (39, 40)] == list(layer.done.runs(0, 40))
        assert bytes(CLUSTER) == bytes(await rig.engine.read_snapshot(layer, 30 * CLUSTER, CLUSTER))


@pytest.mark.parametrize("durability", ["process", "power"])
async def test_the_short_last_cluster_is_copied(image, durability):
    async with Rig.make(image, durability=durability) as rig:
        layer = await rig.engine.create_snapshot("s")
        assert [2] == rig.drain(write_request(ACTIVE_HANDLE, SIZE - 1, b"x"))
        assert 100 == rig.engine.counters.cbw_bytes
        assert OLD == bytes(await rig.engine.read_snapshot(layer, 0, SIZE))


@pytest.mark.parametrize("durability", ["process", "power"])
async def test_the_newest_snapshot_that_lives_receives(image, durability):
    async with Rig.make(image, durability=durability) as rig:
        old = await rig.engine.create_snapshot("old")
        new = await rig.engine.create_snapshot("new")
        assert [2] == rig.drain(write_request(ACTIVE_HANDLE, 0, NEW))
        assert (False, True) == (old.done.get(0), new.done.get(0))
        await rig.engine.delete_snapshot("new")
        assert [2] == rig.drain(write_request(ACTIVE_HANDLE, CLUSTER, NEW))
        assert (False, True) == (old.done.get(0), old.done.get(1))
        assert OLD == bytes(await rig.engine.read_snapshot(old, 0, SIZE))
        check_bitmaps(rig.engine)


async def test_what_python_copies_is_pythons(image):
    async with Rig.make(image) as rig:
        await rig.engine.create_snapshot("s")
        with entered(rig.engine.copier._copies, 3, 5):
            assert rig.send(write_request(ACTIVE_HANDLE, 5 * CLUSTER - 1, b"x")) is None
            assert rig.send(write_request(ACTIVE_HANDLE, 2 * CLUSTER, NEW + b"x")) is None
            assert [2] == rig.drain(write_request(ACTIVE_HANDLE, 5 * CLUSTER, b"x"))


@pytest.mark.parametrize("durability", ["process", "power"])
async def test_copies_stay_inside_the_limit(image, durability):
    async with Rig.make(image, durability=durability, temp_limit=3 * CLUSTER) as rig:
        layer = await rig.engine.create_snapshot("s")
        assert [2] == rig.drain(write_request(ACTIVE_HANDLE, 0, NEW))
        assert [0] == rig.drain(write_request(ACTIVE_HANDLE, CLUSTER, NEW * 3))
        assert [2] == rig.drain(write_request(ACTIVE_HANDLE, CLUSTER, NEW * 2))
        assert [0] == rig.drain(write_request(ACTIVE_HANDLE, 5 * CLUSTER, NEW))
        assert 3 * CLUSTER == await rig.temp_bytes(layer)
        assert 0 == rig.engine.space._claimed


async def test_copies_that_take_long_become_the_engines(image):
    async with Rig.make(image) as rig:
        layer = await rig.engine.create_snapshot("s")
        requests = [write_request(ACTIVE_HANDLE, n * CLUSTER, NEW, unique=n) for n in (1, 2, 4)]
        assert [2, 2, 2] == rig.drain(*requests, patient=False)
        assert {} == rig.replies()
        assert {(1, 2), (2, 3), (4, 5)} == set(rig.engine.copier.ranges)
        assert 3 == layer.pins
        assert not layer.done.any(0, 17)
        # until they are through nothing more is copied here
        assert rig.send(write_request(ACTIVE_HANDLE, 9 * CLUSTER, NEW)) is None
        await until_quiet(rig, 3)
        assert [(1, CLUSTER, 0), (2, 2 * CLUSTER, 0), (4, 4 * CLUSTER, 0)] == sorted(rig.handed)
        assert [(1, 3), (4, 5)] == list(layer.done.runs(0, 17))
        assert (0, 0) == (layer.pins, rig.engine.space._claimed)
        assert 3 == rig.engine.counters.cbw_copies
        assert [2] == rig.drain(write_request(ACTIVE_HANDLE, 9 * CLUSTER, NEW))
        assert OLD == bytes(await rig.engine.read_snapshot(layer, 0, SIZE))
        check_bitmaps(rig.engine)


@pytest.mark.parametrize("durability", ["process", "power"])
@pytest.mark.parametrize("policy", ["break-snapshot", "break-guest-write"])
async def test_a_copy_that_hangs_meets_the_timeout(
    image, policy, monkeypatch, durability, mock_clock
):
    """Its end is kept from Python, as if the temp image did not answer; time stands still."""
    async with Rig.make(image, durability=durability, cbw_timeout=60, on_cbw_error=policy) as rig:
        layer = await rig.engine.create_snapshot("s")
        with Rig.readable_never(monkeypatch) as let_go:
            with monkeypatch.context() as patch:
                patch.setattr(requestfilter, "ended_copies", list)
                assert [2] == rig.drain(write_request(ACTIVE_HANDLE, CLUSTER, NEW), patient=False)
                (copy,) = rig.engine.copier._copies
                while not copy._ended.statistics().tasks_waiting:
                    await trio.lowlevel.checkpoint()
                mock_clock.jump(61)  # but for this
                while not rig.handed:
                    await trio.lowlevel.checkpoint()
                lost = policy == "break-snapshot"
                assert [(8, CLUSTER, 0 if lost else errno.ETIMEDOUT)] == rig.handed
                assert [(1, 2)] == rig.engine.copier.ranges
                # others are served: what needs no copy here, what does by Python
                assert (0, OLD[:9]) == rig.send(read_request(ACTIVE, ACTIVE_HANDLE, 0, 9))
                assert rig.send(write_request(ACTIVE_HANDLE, 5 * CLUSTER, NEW)) is None
                await rig.engine.write(5 * CLUSTER, NEW)
            let_go()
            mock_clock.rate = 1
            await until_quiet(rig, 1)
        assert (1 if lost else 0) == layer.lost
        assert (not lost) == layer.done.get(1)
        assert (1 if lost else 2) * CLUSTER == await rig.temp_bytes(layer)
        assert 0 == layer.pins
        check_bitmaps(rig.engine)


async def test_a_cold_read_does_not_take_the_news_of_a_copy_that_python_waits_for(
    tmp_path, monkeypatch
):
    """The copy ends while the drain waits for the data, in most of the rounds."""
    clusters, rounds = 4096, 30
    path = tmp_path / "large.img"
    path.write_bytes(os.urandom(clusters * CLUSTER))
    async with Rig.make(path) as rig:
        await rig.engine.create_snapshot("s")
        fd = rig.store.image.fd
        os.fsync(fd)
        for number in range(rounds):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            offset = number * 64 * CLUSTER
            with Rig.readable_never(monkeypatch) as let_go:
                data = bytes(64 * CLUSTER)
                request = write_request(ACTIVE_HANDLE, offset, data, unique=100 + number)
                assert [2] == rig.drain(request, patient=False)
                cold = (2000 + number * 64) * CLUSTER
                rig.drain(read_request(ACTIVE, ACTIVE_HANDLE, cold, 9, unique=200 + number))
                assert select.select([requestfilter.copies_fd()], [], [], 400)[0], number
                let_go()
                while rig.engine.copier.ranges:
                    await trio.sleep(0)
                monkeypatch.undo()


@pytest.mark.parametrize("durability", ["process", "power"])
async def test_a_copy_whose_cluster_was_given_up_meanwhile_leaves_nothing(image, durability):
    async with Rig.make(image, durability=durability) as rig:
        layer = await rig.engine.create_snapshot("s")
        rig.drain(write_request(ACTIVE_HANDLE, 0, NEW), patient=False)
        await rig.engine.discard(layer, 0, CLUSTER)
        await until_quiet(rig, 1)
        assert not layer.done.any(0, 17)
        assert 0 == await rig.temp_bytes(layer)
        check_bitmaps(rig.engine)


@pytest.mark.parametrize("durability", ["process", "power"])
@pytest.mark.parametrize("policy", ["break-snapshot", "break-guest-write"])
async def test_a_copy_that_fails_goes_to_the_policy(image, policy, durability):
    async with Rig.make(image, durability=durability, on_cbw_error=policy) as rig:
        layer = await rig.engine.create_snapshot("s")
        requests = [write_request(ACTIVE_HANDLE, n * CLUSTER, NEW, unique=n) for n in (1, 2)]
        with full(layer.temp.fd):
            assert [2, 2] == rig.drain(*requests)
            assert {} == rig.replies()
            await until_quiet(rig, 2)
        lost = policy == "break-snapshot"
        errors = {error for _, _, error in rig.handed}
        assert ({0} if lost else {errno.ENOSPC}) == errors
        assert (2 if lost else 0, "incomplete" if lost else "ok") == (layer.lost, layer.state)
        assert (0, 0) == (layer.pins, rig.engine.space._claimed)
        assert rig.settled_activity() == rig.activity()
        check_bitmaps(rig.engine)
    assert (NEW * 2 if lost else OLD[CLUSTER : 3 * CLUSTER]) == image.read_bytes()[
        CLUSTER : 3 * CLUSTER
    ]


@pytest.mark.parametrize("durability", ["process", "power"])
async def test_more_writes_than_can_be_kept(image, durability):
    with open(image, "r+b") as file:
        file.truncate(400 * CLUSTER)
    async with Rig.make(image, durability=durability) as rig:
        await rig.engine.create_snapshot("s")
        requests = [
            write_request(ACTIVE_HANDLE, n * CLUSTER, NEW, unique=n + 1) for n in range(300)
        ]
        verdicts = rig.drain(*requests, patient=False)
        assert {0, 2} == set(verdicts)
        assert 128 == verdicts.count(2)
        await until_quiet(rig, 128)
        assert 128 == rig.engine.counters.cbw_copies


@pytest.mark.parametrize("durability", ["process", "power"])
async def test_a_bug_at_the_end_of_a_drain_answers_the_writes(image, monkeypatch, durability):
    seen = []
    monkeypatch.setattr("sys.unraisablehook", lambda args: seen.append(str(args.exc_value)))
    async with Rig.make(image, durability=durability) as rig:
        await rig.engine.create_snapshot("s")

        def finish(*arguments):
            copies = arguments[5]
            while copies:  # end them, lest they are another test's
                for ended in requestfilter.ended_copies():
                    copies.remove(next(each for each in copies if each[0] == ended[0]))
            raise LookupError("a bug")

        requestfilter.set_fastpath(rig.fast._publish, rig.engine.copier.lend, finish)
        assert [2] == rig.drain(write_request(ACTIVE_HANDLE, 0, NEW), patient=False)
        assert {8: (-errno.EIO, b"")} == rig.replies()
        assert ["a bug"] == seen
        assert not rig.fast.collect()["on"]


@pytest.mark.parametrize("durability", ["process", "power"])
async def test_a_hand_over_that_finds_no_memory_answers_the_writes(image, monkeypatch, durability):
    memory = pytest.importorskip("_testcapi")
    seen: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", lambda args: seen.append(args.exc_type))
    monkeypatch.setattr("trio._core._thread_cache.IDLE_TIMEOUT", 0)
    async with Rig.make(image, durability=durability) as rig:
        layer = await rig.engine.create_snapshot("s")
        for thread in threading.enumerate():
            if thread.name.startswith("Trio thread"):
                thread.join()  # one that is about to become idle would meet the failure

        def lend(length: int) -> int:
            granted = rig.engine.copier.lend(length)
            memory.set_nomemory(1, 2)  # the next allocation is that of the hand-over
            return granted

        requestfilter.set_fastpath(rig.fast._publish, lend, rig.fast._finish)
        try:
            assert [2] == rig.drain(write_request(ACTIVE_HANDLE, 0, NEW), patient=False)
        finally:
            memory.remove_mem_hooks()
        assert {8: (-errno.EIO, b"")} == rig.replies()
        assert [MemoryError] == seen
        assert not rig.fast.collect()["on"]
        assert ([], []) == (rig.handed, rig.engine.copier.ranges)
        assert 1 == len(requestfilter.ended_copies())  # it has ended, and changed nothing
        assert OLD == bytes(await rig.engine.read_snapshot(layer, 0, SIZE))
    assert image.read_bytes() == OLD


async def test_with_power_durability_first_writes_land_natively(image):
    async with Rig.make(image, durability="power") as rig:
        layer = await rig.engine.create_snapshot("s")
        assert layer.commits is not None
        requests = [
            write_request(ACTIVE_HANDLE, n * CLUSTER + 5, b"x", unique=n) for n in range(1, 16)
        ]
        assert [2] * 15 == rig.drain(*requests)
        assert {n: written(1) for n in range(1, 16)} == rig.replies()
        assert ([], [], []) == (
            rig.handed,
            rig.engine.copier.ranges,
            rig.engine.published_state().promised,
        )
        for bits in (layer.done, layer.commits.done_file.bits):
            assert [(1, 16)] == list(bits.runs(0, 17))
        assert [1] == rig.drain(write_request(ACTIVE_HANDLE, CLUSTER, NEW * 15))
        counters = rig.engine.counters
        assert (15, 15 * CLUSTER) == (counters.cbw_copies, counters.cbw_bytes)
        assert 0 < counters.cbw_seconds
        assert 0 == rig.engine.space._claimed
        assert OLD == bytes(await rig.engine.read_snapshot(layer, 0, SIZE))
        check_bitmaps(rig.engine)


async def test_with_power_durability_copies_that_take_long_become_the_engines(image):
    async with Rig.make(image, durability="power") as rig:
        layer = await rig.engine.create_snapshot("s")
        requests = [write_request(ACTIVE_HANDLE, n * CLUSTER, NEW, unique=n) for n in (1, 2, 4)]
        assert [2, 2, 2] == rig.drain(*requests, patient=False)
        await until_quiet(rig, 3)
        assert [(1, CLUSTER, 0), (2, 2 * CLUSTER, 0), (4, 4 * CLUSTER, 0)] == sorted(rig.handed)
        assert [(1, 3), (4, 5)] == list(layer.done.runs(0, 17))
        assert (0, 0) == (layer.pins, rig.engine.space._claimed)
        assert [2] == rig.drain(write_request(ACTIVE_HANDLE, 9 * CLUSTER, NEW))
        assert OLD == bytes(await rig.engine.read_snapshot(layer, 0, SIZE))
        check_bitmaps(rig.engine)
