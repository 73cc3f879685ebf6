"""The directory snapshots/: the files of each layer, loaded, made and removed.

What they are is at the head of store.py, what a mount makes of them in recovery.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import trio
from attrs import evolve

from ..engine.bitmap import Bitmap
from ..engine.geometry import Geometry
from ..engine.layer import LOSSES_BYTES, Layer, LayerParts, LayerRecord
from ..errors import InUse, StateError
from ..storage import descriptors
from ..storage.descriptors import Reserve
from ..storage.image import FileImage, Image
from ..storage.locks import lock_image
from ..storage.mapping import failure_of_any
from ..storage.naming import naming
from ..storage.systemerrors import ErrorsSince
from ..storage.watch import failure_of
from . import statefiles
from .layerfiles import LayerFiles
from .tempdirs import TempDirs

MAPPED_FILES = ("done", "losses", "access")
# For each layer, as long as it is there: its temp image and what watches it; with power its temp
# image, and the file of done bits, which native code syncs.
DESCRIPTORS = 2


def _check_temp(temp: FileImage, size: int) -> None:
    if temp.size() != size:
        raise StateError(f"a temp image has {temp.size()} bytes and must have {size}")
    if not lock_image(temp.fd, writable=True):
        raise InUse("a temp image in the state directory is in use by another process")


class LayerDirectory:
    """The files of all layers.  All methods block unless they say otherwise.

    `where` is for messages.  `power`: layers must survive a power cut;
    `harden`: so must what is loaded, before anything relies on it.
    """

    def __init__(
        self, fd: int, where: Path, limiter: trio.CapacityLimiter, threads: int, spare: Reserve
    ) -> None:
        """`fd`: of the directory; owned from now on.  `threads`: for temp images.

        `spare`: descriptors for what must not fail for want of some.
        """
        self._spare = spare
        self._fd = fd
        self._where = where
        self._limiter = limiter
        # Of their own: storage that hangs must not take the threads of another.
        self._temp_limiter = trio.CapacityLimiter(threads)
        self.power = False
        self.harden = False
        self.temps = TempDirs("", None)  # set by the store, before anything is loaded or made
        self._files: dict[int, LayerFiles] = {}  # by layer id, with power
        self._temps: dict[int, FileImage] = {}  # by layer id
        self._outside: dict[int, str] = {}  # by layer id, directories of temp images elsewhere
        self._placed: dict[int, tuple[LayerRecord, LayerRecord]] = {}  # by layer id; see `placed`

    @classmethod
    def open(
        cls, parent: int, where: Path, limiter: trio.CapacityLimiter, threads: int, spare: Reserve
    ) -> LayerDirectory:
        """Open the directory, made if need be.  StateError, OSError."""
        try:
            os.mkdir("snapshots", 0o700, dir_fd=parent)
        except FileExistsError:
            pass
        fd = statefiles.open_directory("snapshots", parent=parent)
        return cls(fd, where / "snapshots", limiter, threads, spare)

    # What is there

    def check_room(self, layers: int, what: str) -> None:
        """Refuse to load or make so many more if this process cannot have so many files.

        Raises LimitReached, which says that `what` needs them.
        """
        descriptors.check(layers * DESCRIPTORS, what)
        descriptors.check_mappings((len(self._temps) + layers) * len(MAPPED_FILES), what)

    def names(self) -> list[str]:
        """What the directory holds, listed or not."""
        return os.listdir(self._fd)

    def load(self, record: LayerRecord, cluster_size: int) -> Layer | None:
        """A layer as it was left; None if it is nameless and was being removed."""
        geometry = Geometry(record.size, cluster_size)
        where = self._where / str(record.id)
        try:
            fd = statefiles.open_directory(str(record.id), parent=self._fd)
        except FileNotFoundError:
            if record.name is None:
                return None
            raise StateError(f"{where} with the data of snapshot {record.name!r} is gone") from None
        try:
            temp_fd = statefiles.open_file(*self._find_temp(record, fd))
            temp = self._open_temp(temp_fd)
            try:
                if record.name is None and temp.size() < record.size:
                    os.ftruncate(temp_fd, record.size)  # it was being deleted, a copy under way
                _check_temp(temp, record.size)
                parts = self._parts(record.id, fd, geometry, temp, create=False)
            except BaseException:
                temp.close()
                raise
        except FileNotFoundError as error:
            if record.name is None:
                return None
            raise StateError(f"{where} lacks its file {os.path.basename(error.filename)}") from None
        finally:
            os.close(fd)
        self._temps[record.id] = temp
        return Layer.from_record(record, parts, cluster_size)

    def _open_temp(self, fd: int) -> FileImage:
        """A temp image, before anything is written to it."""
        try:
            return FileImage(
                fd, limiter=self._temp_limiter, watched=not self.power, flushed=self.power
            )
        except BaseException:
            os.close(fd)
            raise

    def _find_temp(self, record: LayerRecord, fd: int) -> tuple[int, str]:
        """The directory and name of a temp image that is there."""
        if record.temp_dir is None:
            return fd, "temp"
        whose = "a deleted snapshot" if record.name is None else f"snapshot {record.name!r}"
        place = self.temps.find(record.temp_dir, record.id, whose)
        self._outside[record.id] = record.temp_dir
        return place

    def _temp_of(self, layer_id: int, fd: int) -> tuple[int, str]:
        """The directory and name of a temp image; `fd` is of the layer's directory."""
        outside = self._outside.get(layer_id)
        return (
            (fd, "temp")
            if outside is None
            else (self.temps.open(outside), self.temps.name(layer_id))
        )

    def placed(self, records: Sequence[LayerRecord]) -> tuple[LayerRecord, ...]:
        """The records with the directories that their temp images are in.  Does not block.

        One that has not changed gives the same object as before.
        """
        if not self._outside:
            return tuple(records)
        placed = {}
        for each in records:
            known, answer = self._placed.get(each.id, (None, each))
            where = self._outside.get(each.id)
            if known is not each or answer.temp_dir != where:
                answer = each if each.temp_dir == where else evolve(each, temp_dir=where)
            placed[each.id] = each, answer
        self._placed = placed
        return tuple(answer for _, answer in placed.values())

    def _sync(self, layer_id: int, fd: int) -> None:
        statefiles.sync_file(*self._temp_of(layer_id, fd))
        self._sync_mapped(fd)

    def _sync_mapped(self, fd: int) -> None:
        for name in MAPPED_FILES:
            statefiles.sync_file(fd, name)

    def _parts(
        self, layer_id: int, fd: int, geometry: Geometry, temp: FileImage, *, create: bool
    ) -> LayerParts:
        """Map the files of a layer in the directory `fd`, to be synced as the mount wants it."""
        bits = geometry.clusters
        access = statefiles.map_bitmap(fd, "access", bits, create=create)
        done = statefiles.map_bitmap(fd, "done", bits, create=create)
        losses = statefiles.map_record(fd, "losses", LOSSES_BYTES, create=create)
        if self.harden or create:  # before anything is freed, or relies on it
            self._sync(layer_id, fd)
        mappings = {"done": done, "access": access, "losses": losses}
        if not self.power:
            return LayerParts(
                Bitmap(bits, access), Bitmap(bits, done), temp, losses,
                failure=partial(
                    self._failure, layer_id, failure_of_any(mappings.values()), ErrorsSince(fd)
                ),
            )  # fmt: skip
        place = self._fd, str(layer_id)
        files = LayerFiles.open(place, temp, mappings, bits, self._limiter, self._spare.serve)
        self._files[layer_id] = files
        return files.parts

    def _failure(
        self, layer_id: int, mapped: Callable[[], OSError | None], system: ErrorsSince
    ) -> OSError | None:
        """What of the mapped files failed, if anything: see `LayerParts`.

        Not all of it with power: what could not be synced is made dirty again there, and
        counts as not done until it is (layerfiles.py).
        """
        # All are asked.
        failures = [mapped(), system.failure()]
        failures += [failure_of(self._fd, f"{layer_id}/{name}") for name in MAPPED_FILES]
        return next((each for each in failures if each is not None), None)

    def remove_unlisted(
        self, records: Sequence[LayerRecord], temp_dirs: Iterable[str | None]
    ) -> list[str]:
        """Remove the files of layers that are in no list; says which.

        `temp_dirs`: where temp images may be.
        """
        listed = {str(record.id) for record in records}
        notices = []
        for path in {*temp_dirs, *(record.temp_dir for record in records)}:
            if path is not None:
                here = {record.id for record in records if record.temp_dir == path}
                notices += self.temps.remove_leftovers(path, here)
        for name in os.listdir(self._fd):
            if name not in listed:
                statefiles.remove_tree(name, parent=self._fd)
                notices.append(f"removed what was left of snapshot number {name}")
        return notices

    # Changes

    def create(self, layer_id: int, geometry: Geometry) -> LayerParts:
        """The files of a new layer; on failure nothing is left behind.  LimitReached, OSError."""
        self.check_room(1, "one more snapshot")
        name = str(layer_id)
        with naming(name, self._fd):
            os.mkdir(name, 0o700, dir_fd=self._fd)
        try:
            fd = statefiles.open_directory(name, parent=self._fd)
            try:
                temp_fd = self._make_temp(layer_id, fd, geometry.size)
                temp = self._open_temp(temp_fd)
                try:
                    lock_image(temp_fd, writable=True)
                    parts = self._parts(layer_id, fd, geometry, temp, create=True)
                    # The list that will have the layer is durable: so must its files be, or
                    # the next mount refuses them instead of saying that they are lost.
                    for each in (fd, self._fd, self._temp_of(layer_id, fd)[0]):
                        with naming(".", each):
                            os.fsync(each)
                    self._temps[layer_id] = temp
                    return parts
                except BaseException:
                    temp.close()
                    raise
            finally:
                os.close(fd)
        except BaseException:
            self.forget(layer_id)
            self.remove(layer_id)
            raise

    def _make_temp(self, layer_id: int, fd: int, size: int) -> int:
        if self.temps.new is None:
            return statefiles.make_file(fd, "temp", size)
        temp_fd = statefiles.make_file(
            self.temps.open(self.temps.new), self.temps.name(layer_id), size
        )
        self._outside[layer_id] = self.temps.new  # not before: what is there already is not ours
        return temp_fd

    def forget(self, layer_id: int) -> None:
        """Close what serves to sync a layer that is about to be removed.

        Does not block: it is in the state directory, not where temp images may be.
        """
        files = self._files.pop(layer_id, None)
        if files is not None:
            files.close()

    def usage(self, temps: Iterable[Image]) -> tuple[list[int], int]:
        """Bytes that each of these temp images takes, and that are free for more."""
        return [temp.blocks() * 512 for temp in temps], self.free_bytes()

    def remove(self, layer_id: int) -> None:
        """Close the temp image of a layer, and remove its files, if they are there."""
        temp = self._temps.pop(layer_id, None)
        try:
            if temp is not None:
                temp.close()
            outside = self._outside.get(layer_id)
            if outside is not None:
                statefiles.remove(self.temps.open(outside), self.temps.name(layer_id))
                del self._outside[layer_id]
        finally:
            statefiles.remove_tree(str(layer_id), parent=self._fd)

    # Room

    @property
    def temp_directory(self) -> str:
        """Where new temp images go."""
        new = self.temps.new
        return str(self._where) if new is None else os.path.dirname(new)

    def _room(self) -> os.statvfs_result:
        new = self.temps.new
        return os.fstatvfs(self._fd if new is None else self.temps.open(new))

    def free_bytes(self) -> int:
        """Space that is left for temp images."""
        found = self._room()
        return found.f_bavail * found.f_frsize

    def default_reserve(self) -> int:
        """Bytes to leave free for the image, which may be sparse: 1 GiB, or 5 % if that is less."""
        found = self._room()
        return min(1 << 30, found.f_blocks * found.f_frsize // 20)

    # The end

    def sync(self, layer_id: int) -> None:
        """Make the files of a layer durable.

        OSError also of what could not be written back before, and nobody has heard of.
        """
        self._temps[layer_id].sync()
        fd = statefiles.open_directory(str(layer_id), parent=self._fd)
        try:
            self._sync_mapped(fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close the directory, and temp images of layers that were still on their way out."""
        for temp in self._temps.values():
            temp.close()
        self._temps.clear()
        for files in self._files.values():
            files.close()
        self._files.clear()
        self.temps.close()
        os.close(self._fd)
