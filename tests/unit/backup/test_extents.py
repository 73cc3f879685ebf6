"""Sets of bytes, against plain sets."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from snapfs.backup.extents import Extents

BOUNDS = st.tuples(st.integers(0, 30), st.integers(0, 30))


@given(st.lists(st.tuples(st.sampled_from(["add", "remove", "cut"]), BOUNDS), max_size=25), BOUNDS)
def test_they_hold_what_was_put_in_merged_and_ascending(calls, looked_at):
    extents, expected = Extents(), set()
    for name, (start, stop) in calls:
        if name == "add":
            extents.add(start, stop)
            expected |= set(range(start, stop))
        elif name == "remove":
            extents.remove(start, stop)
            expected -= set(range(start, stop))
        else:
            extents.cut(start)
            expected = {each for each in expected if each < start}
    found = list(extents)
    assert expected == {each for start, stop in found for each in range(start, stop)}
    assert all(start < stop for start, stop in found)
    assert all(stop < start for (_, stop), (start, _) in pairwise(found))
    assert len(expected) == extents.total()
    assert bool(expected) == bool(extents)
    wanted = set(range(*looked_at))
    inside, outside = list(extents.inside(*looked_at)), list(extents.outside(*looked_at))
    assert expected & wanted == {each for part in inside for each in range(*part)}
    assert wanted - expected == {each for part in outside for each in range(*part)}
    assert sorted(inside) == inside
    assert sorted(outside) == outside
    assert all(start < stop for start, stop in [*inside, *outside])
