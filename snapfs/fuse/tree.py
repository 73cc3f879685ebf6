"""What there is in a mount: inodes, names and attributes.

    /active              inode 2, the live image
    /snapshots/          inode 3
    /snapshots/NAME      inode 4096 + the layer's id, stable over remounts
    /bitmaps/            inode 5 (bitmapfs.py)
    /bitmaps/NAME        inode 2**40 + the bitmap's id, which clearing changes

A part of the FUSE face (fusefs.py); it does no FUSE itself.
"""

from __future__ import annotations

import errno
import os
import stat

from attrs import frozen

from .. import errors
from ..engine.engine import Engine
from ..engine.layer import MAX_NAME_BYTES, Layer
from . import bitmapfs
from .fastpath import FIRST_SNAPSHOT

ROOT = 1  # FUSE_ROOT_ID in linux/fuse.h
ACTIVE = 2
SNAPSHOTS = 3
BITMAPS = bitmapfs.DIRECTORY
DIRECTORIES = (ROOT, SNAPSHOTS, BITMAPS)

# That there are: a set-user-ID program on `active` would be one that whoever writes to it chooses.
PERMISSIONS = 0o777

ACTIVE_SECONDS = 300  # that the kernel may keep the name of `active`; no other


@frozen
class Ownership:
    """Owner and modes of the files; None: as the image's.  `umask` takes bits away."""

    uid: int | None = None
    gid: int | None = None
    umask: int = 0

    @property
    def presented(self) -> bool:
        """Do the files show anything else than what the image has?"""
        return self != Ownership()

    def of(self, status: os.stat_result) -> tuple[int, int]:
        """User and group of the files, over an image with that status."""
        uid = status.st_uid if self.uid is None else self.uid
        return uid, status.st_gid if self.gid is None else self.gid


@frozen
class Attributes:
    """What stat(2) tells of a file, but for its inode and device."""

    mode: int  # with the type
    links: int
    uid: int
    gid: int
    size: int
    block_size: int  # for reading and writing
    blocks: int  # of 512 bytes
    times_ns: tuple[int, int, int]  # atime, mtime, ctime
    name_seconds: int  # that the kernel may keep the name without asking again


class Tree:
    """The files of one mount, over an engine.  `image_fd` has owner, modes and times."""

    def __init__(self, engine: Engine, image_fd: int, state_dir: str, ownership: Ownership) -> None:
        self.bitmaps = bitmapfs.BitmapTree(engine)
        self._engine = engine
        self._image_fd = image_fd
        self._state_dir = state_dir
        self._ownership = ownership

    def owner(self) -> int:
        """The user to whom the files belong."""
        return self._ownership.of(os.fstat(self._image_fd))[0]

    def check_owner_change(self, mode: int | None, uid: int | None, gid: int | None) -> bool:
        """Is a change of owner and mode of `active`, None: as it is, one of the image's?

        Not if others are shown than the image's: who is made the owner by `uid`
        owns what is shown, not the image.  Then one that changes nothing is let
        pass, and any other raises NotPermitted.
        """
        if not self._ownership.presented:
            return True
        shown = self.attributes(ACTIVE)
        if (mode, uid, gid) != (
            None if mode is None else shown.mode & PERMISSIONS,
            None if uid is None else shown.uid,
            None if gid is None else shown.gid,
        ):
            raise errors.NotPermitted("owner and mode come from the options uid, gid and umask")
        return False

    def lookup(self, parent: int, name: bytes) -> int:
        """The inode of a name in a directory.  Raises NotFound, InvalidName and OSError ENOENT."""
        _check_length(name)
        if parent == ROOT and name == b"active":
            return ACTIVE
        if parent == ROOT and name == b"snapshots":
            return SNAPSHOTS
        if parent == ROOT and name == b"bitmaps":
            return BITMAPS
        if parent == BITMAPS:
            return self.bitmaps.lookup(decode(name))
        if parent == SNAPSHOTS:
            return FIRST_SNAPSHOT + self._engine.find(decode(name)).id
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))

    def listing(self, directory: int) -> list[tuple[int, int, str]]:
        """What readdir(3) gives: positions, from 1 on, inodes and names, by position."""
        entries = self._entries(directory)
        dots = [(1, directory, "."), (2, ROOT, "..")]
        return dots + [(2 + inode, inode, name) for inode, name in entries]

    def _entries(self, directory: int) -> list[tuple[int, str]]:
        """Inodes and names in a directory, by inode."""
        if directory == SNAPSHOTS:
            return [
                (FIRST_SNAPSHOT + layer.id, layer.name or "") for layer in self._engine.snapshots
            ]
        if directory == BITMAPS:
            return self.bitmaps.entries()
        return [(ACTIVE, "active"), (SNAPSHOTS, "snapshots"), (BITMAPS, "bitmaps")]

    def layer(self, inode: int) -> Layer:
        """The layer of a snapshot's inode; raises OSError ESTALE."""
        layer = self._engine.find_id(inode - FIRST_SNAPSHOT)
        if layer is not None and layer.live:
            return layer
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def attributes(self, inode: int) -> Attributes:
        """What stat(2) tells of an inode; raises OSError ESTALE."""
        status = os.fstat(self._image_fd)
        uid, gid = self._ownership.of(status)
        mode = status.st_mode & PERMISSIONS
        times = status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns
        size = blocks = name_seconds = 0
        links = 1
        if inode in DIRECTORIES:
            # Who may read the image may look around; only its owner changes anything.
            mode = stat.S_IFDIR | 0o700 | (mode & 0o044) | (mode & 0o044) >> 2
            links = 4 if inode == ROOT else 2
        elif inode == ACTIVE:
            mode |= stat.S_IFREG
            size = self._engine.size
            # Never 0, as in Layer.stat_blocks: there may be data that is not here yet.
            blocks = max(status.st_blocks, int(size > 0))
            name_seconds = ACTIVE_SECONDS
        elif bitmapfs.is_bitmap(inode):
            self.bitmaps.find(inode)
            mode = self.bitmaps.mode(mode)  # the size is 0, as in /proc: nobody knows it yet
        else:
            layer = self.layer(inode)
            mode = stat.S_IFREG | (mode & 0o644)
            size = layer.geometry.size
            blocks = layer.stat_blocks()
            links = 0 if layer.name is None else 1
            times = layer.created_ns, layer.created_ns, layer.created_ns
        return Attributes(
            mode=mode & ~self._ownership.umask,
            links=links,
            uid=uid,
            gid=gid,
            size=size,
            block_size=self._engine.geometry.cluster_size,
            blocks=blocks,
            times_ns=times,
            name_seconds=name_seconds,
        )

    def xattrs(self, inode: int) -> dict[bytes, bytes]:
        """All extended attributes of an inode; raises OSError ESTALE."""
        if inode == ROOT:
            return {b"user.snapfs.state": os.fsencode(self._state_dir)}
        if inode < FIRST_SNAPSHOT or bitmapfs.is_bitmap(inode):
            return {}
        layer = self.layer(inode)
        state = layer.state if layer.reason is None else f"{layer.state}: {layer.reason}"
        return {
            b"user.snapfs.state": state.encode(),
            b"user.snapfs.temp_bytes": str(layer.temp_bytes).encode(),
        }


def _check_length(name: bytes) -> None:
    """The kernel asks for longer ones than a file system usually has."""
    if len(name) > MAX_NAME_BYTES:
        raise errors.NameTooLong(f"a name has at most {MAX_NAME_BYTES} bytes")


def decode(name: bytes) -> str:
    """A name of a snapshot or bitmap as the kernel gives it; raises InvalidName, NameTooLong."""
    _check_length(name)
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise errors.InvalidName("the name of a snapshot must be valid UTF-8") from None
