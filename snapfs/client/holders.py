"""Who uses a mount, and who else has its file system mounted; as far as /proc and /sys tell.

Asks no file of the mount: it may be our own, or its daemon may be stopped.  Blocks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from . import mountinfo, wire
from .mountinfo import FS_TYPE, Mount


def users(mount: Mount) -> list[str]:
    """What keeps a mount from being unmounted, each in words."""
    everything = mountinfo.mounts()
    found = []
    for each in everything:
        if each.parent == mount.id:
            over = each.mountpoint == mount.mountpoint
            found.append(f"{each.source}, mounted {'over it' if over else f'on {each.mountpoint}'}")
    served = {
        str(pid): each
        for each in everything
        if each.fs_type == FS_TYPE and (pid := wire.daemon_of(each)) is not None
    }
    for process in _processes():
        if mount.id in (place.mount_id for place in _places(process)) or _maps(process, mount):
            other = served.get(process.name)
            serves = f", which serves the snapfs on {other.mountpoint}" if other else ""
            found.append(_name(process) + serves)
    return found + list(_devices(mount, everything))


def others(mount: Mount) -> list[str]:
    """The other mounts of a file system, here and in other namespaces, each in words.

    After the mount itself is gone also processes that still have something of it open.
    """
    found = [
        f"a mount on {each.mountpoint}"
        for each in mountinfo.mounts()
        if each.device == mount.device and each.id != mount.id
    ]
    seen = {_namespace(Path("/proc/self"))}
    holding = []
    for process in _processes():
        namespace = _namespace(process)
        if namespace is not None and namespace not in seen:
            seen.add(namespace)
            found += [
                f"a mount on {each.mountpoint} in the mount namespace of {_name(process)}"
                for each in _mounts_of(process)
                if each.device == mount.device
            ]
        # Those who use the mount itself are in nobody's way until it is gone.
        if any(
            place.device == mount.device and place.mount_id != mount.id
            for place in _places(process)
        ):
            holding.append(_name(process))
    return found + holding


def _processes() -> list[Path]:
    return sorted(Path("/proc").glob("[0-9]*"), key=lambda each: int(each.name))


def _name(process: Path) -> str:
    try:
        name = (process / "comm").read_bytes().strip().decode(errors="replace")
    except OSError:
        name = "a process that has ended"
    return f"{name} (process {process.name})"


def _namespace(process: Path) -> str | None:
    try:
        return os.readlink(process / "ns/mnt")
    except OSError:
        return None


def _mounts_of(process: Path) -> list[Mount]:
    try:
        return mountinfo.mounts(process.name)
    except OSError:
        return []


def _places(process: Path) -> Iterator[mountinfo.Place]:
    """Where the directories and open files of a process are."""
    links = [process / "cwd", process / "root", process / "exe"]
    try:
        links += [process / "fd" / name for name in os.listdir(process / "fd")]
    except OSError:
        pass  # of another user
    for link in links:
        try:
            yield mountinfo.look(str(link))
        except OSError:
            continue


def _maps(process: Path, mount: Mount) -> bool:
    """Has it files of the mount mapped?  The device is all that is told of them."""
    major, _, minor = mount.device.partition(":")
    device = f"{int(major):02x}:{int(minor):02x}".encode()
    under = os.fsencode(mount.mountpoint.rstrip("/") + "/")
    try:
        lines = (process / "maps").read_bytes().split(b"\n")
    except OSError:
        return False
    return any(
        fields[3] == device and fields[5].startswith(under)
        for line in lines
        if len(fields := line.split(None, 5)) == 6
    )


def _devices(mount: Mount, everything: list[Mount]) -> Iterator[str]:
    """Loop devices and swap areas on files of the mount, and what is mounted from the former."""
    for backing in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        try:
            path = os.fsdecode(backing.read_bytes().removesuffix(b"\n"))
        except OSError:
            continue
        if not _is_under(path, mount.mountpoint):
            continue
        block = backing.parent.parent
        numbers = {_number(each) for each in (block, *block.glob("loop*p*"))}
        where = [each.mountpoint for each in everything if each.device in numbers]
        mounted = f", mounted on {', '.join(where)}" if where else ""
        yield f"the loop device /dev/{block.name}{mounted}"
    try:
        lines = Path("/proc/swaps").read_bytes().split(b"\n")[1:]
    except OSError:
        return
    for line in lines:
        area = os.fsdecode(line.split(b" ")[0])
        if area and _is_under(area, mount.mountpoint):
            yield f"the swap area {area}"


def _number(block: Path) -> str:
    try:
        return (block / "dev").read_text().strip()
    except OSError:
        return ""


def _is_under(path: str, where: str) -> bool:
    return os.path.commonpath((os.path.join("/", path), where)) == where
