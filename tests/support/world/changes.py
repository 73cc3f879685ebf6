"""Changes of `active`: how they begin, and what they have done when they end."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from functools import partial

from hypothesis import event

from tests.support.naive import touched_clusters
from tests.support.world.steps import Clear, Resize
from tests.support.world.world import MAX_IN_FLIGHT, Change, World

CBW_ERRNOS = (errno.EIO, errno.ENOSPC, errno.ETIMEDOUT)
FOREVER = 1 << 40


def clear(world: World, step: Clear) -> None:
    start, stop = step.offset, step.offset + step.length
    engine = world.engine
    match step.kind:
        case "punch":
            stop = min(stop, len(world.active))
            call = partial(engine.punch, start, step.length)
        case "zero":
            call = partial(engine.zero, start, step.length)
        case "zero-keep":
            stop = min(stop, len(world.active))
            call = partial(engine.zero, start, step.length, True)
        case "allocate" | "allocate-keep":
            keep = step.kind == "allocate-keep"
            if not keep and any(change.size >= 0 for change in world.changes):
                return  # whether it extends the image depends on their order
            if keep or stop <= len(world.active):
                change(
                    world, start, start, b"", partial(engine.allocate, start, step.length, keep), 0
                )
                return
            start = len(world.active)
            call = partial(engine.allocate, step.offset, step.length, False)
    if start < stop:
        change(world, start, stop, bytes(stop - start), call, step.delay)


def resize(world: World, step: Resize) -> None:
    start = min(step.size, len(world.active))
    stop = max(step.size, len(world.active))
    change(
        world,
        start,
        stop,
        bytes(stop - start),
        partial(world.engine.resize, step.size),
        step.delay,
        resize_to=step.size,
    )


def change(
    world: World,
    start: int,
    stop: int,
    new: bytes,
    call: Callable[[], Awaitable[object]],
    delay: int,
    resize_to: int | None = None,
) -> None:
    if world.running >= MAX_IN_FLIGHT:
        return
    if stop > start > len(world.active):  # the gap becomes zeros
        new = bytes(start - len(world.active)) + new
        start = len(world.active)
    reach = stop
    grows = stop > start and stop > len(world.active)
    if resize_to is not None or grows:
        reach = FOREVER  # whatever else would change the size
    beside = [*world.changes, *(each for made in world.creations for each in made)]
    for each in beside:
        each_reach = FOREVER if each.size >= 0 else each.stop
        if start < each_reach and each.start < reach:
            return
    size = -1
    if resize_to is not None:
        size = resize_to
    elif grows:
        size = stop
    old = bytes(world.active[start:stop]).ljust(stop - start, b"\0")
    world.tick += 1
    clusters = touched_clusters(start, stop - start)
    change = Change(start, stop, old, new, size, clusters, world.tick)
    world.changes.append(change)
    for interval in world.intervals.values():
        interval.changes.append(change)
    for made in world.creations:
        made.append(change)
    world.start(partial(carry_out, world, change, call), delay)


async def carry_out(world: World, change: Change, call: Callable[[], Awaitable[object]]) -> None:
    try:
        await call()
    except OSError as error:
        assert error.errno in CBW_ERRNOS
        change.failed = True
        event("a change of the image failed")
        if not world.image_faulty and not world.store_faulty:
            assert change.clusters & world.can_lose, f"failed for no reason: {error}"
            assert may_break_writes(world)
    world.tick += 1
    change.ended = world.tick
    world.changes.remove(change)
    land(world, change)


def may_break_writes(world: World) -> bool:
    return "break-guest-write" in (
        world.default,
        *(wanted.layer.policy for wanted in world.wanted),
    )


def land(world: World, change: Change) -> None:
    """Bring the model to what the change has done."""
    if not change.failed:
        if change.size >= 0:
            del world.active[change.size :]
            world.active.extend(bytes(change.size - len(world.active)))
        stop = min(change.stop, len(world.active))
        world.active[change.start : stop] = change.new[: max(0, stop - change.start)]
        return
    if not (world.image_faulty or world.store_faulty):
        return  # nothing has reached the image: the next check sees if it has
    if change.size >= 0:
        assert world.image.size() in {len(world.active)} | set(
            range(change.start, max(change.size, change.start) + 1)
        )
        del world.active[world.image.size() :]
        world.active.extend(bytes(world.image.size() - len(world.active)))
    stop = min(change.stop, len(world.active))
    found = bytes(world.image.data[change.start : stop])
    for index, byte in enumerate(found):
        assert byte in (change.old[index], change.new[index])
    world.active[change.start : stop] = found
