"""A state directory in memory, and an engine over it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Any

import trio
from attrs import define

from snapfs.engine.bitmap import Bitmap
from snapfs.engine.copier import Settings
from snapfs.engine.dirty import BitmapRecord, DirtyBitmap, DirtyParts
from snapfs.engine.engine import Engine
from snapfs.engine.geometry import Geometry
from snapfs.engine.layer import Layer, LayerParts, LayerRecord
from snapfs.storage.image import Buffer
from tests.support.images import (
    CLUSTER,
    EVERYWHERE,
    Call,
    Fault,
    MemoryImage,
    Space,
    Stall,
    os_error,
)


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

    async def sync(self, bitmap_id: int) -> None:
        await self._store._enter("sync_bitmap", bitmap_id)

    def recover(self) -> list[DirtyBitmap]:
        """The bitmaps that a next mount would start with; the bits are copies."""
        found = []
        for record in self._store.bitmap_records:
            file = self.files[record.id]
            reason = record.reason or file.reason
            parts = MemoryBits(_twin(file.bits)).parts() if reason is None else None
            found.append(DirtyBitmap(record.id, record.name, parts, reason, record.reason))
        return found


class MemoryStore:
    """A `LayerStore` in memory.

    `faults` and `stalls` are by method: create, save, remove, usage, sync, and make,
    grow, unmake, sync_bitmap of bitmaps.
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
        self.failed_pages = 0
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

    async def sync(self, layer_id: int) -> None:
        await self._enter("sync", layer_id)

    async def take_errors(self) -> None:
        await self._enter("take_errors")

    def errors_saved(self) -> None:
        pass

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

    def failures(self) -> int:
        return self.failed_pages

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


def pattern(seed: int, length: int) -> bytes:
    """Bytes that are never zero and differ from cluster to cluster and seed to seed."""
    base = bytes((seed * 37 + index * 11) % 255 + 1 for index in range(251))
    return (base * (length // len(base) + 1))[:length]


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
