"""The directory snapshots/: the files of each layer, loaded, made and removed.

What they are, and what recovery makes of them, is at the head of store.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import trio

from . import statefiles
from .bitmap import Bitmap
from .errors import InUse, StateError
from .geometry import Geometry
from .image import FileImage
from .layerfiles import LayerFiles
from .locks import lock_image
from .snapshot import LOSSES_BYTES, Layer, LayerParts, LayerRecord

LAYER_FILES = ("temp", "done", "losses", "access")


class LayerDirectory:
    """The files of all layers.  All methods block but `free_bytes` and `default_reserve`.

    `where` is for messages.  `power`: layers must survive a power cut;
    `harden`: so must what is loaded, before anything relies on it.
    """

    def __init__(self, fd: int, where: Path, limiter: trio.CapacityLimiter, threads: int) -> None:
        """`fd`: of the directory; owned from now on.  `threads`: for temp images."""
        self._fd = fd
        self._where = where
        self._limiter = limiter
        # Of their own: storage that hangs must not take the threads of another.
        self._temp_limiter = trio.CapacityLimiter(threads)
        self.power = False
        self.harden = False
        self._files: dict[int, LayerFiles] = {}  # by layer id, with power

    @classmethod
    def open(
        cls, parent: int, where: Path, limiter: trio.CapacityLimiter, threads: int
    ) -> LayerDirectory:
        """Open the directory, made if need be.  StateError, OSError."""
        try:
            os.mkdir("snapshots", 0o700, dir_fd=parent)
        except FileExistsError:
            pass
        fd = statefiles.open_directory("snapshots", parent=parent)
        return cls(fd, where / "snapshots", limiter, threads)

    # What is there

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
            temp_fd = statefiles.open_file(fd, "temp")
            if record.name is None and os.fstat(temp_fd).st_size < record.size:
                os.ftruncate(temp_fd, record.size)  # it was being deleted, a copy under way
            temp = self._open_temp(temp_fd, record.size)
            parts = self._parts(record.id, fd, geometry, temp, create=False)
        except FileNotFoundError as error:
            if record.name is None:
                return None
            raise StateError(f"{where} lacks its file {error.filename}") from None
        finally:
            os.close(fd)
        return Layer.from_record(record, parts, cluster_size)

    def _parts(
        self, layer_id: int, fd: int, geometry: Geometry, temp: FileImage, *, create: bool
    ) -> LayerParts:
        """Map the files of a layer in the directory `fd`, to be synced as the mount wants it."""
        bits = geometry.clusters
        access = statefiles.map_bitmap(fd, "access", bits, create=create)
        done = statefiles.map_bitmap(fd, "done", bits, create=create)
        losses = statefiles.map_record(fd, "losses", LOSSES_BYTES, create=create)
        if self.harden:  # before anything is freed, or relies on it
            for name in LAYER_FILES:
                statefiles.sync_file(fd, name)
        if not self.power:
            return LayerParts(Bitmap(bits, access), Bitmap(bits, done), temp, losses)
        mappings = {"done": done, "access": access, "losses": losses}
        files = LayerFiles.open(fd, temp, mappings, bits, self._limiter)
        self._files[layer_id] = files
        return files.parts

    def _open_temp(self, fd: int, size: int) -> FileImage:
        if os.fstat(fd).st_size != size:
            found = os.fstat(fd).st_size
            os.close(fd)
            raise StateError(f"a temp image has {found} bytes and must have {size}")
        if not lock_image(fd, writable=True):
            os.close(fd)
            raise InUse("a temp image in the state directory is in use by another process")
        return FileImage(fd, limiter=self._temp_limiter)

    def remove_unlisted(self, listed: set[int]) -> list[str]:
        """Remove the files of layers that are in no list; says which."""
        notices = []
        for name in os.listdir(self._fd):
            if not (name.isascii() and name.isdigit() and int(name) in listed):
                statefiles.remove_tree(name, parent=self._fd)
                notices.append(f"removed what was left of snapshot number {name}")
        return notices

    # Changes

    def create(self, layer_id: int, geometry: Geometry) -> LayerParts:
        """The files of a new layer; on failure nothing is left behind."""
        name = str(layer_id)
        os.mkdir(name, 0o700, dir_fd=self._fd)
        try:
            fd = statefiles.open_directory(name, parent=self._fd)
            try:
                temp_fd = statefiles.make_file(fd, "temp", geometry.size)
                lock_image(temp_fd, writable=True)
                temp = FileImage(temp_fd, limiter=self._temp_limiter)
                parts = self._parts(layer_id, fd, geometry, temp, create=True)
                if self.power:
                    os.fsync(fd)
                    os.fsync(self._fd)
                return parts
            finally:
                os.close(fd)
        except BaseException:
            self.remove(layer_id)
            raise

    def forget(self, layer_id: int) -> None:
        """Close what serves to sync a layer that is about to be removed.  Does not block."""
        files = self._files.pop(layer_id, None)
        if files is not None:
            files.close()

    def remove(self, layer_id: int) -> None:
        """Remove the files of a layer, if they are there."""
        statefiles.remove_tree(str(layer_id), parent=self._fd)

    # Room

    def free_bytes(self) -> int:
        """Space that is left for temp images."""
        found = os.fstatvfs(self._fd)
        return found.f_bavail * found.f_frsize

    def default_reserve(self) -> int:
        """Bytes to leave free for the image, which may be sparse: 1 GiB, or 5 % if that is less."""
        found = os.fstatvfs(self._fd)
        return min(1 << 30, found.f_blocks * found.f_frsize // 20)

    # The end

    def sync(self, layers: Iterable[Layer]) -> None:
        """Make the files of layers durable."""
        for layer in layers:
            fd = statefiles.open_directory(str(layer.id), parent=self._fd)
            try:
                for name in LAYER_FILES:
                    statefiles.sync_file(fd, name)
            finally:
                os.close(fd)

    def close(self) -> None:
        """Close the directory; the temp images belong to their layers."""
        for files in self._files.values():
            files.close()
        self._files.clear()
        os.close(self._fd)
