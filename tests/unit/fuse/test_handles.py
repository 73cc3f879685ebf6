"""Who uses the page cache of `active`: all who have it open, or nobody."""

from __future__ import annotations

import os
from typing import cast

import pytest

from snapfs.fuse import requestfilter
from snapfs.fuse.handles import Handle, Handles
from snapfs.fuse.pagecache import PageCache

ACTIVE = 2
OWN, SOMEBODY = 7, 8  # threads


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    requestfilter.load()


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
