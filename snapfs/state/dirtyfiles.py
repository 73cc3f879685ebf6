"""The files of dirty bitmaps in the state directory: bitmaps/ID, mapped.

A page of head, then one bit per cluster, as many as fill whole pages.  The
head says whether the bits can be trusted, so that what is noted there survives
the daemon as the bits do:

    8 bytes  "snapdrt\\n"
    4 bytes  length of the reason why it is inconsistent, 0: it is consistent
    n bytes  that reason, UTF-8

A file that is missing, or not of that form, makes its bitmap inconsistent; it
never keeps an image from being mounted.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
from collections.abc import Callable, Sequence
from functools import partial

import trio

from ..engine.bitmap import Bitmap
from ..engine.dirty import BitmapRecord, DirtyBitmap, DirtyParts
from ..engine.durability import GroupCommit
from ..errors import StateError
from ..storage import descriptors
from ..storage.descriptors import Reserve
from ..storage.mapping import Mapping, failure_of_any, map_file
from ..storage.offload import in_thread
from ..storage.watch import Watch
from . import statefiles
from .layerfiles import MappedFile

log = logging.getLogger(__name__)

HEAD_BYTES = 4096
PAGE_BYTES = 4096
MAX_REASON_BYTES = 1024
_HEAD = struct.Struct("<8sI")
_MAGIC = b"snapdrt\n"


def file_bytes(clusters: int) -> int:
    """Size of the file of a bitmap that must have room for that many clusters."""
    bits_per_page = PAGE_BYTES * 8
    return HEAD_BYTES + max(1, -(-clusters // bits_per_page)) * PAGE_BYTES


def is_plausible(size: int) -> bool:
    """Can the file of a bitmap have that many bytes?"""
    return size >= HEAD_BYTES + PAGE_BYTES and size % PAGE_BYTES == 0


def distrusted(head: bytes | Mapping) -> str | None:
    """Why the bits are not to be trusted, by the head of their file; None: they are."""
    magic, length = _HEAD.unpack_from(head)
    if magic != _MAGIC or length > MAX_REASON_BYTES:
        return "its file is damaged"
    if length:
        return head[_HEAD.size : _HEAD.size + length].decode(errors="replace")
    return None


def _parts(
    mapping: Mapping,
    commit: GroupCommit | None,
    failure: Callable[[], OSError | None] = lambda: None,
) -> DirtyParts:
    buffer = memoryview(mapping)[HEAD_BYTES:]
    bits = Bitmap(buffer.nbytes * 8, buffer)

    def spoil(reason: str) -> None:
        text = reason.encode()[:MAX_REASON_BYTES] or b"?"
        mapping[_HEAD.size : _HEAD.size + len(text)] = text
        _HEAD.pack_into(mapping, 0, _MAGIC, len(text))

    mapped = failure_of_any([mapping])
    return DirtyParts(bits, buffer, spoil, commit, lambda: mapped() or failure())


class DirtyFiles:
    """The directory bitmaps/; implements `BitmapStore`."""

    def __init__(self, fd: int, limiter: trio.CapacityLimiter, power: bool, spare: Reserve) -> None:
        """`fd`: of the directory; owned from now on.  `power`: survive a power cut.

        `spare`: descriptors for what must not fail for want of some.
        """
        self._spare = spare
        self._fd = fd
        self._limiter = limiter
        self._power = power
        self._files: dict[int, tuple[MappedFile, GroupCommit]] = {}  # by id, with power
        self._watches: dict[int, Watch] = {}  # by id, without: see layerstore.py

    @classmethod
    def open(
        cls, parent: int, limiter: trio.CapacityLimiter, power: bool, spare: Reserve
    ) -> DirtyFiles:
        """Open the directory, made if need be.  Blocks.  StateError, OSError."""
        try:
            os.mkdir("bitmaps", 0o700, dir_fd=parent)
        except FileExistsError:
            pass
        fd = statefiles.open_directory("bitmaps", parent=parent)
        return cls(fd, limiter, power, spare)

    def _mapped(self, bitmap_id: int, mapping: Mapping) -> DirtyParts:
        """The parts of a bitmap whose file is mapped, or has been mapped anew."""
        if not self._power:
            if bitmap_id not in self._watches:
                fd = statefiles.open_file(self._fd, str(bitmap_id), os.O_RDONLY)
                self._watches[bitmap_id] = Watch(fd)
            return _parts(mapping, None, self._watches[bitmap_id].failure)
        if bitmap_id in self._files:
            file, commit = self._files[bitmap_id]
            file.mapping = mapping
        else:
            fd = statefiles.open_file(self._fd, str(bitmap_id))
            statefiles.sync_file(self._fd, str(bitmap_id))
            file = MappedFile(fd, mapping, self._limiter)
            commit = GroupCommit(file.sync)
            self._files[bitmap_id] = file, commit
        return _parts(mapping, commit)

    def names(self) -> list[str]:
        """What files there are.  Blocks."""
        return os.listdir(self._fd)

    # Recovery

    def recover(
        self, records: Sequence[BitmapRecord], clusters: int, distrust: str | None
    ) -> tuple[list[DirtyBitmap], list[str]]:
        """The bitmaps of a saved list, and notices.  Blocks.

        `clusters`: of the image now.  `distrust`: why none can be trusted.
        """
        notices: list[str] = []
        listed = {str(record.id) for record in records}
        for name in os.listdir(self._fd):
            if name not in listed:
                statefiles.remove_tree(name, parent=self._fd)
                notices.append(f"removed what was left of bitmap number {name}")
        found = []
        for record in records:
            bitmap = self._load(record, clusters)
            if bitmap.parts is not None and distrust is not None:
                bitmap.spoil(distrust)
                notices.append(f"bitmap {bitmap.name!r} is inconsistent: {distrust}")
            found.append(bitmap)
        return found, notices

    def _load(self, record: BitmapRecord, clusters: int) -> DirtyBitmap:
        made = partial(DirtyBitmap, record.id, record.name, began_ns=record.began_ns)
        if record.reason is not None:
            return made(None, record.reason, record.reason)
        try:
            fd = statefiles.open_file(self._fd, str(record.id))
            try:
                size = os.fstat(fd).st_size
                if not is_plausible(size):
                    raise StateError(f"its file has {size} bytes")
                mapping = map_file(fd, size)
            finally:
                os.close(fd)
        except (StateError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            log.error("bitmap %s cannot be read: %s", record.name, reason)
            # The list must have it: the file may be readable next time, without our bits.
            text = f"it cannot be read: {reason}"
            return made(None, text, text)
        reason = distrusted(mapping)
        if reason is not None:
            return made(None, reason)
        bitmap = made(self._mapped(record.id, mapping))
        if size < file_bytes(clusters):
            bits = (size - HEAD_BYTES) * 8
            bitmap.spoil(f"its file has room for {bits} clusters and the image has {clusters}")
        return bitmap

    # What the tracker calls

    async def make(self, bitmap_id: int, clusters: int) -> DirtyParts:
        return await in_thread(self._make, bitmap_id, clusters, limiter=self._limiter)

    def _make(self, bitmap_id: int, clusters: int) -> DirtyParts:
        descriptors.check(1, "one more bitmap")
        name = str(bitmap_id)
        try:
            fd = statefiles.make_file(self._fd, name, 0)
            try:
                mapping = map_file(fd, file_bytes(clusters))
            finally:
                os.close(fd)
        except FileExistsError:
            raise
        except BaseException:
            statefiles.remove(self._fd, name)
            raise
        _HEAD.pack_into(mapping, 0, _MAGIC, 0)
        parts = self._mapped(bitmap_id, mapping)
        if self._power:
            os.fsync(self._fd)
        return parts

    async def grow(self, bitmap_id: int, clusters: int) -> DirtyParts:
        return await in_thread(
            self._spare.serve, self._grow, bitmap_id, clusters, limiter=self._limiter
        )

    def _grow(self, bitmap_id: int, clusters: int) -> DirtyParts:
        fd = statefiles.open_file(self._fd, str(bitmap_id))
        try:
            old = os.fstat(fd).st_size
            size = max(old, file_bytes(clusters))
            found = os.fstatvfs(fd)
            if size - old > found.f_bavail * found.f_frsize:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # before it fills the disk
            try:
                return self._mapped(bitmap_id, map_file(fd, size))
            except BaseException:
                os.ftruncate(fd, old)
                raise
        finally:
            os.close(fd)

    async def remove(self, bitmap_id: int) -> None:
        file, _ = self._files.pop(bitmap_id, (None, None))
        if file is not None:
            file.close()
        watch = self._watches.pop(bitmap_id, None)
        if watch is not None:
            watch.close()
        await in_thread(statefiles.remove, self._fd, str(bitmap_id), limiter=self._limiter)

    # The end

    async def sync(self, bitmap_id: int) -> None:
        await in_thread(self.sync_file, bitmap_id, limiter=self._limiter)

    def sync_file(self, bitmap_id: int) -> None:
        """`sync`, for one who may block."""
        if bitmap_id in self._watches:
            os.fsync(self._watches[bitmap_id].fd)
        else:
            statefiles.sync_file(self._fd, str(bitmap_id))

    def sync_all(self, bitmaps: Sequence[DirtyBitmap]) -> None:
        """Make these durable, and which files there are.  Blocks.  OSError."""
        for bitmap in bitmaps:
            if bitmap.parts is not None:
                self.sync_file(bitmap.id)
        self.sync_directory()

    def sync_directory(self) -> None:
        """Make durable which files there are.  Blocks.  OSError."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Close the directory."""
        for file, _ in self._files.values():
            file.close()
        self._files.clear()
        for watch in self._watches.values():
            watch.close()
        self._watches.clear()
        os.close(self._fd)
