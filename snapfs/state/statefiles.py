"""Files of the state directory: opened without following links, mapped, replaced.

Every path is relative to the descriptor of a directory that was checked when
it was opened; nothing outside of it is ever written.  All functions block.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from pathlib import Path

from ..engine.bitmap import buffer_size
from ..errors import StateError
from ..storage.linux import exchange
from ..storage.locks import is_locked
from ..storage.mapping import Mapping, map_file, set_nocow
from ..storage.naming import naming
from ..storage.smallfiles import write_synced

# Bytes of the file "lock", locked while mounted: the first by the daemon and its witness,
# who outlives it for an instant, the second by the daemon only.
MOUNTED_BYTE, DAEMON_BYTE = 0, 1
WITNESS_SECONDS = 30  # for a witness to note what it must, storage that is slow included

RESERVE_BYTES = 256 << 10  # for when the file system is full
MANIFEST_RESERVE_BYTES = 64 << 10  # the part of it for the manifest


def open_directory(path: str | os.PathLike[str], *, parent: int | None = None) -> int:
    """Open a directory of ours; StateError if it is a link, foreign or open to others."""
    try:
        fd = os.open(
            path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent
        )
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise StateError(f"{os.fspath(path)} is not a directory") from None
        raise
    try:
        _check_owner(fd, os.fspath(path))
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_file(parent: int, name: str, flags: int = os.O_RDWR) -> int:
    """Open a regular file of ours; StateError if it is anything else."""
    try:
        with naming(name, parent):
            fd = os.open(
                name, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600, dir_fd=parent
            )
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise StateError(f"{name} in the state directory is a symbolic link") from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise StateError(f"{name} in the state directory is not a regular file")
        if os.fstat(fd).st_nlink > 1:  # cp -al: what is written here would change the copy
            raise StateError(
                f"{name} in the state directory has another name as well (a hard link); "
                "replace it by a copy of its own"
            )
        _check_owner(fd, name)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_owner(fd: int, name: str) -> None:
    status = os.fstat(fd)
    if status.st_uid not in (os.geteuid(), 0):
        raise StateError(f"{name} belongs to user {status.st_uid}; chown it or use -o state=")
    if status.st_mode & 0o022:
        raise StateError(f"{name} can be written by others; chmod go-w it")


def wait_for_witness(path: str | os.PathLike[str]) -> None:
    """Return when no daemon and no witness has the directory, or a daemon has; or after a while.

    In the instant after a daemon's death its witness has the locks (witness.py).
    """
    try:
        fd = os.open(
            os.path.join(path, "lock"),
            os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
        )
    except OSError:
        return  # whoever needs it finds out
    try:
        end = time.monotonic() + WITNESS_SECONDS
        while (
            is_locked(fd, MOUNTED_BYTE)
            and not is_locked(fd, DAEMON_BYTE)
            and time.monotonic() < end
        ):
            time.sleep(0.005)
    finally:
        os.close(fd)


def make_file(parent: int, name: str, size: int) -> int:
    """A new sparse file of `size` bytes, open for reading and writing; none if that fails."""
    fd = open_file(parent, name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        set_nocow(fd)
        with naming(name, parent):
            os.ftruncate(fd, size)
    except BaseException:
        os.close(fd)
        remove(parent, name)
        raise
    return fd


def map_bitmap(parent: int, name: str, bits: int, *, create: bool) -> Mapping:
    """The file of a bitmap.  Raises StateError if the file has another size.

    Bits beyond the end must be clear; a file of an empty bitmap has one byte.
    """
    size = max(1, buffer_size(bits))
    flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0)
    fd = open_file(parent, name, flags)
    try:
        if not create and os.fstat(fd).st_size != size:
            raise StateError(
                f"{name} has {os.fstat(fd).st_size} bytes; for {bits} clusters it must have {size}"
            )
        with naming(name, parent):
            mapping = map_file(fd, size)
    finally:
        os.close(fd)
    if bits % 8 and mapping[size - 1] >> bits % 8:
        raise StateError(f"{name} has bits set beyond the end of the snapshot")
    return mapping


def map_record(parent: int, name: str, size: int, *, create: bool) -> Mapping:
    """A file of `size` bytes, mapped.  Raises StateError if the file has another size."""
    fd = open_file(parent, name, os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0))
    try:
        if not create and os.fstat(fd).st_size != size:
            raise StateError(f"{name} has {os.fstat(fd).st_size} bytes and must have {size}")
        with naming(name, parent):
            return map_file(fd, size)
    finally:
        os.close(fd)


def replace_file(parent: int, name: str, data: bytes) -> None:
    """Replace a file by another content, atomically and durably.

    On a full file system the content goes into the reserve file, whose space is
    there, and the two change places: so there is room the next time, too.  To
    remove the reserve and write anew is not enough: XFS frees what was removed
    some time later, and a new file takes an inode.
    """
    with naming(name, parent):
        _replace_file(parent, name, data)


def _replace_file(parent: int, name: str, data: bytes) -> None:
    try:
        _write_beside(parent, name, data)
        os.rename(f"{name}.new", name, src_dir_fd=parent, dst_dir_fd=parent)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        remove(parent, f"{name}.new")
        _write_reserve(parent, data)
        try:
            exchange(parent, "reserve", name)
        except OSError as other:  # there is none yet, or the file system cannot
            if other.errno not in (errno.ENOENT, errno.EINVAL, errno.ENOSYS):
                raise
            os.rename("reserve", name, src_dir_fd=parent, dst_dir_fd=parent)
    os.fsync(parent)


def _write_beside(parent: int, name: str, data: bytes) -> None:
    remove(parent, f"{name}.new")
    fd = open_file(parent, f"{name}.new", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        set_nocow(fd)  # it may become the reserve
        write_synced(fd, data)
    finally:
        os.close(fd)


def _write_reserve(parent: int, data: bytes) -> None:
    try:
        fd = open_file(parent, "reserve", os.O_WRONLY)
    except FileNotFoundError:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
    try:
        write_synced(fd, data)
        os.ftruncate(fd, len(data))
        os.fsync(fd)
    finally:
        os.close(fd)


def keep_reserve(parent: int, size: int = RESERVE_BYTES) -> None:
    """Have the reserve file, of that size if there is room for it, and not larger."""
    try:
        fd = open_file(parent, "reserve", os.O_RDWR | os.O_CREAT)
    except OSError:
        return
    try:
        found = os.fstat(fd).st_size
        if found == 0:
            set_nocow(fd)
        if found > size:
            os.ftruncate(fd, size)
        os.posix_fallocate(fd, 0, size)
    except OSError:
        pass  # what there is of it may be enough
    finally:
        os.close(fd)


def remove(parent: int, name: str) -> None:
    """Remove a file, if it is there."""
    try:
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        pass


def sync_file(parent: int, name: str) -> None:
    """Make a file durable, mapped pages included."""
    fd = open_file(parent, name)
    try:
        with naming(name, parent):
            os.fsync(fd)
    finally:
        os.close(fd)


def sync_data(parent: int, name: str) -> None:
    """The same of a file whose size does not change (fdatasync)."""
    fd = open_file(parent, name)
    try:
        with naming(name, parent):
            os.fdatasync(fd)
    finally:
        os.close(fd)


def sync_entry(path: Path) -> None:
    """Make it durable that a directory is there: its name in the one above."""
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_tree(path: str | os.PathLike[str], *, parent: int | None = None) -> None:
    """Remove a directory of ours with its files, or a file; nothing if it is not there.

    Never follows a link out of it (shutil.rmtree works with descriptors), and
    opens directories only: a FIFO would block.
    """
    try:
        if stat.S_ISDIR(os.stat(path, dir_fd=parent, follow_symlinks=False).st_mode):
            shutil.rmtree(path, dir_fd=parent)
        else:
            os.unlink(path, dir_fd=parent)
    except FileNotFoundError:
        pass
