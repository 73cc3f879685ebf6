"""Which mounts there are, from /proc/self/mountinfo (proc(5))."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

from ..errors import NotMounted

BLOCKS = Path("/sys/dev/block")
FS_TYPE = "fuse.snapfs"


@frozen
class Mount:
    """One mount as this process sees it.  `device`: "major:minor"."""

    id: int
    mountpoint: str
    fs_type: str
    source: str
    device: str


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def mounts() -> list[Mount]:
    """All mounts, the newest last."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        left, _, right = line.partition(" - ")
        fields, (fs_type, source, *_) = left.split(" "), right.split(" ")
        found.append(
            Mount(int(fields[0]), _unescape(fields[4]), fs_type, _unescape(source), fields[2])
        )
    return found


def find(path: str) -> Mount | None:
    """The mount whose mountpoint is `path`, the topmost one; does not look into it."""
    # The last component is not followed: it may be a dead mount.
    parent, name = os.path.split(os.path.abspath(path))
    wanted = os.path.join(os.path.realpath(parent), name)
    for mount in reversed(mounts()):
        if mount.mountpoint == wanted:
            return mount
    return None


def find_snapfs(path: str) -> Mount:
    """The snapfs mount at `path`; raises NotMounted."""
    for candidate in (path, os.path.realpath(path)):
        mount = find(candidate)
        if mount is not None and mount.fs_type == FS_TYPE:
            return mount
    raise NotMounted(f"no snapfs is mounted on {path}")


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
    raise NotMounted(f"{path} is not a file of a snapfs mount")


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
            block = Path(os.path.realpath(BLOCKS / f"{os.major(device)}:{os.minor(device)}"))
            backing = list(_backing_files(block))
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


def _backing_files(block: Path) -> Iterator[str]:
    """The files of loop devices that a block device is, is a part of, or is built on."""
    for candidate in (block, block.parent):  # a partition is below its disk
        backing = candidate / "loop" / "backing_file"
        if backing.exists():
            yield backing.read_text(errors="surrogateescape").rstrip("\n")
            return
    for below in sorted(block.glob("slaves/*")):
        yield from _backing_files(Path(os.path.realpath(below)))
