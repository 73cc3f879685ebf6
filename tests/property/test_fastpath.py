"""The same requests with the fast path and without: every byte, bitmap and counter agrees."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
from attrs import asdict
from hypothesis import given, settings
from hypothesis import strategies as st

from snapfs.errors import AccessDenied, SnapfsError
from snapfs.fuse import requestfilter
from snapfs.fuse.fastpath import FIRST_SNAPSHOT
from snapfs.state.manifest import Durability
from tests.support.fastpaths import ACTIVE, ACTIVE_HANDLE, Rig, read_request, write_request
from tests.support.images import CLUSTER
from tests.support.naive import check_bitmaps

SIZE = 12 * CLUSTER + 100
SLOW_COUNTERS = {"cbw_seconds"}

offsets = st.builds(
    lambda cluster, extra: max(0, cluster * CLUSTER + extra),
    st.integers(0, 14),
    st.sampled_from((0, 0, 0, 1, -1, 512, 4095)),
)
lengths = st.builds(
    lambda clusters, extra: max(1, clusters * CLUSTER + extra),
    st.integers(0, 5),
    st.sampled_from((0, 0, 1, -1, 512)),
)
numbers = st.integers(0, 3)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), offsets, lengths, st.integers(0, 255)),
        st.tuples(st.just("write"), offsets, lengths, st.just(0)),
        st.tuples(st.just("late write"), offsets, lengths, st.integers(0, 255)),
        st.tuples(st.just("read"), offsets, lengths, st.just(0)),
        st.tuples(st.just("read snapshot"), offsets, lengths, numbers),
        st.tuples(st.just("create"), st.just(0), st.just(0), st.just(0)),
        st.tuples(st.just("delete"), st.just(0), st.just(0), numbers),
        st.tuples(st.just("discard"), offsets, lengths, numbers),
        st.tuples(st.just("punch"), offsets, lengths, st.just(0)),
        st.tuples(st.just("resize"), offsets, st.just(0), st.just(0)),
    ),
    max_size=30,
)

Step = tuple[str, int, int, int]


class Side:
    """One engine that goes through the steps; `fast`: by requests as the kernel's."""

    def __init__(self, rig: Rig, fast: bool) -> None:
        self.rig = rig
        self.fast = fast
        self.created = 0
        self.unique = 0

    async def step(self, kind: str, offset: int, length: int, number: int) -> object:
        """What the step gives: bytes, a size, or the kind of an error."""
        try:
            return await self._step(kind, offset, length, number)
        except SnapfsError as error:
            return type(error).__name__

    async def _step(self, kind: str, offset: int, length: int, number: int) -> object:
        engine = self.rig.engine
        snapshots = engine.snapshots
        layer = snapshots[number % len(snapshots)] if snapshots else None
        match kind:
            case "write" | "late write":
                return await self.write(offset, bytes([number]) * length, kind == "write")
            case "read":
                return await self.read(ACTIVE, ACTIVE_HANDLE, offset, length)
            case "create":
                self.created += 1
                await engine.create_snapshot(f"s{self.created}")
            case "punch":
                await engine.punch(offset, length)
            case "resize":
                await engine.resize(offset)
            case _ if layer is None:
                return None
            case "read snapshot":
                inode, handle = FIRST_SNAPSHOT + layer.id, self.rig.handle(layer)
                return await self.read(inode, handle, offset, length)
            case "discard":
                await engine.discard(layer, offset, length)
            case "delete":
                await engine.delete_snapshot(layer.name or "")
        return None

    async def write(self, offset: int, data: bytes, patient: bool) -> int:
        self.unique += 1
        request = write_request(ACTIVE_HANDLE, offset, data, unique=self.unique)
        verdict = self.rig.drain(request, patient=patient) if self.fast else [0]
        if verdict == [0]:
            return await self.rig.engine.write(offset, data)
        replies = self.rig.replies()
        if not patient and not replies:  # it was handed over
            while not self.rig.handed or self.rig.fast._copies:
                await trio.sleep(0.0005)
            assert [(self.unique, offset, 0)] == self.rig.handed
            self.rig.handed.clear()
            return len(data)
        ((unique, (error, body)),) = replies.items()
        assert (self.unique, 0) == (unique, error)
        return int.from_bytes(body[:4], "little")

    async def read(self, inode: int, handle: int, offset: int, length: int) -> bytes:
        if self.fast:
            reply = self.rig.send(read_request(inode, handle, offset, length))
            if reply is not None:
                assert 0 == reply[0]
                return reply[1]
        if inode == ACTIVE:
            return bytes(await self.rig.engine.read(offset, length))
        layer = next(each for each in self.rig.engine.layers if FIRST_SNAPSHOT + each.id == inode)
        return bytes(await self.rig.engine.read_snapshot(layer, offset, length))

    async def content(self) -> list[object]:
        """Everything that can be compared."""
        rig, engine = self.rig, self.rig.engine
        rig.fast.collect()
        check_bitmaps(engine)
        assert rig.settled_activity() == rig.activity()
        assert 0 == engine.space._claimed
        found: list[object] = [
            {key: n for key, n in asdict(engine.counters).items() if key not in SLOW_COUNTERS},
            os.pread(rig.store.image.fd, 1 << 20, 0),
            engine._stack.pending.slice(0, len(engine._stack.pending)),
        ]
        for layer in engine.layers:
            found += [layer.id, layer.name, layer.access.slice(0, len(layer.access))]
            found += [layer.done.slice(0, len(layer.done)), layer.pins]
            # Not its blocks: among them may be one for the file system's list of extents.
            found.append(await layer.temp.data_extents(0, layer.geometry.size, 1000))
            if layer.commits is not None:
                found.append(layer.commits.done_file.bits.slice(0, len(layer.done)))
            for cluster in range(layer.geometry.clusters):
                span = layer.geometry.span(cluster, cluster + 1)
                try:
                    found.append(bytes(await engine.read_snapshot(layer, *span)))
                except AccessDenied:
                    found.append(None)
        engine.counters.snapshot_reads = 0
        return found


async def compare(directory: Path, script: list[Step], durability: Durability) -> None:
    """Both sides take turns: handles and the switch are the process's."""
    results: list[list[object]] = []
    for fast in (True, False):
        async with AsyncExitStack() as stack:
            image = directory / f"{'fast' if fast else 'slow'}.img"
            image.write_bytes(bytes(range(1, 252)) * (SIZE // 251) + bytes(SIZE % 251))
            rig = await stack.enter_async_context(Rig.make(image, on=fast, durability=durability))
            side = Side(rig, fast)
            found: list[object] = []
            for step in script:
                found += [step, await side.step(*step), await side.content()]
            results.append(found)
    for fast_one, slow_one in zip(*results, strict=True):
        assert slow_one == fast_one


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    requestfilter.load()


@pytest.mark.parametrize("durability", ["process", "power"])
@settings(max_examples=settings().max_examples // 3)  # each saves manifests to the disk
@given(script=steps)
def test_both_ways_give_the_same(
    tmp_path_factory: pytest.TempPathFactory, script: list[Step], durability: Durability
):
    directory = tmp_path_factory.mktemp("twins")
    trio.run(compare, directory, script, durability)
