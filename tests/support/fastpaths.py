"""An engine over real files whose requests may take the fast path, without a kernel."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from attrs import define, field

from snapfs.engine.copier import Settings
from snapfs.engine.engine import Engine
from snapfs.engine.layer import Layer
from snapfs.fuse import requestfilter
from snapfs.fuse.fastpath import FIRST_SNAPSHOT, FastPath
from snapfs.fuse.pagecache import PageCache
from snapfs.state.activitywords import UNDER_WAY, words_of
from snapfs.state.manifest import Durability
from snapfs.state.store import Store
from snapfs.storage.image import Buffer

ACTIVE = 2
READ, WRITE = 15, 16  # linux/fuse.h
IN_HEADER = struct.Struct("<IIQQIIIHH")
IO_IN = struct.Struct("<QQIIQII")  # fuse_read_in and fuse_write_in
OUT_HEADER = struct.Struct("<IiQ")
CLUSTER = 4096
ACTIVE_HANDLE = 1
SIZE = 16 * CLUSTER + 100
OLD = bytes(range(1, 252)) * (SIZE // 251 + 1)
OLD = OLD[:SIZE]
NEW = b"\xee" * CLUSTER
HELPED = 256 << 10  # so large that the helper carries it


def read_request(
    inode: int, handle: int, offset: int, size: int, *, unique: int = 7, flags: int = 0
) -> bytes:
    body = IO_IN.pack(handle, offset, size, flags, 0, 0, 0)
    return IN_HEADER.pack(80, READ, unique, inode, 0, 0, 1, 0, 0) + body


def write_request(
    handle: int,
    offset: int,
    data: Buffer,
    *,
    inode: int = ACTIVE,
    size: int | None = None,
    flags: int = 0,
    unique: int = 8,
) -> bytes:
    body = IO_IN.pack(handle, offset, len(data) if size is None else size, flags, 0, 0, 0)
    header = IN_HEADER.pack(80 + len(data), WRITE, unique, inode, 0, 0, 1, 0, 0)
    return header + body + bytes(data)


class Quarantine:
    """A PageCache of which some inodes are quarantined."""

    def __init__(self) -> None:
        self.inodes: set[int] = set()

    def quarantined(self) -> set[int]:
        return self.inodes


SO_SNDBUFFORCE = 32  # asm-generic/socket.h


@define(eq=False)
class Rig:
    """An engine and its fast path."""

    store: Store
    engine: Engine
    fast: FastPath
    quarantine: Quarantine
    nursery: trio.Nursery
    kernel: socket.socket
    device: socket.socket
    handles: dict[int, int] = field(factory=dict)  # of snapshots, by layer id
    handed: list[tuple[int, int, int]] = field(factory=list)  # unique, offset, errno
    handed_reads: list[tuple[int, int, int, bool]] = field(factory=list)  # size, direct

    @classmethod
    @asynccontextmanager
    async def make(
        cls, image: Path, *, on: bool = True, durability: Durability = "process", **settings: Any
    ) -> AsyncIterator[Rig]:
        """The image's engine, closed in order at the end."""
        requestfilter.load()
        store = await Store.open(
            str(image), cluster_size=CLUSTER, durability=durability, limiter=trio.CapacityLimiter(4)
        )
        # A stream, as a reply that is spliced comes page by page.
        kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        kernel.setblocking(False)
        device.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 64 << 20)
        with kernel, device:
            async with trio.open_nursery() as nursery:
                engine = Engine(
                    store.image, store.geometry, store, nursery,
                    layers=store.layers, bitmaps=store.dirty, next_id=store.next_id,
                    settings=Settings(**{"cbw_timeout": 0, **settings}),  # no disk is too slow
                )  # fmt: skip
                engine.space.clock = lambda: 0.0  # what is lent must not depend on our speed
                await engine.space.look()
                quarantine = Quarantine()
                fast = FastPath(engine, cast(PageCache, quarantine), store.activity_page, nursery)
                rig = cls(store, engine, fast, quarantine, nursery, kernel, device)
                fast.write = rig._write
                fast.read = rig._read
                requestfilter.handle_opened(ACTIVE_HANDLE, ACTIVE)
                if on:
                    fast.start()
                try:
                    yield rig
                finally:
                    fast.stop()
                    nursery.cancel_scope.cancel()
            await store.close(engine.layers, list(engine.tracker.bitmaps))

    async def temp_bytes(self, layer: Layer) -> int:
        """What the temp image takes now."""
        await self.engine.space.look()
        return layer.temp_bytes

    def handle(self, layer: Layer) -> int:
        """A handle of a snapshot's file."""
        if layer.id not in self.handles:
            self.handles[layer.id] = 100 + layer.id
            requestfilter.handle_opened(100 + layer.id, FIRST_SNAPSHOT + layer.id)
        return self.handles[layer.id]

    def replies(self) -> dict[int, tuple[int, bytes]]:
        """Errno and data of the replies that were sent, by the unique of the request."""
        found: dict[int, tuple[int, bytes]] = {}
        stream = bytearray()
        with contextlib.suppress(BlockingIOError):
            while True:
                stream += self.kernel.recv(1 << 20)
        while stream:
            length, error, unique = OUT_HEADER.unpack_from(stream)
            assert OUT_HEADER.size <= length <= len(stream)
            assert unique not in found
            found[unique] = error, bytes(stream[OUT_HEADER.size : length])
            del stream[:length]
        return found

    def drain(self, *requests: bytes, patient: bool = True) -> list[int]:
        """What one drain makes of requests: 0 for Python's, 1 answered, 2 kept."""
        return requestfilter.try_requests(self.device.fileno(), list(requests), patient=patient)

    def send(self, request: bytes) -> tuple[int, bytes] | None:
        """Errno and data of the reply; None if the fast path leaves the request to Python."""
        verdicts = self.drain(request)
        replies = self.replies()
        if verdicts in ([], [0]):
            assert {} == replies
            return None
        ((unique, reply),) = replies.items()
        assert unique == IN_HEADER.unpack_from(request)[2]
        return reply

    async def _read(self, unique: int, handle: int, offset: int, size: int, direct: bool) -> None:
        self.handed_reads.append((unique, offset, size, direct))

    @staticmethod
    @contextlib.contextmanager
    def readable_never(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
        """Let no end of a copy be heard of before the function that it gives is called."""
        wait = trio.lowlevel.wait_readable
        released = trio.Event()

        async def never(fd: int) -> None:
            if not released.is_set():
                await released.wait()
            else:
                await wait(fd)

        monkeypatch.setattr("trio.lowlevel.wait_readable", never)
        try:
            yield released.set
        finally:
            released.set()  # of a test that fails somebody may wait, shielded

    async def _write(self, unique: int, handle: int, offset: int, data: bytes) -> None:
        error = 0
        try:
            await self.engine.write(offset, data)
        except OSError as failure:
            error = failure.errno or 0
        self.handed.append((unique, offset, error))

    def activity(self) -> tuple[int, ...]:
        """under_way, size, mtime, ctime of the record."""
        with words_of(self.store.activity_page) as words:
            return tuple(words[UNDER_WAY : UNDER_WAY + 4])

    def settled_activity(self) -> tuple[int, ...]:
        """What the record must be when nothing is under way."""
        status = os.fstat(self.store.image.fd)
        return 0, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def written(size: int) -> tuple[int, bytes]:
    return 0, struct.pack("<II", size, 0)


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


async def until_quiet(rig: Rig, handed: int) -> None:
    def busy() -> bool:
        return bool(rig.fast._copies) or any(layer.pins for layer in rig.engine.layers)

    while len(rig.handed) < handed or busy():
        await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(0.001)  # a thread has to end
