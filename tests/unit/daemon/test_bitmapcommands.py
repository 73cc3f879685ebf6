"""Requests about bitmaps: what is refused, and extents that come in pieces."""

from __future__ import annotations

from collections import defaultdict

import pytest

from snapfs.daemon.bitmapcommands import MAX_STAGED
from snapfs.daemon.commands import Commands
from snapfs.errors import BitmapNotFound, InvalidRange, SnapshotLost, UsageError
from tests.support.fakes import Bench
from tests.support.images import CLUSTER

SIZE = 8 * CLUSTER


@pytest.fixture
async def commands(nursery):
    bench = Bench.make(nursery, b"1" * SIZE)
    fast = lambda: defaultdict(int)  # noqa: E731
    commands = Commands(bench.engine, "image", "/mnt", "process", fast, "/temp", lambda: None)
    commands.engine = bench.engine
    return commands


async def ask(commands, command: str, **request):
    return await commands.table()[command](request)


async def test_extents_in_pieces_are_one_list(commands):
    token = await ask(commands, "stage", extents=[[0, 1]])
    assert token == await ask(commands, "stage", extents=[[3 * CLUSTER, CLUSTER]], **token)
    await ask(commands, "create", name="s", **token)
    layer = commands.engine.find("s")
    assert [0, 3] == [cluster for cluster in range(8) if layer.access.get(cluster)]
    with pytest.raises(UsageError, match="begin again"):
        await ask(commands, "create", name="t", **token)


async def test_a_list_stays_until_a_snapshot_was_made_of_it(commands):
    token = await ask(commands, "stage", extents=[])
    with pytest.raises(UsageError):
        await ask(commands, "create", name="..", **token)
    created = await ask(commands, "create", name="s", **token)
    assert 0 == created["clusters"]["accessible"]


async def test_few_lists_are_kept(commands):
    tokens = [await ask(commands, "stage", extents=[]) for _ in range(MAX_STAGED + 1)]
    with pytest.raises(UsageError, match="begin again"):
        await ask(commands, "stage", extents=[], **tokens[0])
    await ask(commands, "stage", extents=[], **tokens[1])


async def test_a_list_does_not_outlive_the_size_that_it_was_made_for(commands):
    token = await ask(commands, "stage", extents=[])
    await commands.engine.resize(2 * SIZE)
    with pytest.raises(UsageError, match="changed its size"):
        await ask(commands, "stage", extents=[[SIZE, 1]], **token)


@pytest.mark.parametrize(
    "extents", [None, 5, "x", [[1]], [[1, 2, 3]], [["0", 1]], [[True, 1]], [5], {}]
)
async def test_what_is_no_list_of_extents_is_refused(commands, extents):
    with pytest.raises(UsageError, match=r"\[offset, length\]"):
        await ask(commands, "stage", extents=extents)


@pytest.mark.parametrize("extent", [[-1, 1], [0, -1], [SIZE, 1], [0, SIZE + 1], [1 << 70, 1]])
async def test_an_extent_outside_the_image_is_refused(commands, extent):
    with pytest.raises(InvalidRange):
        await ask(commands, "create", name="s", extents=[extent])
    assert () == commands.engine.layers


@pytest.mark.parametrize(
    "request_", [{"clear_bitmap": "yes"}, {"bitmap": 5}, {"next": 5}, {"token": "x"}]
)
async def test_values_of_another_type_are_refused(commands, request_):
    with pytest.raises(UsageError):
        await ask(commands, "create", name="s", **request_)


async def test_map_marks_what_one_bitmap_or_any_has(commands):
    await ask(commands, "bitmap_add", name="a")
    await commands.engine.write(0, b"x")
    await ask(commands, "bitmap_add", name="b")
    await commands.engine.write(CLUSTER, b"x")
    for name, dirty in ((None, 2 * CLUSTER), ("a", 2 * CLUSTER), ("b", CLUSTER)):
        answer = await ask(commands, "map", file="active", bitmap=name)
        assert dirty == sum(each["length"] for each in answer["extents"] if each["dirty"])
        rows = await ask(commands, "map", file="active", bitmap=name, rows=True)
        assert dirty == sum(row[1] for row in rows["extents"] if row[5])
    with pytest.raises(BitmapNotFound):
        await ask(commands, "map", file="active", bitmap="none")


async def test_a_lost_snapshot_cannot_be_compared(commands):
    layer = await commands.engine.create_snapshot("s")
    layer.degrade("lost", "a test")
    with pytest.raises(SnapshotLost):
        await ask(commands, "diff", a="s")


async def since(commands, bitmap: str, snapshot: str | None) -> list[int]:
    """The clusters that a bitmap tells of."""
    answer = await ask(commands, "diff", bitmap=bitmap, b=snapshot)
    assert None is answer["next"]
    assert bitmap == answer["bitmap"]["name"]
    return [
        cluster
        for each in answer["extents"]
        for cluster in range(each["start"] // CLUSTER, -(-(sum(extent_of(each))) // CLUSTER))
    ]


def extent_of(each: dict) -> tuple[int, int]:
    assert "changed" == each["state"]
    return each["start"], each["length"]


async def test_what_changed_since_a_bitmap_began(commands):
    engine = commands.engine
    await ask(commands, "bitmap_add", name="b")
    await engine.write(0, b"x")
    await ask(commands, "create", name="s")
    await engine.write(3 * CLUSTER, b"y")
    assert [0, 3] == await since(commands, "b", None)
    assert [0, 3] == await since(commands, "b", "s")  # one too many does no harm
    with pytest.raises(BitmapNotFound):
        await since(commands, "c", None)


async def test_what_was_cut_after_a_snapshot_counts_as_changed(commands):
    engine = commands.engine
    await ask(commands, "bitmap_add", name="b")
    await ask(commands, "create", name="s")
    await engine.resize(6 * CLUSTER)
    assert [6, 7] == await since(commands, "b", "s")
    assert [] == await since(commands, "b", None)
    await engine.resize(5 * CLUSTER - 1)
    assert [4, 5, 6, 7] == await since(commands, "b", "s")


async def test_a_bitmap_that_began_with_a_snapshot_or_later_tells_nothing_of_it(commands):
    await ask(commands, "bitmap_add", name="a")
    await ask(commands, "create", name="s", next="b")
    await ask(commands, "bitmap_add", name="c")
    assert [] == await since(commands, "a", "s")
    for bitmap in ("b", "c"):
        with pytest.raises(UsageError, match="began with snapshot 's' or later"):
            await since(commands, bitmap, "s")
    await ask(commands, "create", name="t", bitmap="a", clear_bitmap=True)
    with pytest.raises(UsageError, match="began with snapshot 't' or later"):
        await since(commands, "a", "t")
