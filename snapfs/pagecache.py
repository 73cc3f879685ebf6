"""What the kernel caches of the mount: writing it back and dropping it.

Everything here that touches the mount does so in worker threads: the kernel
may need an answer of the trio thread before it goes on.  A descriptor on our
own mount is closed as soon as it has served, since it would make umount(8)
fail with EBUSY.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from attrs import frozen

from . import requestfilter

log = logging.getLogger(__name__)

PAGE = 4096  # the smallest page that Linux has; larger ones are multiples


@frozen
class Edges:
    """Pages that a punched range [start, end) covers only in part: [first, last) bytes each."""

    pages: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, start: int, end: int, size: int) -> Edges:
        """Edges of a range in a file of `size` bytes; an end at or beyond it is aligned."""
        cuts = [start] if end >= size else [start, end]
        pages = {cut - cut % PAGE for cut in cuts if cut % PAGE}
        return cls(tuple((page, page + PAGE) for page in sorted(pages)))

    def overlap(self, offset: int, length: int) -> bool:
        """Does [offset, offset+length) touch one of the pages?"""
        return any(offset < last and first < offset + length for first, last in self.pages)


class PageCache:
    """The kernel's page cache of one mount."""

    def __init__(self, mountpoint: str) -> None:
        self._mountpoint = Path(mountpoint)
        self._limiter = trio.CapacityLimiter(8)
        self.device: int | None = None  # st_dev of the mount, once it is there
        self._quarantined: list[tuple[int, Edges]] = []  # inode, pages; task-atomic
        # Kernel ids of our threads that open a file of the mount; what they open
        # is ours.  Each thread adds and takes out its own (atomic under the GIL).
        self._own_threads: set[int] = set()

    async def learn_device(self) -> None:
        """Remember which file system we are; to be called when the mount answers."""
        status = await trio.to_thread.run_sync(os.stat, self._mountpoint, limiter=self._limiter)
        self.device = status.st_dev

    def is_own(self, thread: int) -> bool:
        """Did one of our own threads make this request?  `thread`: pid of the request."""
        return thread in self._own_threads

    def _open(self, name: str) -> int:
        """Open a file of our own mount; OSError ESTALE if something else is mounted there."""
        self._own_threads.add(threading.get_native_id())
        try:
            fd = os.open(self._mountpoint / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        finally:
            self._own_threads.discard(threading.get_native_id())
        if os.fstat(fd).st_dev != self.device:
            os.close(fd)
            raise OSError(errno.ESTALE, "another file system is mounted over the mountpoint")
        return fd

    def _sync(self, name: str) -> None:
        fd = self._open(name)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    async def write_back(self, inode: int, name: str) -> None:
        """Return when every page of the file that was dirty has been written to us.

        fsync(2) does that, and answers only when the writes have been answered;
        the daemon knows its own handle and makes no real fsync of it.  Where
        the file cannot be reached, dropping its pages writes them back as well.
        """
        try:
            await trio.to_thread.run_sync(self._sync, name, limiter=self._limiter)
        except OSError as error:
            if error.errno == errno.EIO:  # of a write-back: the snapshot would miss it
                raise
            log.info("%s cannot be reached through the mountpoint: %s", name, error.strerror)
            await self.drop(inode, 0, 1 << 62)

    async def drop(self, inode: int, offset: int, length: int) -> None:
        """Forget cached pages that touch the range; mappings of them fault again."""
        await trio.to_thread.run_sync(
            requestfilter.invalidate_range, inode, offset, length, limiter=self._limiter
        )

    def is_quarantined(self, inode: int, offset: int, length: int) -> bool:
        """Must a READ fail for now, lest its pages are zeroed under the reader?"""
        return any(
            inode == each and edges.overlap(offset, length) for each, edges in self._quarantined
        )

    @asynccontextmanager
    async def punched(
        self, inode: int, name: str | None, start: int, end: int, size: int
    ) -> AsyncIterator[None]:
        """Keep the page cache true around the punch of a snapshot.

        The block withdraws access, drops the pages, and replies to the request.
        After the reply the kernel zeroes cached bytes of [start, end).  Whole
        pages there cannot be cached any more, but a page at an edge that is not
        aligned would show zeros that are not in the snapshot.  Reads of such a
        page fail with EAGAIN until the kernel is through: it holds the inode's
        lock, which fsync(2) needs.  Raises OSError EINVAL, before the block, if
        that cannot be had.
        """
        edges = Edges.of(start, end, size)
        if not edges.pages:
            yield
            return
        try:
            if name is None:
                raise FileNotFoundError(errno.ENOENT, "the snapshot was deleted")
            fd = await trio.to_thread.run_sync(self._open, name, limiter=self._limiter)
        except OSError as error:
            log.warning("a range that cuts pages cannot be punched: %s", error.strerror)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL)) from None
        entry = (inode, edges)
        self._quarantined.append(entry)
        try:
            for first, last in edges.pages:
                await self.drop(inode, first, last - first)
            yield
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._finish, fd, limiter=self._limiter)
            self._quarantined.remove(entry)

    @staticmethod
    def _finish(fd: int) -> None:
        try:
            os.fsync(fd)
        except OSError as error:  # the mount is gone: nothing is cached any more
            log.info("cannot wait for a punch to end: %s", error.strerror)
        finally:
            os.close(fd)
