"""Which mounts there are, from /proc/self/mountinfo (proc(5))."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from ..errors import NotMounted

BLOCKS = "/sys/dev/block"
PROC = "/proc"
FS_TYPE = "fuse.snapfs"

AT_FDCWD = -100  # linux/fcntl.h
AT_SYMLINK_NOFOLLOW = 0x100
AT_NO_AUTOMOUNT = 0x800
AT_EMPTY_PATH = 0x1000
AT_STATX_DONT_SYNC = 0x4000
STATX_ATTR_MOUNT_ROOT = 0x2000  # linux/stat.h
STATX_BYTES = 256
_SHOWN = 5  # mounts in a message


class Mount(NamedTuple):
    """One mount as this process sees it.

    `device`: "major:minor" of the file system, the same for all its mounts.  `root`: the part
    of it that is mounted.  `user`, `group`: who mounted it, if it is a FUSE file system.
    `number`: one that no other mount is ever given, if known (`identified`).
    """

    id: int
    parent: int
    device: str
    root: str
    mountpoint: str
    fs_type: str
    source: str
    user: int | None = None
    group: int = 0
    number: int | None = None


def _unescape(field: bytes) -> str:
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field))


def mounts(process: int | str = "self") -> list[Mount]:
    """All mounts that a process sees, the newest last.  Raises OSError."""
    found = []
    with open(os.path.join(PROC, str(process), "mountinfo"), "rb") as file:
        lines = file.read().split(b"\n")
    for line in lines:
        if not line:
            continue
        left, _, right = line.partition(b" - ")
        fields, (fs_type, source, options) = left.split(b" "), right.split(b" ", 2)
        who = re.search(rb"(?:^|,)user_id=([0-9]+),group_id=([0-9]+)(?:,|$)", options)
        found.append(
            Mount(
                int(fields[0]),
                int(fields[1]),
                fields[2].decode(),
                _unescape(fields[3]),
                _unescape(fields[4]),
                fs_type.decode(),
                _unescape(source),
                int(who[1]) if who else None,
                int(who[2]) if who else 0,
            )
        )
    return found


class Place(NamedTuple):
    """What statx(2) says of a file without asking its file system.

    `device`: "major:minor".  `is_root`: of the mount with that id.
    """

    mount_id: int
    device: str
    is_root: bool


def look(path: str | int, *, follow: bool = True) -> Place:
    """Which mount a file lies in.  Raises OSError.

    A path, or a descriptor.  Neither a dead mount, nor one whose daemon does not answer, nor one
    of another user matters at the last component, and no automount is triggered by it.
    """
    import ctypes  # noqa: PLC0415 - for most commands not needed to start

    call = ctypes.CDLL(None, use_errno=True).statx
    call.argtypes = (
        ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p
    )  # fmt: skip
    flags = AT_NO_AUTOMOUNT | AT_STATX_DONT_SYNC | (0 if follow else AT_SYMLINK_NOFOLLOW)
    found = ctypes.create_string_buffer(STATX_BYTES)
    if isinstance(path, int):
        failed = call(path, b"", flags | AT_EMPTY_PATH, 0, found)
    else:
        failed = call(AT_FDCWD, os.fsencode(path), flags, 0, found)
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    (attributes,) = struct.unpack_from("Q", found, 8)
    major, minor, mount_id = struct.unpack_from("IIQ", found, 136)
    return Place(mount_id, f"{major}:{minor}", bool(attributes & STATX_ATTR_MOUNT_ROOT))


def find(path: str) -> Mount | None:
    """The mount whose mountpoint is `path`, the topmost one; asks nobody that serves it."""
    try:
        place = look(path)
    except PermissionError:  # we cannot go there, but may know
        where = os.path.abspath(path)
        return next((each for each in reversed(mounts()) if each.mountpoint == where), None)
    except OSError:
        return None
    if not place.is_root:
        return None
    return next((each for each in mounts() if each.id == place.mount_id), None)


def identified(mount: Mount) -> Mount | None:
    """A mount that was looked up just now, for `still` to know later; None: it is gone again."""
    from .mountnumbers import number_of  # noqa: PLC0415 - for most commands not needed to start

    found = mount._replace(number=number_of(mount.id))
    return found if mount in mounts() else None


def still(mount: Mount) -> Mount | None:
    """A mount as it is now: elsewhere, if a directory above it was renamed; None if it is gone."""
    if mount.number is not None:
        from .mountnumbers import id_of  # noqa: PLC0415 - see `identified`

        if id_of(mount.number) != mount.id:
            return None  # another one may have its id, and its device number
    for each in mounts():
        if (each.id, each.device) == (mount.id, mount.device):
            return each._replace(number=mount.number)
    return None


def cover(mount: Mount) -> Mount | None:
    """What is mounted right over a mount, and hides it."""
    for each in mounts():
        if (each.parent, each.mountpoint) == (mount.id, mount.mountpoint):
            return each
    return None


def find_snapfs(path: str) -> Mount:
    """The snapfs mount at `path`; raises NotMounted."""
    mount = find(path)
    if mount is not None and mount.fs_type == FS_TYPE:
        return mount
    if mount is not None:
        for each in mounts():
            if (each.fs_type, each.mountpoint) == (FS_TYPE, mount.mountpoint):
                raise NotMounted(
                    f"{mount.source} is mounted over the snapfs on {path}; unmount that first"
                )
    where = [each.mountpoint for each in mounts() if each.fs_type == FS_TYPE]
    known = (
        f"there is one on {', '.join(where[:_SHOWN])}"
        if where
        else f"mount one: snapfs mount IMAGE {path}"
    )
    raise NotMounted(f"no snapfs is mounted on {path}; {known}")


def around(path: str) -> Mount:
    """The snapfs mount at `path`, or the one that it lies in; raises NotMounted."""
    try:
        return find_snapfs(path)
    except NotMounted:
        with suppress(NotMounted):
            return split(path)[0]
        raise


def split(path: str) -> tuple[Mount, str]:
    """The snapfs mount that a file lies in, and the file's path in it; raises NotMounted."""
    real = os.path.realpath(path)
    inside = ""
    while True:
        mount = find(real)
        if mount is not None:
            if mount.fs_type != FS_TYPE:
                break
            return mount, inside
        real, name = os.path.split(real)
        if not name:
            break
        inside = os.path.join(name, inside) if inside else name
    raise NotMounted(f"{path} is not a file of a snapfs mount, such as MOUNTPOINT/snapshots/NAME")


def lives_on(path: str) -> list[str]:
    """The files behind the loop devices that the file system of `path` is on, if any.  Blocks.

    Followed through partitions, through what is built on several devices (LVM, RAID), and
    through file systems on loop devices again.
    """
    found: list[str] = []
    waiting = [path]
    while waiting and len(found) < 16:
        try:
            device = _device_below(waiting.pop())
            number = f"{os.major(device)}:{os.minor(device)}"
            backing = list(_backing_files(os.path.realpath(os.path.join(BLOCKS, number))))
        except OSError:
            continue  # a file that is gone, or a dead mount: what was found counts
        found += backing
        waiting += backing
    return found


def _device_below(path: str) -> int:
    """The block device that the file system of a file is on, one of them, as st_rdev.

    btrfs has devices of its own, with major number 0: what it was mounted from tells.
    """
    device = os.stat(path).st_dev
    if os.major(device):
        return device
    real = os.path.realpath(path)
    for mount in sorted(reversed(mounts()), key=lambda each: -len(each.mountpoint)):
        if os.path.commonpath((mount.mountpoint, real)) == mount.mountpoint:
            return os.stat(mount.source).st_rdev if os.path.isabs(mount.source) else device
    return device


def _backing_files(block: str) -> Iterator[str]:
    """The files of loop devices that a block device is, is a part of, or is built on."""
    for candidate in (block, os.path.dirname(block)):  # a partition is below its disk
        path = os.path.join(candidate, "loop", "backing_file")
        if os.path.exists(path):
            with open(path, "rb") as file:
                yield os.fsdecode(file.read().removesuffix(b"\n"))
            return
    slaves = os.path.join(block, "slaves")
    for name in sorted(os.listdir(slaves)) if os.path.isdir(slaves) else ():
        yield from _backing_files(os.path.realpath(os.path.join(slaves, name)))
