from __future__ import annotations

import threading
from functools import partial

import pytest
import trio
from trio import _threads
from trio._core import _thread_cache
from trio.testing import wait_all_tasks_blocked

from snapfs.storage import offload
from snapfs.storage.offload import BATCH, TRIPS, Offloader, in_thread, keep_thread


@pytest.fixture
def offloader() -> Offloader:
    return Offloader(trio.CapacityLimiter(4))


@pytest.fixture
def refuse(monkeypatch):
    """Let no thread be had, the next so many times."""
    start, left = _threads.start_thread_soon, [0]

    def refused(*arguments: object) -> None:
        if left[0]:
            left[0] -= 1
            raise RuntimeError("can't start new thread")
        start(*arguments)

    def refuse(times: int) -> None:
        left[0] = times

    monkeypatch.setattr(_threads, "start_thread_soon", refused)
    monkeypatch.setattr(offload, "RETRY_SECONDS", 0.001)
    return refuse


async def test_a_call_waits_for_a_thread_that_cannot_be_started(offloader, refuse):
    refuse(3)
    assert 7 == await in_thread(int, "7")
    calls: list[int] = []
    refuse(2 * TRIPS)
    async with trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(offloader.run, calls.append, number)
    assert list(range(100)) == sorted(calls)


async def test_one_thread_is_kept_for_when_there_are_no_others(nursery, monkeypatch):
    assert offload.KEEP_SECONDS < _thread_cache.IDLE_TIMEOUT
    used: list[object] = []

    async def use(call):
        used.append(call)
        await trio.sleep(0)

    monkeypatch.setattr(offload, "in_thread", use)
    monkeypatch.setattr(offload, "KEEP_SECONDS", 0.001)
    await nursery.start(keep_thread)
    while len(used) < 3:
        await trio.sleep(0.001)


async def test_what_has_failed_for_its_caller_is_not_done_later(offloader, monkeypatch):
    """A write that its caller has repeated would overwrite what was written since."""
    done: list[str] = []

    async def fail(*_arguments, **_keywords):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(offload, "in_thread", fail)
        with pytest.raises(MemoryError):
            await offloader.run(done.append, "refused")
    await offloader.run(done.append, "later")
    assert ["later"] == done


async def test_results_and_errors_come_back_to_whom_they_belong(offloader):
    results = {}

    async def call(number: int) -> None:
        try:
            results[number] = await offloader.run(divmod, number, number % 3)
        except ZeroDivisionError:
            results[number] = None

    async with trio.open_nursery() as nursery:
        for number in range(200):
            nursery.start_soon(call, number)
    assert {n: divmod(n, n % 3) if n % 3 else None for n in range(200)} == results


async def test_calls_that_wait_travel_together(offloader):
    stop = threading.Event()
    threads: list[int] = []

    async with trio.open_nursery() as nursery:
        for _ in range(TRIPS):
            nursery.start_soon(offloader.run, stop.wait)
            await wait_all_tasks_blocked()
        for _ in range(BATCH):
            nursery.start_soon(offloader.run, lambda: threads.append(threading.get_ident()))
        await wait_all_tasks_blocked()
        assert [] == threads
        stop.set()
    assert BATCH == len(threads)
    assert 1 == len(set(threads))


async def test_who_is_cancelled_in_the_queue_is_never_run(offloader):
    stop = threading.Event()
    ran = []
    async with trio.open_nursery() as nursery:
        for _ in range(TRIPS):
            nursery.start_soon(offloader.run, stop.wait)
            await wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            scope.cancel()
            await offloader.run(ran.append, "cancelled")
        nursery.start_soon(offloader.run, ran.append, "other")
        await wait_all_tasks_blocked()
        stop.set()
    assert ["other"] == ran


async def test_who_is_cancelled_under_way_waits_for_the_end(offloader):
    begun, stop = threading.Event(), threading.Event()
    ran = []

    def call() -> None:
        begun.set()
        stop.wait()
        ran.append("to the end")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(offloader.run, call)
        await trio.to_thread.run_sync(begun.wait)
        nursery.cancel_scope.cancel()
        stop.set()
    assert ["to the end"] == ran
    assert 5 == await offloader.run(lambda: 5)


async def test_cancelling_who_travels_and_who_was_taken_along(nursery):
    limiter = trio.CapacityLimiter(1)
    offloader = Offloader(limiter)
    held = threading.Event()
    scopes: dict[str, trio.CancelScope] = {}

    async def run(name: str) -> None:
        with trio.CancelScope() as scopes[name]:
            await offloader.run(str, name)

    async def start(name: str) -> None:
        nursery.start_soon(run, name)
        await wait_all_tasks_blocked()

    async def cancel(name: str) -> None:
        scopes[name].cancel()
        await wait_all_tasks_blocked()

    hold = partial(trio.to_thread.run_sync, held.wait, limiter=limiter)
    nursery.start_soon(hold)
    await wait_all_tasks_blocked()
    for name in ("first", "second", "driver", "passenger"):
        await start(name)
    for name in ("first", "passenger", "driver", "second"):
        await cancel(name)
    assert all(scope.cancelled_caught for scope in scopes.values())
    held.set()
    assert "later" == await offloader.run(str, "later")


async def test_what_ends_a_trip_runs_once_and_its_failure_goes_to_whom_nothing_else_befell():
    stop, ended = threading.Event(), []

    def ending() -> None:
        ended.append("trip")
        if len(ended) == 2:
            raise OSError("the ending failed")

    offloader = Offloader(trio.CapacityLimiter(4), trips=1, ending=ending)
    outcomes: dict[str, str] = {}

    async def run(name: str, call) -> None:
        try:
            outcomes[name] = await offloader.run(call)
        except (OSError, ValueError) as error:
            outcomes[name] = str(error)

    def fail() -> str:
        raise ValueError("the call failed")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, "first", lambda: "ok" if stop.wait() else "")
        await wait_all_tasks_blocked()
        for name, call in (("second", lambda: "ok"), ("third", fail), ("fourth", lambda: "ok")):
            nursery.start_soon(run, name, call)
        await wait_all_tasks_blocked()
        assert [] == ended
        stop.set()
    failed = "the ending failed"
    assert {"first": "ok", "second": failed, "third": "the call failed", "fourth": failed} == (
        outcomes
    )
    assert ["trip", "trip"] == ended
