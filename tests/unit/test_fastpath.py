"""What the fast path answers, and what it leaves to Python."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import pytest
from fastpaths import (
    ACTIVE,
    ACTIVE_HANDLE,
    CLUSTER,
    IN_HEADER,
    READ,
    WRITE,
    Rig,
    read_request,
    write_request,
)

from snapfs import requestfilter
from snapfs.fastpath import FIRST_SNAPSHOT
from snapfs.reqlist import entered

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


async def test_a_pending_cluster_is_pythons_and_its_neighbours_are_not(image):
    async with Rig.make(image) as rig:
        layer = await rig.engine.create_snapshot("s")
        await rig.engine.write(3 * CLUSTER, NEW)
        await rig.engine.write(4 * CLUSTER, NEW)
        assert written(2 * CLUSTER) == rig.send(write_request(ACTIVE_HANDLE, 3 * CLUSTER, NEW * 2))
        for offset in (3 * CLUSTER - 1, 4 * CLUSTER + 1, 2 * CLUSTER, 5 * CLUSTER):
            assert rig.send(write_request(ACTIVE_HANDLE, offset, NEW)) is None
        assert (0, OLD) == rig.send(
            read_request(FIRST_SNAPSHOT + layer.id, rig.handle(layer), 0, SIZE)
        )


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


async def test_dirty_bits_are_set_before_the_write_and_need_room(image, monkeypatch):
    async with Rig.make(image) as rig:
        first, second = bytearray(3), bytearray(3)
        plain = rig.engine.moment

        def with_dirty(*bitmaps):
            monkeypatch.setattr(rig.engine, "moment", lambda: plain()._replace(dirty=list(bitmaps)))

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


async def test_what_is_not_in_the_page_cache_is_pythons(image):
    """Reads, and writes that would read a part of a page first."""
    async with Rig.make(image) as rig:

        def drop() -> None:
            os.fsync(rig.store.image.fd)
            os.posix_fadvise(rig.store.image.fd, 0, 0, os.POSIX_FADV_DONTNEED)

        drop()
        try:
            os.preadv(rig.store.image.fd, [bytearray(1)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            drop()  # the failed read begins to read ahead
        else:
            pytest.skip("this file system keeps its pages")
        assert rig.send(read_request(ACTIVE, ACTIVE_HANDLE, 0, 1)) is None
        for offset, size in ((1, 1), (0, 1), (CLUSTER - 1, CLUSTER + 1), (0, CLUSTER + 1)):
            drop()
            assert rig.send(write_request(ACTIVE_HANDLE, offset, bytes(size))) is None
        assert rig.settled_activity() == rig.activity()
        assert written(CLUSTER) == rig.send(write_request(ACTIVE_HANDLE, 0, NEW))
        assert written(1) == rig.send(write_request(ACTIVE_HANDLE, 1, b"x"))


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


async def test_an_empty_image(tmp_path):
    image = tmp_path / "empty"
    image.touch()
    async with Rig.make(image) as rig:
        assert (0, b"") == rig.send(read_request(ACTIVE, ACTIVE_HANDLE, 0, 4096))
        assert rig.send(write_request(ACTIVE_HANDLE, 0, b"x")) is None


@pytest.mark.parametrize(
    "state",
    [7, (), (1, 2), (0, 1, 12, True, False, [], [], [], bytearray(), bytearray(56))],
    ids=["not a tuple", "empty", "short", "bitmap too short"],
)
async def test_nonsense_switches_it_off(image, state, monkeypatch):
    seen = []
    monkeypatch.setattr("sys.unraisablehook", lambda args: seen.append(str(args.exc_value)))
    async with Rig.make(image) as rig:
        requestfilter.set_fastpath(lambda: state)
        assert rig.send(read_request(ACTIVE, ACTIVE_HANDLE, 0, 1)) is None
        assert 1 == len(seen)
        assert rig.send(read_request(ACTIVE, ACTIVE_HANDLE, 0, 1)) is None
        assert 1 == len(seen)
        assert not rig.fast.collect()["on"]


async def test_off_or_not_now_everything_is_pythons(image):
    async with Rig.make(image, on=False) as rig:
        assert rig.send(read_request(ACTIVE, ACTIVE_HANDLE, 0, 1)) is None
        requestfilter.set_fastpath(lambda: None)
        assert rig.send(read_request(ACTIVE, ACTIVE_HANDLE, 0, 1)) is None
        assert rig.fast.collect()["on"]


@pytest.mark.parametrize("seed", range(4))
async def test_junk_is_answered_by_nobody_or_truly(image, seed):
    """Requests with random bytes in them: no crash, no write outside of what they say."""
    chance = random.Random(seed)
    async with Rig.make(image) as rig:
        layer = await rig.engine.create_snapshot("s")
        await rig.engine.write(0, OLD[: 8 * CLUSTER])
        handle, inode = rig.handle(layer), FIRST_SNAPSHOT + layer.id
        rig.device.setblocking(False)
        for _ in range(5000):
            request = bytearray(
                chance.choice(
                    (
                        read_request(ACTIVE, ACTIVE_HANDLE, chance.randrange(SIZE), 4096),
                        read_request(inode, handle, chance.randrange(SIZE), CLUSTER * 3),
                        write_request(ACTIVE_HANDLE, 0, OLD[: chance.randrange(4096)]),
                    )
                )
            )
            for _ in range(chance.randrange(4)):
                request[chance.randrange(min(len(request), 80))] = chance.choice(
                    (0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256))
                )
            del request[chance.choice((len(request), chance.randrange(len(request) + 1))) :]
            rig.send(bytes(request))
        assert OLD == bytes(await rig.engine.read_snapshot(layer, 0, SIZE))
        assert SIZE == rig.store.image.size()
        assert OLD[8 * CLUSTER :] == image.read_bytes()[8 * CLUSTER :]
