"""Which point a text means."""

from __future__ import annotations

import pytest
from attrs import evolve

from snapfs.backup.chain import VERSION, Chain, Point
from snapfs.backup.choosing import choose
from snapfs.errors import NotFound, UsageError


def chain_of(*times: tuple[str, str]) -> Chain:
    """Points with the time in their names and that of their snapshots."""
    points = []
    for number, (named, created) in enumerate(times, 1):
        point = Point(
            number=number, name=f"{number:04d}-{named}", token=f"{number:012x}", created=created,
            size=1, parent=points[-1].name if points else None, image="/vm/a.img",
            data_bytes=1, zero_bytes=0, digest="0" * 32,
        )  # fmt: skip
        points.append(point)
    return Chain(VERSION, "0" * 12, len(points) + 1, tuple(points))


CHAIN = chain_of(
    ("2026-11-28T02-47-02Z", "2026-11-28T02:47:02.250000Z"),
    ("2026-11-29T02-47-02Z", "2026-11-29T02:47:03.001000Z"),  # the next second had begun
    ("2026-11-29T12-00-00Z", "2026-11-29T12:00:00.999999Z"),
)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (None, 3),
        ("latest", 3),
        ("2", 2),
        ("0002", 2),
        ("0001-2026-11-28T02-47-02Z", 1),
        ("2026-11-29T02-47-02Z", 2),
        ("2026-11-29T02:47:02", 2),
        ("2026-11-29T02:47:03Z", 2),
        ("2026-11-29T03:47:02+01:00", 2),
        ("20261129T024702Z", 2),
        ("2026-11-29T02:47:03.001Z", 2),
        ("2026-11-29T02:47:02.999Z", 1),
        ("2026-11-29T02:47:01", 1),
        ("2026-11-28T02:47:02.250000Z", 1),
        ("2026-11-29T12:00", 3),
        ("2026-11-29T11:59", 2),
        ("2026-11-28", 1),
        ("2026-11-29", 3),
        ("20261129", 3),
        ("2999-01-01", 3),
        ("9999-12-31", 3),
    ],
)
def test_a_point_is_found_by_number_name_and_time(text, number):
    assert number == choose(CHAIN, text).number


@pytest.mark.parametrize(
    "text", ["7", "0", "2026-11-27", "2026-11-28T02:47:01", "2026-11-28T02:47:02.2Z", "never", ""]
)
def test_what_means_no_point_is_not_found(text):
    with pytest.raises(NotFound):
        choose(CHAIN, text)


def test_of_two_in_one_second_both_are_named():
    chain = chain_of(*[("2026-11-28T02-47-02Z", f"2026-11-28T02:47:02.{n}Z") for n in "159"])
    for text in ("2026-11-28T02-47-02Z", "2026-11-28T02:47:02"):
        with pytest.raises(UsageError, match=r"0001-.* or 0003-.* by its number"):
            choose(chain, text)
    assert 2 == choose(chain, "2026-11-28T02:47:02.5Z").number


def test_when_the_clock_was_set_back_both_are_named():
    chain = chain_of(
        ("2026-11-28T10-00-00Z", "2026-11-28T10:00:00Z"),
        ("2026-11-28T09-30-00Z", "2026-11-28T09:30:00Z"),
    )
    assert 1 == choose(chain, "2026-11-28T10:00:00Z").number
    assert 2 == choose(chain, "2026-11-28T09:45").number
    with pytest.raises(UsageError, match=r"0001-.* or 0002-"):
        choose(chain, "2026-11-28")


def test_the_name_in_an_old_directory_may_be_anything():
    chain = evolve(CHAIN, points=(evolve(CHAIN.points[0], name="0001-2026"),))
    assert 1 == choose(chain, "2026-11-28T02:47:02").number
    with pytest.raises(NotFound):
        choose(Chain(VERSION, "0" * 12), "1")
