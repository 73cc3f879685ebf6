"""Taking a mount away: that mount, wherever it is by now, and never what is mounted over it.

For daemons and commands, so without trio.  Everything blocks.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from . import mountinfo
from .mountinfo import Mount

log = logging.getLogger(__name__)

MNT_FORCE = 1  # sys/mount.h
MNT_DETACH = 2
MNT_EXPIRE = 4
UMOUNT_NOFOLLOW = 8

CONNECTIONS = "/sys/fs/fuse/connections"
ATTEMPTS = 100  # each fails only if somebody looked at the mount at the same time

_libc = ctypes.CDLL(None, use_errno=True)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


def umount2(path: str, flags: int = 0) -> None:
    """umount2(2).  Raises OSError."""
    if _libc.umount2(os.fsencode(path), flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)


def clear_stale(where: str) -> None:
    """Unmount a snapfs whose daemon is dead."""
    mount = mountinfo.find(where)
    if mount is None or mount.fs_type != mountinfo.FS_TYPE:
        return
    try:
        os.stat(where)
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            unmount(mount, lazy=True)


def unmount(mount: Mount, *, lazy: bool = False) -> None:
    """Unmount, by fusermount3 for an ordinary user.

    Raises OSError: EBUSY if it is in use, or if something else is mounted over it, ENOENT if
    it is gone.
    """
    with _reached(mount) as (now, path):
        if os.geteuid():
            _by_fusermount(now, lazy=lazy)
            return
        try:
            _if_idle(now, path)
            return
        except OSError as error:
            if not lazy or error.errno != errno.EBUSY:
                raise
    with _reached(mount) as (_, path):
        umount2(path, MNT_DETACH | UMOUNT_NOFOLLOW)


def _by_fusermount(mount: Mount, *, lazy: bool) -> None:
    if mount.user != os.getuid():  # it would say that there is no such mount
        raise OSError(errno.EPERM, f"it belongs to user {mount.user}", mount.mountpoint)
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", mount.mountpoint]
    done = subprocess.run(command, capture_output=True, errors="replace", check=False)
    if done.returncode:
        busy = "busy" in done.stderr.lower()
        raise OSError(errno.EBUSY if busy else errno.EPERM, done.stderr.strip())


def _uncovered(mount: Mount) -> Mount:
    now = mountinfo.still(mount)
    if now is None:
        raise OSError(errno.ENOENT, "the mount is gone", mount.mountpoint)
    over = mountinfo.cover(now)
    if over is not None:
        raise OSError(errno.EBUSY, f"{over.source} is mounted over it", now.mountpoint)
    return now


@contextmanager
def _reached(mount: Mount) -> Iterator[tuple[Mount, str]]:
    """A mount as it is now, and a path that leads to it while the block lasts.

    It goes through a descriptor of the directory that the mountpoint is in: whoever owns one
    above could put a symbolic link there, to a mount of somebody else, after we have looked.
    Raises OSError as `unmount`.
    """
    now = _uncovered(mount)
    directory, name = os.path.split(now.mountpoint)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        path = f"/proc/self/fd/{fd}/{name}" if name else directory
        if mountinfo.look(path, follow=False).mount_id != now.id:
            raise OSError(errno.EBUSY, "another file system is mounted over its path", directory)
        yield now, path
    finally:
        os.close(fd)


def _if_idle(mount: Mount, path: str) -> None:
    """Unmount what nobody uses; not what was mounted over it since we looked.

    umount2(2) takes what is topmost, by a descriptor's link in /proc, too, and a descriptor would
    be a use.  But with MNT_EXPIRE it only marks a mount at first, and unmounts at the second
    call one that was marked, and not used since: what was mounted over it between our look and
    that is not.
    """
    for _ in range(ATTEMPTS):
        try:
            umount2(path, MNT_EXPIRE | UMOUNT_NOFOLLOW)
            return
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise
        # A look at the mount itself would take the mark away.
        if mountinfo.still(mount) != mount or mountinfo.cover(mount) is not None:
            raise OSError(errno.EBUSY, "another file system is mounted over it", mount.mountpoint)
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), mount.mountpoint)


class Connection:
    """The kernel's side of a mount: what waits for the daemon, and goes on after the unmount.

    fusectl has a directory for each (fuse.rst), named by the device number of the mount.  That
    number is given again when the file system is gone, to another mount, perhaps at once; the
    number of the directory's inode is not.  Where fusectl is not mounted little is known.
    """

    def __init__(self, mount: Mount) -> None:
        """To be called while the mount is there; else nothing is known, too."""
        self._mount = mount
        self._path = f"{CONNECTIONS}/{mount.device.partition(':')[2]}"
        self._inode: int | None = None
        try:
            inode = os.stat(self._path).st_ino
            if mountinfo.still(mount) is not None:
                self._inode = inode
        except OSError:
            pass  # not mounted, or no descriptor left

    def is_there(self) -> bool:
        """Has the kernel still a use for the daemon?  True if that cannot be known."""
        try:
            return self._inode in (None, os.stat(self._path).st_ino)
        except OSError:
            return not os.path.ismount(CONNECTIONS)

    def abort(self) -> None:
        """Let everything that still waits for the daemon fail; what is mounted stays mounted.

        Closing /dev/fuse does that too, but not while a thread of ours is in it.
        """
        try:
            self._abort()
            return
        except OSError:
            pass  # fusectl is not mounted, or the user may not, or it is gone
        try:
            with _reached(self._mount) as (_, path):
                fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    umount2(path, MNT_FORCE | UMOUNT_NOFOLLOW)
                finally:
                    os.close(fd)
        except OSError as error:
            if error.errno != errno.EBUSY:  # which it always is, by our descriptor
                log.info("cannot abort the requests that are left: %s", error.strerror)

    def _abort(self) -> None:
        directory = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if os.fstat(directory).st_ino != self._inode:
                raise OSError(errno.ENOENT, "the connection is gone", self._path)
            fd = os.open("abort", os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
            try:
                os.write(fd, b"1")
            finally:
                os.close(fd)
        finally:
            os.close(directory)
