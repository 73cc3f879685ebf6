"""Ending a mount as `snapfs umount` does: unmounted, and its daemon gone."""

from __future__ import annotations

import errno
import os
import select

from ..errors import MountError, NotMounted
from . import mountinfo, unmounting
from .wire import Client

END_SECONDS = 90  # the daemon gives up by itself before


def end(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount, and return when the daemon has flushed and exited.  Blocks.

    The mount of a dead daemon is cleaned away.  Raises NotMounted, MountError.
    """
    mount = mountinfo.find_snapfs(mountpoint)
    where = mount.mountpoint
    process = _daemon_of(where)
    try:
        _unmount(where, lazy)
        if process is not None and not lazy:
            _wait_end(process)
    finally:
        if process is not None:
            os.close(process)


def _daemon_of(mountpoint: str) -> int | None:
    """A pidfd of the daemon, None if it is dead."""
    try:
        with Client(mountpoint) as client:
            pid = client.call("status")["mount"]["pid"]
        return os.pidfd_open(pid)
    except (NotMounted, ProcessLookupError):
        return None


def _unmount(where: str, lazy: bool) -> None:
    try:
        unmounting.unmount(where, lazy=lazy)
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            unmounting.unmount(where, lazy=True)
        elif error.errno == errno.EBUSY:
            raise MountError(f"{where} is in use; see who with: fuser -vm {where}") from None
        else:
            raise MountError(f"{where} cannot be unmounted: {error.strerror}") from None


def _wait_end(process: int) -> None:
    poll = select.poll()
    poll.register(process, select.POLLIN)
    if not poll.poll(END_SECONDS * 1000):
        raise MountError("the daemon has not finished writing; it goes on in the background")
