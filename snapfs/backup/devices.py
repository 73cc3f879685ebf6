"""Block devices as targets: what lies on an unfinished one is no disk, and says why.

A file has DEST.partial beside it until it is whole.  Beside a device is /dev,
which is gone after a reboot, and whoever boots from the device or mounts it does
not look there.  So the mark is on the device itself, in place of its head, the
first HEAD_BYTES: no partition table, no file system and no boot loader is found
there, on whatever machine and by whatever name.  `head -c 400 DEVICE` reads it.
The real head is written last, and of it the first sector, when all else is
durable: a sector is written as a whole or not at all.

What of the head does not come with the copy (an increment in which the first
cluster did not change) is put into a file in `state_directory()` before the mark
is set, and comes from there in the end.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import zlib
from collections.abc import Callable

from ..errors import BackupError, InUse, PartialCopy
from . import records
from .sums import digest_of
from .targets import SECTOR, Data, RawTarget

HEAD_BYTES = 1 << 20  # partition tables, boot loaders and superblocks: btrfs's is at 64 KiB
MARK_BYTES = 16 << 10  # holds the journal, whose longest part is the path of an image

_TITLE = b"SNAPFS UNFINISHED COPY "
_ADVICE = b"""
This is no disk yet.  Finish it with the same command, or begin again with a full one.
"""
_MARK = re.compile(re.escape(_TITLE) + rb"([0-9a-f]{16})" + re.escape(_ADVICE) + rb"([^\0]*)\0")


def is_device(path: str) -> bool:
    """Is it a block device?"""
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def size_of(path: str) -> int:
    """Bytes of a device; raises InUse if it is mounted or held by a driver."""
    try:  # what O_EXCL means for a device is in open(2)
        fd = os.open(path, os.O_WRONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise InUse(
            f"{path} is mounted, or another driver uses it; unmount it first (lsblk shows where)"
        ) from None
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


def read_mark(path: str) -> tuple[str, bytes] | None:
    """The token and the journal of an unfinished device, None if it is not marked.

    The journal is what was given to `DeviceTarget.mark`, unless a power cut tore it.
    """
    with open(path, "rb", buffering=0) as file:
        found = _MARK.match(file.read(MARK_BYTES) + b"\0")
    return None if found is None else (found[1].decode(), found[2])


def state_directory() -> str:
    """Where heads are kept: it outlives a reboot."""
    own = "/var/lib" if os.geteuid() == 0 else os.path.expanduser("~/.local/state")
    return os.path.join(os.environ.get("XDG_STATE_HOME") or own, "snapfs")


def _head_file(token: str) -> str:
    return os.path.join(state_directory(), f"{token}.head")


def _new_token(path: str, journal: bytes) -> str:
    """The same for the same command: it finds, and removes, what a killed one left."""
    return digest_of(os.fsencode(os.path.realpath(path)) + b"\0" + journal)[:16]


class DeviceTarget(RawTarget):
    """A block device of at least `size` bytes, marked until `finish`."""

    def __init__(
        self,
        path: str,
        size: int,
        journal: bytes,
        *,
        whole_head: bool,
        ours: Callable[[], None] | None = None,
    ) -> None:
        """Open, lock and mark it; raises InUse, BackupError, PartialCopy.

        `whole_head`: everything below min(HEAD_BYTES, size) is going to be written.  `ours` as
        in RawTarget.
        """
        super().__init__(path, size, ours)
        self._head_saved = True
        try:
            device_size = os.lseek(self._fd, 0, os.SEEK_END)
            if device_size < max(size, MARK_BYTES):
                raise BackupError(
                    f"{path} has {device_size} bytes, which is too small; choose a larger device"
                )
            self._length = min(HEAD_BYTES, device_size)
            before = read_mark(path)
            self._token = before[0] if before else _new_token(path, journal)
            self._head = bytearray(self._length)
            if not whole_head or size < self._length:
                self._keep(marked=before is not None, needed=not whole_head)
            self.mark(journal)
            self._write_through(MARK_BYTES, bytes(self._length - MARK_BYTES))
            os.fsync(self._fd)
        except BaseException:
            os.close(self._fd)
            raise

    def _keep(self, *, marked: bool, needed: bool) -> None:
        """Have the head that is there in a file, durably, before it is overwritten."""
        where = _head_file(self._token)
        if marked:
            try:
                with open(where, "rb") as file:
                    head = zlib.decompress(file.read())
            except (FileNotFoundError, zlib.error):
                head = b""
            if len(head) == self._length:
                self._head[:] = head
            elif needed:
                raise PartialCopy(
                    f"{self._path} is an unfinished copy, and its first MiB, which was kept in "
                    f"{where}, is not there any more; copy a full snapshot"
                )
            return
        self._head[:] = os.pread(self._fd, self._length, 0)
        self._save(where)

    def _save(self, where: str) -> None:
        os.makedirs(os.path.dirname(where), mode=0o700, exist_ok=True)
        records.replace_durably(where, zlib.compress(self._head))

    def save_head(self) -> None:
        """Have what was written to the head outlive us, durably: not all of it may come again."""
        if not self._head_saved:
            self._save(_head_file(self._token))
            self._head_saved = True

    def mark(self, journal: bytes) -> None:
        """Replace the journal in the mark, durably."""
        mark = _TITLE + self._token.encode() + _ADVICE + journal
        if len(mark) > MARK_BYTES:
            raise BackupError(f"the journal of {self._path} is too long")
        self._write_through(0, mark.ljust(MARK_BYTES, b"\0"))
        os.fsync(self._fd)

    def _write_through(self, offset: int, data: Data) -> None:
        super().write(offset, data)

    def write(self, offset: int, data: Data) -> None:
        """See `Target`.  What belongs to the head waits in memory."""
        inside = max(0, min(len(data), self._length - offset))
        self._head[offset : offset + inside] = data[:inside]
        self._head_saved = self._head_saved and not inside
        if inside < len(data):
            self._write_through(offset + inside, memoryview(data)[inside:])

    def zero(self, offset: int, length: int) -> None:
        """See `Target`."""
        inside = max(0, min(length, self._length - offset))
        self._head[offset : offset + inside] = bytes(inside)
        self._head_saved = self._head_saved and not inside
        if inside < length:
            super().zero(offset + inside, length - inside)

    def finish(self) -> None:
        """See `Target`.  The mark goes, and with it the last thing that was missing comes."""
        os.fsync(self._fd)
        self._write_through(SECTOR, memoryview(self._head)[SECTOR:])
        os.fsync(self._fd)
        self._write_through(0, memoryview(self._head)[:SECTOR])
        super().finish()
        records.remove(_head_file(self._token))
