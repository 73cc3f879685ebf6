from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapfs.engine.geometry import Geometry

CLUSTER = 4096
sizes = st.integers(0, 6 * CLUSTER)
numbers = st.one_of(st.integers(0, 8 * CLUSTER), st.integers(0, 8).map(lambda n: n * CLUSTER))


@given(sizes, numbers, numbers)
def test_touched_and_covered_cluster_by_cluster(size, offset, length):
    geometry = Geometry(size, CLUSTER)
    end = offset + length
    touched = [
        cluster
        for cluster in range(20)
        if max(offset, cluster * CLUSTER) < min(end, (cluster + 1) * CLUSTER)
    ]
    covered = [
        cluster
        for cluster in range(-(-size // CLUSTER))
        if offset <= cluster * CLUSTER and min(size, (cluster + 1) * CLUSTER) <= end
    ]
    assert touched == list(geometry.touched(offset, length))
    assert covered == list(geometry.covered(offset, length))


@given(sizes, st.integers(0, 8), st.integers(0, 8))
def test_a_span_ends_with_the_image(size, first, count):
    start, length = Geometry(size, CLUSTER).span(first, first + count)
    assert min(size, first * CLUSTER) == start
    assert min(size, (first + count) * CLUSTER) == start + length


@pytest.mark.parametrize("size", [0, 2048, 5000, 8 << 20, -4096])
def test_cluster_sizes_that_cannot_be(size):
    with pytest.raises(ValueError, match="power of two"):
        Geometry(1, size)
