"""The Nth system call fails, or the daemon dies before it, for every N of a transition.

The state is that before or after, never between; snapshots are exact; nothing leaks.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from snapfs.engine.copier import Settings
from snapfs.engine.engine import Engine
from snapfs.errors import AccessDenied, SnapfsError
from snapfs.state import (
    activity,
    dirtyfiles,
    layerfiles,
    layerstore,
    recovery,
    statefiles,
    store,
    tempdirs,
)
from snapfs.state.store import Store
from snapfs.storage import image, locks, mapping
from tests.support.stores import as_left

CLUSTER = 4096
SIZE = 5 * CLUSTER + 77
FIRST = bytes(range(1, 252)) * (SIZE // 251 + 1)
FIRST = FIRST[:SIZE]
SECOND = b"x" * CLUSTER + FIRST[CLUSTER:]  # the moment of b
NOW = b"x" * 100 + b"y" * 2 * CLUSTER + SECOND[2 * CLUSTER + 100 :]
SMALLER = 3 * CLUSTER + 5
A_DAY_AGO = time.time_ns() - 86_400 * 10**9
LIMITER = trio.CapacityLimiter(4)
MODULES = (
    activity, dirtyfiles, image, layerfiles, layerstore, locks, mapping, statefiles, store,
    tempdirs,
)  # fmt: skip
CALLS = {
    "open", "mkdir", "unlink", "rename", "ftruncate", "fsync", "fdatasync", "posix_fallocate",
    "write", "pwrite", "pwritev", "pread", "preadv", "lseek", "listdir", "stat", "fstat",
    "fstatvfs",
}  # fmt: skip


class Calls:
    """Stands between the modules of the state directory and the system."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.armed = False
        self.hook: Callable[[], None] = lambda: None
        self._turn = threading.Lock()  # several threads may call
        for module in MODULES:
            if hasattr(module, "os"):
                # fstat(2) of the open image, after every write, has nothing that could fail.
                left_out = {"fstat"} if module in (activity, image) else set()
                monkeypatch.setattr(module, "os", Wrapped(os, self._wrapped, CALLS - left_out))
        monkeypatch.setattr(mapping, "Mapping", self._wrapped(mapping.Mapping))
        rmtree = Wrapped(shutil, self._wrapped, {"rmtree"})
        monkeypatch.setattr(statefiles, "shutil", rmtree)
        monkeypatch.setattr(locks, "fcntl", Wrapped(locks.fcntl, self._wrapped, {"fcntl"}))
        for name in ("fallocate", "copy_clusters"):
            monkeypatch.setattr(image, name, self._wrapped(getattr(image, name)))

    def _wrapped(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self.armed:
                with self._turn:
                    self.hook()
            return real(*arguments, **options)

        return call


class Wrapped:
    """A module some functions of which are wrapped."""

    def __init__(self, module: Any, wrap: Callable[..., Any], names: set[str]) -> None:
        self._module = module
        self._functions = {
            name: wrap(getattr(module, name)) for name in names if hasattr(module, name)
        }

    def __getattr__(self, name: str) -> Any:
        return self._functions.get(name) or getattr(self._module, name)


class Bench:
    """An image with the snapshots a and b, its state, and one step to be disturbed."""

    def __init__(self, where: Path, durability: str, outside: bool) -> None:
        self.disk = where / "disk.img"
        self.state = Path(f"{self.disk}.snapfs")
        self.temps = where / "temps" if outside else None
        self.durability = durability

    async def open(self) -> Store:
        return await Store.open(
            str(self.disk),
            cluster_size=CLUSTER,
            durability=self.durability,
            temp_dir=None if self.temps is None else str(self.temps),
            limiter=LIMITER,
        )

    async def make(self) -> None:
        self.disk.write_bytes(FIRST)
        if self.temps is not None:
            self.temps.mkdir(mode=0o755)
        async with Opened(await self.open()) as engine:
            await engine.create_snapshot("a")
            await engine.write(0, b"x" * CLUSTER)
            await engine.create_snapshot("b")
            await engine.write(100, b"y" * 2 * CLUSTER)

    def ids(self) -> set[int]:
        """Layers that have files."""
        return {int(name) for name in os.listdir(self.state / "snapshots")}


class Opened:
    """An engine on a store, closed in order at the end."""

    def __init__(self, opened: Store) -> None:
        self.store = opened

    async def __aenter__(self) -> Engine:
        self._manager = trio.open_nursery()
        nursery = await self._manager.__aenter__()
        self.engine = Engine(
            self.store.image, self.store.geometry, self.store, nursery,
            layers=self.store.layers, bitmaps=self.store.dirty, next_id=self.store.next_id,
            settings=Settings("break-guest-write", 0),
        )  # fmt: skip
        return self.engine

    async def __aexit__(self, *error: Any) -> None:
        await self._manager.__aexit__(*error)
        await self.engine.finish()
        await self.store.close(
            self.engine.layers,
            list(self.engine.tracker.bitmaps),
            clean=self.engine.writeback.image_error is None,
            synced=True,
        )


async def create(engine: Engine) -> None:
    await engine.create_snapshot("n")


async def delete_older(engine: Engine) -> None:
    await engine.delete_snapshot("a")


async def delete_newer(engine: Engine) -> None:
    await engine.delete_snapshot("b")


async def discard(engine: Engine) -> None:
    await engine.discard(engine.find("b"), 0, CLUSTER)


async def resize(engine: Engine) -> None:
    await engine.resize(SMALLER)


async def rename(engine: Engine) -> None:
    await engine.rename_snapshot("b", "c")


async def open_store(bench: Bench) -> Store:
    return await bench.open()


async def close_store(opened: Store) -> None:
    await opened.close(opened.layers, opened.dirty)


# The names of the snapshots and the size of the image afterwards.
STEPS: dict[Any, tuple[set[str], int]] = {
    create: ({"a", "b", "n"}, SIZE),
    delete_older: ({"b"}, SIZE),
    delete_newer: ({"a"}, SIZE),
    discard: ({"a", "b"}, SIZE),
    resize: ({"a", "b"}, SMALLER),
    rename: ({"a", "c"}, SIZE),
}
BEFORE = ({"a", "b"}, SIZE)
CONTENTS = {"a": FIRST, "b": SECOND, "c": SECOND, "n": NOW}


def found(engine: Engine) -> tuple[set[str], int]:
    return {layer.name for layer in engine.snapshots if layer.name is not None}, engine.size


async def verify(engine: Engine, step: Any) -> None:
    """Every snapshot is exact; what was being discarded may be closed."""
    assert (await engine.read(0, SIZE)) == NOW[: engine.size]
    for layer in engine.snapshots:
        assert layer.name is not None
        assert "ok" == layer.state, layer.reason
        want = CONTENTS[layer.name]
        for offset in range(0, SIZE, CLUSTER):
            try:
                data = await engine.read_snapshot(layer, offset, CLUSTER)
            except AccessDenied:
                assert (discard, "b", 0) == (step, layer.name, offset)
                continue
            assert bytes(data) == want[offset : offset + CLUSTER], (layer.name, offset)


async def settled(bench: Bench, step: Any, *allowed: tuple[set[str], int]) -> None:
    """The next mount: one of the states allowed, and no files but those of its layers."""
    async with Opened(await bench.open()) as engine:
        assert found(engine) in allowed
        await verify(engine, step)
        layers = {layer.id for layer in engine.layers}
        assert layers == bench.ids()
        for layer in engine.layers:
            for first, stop in layer.done.runs(0, len(layer.done), False):
                leaked = layer.temp.data_bytes(*layer.geometry.whole(first, stop))
                assert not leaked, (layer.id, first, stop)
        assert not (bench.state / "manifest.json.new").exists()
        if bench.temps is not None:
            (private,) = bench.temps.iterdir()
            assert len(layers) == len(os.listdir(private))


def descriptors() -> Counter[str]:
    gc.collect()  # mappings have some
    return Counter(
        os.readlink(f"/proc/self/fd/{name}").removesuffix(" (deleted)")
        for name in os.listdir("/proc/self/fd")
        if os.path.islink(f"/proc/self/fd/{name}")
    )


@pytest.fixture(autouse=True)
def _quick_collections():
    """What was there before a test need not be looked at again and again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_log():
    """pytest keeps what is logged, and with an error the layers in its traceback."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def shm():
    """A directory where fsync(2) costs nothing."""
    where = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=where) as path:
        yield Path(path)


async def run_step(bench: Bench, step: Any, calls: Calls) -> None:
    """Do the step disturbed; in this process the state is that before or after."""
    if step is open_store:
        calls.armed = True
        opened = await open_store(bench)
        calls.armed = False
        async with Opened(opened):
            pass
    elif step is close_store:
        opened = await bench.open()
        calls.armed = True
        await close_store(opened)
    else:
        async with Opened(await bench.open()) as engine:
            failed = False
            calls.armed = True
            try:
                await step(engine)
            except (OSError, SnapfsError):
                failed = True
            await trio.testing.wait_all_tasks_blocked()
            calls.armed = False
            if step is not discard:
                after = STEPS[step]
                assert found(engine) == (BEFORE if failed else after)
            assert engine.unhealthy is None or engine.writeback.image_error is not None
            await verify(engine, step)


async def disturb(where: Path, calls: Calls, step: Any, number: int, variant: Any) -> None:
    for nth in range(1, 1000):
        bench = Bench(where / str(nth), *variant)
        bench.disk.parent.mkdir()
        await bench.make()
        before = descriptors()
        count = 0

        def fail(nth: int = nth) -> None:
            nonlocal count
            count += 1
            if count == nth:
                raise OSError(number, os.strerror(number))

        calls.hook = fail
        try:
            await run_step(bench, step, calls)
        except (OSError, SnapfsError):
            assert step in (open_store, close_store)
        finally:
            calls.armed = False
        allowed = [BEFORE] if step in (open_store, close_store) else [BEFORE, STEPS[step]]
        await settled(bench, step, *allowed)
        await trio.to_thread.run_sync(gc.collect)  # a thread keeps its last result
        leaked = descriptors() - before
        assert not leaked, (nth, leaked)
        shutil.rmtree(bench.disk.parent)
        if count < nth:
            assert nth > 1, "nothing was disturbed"
            return
    pytest.fail("it never ends")


ALL = [*STEPS, open_store, close_store]


@pytest.mark.parametrize("variant", [("process", False), ("power", True)], ids=["process", "power"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("step", ALL, ids=lambda step: step.__name__)
async def test_the_nth_call_fails(shm, monkeypatch, step, number, variant):
    await disturb(shm, Calls(monkeypatch), step, number, variant)


@pytest.mark.parametrize("durability", ["process", "power"])
@pytest.mark.parametrize("step", ALL, ids=lambda step: step.__name__)
async def test_the_daemon_dies_before_the_nth_call(shm, monkeypatch, step, durability):
    calls = Calls(monkeypatch)
    bench = Bench(shm / "live", durability, False)
    bench.disk.parent.mkdir()
    await bench.make()
    crashes: list[Path] = []

    def copy() -> None:
        where = shm / f"crash{len(crashes)}"
        try:
            shutil.copytree(bench.disk.parent, where)
        except (FileNotFoundError, shutil.Error):  # files are being removed in a thread
            shutil.rmtree(where)
            return
        as_left(where / bench.disk.name)
        crashes.append(where)

    calls.hook = copy
    await run_step(bench, step, calls)
    calls.armed = False
    assert crashes
    allowed = [BEFORE] if step in (open_store, close_store) else [BEFORE, STEPS[step]]
    for where in crashes:
        await settled(Bench(where, durability, False), step, *allowed)


# Two recoveries in a row


def changed(disk: Path) -> None:
    before = disk.stat().st_mtime_ns
    while disk.stat().st_mtime_ns == before:  # a copy, whose times were set, has coarse ones
        with open(disk, "r+b") as file:
            os.pwrite(file.fileno(), b"behind our back", 4 * CLUSTER)


def untouched(disk: Path) -> None:
    pass


def rebooted(disk: Path) -> None:
    os.utime(disk, ns=(A_DAY_AGO, A_DAY_AGO))


async def verdict(bench: Bench) -> dict[str, bool]:
    """Which snapshots and bitmaps can be used, whose content must be right then."""
    async with Opened(await bench.open()) as engine:
        if all(layer.state == "ok" for layer in engine.snapshots):
            await verify(engine, None)
        found = {str(layer.name): layer.state == "ok" for layer in engine.snapshots}
        for bitmap in engine.tracker.bitmaps:
            found[f"bitmap {bitmap.name}"] = bitmap.parts is not None
        return found


@pytest.mark.parametrize("durability", ["process", "power"])
@pytest.mark.parametrize("event", [untouched, changed, rebooted], ids=lambda event: event.__name__)
async def test_a_recovery_that_dies_takes_no_evidence_with_it(shm, monkeypatch, event, durability):
    """The daemon dies, something happens, and the next one dies before each of its calls."""
    bench = Bench(shm / "live", durability, False)
    bench.disk.parent.mkdir()
    await bench.make()
    async with Opened(await bench.open()) as engine:
        await engine.tracker.add("d")
        await engine.write(0, NOW[:CLUSTER])
        shutil.copytree(bench.disk.parent, shm / "left")
    left = Bench(shm / "left", durability, False)
    as_left(left.disk)
    event(left.disk)
    if event is rebooted:
        monkeypatch.setattr(recovery, "boot_id", lambda: "another boot")
    crashes: list[Path] = []

    def copy() -> None:
        crashes.append(shm / f"crash{len(crashes)}")
        shutil.copytree(left.disk.parent, crashes[-1])
        as_left(crashes[-1] / left.disk.name)

    calls = Calls(monkeypatch)
    calls.hook = copy
    calls.armed = True
    opened = await left.open()
    copy()
    calls.armed = False
    async with Opened(opened):
        pass
    usable = event is untouched or (event is rebooted and durability == "power")
    expected = dict.fromkeys(("a", "b", "bitmap d"), usable)
    assert 20 < len(crashes)
    for where in crashes:
        assert expected == await verdict(Bench(where, durability, False)), where
    assert expected == await verdict(left)
