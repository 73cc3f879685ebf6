"""What the fast path answers, and what it leaves to Python."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import socket
import struct
import tempfile
import threading
import time
from pathlib import Path

import pytest
import trio
import trio.testing

from snapfs.engine.reqlist import entered
from snapfs.fuse import requestfilter
from snapfs.fuse.fastpath import FIRST_SNAPSHOT
from snapfs.state import activitywords
from tests.support.fakes import check_bitmaps
from tests.support.fastpaths import (
    ACTIVE,
    ACTIVE_HANDLE,
    CLUSTER,
    IN_HEADER,
    IO_IN,
    READ,
    WRITE,
    Rig,
    read_request,
    write_request,
)

SIZE = 16 * CLUSTER + 100
OLD = bytes(range(1, 252)) * (SIZE // 251 + 1)
OLD = OLD[:SIZE]
NEW = b"\xee" * CLUSTER


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    requestfilter.load()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(OLD)
    return path


def written(size: int) -> tuple[int, bytes]:
    return 0, struct.pack("<II", size, 0)


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 1), (0, SIZE), (100, 9000), (SIZE - 1, 1), (SIZE - 10, 4096), (SIZE, 1), (SIZE + 9, 9)],
)
async def test_reads_of_active(image, offset, size):
    async with Rig.make(image) as rig:
        assert (0, OLD[offset : offset + size]) == rig.send(
            read_request(ACTIVE, ACTIVE_HANDLE, offset, size)
        )
        rig.fast.collect()
        assert 1 == rig.engine.counters.reads


@pytest.mark.parametrize("offset", [0, 1, 4095, 5 * CLUSTER, 3 * CLUSTER + 17])
async def test_large_reads_are_answered_from_the_page_cache_itself(tmp_path, offset):
    image = tmp_path / "large.img"
    content = os.urandom(256 << 10)
    image.write_bytes(content)
    size = 160 << 10
    async with Rig.make(image) as rig:
        layer = await rig.engine.create_snapshot("s")
        await rig.engine.write(10 * CLUSTER, NEW)
        piped = requestfilter.fastpath_statistics()["piped"]
        live = content[: 10 * CLUSTER] + NEW + content[11 * CLUSTER :]
        for inode, handle, expected in (
            (ACTIVE, ACTIVE_HANDLE, live),
            (FIRST_SNAPSHOT + layer.id, rig.handle(layer), content),
        ):
            assert (0, expected[offset : offset + size]) == rig.send(
                read_request(inode, handle, offset, size)
            )
            assert (0, expected[-size + 5 :]) == rig.send(
                read_request(inode, handle, len(content) - size + 5, size)
            )
        assert piped + 4 == requestfilter.fastpath_statistics()["piped"]


async def test_a_large_read_in_many_pieces(tmp_path):
    image = tmp_path / "large.img"
    content = os.urandom(160 << 10)
    image.write_bytes(content)
    async with Rig.make(image) as rig:
        layer = await rig.engine.create_snapshot("s")
        for cluster in range(0, 40, 2):
            await rig.engine.write(cluster * CLUSTER, NEW)
        piped = requestfilter.fastpath_statistics()["piped"]
        assert (0, content) == rig.send(
            read_request(FIRST_SNAPSHOT + layer.id, rig.handle(layer), 0, len(content))
        )
        assert piped == requestfilter.fastpath_statistics()["piped"]


async def test_nothing_is_piped_while_the_image_may_be_cut_or_punched(tmp_path):
    image = tmp_path / "large.img"
    content = os.urandom(160 << 10)
    image.write_bytes(content)
    request = read_request(ACTIVE, ACTIVE_HANDLE, 0, len(content))
    async with Rig.make(image) as rig:
        piped = requestfilter.fastpath_statistics()["piped"]
        async with rig.engine._gate.closed():  # as a resize does
            assert (0, content) == rig.send(request)
        rig.fast.busy += 1  # a task that may punch
        assert (0, content) == rig.send(request)
        assert piped == requestfilter.fastpath_statistics()["piped"]
        rig.fast.busy -= 1
        assert (0, content) == rig.send(request)
        assert piped + 1 == requestfilter.fastpath_statistics()["piped"]


async def test_a_file_that_may_have_to_be_waited_for_is_not_piped():
    """Of a network file system; here of one that does not know RWF_NOWAIT either."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as where:
        image = Path(where) / "large.img"
        image.write_bytes(os.urandom(160 << 10))
        with image.open("rb") as file:
            try:
                os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
                pytest.skip("tmpfs knows RWF_NOWAIT")
            except OSError as error:
                assert errno.EOPNOTSUPP == error.errno
        async with Rig.make(image) as rig:
            piped = requestfilter.fastpath_statistics()["piped"]
            assert rig.send(read_request(ACTIVE, ACTIVE_HANDLE, 0, 160 << 10)) is None
            assert piped == requestfilter.fastpath_statistics()["piped"]


@contextlib.contextmanager
def full(fd):
    """What is written to the descriptor meanwhile fails with ENOSPC."""
    good, other = os.dup(fd), os.open("/dev/full", os.O_RDWR)
    os.dup2(other, fd)
    try:
        yield
    finally:
        os.dup2(good, fd)
        os.close(good)
        os.close(other)


HELPED = 256 << 10  # so large that the helper carries it


@pytest.fixture
def large(tmp_path):
    image = tmp_path / "large.img"
    image.write_bytes(os.urandom(4 * HELPED))
    return image


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


async def test_what_is_being_sent_for_a_snapshot_is_not_overwritten(large):
    """By a write of the same drain, whose cluster is copied meanwhile.

    In the middle: of the last pages, a socket has references.
    """
    moment = large.read_bytes()
    middle = 3 * HELPED + HELPED // 2
    async with Rig.make(large) as rig:
        layer = await rig.engine.create_snapshot("s")
        rig.device.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # the helper waits
        stream = bytearray()

        def receive() -> None:
            """Only after what was there has been copied, and could be overwritten."""
            deadline = time.monotonic() + 5
            copied = moment[middle : middle + CLUSTER]
            while os.pread(layer.temp.fd, CLUSTER, middle) != copied:
                if time.monotonic() > deadline:
                    break
            deadline = time.monotonic() + 0.2
            while time.monotonic() < deadline:
                if os.pread(rig.store.image.fd, CLUSTER, middle) == NEW:
                    break
            rig.kernel.setblocking(True)
            while len(stream) < 16 + HELPED:
                stream.extend(rig.kernel.recv(1 << 20))
            rig.kernel.setblocking(False)

        thread = threading.Thread(target=receive)
        thread.start()
        read = read_request(FIRST_SNAPSHOT + layer.id, rig.handle(layer), 3 * HELPED, HELPED)
        assert [1, 2] == rig.drain(read, write_request(ACTIVE_HANDLE, middle, NEW))
        thread.join()
        assert moment[3 * HELPED :] == stream[16 : 16 + HELPED]
    assert moment[:middle] + NEW + moment[middle + CLUSTER :] == large.read_bytes()


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


async def until_quiet(rig: Rig, handed: int) -> None:
    def busy() -> bool:
        return bool(rig.fast._copies) or any(layer.pins for layer in rig.engine.layers)

    while len(rig.handed) < handed or busy():
        await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(0.001)  # a thread has to end


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
async def test_a_copy_that_hangs_meets_the_timeout(image, policy, monkeypatch, durability):
    """Its end is kept from Python, as if the temp image did not answer."""
    ended = requestfilter.ended_copies
    async with Rig.make(image, durability=durability, cbw_timeout=0.05, on_cbw_error=policy) as rig:
        layer = await rig.engine.create_snapshot("s")
        monkeypatch.setattr(requestfilter, "ended_copies", list)
        with Rig.readable_never(monkeypatch) as let_go:
            assert [2] == rig.drain(write_request(ACTIVE_HANDLE, CLUSTER, NEW), patient=False)
            while not rig.handed:
                await trio.testing.wait_all_tasks_blocked()
                await trio.sleep(0.001)
            lost = policy == "break-snapshot"
            assert [(8, CLUSTER, 0 if lost else errno.ETIMEDOUT)] == rig.handed
            assert [(1, 2)] == rig.engine.copier.ranges
            # others are served: what needs no copy here, what does by Python
            assert (0, OLD[:9]) == rig.send(read_request(ACTIVE, ACTIVE_HANDLE, 0, 9))
            assert rig.send(write_request(ACTIVE_HANDLE, 5 * CLUSTER, NEW)) is None
            await rig.engine.write(5 * CLUSTER, NEW)
            monkeypatch.setattr(requestfilter, "ended_copies", ended)
            let_go()
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
                assert select.select([requestfilter.copies_fd()], [], [], 10)[0], number
                let_go()
                while rig.engine.copier.ranges:
                    await trio.sleep(0)
                monkeypatch.undo()


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


async def test_reads_of_snapshots_find_their_sources(image):
    async with Rig.make(image) as rig:
        first = await rig.engine.create_snapshot("first")
        await rig.engine.write(0, NEW)
        second = await rig.engine.create_snapshot("second")
        await rig.engine.write(CLUSTER, b"\xdd" * CLUSTER * 2)
        for layer, content in ((first, OLD), (second, NEW + OLD[CLUSTER:])):
            inode = FIRST_SNAPSHOT + layer.id
            for offset, size in ((0, SIZE), (CLUSTER - 1, 2), (SIZE - 1, 9), (SIZE, 9), (77, 0)):
                assert (0, content[offset : offset + size]) == rig.send(
                    read_request(inode, rig.handle(layer), offset, size)
                )
        rig.fast.collect()
        assert 10 == rig.engine.counters.snapshot_reads


async def test_what_may_not_be_read_of_a_snapshot_is_pythons(image):
    async with Rig.make(image) as rig:
        layer = await rig.engine.create_snapshot("s")
        inode, handle = FIRST_SNAPSHOT + layer.id, rig.handle(layer)
        await rig.engine.discard(layer, 2 * CLUSTER, CLUSTER)
        assert rig.send(read_request(inode, handle, 2 * CLUSTER - 1, 2)) is None
        assert rig.send(read_request(inode, handle, 3 * CLUSTER - 1, 1)) is None
        assert rig.send(read_request(inode, handle, 0, SIZE)) is None
        assert (0, OLD[: 2 * CLUSTER]) == rig.send(read_request(inode, handle, 0, 2 * CLUSTER))
        rig.quarantine.inodes.add(inode)
        assert rig.send(read_request(inode, handle, 0, 1)) is None
        rig.quarantine.inodes.clear()
        layer.degrade("lost", "a test")
        assert rig.send(read_request(inode, handle, 0, 1)) is None


async def test_a_snapshot_that_is_gone_is_pythons(image):
    async with Rig.make(image) as rig:
        layer = await rig.engine.create_snapshot("s")
        inode, handle = FIRST_SNAPSHOT + layer.id, rig.handle(layer)
        await rig.engine.delete_snapshot("s")
        assert rig.send(read_request(inode, handle, 0, 1)) is None


async def test_a_snapshot_keeps_its_end_when_the_image_shrinks_and_grows(image):
    async with Rig.make(image) as rig:
        layer = await rig.engine.create_snapshot("s")
        inode, handle = FIRST_SNAPSHOT + layer.id, rig.handle(layer)
        await rig.engine.resize(3 * CLUSTER + 5)
        assert (0, OLD) == rig.send(read_request(inode, handle, 0, SIZE))
        assert (0, OLD[3 * CLUSTER : 3 * CLUSTER + 5]) == rig.send(
            read_request(ACTIVE, ACTIVE_HANDLE, 3 * CLUSTER, CLUSTER)
        )
        assert rig.send(write_request(ACTIVE_HANDLE, 3 * CLUSTER, NEW)) is None
        await rig.engine.resize(40 * CLUSTER)
        assert (0, bytes(CLUSTER)) == rig.send(
            read_request(ACTIVE, ACTIVE_HANDLE, 39 * CLUSTER, CLUSTER)
        )
        assert written(CLUSTER) == rig.send(write_request(ACTIVE_HANDLE, 39 * CLUSTER, NEW))
        assert (0, OLD) == rig.send(read_request(inode, handle, 0, 40 * CLUSTER))


@pytest.mark.parametrize("what", ["read", "write"])
async def test_a_request_that_lies_is_pythons(image, what):
    async with Rig.make(image) as rig:
        layer = await rig.engine.create_snapshot("s")
        inode, handle = FIRST_SNAPSHOT + layer.id, rig.handle(layer)
        await rig.engine.write(0, OLD[: 4 * CLUSTER])  # nothing is pending there
        before = image.read_bytes()
        if what == "read":
            good = read_request(ACTIVE, ACTIVE_HANDLE, 0, 100)
            bad = [
                read_request(ACTIVE, handle, 0, 1),  # another file's
                read_request(inode, ACTIVE_HANDLE, 0, 1),
                read_request(ACTIVE, 0, 0, 1),
                read_request(ACTIVE, ACTIVE_HANDLE + 4096, 0, 1),  # the same slot
                read_request(1, ACTIVE_HANDLE, 0, 1),
                read_request(inode + 1, handle, 0, 1),
                read_request(ACTIVE, ACTIVE_HANDLE, 0, (1 << 20) + 1),
                read_request(ACTIVE, ACTIVE_HANDLE, 0, (1 << 32) - 1),
                read_request(ACTIVE, ACTIVE_HANDLE, (1 << 64) - 1, 1),
                read_request(inode, handle, (1 << 63) - 1, 1),
                read_request(inode, handle, (1 << 64) - 4096, 4096),
            ]
        else:
            good = write_request(ACTIVE_HANDLE, 0, NEW)
            bad = [
                write_request(ACTIVE_HANDLE, 0, NEW, size=CLUSTER + 1),
                write_request(ACTIVE_HANDLE, 0, NEW, size=CLUSTER - 1),
                write_request(ACTIVE_HANDLE, 0, NEW, size=(1 << 32) - 1),
                write_request(ACTIVE_HANDLE, 0, b""),
                write_request(ACTIVE_HANDLE, (1 << 64) - 1, NEW),
                write_request(ACTIVE_HANDLE, (1 << 64) - CLUSTER, NEW),
                write_request(ACTIVE_HANDLE, (1 << 63) - 1, NEW),
                write_request(ACTIVE_HANDLE, 0, NEW, flags=1 << 3),
                write_request(handle, 0, NEW),
                write_request(handle, 0, NEW, inode=inode),
                write_request(ACTIVE_HANDLE, 0, NEW, inode=inode),
                write_request(0, 0, NEW),
            ]
        kind = READ if what == "read" else WRITE
        for size in (0, 1, 39, 40, 79, len(good) - 1, len(good) + 1):
            header = IN_HEADER.pack(size, kind, 7, ACTIVE, 0, 0, 1, 0, 0)
            bad.append((header + good[40:] + b"x")[:size])
            bad.append(header + good[40:])  # the header's length is not the request's
        for request in bad:
            assert rig.send(request) is None, request[:80]
        requestfilter.handle_closed(ACTIVE_HANDLE)
        assert rig.send(good) is None
        assert before == image.read_bytes()


@pytest.mark.parametrize("flags", [0, 1, 2, 4, 7])
async def test_known_flags_of_a_write_change_nothing(image, flags):
    async with Rig.make(image) as rig:
        assert written(CLUSTER) == rig.send(write_request(ACTIVE_HANDLE, 0, NEW, flags=flags))


async def test_a_handle_that_was_closed_and_another_in_its_slot(image):
    async with Rig.make(image) as rig:
        requestfilter.handle_opened(ACTIVE_HANDLE + 4096, ACTIVE)
        assert rig.send(read_request(ACTIVE, ACTIVE_HANDLE, 0, 1)) is None
        requestfilter.handle_closed(ACTIVE_HANDLE)  # does not know it any more
        assert (0, OLD[:1]) == rig.send(read_request(ACTIVE, ACTIVE_HANDLE + 4096, 0, 1))


def make_cold(rig: Rig) -> None:
    """Let nothing of the image be in the page cache, and no earlier write count as slow.

    What is on its way from the disk, for reading ahead, cannot be dropped: it is waited for.
    """
    fd = rig.store.image.fd
    os.pread(fd, SIZE, 0)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    rig.fast.start()


def drain_cold(rig: Rig, request: bytes) -> list[int]:
    """What an impatient drain makes of a request whose data is not there.

    Looking for it begins to read it, and it may come before the look is over: then again.
    """
    for _ in range(100):
        make_cold(rig)
        verdicts = rig.drain(request, patient=False)
        if [1] != verdicts:
            break
        rig.replies()
    return verdicts


def keeps_pages(rig: Rig) -> bool:
    """Can nothing be dropped from the page cache?"""
    for _ in range(100):
        make_cold(rig)
        try:
            os.preadv(rig.store.image.fd, [bytearray(1)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
    return True


async def test_what_is_not_in_the_page_cache_waits_or_is_pythons(image):
    """Reads, and writes that would read a part of a page first."""
    async with Rig.make(image) as rig:
        if keeps_pages(rig):
            pytest.skip("this file system keeps its pages")
        cold = rig.fast.collect()["cold"]
        read = read_request(ACTIVE, ACTIVE_HANDLE, 5, 3 * CLUSTER, unique=3, flags=2)
        assert [2] == drain_cold(rig, read)
        assert {} == rig.replies()
        await trio.testing.wait_all_tasks_blocked()
        assert [(3, 5, 3 * CLUSTER, True)] == rig.handed_reads
        make_cold(rig)
        assert (0, OLD[5 : 5 + 3 * CLUSTER]) == rig.send(read)  # when it has come
        for offset, size in ((1, 1), (0, 1), (CLUSTER - 1, CLUSTER + 1), (0, CLUSTER + 1)):
            request = write_request(ACTIVE_HANDLE, offset, b"y" * size)
            assert [2] == drain_cold(rig, request)
            assert {} == rig.replies()
            await until_quiet(rig, 1)
            assert [(8, offset, 0)] == rig.handed
            rig.handed.clear()
            make_cold(rig)
            assert written(size) == rig.send(request)
        assert cold + 5 <= rig.fast.collect()["cold"]
        assert rig.settled_activity() == rig.activity()
        for offset, data in ((0, NEW), (1, b"x")):
            rig.fast.start()  # the one before may have been slow
            assert written(len(data)) == rig.send(write_request(ACTIVE_HANDLE, offset, data))


async def test_a_cold_read_of_a_snapshot(image):
    async with Rig.make(image) as rig:
        layer = await rig.engine.create_snapshot("s")
        await rig.engine.write(2 * CLUSTER, NEW)
        for file in (rig.store.image, layer.temp):
            os.fsync(file.fd)
            os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        request = read_request(FIRST_SNAPSHOT + layer.id, rig.handle(layer), 0, SIZE)
        assert (0, OLD) == rig.send(request)
        await rig.engine.discard(layer, 5 * CLUSTER, CLUSTER)
        assert rig.send(request) is None


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


async def test_bitmaps_can_grow_and_go_between_drains(image):
    async with Rig.make(image) as rig:
        layer = await rig.engine.create_snapshot("s")
        inode, handle = FIRST_SNAPSHOT + layer.id, rig.handle(layer)
        assert (0, OLD[:1]) == rig.send(read_request(inode, handle, 0, 1))
        await rig.engine.write(100 * CLUSTER, NEW)
        await rig.engine.delete_snapshot("s")
        assert written(CLUSTER) == rig.send(write_request(ACTIVE_HANDLE, 100 * CLUSTER, NEW))


async def test_more_layers_or_ranges_than_there_is_room_for(image, monkeypatch):
    async with Rig.make(image) as rig:
        plain = rig.engine.published_state()
        layer = await rig.engine.create_snapshot("s")
        for name, value in (
            ("frozen", (1, 2)),
            ("copying", (1, 2)),
            ("dirty", bytearray(9)),
            ("layers", rig.engine.published_state().layers[0]),
        ):
            for count, answer in ((256, (0, OLD[:9])), (257, None), (0, (0, OLD[:9]))):
                full = plain._replace(**{name: [value] * count})
                monkeypatch.setattr(rig.engine, "published_state", lambda full=full: full)
                assert answer == rig.send(read_request(ACTIVE, ACTIVE_HANDLE, 0, 9)), name
        assert layer.live


async def test_an_empty_image(tmp_path):
    image = tmp_path / "empty"
    image.touch()
    async with Rig.make(image) as rig:
        assert (0, b"") == rig.send(read_request(ACTIVE, ACTIVE_HANDLE, 0, 4096))
        assert rig.send(write_request(ACTIVE_HANDLE, 0, b"x")) is None


@pytest.mark.parametrize(
    "state",
    [
        7,
        (),
        (1, 2),
        (0, 1, 12, True, False, [], False, [], [], [], [], None, bytearray(), bytearray(56)),
    ],
    ids=["not a tuple", "empty", "short", "bitmap too short"],
)
async def test_nonsense_switches_it_off(image, state, monkeypatch):
    seen = []
    monkeypatch.setattr("sys.unraisablehook", lambda args: seen.append(str(args.exc_value)))
    async with Rig.make(image) as rig:
        requestfilter.set_fastpath(lambda: state, int, print)
        assert rig.send(read_request(ACTIVE, ACTIVE_HANDLE, 0, 1)) is None
        assert 1 == len(seen)
        assert rig.send(read_request(ACTIVE, ACTIVE_HANDLE, 0, 1)) is None
        assert 1 == len(seen)
        assert not rig.fast.collect()["on"]


async def test_off_or_not_now_everything_is_pythons(image):
    async with Rig.make(image, on=False) as rig:
        assert rig.send(read_request(ACTIVE, ACTIVE_HANDLE, 0, 1)) is None
        requestfilter.set_fastpath(lambda: None, int, print)
        assert rig.send(read_request(ACTIVE, ACTIVE_HANDLE, 0, 1)) is None
        assert rig.fast.collect()["on"]


@pytest.mark.parametrize("seed", range(4))
async def test_junk_is_answered_by_nobody_or_truly(image, seed):
    """Requests with random bytes in them: what is answered is what they say."""
    chance = random.Random(seed)
    content = bytearray(OLD)
    async with Rig.make(image) as rig:
        layer = await rig.engine.create_snapshot("s")
        await rig.engine.discard(layer, 12 * CLUSTER, CLUSTER)
        handle, inode = rig.handle(layer), FIRST_SNAPSHOT + layer.id
        answered = 0
        for _ in range(5000):
            data = chance.randbytes(chance.randrange(9000))
            request = bytearray(
                chance.choice(
                    (
                        read_request(ACTIVE, ACTIVE_HANDLE, chance.randrange(SIZE), 4096),
                        read_request(inode, handle, chance.randrange(SIZE), CLUSTER * 3),
                        write_request(ACTIVE_HANDLE, chance.randrange(SIZE), data),
                    )
                )
            )
            for _ in range(chance.randrange(4)):
                request[chance.randrange(min(len(request), 80))] = chance.choice(
                    (0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256))
                )
            del request[chance.choice((len(request), chance.randrange(len(request) + 1))) :]
            reply = rig.send(bytes(request))
            if reply is None:
                continue
            answered += 1
            _, kind, _, inode_, *_ = IN_HEADER.unpack_from(request)
            _, offset, size, *_ = IO_IN.unpack_from(request, IN_HEADER.size)
            if kind == WRITE:
                assert written(size) == reply
                assert (ACTIVE, size) == (inode_, len(request) - 80)
                content[offset : offset + size] = request[80:]
            else:
                source = content if inode_ == ACTIVE else OLD
                assert (0, bytes(source[offset : offset + size])) == reply
                assert inode_ == ACTIVE or not {12} & set(
                    layer.geometry.touched(offset, min(size, SIZE - offset))
                )
        assert answered > 500
        first = 12 * CLUSTER
        assert OLD[:first] == bytes(await rig.engine.read_snapshot(layer, 0, first))
        check_bitmaps(rig.engine)
    assert content == image.read_bytes()
