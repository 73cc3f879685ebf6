"""What is known of the points of a directory."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from attrs import evolve

from snapfs.backup import verified
from snapfs.backup.chain import Directory, Point, init
from snapfs.backup.verified import NAME, found, note, why_damaged


def directory_of(path, count: int) -> Directory:
    points: list[Point] = []
    for number in range(1, count + 1):
        point = Point(
            number=number, name=f"{number:04d}-2026", token=f"{number:012x}",
            created="2026-11-02T12:00:00Z", size=1, parent=points[-1].name if points else None,
            image="/vm/a.img", data_bytes=1, zero_bytes=0, digest=f"{number:032x}",
        )  # fmt: skip
        points.append(point)
    directory = init(str(path))
    directory.save(evolve(directory.chain, points=tuple(points), next_number=count + 1))
    return directory


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by an hour whenever it is looked at."""

    class Clock:
        now_ = datetime(2026, 11, 2, tzinfo=UTC)

        @classmethod
        def now(cls, zone):
            cls.now_ += timedelta(hours=1)
            return cls.now_.astimezone(zone)

        fromisoformat = staticmethod(datetime.fromisoformat)

    monkeypatch.setattr(verified, "datetime", Clock)


def test_what_is_noted_is_found_as_long_as_the_point_is_the_same(tmp_path):
    directory = directory_of(tmp_path, 2)
    first, second = directory.chain.points
    assert {} == found(directory.path, directory.chain)
    note(directory, {first: True, second: False})
    assert {first.name: True, second.name: False} == {
        name: each.good for name, each in found(directory.path, directory.chain).items()
    }
    directory.save(evolve(directory.chain, points=(first, evolve(second, digest="f" * 32))))
    assert [first.name] == list(found(directory.path, directory.chain))
    (tmp_path / NAME).write_text("{}")
    assert {} == found(directory.path, directory.chain)


def test_where_nothing_can_be_noted_nothing_is_known(tmp_path):
    directory = directory_of(tmp_path, 1)
    (tmp_path / f"{NAME}.new").mkdir()
    note(directory, {directory.chain.points[0]: True})
    assert {} == found(directory.path, directory.chain)


def test_damage_below_counts_until_a_later_look_finds_the_point_good(tmp_path, clock):
    directory = directory_of(tmp_path, 3)
    first, second, third = directory.chain.points
    assert None is why_damaged(directory, third)
    note(directory, {second: False})
    assert "0002" in why_damaged(directory, third)
    assert None is why_damaged(directory, first)
    note(directory, {third: True})
    assert None is why_damaged(directory, third)
    note(directory, {first: False})
    assert "0001" in why_damaged(directory, third)
    note(directory, {third: False})
    assert why_damaged(directory, third)
