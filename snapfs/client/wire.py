"""The client side of the control socket; blocking, and quick to import."""

from __future__ import annotations

import json
import os
import socket
from typing import Any

from .. import errors
from . import mountinfo

VERSION = 1
MAX_LINE = 64 << 10  # bytes of a request; an answer may be longer
BUFFER = 1 << 20  # bytes of an answer that are read at once
SOCKET_NAME = "control.sock"
XATTR_STATE = "user.snapfs.state"


class RemoteError(errors.SnapfsError):
    """An error that the daemon reported, with the exit status that it chose."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_status = code


class Client:
    """A connection to the daemon of one mount.  A context manager."""

    def __init__(self, mountpoint: str) -> None:
        """Connect; raises NotMounted if nothing is mounted there or nobody answers."""
        self.mount = mountinfo.find_snapfs(mountpoint)
        state = self._state_directory()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            directory = os.open(state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._socket.connect(f"/proc/self/fd/{directory}/{SOCKET_NAME}")
            finally:
                os.close(directory)
        except PermissionError:
            self._socket.close()
            raise errors.NotPermitted(
                f"only the owner of the mount on {self.mount.mountpoint} may control it"
            ) from None
        except OSError as error:
            self._socket.close()
            raise errors.NotMounted(
                f"the daemon of {self.mount.mountpoint} does not answer: {error.strerror}"
            ) from None
        self._answers = self._socket.makefile("rb", BUFFER)

    def _state_directory(self) -> bytes:
        where = self.mount.mountpoint
        try:
            return os.getxattr(where, XATTR_STATE)
        except PermissionError:
            raise errors.NotPermitted(
                f"{where} belongs to another user; its owner can mount it with -o allow_other "
                "(for which root sets user_allow_other in /etc/fuse.conf)"
            ) from None
        except OSError as error:
            raise errors.NotMounted(
                f"the daemon of {where} is gone ({error.strerror}); "
                f"mount the image again, or unmount it: snapfs umount {where}"
            ) from None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._answers.close()
        self._socket.close()

    def call(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and return its result; raises RemoteError, or NotMounted if cut off."""
        request = {"version": VERSION, "command": command, **arguments}
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            line = self._answers.readline()
        except OSError as error:
            raise errors.NotMounted(f"the daemon does not answer: {error.strerror}") from None
        if not line:
            raise errors.NotMounted("the daemon went away without an answer")
        answer = json.loads(line)
        if not answer["ok"]:
            raise RemoteError(answer["error"]["message"], answer["error"]["exit_code"])
        result: dict[str, Any] = answer["result"]
        return result
