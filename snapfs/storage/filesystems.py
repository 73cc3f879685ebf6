"""Which file system holds a file: is it of a kind that we know, and still mounted as it was?

What was only *held* by a file system, in its part of the page cache, is gone when it
went away and came back, with a reboot or without one: a cable, FS_IOC_SHUTDOWN,
umount and mount.  Neither st_dev nor f_fsid tells, they are the device's.  What does:

    ext4, xfs, btrfs   the directory in /sys/fs that the kernel makes when a file system
                       is mounted first, and removes when it is gone for good.  Its
                       inode number is never given again in this boot.  Bind mounts,
                       other mount namespaces and remounts see the same one.  Of ext4
                       how many errors it has had, too: then it may lose what it was given
                       without a word (systemerrors.py).  Of btrfs
                       the subvolume, too, which has an st_dev of its own meanwhile: a
                       snapshot of one is a copy in which files are of several moments
    network, FUSE      the same of its backing device, in /sys/class/bdi
    tmpfs              nothing: what was in it cannot come back at all
    others, no /sys    the unique number of the mount that the file was opened through
                       (STATX_MNT_ID_UNIQUE, Linux 6.8).  Another mount of the same file
                       system looks like another one

All functions block.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import os
import struct
from pathlib import Path

from ..errors import UsageError

EXT4, XFS, BTRFS = 0xEF53, 0x58465342, 0x9123683E  # linux/magic.h; EXT4: ext2 and ext3, too
TMPFS, RAMFS, OVERLAY = 0x01021994, 0x858458F6, 0x794C7630
# Where a write sets the times of the file at once, and nothing sets them later.
KNOWN = frozenset({EXT4, XFS, BTRFS, TMPFS, RAMFS, OVERLAY})
NAMES = {
    0x6969: "NFS", 0xFF534D42: "CIFS", 0xFE534D42: "SMB", 0x517B: "SMB", 0x01021997: "9p",
    0x65735546: "FUSE", 0x00C36400: "Ceph", 0x01161970: "GFS2", 0x7461636F: "OCFS2",
    0x5346414F: "AFS", 0x4D44: "FAT", 0x2011BAB0: "exFAT", 0x7366746E: "NTFS",
    0x2FC12FC1: "ZFS", 0xCA451A4E: "bcachefs", 0xF2F52010: "F2FS", 0x3153464A: "JFS",
}  # fmt: skip

BTRFS_IOC_FS_INFO = 0x8400941F  # linux/btrfs.h
_FSID_OFFSET = 16  # of fsid in struct btrfs_ioctl_fs_info_args
AT_EMPTY_PATH = 0x1000  # linux/fcntl.h
STATX_MNT_ID_UNIQUE = 0x4000  # linux/stat.h
_STATX_MNT_ID = struct.Struct("<I140xQ")  # stx_mask; stx_mnt_id at 0x90

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_char_p)
_libc.syncfs.argtypes = (ctypes.c_int,)


def kind_of(fd: int) -> int:
    """f_type of the file system (statfs(2))."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.fstatfs(fd, buffer):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return array.array("l", buffer.raw[: struct.calcsize("l")])[0] & 0xFFFFFFFF


def check_kind(fd: int, what: str) -> None:
    """Raise UsageError, which names the remedy, if the file system is not of a kind in `KNOWN`."""
    kind = kind_of(fd)
    if kind not in KNOWN:
        name = NAMES.get(kind, "a kind that snapfs does not know")
        raise UsageError(
            f"{what} is on a file system of another kind ({name}, {kind:#x}) than ext4, XFS, "
            "btrfs, tmpfs or overlay; there nothing tells after a crash whether somebody else "
            "wrote the image. Put it on one of those, or mount with -o any_fs: then no snapshot "
            "survives the death of the daemon"
        )


def identity_of(fd: int) -> str:
    """Names what is mounted now and holds the file, until it is mounted anew; "": unknown.

    Equal ones of one boot: it has not gone away in between.
    """
    kind = kind_of(fd)
    if kind in (TMPFS, RAMFS):
        return f"tmpfs {os.fstat(fd).st_dev}"
    directory = directory_of(fd)
    if directory is not None:
        try:
            name = f"{directory} {os.stat(directory).st_ino}"
            if kind == BTRFS:
                name += f" {os.fstat(fd).st_dev}"
            if kind == EXT4:
                with open(f"{directory}/errors_count") as file:
                    name += f" {file.read().strip()}"
            return name
        except OSError:
            pass  # /sys is not mounted, or hidden
    number = _mount_of(fd)
    return "" if number is None else f"mount {number}"


def directory_of(fd: int) -> str | None:
    """What the kernel has in /sys for this mounted file system only."""
    kind = kind_of(fd)
    device = os.fstat(fd).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    if kind == BTRFS:
        fsid = _btrfs_id(fd)
        return fsid and f"/sys/fs/btrfs/{fsid}"
    if kind in (EXT4, XFS):
        block = os.path.basename(os.path.realpath(f"/sys/dev/block/{number}"))
        return f"/sys/fs/{'ext4' if kind == EXT4 else 'xfs'}/{block}"
    if os.major(device) == 0:  # else it is that of a disk, which stays
        return os.path.realpath(f"/sys/class/bdi/{number}")
    return None


def _btrfs_id(fd: int) -> str | None:
    buffer = bytearray(1024)
    try:
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)  # it may be O_PATH
        try:
            fcntl.ioctl(again, BTRFS_IOC_FS_INFO, buffer)
        finally:
            os.close(again)
    except OSError:
        return None
    text = buffer[_FSID_OFFSET : _FSID_OFFSET + 16].hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def _mount_of(fd: int) -> int | None:
    buffer = ctypes.create_string_buffer(256)
    if _libc.statx(fd, b"", AT_EMPTY_PATH, STATX_MNT_ID_UNIQUE, buffer):
        return None
    mask, number = _STATX_MNT_ID.unpack_from(buffer)
    return number if mask & STATX_MNT_ID_UNIQUE else None


def ask_for_errors(fd: int) -> OSError | None:
    """Write back all that the file system holds; an error that it has not told anybody yet.

    syncfs(2) (Linux 5.8) remembers a failed write-back even when the file that it was of
    has left the cache, and tells it to the first who asks: so whoever asks must note the
    answer before anything else.  It may have been another file's.
    """
    if _libc.syncfs(fd):
        number = ctypes.get_errno()
        if number != errno.ENOSYS:
            return OSError(number, os.strerror(number))
    return None


def overcommitted(path: str, fd: int) -> str | None:
    """A warning if a sparse image cannot grow to its size on its file system, as it is now."""
    status, found = os.fstat(fd), os.fstatvfs(fd)
    missing = status.st_size - status.st_blocks * 512
    free = found.f_bavail * found.f_frsize
    if missing <= free:
        return None
    return (
        f"{missing} bytes of {path} are unallocated and only {free} are free on its file system: "
        "writes may fail for want of space"
    )


def check_directory_kind(directory: Path) -> None:
    """Raise UsageError if a state directory, there or yet to be made, is on another kind."""
    try:
        fd = os.open(directory, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        try:
            fd = os.open(directory.parent, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return  # it cannot be made
    try:
        check_kind(fd, f"the state directory {directory}")
    finally:
        os.close(fd)
