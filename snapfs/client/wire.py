"""The client side of the control socket; blocking, and quick to import.

A daemon listens at two places: on a socket in its state directory, and on one without a file
(unix(7), abstract) that is named after the device number of the mount.  By the latter it is
found without a look at the mount, which may be another user's, or not answer.  Anybody may have
taken such a name, so who listens there must be the user who mounted, or root; and as a daemon that
is stopped may have it from a former mount with that number, the newest of several counts.  It is
not found from another network namespace: then an extended attribute of the mount tells the state
directory.  That can be anybody's word, so who listens there must be the user who mounted: else
an ordinary user's file system could have root talk to the daemon of another mount.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import struct
import time
from contextlib import suppress
from typing import Any

from .. import errors
from . import mountinfo
from .mountinfo import Mount

VERSION = 1
MAX_LINE = 64 << 10  # bytes of a request; an answer may be longer
BUFFER = 1 << 20  # bytes of an answer that are read at once
MAX_ANSWER = 256 << 20  # bytes; 50,000 snapshots take some 50 MB
FAREWELL = "farewell"  # a request that is answered twice: at once, and when the mount has ended
SOCKET_NAME = "control.sock"
ADDRESSES = 8  # of one device number
ASK_SECONDS = 5  # for the state directory, and for a connection
PATH_MAX = 4097
XATTR_STATE = "user.snapfs.state"


class RemoteError(errors.SnapfsError):
    """An error that the daemon reported, with the exit status that it chose, and its code."""

    def __init__(self, message: str, exit_status: int, code: str) -> None:
        super().__init__(message)
        self.exit_status = exit_status
        self.code = code


def _peer(connected: socket.socket) -> tuple[int, int]:
    """Process and user who listen, as they were when they began to."""
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, uid, _ = struct.unpack("iII", credentials)
    return pid, uid


def _address(device: str, number: int) -> str:
    return f"\0snapfs-{device}-{number}"


def _connect_to(address: str, user: int | None) -> socket.socket | None:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        made.connect(address)
        if _peer(made)[1] in (0, user):
            made.setblocking(True)
            return made
    except OSError:
        pass
    made.close()
    return None


def _connect_directly(mount: Mount) -> socket.socket | None:
    """A connection to the daemon, None if it cannot be had.  Waits for nobody."""
    for number in reversed(range(ADDRESSES)):
        made = _connect_to(_address(mount.device, number), mount.user)
        if made is not None:
            return made
    return None


def free_addresses(mount: Mount) -> list[str]:
    """Where a new daemon may listen: beyond those that would be taken for it."""
    numbers = range(ADDRESSES)
    for number in reversed(numbers):
        made = _connect_to(_address(mount.device, number), mount.user)
        if made is not None:
            made.close()
            numbers = range(number + 1, ADDRESSES)
            break
    return [_address(mount.device, number) for number in numbers]


def daemon_of(mount: Mount) -> int | None:
    """The process that serves a mount, if it can be found without asking it."""
    found = _connect_directly(mount)
    if found is None:
        return None
    with found:
        return _peer(found)[0] or None


def _ask_mount(mount: Mount) -> bytes | int:
    """The state directory of a mount, or an errno; ETIMEDOUT if the daemon does not answer.

    By a child, which can be killed while it waits, and becomes the user whom alone the kernel
    lets in, root or not.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            if mount.user is not None and not os.geteuid():
                os.setresgid(mount.group, mount.group, mount.group)
                os.setresuid(mount.user, mount.user, mount.user)
            answer = b"=" + os.getxattr(mount.mountpoint, XATTR_STATE)
        except OSError as error:
            answer = str(error.errno).encode()
        finally:
            os.write(writer, answer)
            os._exit(0)
    os.close(writer)
    try:
        ready, _, _ = select.select([reader], [], [], ASK_SECONDS)
        answer = os.read(reader, PATH_MAX) if ready else b""
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)
    if not answer:
        return errno.ETIMEDOUT  # the child may even be past killing: init will see to it
    os.waitpid(child, 0)
    return answer[1:] if answer.startswith(b"=") else int(answer)


class Client:
    """A connection to the daemon of one mount.  A context manager."""

    def __init__(self, mountpoint: str | Mount) -> None:
        """Connect to that of a mount, or of the one that a path lies in.

        Raises NotMounted if there is none or nobody answers.
        """
        if isinstance(mountpoint, str):
            mountpoint = mountinfo.around(mountpoint)
        self.mount = mountpoint
        self._socket = _connect_directly(self.mount) or self._connect_by_state()
        self.pid = _peer(self._socket)[0]
        self._received = b""  # beyond the answer that was read last
        self._patience: float | None = None  # seconds for an answer
        self._deadline: float | None = None  # of the present one, by time.monotonic()

    def _connect_by_state(self) -> socket.socket:
        state = self._state_directory()
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # One who listens and accepts nobody must not keep us for ever.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", ASK_SECONDS, 0))
        try:
            directory = os.open(state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                made.connect(f"/proc/self/fd/{directory}/{SOCKET_NAME}")
            finally:
                os.close(directory)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, 0))
        except BlockingIOError:
            made.close()
            raise errors.NotMounted(
                f"the daemon of {self.mount.mountpoint} does not answer: it has too many clients, "
                "or is stopped"
            ) from None
        except PermissionError:
            made.close()
            raise errors.NotPermitted(
                f"only the owner of the mount on {self.mount.mountpoint} may control it"
            ) from None
        except OSError as error:
            made.close()
            raise errors.NotMounted(
                f"the daemon of {self.mount.mountpoint} does not answer: {error.strerror}"
            ) from None
        user = _peer(made)[1]
        if user != self.mount.user:
            made.close()
            raise errors.NotMounted(
                f"who answers for {self.mount.mountpoint} is of user {user}, "
                f"not of {self.mount.user}, who has mounted it"
            )
        return made

    def _state_directory(self) -> bytes:
        where = self.mount.mountpoint
        found = _ask_mount(self.mount)
        if isinstance(found, bytes):
            return found
        if found == errno.EACCES:
            raise errors.NotPermitted(
                f"{where} belongs to another user; its owner can mount it with -o allow_other "
                "(for which root sets user_allow_other in /etc/fuse.conf)"
            )
        if found == errno.ETIMEDOUT:
            raise errors.NotMounted(
                f"the daemon of {where} does not answer: its storage hangs, or it is stopped; "
                f"to give it up: snapfs umount --force {where}"
            )
        raise errors.NotMounted(
            f"the daemon of {where} is gone ({os.strerror(found)}); "
            f"mount the image again, or unmount it: snapfs umount {where}"
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._socket.close()

    def answers(self, seconds: float) -> bool:
        """Does the daemon answer in that time?  If not, the connection is of no use any more."""
        self.be_patient(seconds)
        try:
            self.call("events", after=1 << 62)
            return True
        except errors.NotMounted:
            return False
        finally:
            self.be_patient(None)

    def call(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and return its result; raises RemoteError, or NotMounted if cut off."""
        request = {"version": VERSION, "command": command, **arguments}
        self._begin()
        try:
            self._limit_time()
            with suppress(BrokenPipeError):  # it has said why, and does not listen
                self._socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise _no_answer(error) from None
        return self.receive()

    def be_patient(self, seconds: float | None) -> None:
        """Wait so long for each answer from now on; then it counts as cut off."""
        self._patience = seconds

    def receive(self) -> dict[str, Any]:
        """The next answer to a request that is answered twice; as `call`."""
        self._begin()
        try:
            line = self._read_line()
        except OSError as error:
            raise _no_answer(error) from None
        if not line:
            raise errors.NotMounted("the daemon went away without an answer; see its log")
        try:
            answer = json.loads(line)
            if answer["ok"]:
                result: dict[str, Any] = answer["result"]
                return result
            told = answer["error"]
            message, status = str(told["message"]), int(told["exit_code"])
            kind = str(told.get("kind"))
        except (ValueError, LookupError, TypeError, RecursionError):
            raise errors.NotMounted("what answers is no snapfs: it says something else") from None
        code = errors.SYSTEM_ERROR if kind == "OSError" else errors.code_of(kind)
        raise RemoteError(message, status, code)

    def _read_line(self) -> bytes:
        """A line, empty at the end."""
        parts = [self._received]
        size = 0
        while b"\n" not in parts[-1]:
            self._limit_time()
            part = self._socket.recv(BUFFER)
            if not part:
                return b""
            parts.append(part)
            size += len(part)
            if size > MAX_ANSWER:
                raise errors.NotMounted("what answers is no snapfs: it says too much")
        last, _, self._received = parts[-1].partition(b"\n")
        return b"".join([*parts[:-1], last])

    def _begin(self) -> None:
        """The time that an answer may take begins."""
        self._deadline = None
        if self._patience is not None:
            self._deadline = time.monotonic() + self._patience

    def _limit_time(self) -> None:
        """Of the next system call; one that drips bytes takes no longer than one that is silent."""
        left = None
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
        self._socket.settimeout(left)


def _no_answer(error: OSError) -> errors.NotMounted:
    return errors.NotMounted(f"the daemon does not answer: {error.strerror or 'it took too long'}")
