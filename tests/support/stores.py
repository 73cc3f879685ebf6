"""A state directory over sessions: open, let the engine do some steps, close in order."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio
import trio.testing

from snapfs.engine.engine import Engine
from snapfs.engine.layer import Layer
from snapfs.state.store import Store

CLUSTER = 4096
SIZE = 6 * CLUSTER + 100
OLD = bytes(range(1, 252)) * (SIZE // 251 + 1)
OLD = OLD[:SIZE]
LIMITER = trio.CapacityLimiter(4)


def state_of(image: Path) -> Path:
    return Path(f"{image}.snapfs")


def as_left(image: Path) -> Path:
    """A copy of an image and its state stands for what a crash left: it is no copy then."""
    path = state_of(image) / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return image  # it had not been saved yet
    for place, file in (("image", image), ("state", state_of(image))):
        if f"{place} file" in manifest["held_by"]:
            manifest["held_by"][f"{place} file"] = str(file.stat().st_ino)
    path.write_text(json.dumps(manifest))
    return image


async def opened(image: Path) -> Store:
    return await Store.open(str(image), cluster_size=CLUSTER, limiter=LIMITER)


def engine_of(store: Store, nursery: trio.Nursery) -> Engine:
    return Engine(
        store.image,
        store.geometry,
        store,
        nursery,
        layers=store.layers,
        bitmaps=store.dirty,
        next_id=store.next_id,
    )


async def session(image: Path, *steps: Callable[[Engine], object]) -> Store:
    """Open, let the engine do some steps, close in order."""
    store = await opened(image)
    async with trio.open_nursery() as nursery:
        engine = engine_of(store, nursery)
        for step in steps:
            await step(engine)  # type: ignore[misc]
        await trio.testing.wait_all_tasks_blocked()
    await store.close(engine.layers, list(engine.tracker.bitmaps))
    return store


def create(name: str):
    return lambda engine: engine.create_snapshot(name)


def delete(name: str):
    return lambda engine: engine.delete_snapshot(name)


def write(offset: int, data: bytes):
    return lambda engine: engine.write(offset, data)


def discard(name: str, offset: int, length: int):
    return lambda engine: engine.discard(engine.find(name), offset, length)


def expect(name: str, content: bytes, offset: int = 0):
    async def step(engine: Engine) -> None:
        layer = engine.find(name)
        assert content == await engine.read_snapshot(layer, offset, len(content) + SIZE)

    return step


def add(name: str):
    return lambda engine: engine.tracker.add(name)


def damage_manifest(**changes) -> Callable[[Path], None]:
    def damage(state: Path) -> None:
        path = state / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def damage_layer(**changes) -> Callable[[Path], None]:
    def damage(state: Path) -> None:
        path = state / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["layers"][0] |= changes
        path.write_text(json.dumps(manifest))

    return damage


async def make_many(image: Path, count: int) -> None:
    """Leave a clean state directory with that many snapshots s0, s1, ... of the image."""
    store = await opened(image)
    layers = []
    for number in range(count):
        parts = await store.create(number + 1, store.geometry)
        parts.access.set(0, store.geometry.clusters)
        layers.append(
            Layer(
                number + 1, store.geometry, parts.access, parts.done, parts.temp, parts.losses,
                name=f"s{number}", created_ns=number + 1, granted=store.geometry.clusters,
            )
        )  # fmt: skip
    await store.save([layer.record() for layer in layers], store.geometry)
    await store.close(layers, [])


def tree(path: Path) -> dict[str, tuple[Any, ...]]:
    """All that there is below a directory, but for access times."""
    found = {}
    for each in sorted([path, *path.rglob("*")]):
        status = each.lstat()
        content: Any = None
        if stat.S_ISREG(status.st_mode):
            content = each.read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(each)
        found[str(each.relative_to(path))] = (
            status.st_mode, status.st_mtime_ns, status.st_ctime_ns, content,
        )  # fmt: skip
    return found


def outside(found: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """What of a tree is not in the state directory."""
    return {key: each for key, each in found.items() if ".snapfs" not in key}


def stored(name: str, offset: int, data: bytes) -> Callable[[Path], None]:
    def damage(state: Path) -> None:
        fd = os.open(state / name, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.pwrite(fd, data, offset)
        finally:
            os.close(fd)

    return damage
