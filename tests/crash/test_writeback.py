"""Each file fails to be written back, once, at each moment: what says ok has the right bytes.

What of it was not synced by then is gone.  That is looked at in the same engine, after the
daemon was killed, and after it has ended in order.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from attrs import define, field

from snapfs.engine.copier import Settings
from snapfs.engine.engine import Engine
from snapfs.errors import AccessDenied, BitmapUnusable, SnapfsError, SnapshotLost, SnapshotNotFound
from snapfs.state.store import Store
from tests.support.losing import Losing
from tests.support.stores import as_left

CLUSTER = 4096
SIZE = 6 * CLUSTER + 77
FIRST = bytes(range(1, 252)) * (SIZE // 251 + 1)
FIRST = FIRST[:SIZE]
LIMITER = trio.CapacityLimiter(4)
FILES = ("image", "temp", "done", "access", "losses", "bitmaps", "manifest", "activity")


@define
class Model:
    """What snapshots must show, and what bitmaps began with."""

    moments: dict[str, bytes] = field(factory=dict)
    given_up: set[tuple[str, int]] = field(factory=set)
    begun: dict[str, bytes] = field(factory=dict)


@define
class Session:
    """A store and an engine, and what was done with them."""

    disk: Path
    store: Store
    engine: Engine
    model: Model

    async def create(self, name: str) -> None:
        real = self.engine._stack.append

        def append(layer) -> None:
            real(layer)
            self.model.moments[name] = self.content()

        self.engine._stack.append = append  # type: ignore[method-assign]
        try:
            await self.engine.create_snapshot(name)
        finally:
            self.engine._stack.append = real  # type: ignore[method-assign]

    def content(self) -> bytes:
        """What was written to the image, whatever is there."""
        return bytes(self.written)

    written: bytearray = field(factory=bytearray)

    async def write(self, offset: int, data: bytes) -> None:
        await self.engine.write(offset, data)
        self.written[offset : offset + len(data)] = data

    async def discard(self, name: str, cluster: int) -> None:
        self.model.given_up.add((name, cluster))
        await self.engine.discard(self.engine.find(name), cluster * CLUSTER, CLUSTER)

    async def track(self, name: str) -> None:
        await self.engine.tracker.add(name)
        self.model.begun[name] = self.content()


STEPS: list[Callable[[Session], object]] = [
    lambda s: s.create("a"),
    lambda s: s.write(100, b"1" * 2 * CLUSTER),
    lambda s: s.engine.flush(),
    lambda s: s.track("x"),
    lambda s: s.write(3 * CLUSTER, b"2" * CLUSTER),
    lambda s: s.create("b"),
    lambda s: s.write(0, b"3" * CLUSTER),
    lambda s: s.discard("b", 4),
    lambda s: s.write(4 * CLUSTER, b"4" * CLUSTER),
    lambda s: s.engine.delete_snapshot("a"),
    lambda s: s.create("c"),
    lambda s: s.write(5 * CLUSTER, b"5" * 99),
]


@pytest.fixture
def shm():
    """A directory where fsync(2) costs nothing."""
    where = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=where) as path:
        yield Path(path)


@pytest.fixture(autouse=True)
def _no_log():
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def paths_of(disk: Path, kind: str) -> list[Path]:
    state = Path(f"{disk}.snapfs")
    if kind == "image":
        return [disk]
    if kind == "bitmaps":
        return list((state / "bitmaps").glob("*"))
    if kind == "manifest":
        return [state / "manifest.json.new", state / "manifest.json"]
    if kind == "activity":
        return [state / "activity"]
    return list((state / "snapshots").glob(f"*/{kind}"))


async def check(engine: Engine, model: Model, content: bytes, image_failed: bool) -> None:
    for layer in engine.snapshots:
        assert layer.name is not None
        for cluster in range(layer.geometry.clusters):
            part = slice(cluster * CLUSTER, (cluster + 1) * CLUSTER)
            try:
                data = await engine.read_snapshot(layer, part.start, CLUSTER)
            except SnapshotLost:
                assert "lost" == layer.state
                break
            except AccessDenied:
                allowed = (layer.name, cluster) in model.given_up or layer.state != "ok"
                assert allowed, (layer.name, cluster)
                continue
            assert model.moments[layer.name][part] == bytes(data), (layer.name, cluster)
    now = bytes(await engine.read(0, SIZE))
    if not image_failed:
        assert content == now
    for name, begun in model.begun.items():
        try:
            bits = engine.tracker.bitmaps.wanted(name, engine.geometry.clusters)
        except (BitmapUnusable, SnapshotNotFound):
            continue
        for cluster in range(engine.geometry.clusters):
            part = slice(cluster * CLUSTER, (cluster + 1) * CLUSTER)
            assert bits[cluster] or begun[part] == now[part], (name, cluster)


def engine_of(store: Store, nursery: trio.Nursery) -> Engine:
    return Engine(
        store.image, store.geometry, store, nursery,
        layers=store.layers, bitmaps=store.dirty, next_id=store.next_id,
        settings=Settings("break-snapshot", 0),
    )  # fmt: skip


async def reopened(disk: Path, durability: str, model: Model, content: bytes, failed: bool) -> None:
    """What the next mount makes of it, unless it refuses."""
    try:
        store = await Store.open(
            str(disk), cluster_size=CLUSTER, durability=durability, limiter=LIMITER
        )
    except SnapfsError:
        return
    async with trio.open_nursery() as nursery:
        engine = engine_of(store, nursery)
        engine.check_storage()
        await check(engine, model, content, failed)
        await trio.testing.wait_all_tasks_blocked()
    await engine.finish()
    await store.close(engine.layers, list(engine.tracker.bitmaps), synced=True)


def copied(disk: Path, where: Path) -> Path:
    """The files as they are, as a kill leaves them."""
    where.mkdir()
    while True:
        try:
            shutil.copytree(f"{disk}.snapfs", where / "disk.img.snapfs")
            break
        except OSError:  # shutil.Error, too: a list is being saved, or files are removed
            shutil.rmtree(where / "disk.img.snapfs", ignore_errors=True)
    return as_left(Path(shutil.copy2(disk, where / "disk.img")))


class Moment:
    """Loses files of a kind at the Nth call, if there is something to lose, or later."""

    def __init__(self, disk: Path, kind: str, number: int) -> None:
        self.disk, self.kind, self.number = disk, kind, number
        self.count = 0
        self.losing: Losing
        self.lost = False
        self._busy = False

    def call(self) -> None:
        if self._busy or self.lost:
            return
        self.count += 1
        if self.count >= self.number:
            self._busy = True
            self.lost = any([self.losing.lose(path) for path in paths_of(self.disk, self.kind)])
            self._busy = False


async def run(where: Path, monkeypatch, kind: str, durability: str, number: int) -> bool:
    """One moment; False: there is none any more."""
    disk = where / "disk.img"
    disk.write_bytes(FIRST)
    moment = Moment(disk, kind, number)
    with monkeypatch.context() as patch:
        moment.losing = Losing(patch, moment.call)
        moment.losing.start(disk)
        try:
            store = await Store.open(
                str(disk), cluster_size=CLUSTER, durability=durability, limiter=LIMITER
            )
        except OSError:
            return moment.lost  # refused
        model = Model()
        async with trio.open_nursery() as nursery:
            engine = engine_of(store, nursery)
            session = Session(disk, store, engine, model, bytearray(FIRST))
            for step in STEPS:
                try:
                    await step(session)  # type: ignore[misc]
                except (OSError, SnapfsError):
                    pass
                await trio.testing.wait_all_tasks_blocked()
            moment.number = 1 << 60  # it may be lost no more
            failed = kind == "image" and moment.lost
            engine.check_storage()
            await trio.testing.wait_all_tasks_blocked()
            await check(engine, model, session.content(), failed)
            killed = copied(disk, where / "killed")
        complaints = await engine.finish()
        clean = engine.writeback.image_error is None
        try:
            await store.close(engine.layers, list(engine.tracker.bitmaps), clean=clean, synced=True)
        except OSError:
            clean = False
        if failed:
            assert complaints
        ended = disk
    for path in (killed, ended):
        await reopened(path, durability, model, session.content(), failed)
    return moment.lost


@pytest.mark.parametrize("durability", ["process", "power"])
@pytest.mark.parametrize("kind", FILES)
async def test_what_says_ok_is_right(shm, monkeypatch, kind, durability):
    for number in range(1, 1000):
        where = shm / str(number)
        where.mkdir()
        if not await run(where, monkeypatch, kind, durability, number):
            assert number > 1 or kind in ("losses", "access"), "nothing was lost"
            return
        shutil.rmtree(where)
    pytest.fail("it never ends")
