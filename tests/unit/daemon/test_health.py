"""What is called wrong with a mount: each fact, and what to do about it."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from snapfs.daemon.health import Problem, problems
from tests.support.fakes import Bench, pattern
from tests.support.images import CLUSTER, Space


@asynccontextmanager
async def bench(**settings) -> AsyncIterator[Bench]:
    async with trio.open_nursery() as nursery:
        it = Bench.make(nursery, pattern(1, 8 * CLUSTER), **settings)
        await it.engine.space.refresh()
        yield it
        nursery.cancel_scope.cancel()


def found(it: Bench, trouble: str | None = None) -> list[Problem]:
    return problems(it.engine, trouble, "/mnt/d", "/vm/disk.img")


async def test_nothing_is_wrong():
    async with bench() as it:
        await it.engine.create_snapshot("s")
        await it.engine.write(0, b"x")
        await it.engine.tracker.add("b")
        assert [] == found(it)


async def test_what_the_face_and_the_image_say():
    async with bench() as it:
        it.engine._is_unhealthy("the image was cut")
        first, second = found(it, "a bug")
        assert ("error", "internal", "a bug") == (first.severity, first.kind, first.message)
        assert ("error", "image", "the image was cut") == (
            second.severity, second.kind, second.message,
        )  # fmt: skip
        assert "/vm/disk.img" in second.remedy


@pytest.mark.parametrize("policy", ["break-guest-write", "break-snapshot"])
async def test_writes_of_the_guest_that_fail_for_want_of_temp_space(policy):
    async with bench(temp_limit=0, on_cbw_error=policy) as it:
        await it.engine.create_snapshot("s")
        (space,) = found(it)
        assert ("error", "temp-space") == (space.severity, space.kind)
        assert "snapfs limit /mnt/d SIZE" in space.remedy
        if policy == "break-snapshot":
            await it.engine.write(0, b"x")
            _, snapshot = found(it)
            assert ("error", "incomplete") == (snapshot.severity, snapshot.kind)
            assert "1 snapshot is incomplete (s)" in snapshot.message
        else:
            with pytest.raises(OSError):
                await it.engine.write(0, b"x")
            write, _ = found(it)
            assert ("error", "guest-writes") == (write.severity, write.kind)
            assert "1 write to active failed" in write.message
            assert "temp-limit=0 is reached" in write.message
            assert "snapfs limit /mnt/d SIZE" in write.remedy
            assert "guest" in write.remedy


async def test_writes_that_fail_because_the_image_cannot_grow():
    async with bench() as it:
        it.image.fail("pwrite", errno=errno.ENOSPC)
        for _ in range(2):
            with pytest.raises(OSError):
                await it.engine.write(0, b"x")
        (write,) = found(it)
        assert "2 writes to active failed" in write.message
        assert os.strerror(errno.ENOSPC) in write.message
        assert "the file system of /vm/disk.img" in write.remedy
        it.engine.write_failures._when -= 1e6
        it.engine.counters.writes += 1
        (write,) = found(it)
        assert "warning" == write.severity


async def test_temp_space_is_a_warning_before_it_is_gone_and_while_nothing_needs_it():
    async with bench(temp_limit=4 * CLUSTER) as it:
        assert [] == found(it)
        await it.engine.create_snapshot("s")
        await it.engine.write(0, b"x" * 3 * CLUSTER)
        assert [] == found(it)
        it.engine.space.set_limit(3 * CLUSTER + CLUSTER // 2)
        (space,) = found(it)
        assert ("error", "temp-space") == (space.severity, space.kind)
        await it.engine.write(3 * CLUSTER, b"x")
        await it.engine.discard(it.engine.find("s"), 0, 8 * CLUSTER)
        assert ["warning"] == [each.severity for each in found(it) if each.kind == "temp-space"]
        await it.engine.delete_snapshot("s")
        it.engine.space.set_limit(0)
        await it.engine.space.refresh()
        (space,) = found(it)
        assert "warning" == space.severity


async def test_temp_images_near_their_limit():
    async with bench(temp_limit=100 * CLUSTER) as it:
        await it.engine.create_snapshot("s")
        await it.engine.write(0, b"x" * 8 * CLUSTER)
        it.engine.space.set_limit(9 * CLUSTER + 100)
        (space,) = found(it)
        assert ("warning", "temp-space") == (space.severity, space.kind)
        assert "80 %" in space.message


async def test_temp_storage_that_does_not_answer():
    async with bench() as it:
        it.engine.space.clock = lambda: 1e12
        (storage,) = found(it)
        assert ("warning", "temp-storage") == (storage.severity, storage.kind)
        await it.engine.create_snapshot("s")
        assert "error" == found(it)[0].severity


async def test_lost_snapshots_and_inconsistent_bitmaps_are_named_but_not_all():
    async with bench(space=Space()) as it:
        for number in range(5):
            layer = await it.engine.create_snapshot(f"s{number}")
            layer.lose_all("the disk is gone", errno.EIO)
        bitmap = await it.engine.tracker.add("b")
        it.engine.tracker.bitmaps.spoil(bitmap, "it could not be written back")
        lost, bitmaps = found(it)
        assert "5 snapshots are lost (s0, s1, s2 and 2 more): the disk is gone" == lost.message
        assert "snapfs delete /mnt/d NAME" in lost.remedy
        assert "1 bitmap is inconsistent (b): it could not be written back" == bitmaps.message
        assert ["error"] * 2 == [lost.severity, bitmaps.severity]
