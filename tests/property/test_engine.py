"""The engine against plain bytes: random operations, faults and stalls, several at once.

An example is a list of steps that one `trio.run` carries out.  A step starts
an operation in a task of its own and lets everything run until all tasks are
blocked, at a stall or for a timeout; so what is stalled stays in flight while
later steps go on beside it.  Time is a MockClock that only the step `Wait`
moves.  After each step everything that can be looked at without waiting is
compared with the model; at the end, and at `Settle`, all stalls are released
and nothing may be left in flight or in the temp images.

The model knows of each change of `active` under way what the bytes were and
what they will be.  Changes under way together do not overlap in bytes (in
clusters they do), so the outcome does not depend on their order.  A snapshot
made beside such changes must have each of them as a whole or not at all.

Of a dirty bitmap the model knows what the image was at the instant when it
began, and which changes were under way since: each cluster that differs from
then is in the bitmap, and nothing is that no change touched.  The same holds of
what the next mount would find, were the daemon killed now.
"""

from __future__ import annotations

from functools import partial

import trio
from hypothesis import event, given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from snapfs.engine.layer import Policy
from tests.support.fakes import Bench, pattern
from tests.support.images import CLUSTER
from tests.support.world.changes import change, clear, resize
from tests.support.world.checks import check, end, settle
from tests.support.world.operations import (
    close,
    create,
    delete,
    discard,
    list_extents,
    read,
    rename,
    seek,
    track,
)
from tests.support.world.steps import (
    SIZES,
    Break,
    Clear,
    Close,
    Cold,
    Create,
    Delete,
    Discard,
    Hold,
    Map,
    Mend,
    Nothing,
    Open,
    Read,
    Release,
    Rename,
    Resize,
    Seek,
    Settle,
    Step,
    Together,
    Track,
    Wait,
    Write,
    steps,
)
from tests.support.world.world import World

STEPS = 40  # of an example; 300 examples are 12,000
TIMEOUT = 15.0


async def advance(world: World, step: Step) -> None:
    take(world, step)
    await wait_all_tasks_blocked()
    check(world)
    if isinstance(step, Settle):
        await settle(world)


def take(world: World, step: Step) -> None:
    match step:
        case Nothing() | Settle():
            pass
        case Together():
            for each in step.steps:
                take(world, each)
        case Write():
            data = pattern(step.seed, step.length)
            change(
                world,
                step.offset,
                step.offset + step.length,
                data,
                partial(world.engine.write, step.offset, data),
                step.delay,
            )
        case Clear():
            clear(world, step)
        case Resize():
            resize(world, step)
        case Wait():
            for each in world.changes:
                world.can_lose |= each.clusters
            world.clock.jump(TIMEOUT + 1)
        case Cold():
            world.cold = step.cold
            world.image.cold = step.cold
            for temp in world.store.temps:
                temp.cold = step.cold
        case Hold() | Break():
            world.trap(step)
        case Mend():
            world.mend()
        case Release():
            if world.holds:
                world.holds.pop(step.which % len(world.holds)).release()
        case Read():
            world.start(partial(read, world, step), step.delay)
        case Create():
            if len(world.wanted) < 5:
                world.start(partial(create, world, step), step.delay)
        case Track():
            world.start(partial(track, world, step), step.delay)
        case Delete():
            world.start(partial(delete, world, step), step.delay)
        case Rename():
            world.start(partial(rename, world, step), step.delay)
        case Open():
            wanted = world.pick(step.which)
            if wanted is not None:
                world.engine.open_snapshot(wanted.layer)
                world.handles.append(wanted)
        case Close():
            if world.handles:
                wanted = world.handles.pop(step.which % len(world.handles))
                world.start(partial(close, world, wanted), step.delay)
        case Discard():
            world.start(partial(discard, world, step), step.delay)
        case Map():
            world.start(partial(list_extents, world, step), step.delay)
        case Seek():
            world.start(partial(seek, world, step), step.delay)
        case _:
            raise AssertionError(step)


async def run_steps(script: list[Step], size: int, policy: Policy, clock: MockClock) -> None:
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            content = bytearray(pattern(255, size))
            content[2 * CLUSTER : 4 * CLUSTER] = bytes(len(content[2 * CLUSTER : 4 * CLUSTER]))
            bench = Bench.make(nursery, content, on_cbw_error=policy, cbw_timeout=TIMEOUT)
            world = World(bench, nursery, clock, policy)
            try:
                for step in script:
                    await advance(world, step)
                await end(world)
            finally:
                world.release()
            event(f"operations: {world.executed // 10 * 10}")
            scope.cancel()


@given(
    st.lists(steps, min_size=STEPS, max_size=STEPS),
    st.sampled_from((*SIZES, 130000)),
    st.sampled_from(("break-snapshot", "break-guest-write")),
)
def test_engine_against_plain_bytes(script: list[Step], size: int, policy: Policy) -> None:
    clock = MockClock()
    try:
        trio.run(partial(run_steps, script, size, policy, clock), clock=clock)
    except BaseExceptionGroup as group:  # hypothesis tells failures apart by where they were raised
        raise first_of(group) from None


def first_of(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
