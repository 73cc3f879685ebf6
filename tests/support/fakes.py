"""Images and a state directory in memory, with faults, stalls and a record of calls.

`MemoryImage` behaves as `FileImage` does where the engine could notice: calls
are full or fail, a call that has begun is never abandoned, freed pages read as
zeros.  It is nastier where that finds bugs: what a call reads or writes is
read or written at the last moment, after every stall; and using it after
`close`, or closing it in mid-call, is kept in `misuse`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from typing import Any

import trio
from attrs import define, field, frozen

from snapfs.engine.bitmap import Bitmap
from snapfs.engine.copier import Settings
from snapfs.engine.dirty import BitmapRecord, DirtyBitmap, DirtyParts
from snapfs.engine.engine import Engine
from snapfs.engine.geometry import Geometry
from snapfs.engine.layer import Layer, LayerParts, LayerRecord
from snapfs.storage.image import Buffer

PAGE = 4096
CLUSTER = 4096
EVERYWHERE = 1 << 62


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@frozen
class Call:
    """One call that an image has carried out or refused."""

    kind: str
    offset: int
    length: int


@define(eq=False)
class Trap:
    """Waits for calls of some kinds that touch [start, stop); none given: all.

    `skip` calls pass by first, then `times` (None: all) are caught.
    """

    kinds: tuple[str, ...] = ()
    start: int = 0
    stop: int = EVERYWHERE
    skip: int = 0
    times: int | None = None
    caught: int = field(default=0, init=False)

    def matches(self, call: Call) -> bool:
        """Would it catch such a call, now or later?"""
        return (
            (not self.kinds or call.kind in self.kinds)
            and self.start < call.offset + max(1, call.length)
            and call.offset < self.stop
            and (self.times is None or self.caught < self.times)
        )

    def catches(self, call: Call) -> bool:
        """Does it catch this call?  Counts."""
        if not self.matches(call):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.caught += 1
        return True


@define(eq=False)
class Fault(Trap):
    """Calls fail with `errno`; of a write `lands` bytes reach the file before.

    `errno` 0: a read returns only `lands` bytes, as if the file ended there.
    """

    errno: int = errno.EIO
    lands: int = 0


@define(eq=False)
class Stall(Trap):
    """Calls wait until `release`; `reached` is set when the first one does."""

    reached: trio.Event = field(factory=trio.Event, init=False)
    released: trio.Event = field(factory=trio.Event, init=False)

    def release(self) -> None:
        self.released.set()


@define(eq=False)
class Space:
    """A file system's room, in bytes; None: no limit."""

    limit: int | None = None
    used: int = 0

    def take(self, size: int) -> None:
        if self.limit is not None and size > 0 and self.used + size > self.limit:
            raise os_error(errno.ENOSPC)
        self.used += size


class MemoryImage:
    """An `Image` in memory; see the module's text.

    Kinds of calls: pread, pwrite, punch, zero, allocate, truncate, flush,
    extents, and copy for the reading of a cluster that is copied elsewhere
    (its writing is a pwrite of the target).
    """

    def __init__(self, content: Buffer = b"", *, space: Space | None = None) -> None:
        self.data = bytearray(content)
        self.space = space or Space()
        self.pages: set[int] = set()  # those that hold data
        self.cold = False  # pread_nowait finds nothing in the page cache
        self.faults: list[Fault] = []
        self.stalls: list[Stall] = []
        self.calls: list[Call] = []
        self.misuse: list[str] = []  # uses that would hit a closed, or another, descriptor
        self.on_fault: Callable[[Call], None] = lambda call: None
        self.in_flight = 0
        self.trips = 0  # calls of data_inside
        self.closed = False
        for page in range(-(-len(content) // PAGE)):
            if any(self.data[page * PAGE : (page + 1) * PAGE]):
                self.pages.add(page)

    # For tests

    def fail(self, *kinds: str, **options: Any) -> Fault:
        fault = Fault(kinds, **options)
        self.faults.append(fault)
        return fault

    def stall(self, *kinds: str, **options: Any) -> Stall:
        stall = Stall(kinds, **options)
        self.stalls.append(stall)
        return stall

    def calls_of(self, *kinds: str) -> list[Call]:
        return [call for call in self.calls if call.kind in kinds]

    def has_data(self, start: int, stop: int) -> bool:
        return any(page in self.pages for page in range(start // PAGE, -(-stop // PAGE)))

    # What all calls share

    def _begin(self, call: Call) -> None:
        self.calls.append(call)
        if self.closed:
            self.misuse.append(f"{call} after close")
            raise os_error(errno.EBADF)

    async def _enter(self, kind: str, offset: int, length: int) -> Fault | None:
        """A fault that applies to the call when its time has come."""
        call = Call(kind, offset, length)
        self._begin(call)
        self.in_flight += 1
        try:
            await trio.lowlevel.checkpoint()
            with trio.CancelScope(shield=True):  # a thread is never abandoned
                for stall in list(self.stalls):
                    if stall.catches(call):
                        stall.reached.set()
                        await stall.released.wait()
        finally:
            self.in_flight -= 1
        for fault in self.faults:
            if fault.catches(call):
                self.on_fault(call)
                return fault
        return None

    def _touch(self, start: int, stop: int) -> None:
        wanted = set(range(start // PAGE, -(-stop // PAGE))) - self.pages
        self.space.take(len(wanted) * PAGE)
        self.pages |= wanted

    def _drop(self, start: int, stop: int) -> None:
        stop = min(stop, len(self.data))
        if start >= stop:
            return
        self.data[start:stop] = bytes(stop - start)
        end = -(-stop // PAGE) if stop == len(self.data) else stop // PAGE
        for page in range(-(-start // PAGE), end):
            if page in self.pages:
                self.pages.remove(page)
                self.space.take(-PAGE)

    def _extend(self, size: int) -> None:
        if size > len(self.data):
            self.data.extend(bytes(size - len(self.data)))

    # Image

    def pread_nowait(self, offset: int, length: int) -> Buffer | None:
        self._begin(Call("pread_nowait", offset, length))
        call = Call("pread", offset, length)
        if self.cold or any(trap.matches(call) for trap in (*self.stalls, *self.faults)):
            return None  # what is in the page cache neither waits nor fails
        if offset + length > len(self.data):
            return None
        return bytes(self.data[offset : offset + length])

    async def pread(self, offset: int, length: int) -> Buffer:
        fault = await self._enter("pread", offset, length)
        if fault is not None:
            if fault.errno:
                raise os_error(fault.errno)
            length = min(length, fault.lands)
        return bytes(self.data[offset : offset + length])

    async def pwrite(self, offset: int, data: Buffer) -> None:
        data = bytes(data)
        fault = await self._enter("pwrite", offset, len(data))
        if fault is not None:
            self._store(offset, data[: fault.lands])
            raise os_error(fault.errno)
        self._store(offset, data)

    def _store(self, offset: int, data: bytes) -> None:
        if data:
            self._touch(offset, offset + len(data))
            self._extend(offset + len(data))
            self.data[offset : offset + len(data)] = data

    async def _change(self, kind: str, offset: int, length: int) -> None:
        fault = await self._enter(kind, offset, length)
        if fault is not None:
            raise os_error(fault.errno)

    async def punch(self, offset: int, length: int) -> None:
        await self._change("punch", offset, length)
        self._drop(offset, offset + length)

    async def zero(self, offset: int, length: int) -> None:
        await self._change("zero", offset, length)
        self._drop(offset, offset + length)
        self._extend(offset + length)

    async def allocate(self, offset: int, length: int, keep_size: bool) -> None:
        await self._change("allocate", offset, length)
        if not keep_size:
            self._extend(offset + length)

    async def truncate(self, size: int) -> None:
        await self._change("truncate", size, max(0, len(self.data) - size))
        self._drop(size, len(self.data))
        del self.data[size:]
        self._extend(size)

    async def flush(self) -> None:
        await self._change("flush", 0, EVERYWHERE)

    async def data_extents(
        self, offset: int, length: int, limit: int
    ) -> tuple[list[tuple[int, int]], int]:
        await self._change("extents", offset, length)
        end = min(offset + length, len(self.data))
        extents: list[tuple[int, int]] = []
        position = offset
        while position < end and len(extents) < limit:
            if position // PAGE not in self.pages:
                position = min(end, (position // PAGE + 1) * PAGE)
                continue
            start = position
            while position < end and position // PAGE in self.pages:
                position = min(end, (position // PAGE + 1) * PAGE)
            extents.append((start, position))
        return extents, (position if position < end else offset + length)

    async def data_inside(
        self, ranges: Sequence[tuple[int, int]], limit: int
    ) -> tuple[list[tuple[int, int]], int]:
        found: list[tuple[int, int]] = []
        self.trips += 1
        for start, stop in ranges:
            pairs, known = await self.data_extents(start, stop - start, limit - len(found))
            found += pairs
            if known < stop or (len(found) == limit and (start, stop) != ranges[-1]):
                return found, known
        return found, ranges[-1][1]

    async def copy_to(
        self,
        target: MemoryImage,
        offset: int,
        length: int,
        cluster_size: int,
        budget: int,
        durable: bool = False,
    ) -> int:
        assert offset % cluster_size == 0
        written = 0
        for start in range(offset, min(offset + length, len(self.data)), cluster_size):
            count = min(cluster_size, offset + length - start)
            fault = await self._enter("copy", start, count)
            if fault is not None:
                raise os_error(fault.errno)
            data = bytes(self.data[start : start + count])
            if any(data):
                if written + len(data) > budget:
                    raise os_error(errno.ENOSPC)
                await target.pwrite(start, data)
                written += len(data)
        if durable:
            await target.flush()
        return written

    def size(self) -> int:
        return len(self.data)

    def blocks(self) -> int:
        return len(self.pages) * PAGE // 512

    def close(self) -> None:
        if self.closed:
            self.misuse.append("closed twice")
        if self.in_flight:
            self.misuse.append(f"closed with {self.in_flight} calls in flight")
        self.closed = True
        self.space.take(-len(self.pages) * PAGE)
        self.pages.clear()


@define(eq=False)
class MemoryBits:
    """The file of a dirty bitmap in memory."""

    bits: Bitmap
    reason: str | None = None

    def spoil(self, reason: str) -> None:
        self.reason = reason

    def parts(self) -> DirtyParts:
        return DirtyParts(self.bits, self.bits, self.spoil)


class MemoryBitmaps:
    """A `BitmapStore` in memory; its files have room in steps of `room` clusters."""

    room = 4

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self.files: dict[int, MemoryBits] = {}

    def _rounded(self, clusters: int) -> int:
        return -(-clusters // self.room) * self.room

    async def make(self, bitmap_id: int, clusters: int) -> DirtyParts:
        await self._store._enter("make", bitmap_id)
        assert bitmap_id not in self.files, "an id is never used again"
        self.files[bitmap_id] = MemoryBits(Bitmap(self._rounded(clusters)))
        return self.files[bitmap_id].parts()

    async def grow(self, bitmap_id: int, clusters: int) -> DirtyParts:
        await self._store._enter("grow", bitmap_id)
        if bitmap_id not in self.files:
            raise os_error(errno.ENOENT)
        file = self.files[bitmap_id]
        file.bits.grow(self._rounded(clusters))
        return file.parts()

    async def remove(self, bitmap_id: int) -> None:
        listed = self._store.bitmap_records
        assert all(record.id != bitmap_id for record in listed), "still in the list"
        await self._store._enter("unmake", bitmap_id)
        self.files.pop(bitmap_id, None)

    def recover(self) -> list[DirtyBitmap]:
        """The bitmaps that a next mount would start with; the bits are copies."""
        found = []
        for record in self._store.bitmap_records:
            file = self.files[record.id]
            parts = MemoryBits(_twin(file.bits)).parts() if file.reason is None else None
            found.append(DirtyBitmap(record.id, record.name, parts, file.reason))
        return found


class MemoryStore:
    """A `LayerStore` in memory.

    `faults` and `stalls` are by method: create, save, remove, usage, and make,
    grow, unmake of bitmaps.
    """

    def __init__(self, *, space: Space | None = None) -> None:
        self.space = space or Space()
        self.parts: dict[int, LayerParts] = {}
        self.saved: list[tuple[LayerRecord, ...]] = []
        self.bitmap_records: tuple[BitmapRecord, ...] = ()
        self.bitmaps = MemoryBitmaps(self)
        self.geometries: list[Geometry] = []
        self.removed: list[int] = []
        self.temps: list[MemoryImage] = []  # all there ever were
        self.under_way = 0  # changes announced by write_started
        self.most: list[int] = []  # what they announced
        self.faults: list[Fault] = []
        self.stalls: list[Stall] = []
        self.prepare: Callable[[MemoryImage], None] = lambda temp: None

    def fail(self, *kinds: str, **options: Any) -> Fault:
        fault = Fault(kinds, **options)
        self.faults.append(fault)
        return fault

    def stall(self, *kinds: str, **options: Any) -> Stall:
        stall = Stall(kinds, **options)
        self.stalls.append(stall)
        return stall

    def temp(self, layer: Layer) -> MemoryImage:
        assert isinstance(layer.temp, MemoryImage)
        return layer.temp

    @property
    def records(self) -> tuple[LayerRecord, ...]:
        """The list that a next mount would find."""
        return self.saved[-1] if self.saved else ()

    async def _enter(self, kind: str, layer_id: int = 0) -> None:
        call = Call(kind, layer_id, 1)
        await trio.lowlevel.checkpoint()
        with trio.CancelScope(shield=True):
            for stall in list(self.stalls):
                if stall.catches(call):
                    stall.reached.set()
                    await stall.released.wait()
        for fault in self.faults:
            if fault.catches(call):
                raise os_error(fault.errno)

    async def create(self, layer_id: int, geometry: Geometry) -> LayerParts:
        await self._enter("create", layer_id)
        assert layer_id not in self.parts, "an id is never used again"
        temp = MemoryImage(bytes(geometry.size), space=self.space)
        self.prepare(temp)
        self.temps.append(temp)
        parts = LayerParts(Bitmap(geometry.clusters), Bitmap(geometry.clusters), temp)
        self.parts[layer_id] = parts
        return parts

    async def save(
        self,
        records: Sequence[LayerRecord],
        geometry: Geometry,
        bitmaps: Sequence[BitmapRecord] = (),
    ) -> None:
        await self._enter("save")
        self.saved.append(tuple(records))
        self.bitmap_records = tuple(bitmaps)
        self.geometries.append(geometry)

    async def remove(self, layer_id: int) -> None:
        assert all(record.id != layer_id for record in self.records), "still in the list"
        await self._enter("remove", layer_id)
        parts = self.parts.pop(layer_id, None)
        if parts is not None:
            parts.temp.close()
        self.removed.append(layer_id)

    async def usage(self, temps: Sequence[Any]) -> tuple[list[int], int]:
        for temp in temps:
            temp.in_flight += 1
        try:
            await self._enter("usage")
            taken = [temp.blocks() * 512 for temp in temps]
            limit = EVERYWHERE if self.space.limit is None else self.space.limit
            return taken, limit - self.space.used
        finally:
            for temp in temps:
                temp.in_flight -= 1

    def write_started(self, size: int) -> None:
        self.under_way += 1
        self.most.append(size)

    def write_finished(self) -> None:
        self.under_way -= 1
        assert self.under_way >= 0

    def misuse(self) -> list[str]:
        return [complaint for temp in self.temps for complaint in temp.misuse]

    def recover(self, cluster_size: int = CLUSTER) -> list[Layer]:
        """The layers that a next mount would start with; the bitmaps are copies."""
        layers = [
            Layer.from_record(record, _copied(self.parts[record.id]), cluster_size)
            for record in self.records
        ]
        for layer in layers:
            if not layer.live:
                layer.withdraw(0, layer.geometry.clusters)
        return layers


def _twin(bits: Bitmap) -> Bitmap:
    twin = Bitmap(len(bits))
    if len(bits):
        twin.assign(0, bits.slice(0, len(bits)))
    return twin


def _copied(parts: LayerParts) -> LayerParts:
    losses = bytearray(parts.losses)
    return LayerParts(_twin(parts.access), _twin(parts.done), parts.temp, losses)


# The specification, written down naively


def naive_source(layers: Sequence[Layer], index: int, cluster: int) -> Layer | None:
    """The layer in whose temp image the snapshot layers[index] finds a cluster, None: the image."""
    for layer in layers[index:]:
        if cluster < len(layer.done) and layer.done.get(cluster):
            return layer
    return None


def naive_pending(layers: Sequence[Layer], cluster: int) -> bool:
    return any(
        cluster < len(layer.access)
        and layer.access.get(cluster)
        and naive_source(layers, index, cluster) is None
        for index, layer in enumerate(layers)
    )


def naive_wanted(layers: Sequence[Layer], index: int, cluster: int) -> bool:
    """Does some snapshot find the cluster in the temp image of layers[index]?"""
    return any(
        cluster < len(layers[older].access)
        and layers[older].access.get(cluster)
        and naive_source(layers, older, cluster) is layers[index]
        for older in range(index + 1)
    )


def naive_content(image: MemoryImage, layers: Sequence[Layer], layer: Layer) -> bytes:
    """All bytes of a snapshot as its readers must find them, access aside."""
    index = layers.index(layer)
    result = bytearray()
    for cluster in range(layer.geometry.clusters):
        offset, length = layer.geometry.span(cluster, cluster + 1)
        source = naive_source(layers, index, cluster)
        data = (image if source is None else source.temp).data  # type: ignore[attr-defined]
        result += bytes(data[offset : offset + length]).ljust(length, b"\0")
    return bytes(result)


def pending_of(engine: Engine) -> list[bool]:
    pending = engine._stack.pending
    return [pending.get(cluster) for cluster in range(len(pending))]


def in_flight(engine: Engine) -> int:
    """Requests in any list of the engine, and pins."""
    return (
        len(engine.copier._copies)
        + len(engine._frozen_reads)
        + sum(layer.pins for layer in engine.layers)
        + sum(layer.pins - 1 for layer in engine._keeper.leaving)
    )


def check_bitmaps(engine: Engine) -> None:
    """What holds of the bitmaps at every moment."""
    layers = engine.layers
    for cluster, bit in enumerate(pending_of(engine)):
        assert naive_pending(layers, cluster) == bit, f"pending[{cluster}] is {bit}"
    for index, layer in enumerate(layers):
        for cluster in range(len(layer.done)):
            if layer.done.get(cluster):
                assert naive_wanted(layers, index, cluster), (
                    f"done[{cluster}] of layer {layer.id} serves nobody"
                )
        assert layer.live or not layer.access.any(0, len(layer.access))


def check_quiet(engine: Engine, store: MemoryStore) -> None:
    """What holds when nothing is going on, and no fault kept space from being freed."""
    assert 0 == in_flight(engine)
    assert 0 == store.under_way
    assert [] == store.misuse()
    check_bitmaps(engine)
    kept = [*engine.layers, *engine._keeper.leaving]  # the latter until a list can be saved
    assert {layer.id for layer in kept} == set(store.parts)
    assert sum(not temp.closed for temp in store.temps) == len(kept)
    assert {bitmap.id for bitmap in engine.tracker.bitmaps} == set(store.bitmaps.files)
    for layer in engine.layers:
        temp = store.temp(layer)
        assert temp.size() == layer.geometry.size
        for cluster in range(layer.geometry.clusters):
            offset, length = layer.geometry.span(cluster, cluster + 1)
            if temp.has_data(offset, offset + length):
                assert layer.done.get(cluster), f"temp space leaked: layer {layer.id}, {cluster}"
                assert any(temp.data[offset : offset + length]), "zeros take space in temp"


# Plain bytes


@define(eq=False)
class ModelSnapshot:
    """What a snapshot must be."""

    content: bytes
    access: set[int]
    discarded: set[int] = field(factory=set)
    lost: set[int] = field(factory=set)


def pattern(seed: int, length: int) -> bytes:
    """Bytes that are never zero and differ from cluster to cluster and seed to seed."""
    base = bytes((seed * 37 + index * 11) % 255 + 1 for index in range(251))
    return (base * (length // len(base) + 1))[:length]


def covered_clusters(size: int, offset: int, length: int) -> set[int]:
    """Clusters that lie inside the range as a whole, naively."""
    return {
        cluster
        for cluster in range(-(-size // CLUSTER))
        if offset <= cluster * CLUSTER and min((cluster + 1) * CLUSTER, size) <= offset + length
    }


def touched_clusters(offset: int, length: int) -> set[int]:
    if length <= 0:
        return set()
    return set(range(offset // CLUSTER, (offset + length - 1) // CLUSTER + 1))


@define
class Bench:
    """An engine over memory, for deterministic tests."""

    image: MemoryImage
    store: MemoryStore
    engine: Engine

    @classmethod
    def make(
        cls,
        nursery: trio.Nursery,
        content: Buffer,
        *,
        space: Space | None = None,
        **settings: Any,
    ) -> Bench:
        image = MemoryImage(content)
        store = MemoryStore(space=space)
        engine = Engine(
            image, Geometry(len(content), CLUSTER), store, nursery, settings=Settings(**settings)
        )
        return cls(image, store, engine)
