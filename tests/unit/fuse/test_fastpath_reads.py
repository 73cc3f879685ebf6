"""What the fast path reads by itself, and what it leaves to Python."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
import threading
import time
from pathlib import Path

import pytest
import trio

from snapfs.fuse import requestfilter
from snapfs.fuse.fastpath import FIRST_SNAPSHOT
from tests.support.fastpaths import (
    ACTIVE,
    ACTIVE_HANDLE,
    CLUSTER,
    HELPED,
    NEW,
    OLD,
    SIZE,
    Rig,
    read_request,
    until_quiet,
    write_request,
    written,
)


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


async def test_where_snapshots_are_read_is_counted_by_region(image):
    async with Rig.make(image) as rig:
        layer = await rig.engine.create_snapshot("s")
        inode, handle = FIRST_SNAPSHOT + layer.id, rig.handle(layer)
        rig.send(read_request(inode, handle, 0, 1))  # now the regions are of this image
        before = rig.fast.region_reads(CLUSTER)
        rig.send(read_request(inode, handle, 2 * CLUSTER - 1, CLUSTER + 2))
        rig.send(read_request(inode, handle, SIZE - 1, 10))
        rig.send(read_request(inode, handle, SIZE, 10))  # nothing there
        rig.send(read_request(ACTIVE, ACTIVE_HANDLE, 0, SIZE))
        now = rig.fast.region_reads(CLUSTER)
        changed = {region: n - before[region] for region, n in enumerate(now) if n - before[region]}
        assert {1: 1, 2: 1, 3: 1, SIZE // CLUSTER: 1} == changed
        assert [] == rig.fast.region_reads(2 * CLUSTER)
