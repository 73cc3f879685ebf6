"""What the fast path writes by itself, and what it leaves to Python."""

from __future__ import annotations

import os

import pytest
import trio

from snapfs.engine.reqlist import entered
from snapfs.fuse import requestfilter
from snapfs.fuse.fastpath import FIRST_SNAPSHOT
from snapfs.state import activitywords
from tests.support.fastpaths import (
    ACTIVE,
    ACTIVE_HANDLE,
    CLUSTER,
    HELPED,
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


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (5, 3 * CLUSTER), (SIZE - 7, 7), (0, SIZE)])
async def test_writes_inside_the_image(image, offset, size):
    data = os.urandom(size)
    async with Rig.make(image) as rig:
        assert written(size) == rig.send(write_request(ACTIVE_HANDLE, offset, data))
        rig.fast.collect()
        assert 1 == rig.engine.counters.writes
        assert rig.settled_activity() == rig.activity()
    assert OLD[:offset] + data + OLD[offset + size :] == image.read_bytes()


async def test_a_write_past_the_end_is_pythons(image):
    async with Rig.make(image) as rig:
        for offset in (SIZE, SIZE - 1, SIZE - CLUSTER + 1, SIZE + CLUSTER, 1 << 62):
            assert rig.send(write_request(ACTIVE_HANDLE, offset, NEW)) is None
    assert OLD == image.read_bytes()


async def test_large_writes_one_after_the_other(large):
    async with Rig.make(large) as rig:
        assert [1] == rig.drain(write_request(ACTIVE_HANDLE, 0, NEW))  # what the file system can
        before = requestfilter.fastpath_statistics()["writes"]
        content = os.urandom(4 * HELPED)
        requests = [
            write_request(ACTIVE_HANDLE, offset, content[offset : offset + HELPED], unique=number)
            for number, offset in enumerate(range(0, 4 * HELPED, HELPED), 20)
        ]
        assert [1] * 4 == rig.drain(*requests)
        replies = rig.replies()
        assert [written(HELPED)] * 4 == [replies[number] for number in range(20, 24)]
        assert before + 4 == requestfilter.fastpath_statistics()["writes"]
    assert content == large.read_bytes()


async def test_a_large_write_that_fails_is_pythons(large):
    async with Rig.make(large) as rig:
        assert [1] == rig.drain(write_request(ACTIVE_HANDLE, 0, NEW))
        rig.replies()
        before = requestfilter.fastpath_statistics()["writes"]
        with full(rig.store.image.fd):
            verdicts = rig.drain(write_request(ACTIVE_HANDLE, HELPED, os.urandom(HELPED)))
        assert before == requestfilter.fastpath_statistics()["writes"]
        assert ([1], {}) == (verdicts, rig.replies())
        await trio.testing.wait_all_tasks_blocked()
        while not rig.handed:
            await trio.lowlevel.checkpoint()
        assert [(8, HELPED, 0)] == rig.handed


async def test_of_several_large_writes_that_fail_each_is_pythons_once(large):
    async with Rig.make(large) as rig:
        assert [1] == rig.drain(write_request(ACTIVE_HANDLE, 0, NEW))
        rig.replies()
        data = os.urandom(HELPED)
        requests = [write_request(ACTIVE_HANDLE, 0, data, unique=n) for n in range(20, 28)]
        with full(rig.store.image.fd):
            assert [1, *[0] * 7] == rig.drain(*requests)  # the first one the helper's
        await until_quiet(rig, 1)
        assert ([(20, 0, 0)], {}) == (rig.handed, rig.replies())


async def test_a_write_that_fails_is_pythons(image, tmp_path):
    async with Rig.make(image) as rig:
        fd = os.open(image, os.O_RDONLY)
        good = os.dup(rig.store.image.fd)
        os.dup2(fd, rig.store.image.fd)  # writing is EBADF
        assert rig.send(write_request(ACTIVE_HANDLE, 0, NEW)) is None
        os.dup2(good, rig.store.image.fd)
        os.close(fd)
        os.close(good)
        assert rig.settled_activity() == rig.activity()


async def test_a_frozen_read_keeps_writes_to_its_clusters_out(image):
    async with Rig.make(image) as rig:
        with entered(rig.engine._frozen_reads, 3, 5):
            assert rig.send(write_request(ACTIVE_HANDLE, 5 * CLUSTER - 1, b"x")) is None
            assert rig.send(write_request(ACTIVE_HANDLE, 2 * CLUSTER, NEW + b"x")) is None
            assert written(1) == rig.send(write_request(ACTIVE_HANDLE, 5 * CLUSTER, b"x"))
            assert written(CLUSTER) == rig.send(write_request(ACTIVE_HANDLE, 2 * CLUSTER, NEW))
        assert written(1) == rig.send(write_request(ACTIVE_HANDLE, 5 * CLUSTER - 1, b"x"))


async def test_a_closed_gate_keeps_writes_out_and_reads_not(image):
    async with Rig.make(image) as rig:
        async with rig.engine._gate.closed():
            assert rig.send(write_request(ACTIVE_HANDLE, 0, NEW)) is None
            assert (0, OLD[:9]) == rig.send(read_request(ACTIVE, ACTIVE_HANDLE, 0, 9))
        assert written(CLUSTER) == rig.send(write_request(ACTIVE_HANDLE, 0, NEW))


async def test_a_read_only_mount_writes_nothing(image):
    async with Rig.make(image) as rig:
        rig.engine.read_only = True
        assert rig.send(write_request(ACTIVE_HANDLE, 0, NEW)) is None


async def test_a_write_beside_one_of_pythons_leaves_the_record_to_it(image):
    async with Rig.make(image) as rig:
        rig.store.write_started(SIZE)
        assert written(CLUSTER) == rig.send(write_request(ACTIVE_HANDLE, 0, NEW))
        assert 1 == rig.activity()[0]
        rig.store.write_finished()
        assert rig.settled_activity() == rig.activity()


def test_native_code_and_python_agree_on_the_words_of_the_record():
    requestfilter.load()
    expected = {
        name: getattr(activitywords, name.upper())
        for name in ("magic", "session", "under_way", "size", "mtime", "ctime", "alive", "failed")
    }
    assert expected == requestfilter.activity_words()


async def test_dirty_bits_are_set_before_the_write_and_need_room(image, monkeypatch):
    async with Rig.make(image) as rig:
        first, second = bytearray(3), bytearray(3)
        plain = rig.engine.published_state

        def with_dirty(*bitmaps):
            monkeypatch.setattr(
                rig.engine, "published_state", lambda: plain()._replace(dirty=list(bitmaps))
            )

        with_dirty(first, second)
        assert written(2) == rig.send(write_request(ACTIVE_HANDLE, 9 * CLUSTER - 1, b"xy"))
        assert bytes([0, 0b11, 0]) == first == second
        assert written(1) == rig.send(write_request(ACTIVE_HANDLE, SIZE - 1, b"x"))
        assert bytes([0, 0b11, 1]) == first
        short = bytearray(1)
        with_dirty(first, short)
        assert rig.send(write_request(ACTIVE_HANDLE, 8 * CLUSTER, b"x")) is None
        assert written(1) == rig.send(write_request(ACTIVE_HANDLE, 0, b"x"))
        assert bytes([1]) == short


async def test_a_dirty_bitmap_has_what_is_written_natively(image):
    async with Rig.make(image) as rig:
        await rig.engine.tracker.add("b")
        layer = await rig.engine.create_snapshot("s")
        assert written(1) == rig.send(write_request(ACTIVE_HANDLE, 3 * CLUSTER, b"x"))
        assert layer.done.get(3)
        clusters = rig.engine.geometry.clusters
        bits = rig.engine.tracker.bitmaps.wanted("b", clusters)
        assert [3] == [cluster for cluster in range(clusters) if bits[cluster]]


async def test_what_must_be_durable_before_a_write_is_not_written_natively(image):
    async with Rig.make(image, durability="power") as rig:
        assert written(1) == rig.send(write_request(ACTIVE_HANDLE, 0, b"x"))
        await rig.engine.tracker.add("b")
        assert rig.send(write_request(ACTIVE_HANDLE, CLUSTER, b"x")) is None
        await rig.engine.write(CLUSTER, b"x")
        assert written(1) == rig.send(write_request(ACTIVE_HANDLE, CLUSTER, b"x"))
        await rig.engine.tracker.add("c")
        for offset in (CLUSTER, 2 * CLUSTER - 1):
            assert rig.send(write_request(ACTIVE_HANDLE, offset, b"xy")) is None
        await rig.engine.write(CLUSTER, b"x")
        assert written(1) == rig.send(write_request(ACTIVE_HANDLE, CLUSTER, b"x"))


async def test_what_python_makes_durable_is_not_written_natively_meanwhile(image, monkeypatch):
    async with Rig.make(image, durability="power") as rig:
        layer = await rig.engine.create_snapshot("s")
        seen, real = [], os.fdatasync

        def fdatasync(fd: int) -> None:
            real(fd)
            if layer.done.get(0):  # not durable yet: it is in the thread that syncs it
                seen.append(rig.engine.published_state().promised)

        monkeypatch.setattr(os, "fdatasync", fdatasync)
        await rig.engine.write(0, b"x")
        assert [[(0, 1)]] == seen
        assert written(1) == rig.send(write_request(ACTIVE_HANDLE, 0, b"y"))
        assert OLD == bytes(await rig.engine.read_snapshot(layer, 0, SIZE))
    assert b"y" + OLD[1:] == image.read_bytes()


async def test_nothing_is_written_natively_while_a_promise_is_not_kept(image):
    async with Rig.make(image, durability="power") as rig:
        await rig.engine.tracker.add("b")
        rig.engine.tracker.shrank()  # the bitmap is inconsistent, which is not durable yet
        assert rig.send(write_request(ACTIVE_HANDLE, 0, b"x")) is None
        await rig.engine.write(0, b"x")
        assert written(1) == rig.send(write_request(ACTIVE_HANDLE, 0, b"x"))


async def test_a_promise_keeps_native_writes_from_its_clusters_and_no_others(image):
    async with Rig.make(image, durability="power") as rig:
        layer = await rig.engine.create_snapshot("s")
        await rig.engine.discard(layer, 2 * CLUSTER, 6 * CLUSTER)
        assert layer.commits is not None
        rig.engine.copier.promises.make(layer.commits.access, 3, 5)
        assert written(1) == rig.send(write_request(ACTIVE_HANDLE, 3 * CLUSTER - 1, b"x"))
        for first in (3, 4):
            assert rig.send(write_request(ACTIVE_HANDLE, first * CLUSTER, b"x")) is None
        assert rig.send(write_request(ACTIVE_HANDLE, 3 * CLUSTER - 1, b"xy")) is None
        assert written(1) == rig.send(write_request(ACTIVE_HANDLE, 5 * CLUSTER, b"x"))
        await rig.engine.copier.promises.kept(3, 5)
        assert written(1) == rig.send(write_request(ACTIVE_HANDLE, 3 * CLUSTER, b"x"))


async def test_more_promises_than_there_is_room_for_keep_all_writes_out(image):
    async with Rig.make(image, durability="power") as rig:
        layer = await rig.engine.create_snapshot("s")
        await rig.engine.discard(layer, 2 * CLUSTER, 6 * CLUSTER)
        assert layer.commits is not None
        for count, answer in ((256, written(1)), (1, None)):
            for _ in range(count):
                rig.engine.copier.promises.make(layer.commits.access, 3, 4)
            assert answer == rig.send(write_request(ACTIVE_HANDLE, 5 * CLUSTER, b"x"))
        assert (0, OLD[:9]) == rig.send(read_request(ACTIVE, ACTIVE_HANDLE, 0, 9))


async def test_bitmaps_can_grow_and_go_between_drains(image):
    async with Rig.make(image) as rig:
        layer = await rig.engine.create_snapshot("s")
        inode, handle = FIRST_SNAPSHOT + layer.id, rig.handle(layer)
        assert (0, OLD[:1]) == rig.send(read_request(inode, handle, 0, 1))
        await rig.engine.write(100 * CLUSTER, NEW)
        await rig.engine.delete_snapshot("s")
        assert written(CLUSTER) == rig.send(write_request(ACTIVE_HANDLE, 100 * CLUSTER, NEW))
