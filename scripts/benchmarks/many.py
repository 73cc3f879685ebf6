"""Rows of mounts with thousands of snapshots: what each of them costs all others."""

from __future__ import annotations

import os
import statistics
import time
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from pathlib import Path

from .builds import run
from .images import MIB
from .serving import Served
from .work import CLUSTER, Bench, Work

MANY = 5000
SIZE = 64 * MIB
TIMES = 20  # creations and deletions in one measurement

# Makes a state directory with so many snapshots by the library's own code.  They need not
# outlive the machine.
MAKE = """
import os, sys
import trio
from snapfs.engine.layer import Layer
from snapfs.state.store import Store

os.fsync = os.fdatasync = lambda fd: None

async def make(image, count):
    store = await Store.open(image, limiter=trio.CapacityLimiter(4))
    layers = []
    for number in range(count):
        parts = await store.create(number + 1, store.geometry)
        parts.access.set(0, store.geometry.clusters)
        layers.append(
            Layer(
                number + 1, store.geometry, parts.access, parts.done, parts.temp, parts.losses,
                name=f"s{number}", created_ns=number + 1, granted=store.geometry.clusters,
            )
        )
    await store.save([layer.record() for layer in layers], store.geometry)
    await store.close(layers, [])

trio.run(make, sys.argv[1], int(sys.argv[2]))
"""


class Crowd:
    """An image with so many snapshots, which stay between the measurements."""

    def __init__(self, bench: Bench, snapshots: int) -> None:
        self._bench = bench
        self._snapshots = snapshots
        self._numbers = count()

    def _snapfs(self, *arguments: object) -> None:
        run(self._bench.build.snapfs, *arguments)

    @contextmanager
    def unmounted(self) -> Served:
        """The image and its mountpoint, with nothing mounted there."""
        build = zlib.crc32(str(self._bench.build.root).encode())  # each reads what it has made
        image = self._bench.directory / f"crowd{self._snapshots}-{build:x}.img"
        where = self._bench.directory / "crowd"
        where.mkdir(exist_ok=True)
        if not image.exists():
            with open(image, "wb") as file:
                file.truncate(SIZE)
            run(self._bench.build.root / ".venv/bin/python", "-c", MAKE, image, self._snapshots)
        yield image, where

    @contextmanager
    def mounted(self) -> Served:
        """`active`, and where the snapshots are."""
        with self.unmounted() as (image, where):
            self._snapfs("mount", image, where)
            try:
                yield where / "active", where / "snapshots"
            finally:
                self._snapfs("umount", where)

    def mount(self, image: Path, where: Path) -> float:
        """Seconds until the mount answers."""
        started = time.monotonic()
        self._snapfs("mount", image, where)
        taken = time.monotonic() - started
        self._snapfs("umount", where)
        return taken

    def unmount(self, image: Path, where: Path) -> float:
        """Seconds until all is durable and the daemon gone."""
        self._snapfs("mount", image, where)
        started = time.monotonic()
        self._snapfs("umount", where)
        return time.monotonic() - started

    def create(self, active: Path, snapshots: Path) -> float:
        """Milliseconds of a creation and the first write after it, of 4 KiB."""
        times, made = [], []
        with open(active, "r+b", buffering=0) as file:
            for number in range(TIMES):
                name = snapshots / f"new{next(self._numbers)}"
                started = time.monotonic()
                name.touch()
                os.pwrite(file.fileno(), os.urandom(4096), number * CLUSTER)
                times.append(time.monotonic() - started)
                made.append(name)
        for name in made:
            name.unlink()
        return statistics.median(times) * 1000

    def delete(self, active: Path, snapshots: Path) -> float:
        """Milliseconds of a deletion of the oldest, when a new one has been made."""
        times = []
        for number in range(TIMES):
            (snapshots / f"new{next(self._numbers)}").touch()
            with open(active, "r+b", buffering=0) as file:
                os.pwrite(file.fileno(), os.urandom(4096), number * CLUSTER)
            oldest = min(os.scandir(snapshots), key=lambda entry: entry.inode())
            started = time.monotonic()
            os.unlink(oldest.path)
            times.append(time.monotonic() - started)
        return statistics.median(times) * 1000

    def list(self, active: Path, snapshots: Path) -> float:
        """Milliseconds of `snapfs list`."""
        started = time.monotonic()
        self._snapfs("list", snapshots.parent, "--json")
        return (time.monotonic() - started) * 1000

    def look(self, active: Path, snapshots: Path) -> float:
        """Milliseconds of `ls -l`."""
        started = time.monotonic()
        for name in os.listdir(snapshots):
            os.stat(snapshots / name)
        return (time.monotonic() - started) * 1000


Serve = Callable[[], AbstractContextManager[tuple[Path, Path]]]


def rows(bench: Bench) -> dict[str, tuple[str, list[tuple[str, Serve, Work]]]]:
    """Name: unit and sides, as `rows.measurements` has them."""
    crowds = {"1 snapshot": Crowd(bench, 1), f"{MANY} snapshots": Crowd(bench, MANY)}
    return {
        f"{MANY} snapshots: {what}": (
            unit,
            [
                (label, getattr(crowd, serve), getattr(crowd, work))
                for label, crowd in crowds.items()
            ],
        )
        for what, unit, serve, work in (
            ("creation with a write", "ms", "mounted", "create"),
            ("deletion", "ms", "mounted", "delete"),
            ("snapfs list", "ms", "mounted", "list"),
            ("ls -l", "ms", "mounted", "look"),
            ("mount", "s", "unmounted", "mount"),
            ("umount", "s", "unmounted", "unmount"),
        )
    }
