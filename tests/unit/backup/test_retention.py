"""What the rules of prune keep."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from attrs import frozen

from snapfs.backup.retention import Policy, parse_within
from snapfs.errors import UsageError

START = datetime(2026, 11, 2, 12, tzinfo=UTC)  # a Monday


@frozen
class Moment:
    name: str
    time: datetime


def moments(count: int, step_hours: float = 24.0) -> list[Moment]:
    """Numbered from 1, the first at noon of a Monday."""
    return [
        Moment(str(number), START + timedelta(hours=step_hours * (number - 1)))
        for number in range(1, count + 1)
    ]


def numbers(policy: Policy, all_: list[Moment]) -> list[int]:
    kept = policy.kept(all_)
    return [int(each.name) for each in all_ if each.name in kept]


def test_the_newest_ones_are_kept():
    assert [8, 9, 10] == numbers(Policy(last=3), moments(10))
    assert [1, 2] == numbers(Policy(last=5), moments(2))


def test_the_newest_of_each_hour_day_week_month_and_year_is_kept():
    assert [4, 8, 10] == numbers(Policy(hourly=3), moments(10, 0.25))
    by_eight = moments(10, step_hours=8)  # from noon: 2 on the first day, then 3 a day
    assert [2, 5, 8, 10] == numbers(Policy(daily=4), by_eight)
    assert [8, 10] == numbers(Policy(daily=2), by_eight)
    assert [7, 14, 16] == numbers(Policy(weekly=3), moments(16))
    assert [29, 60, 70] == numbers(Policy(monthly=3), moments(70))  # 30 November, 31 December
    assert [60, 425, 791, 800] == numbers(Policy(yearly=9), moments(800))


def test_what_is_not_much_older_than_the_newest_is_kept():
    assert [7, 8, 9, 10] == numbers(Policy(within=parse_within("3d")), moments(10))
    assert [10] == numbers(Policy(within=parse_within("23h")), moments(10))


def test_what_any_rule_keeps_stays_and_each_is_named():
    kept = Policy(last=2, weekly=9, within=timedelta(days=2)).kept(moments(16))
    assert {
        "16": ["last", "within", "weekly"],
        "15": ["last", "within"],
        "14": ["within", "weekly"],
        "7": ["weekly"],
    } == kept


def test_the_newest_stays_whatever_the_policy():
    assert [5] == numbers(Policy(), moments(5))
    assert [] == numbers(Policy(last=1), [])
    with pytest.raises(UsageError, match="what to keep"):
        Policy().refuse_empty()
    Policy(yearly=1).refuse_empty()


@pytest.mark.parametrize(
    ("text", "days"), [("30d", 30), ("36h", 1.5), ("8w", 56), ("1y6m", 366 + 6 * 31)]
)
def test_time_spans_are_read(text, days):
    assert timedelta(days=days) == parse_within(text)


@pytest.mark.parametrize("text", ["", "30", "d", "3 d", "-1d", "1.5d", "1000000000d", "\u0663d"])
def test_all_else_is_no_time_span(text):
    with pytest.raises(UsageError, match="no time span"):
        parse_within(text)
