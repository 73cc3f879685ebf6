"""Run by test_watched.py with watch.c loaded: every sync and write of the process is seen.

What a power cut would leave is known at each of them: of a file that was synced what it had
when the sync began, of everything else anything between that and what it has now.  So after
every call, whoever makes it, each snapshot is looked up under the worst of that.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from attrs import define, field

from snapfs.engine.layer import Layer
from snapfs.errors import AccessDenied
from snapfs.fuse import requestfilter
from tests.support.fastpaths import ACTIVE, ACTIVE_HANDLE, CLUSTER, Rig, read_request, write_request
from tests.support.naive import check_bitmaps

CLUSTERS = 17
SIZE = 16 * CLUSTER + 100
PAGE = 4096
SYNC, WRITE, OPEN, HINT, SPLICE = range(5)
TELL = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong,
    ctypes.c_int,
)  # fmt: skip
watch = ctypes.CDLL(None).watch


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    requestfilter.load()


@define
class File:
    """A file of which the disk has `durable`, and something of what is newer."""

    durable: bytes = b""
    dirty: dict[int, int] = field(factory=dict)  # pages written since, and when
    synced: dict[int, int] = field(factory=dict)  # when those in `durable` were written
    lost: bool = False  # a sync has failed, and the pages are clean since
    errors: int = 0  # of writing back, so far


@define
class Sync:
    """One that is under way."""

    content: bytes
    began: int
    dirty: dict[int, int]
    nothing: bool  # to write: it makes nothing durable
    errors: int  # of the file when it began
    fails: bool


@define
class View:
    """A snapshot, and what it must show."""

    layer: Layer
    content: bytes
    given_up: set[int] = field(factory=set)


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def mapped_dirty(path: str) -> bool:
    """Has a mapping of the file pages that are to be written?"""
    with open("/proc/self/smaps") as file:
        ours, size = False, 0
        for line in file:
            first, *rest = line.split()
            if not first.endswith(":"):
                ours = rest[-1] == path
            elif ours and first in ("Shared_Dirty:", "Private_Dirty:"):
                size += int(rest[0])
    return size > 0


class Disk:
    """Follows the files of one rig.  `fail`: kinds of file whose next syncs, by number, fail."""

    def __init__(self, rig: Rig, image: Path) -> None:
        self.rig = rig
        self.image = str(image)
        self.views: dict[str, View] = {}  # those that must survive
        self.wrong: list[str] = []
        self.events: list[tuple[str, int]] = []  # what ended, in which thread
        self.checks = 0
        self.fail: dict[str, set[int]] = {}
        self.hint_error = 0  # errno of what asks the kernel to begin writing back
        self.hints = 0
        self.told_once = False  # that it failed: as of a disk that could not empty its cache
        self.syncs: Counter[str] = Counter()
        self.stalls: dict[str, threading.Event] = {}  # the next sync waits for it
        self.stalled = threading.Event()
        self._files: dict[str, File] = {}
        self._seen: dict[int, int] = {}  # errors, by descriptor
        self._under_way: dict[int, Sync] = {}  # by thread
        self._count = 0
        self._lock = threading.Lock()  # while it is held nobody learns of the end of a sync
        self._told = TELL(self._tell)
        watch(self._told)

    def close(self) -> None:
        watch(ctypes.cast(None, TELL))
        assert not self.wrong, self.wrong[:9]

    # What is told

    def _tell(self, kind: int, after: int, fd: int, offset: int, size: int, error: int) -> int:
        try:
            path = os.readlink(f"/proc/self/fd/{fd}")
            name = os.path.basename(path)
            if self.image not in path or name not in ("temp", "done"):
                if path == self.image:
                    with self._lock:
                        self._check()
                return 0
            if kind == SYNC and not after:
                return self._begin(path, name)
            if kind == HINT:
                self.hints += 1
                return self.hint_error
            with self._lock:
                file = self._files.setdefault(path, File())
                if kind == OPEN:
                    self._seen[fd] = file.errors
                elif kind == WRITE:
                    self._count += 1
                    for page in range(offset // PAGE, -(-(offset + size) // PAGE)):
                        file.dirty[page] = self._count
                else:
                    error = self._end(file, name, fd)
                    self.events.append((name, threading.get_native_id()))
                self._check()
                return error if kind == SYNC else 0
        except BaseException as problem:
            self.wrong.append(repr(problem))
            raise

    def _begin(self, path: str, name: str) -> int:
        with self._lock:
            file = self._files.setdefault(path, File())
            self._check()
            self.syncs[name] += 1
            content = read(path)
            nothing = file.lost and name == "done" and not mapped_dirty(path)
            fails = self.syncs[name] in self.fail.get(name, ())
            self._count += 1
            sync = Sync(content, self._count, dict(file.dirty), nothing, file.errors, fails)
            self._under_way[threading.get_ident()] = sync
            stall = self.stalls.pop(name, None)
        if stall is not None:
            self.stalled.set()
            self.rig.kernel.send(b"the drain need not wait")
            stall.wait()
        return 0

    def _end(self, file: File, name: str, fd: int) -> int:
        sync = self._under_way.pop(threading.get_ident())
        for page, when in sync.dirty.items():
            if file.dirty.get(page) == when:
                del file.dirty[page]
        if sync.fails:
            file.errors += 1
            file.lost = True
        elif not sync.nothing and sync.errors == file.errors:
            file.lost = False
            self._make_durable(file, sync, name == "done")
        seen, self._seen[fd] = self._seen.get(fd, 0), file.errors
        return errno.EIO if sync.fails or (seen < file.errors and not self.told_once) else 0

    def _make_durable(self, file: File, sync: Sync, mapped: bool) -> None:
        # A mapped file may be dirty everywhere.  One that began before another does not undo it.
        pages = range(-(-len(sync.content) // PAGE))
        written = dict.fromkeys(pages, sync.began) if mapped else sync.dirty
        content = bytearray(file.durable.ljust(len(sync.content), b"\0"))
        for page, when in written.items():
            part = slice(page * PAGE, (page + 1) * PAGE)
            if file.synced.get(page, 0) < when:
                file.synced[page] = when
                content[part] = sync.content[part]
        file.durable = bytes(content)

    # What a power cut would leave

    def _check(self) -> None:
        if not self.views:
            return
        self.checks += 1
        stack = list(self.rig.engine._stack)
        where = [f"{self.image}.snapfs/snapshots/{layer.id}/" for layer in stack]
        done = [read(f"{path}done") for path in where]
        image = read(self.image)
        for name, view in self.views.items():
            for cluster in set(range(CLUSTERS)) - view.given_up:
                if not view.layer.access.get(cluster):
                    continue  # given up, for it could not be kept
                part = slice(cluster * CLUSTER, min((cluster + 1) * CLUSTER, SIZE))
                for index in range(stack.index(view.layer), len(stack)):
                    sure = self._files.get(f"{where[index]}done", File()).durable.ljust(9, b"\0")
                    if done[index][cluster >> 3] >> (cluster & 7) & 1:
                        temp = self._files.get(f"{where[index]}temp", File()).durable
                        if temp.ljust(SIZE, b"\0")[part] != view.content[part]:
                            self.wrong.append(f"{name}: {cluster} is done and not durable")
                    if sure[cluster >> 3] >> (cluster & 7) & 1:
                        break
                else:
                    if image[part] != view.content[part]:
                        self.wrong.append(f"{name}: {cluster} was overwritten before it was done")


@asynccontextmanager
async def watched(path: Path, **settings: object) -> AsyncIterator[tuple[Rig, Disk]]:
    image = path / "disk.img"
    image.write_bytes(random.Random(1).randbytes(SIZE))
    async with Rig.make(image, durability="power", **settings) as rig:
        disk = Disk(rig, image)
        try:
            yield rig, disk
        finally:
            disk.close()


async def create(rig: Rig, disk: Disk, name: str) -> Layer:
    """Its moment is when it enters the stack."""
    real = rig.engine._stack.append
    moments = []

    def append(layer: Layer) -> None:
        real(layer)
        moments.append(read(disk.image))

    rig.engine._stack.append = append  # type: ignore[method-assign]
    try:
        layer = await rig.engine.create_snapshot(name)
    finally:
        rig.engine._stack.append = real  # type: ignore[method-assign]
    disk.views[name] = View(layer, moments[-1])
    return layer


async def exact(rig: Rig, disk: Disk, *, may_lack: bool = False) -> None:
    """Every snapshot shows what it must, or, if it `may_lack` something, nothing."""
    for name, view in disk.views.items():
        for cluster in set(range(CLUSTERS)) - view.given_up:
            offset, length = view.layer.geometry.span(cluster, cluster + 1)
            try:
                data = bytes(await rig.engine.read_snapshot(view.layer, offset, length))
            except AccessDenied:
                assert may_lack, (name, cluster)
            else:
                assert view.content[offset : offset + length] == data, (name, cluster)
    check_bitmaps(rig.engine)
    assert 0 == rig.engine.space._claimed


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await trio.sleep(0.0005)  # threads have to end


class Writer:
    """Writes through drains; knows what the image must have."""

    def __init__(self, rig: Rig, disk: Disk) -> None:
        self.rig, self.disk = rig, disk
        self.unique = 0
        self.expected = bytearray(read(disk.image))
        self.under_way: dict[int, tuple[int, bytes]] = {}
        self.errors: list[int] = []

    def drain(self, *writes: tuple[int, int], patient: bool = True) -> list[int]:
        """Writes of (offset, length), of which those that are Python's are begun there."""
        requests = []
        for offset, length in writes:
            self.unique += 1
            data = self.unique.to_bytes(4, "little") * (length // 4 + 1)
            self.under_way[self.unique] = offset, data[:length]
            requests.append(write_request(ACTIVE_HANDLE, offset, data[:length], unique=self.unique))
        first = self.unique - len(writes) + 1
        verdicts = self.rig.drain(*requests, patient=patient)
        for index, verdict in enumerate(verdicts or [0] * len(writes)):
            if not verdict:
                unique = first + index
                offset, data = self.under_way[unique]
                self.rig.nursery.start_soon(self.rig._write, unique, ACTIVE_HANDLE, offset, data)
        self.settle()
        return verdicts

    def some(self, chance: random.Random) -> list[tuple[int, int]]:
        """Writes to clusters where none is under way."""
        busy = {offset // CLUSTER for offset, _ in self.under_way.values()}
        free = sorted(set(range(CLUSTERS - 1)) - busy)
        chosen = chance.sample(free, min(len(free), chance.randrange(1, 9)))
        return [(cluster * CLUSTER + 7, 100) for cluster in chosen]

    def settle(self) -> None:
        """Take note of what has ended."""
        ended = {unique: -error for unique, (error, _) in self.rig.replies().items()}
        ended |= {unique: error for unique, _, error in self.rig.handed}
        self.rig.handed.clear()
        for unique, error in ended.items():
            offset, data = self.under_way.pop(unique)
            if error:
                self.errors.append(error)
            else:
                self.expected[offset : offset + len(data)] = data

    async def quiet(self) -> None:
        def over() -> bool:
            self.settle()
            return not self.under_way and not self.rig.fast._copies

        await until(over)


async def test_the_order_of_writes_through_drains(tmp_path):
    async with watched(tmp_path) as (rig, disk):
        await create(rig, disk, "s")
        writer = Writer(rig, disk)
        for round_ in range(4):
            disk.events.clear()
            verdicts = writer.drain(*((c * CLUSTER, 9) for c in range(4 * round_, 4 * round_ + 4)))
            assert ([2] * 4, {}) == (verdicts, writer.under_way)
            names = [name for name, _ in disk.events if name == "temp"], disk.events[-1][0]
            assert (0 < len(names[0]) <= 8, "done") == (True, names[1])
            assert threading.get_native_id() not in {thread for _, thread in disk.events}
        assert disk.checks > 16
        await exact(rig, disk)
        assert writer.expected == read(disk.image)


@pytest.mark.parametrize("policy", ["break-snapshot", "break-guest-write"])
@pytest.mark.parametrize("name", ["temp", "done", "done once"])
async def test_the_nth_sync_fails(tmp_path, name, policy):
    """Until one fails that does not come: the snapshot is exact, or the writer hears of it."""
    name, *once = name.split()
    for nth in range(1, 99):
        path = tmp_path / str(nth)
        path.mkdir()
        async with watched(path, on_cbw_error=policy) as (rig, disk):
            await create(rig, disk, "s")
            writer = Writer(rig, disk)
            disk.syncs.clear()
            disk.fail[name] = {nth}
            disk.told_once = bool(once)
            for clusters in (range(1), range(4, 10), range(2, 12)):
                writer.drain(*((c * CLUSTER, 9) for c in clusters))
                await writer.quiet()
            await exact(rig, disk, may_lack=policy == "break-snapshot")
            assert writer.expected == read(disk.image)
            fired = disk.syncs[name] >= nth
            if once:  # the engine tries again
                assert not writer.errors
            elif fired and name == "done":  # what is not durable is never overwritten
                assert {errno.EIO} == set(writer.errors)
            elif policy == "break-snapshot" or not fired:
                assert not writer.errors
            disk.fail.clear()
            writer.drain(*((c * CLUSTER, 9) for c in range(13)))  # and everything goes on
            await writer.quiet()
            assert disk.views["s"].layer.lost or all(
                bytes(writer.expected[c * CLUSTER :][:4])
                != disk.views["s"].content[c * CLUSTER :][:4]
                for c in range(13)
            )
            await exact(rig, disk, may_lack=policy == "break-snapshot")
        if not fired:
            assert nth > 3
            return
    pytest.fail("it never ends")


async def test_a_copy_whose_early_write_back_fails_is_the_engines(tmp_path):
    async with watched(tmp_path, on_cbw_error="break-guest-write") as (rig, disk):
        await create(rig, disk, "s")
        writer = Writer(rig, disk)
        disk.hint_error = errno.EIO
        writer.drain((0, 9))
        await writer.quiet()
        # the engine copies it once more
        assert (disk.hints, [name for name, _ in disk.events]) == (1, ["temp", "temp", "done"])
        assert not writer.errors
        assert writer.expected == read(disk.image)
        await exact(rig, disk)


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS])
async def test_early_write_back_may_be_forbidden(tmp_path, error):
    async with watched(tmp_path, on_cbw_error="break-guest-write") as (rig, disk):
        layer = await create(rig, disk, "s")
        writer = Writer(rig, disk)
        disk.hint_error = error
        writer.drain((0, 9))
        assert not writer.under_way
        assert (disk.hints, layer.done.count(), writer.errors) == (1, 1, [])
        await exact(rig, disk)


@pytest.mark.parametrize("error", [errno.ENOMEM, errno.ENOENT])
@pytest.mark.parametrize("size", [160 << 10, 320 << 10])  # the second by the helper
async def test_a_reply_that_cannot_be_spliced(tmp_path, size, error):
    """The reader gets an error, if there is still one (ENOENT: it was interrupted)."""
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(320 << 10))
    fails = False

    def tell(kind: int, _after: int, fd: int, *_: int) -> int:
        to_device = kind == SPLICE and os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
        return error if to_device and fails else 0

    async with Rig.make(image) as rig:
        told = TELL(tell)
        watch(told)
        try:
            for fails in (True, False, True, False):
                assert rig.drain(read_request(ACTIVE, ACTIVE_HANDLE, 0, size)) == [1]
                found = rig.replies()
                assert {7: (-errno.EIO, b"") if fails else (0, image.read_bytes()[:size])} == found
        finally:
            watch(ctypes.cast(None, TELL))


@pytest.mark.parametrize("then", ["nothing", "create", "delete", "discard"])
@pytest.mark.parametrize("name", ["temp", "done"])
async def test_a_sync_that_takes_long_is_the_engines(tmp_path, name, then):
    async with watched(tmp_path) as (rig, disk):
        layer = await create(rig, disk, "s")
        writer = Writer(rig, disk)
        stall = disk.stalls[name] = threading.Event()
        assert [2, 2, 2] == writer.drain((0, 9), (5 * CLUSTER, 9), (6 * CLUSTER, 9))
        assert disk.stalled.is_set()
        assert b"the drain need not wait" == rig.device.recv(99)
        if name == "done":
            # ours makes it durable, though the other one is still under way
            assert rig.engine.published_state().promised
            if then == "nothing":
                await writer.quiet()
                assert 3 == layer.done.count()
            # and until that has ended nothing more is copied natively
            assert [0] == writer.drain((8 * CLUSTER, 9))
        else:
            assert rig.engine.copier.ranges
        async with trio.open_nursery() as nursery:
            if then == "create":
                nursery.start_soon(create, rig, disk, "t")
            elif then == "delete":
                del disk.views["s"]
                nursery.start_soon(rig.engine.delete_snapshot, "s")
            elif then == "discard":
                disk.views["s"].given_up |= {5, 6}
                nursery.start_soon(rig.engine.discard, layer, 5 * CLUSTER, 2 * CLUSTER)
            await trio.testing.wait_all_tasks_blocked()
            stall.set()
        await writer.quiet()
        assert not writer.errors
        await until(lambda: not layer.pins)
        await exact(rig, disk)
        assert writer.expected == read(disk.image)
        verdict = None
        while verdict not in ([2], [1]):  # the thread of the sync that took long has to end
            (verdict,) = [writer.drain((11 * CLUSTER, 9))]
            await writer.quiet()
        assert writer.expected == read(disk.image)
        await exact(rig, disk)


@pytest.mark.parametrize("seed", range(8))
async def test_anything(tmp_path, seed):
    """Random drains, with syncs that take long or fail, and snapshots that come and go."""
    chance = random.Random(seed)
    async with watched(tmp_path, on_cbw_error="break-guest-write") as (rig, disk):
        await create(rig, disk, "first")
        writer = Writer(rig, disk)
        for number in range(40):
            kind = chance.choice(("drain", "drain", "late", "stall", "fail", "layers"))
            name = chance.choice(("temp", "done"))
            stall = None
            if kind == "fail":
                disk.fail[name] = {disk.syncs[name] + chance.randrange(1, 4)}
            elif kind == "stall":
                stall = disk.stalls[name] = threading.Event()
            elif kind == "layers":
                await change_layers(rig, disk, chance, number)
            writer.drain(*writer.some(chance), patient=kind != "late" or stall is not None)
            if stall is not None:
                disk.stalls.clear()
                stall.set()
            while disk.stalled.is_set():
                disk.stalled.clear()
                rig.device.recv(99)
            if chance.random() < 0.5:
                await writer.quiet()
        disk.fail.clear()
        await writer.quiet()
        await exact(rig, disk)
        assert writer.expected == read(disk.image)
        assert {errno.EIO} >= set(writer.errors)
        assert disk.checks > 100


async def change_layers(rig: Rig, disk: Disk, chance: random.Random, number: int) -> None:
    name = chance.choice(sorted(disk.views))
    kind = chance.choice(("create", "create", "delete", "discard"))
    try:
        if kind == "create" and len(disk.views) < 4:
            await create(rig, disk, f"s{number}")
        elif kind == "delete" and len(disk.views) > 1:
            del disk.views[name]
            await rig.engine.delete_snapshot(name)
        else:
            first = chance.randrange(CLUSTERS - 2)
            disk.views[name].given_up |= {first, first + 1}
            await rig.engine.discard(disk.views[name].layer, first * CLUSTER, 2 * CLUSTER)
    except OSError as error:
        assert errno.EIO == error.errno  # a sync that is to fail
