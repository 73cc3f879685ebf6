from __future__ import annotations

import errno
import logging

import pytest
from fakes import CLUSTER, Bench, Space, pattern

from snapfs.space import TempSpace

OLD = pattern(1, 64 * CLUSTER)


class Numbers:
    """What a TempSpace looks up, and its clock."""

    def __init__(self) -> None:
        self.used = 0
        self.free = 10_000
        self.now = 0.0

    def space(self, **settings) -> TempSpace:
        return TempSpace(lambda: self.used, lambda: self.free, clock=lambda: self.now, **settings)

    def copy(self, space: TempSpace, length: int) -> int:
        with space.claimed(length) as granted:
            self.used += granted
            self.free -= granted
            space.note(granted)
        return granted


@pytest.fixture
def numbers() -> Numbers:
    return Numbers()


@pytest.mark.parametrize(
    ("settings", "most"),
    [({}, 10_000), ({"reserve": 1_000}, 9_000), ({"limit": 5_000}, 5_000),
     ({"limit": 9_500, "reserve": 1_000}, 9_000), ({"limit": 0}, 0), ({"reserve": 20_000}, 0)],
)  # fmt: skip
def test_all_room_and_not_a_byte_more_is_granted(numbers, settings, most):
    space = numbers.space(**settings)
    while numbers.copy(space, 70):
        pass
    assert most == numbers.used


def test_claims_in_flight_count(numbers):
    space = numbers.space(limit=100)
    with space.claimed(60) as first, space.claimed(60) as second:
        assert (60, 40) == (first, second)
    with space.claimed(100) as all_of_it:
        assert 100 == all_of_it


def test_a_new_limit_counts_at_once(numbers):
    space = numbers.space()
    numbers.copy(space, 500)
    space.set_limit(600)
    assert 100 == numbers.copy(space, 500)
    space.set_limit(None)
    assert 500 == numbers.copy(space, 500)


def test_what_was_freed_is_granted_again(numbers):
    space = numbers.space(limit=100)
    assert (100, 0) == (numbers.copy(space, 100), numbers.copy(space, 10))
    numbers.used -= 50
    assert 50 == numbers.copy(space, 60)


def test_it_warns_once_at_each_level_with_the_time_that_is_left(numbers, caplog):
    space = numbers.space(limit=1_000)
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            numbers.now += 1.0
            numbers.copy(space, 10)
    messages = [record.message for record in caplog.records]
    assert ["80 %", "95 %"] == [message.split(": ")[1][:4] for message in messages]
    assert messages[0].endswith("full in 20 s") or messages[0].endswith("full in 19 s")
    assert (1_000, 95) == (space.status().used, space.status().warning)


def test_the_reason_is_named(numbers):
    assert "temp-limit=5" in numbers.space(limit=5).explain()
    numbers.free = 7
    assert "temp-reserve=9" in numbers.space(limit=500, reserve=9).explain()


async def test_the_engine_keeps_to_the_limit_and_zeros_need_no_room(nursery):
    content = bytearray(OLD)
    content[: 8 * CLUSTER] = bytes(8 * CLUSTER)
    bench = Bench.make(nursery, content, on_cbw_error="break-guest-write", temp_limit=10 * CLUSTER)
    layer = await bench.engine.create_snapshot("s")
    with pytest.raises(OSError, match="temp-limit") as caught:
        await bench.engine.write(0, bytes(len(content)))
    assert errno.ENOSPC == caught.value.errno
    assert 10 * CLUSTER == layer.temp_bytes()
    await bench.engine.write(0, b"x" * 18 * CLUSTER)  # 8 of zeros, 10 that are copied
    with pytest.raises(OSError, match="temp-limit"):
        await bench.engine.write(18 * CLUSTER, b"x")
    bench.engine.space.set_limit(11 * CLUSTER)
    await bench.engine.write(18 * CLUSTER, b"x")
    assert content == await bench.engine.read_snapshot(layer, 0, len(content))


async def test_the_reserve_is_left_free(nursery):
    space = Space(limit=20 * CLUSTER)
    bench = Bench.make(nursery, OLD, space=space, temp_reserve=5 * CLUSTER)
    layer = await bench.engine.create_snapshot("s")
    await bench.engine.write(0, bytes(len(OLD)))
    assert 5 * CLUSTER == space.limit - space.used
    assert ("incomplete", errno.ENOSPC, 49) == (layer.state, layer.errno, layer.lost)
    assert "temp-reserve" in layer.reason
