"""Moments, and what of a backup tells what changed since one."""

from __future__ import annotations

import os
from typing import Any

import pytest

from snapfs.backup import moments
from snapfs.backup.moments import Moment
from snapfs.errors import BitmapUnusable, NotFound, PointDamaged, UsageError
from tests.support.points import Backup

K64 = 1 << 16


def test_a_moment_is_known_by_its_time_and_size():
    moment = Moment("2026-11-30T19:03:30.242359Z", 5)
    assert moment.is_same(Moment("2026-11-30T19:03:30.242359+00:00", 5))
    assert moment.is_same(Moment("2026-11-30T20:03:30.242359+01:00"))
    assert not moment.is_same(Moment("2026-11-30T19:03:30.242358Z", 5))
    assert not moment.is_same(Moment("2026-11-30T19:03:30.242359Z", 6))
    with pytest.raises(ValueError, match="time zone"):
        Moment("2026-11-30T19:03:30")


class Daemon:
    """What a mount says of an image whose bitmap has one cluster."""

    def __init__(self, bitmaps: list[str], size: int) -> None:
        self.bitmaps = bitmaps
        self.size = size

    def call(self, command: str, **request: Any) -> dict[str, Any]:
        if command == "bitmap_list":
            return {"bitmaps": [{"name": name} for name in self.bitmaps]}
        if command == "status":
            return {"image": {"size": self.size}}
        assert ("diff", None) == (command, request["b"])
        extent = {"start": 9 * K64, "length": K64, "state": "changed"}
        return {"extents": [extent], "next": None, "bitmap": {"began": None}}


@pytest.fixture
def backup(tmp_path) -> Backup:
    backup = Backup(tmp_path / "backup")
    backup.add({0: os.urandom(10 * K64)})
    backup.add({K64: os.urandom(K64), 3 * K64: 2 * K64})
    backup.add({4 * K64: os.urandom(K64)}, size=12 * K64)
    return backup


def since(backup: Backup, text: str, size: int = 12 * K64) -> moments.Changes:
    chain = backup.directory.chain
    client: Any = Daemon([chain.prefix + chain.points[-1].token], size)
    return moments._Asking(client, None).since_point(backup.directory, text)


def test_what_changed_since_a_point_is_what_later_ones_hold_and_the_bitmap(backup):
    newest = [(9 * K64, 10 * K64)]
    assert newest == list(since(backup, "latest").changed)
    assert [(4 * K64, 5 * K64), *newest] == list(since(backup, "2").changed)
    first = since(backup, "1")
    assert [(K64, 2 * K64), (3 * K64, 5 * K64), *newest] == list(first.changed)
    assert Moment(backup.directory.chain.points[0].created, 10 * K64) == first.base
    backup.add({0: os.urandom(12 * K64)}, full=True)
    assert [(0, 12 * K64)] == list(since(backup, "1").changed)
    assert [(0, 3 * K64)] == list(since(backup, "1", size=3 * K64).changed)


def test_only_the_bitmap_of_the_newest_point_is_what_a_snapshot_may_be_limited_to(backup):
    chain = backup.directory.chain
    assert chain.prefix + chain.points[-1].token == since(backup, "3").bitmap
    assert since(backup, "2").bitmap is None


def test_without_its_bitmap_or_its_checksums_nobody_knows(backup):
    client: Any = Daemon([], 12 * K64)
    with pytest.raises(BitmapUnusable, match="a full copy is needed"):
        moments._Asking(client, None).since_point(backup.directory, "2")
    point = backup.directory.chain.points[-1]
    with open(backup.directory.sums_of(point.name), "ab") as file:
        file.write(b"\n")
    with pytest.raises(PointDamaged):
        since(backup, "2")
    assert since(backup, "3").changed  # which needs none of it


def test_how_a_point_is_named(backup, monkeypatch):
    for text in (str(backup.path / "2"), f"{backup.path}/latest"):
        with moments.open_point(text) as (directory, name):
            assert (str(backup.path), text.rpartition("/")[2]) == (directory.path, name)
    monkeypatch.chdir(backup.path)
    with moments.open_point("./2") as (directory, _):
        assert str(backup.path) == directory.path
    for text in (str(backup.path), f"{backup.path}/"):
        with pytest.raises(UsageError, match="say which point"):
            moments.open_point(text).__enter__()
    with pytest.raises(NotFound, match="DIR/POINT"):
        moments.open_point("/no/such").__enter__()
