from __future__ import annotations

import errno
import logging
import os

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from snapfs.engine.space import CREDIT_SECONDS, TempSpace, Usage
from tests.support.fakes import Bench, pattern
from tests.support.images import CLUSTER, Space
from tests.support.naive import check_quiet

OLD = pattern(1, 64 * CLUSTER)


class Numbers:
    """What a TempSpace asks for, and its clock."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.used = 0
        self.free = 10_000
        self.now = 0.0
        self.questions = 0
        self.outdated = True  # what is answered was so when the question was put
        self.answering = trio.Event()
        self.answering.set()
        self._nursery = nursery

    async def ask(self) -> Usage:
        self.questions += 1
        first = Usage(self.used, self.free)
        await self.answering.wait()
        return first if self.outdated else Usage(self.used, self.free)

    def space(self, **settings) -> TempSpace:
        return TempSpace(self.ask, self._nursery, clock=lambda: self.now, **settings)

    async def copy(self, space: TempSpace, length: int) -> int:
        granted = await space.claim(length)
        self.land(space, granted, granted)
        return granted

    def land(self, space: TempSpace, held: int, written: int) -> None:
        """A copy that held so much has written that much."""
        self.used += written
        self.free -= written
        space.release(held, written)
        space.note(written)


@pytest.fixture
async def numbers(nursery) -> Numbers:
    return Numbers(nursery)


@pytest.mark.parametrize(
    ("settings", "most"),
    [({}, 10_000), ({"reserve": 1_000}, 9_000), ({"limit": 5_000}, 5_000),
     ({"limit": 9_500, "reserve": 1_000}, 9_000), ({"limit": 0}, 0), ({"reserve": 20_000}, 0)],
)  # fmt: skip
async def test_all_room_and_not_a_byte_more_is_granted(numbers, settings, most):
    space = numbers.space(**settings)
    while await numbers.copy(space, 70):
        pass
    assert most == numbers.used


async def test_claims_under_way_count_and_may_give_room_back(numbers, nursery):
    space = numbers.space(limit=100)
    assert 60 == await space.claim(60)
    granted: list[int] = []

    async def claim() -> None:
        granted.append(await space.claim(60))

    nursery.start_soon(claim)
    await wait_all_tasks_blocked()
    assert [] == granted
    numbers.land(space, 60, 30)  # the rest of it were zeros
    await wait_all_tasks_blocked()
    assert [60] == granted
    nursery.start_soon(claim)
    await wait_all_tasks_blocked()
    numbers.land(space, 60, 60)
    await wait_all_tasks_blocked()
    assert [60, 10] == granted


async def test_a_new_limit_counts_at_once(numbers):
    space = numbers.space()
    await numbers.copy(space, 500)
    space.set_limit(600)
    assert 100 == await numbers.copy(space, 500)
    space.set_limit(None)
    assert 500 == await numbers.copy(space, 500)


async def test_what_was_freed_is_granted_again(numbers):
    space = numbers.space(limit=100)
    assert (100, 0) == (await numbers.copy(space, 100), await numbers.copy(space, 10))
    numbers.used -= 50
    assert 50 == await numbers.copy(space, 60)


async def test_an_answer_that_was_under_way_does_not_know_of_what_was_freed(numbers, nursery):
    space = numbers.space(limit=100)
    await numbers.copy(space, 100)
    numbers.answering = trio.Event()
    nursery.start_soon(space.look)
    await wait_all_tasks_blocked()
    numbers.used -= 100
    granted: list[int] = []

    async def claim() -> None:
        granted.append(await space.claim(100))

    nursery.start_soon(claim)
    await wait_all_tasks_blocked()
    numbers.answering.set()
    await wait_all_tasks_blocked()
    assert [100] == granted


@pytest.mark.parametrize("outdated", [True, False])
async def test_what_lands_during_a_question_is_counted_once_at_least(numbers, nursery, outdated):
    numbers.outdated = outdated
    space = numbers.space(limit=100)
    held = await space.claim(40)
    numbers.answering = trio.Event()
    nursery.start_soon(space.look)
    await wait_all_tasks_blocked()
    numbers.land(space, held, 40)
    numbers.answering.set()
    await wait_all_tasks_blocked()
    assert (60 if outdated else 20) == space.room()
    while await numbers.copy(space, 7):
        pass
    assert 100 == numbers.used


async def test_a_loan_is_what_is_known_and_asks_nobody(numbers):
    space = numbers.space(limit=5_000)
    assert 0 == space.lend(100)  # nothing is known
    await space.look()
    asked = numbers.questions
    assert (100, 525, 0) == (space.lend(100), space.lend(9_999), space.lend(1))
    numbers.land(space, 100, 0)
    assert 100 == space.lend(200)  # what was not used
    numbers.land(space, 625, 625)
    assert asked == numbers.questions
    await space.look()
    numbers.now += CREDIT_SECONDS + 1
    assert 0 == space.lend(1)  # what is known is old
    assert 1 == await numbers.copy(space, 1)
    assert 100 == space.lend(100)


async def test_loans_end_at_the_limit(numbers):
    space = numbers.space(limit=300)
    await space.look()
    assert (200, 100, 0) == (space.lend(200), space.lend(200), space.lend(1))
    numbers.land(space, 300, 150)
    assert 150 == space.lend(200)


async def test_storage_that_fails_fails_the_claim_and_leaves_what_is_known(numbers):
    space = numbers.space(limit=1_000)
    await numbers.copy(space, 100)
    await space.look()
    known = space.status()

    async def fail() -> Usage:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    space.ask = fail
    with pytest.raises(OSError, match="Input/output"):
        await space.claim(950)
    await space.refresh()
    assert known == space.status()


async def test_storage_that_does_not_answer_leaves_the_last_numbers(numbers, autojump_clock):
    space = numbers.space(limit=1_000)
    assert (0, None) == (space.status().room, space.status().age)
    await numbers.copy(space, 100)
    await space.refresh()
    numbers.answering = trio.Event()
    numbers.now += 5.0
    await space.refresh()
    status = space.status()
    assert (100, 900, 5.0) == (status.used, status.room, status.age)
    numbers.answering.set()
    await space.refresh()
    assert 0.0 == space.status().age


async def test_it_warns_once_at_each_level_with_the_time_that_is_left(numbers, caplog):
    space = numbers.space(limit=1_000)
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            numbers.now += 1.0
            await numbers.copy(space, 10)
    messages = [record.message for record in caplog.records]
    assert ["80 %", "95 %"] == [message.split(": ")[1][:4] for message in messages]
    assert messages[0].endswith("full in 20 s") or messages[0].endswith("full in 19 s")
    assert (1_000, 95) == (space.status().used, space.status().warning)


async def test_the_reason_is_named(numbers):
    space = numbers.space(limit=5)
    await space.look()
    assert "temp-limit=5" in space.explain()
    numbers.free = 7
    space = numbers.space(limit=500, reserve=9)
    await space.look()
    assert "temp-reserve=9" in space.explain()


async def test_the_engine_keeps_to_the_limit_and_zeros_need_no_room(nursery):
    content = bytearray(OLD)
    content[: 8 * CLUSTER] = bytes(8 * CLUSTER)
    bench = Bench.make(nursery, content, on_cbw_error="break-guest-write", temp_limit=10 * CLUSTER)
    layer = await bench.engine.create_snapshot("s")
    with pytest.raises(OSError, match="temp-limit") as caught:
        await bench.engine.write(0, bytes(len(content)))
    assert errno.ENOSPC == caught.value.errno
    assert 10 * CLUSTER == bench.store.temp(layer).blocks() * 512
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


async def test_storage_that_does_not_tell_its_numbers_holds_up_only_who_needs_room(nursery):
    bench = Bench.make(nursery, OLD, on_cbw_error="break-guest-write", cbw_timeout=0)
    layer = await bench.engine.create_snapshot("s")
    new = pattern(2, CLUSTER)
    await bench.engine.write(0, new)
    bench.engine.space.set_limit(1 << 30)  # what is known grants nothing now
    stall = bench.store.stall("usage")
    written = trio.Event()

    async def write() -> None:
        await bench.engine.write(CLUSTER, new)
        written.set()

    nursery.start_soon(write)
    await stall.reached.wait()
    for number in range(1_000):
        cluster = number % 64
        expected = new if cluster == 0 else OLD[cluster * CLUSTER : (cluster + 1) * CLUSTER]
        assert expected == await bench.engine.read(cluster * CLUSTER, CLUSTER)
        expected = OLD[cluster * CLUSTER : (cluster + 1) * CLUSTER]
        assert expected == await bench.engine.read_snapshot(layer, cluster * CLUSTER, CLUSTER)
        await bench.engine.write(0, new)
    assert 0 == bench.engine.copier.lend(1)
    other = await bench.engine.create_snapshot("other")
    await bench.engine.discard(layer, 0, 2 * CLUSTER)
    await bench.engine.delete_snapshot("other")
    assert other not in bench.engine.layers
    assert not written.is_set()
    stall.release()
    await written.wait()
    await wait_all_tasks_blocked()
    check_quiet(bench.engine, bench.store)
    assert OLD[2 * CLUSTER :] == await bench.engine.read_snapshot(
        layer, 2 * CLUSTER, len(OLD) - 2 * CLUSTER
    )


async def test_a_claim_that_waits_for_the_storage_meets_the_timeout(nursery, autojump_clock):
    bench = Bench.make(nursery, OLD, cbw_timeout=2)
    layer = await bench.engine.create_snapshot("s")
    stall = bench.store.stall("usage")
    await bench.engine.write(0, b"x" * CLUSTER)
    assert ("incomplete", errno.ETIMEDOUT, 1) == (layer.state, layer.errno, layer.lost)
    stall.release()
    await wait_all_tasks_blocked()
    check_quiet(bench.engine, bench.store)
