"""Requests that pyfuse3 does not know and the request filter hands over: fallocate, lseek.

They belong to the FUSE face (fusefs.py) and share its handles and its table of
errnos; each is answered exactly once, whatever happens.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import trio
from attrs import define

from .. import errors
from ..engine.engine import Engine
from ..engine.layer import Layer
from ..storage.linux import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE
from . import requestfilter
from .bitmapfs import BitmapTree
from .fastpath import FastPath
from .handles import Handle, Handles
from .pagecache import PAGE, PageCache


class FilterRequests:
    """Answers them over an engine, in tasks of `nursery`.

    `handles` are those of the FUSE face, by number; `errno_of` tells the errno
    of an exception and logs what nobody expected.
    """

    def __init__(
        self,
        engine: Engine,
        page_cache: PageCache,
        fast_path: FastPath,
        nursery: trio.Nursery,
        handles: Handles,
        errno_of: Callable[[Exception, str], int],
    ) -> None:
        self._engine = engine
        self._page_cache = page_cache
        self._fast_path = fast_path
        self._nursery = nursery
        self._handles = handles
        self._errno_of = errno_of
        requestfilter.set_handlers(fallocate=self._on_fallocate, lseek=self._on_lseek)

    def _on_fallocate(
        self, request: int, inode: int, fh: int, mode: int, offset: int, length: int
    ) -> None:
        self._nursery.start_soon(self._fallocate, request, fh, mode, offset, length)

    async def _fallocate(self, request: int, fh: int, mode: int, offset: int, length: int) -> None:
        reply = _Reply(request)
        self._fast_path.busy += 1
        try:
            handle = self._handles[fh]
            if handle.content is not None:
                raise errors.ReadOnly("bitmaps are changed by snapfs bitmap only")
            if handle.layer is None:
                try:
                    await self._fallocate_active(mode, offset, length)
                    if handle.synchronous:  # as ext4 and XFS do
                        await self._engine.flush()
                except BaseException:  # a part is done: the kernel must not show what was there
                    with trio.CancelScope(shield=True):
                        await self._page_cache.drop(handle.inode, offset, max(1, length))
                    raise
            else:
                await self._discard(handle, handle.layer, mode, offset, length, reply)
            reply.error(0)
        except Exception as error:
            reply.error(self._errno_of(error, "fallocate"))
        finally:
            self._fast_path.busy -= 1
            reply.error(errno.EINTR)  # cancelled

    async def _fallocate_active(self, mode: int, offset: int, length: int) -> None:
        keep_size = bool(mode & FALLOC_FL_KEEP_SIZE)
        match mode & ~FALLOC_FL_KEEP_SIZE:
            case 0:
                await self._engine.allocate(offset, length, keep_size)
            case int(kind) if kind == FALLOC_FL_ZERO_RANGE:
                await self._engine.zero(offset, length, keep_size)
            case int(kind) if kind == FALLOC_FL_PUNCH_HOLE and keep_size:
                await self._engine.punch(offset, length)
            case _:
                raise errors.NotSupported(f"fallocate mode {mode:#x} is not supported")

    async def _discard(
        self,
        handle: Handle,
        layer: Layer,
        mode: int,
        offset: int,
        length: int,
        reply: _Reply,
    ) -> None:
        if mode != FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE:
            raise errors.NotSupported(f"fallocate mode {mode:#x} of a snapshot is not supported")
        name = None if layer.name is None else f"snapshots/{layer.name}"
        async with self._page_cache.punched(
            handle.inode, name, offset, offset + length, layer.geometry.size
        ):
            try:
                await self._withdraw(handle.inode, layer, offset, length)
                reply.error(0)  # then the kernel drops the pages of the range itself
            except Exception as error:
                reply.error(self._errno_of(error, "discard"))
            finally:
                reply.error(errno.EINTR)  # cancelled; the block must not end without a reply

    async def _withdraw(self, inode: int, layer: Layer, offset: int, length: int) -> None:
        """Discard.  When the request succeeds the kernel drops the pages of its range.

        It keeps a page that the range covers only in part, as at an end that is
        no multiple of the page size, and all of them when the request fails.
        """
        clusters = layer.geometry.covered(offset, length)
        if not clusters:
            return
        start, count = layer.geometry.span(clusters.start, clusters.stop)
        try:
            await self._engine.discard(layer, offset, length)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._page_cache.drop(inode, start, max(count, 1))
            raise
        if count and (start + count) % PAGE:
            await self._page_cache.drop(inode, start + count - 1, 1)

    def _on_lseek(self, request: int, inode: int, fh: int, offset: int, whence: int) -> None:
        self._nursery.start_soon(self._lseek, request, fh, offset, whence)

    async def _lseek(self, request: int, fh: int, offset: int, whence: int) -> None:
        reply = _Reply(request)
        self._fast_path.busy += 1
        try:
            handle = self._handles[fh]
            layer = handle.layer
            if handle.content is not None:
                reply.offset(BitmapTree.seek(handle.content, offset, whence))
            elif layer is None:
                await self._seek_active(handle, offset, whence, reply)
            else:
                reply.offset(await self._engine.seek_snapshot(layer, offset, whence))
        except Exception as error:
            reply.error(self._errno_of(error, "lseek"))
        finally:
            self._fast_path.busy -= 1
            reply.error(errno.EINTR)  # cancelled

    async def _seek_active(self, handle: Handle, offset: int, whence: int, reply: _Reply) -> None:
        """A program that copies only what is data must not miss what the kernel has not written."""
        if not self._handles.may_be_dirty(handle.inode):
            reply.offset(await self._engine.seek(offset, whence))
            return
        async with self._page_cache.written_back("active", offset) as good:
            try:
                size = self._engine.size
                if good or not 0 <= offset < size:
                    reply.offset(await self._engine.seek(offset, whence))
                else:  # all of it may be data
                    reply.offset(offset if whence == os.SEEK_DATA else size)
            except Exception as error:
                reply.error(self._errno_of(error, "lseek"))
            finally:
                reply.error(errno.EINTR)  # cancelled


@define
class _Reply:
    """The answer to a request of the filter: the first one counts."""

    request: int
    sent: bool = False

    def error(self, number: int) -> None:
        """Answer with an errno, 0 for success, unless there was an answer."""
        if not self.sent:
            self.sent = True
            if requestfilter.attached():  # else the session has ended: nobody waits
                requestfilter.reply_error(self.request, number)

    def offset(self, offset: int) -> None:
        """Answer an lseek."""
        self.sent = True
        if requestfilter.attached():
            requestfilter.reply_offset(self.request, offset)
