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

import errno
import os
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from itertools import pairwise

import trio
from attrs import define, field, frozen
from hypothesis import event, given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from snapfs.daemon.describe import describe_snapshot
from snapfs.engine.dirty import DirtyBitmap, Selection, clusters_of
from snapfs.engine.layer import Layer, Policy
from snapfs.errors import (
    AccessDenied,
    BitmapNotFound,
    BitmapUnusable,
    InvalidRange,
    SnapshotExists,
    SnapshotNotFound,
)
from tests.support.fakes import (
    CLUSTER,
    Bench,
    Call,
    MemoryImage,
    Stall,
    check_bitmaps,
    check_quiet,
    covered_clusters,
    naive_content,
    pattern,
    touched_clusters,
)

STEPS = 40  # of an example; 300 examples are 12,000
TIMEOUT = 15.0
CBW_ERRNOS = (errno.EIO, errno.ENOSPC, errno.ETIMEDOUT)
MAX_IN_FLIGHT = 10
FOREVER = 1 << 40

# Steps.  Small integers stand for "the so-many-eth of those there are now".


@frozen
class Nothing:
    """What hypothesis shrinks a step to."""


@frozen
class Write:
    offset: int
    length: int
    seed: int
    delay: int


@frozen
class Clear:
    kind: str  # punch, zero, zero-keep, allocate, allocate-keep
    offset: int
    length: int
    delay: int


@frozen
class Resize:
    size: int
    delay: int


@frozen
class Read:
    which: int  # 0: active
    offset: int
    length: int
    partial: bool
    delay: int


@frozen
class Create:
    policy: Policy | None
    delay: int
    access: str = "all"  # or bitmap, extents
    after: str = "nothing"  # or clear, next
    which: int = 0  # the bitmap
    clusters: frozenset[int] = frozenset()  # the extents


@frozen
class Track:
    """Something done to dirty bitmaps."""

    kind: str  # add, clear, merge, remove
    which: int
    to: int
    delay: int


@frozen
class Delete:
    which: int
    delay: int


@frozen
class Rename:
    which: int
    to: int
    delay: int


@frozen
class Open:
    which: int


@frozen
class Close:
    which: int
    delay: int


@frozen
class Discard:
    which: int
    offset: int
    length: int
    delay: int


@frozen
class Map:
    which: int  # 0: active
    offset: int
    length: int
    delay: int


@frozen
class Seek:
    which: int  # 0: active
    offset: int
    data: bool
    delay: int


@frozen
class Hold:
    """Stall calls of one kind on some clusters, once or several times."""

    where: str  # image, temp, store
    kind: str
    first: int
    count: int
    times: int | None


@frozen
class Break:
    """Let calls of one kind fail on some clusters."""

    where: str
    kind: str
    first: int
    count: int
    times: int | None
    errno: int
    lands: int


@frozen
class Mend:
    """No more faults."""


@frozen
class Release:
    which: int


@frozen
class Cold:
    """The page cache has lost, or got, everything."""

    cold: bool


@frozen
class Wait:
    """Time passes: every timeout under way expires."""


@frozen
class Settle:
    """Release everything and look at the quiet engine."""


@frozen
class Together:
    """Several at once, in an order that the scheduler chooses."""

    steps: tuple[object, ...]


Step = object

SIZES = (0, 1, CLUSTER - 1, CLUSTER, CLUSTER + 1, 5 * CLUSTER, 7 * CLUSTER + 512, 12 * CLUSTER)

delays = st.integers(0, 4)
whiches = st.integers(0, 5)
offsets = st.builds(
    lambda cluster, extra: max(0, cluster * CLUSTER + extra),
    st.integers(0, 13),
    st.sampled_from((0, 0, 0, 1, -1, 512, 2048, 4095)),
)
lengths = st.builds(
    lambda clusters, extra: max(1, clusters * CLUSTER + extra),
    st.integers(0, 6),
    st.sampled_from((0, 0, 0, 1, -1, 512, 2048)),
)
sizes = st.one_of(st.sampled_from(SIZES), offsets)
policies = st.sampled_from((None, None, "break-snapshot", "break-guest-write"))

writes = st.builds(Write, offsets, lengths, st.integers(0, 250), delays)
clears = st.builds(
    Clear,
    st.sampled_from(("punch", "zero", "zero-keep", "allocate", "allocate-keep")),
    offsets,
    lengths,
    delays,
)
reads = st.builds(Read, whiches, offsets, lengths, st.booleans(), delays)
creates = st.builds(
    Create,
    policies,
    delays,
    st.sampled_from(("all", "all", "bitmap", "bitmap", "extents")),
    st.sampled_from(("nothing", "clear", "next")),
    whiches,
    st.frozensets(st.integers(0, 12)),
)
tracks = st.builds(
    Track, st.sampled_from(("add", "add", "clear", "merge", "remove")), whiches, whiches, delays
)
deletes = st.builds(Delete, whiches, delays)
discards = st.builds(Discard, whiches, offsets, lengths, delays)
others = st.one_of(
    st.builds(Resize, sizes, delays),
    st.builds(Rename, whiches, whiches, delays),
    st.builds(Open, whiches),
    st.builds(Close, whiches, delays),
    st.builds(Map, whiches, offsets, lengths, delays),
    st.builds(Seek, whiches, offsets, st.booleans(), delays),
)
places = st.sampled_from(
    (
        ("temp", "pwrite"),
        ("temp", "pwrite"),
        ("image", "copy"),
        ("image", "pread"),
        ("image", "pwrite"),
        ("temp", "pread"),
        ("temp", "punch"),
        ("temp", "truncate"),
        ("image", "extents"),
        ("temp", "extents"),
        ("image", "punch"),
        ("image", "truncate"),
        ("store", "create"),
        ("store", "save"),
        ("store", "save"),
        ("store", "remove"),
        ("store", "make"),
        ("store", "grow"),
    )
)
faulty = st.sampled_from(
    (
        ("temp", "pwrite"),
        ("temp", "pwrite"),
        ("image", "copy"),
        ("image", "pread"),
        ("image", "pwrite"),
        ("image", "punch"),
        ("image", "truncate"),
        ("temp", "pread"),
        ("image", "extents"),
        ("store", "create"),
        ("store", "save"),
        ("store", "make"),
        ("store", "grow"),
    )
)
holds = st.builds(
    lambda place, first, count, times: Hold(*place, first, count, times),
    places,
    st.integers(0, 11),
    st.sampled_from((1, 2, 4, 99)),
    st.sampled_from((1, 1, 2, None)),
)
breaks = st.builds(
    lambda place, first, count, times, number, lands: Break(
        *place, first, count, times, number, lands
    ),
    faulty,
    st.integers(0, 11),
    st.sampled_from((1, 2, 99)),
    st.sampled_from((1, 1, 2, None)),
    st.sampled_from((errno.EIO, errno.ENOSPC)),
    st.sampled_from((0, 0, 1, 3000)),
)
operations = st.one_of(writes, discards, reads, creates, tracks, deletes, others, writes, clears)
troubles = st.one_of(
    holds,
    st.builds(Release, whiches),
    breaks,
    st.just(Mend()),
    st.builds(Cold, st.booleans()),
    st.just(Wait()),
    holds,
)
steps = st.one_of(
    st.just(Nothing()),
    writes,
    operations,
    operations,
    troubles,
    operations,
    st.builds(Together, st.lists(operations, min_size=2, max_size=4).map(tuple)),
    st.just(Settle()),
)


@define(eq=False)
class Change:
    """A change of `active` under way: bytes [start, stop) from `old` to `new`.

    `size`: the size it may lead to.
    """

    start: int
    stop: int
    old: bytes
    new: bytes
    size: int
    clusters: set[int]
    begun: int
    ended: int | None = None
    failed: bool = False


@define(eq=False)
class Wanted:
    """A snapshot as it must be."""

    layer: Layer
    name: str | None
    content: bytes
    access: set[int]
    discarded: set[int] = field(factory=set)
    lost: set[int] = field(factory=set)
    doomed: bool = False  # a deletion has begun
    busy: int = 0  # operations under way that change the name
    begun: int = 0  # all that ever were

    @property
    def clusters(self) -> int:
        return -(-len(self.content) // CLUSTER)

    def enter(self) -> Callable[[], bool]:
        """Begin to change the name; the answer tells whether nobody else did meanwhile."""
        self.busy += 1
        self.begun += 1
        was_alone, begun = self.busy == 1, self.begun
        return lambda: was_alone and self.begun == begun


@define(eq=False)
class Interval:
    """A dirty bitmap as it must be, from the instant when it began."""

    base: bytes  # the image then
    changes: list[Change]  # under way then or begun since
    merged: set[int] = field(factory=set)  # clusters that came from other bitmaps


class World:
    """The engine, the model, and what is going on."""

    def __init__(
        self, bench: Bench, nursery: trio.Nursery, clock: MockClock, default: Policy
    ) -> None:
        self.bench = bench
        self.engine = bench.engine
        self.image = bench.image
        self.store = bench.store
        self.nursery = nursery
        self.clock = clock
        self.default = default
        self.active = bytearray(bench.image.data)
        self.wanted: list[Wanted] = []
        self.handles: list[Wanted] = []
        self.changes: list[Change] = []
        self.creations: list[list[Change]] = []  # of each: the changes beside it
        self.pending_names: list[str] = []
        self.tick = 0
        self.running = 0
        self.names = 0
        self.cold = False
        self.can_lose: set[int] = set()  # clusters that a copy failed of, or was late
        self.trap_templates: list[Hold | Break] = []
        self.temp_traps: list[tuple[Hold | Break, MemoryImage]] = []
        self.holds: list[Stall] = []
        self.image_faulty = False
        self.read_faulty = False
        self.store_faulty = False
        self.image.on_fault = self.note_fault
        self.store.prepare = self.prepare_temp
        self.executed = 0
        self.intervals: dict[int, Interval] = {}  # by the bitmap's id
        self.moments: dict[int, tuple[bytes, dict[str, set[int]]]] = {}  # by the layer's id
        self.engine.tracker.bitmaps.changed = self.note_bitmaps
        self.append = self.engine._stack.append
        self.engine._stack.append = self.note_instant  # type: ignore[method-assign]

    def note_bitmaps(self) -> None:
        """A bitmap begins: no write is under way in the engine at this instant."""
        for bitmap in self.engine.tracker.bitmaps:
            if bitmap.id not in self.intervals:
                self.intervals[bitmap.id] = Interval(bytes(self.image.data), list(self.changes))

    def note_instant(self, layer: Layer) -> None:
        self.moments[layer.id] = bytes(self.image.data), self.dirty_now()
        self.append(layer)

    def dirty_now(self) -> dict[str, set[int]]:
        """What each bitmap has, those included that are being replaced in this instant."""
        return {
            bitmap.name: bits_of(bitmap)
            for bitmap in reversed(self.engine.tracker.bitmaps._bitmaps)
            if bitmap.parts is not None
        }

    # Running

    def start(self, operation: Callable[[], Awaitable[None]], delay: int) -> None:
        if self.running >= MAX_IN_FLIGHT:
            return
        self.running += 1
        self.executed += 1

        async def run() -> None:
            for _ in range(delay):
                await trio.lowlevel.checkpoint()
            try:
                await operation()
            finally:
                self.running -= 1

        self.nursery.start_soon(run)

    async def step(self, step: Step) -> None:
        self.take(step)
        await wait_all_tasks_blocked()
        self.check()
        if isinstance(step, Settle):
            await self.settle()

    def take(self, step: Step) -> None:
        match step:
            case Nothing() | Settle():
                pass
            case Together():
                for each in step.steps:
                    self.take(each)
            case Write():
                data = pattern(step.seed, step.length)
                self.change(
                    step.offset,
                    step.offset + step.length,
                    data,
                    partial(self.engine.write, step.offset, data),
                    step.delay,
                )
            case Clear():
                self.clear(step)
            case Resize():
                self.resize(step)
            case Wait():
                for change in self.changes:
                    self.can_lose |= change.clusters
                self.clock.jump(TIMEOUT + 1)
            case Cold():
                self.cold = step.cold
                self.image.cold = step.cold
                for temp in self.store.temps:
                    temp.cold = step.cold
            case Hold() | Break():
                self.trap(step)
            case Mend():
                self.mend()
            case Release():
                if self.holds:
                    self.holds.pop(step.which % len(self.holds)).release()
            case Read():
                self.start(partial(self.read, step), step.delay)
            case Create():
                if len(self.wanted) < 5:
                    self.start(partial(self.create, step), step.delay)
            case Track():
                self.start(partial(self.track, step), step.delay)
            case Delete():
                self.start(partial(self.delete, step), step.delay)
            case Rename():
                self.start(partial(self.rename, step), step.delay)
            case Open():
                wanted = self.pick(step.which)
                if wanted is not None:
                    self.engine.open_snapshot(wanted.layer)
                    self.handles.append(wanted)
            case Close():
                if self.handles:
                    wanted = self.handles.pop(step.which % len(self.handles))
                    self.start(partial(self.close, wanted), step.delay)
            case Discard():
                self.start(partial(self.discard, step), step.delay)
            case Map():
                self.start(partial(self.map, step), step.delay)
            case Seek():
                self.start(partial(self.seek, step), step.delay)
            case _:
                raise AssertionError(step)

    def pick(self, which: int) -> Wanted | None:
        """A snapshot that its name still leads to."""
        there = [wanted for wanted in self.wanted if not wanted.doomed]
        return there[which % len(there)] if there else None

    # Stalls and faults

    def trap(self, step: Hold | Break) -> None:
        if step.where == "temp":
            self.trap_templates.append(step)
            for temp in self.store.temps:
                self.lay_trap(step, temp)
        elif step.where == "image":
            self.lay_trap(step, self.image)
            if isinstance(step, Break):
                if step.kind in ("pwrite", "punch", "truncate"):
                    self.image_faulty = True
                elif step.kind != "copy":
                    self.read_faulty = True
        elif isinstance(step, Hold):
            self.holds.append(self.store.stall(step.kind, times=step.times))
        else:
            self.store.fail(step.kind, times=step.times, errno=step.errno)
            self.store_faulty = True

    def lay_trap(self, step: Hold | Break, image: MemoryImage) -> None:
        place = {
            "start": step.first * CLUSTER,
            "stop": (step.first + step.count) * CLUSTER,
            "times": step.times,
        }
        if isinstance(step, Hold):
            self.holds.append(image.stall(step.kind, **place))
        else:
            image.fail(step.kind, **place, errno=step.errno, lands=step.lands)
            if step.where == "temp" and step.kind == "pread":
                self.read_faulty = True

    def prepare_temp(self, temp: MemoryImage) -> None:
        temp.on_fault = self.note_fault
        temp.cold = self.cold
        for step in self.trap_templates:
            self.lay_trap(step, temp)

    def note_fault(self, call: Call) -> None:
        if call.kind in ("copy", "pwrite"):
            self.can_lose |= touched_clusters(call.offset, call.length)

    def mend(self) -> None:
        self.trap_templates = [each for each in self.trap_templates if isinstance(each, Hold)]
        for image in (self.image, *self.store.temps):
            image.faults.clear()
        self.store.faults.clear()

    def release(self) -> None:
        self.trap_templates.clear()
        for hold in self.holds:
            hold.release()
        self.holds.clear()
        for image in (self.image, *self.store.temps):
            image.stalls.clear()
        self.store.stalls.clear()

    # Changes of `active`

    def clear(self, step: Clear) -> None:
        start, stop = step.offset, step.offset + step.length
        engine = self.engine
        match step.kind:
            case "punch":
                stop = min(stop, len(self.active))
                call = partial(engine.punch, start, step.length)
            case "zero":
                call = partial(engine.zero, start, step.length)
            case "zero-keep":
                stop = min(stop, len(self.active))
                call = partial(engine.zero, start, step.length, True)
            case "allocate" | "allocate-keep":
                keep = step.kind == "allocate-keep"
                if not keep and any(change.size >= 0 for change in self.changes):
                    return  # whether it extends the image depends on their order
                if keep or stop <= len(self.active):
                    self.change(
                        start, start, b"", partial(engine.allocate, start, step.length, keep), 0
                    )
                    return
                start = len(self.active)
                call = partial(engine.allocate, step.offset, step.length, False)
        if start < stop:
            self.change(start, stop, bytes(stop - start), call, step.delay)

    def resize(self, step: Resize) -> None:
        start = min(step.size, len(self.active))
        stop = max(step.size, len(self.active))
        self.change(
            start,
            stop,
            bytes(stop - start),
            partial(self.engine.resize, step.size),
            step.delay,
            resize_to=step.size,
        )

    def change(
        self,
        start: int,
        stop: int,
        new: bytes,
        call: Callable[[], Awaitable[object]],
        delay: int,
        resize_to: int | None = None,
    ) -> None:
        if self.running >= MAX_IN_FLIGHT:
            return
        if stop > start > len(self.active):  # the gap becomes zeros
            new = bytes(start - len(self.active)) + new
            start = len(self.active)
        reach = stop
        grows = stop > start and stop > len(self.active)
        if resize_to is not None or grows:
            reach = FOREVER  # whatever else would change the size
        beside = [*self.changes, *(each for made in self.creations for each in made)]
        for each in beside:
            each_reach = FOREVER if each.size >= 0 else each.stop
            if start < each_reach and each.start < reach:
                return
        size = -1
        if resize_to is not None:
            size = resize_to
        elif grows:
            size = stop
        old = bytes(self.active[start:stop]).ljust(stop - start, b"\0")
        self.tick += 1
        clusters = touched_clusters(start, stop - start)
        change = Change(start, stop, old, new, size, clusters, self.tick)
        self.changes.append(change)
        for interval in self.intervals.values():
            interval.changes.append(change)
        for made in self.creations:
            made.append(change)
        self.start(partial(self.carry_out, change, call), delay)

    async def carry_out(self, change: Change, call: Callable[[], Awaitable[object]]) -> None:
        try:
            await call()
        except OSError as error:
            assert error.errno in CBW_ERRNOS
            change.failed = True
            event("a change of the image failed")
            if not self.image_faulty and not self.store_faulty:
                assert change.clusters & self.can_lose, f"failed for no reason: {error}"
                assert self.may_break_writes()
        self.tick += 1
        change.ended = self.tick
        self.changes.remove(change)
        self.land(change)

    def may_break_writes(self) -> bool:
        return "break-guest-write" in (
            self.default,
            *(wanted.layer.policy for wanted in self.wanted),
        )

    def land(self, change: Change) -> None:
        """Bring the model to what the change has done."""
        if not change.failed:
            if change.size >= 0:
                del self.active[change.size :]
                self.active.extend(bytes(change.size - len(self.active)))
            stop = min(change.stop, len(self.active))
            self.active[change.start : stop] = change.new[: max(0, stop - change.start)]
            return
        if not (self.image_faulty or self.store_faulty):
            return  # nothing has reached the image: the next check sees if it has
        if change.size >= 0:
            assert self.image.size() in {len(self.active)} | set(
                range(change.start, max(change.size, change.start) + 1)
            )
            del self.active[self.image.size() :]
            self.active.extend(bytes(self.image.size() - len(self.active)))
        stop = min(change.stop, len(self.active))
        found = bytes(self.image.data[change.start : stop])
        for index, byte in enumerate(found):
            assert byte in (change.old[index], change.new[index])
        self.active[change.start : stop] = found

    # The other operations

    async def read(self, step: Read) -> None:
        wanted = self.pick(step.which - 1) if step.which else None
        if wanted is None:
            await self.read_active(step)
            return
        layer = wanted.layer
        self.engine.open_snapshot(layer)
        try:
            content = wanted.content[step.offset : step.offset + step.length]
            clusters = touched_clusters(step.offset, len(content))
            try:
                data = bytes(
                    await self.engine.read_snapshot(
                        layer, step.offset, step.length, partial=step.partial
                    )
                )
            except AccessDenied:
                first = {min(clusters)} if step.partial else clusters
                assert first - self.accessible(layer)
                event("a read was denied")
            except OSError:
                assert self.read_faulty
            else:
                assert content[: len(data)] == data
                if step.partial and len(data) < len(content):
                    assert data and len(data) + step.offset in {
                        cluster * CLUSTER for cluster in clusters - self.accessible(layer)
                    }
                else:
                    assert len(content) == len(data)
                assert touched_clusters(step.offset, len(data)) <= self.accessible(layer)
        finally:
            await self.engine.close_snapshot(layer)

    @staticmethod
    def accessible(layer: Layer) -> set[int]:
        return {cluster for cluster in range(len(layer.access)) if layer.access.get(cluster)}

    async def read_active(self, step: Read) -> None:
        beside = list(self.changes)
        self.creations.append(beside)  # collects what begins meanwhile
        before = bytes(self.active)
        try:
            data = bytes(await self.engine.read(step.offset, step.length))
        except OSError:
            assert self.read_faulty
            return
        finally:
            self.forget(beside)
        if not any(change.size >= 0 for change in beside):
            assert min(step.length, max(0, len(before) - step.offset)) == len(data)
        spared = set()
        for change in beside:
            spared |= set(range(change.start, change.stop))
        for index, byte in enumerate(data):
            position = step.offset + index
            if position not in spared and position < len(before):
                assert before[position] == byte

    def forget(self, beside: list[Change]) -> None:
        self.creations = [each for each in self.creations if each is not beside]

    async def create(self, step: Create) -> None:
        self.names += 1
        name = f"s{self.names}"
        beside = list(self.changes)
        base = bytes(self.active)
        self.creations.append(beside)
        self.tick += 1
        selection = self.selection(step, f"n{self.names}")
        try:
            layer = await self.engine.create_snapshot(name, policy=step.policy, selection=selection)
        except OSError:
            assert self.store_faulty
            return
        except (BitmapUnusable, BitmapNotFound, InvalidRange):
            event("a bitmap was unusable")
            return
        finally:
            self.forget(beside)
        content = bytearray(naive_content(self.image, self.engine.layers, layer))
        size = layer.geometry.size
        assert size == len(content)
        sizes = {len(base)} | {change.size for change in beside if change.size >= 0}
        if self.image_faulty:
            sizes |= {self.image.size()}
        assert size in sizes
        expected = bytearray(base[:size].ljust(size, b"\0"))
        access = self.accessible(layer)
        absent: list[Change] = []
        present: list[Change] = []
        for change in beside:
            first, stop = change.start, min(change.stop, size)
            known = [index for index in range(first, stop) if index // CLUSTER in access]
            found = bytes(content[index] for index in known)
            old = bytes(change.old[index - first] for index in known)
            new = bytes(change.new[index - first] for index in known)
            if change.failed and self.image_faulty:
                expected[first:stop] = content[first:stop]  # it may have landed in part
                continue
            assert found == old or (found == new and not change.failed), "half a change"
            if old != new:
                (absent if found == old else present).append(change)
            expected[first:stop] = content[first:stop]
        for later in present:
            for earlier in absent:
                assert earlier.ended is None or later.begun < earlier.ended, "effect before cause"
        for cluster in access:
            start, length = layer.geometry.span(cluster, cluster + 1)
            assert expected[start : start + length] == content[start : start + length]
        wanted = Wanted(layer, name, bytes(content), self.granted(layer, selection))
        self.wanted.append(wanted)
        self.observe(wanted)

    def selection(self, step: Create, following: str) -> Selection:
        names = [bitmap.name for bitmap in self.engine.tracker.bitmaps]
        name = names[step.which % len(names)] if names and step.access == "bitmap" else None
        extents = None
        if step.access == "extents":
            clusters = [each for each in step.clusters if each < self.engine.geometry.clusters]
            ranges = [self.engine.geometry.span(each, each + 1) for each in clusters]
            extents = clusters_of(self.engine.geometry, ranges)
        return Selection(
            name,
            extents,
            clear=step.after == "clear" and name is not None,
            next=following if step.after == "next" else None,
        )

    def granted(self, layer: Layer, selection: Selection) -> set[int]:
        """The clusters that a new snapshot must give access to, of the instant that it has."""
        moment, dirty = self.moments[layer.id]
        clusters = set(range(layer.geometry.clusters))
        assert len(moment) == layer.geometry.size
        assert (selection.bitmap, layer.geometry.clusters) == (layer.bitmap, len(clusters))
        if selection.bitmap is not None:
            clusters &= dirty[selection.bitmap]
            event("a snapshot of a bitmap")
        elif selection.extents is not None:
            clusters &= {number for number, bit in enumerate(selection.extents) if bit}
        assert len(clusters) == layer.granted
        return clusters

    async def track(self, step: Track) -> None:
        tracker = self.engine.tracker
        names = [bitmap.name for bitmap in tracker.bitmaps] or ["none"]
        name, other = names[step.which % len(names)], names[step.to % len(names)]
        self.names += 1
        try:
            match step.kind:
                case "add" if len(names) < 4:
                    await tracker.add(f"b{self.names}")
                case "clear":
                    await tracker.clear(name)
                case "remove":
                    await tracker.remove(name)
                case "merge" if name != other:
                    target = await tracker.merge(name, other)
                    source = tracker.bitmaps.find(name)
                    self.intervals[target.id].merged |= bits_of(source)
        except OSError:
            assert self.store_faulty
        except (BitmapNotFound, BitmapUnusable):
            event("a bitmap was unusable")

    def check_bitmaps(self, bitmaps: Iterable[DirtyBitmap]) -> None:
        """Each cluster that differs from the beginning is in, and none that nobody touched."""
        now = bytes(self.image.data)
        for bitmap in bitmaps:
            if bitmap.parts is None:
                assert self.store_faulty, "inconsistent without a reason"
                event("a bitmap became inconsistent")
                continue
            interval = self.intervals[bitmap.id]
            found = bits_of(bitmap)
            for start in range(0, len(now), CLUSTER):
                if now[start : start + CLUSTER] != interval.base[start : start + CLUSTER]:
                    assert start // CLUSTER in found, f"{bitmap.name} lacks {start // CLUSTER}"
            touched = set(interval.merged)
            for change in interval.changes:
                touched |= change.clusters
            assert found <= touched, f"{bitmap.name} has clusters that nobody changed"

    async def delete(self, step: Delete) -> None:
        wanted = self.pick(step.which)
        if wanted is None or wanted.name is None:
            return
        wanted.doomed = True
        alone = wanted.enter()
        try:
            await self.engine.delete_snapshot(wanted.name)
        except SnapshotNotFound:
            assert not alone()
        except OSError:
            assert self.store_faulty
            if wanted.layer.name is not None:
                wanted.doomed = False
        finally:
            wanted.busy -= 1
        if wanted.layer.name is not None and wanted.busy == 0:
            wanted.doomed = False
            wanted.name = wanted.layer.name
        self.forget_dead()

    def forget_dead(self) -> None:
        self.wanted = [wanted for wanted in self.wanted if wanted.layer.live]

    async def rename(self, step: Rename) -> None:
        wanted, other = self.pick(step.which), self.pick(step.to)
        if wanted is None or other is None or wanted.name is None or other.name is None:
            return
        self.names += 1
        name = other.name if step.to % 2 else f"r{self.names}"
        alone, alone_other = wanted.enter(), other.enter()
        try:
            await self.engine.rename_snapshot(wanted.name, name)
        except SnapshotExists:
            assert other is not wanted
        except SnapshotNotFound:
            assert not alone()
        except OSError:
            assert self.store_faulty
        else:
            if other is not wanted and step.to % 2:
                assert not alone_other() or other.doomed  # it had gone, or got another name
        finally:
            wanted.busy -= 1
            other.busy -= 1
        wanted.name = wanted.layer.name

    async def close(self, wanted: Wanted) -> None:
        try:
            await self.engine.close_snapshot(wanted.layer)
        except OSError:
            assert self.store_faulty
        self.forget_dead()

    async def discard(self, step: Discard) -> None:
        wanted = self.pick(step.which)
        if wanted is None:
            return
        layer = wanted.layer
        self.engine.open_snapshot(layer)
        self.observe(wanted)
        gone = covered_clusters(len(wanted.content), step.offset, step.length) & wanted.access
        wanted.discarded |= gone
        wanted.access -= gone
        try:
            await self.engine.discard(layer, step.offset, step.length)
        finally:
            await self.engine.close_snapshot(layer)

    async def map(self, step: Map) -> None:
        wanted = self.pick(step.which - 1) if step.which else None
        beside = list(self.changes)
        self.creations.append(beside)
        size = len(self.active) if wanted is None else len(wanted.content)
        content = bytes(self.active) if wanted is None else wanted.content
        access = set() if wanted is None else self.accessible(wanted.layer)
        layer = None if wanted is None else wanted.layer
        if layer is not None:
            self.engine.open_snapshot(layer)
        try:
            extents = [extent async for extent in self.engine.map(layer, step.offset, step.length)]
        except OSError:
            assert self.read_faulty
            return
        finally:
            self.forget(beside)
            if layer is not None:
                await self.engine.close_snapshot(layer)
        if wanted is None and beside:
            return
        position = step.offset
        for extent in extents:
            assert position == extent.start and extent.length > 0
            position = extent.stop
            clusters = touched_clusters(extent.start, extent.length)
            if not extent.data:
                assert not any(content[extent.start : extent.stop])
            if layer is not None:
                if extent.accessible:
                    assert clusters <= access
                else:
                    assert not clusters & self.accessible(layer)
                    assert extent.data and extent.source == "none"
        assert position == max(step.offset, min(size, step.offset + step.length))
        kinds = [(extent.data, extent.accessible, extent.source) for extent in extents]
        assert all(first != second for first, second in pairwise(kinds))

    async def seek(self, step: Seek) -> None:
        wanted = self.pick(step.which - 1) if step.which else None
        beside = list(self.changes)
        self.creations.append(beside)
        content = bytes(self.active) if wanted is None else wanted.content
        layer = None if wanted is None else wanted.layer
        engine = self.engine
        found: int | None
        if layer is not None:
            engine.open_snapshot(layer)
        try:
            whence = os.SEEK_DATA if step.data else os.SEEK_HOLE
            if layer is None:
                found = await engine.seek(step.offset, whence)
            else:
                found = await engine.seek_snapshot(layer, step.offset, whence)
        except OSError as error:
            if error.errno != errno.ENXIO:
                assert self.read_faulty
                return
            found = None
        finally:
            self.forget(beside)
            now = set() if layer is None else self.accessible(layer)
            if layer is not None:
                await engine.close_snapshot(layer)  # takes access away if it was deleted
        if wanted is None and beside:
            return
        size = len(content)
        if step.offset >= size:
            assert found is None
        elif step.data:
            skipped = content[step.offset : size if found is None else found]
            assert not any(skipped)  # inaccessible is data: never skipped ...
            if layer is not None:
                clusters = touched_clusters(step.offset, len(skipped))
                assert clusters <= now | wanted.lost | wanted.discarded  # type: ignore[union-attr]
        else:
            assert found is not None and step.offset <= found <= size
            if found < size:
                assert 0 == content[found]

    # What must hold

    def observe(self, wanted: Wanted) -> None:
        """Account for clusters that a failed copy took from a snapshot."""
        layer = wanted.layer
        if not layer.live:
            return
        lost = wanted.access - self.accessible(layer)
        assert self.accessible(layer) <= wanted.access, "access came back"
        if lost:
            event("a snapshot lost clusters")
            assert lost <= self.can_lose, "lost without a fault or a timeout"
            assert "break-snapshot" == (layer.policy or self.default)
            wanted.access -= lost
            wanted.lost |= lost
        assert len(wanted.lost) == layer.lost
        assert ("incomplete" if wanted.lost else "ok") == layer.state
        described = describe_snapshot(layer)
        assert len(wanted.discarded) == described["clusters"]["discarded"]

    def check(self) -> None:
        """Everything that can be seen without waiting."""
        check_bitmaps(self.engine)
        self.check_bitmaps(self.engine.tracker.bitmaps)
        assert [] == self.store.misuse() + self.image.misuse
        assert self.engine.unhealthy is None
        self.check_active()
        for wanted in self.wanted:
            layer = wanted.layer
            if not layer.live:
                continue
            self.observe(wanted)
            found = naive_content(self.image, self.engine.layers, layer)
            for cluster in wanted.access:
                start, length = layer.geometry.span(cluster, cluster + 1)
                assert wanted.content[start : start + length] == found[start : start + length], (
                    f"{layer.name}: cluster {cluster} differs"
                )
        self.check_recovery()

    def check_recovery(self) -> None:
        """Were the daemon killed now, the next mount would find the same in every snapshot."""
        self.check_bitmaps(self.store.bitmaps.recover())
        layers = self.store.recover()
        for layer in layers:
            for wanted in self.wanted:
                if wanted.layer.id != layer.id or not layer.live:
                    continue
                found = naive_content(self.image, layers, layer)
                for cluster in self.accessible(layer):
                    start, length = layer.geometry.span(cluster, cluster + 1)
                    assert (
                        wanted.content[start : start + length] == found[start : start + length]
                    ), f"{layer.name}: cluster {cluster} would differ after a crash"

    def check_active(self) -> None:
        size = len(self.active)
        spared = bytearray(max(size, self.image.size()))
        for change in self.changes:
            stop = len(spared) if change.size >= 0 else min(change.stop, len(spared))
            spared[change.start : stop] = b"\1" * (stop - change.start)
        if not any(change.size >= 0 for change in self.changes):
            assert size == self.image.size() == self.engine.size
        if not self.changes:
            assert self.active == self.image.data
            return
        for index in range(min(size, self.image.size())):
            if not spared[index]:
                assert self.active[index] == self.image.data[index]

    async def settle(self) -> None:
        """Let everything end, and look at what is left."""
        self.mend()
        self.release()
        await wait_all_tasks_blocked()
        if self.running:  # those behind a cluster whose copy timed out and hangs no more
            await wait_all_tasks_blocked()
        assert 0 == self.running, "something waits for ever"
        self.check()
        check_quiet(self.engine, self.store)
        self.forget_dead()
        for image in (self.image, *self.store.temps):
            image.cold = False
        assert bytes(self.active) == bytes(await self.engine.read(0, len(self.active) + CLUSTER))
        for wanted in self.wanted:
            await self.read_all(wanted)
        for image in (self.image, *self.store.temps):
            image.cold = self.cold

    async def read_all(self, wanted: Wanted) -> None:
        size = len(wanted.content)
        for cluster in range(wanted.clusters):
            start = cluster * CLUSTER
            length = min(CLUSTER, size - start)
            try:
                data = await self.engine.read_snapshot(wanted.layer, start, length)
            except AccessDenied:
                assert cluster not in wanted.access
            else:
                assert cluster in wanted.access
                assert wanted.content[start : start + length] == bytes(data)
        if len(wanted.access) == wanted.clusters:
            assert wanted.content == bytes(
                await self.engine.read_snapshot(wanted.layer, 0, size + CLUSTER)
            )

    async def end(self) -> None:
        """Close and delete everything: nothing may remain."""
        await self.settle()
        for wanted in self.handles:
            await self.close(wanted)
        self.handles.clear()
        await self.engine.create_snapshot("last")  # and thereby save the list
        for layer in self.engine.snapshots:
            await self.engine.delete_snapshot(layer.name or "")
        for bitmap in list(self.engine.tracker.bitmaps):
            await self.engine.tracker.remove(bitmap.name)
        assert {} == self.store.bitmaps.files
        await wait_all_tasks_blocked()
        assert () == self.engine.layers
        assert {} == self.store.parts
        assert () == self.store.records
        assert 0 == self.store.space.used
        assert [] == self.store.misuse() + self.image.misuse


def bits_of(bitmap: DirtyBitmap) -> set[int]:
    assert bitmap.parts is not None
    bits = bitmap.parts.bits
    return {cluster for cluster in range(len(bits)) if bits.get(cluster)}


async def run_steps(script: list[Step], size: int, policy: Policy, clock: MockClock) -> None:
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            content = bytearray(pattern(255, size))
            content[2 * CLUSTER : 4 * CLUSTER] = bytes(len(content[2 * CLUSTER : 4 * CLUSTER]))
            bench = Bench.make(nursery, content, on_cbw_error=policy, cbw_timeout=TIMEOUT)
            world = World(bench, nursery, clock, policy)
            try:
                for step in script:
                    await world.step(step)
                await world.end()
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
