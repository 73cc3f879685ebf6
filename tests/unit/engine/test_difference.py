"""What differs between two moments, from the layers' bitmaps alone."""

from __future__ import annotations

import pytest

from snapfs.engine.difference import differences, extents
from snapfs.engine.dirty import Selection, clusters_of
from tests.support.fakes import Bench
from tests.support.images import CLUSTER

SIZE = 8 * CLUSTER


@pytest.fixture
async def engine(nursery):
    return Bench.make(nursery, b"1" * SIZE).engine


def found(engine, a: str, b: str | None = None) -> tuple[list[int], list[int]]:
    newer = None if b is None else engine.find(b)
    changed, unknown = differences(engine.layers, engine.find(a), newer, engine.geometry)
    assert len(changed) == len(unknown)
    return (
        [cluster for cluster, bit in enumerate(changed) if bit],
        [cluster for cluster, bit in enumerate(unknown) if bit],
    )


async def test_a_change_belongs_to_the_moments_that_it_lies_between(engine):
    await engine.create_snapshot("a")
    await engine.write(0, b"x")
    await engine.create_snapshot("b")
    await engine.write(0, b"y")
    await engine.write(CLUSTER, b"y")
    assert ([0], []) == found(engine, "a", "b") == found(engine, "b", "a")
    assert ([0, 1], []) == found(engine, "b") == found(engine, "a")
    assert ([], []) == found(engine, "a", "a")


async def test_an_old_snapshot_knows_only_the_first_change(engine):
    """A second write of a cluster is seen from the newer snapshots that needed it."""
    await engine.create_snapshot("a")
    await engine.write(0, b"x")
    await engine.create_snapshot("b")
    await engine.write(0, b"y")
    await engine.create_snapshot("c")
    assert ([0], []) == found(engine, "a", "c") == found(engine, "b", "c")
    await engine.delete_snapshot("b")
    assert ([0], []) == found(engine, "a", "c")
    assert ([], []) == found(engine, "c")


async def test_what_the_older_may_not_read_is_unknown(engine):
    bits = clusters_of(engine.geometry, [(0, 2 * CLUSTER)])
    await engine.create_snapshot("a", selection=Selection(extents=bits))
    await engine.write(CLUSTER, b"x" * 2 * CLUSTER)
    assert ([1], [2, 3, 4, 5, 6, 7]) == found(engine, "a")
    await engine.discard(engine.find("a"), 0, 2 * CLUSTER)
    assert ([], list(range(8))) == found(engine, "a")


async def test_what_only_one_of_them_has_differs(engine):
    await engine.resize(SIZE - 1)
    await engine.create_snapshot("a")
    await engine.resize(SIZE + CLUSTER)
    assert ([7, 8], []) == found(engine, "a")
    await engine.create_snapshot("b")
    await engine.resize(2 * CLUSTER)
    assert (list(range(2, 8)), []) == found(engine, "a")
    assert (list(range(2, 9)), []) == found(engine, "b")
    assert ([7, 8], []) == found(engine, "a", "b")


async def test_extents_come_in_order_cut_at_the_end_and_in_pages(engine):
    await engine.resize(SIZE - 5)
    bits = clusters_of(engine.geometry, [(2 * CLUSTER, SIZE - 5 - 2 * CLUSTER)])
    await engine.create_snapshot("a", selection=Selection(extents=bits))
    await engine.write(3 * CLUSTER, b"x" * 2 * CLUSTER)
    await engine.write(7 * CLUSTER, b"x")
    layer = engine.find("a")
    both = differences(engine.layers, layer, None, engine.geometry)
    expected = [
        (0, 2 * CLUSTER, "unknown"),
        (3 * CLUSTER, 2 * CLUSTER, "changed"),
        (7 * CLUSTER, CLUSTER - 5, "changed"),
    ]
    assert expected == extents(layer.geometry, *both, 0, 10)
    assert expected[:1] == extents(layer.geometry, *both, 0, 1)
    assert expected[1:] == extents(layer.geometry, *both, 3, 10)
