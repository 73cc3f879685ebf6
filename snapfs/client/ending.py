"""Ending a mount as `snapfs umount` does: unmounted, its daemon gone, and how it ended told."""

from __future__ import annotations

import errno
import os
import select
import sys
import time
from pathlib import Path

from ..errors import MountError, NotMounted, NotPermitted, NotStored, StillInUse
from . import holders, mountinfo, unmounting
from .mountinfo import Mount
from .unmounting import Connection
from .wire import FAREWELL, Client, RemoteError

END_SECONDS = 90  # the daemon gives up by itself before
ASK_SECONDS = 5  # for an answer of the daemon
BRIEF_SECONDS = 2  # that a use may last of which nobody can be named
WAIT_SECONDS = 0.5  # between two looks at who uses it
STILL_SECONDS = 5  # after which we look again why the daemon goes on


def end(mountpoint: str, *, lazy: bool = False, force: bool = False, patience: float = 0.0) -> None:
    """Unmount, and return when everything is durable, marked clean, and the daemon gone.  Blocks.

    `lazy`: if somebody still uses the mount, it ends when they do, and nobody waits for that.
    The mount of a dead daemon is cleaned away.  `patience`: seconds to wait for those who use it,
    who are named on stderr.  `force`: whoever waits for the daemon gets an
    error first, if the daemon does not answer.  Raises NotMounted, MountError if it stays,
    StillInUse if others have the file system mounted as well, so that the daemon goes on, and
    NotStored if it has ended, but not all that was written is durable.
    """
    mount = mountinfo.identified(mountinfo.find_snapfs(mountpoint))
    if mount is None:
        raise NotMounted(f"the snapfs on {mountpoint} has just been unmounted")
    connection = Connection(mount)
    daemon = Daemon.find(mount)
    try:
        if force and not (daemon is not None and daemon.answers()):
            connection.abort()
        others = [] if lazy else holders.others(mount)
        _unmount(mount, lazy=lazy, patience=patience)
        if daemon is None:
            raise NotStored(
                f"{mount.mountpoint} is unmounted, but its daemon had died, or cannot be asked: "
                "what was not durable before may not be; mount the image again, and unmount it"
            )
        waits = daemon.waits_for(connection) if lazy else None
        if waits is None:
            daemon.wait_end(mount, others)
        else:
            text = f"is unmounted, and all of it is stored once {waits}"
            print(f"snapfs: {mount.mountpoint} {text}", file=sys.stderr)
    finally:
        if daemon is not None:
            daemon.close()


class Daemon:
    """The daemon of a mount, and the connection to it."""

    def __init__(self, client: Client) -> None:
        """Raises OSError if it is dead by now."""
        self._client = client
        self._process = os.pidfd_open(client.pid)
        self._farewell = self._ask_for_farewell()

    def _ask_for_farewell(self) -> Client | None:
        """A connection that tells how it ended; None: it does not answer."""
        try:
            client = Client(self._client.mount)
        except (NotMounted, NotPermitted):
            return None
        try:
            client.be_patient(ASK_SECONDS)
            client.call(FAREWELL)
            return client
        except (NotMounted, RemoteError):
            client.close()
            return None

    @classmethod
    def find(cls, mount: Mount) -> Daemon | None:
        """None if it is dead, or cannot be found: then what is unmounted may yet be written."""
        try:
            client = Client(mount)
        except (NotMounted, NotPermitted):
            return None
        try:
            return cls(client)
        except OSError:  # dead, or of a process namespace that we do not see
            client.close()
            return None

    def answers(self) -> bool:
        """Does it answer within ASK_SECONDS?"""
        return self._client.answers(ASK_SECONDS)

    def waits_for(self, connection: Connection) -> str | None:
        """What its end after a lazy unmount may wait for; None: it is ending."""
        if connection.is_there():
            return "nobody uses it any more"
        if self._stopped():
            return f"its daemon goes on, which is stopped: kill -CONT {self._client.pid}"
        return None

    def wait_end(self, mount: Mount, before: list[str]) -> None:
        """Return when it has ended, after the unmount.

        `before`: others who had the file system then.  Raises StillInUse as soon as it is known
        that some have it still, so that the daemon goes on.
        """
        # Its device number may already be another's: so those that were there before.
        others = [each for each in holders.others(mount) if each in before] if before else []
        if not others or not self.answers():
            others = self._wait(mount)
        if others:
            raise StillInUse(
                f"{mount.mountpoint} is unmounted, but the daemon goes on and {mount.source} is "
                f"not to be touched yet, since its file system is in use by {', '.join(others)}"
            )
        reason = self._outcome()
        if reason is not None:
            raise NotStored(
                f"{mount.mountpoint} is unmounted, but not all of it is stored: {reason}"
            )

    def _outcome(self) -> str | None:
        """Why it has not ended well, None if it has.  It has ended."""
        if self._farewell is None:
            return "the daemon could not be asked, and its log may tell"
        try:
            self._farewell.receive()
        except NotMounted:
            return "the daemon was killed before it had finished; mount the image again"
        except RemoteError as error:
            return str(error)
        return None

    def _wait(self, mount: Mount) -> list[str]:
        end = time.monotonic() + END_SECONDS
        while not self._ended(STILL_SECONDS):
            if self._stopped():
                raise MountError(
                    f"the daemon of {mount.mountpoint} (process {self._client.pid}) is stopped; it "
                    f"ends when it may go on: kill -CONT {self._client.pid}"
                )
            if self.answers():  # which it does no more once the last mount is gone
                return holders.others(mount) or ["somebody who cannot be seen from here"]
            if time.monotonic() > end:
                raise MountError(
                    "the daemon has not finished writing; it goes on in the background, and the "
                    f"image is not to be touched before process {self._client.pid} has ended"
                )
        return []

    def _ended(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._process, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def _stopped(self) -> bool:
        try:
            stat = Path(f"/proc/{self._client.pid}/stat").read_bytes()
        except OSError:
            return False
        return stat.rpartition(b")")[2].split()[0] in (b"T", b"t")

    def close(self) -> None:
        """Let go of it."""
        if self._farewell is not None:
            self._farewell.close()
        os.close(self._process)
        self._client.close()


def _unmount(mount: Mount, *, lazy: bool = False, patience: float = 0.0) -> None:
    where = mount.mountpoint
    began = time.monotonic()
    end = began + BRIEF_SECONDS
    said: list[str] = []
    while True:
        try:
            unmounting.unmount(mount, lazy=lazy)
            return
        except OSError as error:
            if error.errno == errno.ENOENT:
                return  # somebody else was faster
            if error.errno != errno.EBUSY:
                raise MountError(f"{where} cannot be unmounted: {error.strerror}") from None
        users = holders.users(mount)
        names = ", ".join(users) or "somebody who cannot be seen from here"
        if time.monotonic() < began + patience:
            if users != said:
                print(f"snapfs: waiting for {where}, in use by {names}", file=sys.stderr)
                said = users
            time.sleep(WAIT_SECONDS)
            continue
        if users or time.monotonic() > end:
            raise MountError(
                f"{where} is in use by {names}; end that, or take the mount away nevertheless: "
                f"snapfs umount --lazy {where}"
            )
        time.sleep(BRIEF_SECONDS / 100)  # a look, or a call that has just been aborted
