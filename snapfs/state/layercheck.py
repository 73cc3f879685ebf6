"""The layers of a state directory looked over: their files, and what a mount would do with them.

A part of `check.py`.  Bitmaps are looked at on copies of their bits; nothing is
written but by a repair.  All functions block.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import trio

from ..engine.bitmap import Bitmap, buffer_size
from ..engine.geometry import Geometry
from ..engine.layer import LOSSES_BYTES, Layer, LayerParts, LayerRecord
from ..engine.layers import LayerStack
from ..errors import InUse, StateError
from ..storage.image import FileImage
from ..storage.locks import lock_image
from . import statefiles, tempdirs
from .findings import Grade, Inspector, Unusable, make_empty, overwrite, read_all
from .manifest import ImageStamp, Manifest

MAX_BITMAP_BYTES = 1 << 30  # read into memory: 512 TiB of the default clusters


class LayerInspector(Inspector):
    """What of a check is about layers."""

    def __init__(self, directory: str, fd: int, repair: bool) -> None:
        super().__init__(directory, fd, repair)
        self._limiter = trio.CapacityLimiter(1)  # FileImage wants one; nothing uses it

    def check_layers(self, known: Manifest, trusted: bool) -> list[Layer]:
        """The layers that can be read, on copies of their bitmaps; their temps are open."""
        layers: list[Layer] = []
        try:
            with self.opened(self.fd, "snapshots", "snapshots", "directory") as snapshots:
                listed = {str(record.id) for record in known.layers}
                for name in sorted(set(os.listdir(snapshots)) - listed):
                    self.leftover(snapshots, name, f"snapshots/{name}", "is in no list")
                for record in known.layers:
                    layer = self._layer(snapshots, record, known, trusted)
                    if layer is not None:
                        layers.append(layer)
        except FileNotFoundError:
            for record in known.layers:
                self._missing(record, f"snapshots/{record.id}")
        except Unusable:
            pass
        except BaseException:
            for layer in layers:
                layer.temp.close()
            raise
        return layers

    def _missing(self, record: LayerRecord, where: str) -> None:
        if record.name is None:
            self.found(Grade.LEFTOVER, where, "was being removed; the next mount forgets it")
        else:
            text = f"is missing: the data of snapshot {record.name!r} is gone"
            self.found(Grade.LOST, where, text)

    def _layer(
        self, snapshots: int, record: LayerRecord, known: Manifest, trusted: bool
    ) -> Layer | None:
        where = f"snapshots/{record.id}"
        bits = Geometry(record.size, known.cluster_size).clusters
        temp = -1
        try:
            with self.opened(snapshots, str(record.id), where, "directory") as fd:
                parts = [
                    self._try(record, f"{where}/{name}", partial(read, fd, f"{where}/{name}"))
                    for name, read in (
                        ("access", partial(self._bits, name="access", bits=bits)),
                        ("done", partial(self._bits, name="done", bits=bits)),
                        ("losses", partial(self._losses, fresh=known.clean)),
                        ("temp", partial(self._temp, record=record, known=known)),
                    )
                ]
                access, done, losses, temp = (-1 if part is None else part for part in parts)
                if None in parts:
                    if temp >= 0:
                        os.close(temp)
                    return None
                found = LayerParts(
                    Bitmap(bits, access), Bitmap(bits, done),
                    FileImage(temp, limiter=self._limiter), losses,
                )  # fmt: skip
                layer = Layer.from_record(record, found, known.cluster_size)
                if trusted:
                    self._undone(fd, layer, f"{where}/temp", record.temp_dir is not None)
        except FileNotFoundError:
            self._missing(record, where)
            return None
        except Unusable:
            return None
        if layer.live and layer.state != "ok":
            text = f"snapshot {layer.name!r} is {layer.state}: {layer.reason}"
            self.found(Grade.LOST, where, text)
        return layer

    def _try(self, record: LayerRecord, where: str, read: Callable[[], Any]) -> Any:
        """What `read` gives; None if that was reported."""
        try:
            return read()
        except FileNotFoundError:
            self._missing(record, where)
        except Unusable:
            pass
        except OSError as error:
            self.found(Grade.DAMAGE, where, f"cannot be read: {error.strerror}")
        return None

    def _bits(self, directory: int, where: str, *, name: str, bits: int) -> bytearray:
        """A copy of a bitmap."""
        size = max(1, buffer_size(bits))
        with self.opened(directory, name, where) as fd:
            found = os.fstat(fd).st_size
            if found != size:
                text = f"has {found} bytes; for {bits} clusters it must have {size}"
                self.found(Grade.DAMAGE, where, text)
                raise Unusable
            if size > MAX_BITMAP_BYTES:
                self.found(Grade.DAMAGE, where, f"has {size} bytes, too many to look at")
                raise Unusable
            data = read_all(fd, size)
        if bits % 8 and data[-1] >> bits % 8:
            data[-1] &= (1 << bits % 8) - 1
            self.found(
                Grade.REPAIRABLE, where, "has bits set beyond the end of the snapshot",
                partial(overwrite, directory, name, size - 1, bytes(data[-1:])),
            )  # fmt: skip
        return data

    def _losses(self, directory: int, where: str, *, fresh: bool) -> bytearray:
        """The record of losses; `fresh`: the list has its numbers too, so it can be made anew."""
        try:
            with self.opened(directory, "losses", where) as fd:
                found = os.fstat(fd).st_size
                if found == LOSSES_BYTES:
                    return read_all(fd, LOSSES_BYTES)
        except FileNotFoundError:
            if not fresh:
                raise
            make = partial(make_empty, directory, "losses", LOSSES_BYTES)
            self.found(Grade.REPAIRABLE, where, "is missing", make)
            return bytearray(LOSSES_BYTES)
        self.found(Grade.DAMAGE, where, f"has {found} bytes and must have {LOSSES_BYTES}")
        raise Unusable

    def _temp(self, directory: int, where: str, *, record: LayerRecord, known: Manifest) -> int:
        """The temp image, open to read."""
        if record.temp_dir is None:
            fd = self.open(directory, "temp", where)
        else:
            fd = self._temp_outside(record.temp_dir, record, known)
        try:
            if not lock_image(fd, writable=True):
                raise InUse(f"{self.directory}/{where} is in use by another process; end it first")
            found = os.fstat(fd).st_size
            if record.name is None and found < record.size:
                self.found(Grade.LEFTOVER, where, "was being removed; the next mount goes on")
            elif found != record.size:
                text = f"has {found} bytes and must have {record.size}"
                self.found(Grade.DAMAGE, where, text)
                raise Unusable
            return fd
        except BaseException:
            os.close(fd)
            raise

    def _temp_outside(self, path: str, record: LayerRecord, known: Manifest) -> int:
        """The temp image of a layer in a directory of the option temp-dir, open to read."""
        try:
            outside = tempdirs.open_private(path)
        except StateError as error:
            self.found(Grade.DAMAGE, f"snapshots/{record.id}", str(error))
            raise Unusable from None
        ids = [known.id, tempdirs.id_at(known.id, tempdirs.home_of(self.fd))]
        try:
            for number, temp_id in enumerate(ids):
                try:
                    name = f"{temp_id}-{record.id}.temp"
                    return self.open(outside, name, f"{path}/{name}")
                except FileNotFoundError:
                    if number == len(ids) - 1:
                        raise
            raise AssertionError
        finally:
            os.close(outside)

    def _undone(self, directory: int, layer: Layer, where: str, outside: bool) -> None:
        """Temp data without a done bit: a copy that was under way.

        What is `outside` of the state directory is left to the next mount.
        """
        assert isinstance(layer.temp, FileImage)
        ranges = [
            layer.geometry.whole(first, stop)
            for first, stop in layer.done.runs(0, len(layer.done), False)
        ]
        count = sum(layer.temp.data_bytes(*each) for each in ranges)
        if count:

            def punch() -> None:
                temp = FileImage(statefiles.open_file(directory, "temp"), limiter=self._limiter)
                try:
                    for each in ranges:
                        temp.punch_data(*each)
                finally:
                    temp.close()

            text = f"has {count} bytes of a copy that was not finished"
            self.found(Grade.LEFTOVER, where, text, None if outside else punch)

    def foresee(
        self,
        known: Manifest,
        stamp: ImageStamp,
        layers: list[Layer],
        reason: str | None,
        wrong: bool,
    ) -> None:
        """What the next mount would do with the layers; done on the copies."""
        stack = LayerStack(layers, Geometry(stamp.size, known.cluster_size).clusters)
        if reason is not None:
            needing = {layer.id for layer, _ in stack.needing(0, stack.clusters)}
            for layer in layers:
                if layer.live and layer.state != "lost" and (wrong or layer.id in needing):
                    text = f"snapshot {layer.name!r} will be lost: {reason}"
                    self.found(Grade.LOST, f"snapshots/{layer.id}", text)
            return
        for layer in layers:
            if not layer.live:
                layer.withdraw(0, layer.geometry.clusters)
        dropped = {layer.id for layer, _ in stack.settle(0, stack.clusters)}
        for layer in layers:
            if not layer.live and layer.is_empty():
                text = "no snapshot needs it any more; the next mount removes it"
                self.found(Grade.LEFTOVER, f"snapshots/{layer.id}", text)
            elif layer.id in dropped:
                text = "has clusters that no snapshot needs any more; the next mount frees them"
                self.found(Grade.LEFTOVER, f"snapshots/{layer.id}/temp", text)
