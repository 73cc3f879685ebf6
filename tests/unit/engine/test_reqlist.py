from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from snapfs.engine.reqlist import Gate, Request, RequestList, entered


@pytest.mark.parametrize(
    ("first", "stop", "overlaps"),
    [(0, 2, False), (0, 3, True), (3, 4, True), (4, 9, True), (5, 9, False), (3, 3, False)],
)
def test_overlap(first, stop, overlaps):
    requests: RequestList[Request] = RequestList()
    with entered(requests, 2, 5):
        assert overlaps == (requests.find(first, stop) is not None)
    assert requests.find(0, 9) is None


async def test_waiting_ends_when_the_last_one_that_overlaps_has_ended(nursery):
    requests: RequestList[Request] = RequestList()
    near, far = Request(0, 2), Request(7, 9)
    requests.add(near)
    requests.add(far)
    results = []

    async def wait() -> None:
        results.append(await requests.wait_clear(0, 4))

    nursery.start_soon(wait)
    await wait_all_tasks_blocked()
    later = Request(3, 4)
    requests.add(later)
    requests.end(near)
    await wait_all_tasks_blocked()
    assert [] == results
    requests.end(later)
    await wait_all_tasks_blocked()
    assert [True] == results
    assert not await requests.wait_clear(0, 4)


async def test_a_gate_closes_when_all_are_out_and_keeps_the_others_waiting(nursery):
    gate = Gate()
    happened = []
    leave, reopen = trio.Event(), trio.Event()

    async def enter(name: str, event: trio.Event | None = None) -> None:
        async with gate.inside():
            happened.append(name)
            if event is not None:
                await event.wait()

    async def close() -> None:
        async with gate.closed():
            happened.append("closed")
            await reopen.wait()

    nursery.start_soon(enter, "first", leave)
    await wait_all_tasks_blocked()
    nursery.start_soon(close)
    await wait_all_tasks_blocked()
    assert not gate.idle
    nursery.start_soon(enter, "second")
    await wait_all_tasks_blocked()
    assert ["first"] == happened
    leave.set()
    await wait_all_tasks_blocked()
    assert ["first", "closed"] == happened
    reopen.set()
    await wait_all_tasks_blocked()
    assert ["first", "closed", "second"] == happened
    assert gate.idle


async def test_two_cannot_close_a_gate():
    gate = Gate()
    async with gate.closed():
        with pytest.raises(RuntimeError):
            async with gate.closed():
                pass
    async with gate.inside():
        assert not gate.idle
