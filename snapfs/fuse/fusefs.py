"""The FUSE face: answers what the kernel asks about the files of a mount (tree.py).

The only importer of pyfuse3, which must come after `requestfilter.load`.  An
exception that is not a FUSEError would end the mount, so `handler` stands
around every method that pyfuse3 calls: domain errors and OSErrors become
errnos, anything else a logged traceback, EIO, and an unhealthy mount (errnos.py).

The kernel checks modes (mount option default_permissions); what only the owner
of the mount may do is checked here as well, whatever the modes say.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import pyfuse3
import trio

from .. import errors
from ..engine.engine import Engine
from ..storage.image import Buffer
from ..storage.offload import in_thread
from . import bitmapfs, requestfilter
from .errnos import Errnos
from .fastpath import FIRST_SNAPSHOT, FastPath
from .filterfs import FilterRequests
from .handles import Handle, Handles
from .pagecache import PageCache
from .tree import ACTIVE, BITMAPS, DIRECTORIES, PERMISSIONS, SNAPSHOTS, Tree, decode

log = logging.getLogger(__name__)

MAX_TASKS = 1000  # requests at once; those that wait must not keep others out

# Who opens a new file with one of these means to write to it: cp, mv and mktemp; dd and a shell's
# ">"; ">>".  touch has none of them.
NOT_TO_CREATE = os.O_EXCL | os.O_TRUNC | os.O_APPEND

_Self = TypeVar("_Self", bound="SnapshotFS")
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def handler(
    method: Callable[Concatenate[_Self, _Arguments], Coroutine[Any, Any, _Result]],
) -> Callable[Concatenate[_Self, _Arguments], Coroutine[Any, Any, _Result]]:
    """Let nothing but FUSEError (and cancellation) out of a handler."""

    @functools.wraps(method)
    async def wrapped(
        self: _Self, /, *arguments: _Arguments.args, **keywords: _Arguments.kwargs
    ) -> _Result:
        self.fast_path.busy += 1
        try:
            return await method(self, *arguments, **keywords)
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            raise pyfuse3.FUSEError(self.errno_of(error, method.__name__)) from None
        finally:
            self.fast_path.busy -= 1

    return wrapped


class SnapshotFS(pyfuse3.Operations):
    """The requests of one mount, over an engine and the tree that shows it.

    `image_fd` serves statfs and changes of owner, mode and times.  `nursery`
    runs requests that do not come through pyfuse3.
    """

    supports_dot_lookup = False
    enable_acl = False

    def __init__(
        self,
        engine: Engine,
        tree: Tree,
        image_fd: int,
        page_cache: PageCache,
        fast_path: FastPath,
        nursery: trio.Nursery,
        *,
        writeback_cache: bool = False,
    ) -> None:
        super().__init__()
        self.enable_writeback_cache = writeback_cache
        self.errnos = Errnos(engine.events)
        self.fast_path = fast_path
        self._engine = engine
        self._tree = tree
        self._image_fd = image_fd
        self._page_cache = page_cache
        self._handles = Handles(page_cache)
        engine.barrier = functools.partial(page_cache.write_back, ACTIVE, "active")
        self._filtered = FilterRequests(
            engine, page_cache, fast_path, nursery, self._handles, self.errno_of
        )
        fast_path.write = self._write_kept
        fast_path.read = self._read_kept

    @property
    def open_files(self) -> tuple[int, int]:
        """How many are open for reading, and how many of `active` for writing."""
        return self._handles.readers, self._handles.writers

    # Errors

    def errno_of(self, error: Exception, what: str) -> int:
        """The errno that tells a caller of an exception; see `Errnos.errno_of`."""
        if isinstance(error, pyfuse3.FUSEError):
            return int(error.errno)
        return self.errnos.errno_of(error, what)

    # Attributes

    def _is_owner(self, context: pyfuse3.RequestContext) -> bool:
        return context.uid in (0, os.geteuid(), self._tree.owner())

    def _check_owner(self, context: pyfuse3.RequestContext) -> None:
        if not self._is_owner(context):
            raise errors.NotPermitted("only the owner of the mount may change snapshots")

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        found = self._tree.attributes(inode)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = found.mode
        entry.st_nlink = found.links
        entry.st_uid = found.uid
        entry.st_gid = found.gid
        entry.st_size = found.size
        entry.st_blksize = found.block_size
        entry.st_blocks = found.blocks
        entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns = found.times_ns
        entry.entry_timeout = found.name_seconds
        entry.attr_timeout = 0
        return entry

    @handler
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    @handler
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        if inode == ACTIVE:
            await self._change_active(attr, fields)
        elif bitmapfs.is_bitmap(inode):
            raise errors.NotPermitted("bitmaps are changed by snapfs bitmap only")
        elif inode < FIRST_SNAPSHOT:
            raise errors.NotPermitted("the directories of the mount are fixed")
        elif fields.update_size:
            raise errors.ReadOnly("snapshots are read-only")
        elif fields.update_mode or fields.update_uid or fields.update_gid:
            raise errors.NotPermitted("owner and mode of a snapshot follow the image")
        elif not (_are_of_kernel(fields) or self._handles.has_created(inode, ctx.pid)):
            raise errors.NotPermitted("the time of a snapshot is that of its creation")
        return self._attributes(inode)

    async def _change_active(
        self, attr: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields
    ) -> None:
        mode = attr.st_mode & PERMISSIONS if fields.update_mode else None
        uid = attr.st_uid if fields.update_uid else None
        gid = attr.st_gid if fields.update_gid else None
        of_image = self._tree.check_owner_change(mode, uid, gid)
        if fields.update_size:
            await self._engine.resize(attr.st_size)
        changes: list[Callable[[], None]] = []
        if of_image and mode is not None:
            changes.append(functools.partial(os.fchmod, self._image_fd, mode))
        if of_image and (uid, gid) != (None, None):
            ids = (-1 if uid is None else uid, -1 if gid is None else gid)
            changes.append(functools.partial(os.fchown, self._image_fd, *ids))
        if fields.update_atime or fields.update_mtime:
            now = os.fstat(self._image_fd)
            times = (
                attr.st_atime_ns if fields.update_atime else now.st_atime_ns,
                attr.st_mtime_ns if fields.update_mtime else now.st_mtime_ns,
            )
            changes.append(functools.partial(os.utime, self._image_fd, ns=times))
        for change in changes:
            await self._engine.alter(change)

    @handler
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        found = await in_thread(os.fstatvfs, self._image_fd)
        data = pyfuse3.StatvfsData()
        data.f_bsize = found.f_bsize
        data.f_frsize = found.f_frsize
        data.f_blocks = found.f_blocks
        data.f_bfree = found.f_bfree
        data.f_bavail = found.f_bavail
        data.f_files = found.f_files
        data.f_ffree = found.f_ffree
        data.f_favail = found.f_favail
        data.f_namemax = 255
        return data

    @handler
    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        return True  # the kernel checks, with default_permissions

    # Names

    @handler
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._attributes(self._tree.lookup(parent_inode, name))

    @handler
    async def forget(self, inode_list: Any) -> None:
        pass  # inodes are derived from layer ids: nothing is kept for the kernel

    @handler
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        if inode not in DIRECTORIES:
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        return inode

    @handler
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        for position, inode, name in self._tree.listing(fh):
            if position > start_id and not pyfuse3.readdir_reply(
                token, name.encode(), self._attributes(inode), position
            ):
                return

    @handler
    async def releasedir(self, fh: int) -> None:
        pass

    @handler
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        if parent_inode not in (SNAPSHOTS, BITMAPS):
            raise errors.NotPermitted("only snapshots and bitmaps can be removed")
        self._check_owner(ctx)
        if parent_inode == BITMAPS:
            await self._tree.bitmaps.remove(decode(name))
            return
        await self._engine.delete_snapshot(decode(name))

    @handler
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        if (parent_inode_old, parent_inode_new) != (SNAPSHOTS, SNAPSHOTS):
            raise errors.NotPermitted("only snapshots can be renamed, in their directory")
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            raise pyfuse3.FUSEError(errno.EINVAL)
        self._check_owner(ctx)
        await self._engine.rename_snapshot(decode(name_old), decode(name_new))

    async def _refuse(self, *arguments: Any) -> Any:
        raise pyfuse3.FUSEError(errno.EPERM)

    mknod = mkdir = rmdir = symlink = link = readlink = cast(Any, _refuse)

    # Files

    @handler
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        if bitmapfs.is_bitmap(inode):
            owner = self._is_owner(ctx)
            content = await self._tree.bitmaps.open(inode, flags, owner=owner)
            taken = self._handles.text_bytes + len(content)
            if taken > bitmapfs.MOST_TEXT and not owner:
                raise errors.LimitReached("too many bitmaps are open")
            return _opened(self._handles.add_bitmap(inode, content))
        if inode == ACTIVE:
            if flags & os.O_TRUNC:
                await self._engine.resize(0)
            return _opened(self._handles.add_active(inode, ctx.pid, flags))
        layer = self._tree.layer(inode)
        if flags & os.O_TRUNC:
            raise errors.ReadOnly("snapshots are read-only")
        if flags & os.O_ACCMODE != os.O_RDONLY:
            self._check_owner(ctx)
        if flags & os.O_ACCMODE == os.O_RDWR and _is_mount(ctx.pid):
            raise errors.ReadOnly("a file system of a snapshot is mounted read-only")
        self._engine.open_snapshot(layer)
        return _opened(self._handles.add_snapshot(inode, layer, ctx.pid))

    @handler
    async def create(
        self,
        parent_inode: int,
        name: bytes,
        mode: int,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        if parent_inode != SNAPSHOTS:
            raise errors.NotPermitted("files can be created in snapshots/ only")
        self._check_owner(ctx)
        if flags & NOT_TO_CREATE:
            raise errors.ReadOnly("a snapshot is created by touch; nothing can be written to it")
        layer = await self._engine.create_snapshot(decode(name))
        self._engine.open_snapshot(layer)
        inode = FIRST_SNAPSHOT + layer.id
        handle = self._handles.add_snapshot(inode, layer, ctx.pid, creator=ctx.pid)
        return _opened(handle), self._attributes(inode)

    @handler
    async def release(self, fh: int) -> None:
        handle = self._handles.remove(fh)
        if handle.layer is not None:
            await self._engine.close_snapshot(handle.layer)

    @handler
    async def flush(self, fh: int) -> None:
        pass  # write(2) has reached the image when it returns

    @handler
    async def fsync(self, fh: int, datasync: bool) -> None:
        handle = self._handles[fh]
        if handle.inode == ACTIVE and not handle.own:
            await self._engine.flush()

    @handler
    async def read(self, fh: int, off: int, size: int) -> Buffer:  # type: ignore[override]
        # Only a read that bypasses the page cache may be short: the kernel takes
        # a short read of pages for the end of the file, and cp would stop there.
        return await self._read(fh, off, size, requestfilter.direct_read())

    async def _read(self, fh: int, off: int, size: int, partial: bool) -> Buffer:
        handle = self._handles[fh]
        if handle.content is not None:
            return handle.content[off : off + size]
        if handle.layer is None:
            return await self._engine.read(off, size)
        if self._page_cache.is_quarantined(handle.inode, off, size):
            raise pyfuse3.FUSEError(errno.EAGAIN)
        return await self._engine.read_snapshot(handle.layer, off, size, partial=partial)

    @handler
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return await self._write(fh, off, buf, requestfilter.synchronous_write())

    async def _write(self, fh: int, off: int, buf: bytes, synchronous: bool) -> int:
        """`synchronous`: durable before it is answered, if the kernel does not see to that."""
        handle = self._handles[fh]
        if handle.inode != ACTIVE:
            raise errors.ReadOnly("only active can be written")
        written = await self._engine.write(off, buf)
        if handle.direct and (synchronous or handle.synchronous):
            await self._engine.flush()
        return written

    async def _write_kept(self, unique: int, fh: int, offset: int, data: bytes) -> None:
        """Carry out a write that the fast path has handed over, and answer it."""
        error = errno.EINTR  # cancelled
        try:
            await self._write_guarded(fh, offset, data, False)  # others are not handed over
            error = 0
        except pyfuse3.FUSEError as failure:
            error = failure.errno
        finally:
            requestfilter.reply_write(unique, error, len(data))

    async def _read_kept(self, unique: int, fh: int, offset: int, size: int, direct: bool) -> None:
        """Carry out a read that the fast path has handed over, and answer it."""
        error = errno.EINTR  # cancelled
        data: Buffer = b""
        try:
            data = await self._read_guarded(fh, offset, size, direct)
            error = 0
        except pyfuse3.FUSEError as failure:
            error = failure.errno
        finally:
            requestfilter.reply_read(unique, error, data)

    _write_guarded = handler(_write)
    _read_guarded = handler(_read)

    # Extended attributes

    @handler
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        if name == b"user.snapfs.temp_bytes":
            await self._engine.space.refresh()
        value = self._tree.xattrs(inode).get(name)
        if value is None:
            ours = name.startswith(b"user.snapfs.")
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR if ours else errno.EOPNOTSUPP)
        return value

    @handler
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        return []  # cp -a and rsync -X would copy what is listed, and fail, or keep what is stale

    @handler
    async def setxattr(
        self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        raise errors.NotSupported("extended attributes cannot be set")

    @handler
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        raise errors.NotSupported("extended attributes cannot be removed")


def _are_of_kernel(fields: pyfuse3.SetattrFields) -> bool:
    """Are these times that the kernel keeps itself and stores in its own time?

    With writeback_cache it does, and a punch changes them: fuse_flush_times() in
    fs/fuse/dir.c.  Refused they would be an error of whoever closes the file.
    """
    return bool(fields.update_ctime and not fields.update_atime)


def _is_mount(thread: int) -> bool:
    """Is it a thread of mount(8), which makes a loop device of what it opens read-write?

    If that fails with EROFS it makes a read-only one, and mounts that read-only,
    while writes to the other would fail as if the disk were broken.
    """
    try:
        return Path(f"/proc/{thread}/comm").read_bytes() == b"mount\n"
    except OSError:  # it is gone, or in another name space
        return False


def _opened(handle: Handle) -> pyfuse3.FileInfo:
    return pyfuse3.FileInfo(fh=handle.number, direct_io=handle.direct, keep_cache=handle.keep_cache)
