"""What there is to copy: merging, aligning, cutting into pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from snapfs.backup.plan import ALIGNMENT, Kind, Plan, pieces

D, Z, M = Kind.DATA, Kind.ZERO, Kind.MISSING


def plan_of(*extents: tuple[int, Kind], start: int = 0) -> Plan:
    plan = Plan()
    for length, kind in extents:
        plan.add(start, length, kind)
        start += length
    return plan


def test_neighbours_of_one_kind_are_one_extent():
    assert [(0, 8192, D), (8192, 16384, M)] == list(plan_of((4096, D), (4096, D), (8192, M)))


def test_data_spreads_to_aligned_borders():
    plan = plan_of((5000, Z), (1000, D), (14000, Z), (3, D))
    assert [(0, 4096, Z), (4096, 8192, D), (8192, 16384, Z), (16384, 20003, D)] == list(plan)


def test_zeros_between_data_that_are_too_short_to_be_holes_are_data():
    assert [(0, 12288, D)] == list(plan_of((5000, D), (3000, Z), (4288, D)))
    assert [(0, 8192, D)] == list(plan_of((100, Z), (8092, D)))


def test_data_does_not_spread_over_what_may_not_be_read():
    assert [(0, 5000, M), (5000, 6000, D)] == list(plan_of((5000, M), (1000, D)))


@given(
    st.lists(st.tuples(st.integers(1, 3 * ALIGNMENT), st.sampled_from(Kind)), max_size=30),
    st.integers(0, 10),
)
def test_whatever_the_map_nothing_is_skipped_and_no_data_becomes_zeros(extents, start):
    start *= ALIGNMENT
    plan = plan_of(*extents, start=start)
    found: dict[int, Kind] = {}
    end = start
    for first, stop, kind in plan:
        assert end == first < stop
        found.update(dict.fromkeys(range(first, stop), kind))
        end = stop
    position = start
    for length, kind in extents:
        for offset in (position, position + length - 1):
            assert found[offset] is kind or (kind is Z and found[offset] is D)
        position += length
    assert position == end
    assert len(list(plan)) == len(plan)


def test_pieces_end_at_multiples():
    assert [(3, 8), (8, 16), (16, 17)] == list(pieces(3, 17, 8))
    assert [] == list(pieces(8, 8, 8))
