"""The image in regions: what is counted, in how many, and that nobody waits for it."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from bitarray.util import ones, zeros

from snapfs.engine import turns
from snapfs.engine.bitmap import Bitmap
from snapfs.engine.dirty import Selection
from snapfs.engine.geometry import Geometry
from snapfs.engine.layer import Layer
from snapfs.engine.regions import KINDS, REGIONS, Survey, Traces, region_size
from tests.support.fakes import Bench, pattern
from tests.support.images import CLUSTER, MemoryImage

TERA = 1 << 40


@asynccontextmanager
async def bench(clusters: int = 8, **settings):
    async with trio.open_nursery() as nursery:
        yield Bench.make(nursery, pattern(1, clusters * CLUSTER), **settings)
        nursery.cancel_scope.cancel()


def where(counts: list[int]) -> list[int]:
    """Regions that have one; here each is a cluster."""
    assert set(counts) <= {0, 1}
    return [region for region, count in enumerate(counts) if count]


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        (0, CLUSTER),
        (1, CLUSTER),
        (REGIONS * CLUSTER, CLUSTER),
        (REGIONS * CLUSTER + 1, 2 * CLUSTER),
    ],
)
def test_a_region_is_the_smallest_power_of_two_of_which_there_are_not_too_many(size, wanted):
    assert wanted == region_size(size, CLUSTER)


async def test_what_the_clusters_of_an_image_with_snapshots_are():
    async with bench() as it:
        await it.engine.tracker.add("b")
        layer = await it.engine.create_snapshot("s")
        await it.engine.write(0, b"x" * CLUSTER)
        await it.engine.write(2 * CLUSTER, b"x")
        await it.engine.discard(layer, 3 * CLUSTER, 2 * CLUSTER)
        await it.engine.read_snapshot(layer, 6 * CLUSTER - 1, 2)
        found = await it.engine.survey.take()
        assert (8 * CLUSTER, CLUSTER, 8) == (found.size, found.region_size, len(found.reads))
        assert {
            "needed": [1, 5, 6, 7],
            "copied": [0, 2],
            "dirty": [0, 2],
            "discarded": [3, 4],
            "lost": [],
        } == {kind: where(counts) for kind, counts in found.clusters.items()}
        assert [5, 6] == where(found.reads)


async def test_lost_and_given_up_clusters_are_told_apart():
    async with bench() as it:
        layer = await it.engine.create_snapshot("s")
        await it.engine.discard(layer, 0, CLUSTER)
        it.store.temp(layer).fail("pwrite", "copy_to")
        await it.engine.write(4 * CLUSTER, b"x")
        assert "incomplete" == layer.state
        found = (await it.engine.survey.take()).clusters
        assert ([0], [4]) == (where(found["discarded"]), where(found["lost"]))


async def test_of_a_snapshot_of_some_clusters_the_others_are_not_given_up():
    async with bench() as it:
        bits = zeros(8, endian="little")
        bits[1:4] = 1
        layer = await it.engine.create_snapshot("s", selection=Selection(extents=bits))
        found = (await it.engine.survey.take()).clusters
        assert ([1, 2, 3], []) == (where(found["needed"]), where(found["discarded"]))
        await it.engine.discard(layer, 0, 2 * CLUSTER)
        found = (await it.engine.survey.take()).clusters
        assert ([2, 3], [1]) == (where(found["needed"]), where(found["discarded"]))


async def test_a_lost_snapshot_is_lost_everywhere_and_a_deleted_one_is_forgotten():
    async with bench() as it:
        layer = await it.engine.create_snapshot("s")
        await it.engine.discard(layer, 0, CLUSTER)
        layer.lose_all("gone", 5)
        layer.withdraw(0, 8)
        it.engine._stack.settle(0, 8)
        assert list(range(8)) == where((await it.engine.survey.take()).clusters["lost"])
        await it.engine.delete_snapshot("s")
        found = (await it.engine.survey.take()).clusters
        assert {kind: [] for kind in KINDS} == {kind: where(found[kind]) for kind in KINDS}
        assert 0 == len(it.engine.traces.discarded)


async def test_an_image_that_grows_or_shrinks_has_other_regions():
    async with bench() as it:
        await it.engine.create_snapshot("s")
        await it.engine.resize(2 * CLUSTER)
        found = await it.engine.survey.take()
        assert (2, [0, 1]) == (len(found.reads), where(found.clusters["needed"]))
        await it.engine.resize(0)
        assert [] == (await it.engine.survey.take()).reads
        await it.engine.resize(9 * CLUSTER)
        found = await it.engine.survey.take()
        assert ([], 9) == (where(found.clusters["needed"]), len(found.reads))


async def test_who_asks_while_it_is_counted_gets_what_was_begun_afterwards(monkeypatch):
    async with bench() as it:
        engine, answers, surveys = it.engine, [], 0
        real, go = engine.survey._survey, trio.Event()

        async def counted():
            nonlocal surveys
            surveys += 1
            await go.wait()
            return await real()

        monkeypatch.setattr(engine.survey, "_survey", counted)

        async def ask():
            answers.append(await engine.survey.take())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(9):
                nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            go.set()
        assert (10, 2) == (len(answers), surveys)  # the first, and one for the nine others
        with trio.move_on_after(0):
            await engine.survey.take()
        await engine.survey.take()  # who gave up leaves nothing behind


def large_layers(count: int, geometry: Geometry) -> list[Layer]:
    access, done = Bitmap(geometry.clusters), Bitmap(geometry.clusters)
    access.set(100, geometry.clusters)
    done.set(0, 1000)
    return [
        Layer(
            number, geometry, access, done, MemoryImage(b""), bytearray(300),
            granted=geometry.clusters, name=f"s{number}",
        )
        for number in range(count)
    ]  # fmt: skip


async def test_a_terabyte_and_a_thousand_snapshots_keep_nobody_waiting(monkeypatch):
    """Each piece of work is short: between two looks at the clock there are a few bitmap slices."""
    geometry = Geometry(TERA, 1 << 16)
    pending = Bitmap(geometry.clusters)
    pieces: list[int] = []

    class Turns:
        async def take(self):
            pieces.append(1)
            if len(pieces) % 1000 == 0:
                await trio.lowlevel.checkpoint()

    monkeypatch.setattr("snapfs.engine.regions.Turns", Turns)
    survey = Survey(
        large_layers(1000, geometry),
        lambda: pending,
        lambda first, stop: zeros(stop - first, endian="little"),
        lambda: geometry,
        Traces(),
    )
    found = await survey.take()
    assert (REGIONS, 512 << 20) == (len(found.reads), found.region_size)
    assert (1000, 100) == (sum(found.clusters["copied"]), sum(found.clusters["discarded"]))
    assert len(pieces) > 16 * 1000  # a turn for each layer in each piece of the image


async def test_after_a_millisecond_of_work_others_have_four(monkeypatch):
    times = iter((0.0, 0.0005, 0.0015, 0.1, 0.1004, 0.1011, 0.2, 50.0, 60.0))
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(turns.trio, "sleep", sleep)
    mine = turns.Turns(clock=lambda: next(times))  # looked at after a rest, too
    for _ in range(6):
        await mine.take()
    assert [0.006, 0.0044, 1.0] == pytest.approx(slept)


async def test_a_snapshot_that_goes_while_it_is_counted_does_no_harm(monkeypatch):
    async with bench() as it:
        for number in range(5):
            await it.engine.create_snapshot(f"s{number}")
            await it.engine.write(number * CLUSTER, b"x")
        deleted = []

        class Turns:
            async def take(self):
                await trio.lowlevel.checkpoint()
                names = [layer.name for layer in it.engine.snapshots]
                if names and len(deleted) < 5:
                    deleted.append(names[0])
                    await it.engine.delete_snapshot(names[0])

        monkeypatch.setattr("snapfs.engine.regions.Turns", Turns)
        await it.engine.survey.take()
        assert 5 == len(deleted)


def test_discards_one_after_the_other_do_not_copy_all_that_was_noted_each_time(monkeypatch):
    """A backup discards behind itself: of an image of 1 TiB a million times."""
    grown, real = [], Bitmap.grow
    monkeypatch.setattr(
        Bitmap, "grow", lambda noted, bits: (grown.append(bits), real(noted, bits))[1]
    )
    traces = Traces()
    for first in range(0, 10_000, 10):
        traces.note(traces.discarded, first, ones(10, endian="little"))
    assert 10_000 == traces.discarded.count()
    assert len(grown) < 20


def test_a_picture_lacks_what_there_is_no_memory_for(monkeypatch):
    """The discard, or the copy that failed, is carried on with."""

    def grow(noted: Bitmap, bits: int) -> None:
        raise MemoryError

    monkeypatch.setattr(Bitmap, "grow", grow)
    traces = Traces()
    traces.note(traces.lost, 5, ones(1, endian="little"))
    assert 0 == traces.lost.count()
