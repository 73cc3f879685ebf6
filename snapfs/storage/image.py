"""Files of bytes: the live image and the temp images.

An `Image` owns one descriptor.  The engine asks for whole ranges and gets all
of them or an OSError; short reads happen only at the end of the file.  What
can be answered from the page cache at once is (`RWF_NOWAIT`); whatever may
block runs in a worker thread, under a limiter of its own, and is never
abandoned: when the call returns or raises, no thread touches the file any
more.

Offsets and lengths are bytes.  Sources: preadv2(2), fallocate(2), lseek(2).
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar, TypeVarTuple

import trio

from ..port._clustercopy import copy_clusters
from .linux import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, fallocate
from .offload import Offloader, in_thread
from .systemerrors import SystemErrors
from .watch import Watch

Buffer = bytes | bytearray | memoryview

_Result = TypeVar("_Result")
_Arguments = TypeVarTuple("_Arguments")


class Image(Protocol):
    """What the engine needs of the image and of a temp image."""

    async def pread(self, offset: int, length: int) -> Buffer:
        """Read; the result is shorter only where the file ends."""

    def pread_nowait(self, offset: int, length: int) -> Buffer | None:
        """The same without blocking, or None if the page cache lacks a byte."""

    async def pwrite(self, offset: int, data: Buffer) -> None:
        """Write all of `data`."""

    async def punch(self, offset: int, length: int) -> None:
        """Free the range; it reads as zeros.  The size stays."""

    async def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros, allocated if it can be; may extend the file."""

    async def allocate(self, offset: int, length: int, keep_size: bool) -> None:
        """Allocate space for the range; may extend the file unless `keep_size`."""

    async def truncate(self, size: int) -> None:
        """Set the size; what is new reads as zeros."""

    async def flush(self) -> None:
        """Make the data durable (fdatasync)."""

    async def data_extents(
        self, offset: int, length: int, limit: int
    ) -> tuple[list[tuple[int, int]], int]:
        """Where data may be: ascending (start, stop) pairs inside the range.

        At most `limit` (>= 1) pairs; the second value is the offset up to
        which they are complete, the end of the range or that of the last pair.
        """

    async def data_inside(
        self, ranges: Sequence[tuple[int, int]], limit: int
    ) -> tuple[list[tuple[int, int]], int]:
        """`data_extents` of several ascending (start, stop) ranges at once.

        No pair spans two ranges.  The second value is the offset up to which
        the pairs are complete, the end of the last range or that of the last pair.
        """

    async def copy_to(
        self,
        target: Image,
        offset: int,
        length: int,
        cluster_size: int,
        budget: int,
        durable: bool = False,
    ) -> int:
        """Copy the range to the same offsets of `target`, which is empty there.

        Clusters that are unallocated or all zeros are left as holes.  With
        `durable` all of it is durable on return; then no copy to `target` is
        ever made without.  Returns the bytes written; OSError ENOSPC if they
        would be more than `budget`.
        """

    def size(self) -> int:
        """Present size of the file.

        Blocks where the storage does not answer, as `blocks` and `close` do: to be called
        for the image only, which nothing can do without, or in a thread.
        """

    def blocks(self) -> int:
        """Allocated space in units of 512 bytes, as st_blocks."""

    def failure(self) -> OSError | None:
        """What could not be written back since the last call, if anything.  Does not block."""

    def close(self) -> None:
        """Close the file.  No call may be in flight."""


def _pread_full(fd: int, offset: int, length: int) -> bytearray:
    buffer = bytearray(length)
    done = 0
    with memoryview(buffer) as view:
        while done < length:
            count = os.preadv(fd, [view[done:]], offset + done)
            if not count:
                break
            done += count
    if done < length:
        del buffer[done:]
    return buffer


def _pwrite_full(fd: int, offset: int, data: Buffer) -> None:
    view = memoryview(data)
    done = 0
    while done < len(view):
        count = os.pwrite(fd, view[done:], offset + done)
        if not count:
            raise OSError(errno.EIO, "a write made no progress")
        done += count


def _punch(fd: int, offset: int, length: int) -> None:
    fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)


def _zero(fd: int, offset: int, length: int) -> None:
    try:
        fallocate(fd, FALLOC_FL_ZERO_RANGE, offset, length)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:  # tmpfs, for one
            raise
        _punch(fd, offset, length)
        fallocate(fd, 0, offset, length)


def _seek_data(fd: int, offset: int) -> int | None:
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole up to the end
            return None
        raise


def _data_inside(
    fd: int, ranges: Sequence[tuple[int, int]], limit: int
) -> tuple[list[tuple[int, int]], int]:
    extents: list[tuple[int, int]] = []
    data, hole = -1, -1  # the piece of data found last: [data, hole)
    position = 0
    for offset, end in ranges:
        position = offset
        while position < end:
            if len(extents) == limit:
                return extents, position
            if position >= hole:
                found = _seek_data(fd, position)
                if found is None:
                    data = hole = sys.maxsize
                else:
                    data, hole = found, os.lseek(fd, found, os.SEEK_HOLE)
            if data >= end:
                position = end
            else:
                start, position = max(position, data), min(end, hole)
                extents.append((start, position))
    return extents, position


def _nothing() -> None:
    """A call that is made for what comes after it."""


class FileImage:
    """An `Image` that is a regular file.

    Owns `fd` from construction to `close`.  `limiter` bounds the threads that
    this file and those sharing the limiter use at once.  `watched`: it hears of what
    cannot be written back, from now on (`Watch`).  `flushed`: it is flushed now and then.
    """

    def __init__(
        self,
        fd: int,
        *,
        limiter: trio.CapacityLimiter,
        watched: bool = False,
        flushed: bool = True,
    ) -> None:
        self.fd = fd
        self._watch = Watch.beside(fd) if watched else None
        # Another one for native code, which asks beside us.  A flush would take what it is to
        # hear; where there is none `fd` will do.
        self._native_watch = Watch.beside(fd) if watched and flushed else None
        self._limiter = limiter
        self._writes = Offloader(limiter)
        # Copies that must be durable: one sync for those that wait for it by then.
        self._syncs = Offloader(limiter, trips=1, ending=self._sync)
        self._failed_syncs = 0
        self._write_nowait = True  # until the file system says it cannot

    async def _offload(
        self, call: Callable[[*_Arguments], _Result], *arguments: *_Arguments
    ) -> _Result:
        return await in_thread(call, *arguments, limiter=self._limiter)

    def pread_nowait(self, offset: int, length: int) -> Buffer | None:
        buffer = bytearray(length)
        try:
            count = os.preadv(self.fd, [buffer], offset, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
                return None
            raise
        # A short count may be the end of the file or the end of what is cached.
        return buffer if count == length else None

    async def pread(self, offset: int, length: int) -> Buffer:
        cached = self.pread_nowait(offset, length)
        if cached is not None:
            return cached
        return await self._offload(_pread_full, self.fd, offset, length)

    async def pwrite(self, offset: int, data: Buffer) -> None:
        done = self._pwrite_nowait(offset, data)
        if done < len(data):
            await self._writes.run(_pwrite_full, self.fd, offset + done, memoryview(data)[done:])

    def _pwrite_nowait(self, offset: int, data: Buffer) -> int:
        if not self._write_nowait:
            return 0
        try:
            return os.pwritev(self.fd, [data], offset, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:  # ext4's buffered writes, for one
                self._write_nowait = False
            # Whatever it is, the blocking call meets it again and reports it.
            return 0

    async def punch(self, offset: int, length: int) -> None:
        await self._offload(_punch, self.fd, offset, length)

    def punch_data(self, offset: int, length: int) -> None:
        """Punch out what data there is in the range.  Blocks."""
        end = offset + length
        for start, stop in _data_inside(self.fd, [(offset, end)], sys.maxsize)[0]:
            # A hole that ends with the file leaves its last block allocated.
            _punch(self.fd, start, (end if stop == self.size() else stop) - start)

    def drop_clean(self) -> None:
        """Let the page cache forget what it takes for stored.  Blocks.

        After a write-back that failed that is more than the file has.
        """
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def data_bytes(self, offset: int, length: int) -> int:
        """How much of the range is data, not holes.  Blocks."""
        extents = _data_inside(self.fd, [(offset, offset + length)], sys.maxsize)[0]
        return sum(stop - start for start, stop in extents)

    async def zero(self, offset: int, length: int) -> None:
        await self._offload(_zero, self.fd, offset, length)

    async def allocate(self, offset: int, length: int, keep_size: bool) -> None:
        mode = FALLOC_FL_KEEP_SIZE if keep_size else 0
        await self._offload(fallocate, self.fd, mode, offset, length)

    async def truncate(self, size: int) -> None:
        await self._offload(os.ftruncate, self.fd, size)

    async def flush(self) -> None:
        await self._offload(self._sync)

    def _sync(self) -> None:
        try:
            os.fdatasync(self.fd)
        except OSError:
            self._failed_syncs += 1
            raise

    async def data_extents(
        self, offset: int, length: int, limit: int
    ) -> tuple[list[tuple[int, int]], int]:
        return await self.data_inside([(offset, offset + length)], limit)

    async def data_inside(
        self, ranges: Sequence[tuple[int, int]], limit: int
    ) -> tuple[list[tuple[int, int]], int]:
        return await self._offload(_data_inside, self.fd, ranges, limit)

    async def copy_to(
        self,
        target: Image,
        offset: int,
        length: int,
        cluster_size: int,
        budget: int,
        durable: bool = False,
    ) -> int:
        # In the queue of the target, which is the one that is written.
        if not isinstance(target, FileImage):
            raise TypeError("a file is copied to a file")
        failed = target._failed_syncs
        written = await target._writes.run(
            copy_clusters, self.fd, target.fd, offset, length, cluster_size, budget
        )
        if durable:
            await target._syncs.run(_nothing)
            # A descriptor tells of an error once.  What was written while another sync failed
            # may be what it failed for, and the next one would not tell.
            if target._failed_syncs != failed:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return written

    def size(self) -> int:
        return os.fstat(self.fd).st_size

    def blocks(self) -> int:
        return os.fstat(self.fd).st_blocks

    def failure(self) -> OSError | None:
        return None if self._watch is None else self._watch.failure()

    @property
    def native_watch(self) -> int:
        """A description that native code alone asks for what could not be written back, or -1."""
        if self._watch is None:
            return -1
        return self.fd if self._native_watch is None else self._native_watch.fd

    @property
    def system(self) -> SystemErrors | None:
        """What native code asks beside that, if there is something."""
        return None if self._watch is None else self._watch.system.system

    def sync(self) -> None:
        """`flush`, times included, for one who may block.

        OSError also if something could not be written back before and `failure` has not told it;
        what that has told is not told again.
        """
        os.fsync(self.fd if self._watch is None else self._watch.fd)
        failure = self.failure()
        if failure is not None:
            raise failure

    def close(self) -> None:
        for watch in (self._watch, self._native_watch):
            if watch is not None:
                watch.close()
        if self.fd >= 0:
            fd, self.fd = self.fd, -1  # close(2) closes even if it fails
            os.close(fd)
