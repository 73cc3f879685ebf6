"""The power fails at any moment: with durability=power no snapshot is lost, or wrong."""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
import time
from pathlib import Path

import pytest
import trio
from attrs import define, field

from snapfs.engine.copier import Settings
from snapfs.engine.engine import Engine
from snapfs.errors import AccessDenied, BitmapUnusable, SnapshotLost, SnapshotNotFound
from snapfs.state import recovery
from snapfs.state.store import Store
from snapfs.storage.image import FileImage
from tests.support.disk import Recorder
from tests.support.stores import as_left

CLUSTER = 4096
CLUSTERS = 9
SIZE = (CLUSTERS - 1) * CLUSTER + 777
LIMITER = trio.CapacityLimiter(4)
A_DAY_AGO = time.time_ns() - 86_400 * 10**9


@define
class Moment:
    """What a snapshot must show.  `settled`: it must be there."""

    content: bytes
    settled: bool = False
    given_up: set[int] = field(factory=set)


@define
class Tracked:
    """What the image was when a dirty bitmap began."""

    content: bytes
    settled: bool = False


@pytest.fixture
def fast_tmp():
    """A directory where fsync(2) costs nothing."""
    where = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=where) as path:
        yield Path(path)


class Session:
    """Random work on a store, with crashes taken on the way."""

    def __init__(self, directory: Path, monkeypatch, seed: int, durability: str, every: int):
        self.chance = random.Random(seed)
        self.directory = directory
        self.durability = durability
        self.every = every
        self.changes = 0
        self.content = bytearray(self.chance.randbytes(SIZE))
        self.moments: dict[str, Moment] = {}
        self.tracked: dict[str, Tracked] = {}
        self.crashes: list[tuple[Path, dict[str, Moment], dict[str, Tracked]]] = []
        self.disk = directory / "disk.img"
        self.disk.write_bytes(self.content)
        os.utime(self.disk, ns=(A_DAY_AGO, A_DAY_AGO))
        self.recorder = Recorder(self.disk, monkeypatch, self.changed)
        self.running = False
        self.writing = trio.Lock()

    def changed(self) -> None:
        self.changes += 1
        if self.running and not self.changes % self.every:
            where = self.directory / f"crash{self.changes}"
            try:
                disk = as_left(self.recorder.crash(where, self.chance))
            except FileNotFoundError:
                shutil.rmtree(where)
                return
            os.utime(disk, ns=(A_DAY_AGO, A_DAY_AGO))
            moments = {
                name: Moment(each.content, each.settled, set(each.given_up))
                for name, each in self.moments.items()
            }
            tracked = {
                name: Tracked(each.content, each.settled) for name, each in self.tracked.items()
            }
            self.crashes.append((disk, moments, tracked))

    async def run(self, steps: int) -> None:
        store = await Store.open(
            str(self.disk), cluster_size=CLUSTER, durability=self.durability, limiter=LIMITER
        )
        settings = Settings(cbw_timeout=0)
        async with trio.open_nursery() as nursery:
            engine = Engine(
                store.image, store.geometry, store, nursery,
                next_id=store.next_id, settings=settings,
            )  # fmt: skip
            self.running = True
            async with trio.open_nursery() as workers:
                for _ in range(3):
                    workers.start_soon(self.write, engine, steps)
                workers.start_soon(self.manage, engine, steps)
            self.running = False
        await store.close(engine.layers, list(engine.tracker.bitmaps))

    async def write(self, engine: Engine, steps: int) -> None:
        for _ in range(steps):
            length = self.chance.choice((1, 500, CLUSTER, 3 * CLUSTER))
            offset = self.chance.randrange(SIZE - 1)
            data = self.chance.randbytes(min(length, SIZE - offset))
            await engine.write(offset, data)

    async def manage(self, engine: Engine, steps: int) -> None:
        for number in range(steps):
            kind = self.chance.choice(("create", "discard", "delete", "flush", "track", "forget"))
            if not number or (kind == "create" and len(self.moments) < 4):
                await self.create(engine, f"s{number}")
            elif kind == "discard" and self.moments:
                name = self.chance.choice(sorted(self.moments))
                first = self.chance.randrange(CLUSTERS)
                count = self.chance.randrange(1, 4)
                self.moments[name].given_up |= set(range(first, first + count))
                await engine.discard(engine.find(name), first * CLUSTER, count * CLUSTER)
            elif kind == "delete" and self.moments and number > steps // 2:  # some are seen
                name = self.chance.choice(sorted(self.moments))
                self.moments[name].settled = False
                await engine.delete_snapshot(name)
                del self.moments[name]
            elif kind == "track" and len(self.tracked) < 2:
                await self.track(engine, f"b{number}")
            elif kind == "forget" and self.tracked:
                name = self.chance.choice(sorted(self.tracked))
                self.tracked[name].settled = False
                await engine.tracker.remove(name)
                del self.tracked[name]
            else:
                await engine.flush()

    async def track(self, engine: Engine, name: str) -> None:
        real = engine.tracker.bitmaps.begin

        def begin(bitmap) -> None:
            real(bitmap)
            self.tracked[name] = Tracked(self.disk.read_bytes())

        engine.tracker.bitmaps.begin = begin  # type: ignore[method-assign]
        try:
            await engine.tracker.add(name)
        finally:
            engine.tracker.bitmaps.begin = real  # type: ignore[method-assign]
        self.tracked[name].settled = True

    async def create(self, engine: Engine, name: str) -> None:
        """The moment of a snapshot is when it enters the stack, with no write under way."""
        real = engine._stack.append

        def append(layer) -> None:
            real(layer)
            self.moments[name] = Moment(self.disk.read_bytes())

        engine._stack.append = append  # type: ignore[method-assign]
        try:
            await engine.create_snapshot(name)
        finally:
            engine._stack.append = real  # type: ignore[method-assign]
        self.moments[name].settled = True


def check_tracked(engine: Engine, disk: Path, tracked: dict[str, Tracked], lost: bool) -> None:
    """Every cluster that differs from what a bitmap began with has its bit."""
    now = disk.read_bytes()
    for name, each in tracked.items():
        try:
            bits = engine.tracker.bitmaps.wanted(name, CLUSTERS)
        except BitmapUnusable as error:
            assert lost or not each.settled, f"{name}: {error}"
            continue
        for cluster in range(CLUSTERS):
            part = slice(cluster * CLUSTER, (cluster + 1) * CLUSTER)
            assert bits[cluster] or now[part] == each.content[part], f"{name} lacks {cluster}"


async def verify(disk: Path, moments: dict, tracked: dict, *, may_be_lost: bool) -> int:
    """Recover; every snapshot is exact.  The number of snapshots seen whole."""
    seen = 0
    store = await Store.open(str(disk), limiter=LIMITER)
    async with trio.open_nursery() as nursery:
        engine = Engine(
            store.image, store.geometry, store, nursery,
            layers=store.layers, bitmaps=store.dirty, next_id=store.next_id,
        )  # fmt: skip
        check_tracked(engine, disk, tracked, may_be_lost)
        assert {layer.name for layer in engine.snapshots} <= set(moments)
        for name, moment in moments.items():
            try:
                layer = engine.find(name)
                engine.open_snapshot(layer)
            except SnapshotNotFound:
                assert not moment.settled, f"{name} is gone"
                continue
            except SnapshotLost:
                assert may_be_lost, f"{name} is lost"
                continue
            for cluster in range(CLUSTERS):
                start = cluster * CLUSTER
                try:
                    data = await engine.read_snapshot(layer, start, CLUSTER)
                except AccessDenied:
                    allowed = cluster in moment.given_up or layer.state == "incomplete"
                    assert allowed, f"{name} lacks cluster {cluster}"
                    continue
                assert bytes(data) == moment.content[start : start + CLUSTER], f"{name} {cluster}"
            seen += 1
            await engine.close_snapshot(layer)
    await store.close(engine.layers, list(engine.tracker.bitmaps))
    return seen


async def crash_and_verify(directory: Path, monkeypatch, seed, durability, steps, every) -> int:
    with monkeypatch.context() as patch:
        session = Session(directory, patch, seed, durability, every)
        await session.run(steps)
    seen = 0
    with monkeypatch.context() as patch:
        patch.setattr(recovery, "boot_id", lambda: "another boot")
        for disk, moments, tracked in session.crashes:
            seen += await verify(disk, moments, tracked, may_be_lost=durability == "process")
            shutil.rmtree(disk.parent)
    assert len(session.crashes) > steps
    return seen


@pytest.mark.parametrize("seed", range(12))
async def test_no_power_cut_loses_a_snapshot(fast_tmp, monkeypatch, seed):
    assert await crash_and_verify(fast_tmp, monkeypatch, seed, "power", 60, 2) > 20


async def test_without_power_durability_snapshots_say_that_they_are_lost(fast_tmp, monkeypatch):
    assert 0 == await crash_and_verify(fast_tmp, monkeypatch, 1, "process", 25, 3)


@pytest.mark.parametrize("seed", range(4))
async def test_what_cannot_be_copied_is_missing_after_a_power_cut(fast_tmp, monkeypatch, seed):
    real, chance = FileImage.copy_to, random.Random(seed)

    async def copy_to(*arguments):
        if chance.random() < 0.3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return await real(*arguments)

    monkeypatch.setattr(FileImage, "copy_to", copy_to)
    await crash_and_verify(fast_tmp, monkeypatch, seed, "power", 20, 3)
