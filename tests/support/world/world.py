"""The engine and the model that it is compared with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio
from attrs import define, field
from hypothesis import event
from trio.testing import MockClock

from snapfs.daemon.describe import describe_snapshot
from snapfs.engine.dirty import DirtyBitmap
from snapfs.engine.layer import Layer, Policy
from tests.support.fakes import Bench
from tests.support.images import CLUSTER, Call, MemoryImage, Stall
from tests.support.naive import touched_clusters
from tests.support.world.steps import Break, Hold


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


MAX_IN_FLIGHT = 10


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
        self.tick = 0
        self.running = 0
        self.names = 0
        self.cold = False
        self.can_lose: set[int] = set()  # clusters that a copy failed of, or was late
        self.trap_templates: list[Hold | Break] = []
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

    @staticmethod
    def accessible(layer: Layer) -> set[int]:
        return {cluster for cluster in range(len(layer.access)) if layer.access.get(cluster)}

    def forget(self, beside: list[Change]) -> None:
        self.creations = [each for each in self.creations if each is not beside]

    def forget_dead(self) -> None:
        self.wanted = [wanted for wanted in self.wanted if wanted.layer.live]

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


def bits_of(bitmap: DirtyBitmap) -> set[int]:
    assert bitmap.parts is not None
    bits = bitmap.parts.bits
    return {cluster for cluster in range(len(bits)) if bits.get(cluster)}
