"""Who uses the page cache of `active`: all who have it open, or nobody."""

from __future__ import annotations

import os
from typing import cast

import pytest

from snapfs.fuse import requestfilter
from snapfs.fuse.handles import SLOTS, Handle, Handles
from snapfs.fuse.pagecache import PageCache

ACTIVE = 2
OWN, SOMEBODY = 7, 8  # threads


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native code, whose handles are the process's, hears of none."""
    for name in ("handle_opened", "handle_closed"):
        monkeypatch.setattr(requestfilter, name, lambda *_arguments: None)


class FakeCache:
    def is_own(self, thread: int) -> bool:
        return thread == OWN


@pytest.fixture
def handles() -> Handles:
    return Handles(cast(PageCache, FakeCache()))


def opened(handles: Handles, *, direct: bool) -> Handle:
    return handles.add_active(ACTIVE, SOMEBODY, os.O_RDWR | (os.O_DIRECT if direct else 0))


@pytest.mark.parametrize("first", [False, True])
def test_who_comes_later_does_as_those_who_are_there(handles, first):
    one = opened(handles, direct=first)
    two = opened(handles, direct=not first)
    handles.remove(one.number)
    three = opened(handles, direct=not first)
    assert [first] * 3 == [one.direct, two.direct, three.direct]
    handles.remove(two.number)
    handles.remove(three.number)
    assert opened(handles, direct=not first).direct == (not first)


def test_what_was_cached_before_a_time_without_the_cache_is_dropped(handles):
    assert opened(handles, direct=False).keep_cache
    assert opened(handles, direct=False).keep_cache
    handles = Handles(cast(PageCache, FakeCache()))
    direct = opened(handles, direct=True)
    assert direct.keep_cache
    handles.remove(direct.number)
    own = handles.add_active(ACTIVE, OWN, os.O_RDONLY)
    cached = opened(handles, direct=False)
    assert (True, False) == (own.keep_cache, cached.keep_cache)
    assert opened(handles, direct=False).keep_cache


def test_the_daemons_own_handle_decides_nothing(handles):
    own = handles.add_active(ACTIVE, OWN, os.O_RDONLY)
    assert (True, True) == (own.own, own.direct)
    assert not opened(handles, direct=False).direct


def test_who_has_a_file_open_for_long_keeps_its_slot(handles):
    disk = opened(handles, direct=True)
    for _ in range(2 * SLOTS):  # a day of backups, or somebody who means harm
        other = opened(handles, direct=False)
        assert disk.number % SLOTS != other.number % SLOTS
        handles.remove(other.number)
    many = [opened(handles, direct=False).number for _ in range(SLOTS + 9)]
    assert SLOTS == len({number % SLOTS for number in (disk.number, *many)})
    for number in many:
        handles.remove(number)
    again = [opened(handles, direct=False).number for _ in range(SLOTS - 1)]
    assert SLOTS == len({number % SLOTS for number in (disk.number, *again)})


def test_data_may_be_dirty_while_somebody_can_write_through_the_page_cache(handles):
    reader = handles.add_active(ACTIVE, SOMEBODY, os.O_RDONLY)
    assert not handles.may_be_dirty(ACTIVE)
    writers = [opened(handles, direct=False) for _ in range(2)]
    for writer in writers:
        assert handles.may_be_dirty(ACTIVE)
        handles.remove(writer.number)
    assert not handles.may_be_dirty(ACTIVE)
    handles.remove(reader.number)
    assert not handles.may_be_dirty(ACTIVE)
    opened(handles, direct=True)
    assert not handles.may_be_dirty(ACTIVE)
