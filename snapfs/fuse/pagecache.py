"""What the kernel caches of the mount: writing it back and dropping it.

Files of the mount are opened and synced by the process beside us (outsider.py),
and closed as soon as they have served, since they would make umount(8) fail
with EBUSY.  Dropping pages can only be done from here, in a worker thread: the
kernel may need an answer of the trio thread before it goes on.  It is done
where nothing else will do, for a daemon killed meanwhile may hang the mount.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from attrs import frozen

from ..client.mountinfo import Mount
from ..storage.linux import kernel_version
from ..storage.offload import in_thread
from . import requestfilter
from .outsider import Outsider

log = logging.getLogger(__name__)

READ_AHEAD_KIB = 1024  # two of the largest requests, which go side by side
# Before Linux 6.16 a page counted as written back as soon as the request had a copy of it.
WRITE_BACK_ENDS_WITH_ANSWER = kernel_version() >= (6, 16)
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

    def __init__(self, outsider: Outsider) -> None:
        self._outsider = outsider
        self._limiter = trio.CapacityLimiter(8)
        self._quarantined: list[tuple[int, Edges]] = []  # inode, pages; task-atomic

    async def begin(self, mount: Mount) -> None:
        """Return when the mount answers; to be called once it is served."""
        await self._outsider.call("wait", f"{mount.id} {mount.device} {mount.number or 0}")
        self._read_ahead(mount.device)

    @staticmethod
    def _read_ahead(device: str) -> None:
        """Let the kernel read two requests ahead, if we may (only root may).

        Otherwise it asks for 128 KiB at a time, and a buffered copy of a snapshot takes
        half as long again.
        """
        where = Path("/sys/class/bdi", device, "read_ahead_kb")
        try:
            if int(where.read_text()) < READ_AHEAD_KIB:
                where.write_text(str(READ_AHEAD_KIB))
        except (OSError, ValueError) as error:
            log.debug("the readahead of the mount stays as it is: %s", error)

    def is_own(self, process: int) -> bool:
        """Was this request made for us?  `process`: pid of the request, a thread's."""
        if not self._outsider.lives:  # its number may be another's by now
            return False
        try:
            return os.path.exists(f"/proc/{self._outsider.pid}/task/{process}")
        except OSError:
            return False

    async def write_back(self, inode: int, name: str) -> None:
        """Return when every page of the file that was dirty has been written to us.

        fsync(2) does that, and answers only when the writes have been answered;
        the daemon knows its own handle and makes no real fsync of it.  Where
        the file cannot be reached, dropping its pages writes them back as well.
        """
        try:
            await self._outsider.call("sync", name)
        except OSError as error:
            if error.errno == errno.EIO:  # of a write-back: the snapshot would miss it
                raise
            log.info("%s cannot be reached through the mountpoint: %s", name, error.strerror)
            await self.drop(inode, 0, 1 << 62)

    @asynccontextmanager
    async def written_back(self, name: str, offset: int) -> AsyncIterator[bool]:
        """While the kernel holds the file's lock: has what is dirty from `offset` on come to us?

        The lock is that of a request, which the block must answer whatever happens:
        fsync(2) would wait for it, and sync_file_range(2) does not, but close(2) does,
        which comes after the block.  False: nobody knows.
        """
        fd = None
        if WRITE_BACK_ENDS_WITH_ANSWER:
            try:
                fd = await self._outsider.call("write_back", f"{offset}/{name}")
            except OSError as error:
                log.info("cannot write back %s: %s", name, error.strerror)
        try:
            yield fd is not None
        finally:
            if fd is not None:
                with trio.CancelScope(shield=True), contextlib.suppress(OSError):
                    await self._outsider.call("close", str(fd))

    async def drop(self, inode: int, offset: int, length: int) -> None:
        """Forget cached pages that touch the range; mappings of them fault again."""
        await in_thread(
            requestfilter.invalidate_range, inode, offset, length, limiter=self._limiter
        )

    def is_quarantined(self, inode: int, offset: int, length: int) -> bool:
        """Must a READ fail for now, lest its pages are zeroed under the reader?"""
        return any(
            inode == each and edges.overlap(offset, length) for each, edges in self._quarantined
        )

    def quarantined(self) -> set[int]:
        """Inodes of which some READ must fail for now."""
        return {inode for inode, _ in self._quarantined}

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
            fd = await self._outsider.call("open", name)
        except OSError as error:
            log.warning("a range that cuts pages cannot be punched: %s", error.strerror)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL)) from None
        entry = (inode, edges)
        self._quarantined.append(entry)
        try:
            for first, last in edges.pages:
                await self.drop(inode, first, last - first)
        except BaseException:  # the request is still to be answered: fsync would wait for that
            self._quarantined.remove(entry)
            with trio.CancelScope(shield=True), contextlib.suppress(OSError):
                await self._outsider.call("close", str(fd))
            raise
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                try:
                    await self._outsider.call("finish", str(fd))
                except OSError as error:  # the mount is gone: nothing is cached any more
                    log.info("cannot wait for a punch to end: %s", error.strerror)
            self._quarantined.remove(entry)
