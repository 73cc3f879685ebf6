"""Where a copy goes: a raw file, a block device, or a qcow2 image behind qemu-nbd."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Protocol

from attrs import frozen

from ..errors import InUse, NotStored
from ..storage.linux import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from ..storage.locks import lock_exclusively, lock_image
from ..storage.naming import naming
from . import qemu
from .extents import Extents
from .keys import Key
from .layers import Layer
from .plan import Kind, Plan
from .records import remove, sync_file

QCOW2_CLUSTER = 64 << 10  # what qemu-img creates; a write to a part fills up the rest
LUKS_BYTES = 3 << 20  # what is before the data of an encrypted one
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


def qcow2_bytes(plan: Plan, below: Extents, cluster: int = QCOW2_CLUSTER) -> int:
    """What a qcow2 image and the checksums of it take at most, with the tables of qcow2."""
    data = 0
    tables: set[int] = set()
    table = cluster * cluster // 8  # bytes of the image
    for start, stop, kind in plan:
        if kind is Kind.DATA:
            data += stop - start
            tables.update(range(start // table, (stop - 1) // table + 1))
        elif kind is Kind.ZERO:
            for first, end in below.inside(start, stop):
                tables.update(range(first // table, (end - 1) // table + 1))
    fixed = 10 * QCOW2_CLUSTER + plan.end // table * 8
    # Reference counts take two bytes for a cluster, checksums less than a byte for 4 KiB.
    return data + len(tables) * cluster + data // cluster * 2 + (data >> 12) + fixed


def _is_full(path: str) -> bool:
    """Has its file system itself no space?  If only what is below has none, it lost pages."""
    room = os.statvfs(path)
    return room.f_bavail * room.f_frsize < 2 << 20


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
        with naming(self._path):
            count = os.pwrite(self._fd, data, offset)
            if count < len(data):
                view = memoryview(data)
                while view := view[count:]:
                    offset += count
                    count = os.pwrite(self._fd, view, offset)

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


@frozen
class Coding:
    """How the data of a qcow2 image is stored: in clusters of so many bytes, and in what form.

    What is compressed is written in whole clusters, each once: QEMU overwrites none.
    """

    cluster: int = QCOW2_CLUSTER
    compress: bool = False
    key: Key | None = None

    def size_of(self, size: int) -> int:
        """Of an image while it is written; QEMU compresses no part of a cluster."""
        unit = self.cluster if self.compress else SECTOR
        return -(-size // unit) * unit

    def floor(self, position: int) -> int:
        """Where the cluster of a position begins."""
        return position // self.cluster * self.cluster

    def create(self, path: str, size: int, backing: str | None, *, alone: bool) -> None:
        """A new image, to be written."""
        qemu.create(
            path,
            self.size_of(size),
            backing,
            alone=alone,
            cluster=self.cluster,
            compress=self.compress,
            key=self.key,
        )


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
        coding: Coding = Coding(),
    ) -> None:
        """`alone`: only whole clusters are written, so nothing below is read.

        `below`: what may be other than zeros of the images below.  Elsewhere zeros need not
        be written, whose tables take a byte for 8 KiB of them.
        """
        assert alone or not (coding.compress or coding.key)
        self._path = path
        self._size = size
        self._below = below
        self._coding = coding
        self._waiting: bytearray | None = None  # of the cluster that begins there
        self._waiting_at = -1
        self._server = qemu.Server(
            path, alone=alone, unordered=not resumable, compress=coding.compress, key=coding.key
        )

    def write(self, offset: int, data: Data) -> None:
        """See `Target`.  The last sector is filled up with zeros."""
        if self._coding.compress:
            self._write_clusters(offset, memoryview(data))
            return
        client = self._server.client
        if (offset + len(data)) % SECTOR and offset + len(data) == self._size:
            data = bytes(data) + bytes(-self._size % SECTOR)
        with naming(self._path):
            client.write(offset, data)

    def _write_clusters(self, offset: int, data: memoryview) -> None:
        """What is part of a cluster waits for the rest, which is zeros if it does not come."""
        cluster = self._coding.cluster
        while data:
            begin = offset // cluster * cluster
            whole = len(data) // cluster * cluster if offset == begin else 0
            if whole:
                self._write_waiting()
                with naming(self._path):
                    self._server.client.write(offset, data[:whole])
                data, offset = data[whole:], offset + whole
                continue
            if self._waiting_at != begin:
                self._write_waiting()
                self._waiting, self._waiting_at = bytearray(cluster), begin
            assert self._waiting is not None
            count = min(len(data), begin + cluster - offset)
            self._waiting[offset - begin : offset - begin + count] = data[:count]
            data, offset = data[count:], offset + count

    def _write_waiting(self) -> None:
        if self._waiting is not None:
            with naming(self._path):
                self._server.client.write(self._waiting_at, self._waiting)
            self._waiting, self._waiting_at = None, -1

    def zero(self, offset: int, length: int) -> None:
        """See `Target`."""
        cluster = self._coding.cluster
        end = offset + length
        if end == self._size:
            end += -self._size % SECTOR
        for first, stop in self._below.inside(offset, end):
            first = max(offset, first // cluster * cluster)  # noqa: PLW2901
            stop = min(end, -(-stop // cluster) * cluster)  # noqa: PLW2901
            if self._coding.compress:
                whole = -(-first // cluster) * cluster, stop // cluster * cluster
                if whole[0] < whole[1]:
                    self._write_zeros(first, whole[0])
                    self._zero(*whole)
                    first = whole[1]  # noqa: PLW2901
                self._write_zeros(first, stop)
            else:
                self._zero(first, stop)

    def _write_zeros(self, start: int, stop: int) -> None:
        if start < stop:
            self._write_clusters(start, memoryview(bytes(stop - start)))

    def _zero(self, start: int, stop: int) -> None:
        with naming(self._path):
            self._server.client.zero(start, stop - start)

    def forget_from(self, position: int) -> None:
        """Have nothing there from a position on, which is a multiple of the cluster."""
        with Layer([self._path], self._coding.key) as layer:
            spans = [span for span, _ in layer.spans()]
        for start, stop in spans:
            if stop > position:
                self._zero(max(start, position), stop)

    def flush(self) -> None:
        """See `Target`.  Raises NotStored if what was written, and flushed before, may be gone."""
        self._write_waiting()
        with naming(self._path):
            self._server.client.settle()
        try:
            self._server.client.flush()
            sync_file(self._path)
        except ConnectionError:
            raise  # which keeps nothing from the disk
        except OSError as error:
            if error.errno == errno.EDQUOT or (
                error.errno == errno.ENOSPC and _is_full(self._path)
            ):
                error.filename = self._path
                raise  # some table could not be written: the ones that are there stay
            reason = error.strerror or error
            raise NotStored(f"{self._path}: {reason}; what was written may be gone") from error

    def finish(self) -> None:
        """See `Target`."""
        try:
            self.flush()
        except BaseException:
            self._server.abandon()
            raise
        self._server.finish()
        if self._coding.compress:
            qemu.resize([self._path], self._size)
        sync_file(self._path)

    def abandon(self) -> None:
        """See `Target`."""
        self._server.abandon()
