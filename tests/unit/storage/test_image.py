from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from snapfs.port._clustercopy import copy_clusters
from snapfs.storage.image import FileImage

K64 = 1 << 16
LIMITER = trio.CapacityLimiter(4)


@pytest.fixture
def make(tmp_path: Path) -> Iterator:
    images = []

    def factory(content: bytes | int) -> FileImage:
        fd = os.open(tmp_path / f"image{len(images)}", os.O_RDWR | os.O_CREAT)
        if isinstance(content, int):
            os.ftruncate(fd, content)
        else:
            os.write(fd, content)
        images.append(FileImage(fd, limiter=LIMITER))
        return images[-1]

    yield factory
    for image in images:
        image.close()


def everything(image: FileImage) -> bytes:
    return os.pread(image.fd, 1 << 24, 0)


async def test_reads_are_short_only_at_the_end(make):
    image = make(b"x" * 10_000)
    assert b"x" * 10_000 == await image.pread(0, 20_000)
    assert b"" == await image.pread(10_000, 5)
    assert b"xx" == image.pread_nowait(9_998, 2)
    assert image.pread_nowait(9_998, 3) is None


async def test_writes_of_all_of_it_also_beyond_the_end(make):
    image = make(b"")
    await image.pwrite(K64, os.urandom(0) + b"z" * 3 * K64)
    assert bytes(K64) + b"z" * 3 * K64 == everything(image)
    assert 4 * K64 == image.size()


async def test_punch_keeps_the_size_and_frees(make):
    image = make(b"x" * 4 * K64)
    before = image.blocks()
    await image.punch(K64, 8 * K64)
    assert b"x" * K64 + bytes(3 * K64) == everything(image)
    assert before - 3 * K64 // 512 == image.blocks()


async def test_zero_extends_and_allocate_changes_no_byte(make):
    image = make(b"x" * K64)
    await image.zero(K64 // 2, K64)
    assert b"x" * (K64 // 2) + bytes(K64) == everything(image)
    await image.allocate(0, 2 * K64, True)
    assert K64 * 3 // 2 == image.size()
    await image.allocate(0, 2 * K64, False)
    assert b"x" * (K64 // 2) + bytes(K64 * 3 // 2) == everything(image)


async def test_extents_are_cut_to_the_range_and_the_limit(make):
    image = make(16 * K64)
    for cluster in (1, 4, 5, 9):
        await image.pwrite(cluster * K64, b"x" * K64)
    assert ([(K64, 2 * K64), (4 * K64, 6 * K64), (9 * K64, 10 * K64)], 16 * K64) == (
        await image.data_extents(0, 16 * K64, 99)
    )
    assert ([(5 * K64, 6 * K64)], 6 * K64) == await image.data_extents(5 * K64, 4 * K64, 1)
    assert ([(5 * K64, 5 * K64 + 1)], 5 * K64 + 1) == await image.data_extents(5 * K64, 1, 9)
    assert ([], 16 * K64) == await image.data_extents(10 * K64, 6 * K64, 9)


@pytest.mark.parametrize("size", [1, K64 - 1, K64, 130_000, 4 * K64])
async def test_copies_leave_holes_for_zeros(make, size):
    content = (b"a" * K64 + bytes(K64) + b"b" * 2 * K64)[:size]
    image, target = make(content), make(size)
    written = await image.copy_to(target, 0, size, K64, size)
    assert content == everything(target)
    expected = sum(
        len(content[start : start + K64])
        for start in range(0, size, K64)
        if any(content[start : start + K64])
    )
    assert expected == written
    if size == 4 * K64:
        assert 3 * K64 // 512 == target.blocks()


async def test_a_hole_is_copied_as_a_hole(make):
    image, target = make(1 << 40), make(1 << 40)
    await image.pwrite(3 << 30, b"x" * K64)
    assert K64 == await image.copy_to(target, 2 << 30, 2 << 30, K64, K64)
    assert b"x" * K64 == await target.pread(3 << 30, K64)
    assert K64 // 512 == target.blocks()


async def test_a_failing_copy_has_the_errno_of_the_system(make, tmp_path):
    image = make(b"x" * K64)
    full = FileImage(os.open("/dev/full", os.O_RDWR), limiter=LIMITER)
    with pytest.raises(OSError, match="No space left"):
        await image.copy_to(full, 0, K64, K64, K64)
    full.close()


async def test_a_copy_stops_before_its_budget_is_passed_and_zeros_cost_nothing(make):
    image, target = make(bytes(4 * K64) + b"x" * 3 * K64), make(7 * K64)
    assert 0 == await image.copy_to(target, 0, 4 * K64, K64, 0)
    with pytest.raises(OSError, match="No space left"):
        await image.copy_to(target, 0, 7 * K64, K64, 3 * K64 - 1)
    assert 0 == target.blocks()
    assert 3 * K64 == await image.copy_to(target, 0, 7 * K64, K64, 3 * K64)


async def test_durable_copies_that_queue_up_share_one_sync_and_its_failure(make, monkeypatch):
    """What is written while a sync fails may be what it failed for: the next would not tell."""
    image, target = make(b"x" * 4 * K64), make(4 * K64)
    reached, go = threading.Event(), threading.Event()
    syncs: list[bytes] = []

    def fdatasync(fd: int) -> None:
        assert target.fd == fd
        syncs.append(bytes(everything(target)[::K64]))
        if len(syncs) == 1:
            reached.set()
            go.wait()
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    results = []

    async def copy(cluster: int) -> None:
        try:
            results.append(await image.copy_to(target, cluster * K64, K64, K64, K64, True))
        except OSError as error:
            results.append(error.errno)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(copy, 0)
        await trio.to_thread.run_sync(reached.wait)
        for cluster in (1, 2, 3):
            nursery.start_soon(copy, cluster)
        while len(target._syncs._queue) < 3:  # all are copied and wait for the next sync
            await trio.lowlevel.checkpoint()
        go.set()
    assert [errno.EIO] * 4 == results
    assert [b"x\0\0\0", b"xxxx"] == syncs
    results.clear()
    await copy(2)
    assert [K64] == results


async def test_a_durable_copy_that_takes_long_holds_up_no_other(make, monkeypatch):
    image, target = make(b"x" * 4 * K64), make(4 * K64)
    reached, go = threading.Event(), threading.Event()

    def slow(source: int, temp: int, offset: int, *rest: int) -> int:
        if not offset:
            reached.set()
            go.wait()
        return copy_clusters(source, temp, offset, *rest)

    monkeypatch.setattr("snapfs.storage.image.copy_clusters", slow)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(image.copy_to, target, 0, K64, K64, K64, True)
        await trio.to_thread.run_sync(reached.wait)
        assert K64 == await image.copy_to(target, K64, K64, K64, K64, True)
        assert b"\0x\0\0" == bytes(everything(target)[::K64])
        go.set()


async def test_a_close_that_fails_has_closed(make, monkeypatch):
    """As close(2) of NFS may; another file may have the descriptor by then."""
    image = make(0)
    real, closed = os.close, []

    def close(fd: int) -> None:
        closed.append(fd)
        real(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "close", close)
    with pytest.raises(OSError, match="Input/output"):
        image.close()
    image.close()
    assert 1 == len(closed)
