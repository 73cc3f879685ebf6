"""Taking a mount away: in order, after its daemon has died, or while others are using it.

For daemons and commands, so without trio.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import subprocess
from pathlib import Path

from . import mountinfo

log = logging.getLogger(__name__)

MNT_FORCE = 1  # sys/mount.h
MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


def umount2(path: str, flags: int = 0) -> None:
    """umount2(2).  Blocks; raises OSError."""
    if _libc.umount2(os.fsencode(path), flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)


def clear_stale(where: str) -> None:
    """Unmount a snapfs whose daemon is dead.  Blocks."""
    mount = mountinfo.find(where)
    if mount is None or mount.fs_type != mountinfo.FS_TYPE:
        return
    try:
        os.stat(where)
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            unmount(where, lazy=True)


def unmount(where: str, *, lazy: bool = False) -> None:
    """Unmount, by fusermount3 for an ordinary user.  Blocks.  Raises OSError, EBUSY if in use."""
    if not os.geteuid():
        umount2(where, MNT_DETACH if lazy else 0)
        return
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", where]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        busy = "busy" in done.stderr.lower()
        raise OSError(errno.EBUSY if busy else errno.EPERM, done.stderr.strip())


def holders(where: str) -> list[str]:
    """Who has files of a mount open, as far as /proc tells.  Blocks.

    Looks at no file of the mount: it may be our own.
    """
    mount = mountinfo.find(where)
    marker = f"mnt_id:\t{mount.id}\n" if mount is not None else "none"
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            inside = any(
                _is_under(os.readlink(process / link), where) for link in ("cwd", "root")
            ) or any(marker in info.read_text() for info in process.glob("fdinfo/*"))
            if inside:
                name = (process / "comm").read_text().strip()
                found.append(f"{name} (process {process.name})")
        except OSError:
            continue
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            if _is_under(backing.read_text().strip(), where):
                found.append(f"the loop device /dev/{backing.parts[3]}")
        except OSError:
            continue
    return found


def _is_under(path: str, where: str) -> bool:
    return os.path.commonpath((os.path.join("/", path), where)) == where


def abort(device: int | None, where: str) -> None:
    """Let everything that still waits for a mount of ours fail (fuse.rst, fusectl).

    Closing /dev/fuse does that too, but not while a thread of ours is in it.
    """
    try:
        if device is not None:
            Path(f"/sys/fs/fuse/connections/{os.minor(device)}/abort").write_text("1")
            return
    except OSError:
        pass  # fusectl is not mounted
    try:
        umount2(where, MNT_FORCE)
    except OSError as error:
        log.info("cannot abort the requests that are left: %s", error.strerror)
