"""Making the mount: /dev/fuse opened and attached to a directory, before libfuse comes in.

libfuse takes the descriptor.  What it would do itself goes through its options, which know
ASCII only and treat commas and backslashes in their own way, and through the path of the
mountpoint, which must not be walked once we have left the process group of whoever mounts: an
automount there would wait for us.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import socket
import subprocess
from collections.abc import Iterable
from pathlib import Path

from attrs import frozen

from ..client import mountinfo
from ..client.mountinfo import FS_TYPE, Mount
from ..client.unmounting import clear_stale
from ..errors import MountError, NotPermitted, UsageError

# linux/mount.h
MS_NOSUID, MS_NODEV = 2, 4
FLAGS = {
    "ro": 1,
    "nosuid": MS_NOSUID,
    "nodev": MS_NODEV,
    "noexec": 8,
    "sync": 16,
    "dirsync": 128,
    "nosymfollow": 256,
    "noatime": 1024,
    "nodiratime": 2048,
    "silent": 32768,
    "strictatime": 1 << 24,
    "lazytime": 1 << 25,
}
UNKNOWN_TO_FUSERMOUNT = frozenset(
    {"nosymfollow", "nodiratime", "silent", "strictatime", "lazytime"}
)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (
    ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p,
)  # fmt: skip


@frozen
class Mountpoint:
    """A directory to mount on, held open so that it is the same whatever becomes of its path.

    `fd`: of what is there before the mount (O_PATH), `parent`: of the directory that it is in.
    """

    path: str
    name: str
    fd: int
    parent: int

    @classmethod
    def open(cls, path: str) -> Mountpoint:
        """Open it; UsageError if it is none.  A mount whose daemon is dead is cleaned away.

        To be called by the process that mount(8) has started, or one of its process group:
        where systemd mounts on demand, all others wait here until we have mounted.
        """
        parent, name = os.path.split(os.path.abspath(path))
        where = os.path.join(os.path.realpath(parent), name)
        if os.path.islink(where):
            where = os.path.realpath(where)
        clear_stale(where)
        parent, name = os.path.split(where)
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        try:
            parent_fd = os.open(parent, flags)
            try:
                fd = os.open(name or "/", flags | os.O_NOFOLLOW, dir_fd=parent_fd)
            except BaseException:
                os.close(parent_fd)
                raise
        except FileNotFoundError:
            raise UsageError(
                f"the mountpoint {where} does not exist; create the directory"
            ) from None
        except NotADirectoryError:
            raise UsageError(f"the mountpoint {where} is not a directory") from None
        except OSError as error:
            raise UsageError(f"the mountpoint {where} cannot be opened: {error.strerror}") from None
        return cls(where, name, fd, parent_fd)

    def busy(self) -> Mount | None:
        """The snapfs that is mounted there already, if one is."""
        place = mountinfo.look(self.fd)
        for each in mountinfo.mounts():
            if each.id == place.mount_id and place.is_root and each.fs_type == FS_TYPE:
                return each
        return None

    def close(self) -> None:
        """Let go of it."""
        os.close(self.fd)
        os.close(self.parent)


def attach(where: Mountpoint, source: str, options: Iterable[str]) -> tuple[int, Mount]:
    """Mount: the descriptor of /dev/fuse, and what was mounted.

    `source`: the words before "on" in mount(8)'s list.  Raises MountError, NotPermitted, OSError;
    then nothing is mounted.
    """
    words = list(options)
    before = {each.id for each in mountinfo.mounts()}
    fd = _by_fusermount(where, source, words) if os.geteuid() else _ourselves(where, source, words)
    try:
        return fd, _made(where, fd, source, before)
    except BaseException:
        os.close(fd)
        raise


def _ourselves(where: Mountpoint, source: str, words: list[str]) -> int:
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise MountError(f"/dev/fuse cannot be opened: {error.strerror}") from None
    try:
        flags = MS_NOSUID | MS_NODEV
        data = [f"fd={fd}", "rootmode=40000", f"user_id={os.getuid()}", f"group_id={os.getgid()}"]
        for word in words:
            if word in FLAGS:
                flags |= FLAGS[word]
            else:
                data.append(word)
        failed = _libc.mount(
            os.fsencode(source),
            os.fsencode(f"/proc/self/fd/{where.fd}"),
            FS_TYPE.encode(),
            flags,
            ",".join(data).encode(),
        )
        if failed:
            raise _refused(where, os.strerror(ctypes.get_errno()))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _by_fusermount(where: Mountpoint, source: str, words: list[str]) -> int:
    """As an ordinary user: fusermount3 mounts, and hands the descriptor over."""
    # It takes a backslash before any character for that character.
    name = re.sub(r"([\\,])", r"\\\1", source)
    known = [word for word in words if word not in UNKNOWN_TO_FUSERMOUNT]
    text = ",".join([f"fsname={name}", "subtype=snapfs", *known])
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        with theirs:
            try:
                done = subprocess.run(
                    ["fusermount3", "-o", text, "--", where.path],
                    env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno()), "LC_ALL": "C"},
                    pass_fds=[theirs.fileno()],
                    stderr=subprocess.PIPE,
                    errors="replace",
                    check=False,
                )
            except FileNotFoundError:
                raise MountError(
                    "there is no fusermount3, which ordinary users need; install fuse3"
                ) from None
        if done.returncode:
            message = done.stderr.strip().removeprefix("fusermount3: ")
            if "ermission denied" in message or "not permitted" in message:
                raise NotPermitted(f"{where.path} cannot be mounted: {message}")
            raise _refused(where, message)
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    if not fds:
        raise _refused(where, "fusermount3 has sent no descriptor")
    os.set_inheritable(fds[0], False)
    return fds[0]


def _refused(where: Mountpoint, why: str) -> MountError:
    return MountError(f"{where.path} cannot be mounted: {why}")


def _made(where: Mountpoint, fd: int, source: str, before: set[int]) -> Mount:
    """The mount that was made just now.

    Linux 6.16 tells the device number with the descriptor; before, it is the snapfs that has
    come since `before`, the topmost if there are several.
    """
    number = re.search(
        r"^fuse_connection:\s*(\d+)", Path(f"/proc/self/fdinfo/{fd}").read_text(), re.MULTILINE
    )
    base = mountinfo.look(where.fd).mount_id
    found = [
        each
        for each in mountinfo.mounts()
        if each.fs_type == FS_TYPE
        and (
            each.device == f"0:{number[1]}"
            if number
            else each.id not in before and each.source == source
        )
    ]
    # Where mounts propagate it is mounted several times: ours is the one on our directory.
    ours = [each for each in found if each.parent == base] or found
    made = mountinfo.identified(ours[-1]) if ours else None
    if made is None:
        raise OSError(errno.ESTALE, "the mount is gone again", where.path)
    return made
