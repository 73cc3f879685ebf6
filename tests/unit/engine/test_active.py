"""The size of the live image: what may fail does so before anything has changed."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from snapfs.engine import active, copier, layers
from snapfs.engine.bitmap import Bitmap
from snapfs.engine.engine import Engine
from snapfs.engine.geometry import Geometry
from snapfs.errors import ImageTooLarge, StateError
from tests.support.fakes import Bench, MemoryStore
from tests.support.images import CLUSTER, MemoryImage, os_error
from tests.support.naive import check_quiet

CLUSTERS = 8
SIZE = CLUSTERS * CLUSTER
CONTENT = b"1" * SIZE
MOST = 20 * CLUSTER

Grow = Callable[[Engine, int], Awaitable[object]]

GROWTHS: dict[str, Grow] = {
    "resize": lambda engine, size: engine.resize(size),
    "write": lambda engine, size: engine.write(size - 1, b"x"),
    "zero": lambda engine, size: engine.zero(size - 1, 1),
    "allocate": lambda engine, size: engine.allocate(0, size, keep_size=False),
}


@pytest.fixture(params=GROWTHS.values(), ids=GROWTHS.keys())
def grow(request) -> Grow:
    found: Grow = request.param
    return found


@pytest.fixture
async def bench(nursery):
    bench = Bench.make(nursery, CONTENT, max_size=MOST)
    await bench.engine.tracker.add("b")
    await bench.engine.create_snapshot("s")
    return bench


async def check_unchanged(bench: Bench) -> None:
    engine = bench.engine
    assert (SIZE, CONTENT) == (engine.size, bytes(bench.image.data))
    assert [] == bench.image.calls_of("truncate", "allocate", "zero", "pwrite")
    (bitmap,) = engine.tracker.bitmaps
    assert None is bitmap.reason
    check_quiet(engine, bench.store)
    await engine.resize(2 * CLUSTER)  # and all goes on
    await engine.resize(SIZE)
    assert CONTENT == bytes(await engine.read_snapshot(engine.find("s"), 0, SIZE))


async def test_an_image_grows_to_its_bound_and_no_further(bench, grow):
    for size in (MOST + 1, 1 << 60, active.MAX_SIZE):
        with pytest.raises(ImageTooLarge, match=f"max-size={MOST}"):
            await grow(bench.engine, size)
    await check_unchanged(bench)
    await grow(bench.engine, MOST)
    assert MOST == bench.engine.size == len(bench.image.data)
    check_quiet(bench.engine, bench.store)


async def test_without_memory_for_the_bitmaps_nothing_has_changed(bench, grow, monkeypatch):
    with monkeypatch.context() as patch:

        def grow_(self: Bitmap, bits: int) -> None:
            raise MemoryError

        patch.setattr(Bitmap, "grow", grow_)
        with pytest.raises(MemoryError):
            await grow(bench.engine, MOST)
    await check_unchanged(bench)


@pytest.mark.parametrize("kind", ["resize", "zero", "allocate"])
async def test_without_room_for_a_dirty_bitmap_a_size_is_refused(bench, kind):
    bench.store.fail("grow", errno=errno.ENOSPC, times=1)
    with pytest.raises(OSError) as caught:
        await GROWTHS[kind](bench.engine, MOST)
    assert errno.ENOSPC == caught.value.errno
    await check_unchanged(bench)


@pytest.mark.parametrize("kind", ["resize", "zero", "allocate"])
async def test_what_the_file_system_refuses_is_refused(bench, kind):
    bench.image.fail("truncate", "zero", "allocate", errno=errno.EFBIG, times=1)
    with pytest.raises(OSError) as caught:
        await GROWTHS[kind](bench.engine, MOST)
    assert errno.EFBIG == caught.value.errno
    bench.image.calls.clear()
    await check_unchanged(bench)


@pytest.mark.parametrize(
    ("size", "most"), [(CLUSTER, 64 << 40), (17 << 40, 68 << 40)], ids=["small", "large"]
)
async def test_the_bound_is_64_tib_or_four_times_the_image(nursery, size, most):
    geometry = Geometry(size, 4 << 20)
    assert most == Engine(MemoryImage(), geometry, MemoryStore(), nursery).max_size


async def test_growth_from_outside_beyond_the_bound_is_trouble_not_memory(bench):
    engine = bench.engine
    bench.image.size = lambda: 1 << 60
    engine.refresh()
    assert SIZE == engine.size
    assert "beyond max-size" in engine.unhealthy
    with pytest.raises(StateError, match="beyond max-size"):
        await engine.create_snapshot("t")
    assert CONTENT == bytes(await engine.read_snapshot(engine.find("s"), 0, SIZE))


async def test_a_shrink_looks_at_what_is_pending_only(bench, monkeypatch):
    engine = bench.engine
    await engine.write(0, b"2" * 2 * CLUSTER)
    seen: list[tuple[int, int]] = []
    preserve = engine.copier.preserve

    async def noted(first: int, stop: int) -> None:
        seen.append((first, stop))
        await preserve(first, stop)

    monkeypatch.setattr(engine.copier, "preserve", noted)
    monkeypatch.setattr(active, "STEP", 2 * CLUSTER)
    await engine.resize(0)
    assert [(2, 4), (4, 6), (6, 8), (0, 8)] == seen
    assert CONTENT == bytes(await engine.read_snapshot(engine.find("s"), 0, SIZE))


@pytest.fixture
async def sparse(nursery, monkeypatch):
    """Data in clusters 1 and 60 of 64; copies of 4 clusters at most, parts of 4."""
    monkeypatch.setattr(active, "STEP", 4 * CLUSTER)
    monkeypatch.setattr(copier, "COPY_RUN", 4 * CLUSTER)
    content = bytearray(64 * CLUSTER)
    for cluster in (1, 60):
        content[cluster * CLUSTER : (cluster + 1) * CLUSTER] = b"1" * CLUSTER
    bench = Bench.make(nursery, content)
    await bench.engine.create_snapshot("s")
    return bench


async def check_moment(bench: Bench, name: str, content: bytes) -> None:
    engine = bench.engine
    assert content == bytes(await engine.read_snapshot(engine.find(name), 0, len(content)))
    await wait_all_tasks_blocked()
    check_quiet(engine, bench.store)


async def test_a_hole_that_is_cut_off_is_one_copy_however_long(sparse, monkeypatch):
    begun: list[tuple[int, int]] = []
    start = sparse.engine.copier._start

    def noted(first: int, stop: int, empty: bool = False) -> copier.Copy:
        copy = start(first, stop, empty)
        begun.append((copy.first, copy.stop))
        return copy

    monkeypatch.setattr(sparse.engine.copier, "_start", noted)
    moment = bytes(sparse.image.data)
    await sparse.engine.resize(0)
    assert [(0, 4), (4, 60), (60, 64)] == begun
    assert {1, 60} == sparse.store.temp(sparse.engine.find("s")).pages
    await check_moment(sparse, "s", moment)


class Looked:
    """Lets something happen when the image was looked at from cluster 4 on."""

    def __init__(self, bench: Bench) -> None:
        self.reached, self.released = trio.Event(), trio.Event()
        self._look = bench.image.data_extents
        bench.image.data_extents = self.look

    async def look(self, offset: int, length: int, limit: int):
        found = await self._look(offset, length, limit)
        if offset == 4 * CLUSTER and not self.reached.is_set():
            self.reached.set()
            await self.released.wait()
        return found


async def test_a_hole_that_is_written_while_it_is_looked_for(sparse):
    moment = bytes(sparse.image.data)
    looked = Looked(sparse)
    async with trio.open_nursery() as both:
        both.start_soon(sparse.engine.resize, 0)
        await looked.reached.wait()
        await sparse.engine.write(10 * CLUSTER, b"x" * 2 * CLUSTER)
        looked.released.set()
    await check_moment(sparse, "s", moment)


async def test_a_snapshot_that_is_created_while_a_hole_is_looked_for(sparse):
    moment = bytes(sparse.image.data)
    looked = Looked(sparse)
    async with trio.open_nursery() as both:
        both.start_soon(sparse.engine.resize, 0)
        await looked.reached.wait()
        await sparse.engine.write(4 * CLUSTER, b"x" * 20 * CLUSTER)
        later = bytes(sparse.image.data)
        await sparse.engine.create_snapshot("t")
        looked.released.set()
    await check_moment(sparse, "s", moment)
    await check_moment(sparse, "t", later)
    assert "ok" == sparse.engine.find("t").state == sparse.engine.find("s").state


async def test_a_hole_that_fails_is_tried_in_small(sparse):
    moment = bytes(sparse.image.data)
    copy_to = sparse.image.copy_to
    failed: list[int] = []

    async def failing(target, offset, length, *rest):
        if length > 4 * CLUSTER:
            failed.append(offset)
            raise os_error(errno.EIO)
        return await copy_to(target, offset, length, *rest)

    sparse.image.copy_to = failing
    await sparse.engine.resize(0)
    assert failed
    assert "ok" == sparse.engine.find("s").state
    await check_moment(sparse, "s", moment)


async def test_bitmaps_are_worked_on_in_slices(bench, monkeypatch):
    monkeypatch.setattr(layers, "SLICE", 3)
    engine = bench.engine
    await engine.write(CLUSTER, b"2" * 3 * CLUSTER)
    await engine.create_snapshot("t")
    await engine.write(2 * CLUSTER, b"3" * 3 * CLUSTER)
    await engine.delete_snapshot("s")
    await wait_all_tasks_blocked()
    assert CONTENT[:CLUSTER] + b"2" * 3 * CLUSTER + CONTENT[4 * CLUSTER :] == bytes(
        await engine.read_snapshot(engine.find("t"), 0, SIZE)
    )
    check_quiet(engine, bench.store)
