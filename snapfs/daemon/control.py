"""The control socket: plain JSON, one request and one answer a line.

    {"version": 1, "command": "create", "name": "monday"}
    {"ok": true, "result": {...}}
    {"ok": false, "error": {"kind": "SnapshotExists", "message": ..., "exit_code": 1}}

The socket lies in the state directory, mode 0600; another, without a file, is for those who do
not know that directory (client/wire.py).  The peer's user is checked on both: the owner and root
may do all, members of the group that the mount names may look, others may do nothing.

Everything that comes in is bounded: length of a line, clients at once, time to send a line, and the
type of each value.

A client takes a descriptor.  When there is none left those set aside serve, and the
last of them tells the client why it is refused: nobody waits for ever, and the
daemon goes on.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import trio

from .. import errors
from ..client.reasons import why
from ..client.wire import FAREWELL, MAX_LINE, VERSION
from ..state import statefiles
from ..storage import descriptors
from ..storage.descriptors import Reserve
from .farewell import Farewell

log = logging.getLogger(__name__)

MAX_CLIENTS = 32
MAX_VISITORS = 8  # of them, who may look only: the owner is never kept out by them
IDLE_SECONDS = 30.0
SPARE_DESCRIPTORS = 4
RETRY_SECONDS = 0.2  # after a failure of accept(2)
BROKEN = (errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP, errno.EFAULT)

SO_PEERGROUPS = 59  # asm-generic/socket.h
GROUPS_BYTES = 1024  # that Python reads of an option: 256 groups

Command = Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]


def failure(error: BaseException) -> dict[str, Any]:
    """The answer that tells of an exception."""
    if isinstance(error, errors.SnapfsError):
        kind, code = type(error).__name__, int(error.exit_code)
    else:
        kind, code = "OSError", int(errors.ExitCode.ERROR)
    message = str(error)
    if isinstance(error, OSError):
        message = why(error)
        if error.errno in descriptors.EXHAUSTED:
            message = descriptors.explain(error)
    return {"ok": False, "error": {"kind": kind, "message": message, "exit_code": code}}


def text(request: Mapping[str, Any], key: str) -> str:
    """A string of a request; raises UsageError if it is not there or not one."""
    value = request.get(key)
    if not isinstance(value, str):
        raise errors.UsageError(f"the request needs a string {key!r}")
    return value


def number(request: Mapping[str, Any], key: str, default: int) -> int:
    """A number of bytes of a request, 0 to 2**63 - 1; raises UsageError for anything else."""
    value = request.get(key, default)
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise errors.UsageError(f"{key!r} of the request must be a number of bytes")
    return value


class ControlServer:
    """Answers requests with `commands`, for the users in `uids` and root.

    Processes that have `group` among their groups are answered with `visible` only.

    Who asks for the `farewell` is told there how the mount ended.
    """

    def __init__(
        self,
        path: str,
        commands: Mapping[str, Command],
        uids: frozenset[int],
        farewell: Farewell,
        *,
        also: Sequence[str] = (),
        group: int | None = None,
        visible: Mapping[str, Command] | None = None,
    ) -> None:
        """`also`: addresses without a file, to listen at the first that is free as well."""
        self._path = path
        self._also = also
        self._refused: set[int] = set()  # users whom the log has
        self._commands = commands
        self._uids = uids | {0}
        self._farewell = farewell
        self._group = group
        self._visible = visible or {}
        self._clients = 0  # task-atomic
        self._visitors = 0  # of them; task-atomic
        self._spare = Reserve(SPARE_DESCRIPTORS)

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen until cancelled; the socket is there when the task has started."""
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            directory, name = os.path.split(self._path)
            fd = statefiles.open_directory(directory)
            try:
                # Not by its path: the directory, whose name may be given to another, is ours.
                os.fchmod(listener.fileno(), 0o600)  # and so is the file's mode
                # A path may also be longer than a socket's name.
                await listener.bind(f"/proc/self/fd/{fd}/{name}")
                listener.listen(MAX_CLIENTS)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._listen, listener, nursery)
                    if self._also:
                        await nursery.start(self._serve_also, nursery)
                    task_status.started()
            finally:
                self._spare.close()
                statefiles.remove(fd, name)
                os.close(fd)

    async def _serve_also(
        self, nursery: trio.Nursery, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            if not await _bind_first(listener, self._also):
                log.warning("all names by which root finds us are taken: %r", self._also)
                task_status.started()
                return
            listener.listen(MAX_CLIENTS)
            task_status.started()
            await self._listen(listener, nursery)

    async def _listen(self, listener: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        while True:
            client, error = await self._accept(listener)
            nursery.start_soon(self._client, client, error)

    async def _accept(
        self, listener: trio.socket.SocketType
    ) -> tuple[trio.socket.SocketType, OSError | None]:
        """The next client, and why it cannot be served if there is no descriptor to spare."""
        scarce: OSError | None = None
        while True:
            try:
                client, _ = await listener.accept()
                return client, None if self._spare.left else scarce
            except OSError as error:
                if error.errno in BROKEN:
                    raise
                if error.errno not in descriptors.EXHAUSTED or not self._spare.give():
                    if scarce is None:
                        log.warning("no client can connect: %s", error.strerror)
                    await trio.sleep(RETRY_SECONDS)
                scarce = error

    async def _client(self, client: trio.socket.SocketType, scarce: OSError | None) -> None:
        credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        _, uid, gid = struct.unpack("iII", credentials)
        owner = uid in self._uids
        visitor = not owner and self._group is not None and self._group in _groups(client, gid)
        stream = trio.SocketStream(client)
        self._clients += 1
        self._visitors += visitor
        try:
            if not (owner or visitor):
                if uid not in self._refused and len(self._refused) < MAX_CLIENTS:
                    self._refused.add(uid)
                    log.warning("user %d may not use the control socket", uid)
                refused = errors.NotPermitted("only the owner of the mount may control it")
                await _send(stream, failure(refused))
            elif scarce is not None:
                await _send(stream, failure(errors.LimitReached(descriptors.explain(scarce))))
            elif self._clients > MAX_CLIENTS or (visitor and self._visitors > MAX_VISITORS):
                await _send(stream, failure(errors.InUse("too many clients; try again")))
            else:
                await self._converse(stream, owner)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            pass  # gone, or too slow
        finally:
            self._clients -= 1
            self._visitors -= visitor
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)
            self._spare.refill()

    async def _converse(self, stream: trio.SocketStream, owner: bool) -> None:
        waiting = bytearray()
        while True:
            with trio.fail_after(IDLE_SECONDS):
                while b"\n" not in waiting:
                    data = await stream.receive_some(MAX_LINE)
                    if not data:
                        return
                    waiting += data
                    if len(waiting) > MAX_LINE and b"\n" not in data:
                        await _send(stream, failure(errors.UsageError("the request is too long")))
                        return
            line, _, waiting = waiting.partition(b"\n")
            await _send(stream, await self._answer(bytes(line), stream, owner))

    async def _shown(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a visitor; raises NotPermitted."""
        command = self._visible.get(str(request.get("command")))
        if command is None:
            raise errors.NotPermitted(
                "members of control-group may look at the mount, by list, status, map, metrics and "
                "events; only its owner may control it"
            )
        return await command(request)

    async def _answer(self, line: bytes, stream: trio.SocketStream, owner: bool) -> dict[str, Any]:
        try:
            request = json.loads(line)
            if not isinstance(request, dict) or request.get("version") != VERSION:
                raise errors.UsageError(f"not a request of version {VERSION}")
            if not owner:
                return {"ok": True, "result": await self._shown(request)}
            if request.get("command") == FAREWELL:
                if not self._farewell.add(stream.socket.fileno()):
                    raise errors.InUse("too many wait for the end of the mount")
                return {"ok": True, "result": {"pid": os.getpid()}}
            command = self._commands.get(str(request.get("command")))
            if command is None:
                raise errors.UsageError(f"unknown command {request.get('command')!r}")
            return {"ok": True, "result": await command(request)}
        except (ValueError, RecursionError):
            return failure(errors.UsageError("the request is not JSON"))
        except (errors.SnapfsError, OSError) as error:
            return failure(error)
        except Exception:
            log.exception("unexpected error in a control request")
            return failure(errors.SnapfsError("internal error; the log has the details"))


def _groups(client: trio.socket.SocketType, gid: int) -> frozenset[int]:
    """The groups of a peer as it connected, of which `gid` is the first.

    Of one in more than 256 only that is known.
    """
    try:
        data = client.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, GROUPS_BYTES)
    except OSError:
        return frozenset({gid})
    return frozenset({gid, *struct.unpack(f"{len(data) // 4}I", data)})


async def _send(stream: trio.SocketStream, answer: Mapping[str, Any]) -> None:
    with trio.fail_after(IDLE_SECONDS):
        await stream.send_all(json.dumps(answer).encode() + b"\n")


async def _bind_first(listener: trio.socket.SocketType, addresses: Sequence[str]) -> bool:
    for address in addresses:
        try:
            await listener.bind(address)
            return True
        except OSError:
            continue
    return False
