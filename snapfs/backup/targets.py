"""Where a copy goes: a raw file, a block device, or a qcow2 image behind qemu-nbd."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Protocol

from ..errors import InUse
from ..storage.linux import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from ..storage.locks import lock_exclusively, lock_image
from ..storage.naming import naming
from . import qemu
from .extents import Extents
from .plan import Kind, Plan
from .records import remove, sync_file

QCOW2_CLUSTER = 64 << 10  # what qemu-img creates; a write to a part fills up the rest
TABLE_BYTES = 512 << 20  # of the image, for which one table of a cluster says where they are
SECTOR = 512  # the unit of the sizes of qcow2 images

Data = bytes | bytearray | memoryview


class Target(Protocol):
    """What the copying needs.  Offsets and lengths are bytes; data ends at the size at most."""

    def write(self, offset: int, data: Data) -> None:
        """Write all of `data`; if that fails a later call may be the one that raises."""

    def zero(self, offset: int, length: int) -> None:
        """Have a range read as zeros, without space if possible."""

    def flush(self) -> None:
        """Return when everything written is durable."""

    def finish(self) -> None:
        """Make everything durable and close; raises OSError or BackupError if that fails."""

    def abandon(self) -> None:
        """Close, after an error, one of `finish` as well."""


def qcow2_bytes(plan: Plan, below: Extents) -> int:
    """What a qcow2 image and the checksums of it take at most, with the tables of qcow2."""
    data = 0
    tables: set[int] = set()
    for start, stop, kind in plan:
        if kind is Kind.DATA:
            data += stop - start
            tables.update(range(start // TABLE_BYTES, (stop - 1) // TABLE_BYTES + 1))
        elif kind is Kind.ZERO:
            for first, end in below.inside(start, stop):
                tables.update(range(first // TABLE_BYTES, (end - 1) // TABLE_BYTES + 1))
    fixed = 10 * QCOW2_CLUSTER + plan.end // TABLE_BYTES * 8
    # Reference counts take two bytes for a cluster, checksums less than a byte for 4 KiB.
    return data + len(tables) * QCOW2_CLUSTER + (data >> 12) + fixed


def _open_or_create(path: str) -> tuple[int, bool]:
    """A descriptor to write a file, and whether it is new."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600), True
    except FileExistsError:
        return os.open(path, flags), False


def lock(fd: int, path: str) -> None:
    """Lock an image that is going to be written; raises InUse if another program has it."""
    try:
        free = lock_exclusively(fd) and lock_image(fd, writable=True)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL):
            raise
        free = True  # no such locks there
    if not free:
        raise InUse(f"{path} is in use by another program, a virtual machine perhaps; end it")


class RawTarget:
    """A raw image: a regular file, made exactly `size` bytes long, or a block device."""

    def __init__(self, path: str, size: int, ours: Callable[[], None] | None = None) -> None:
        """Open, create if need be, and lock; raises InUse if another program has it.

        `ours` is called when it is locked and as it was; if that fails it stays so.
        """
        self._path = path
        self._fd, new = _open_or_create(path)
        try:
            status = os.fstat(self._fd)
            self._device = stat.S_ISBLK(status.st_mode)
            lock(self._fd, path)
            if ours is not None:
                ours()
            if not self._device:
                with naming(path):
                    os.ftruncate(self._fd, size)
        except BaseException:
            os.close(self._fd)
            if new:
                remove(path)
            raise

    def write(self, offset: int, data: Data) -> None:
        """See `Target`."""
        view = memoryview(data)
        with naming(self._path):
            while view:
                count = os.pwrite(self._fd, view, offset)
                view, offset = view[count:], offset + count

    def zero(self, offset: int, length: int) -> None:
        """See `Target`."""
        try:
            fallocate(self._fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)
        except OSError as error:
            # EINVAL: a block device, and a range that is not made of its blocks.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV):
                raise
            zeros = memoryview(bytes(min(length, 1 << 20)))
            end = offset + length
            while offset < end:
                self.write(offset, zeros[: min(len(zeros), end - offset)])
                offset += min(len(zeros), end - offset)

    def truncate(self, size: int) -> None:
        """Cut or grow a regular file; a device stays as it is."""
        if not self._device:
            with naming(self._path):
                os.ftruncate(self._fd, size)

    def flush(self) -> None:
        """See `Target`."""
        with naming(self._path):
            os.fsync(self._fd)

    def finish(self) -> None:
        """See `Target`."""
        self.flush()
        self.abandon()

    def abandon(self) -> None:
        """See `Target`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Qcow2Target:
    """A qcow2 image that exists; `size`, rounded up to sectors, is its virtual size.

    `resumable`: it must be an image whenever the machine goes down.  One that is
    begun again then does without the syncs that this takes, three for each 512 MiB
    of the image that something is written to.
    """

    def __init__(
        self,
        path: str,
        size: int,
        *,
        resumable: bool,
        alone: bool = False,
        below: Extents,
    ) -> None:
        """`alone`: only whole clusters of QCOW2_CLUSTER are written, so nothing below is read.

        `below`: what may be other than zeros of the images below.  Elsewhere zeros need not
        be written, whose tables take a byte for 8 KiB of them.
        """
        self._path = path
        self._size = size
        self._below = below
        self._server = qemu.Server(path, alone=alone, unordered=not resumable)

    def write(self, offset: int, data: Data) -> None:
        """See `Target`.  The last sector is filled up with zeros."""
        client = self._server.client
        if (offset + len(data)) % SECTOR and offset + len(data) == self._size:
            data = bytes(data) + bytes(-self._size % SECTOR)
        with naming(self._path):
            client.write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        """See `Target`."""
        end = offset + length
        if end == self._size:
            end += -self._size % SECTOR
        with naming(self._path):
            for first, stop in self._below.inside(offset, end):
                first = max(offset, first // QCOW2_CLUSTER * QCOW2_CLUSTER)  # noqa: PLW2901
                stop = min(end, -(-stop // QCOW2_CLUSTER) * QCOW2_CLUSTER)  # noqa: PLW2901
                self._server.client.zero(first, stop - first)

    def flush(self) -> None:
        """See `Target`."""
        with naming(self._path):
            self._server.client.flush()
            sync_file(self._path)

    def finish(self) -> None:
        """See `Target`."""
        try:
            self.flush()
        except BaseException:
            self._server.abandon()
            raise
        self._server.finish()
        sync_file(self._path)

    def abandon(self) -> None:
        """See `Target`."""
        self._server.abandon()
