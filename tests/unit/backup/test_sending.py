"""What send makes of what the other side says of its image."""

from __future__ import annotations

import pytest

from snapfs.backup.extents import Extents
from snapfs.backup.moments import Changes
from snapfs.backup.plan import Kind, Plan, within
from snapfs.backup.sending import _start, state_of
from snapfs.errors import UsageError, WrongBase
from tests.support.streams import moment

SIZE = 1 << 20
BASE, NOW, OTHER = (moment(hour, SIZE) for hour in range(3))
SINCE = Changes("snapshot base", BASE, Extents(), Extents())


def test_where_it_goes_on():
    assert 0 == _start(None, NOW, SINCE) == _start(None, NOW, None) == _start("none", NOW, None)
    assert 0 == _start(state_of("complete", BASE), NOW, SINCE)
    assert 0 == _start(state_of("complete", OTHER), NOW, None)
    assert 4096 == _start(state_of("partial", NOW, 4096), NOW, SINCE)
    assert SIZE == _start(state_of("partial", NOW, 1 << 40), NOW, None)
    assert SIZE == _start(state_of("complete", NOW), NOW, SINCE)  # it has all of it


@pytest.mark.parametrize(
    "state", ["none", state_of("complete", OTHER), state_of("partial", OTHER, 0)]
)
def test_what_does_not_fit_is_refused(state):
    with pytest.raises(WrongBase):
        _start(state, NOW, SINCE)


@pytest.mark.parametrize(
    "state",
    ["", "complete", "partial@2026-11-02T12:00:00Z", "complete@2026-11-02T12:00:00Z/5",
     "complete@yesterday", "complete@2026-11-02T12:00:00", "partial@2026-11-02T12:00:00Z/-1"],
)  # fmt: skip
def test_what_receive_has_not_printed_is_refused(state):
    with pytest.raises(UsageError, match="--resume-from takes"):
        _start(state, NOW, None)


def test_what_is_not_wanted_of_a_plan_is_left_alone():
    plan = Plan()
    for start, length, kind in ((0, 8192, Kind.DATA), (8192, 8192, Kind.ZERO),
                                (16384, 4096, Kind.MISSING), (20480, 4096, Kind.DATA)):  # fmt: skip
        plan.add(start, length, kind)
    assert list(plan) == list(within(plan, Extents([(0, 1 << 40)])))
    assert [
        (0, 4096, Kind.MISSING), (4096, 8192, Kind.DATA), (8192, 12288, Kind.ZERO),
        (12288, 24576, Kind.MISSING),
    ] == list(within(plan, Extents([(4096, 12288)])))  # fmt: skip
    assert [(0, 24576, Kind.MISSING)] == list(within(plan, Extents()))
