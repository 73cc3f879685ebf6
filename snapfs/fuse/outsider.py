"""Calls on our own mount, made by a process outside the daemon.

A thread of the daemon that waits for an answer of its own mount cannot be
killed, and while it lives the kernel does not notice that the daemon is dead:
kill -9 at such a moment would hang the mount, and all who use it, for ever.
So these calls are made by a child that is forked before /dev/fuse is opened.
It ends when its socket does.

It stays in the process group of whoever mounts, which the daemon leaves: systemd lets only its
own group pass where it is mounting on demand.  And it comes to the mount from the directory that
the mountpoint is in, so that renamed directories above are nothing to it.

One JSON object a line: {"id", "call", "name"} and {"id", "errno", "value"}.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import trio
from attrs import define, field

from ..client import mountinfo
from ..client.unmounting import unmount
from ..storage.linux import close_all_but, write_back
from ..storage.offload import RETRY_SECONDS
from .mounting import Mountpoint

MAX_LINE = 65536
IGNORED = (
    signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTSTP, signal.SIGUSR1,
    signal.SIGUSR2,
)  # fmt: skip


class Outsider:
    """Asks the child.  `start` forks, so it must come before any thread."""

    def __init__(self, parent: socket.socket, pid: int) -> None:
        self.pid = pid
        self._socket = parent
        self._numbers = itertools.count(1)
        self._waiting: dict[int, _Question] = {}  # task-atomic
        self._stream: trio.SocketStream | None = None
        self._sending: trio.Lock | None = None

    @classmethod
    def start(cls, mountpoint: Mountpoint) -> Outsider:
        """Fork the child, which can make calls on what will be mounted there."""
        parent, child = socket.socketpair()
        pid = os.fork()
        if not pid:
            _live(child, mountpoint)
        child.close()
        return cls(parent, pid)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Receive answers; to be run in a nursery while calls are made."""
        self._socket.setblocking(False)
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(self._socket))
        self._sending = trio.Lock()
        task_status.started()
        received = b""
        try:
            async for data in self._stream:
                *lines, received = (received + data).split(b"\n")
                for line in lines:
                    answer = json.loads(line)
                    question = self._waiting.pop(answer["id"])
                    question.answer = answer
                    question.answered.set()
        except trio.BrokenResourceError:
            pass  # it was killed with a question unread
        finally:  # the child is gone, or we are ending
            self._stream = None
            for question in self._waiting.values():
                question.answered.set()
            self._waiting.clear()

    async def call(self, call: str, name: str = "") -> int:
        """Let the child make a call, and return its value.  Raises OSError.

        wait: return when the mount, given by id and device number, answers.  sync: fsync(2)
        of a file.  open: a file, for `finish` with the value as name: fsync and close it; or
        `close`.  unmount.  write_back: as open, and dirty pages of the file from an offset on
        are written back; the name is OFFSET/NAME.
        """
        stream = self._stream  # None as soon as the child is gone, maybe while we wait
        if stream is None or self._sending is None:
            raise OSError(errno.ESRCH, "the helper process does not run")
        question = _Question()
        number = next(self._numbers)
        self._waiting[number] = question
        line = json.dumps({"id": number, "call": call, "name": name}).encode() + b"\n"
        try:
            async with self._sending:
                await stream.send_all(line)
        except trio.BrokenResourceError:
            self._waiting.pop(number, None)
            question.answered.set()
        await question.answered.wait()
        if question.answer is None:
            raise OSError(errno.ESRCH, "the helper process is gone")
        if question.answer["errno"]:
            raise OSError(question.answer["errno"], os.strerror(question.answer["errno"]))
        return int(question.answer["value"])

    @property
    def lives(self) -> bool:
        """Can it make calls?  False before `run`, and when it is gone."""
        return self._stream is not None

    def fileno(self) -> int:
        """The descriptor that leads to the child."""
        return self._socket.fileno()

    def close(self) -> None:
        """Let the child end."""
        self._socket.close()


@define(eq=False)
class _Question:
    answered: trio.Event = field(factory=trio.Event)
    answer: dict[str, Any] | None = None


# The child


def _live(connection: socket.socket, mountpoint: Mountpoint) -> NoReturn:
    try:
        os.chdir("/")
        for number in IGNORED:
            # It ends with the daemon, and may be in a terminal's foreground group.
            signal.signal(number, signal.SIG_IGN)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        close_all_but(connection.fileno(), mountpoint.parent)
        calls = _Calls(mountpoint)
        with connection.makefile("rb") as lines:
            for line in lines:
                request = json.loads(line)
                # A thread each: one call may wait for what another one is about.
                _start(_answer, connection, calls, request)
    finally:
        os._exit(0)


def _start(call: Callable[..., None], *arguments: object) -> None:
    """Call it in a thread, as soon as the system has one."""
    while True:
        try:
            threading.Thread(target=call, args=arguments, daemon=True).start()
            return
        except RuntimeError:
            time.sleep(RETRY_SECONDS)


def _answer(connection: socket.socket, calls: _Calls, request: dict[str, Any]) -> None:
    number, value = 0, 0
    try:
        call: Callable[[str], int] = getattr(calls, request["call"])
        value = call(request["name"])
    except OSError as error:
        number = error.errno or errno.EIO
    except Exception:
        number = errno.EIO
    answer = {"id": request["id"], "errno": number, "value": value}
    connection.sendall(json.dumps(answer).encode() + b"\n")  # short: not torn apart


class _Calls:
    """What the child can do.  Raises OSError."""

    def __init__(self, mountpoint: Mountpoint) -> None:
        self._name = mountpoint.name or "."
        self._parent = mountpoint.parent
        self._mount = (0, "")  # id and device number
        self._number: int | None = None  # `Mount.number`

    def wait(self, name: str) -> int:
        mount_id, device, number = name.split(" ")
        self._mount = (int(mount_id), device)
        self._number = int(number) or None
        os.stat(self._name, dir_fd=self._parent)
        return 0

    def open(self, name: str) -> int:
        path = os.path.join(self._name, name)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._parent)
        found = os.fstat(fd).st_dev
        if f"{os.major(found)}:{os.minor(found)}" != self._mount[1]:  # mounted over it
            os.close(fd)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return fd

    def write_back(self, name: str) -> int:
        offset, _, path = name.partition("/")
        fd = self.open(path)
        try:
            write_back(fd, int(offset))
        except BaseException:
            # Elsewhere: what we are asked for may hold the lock that close(2) takes.
            _start(os.close, fd)
            raise
        return fd

    def finish(self, name: str) -> int:
        fd = int(name)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        return 0

    def close(self, name: str) -> int:
        os.close(int(name))
        return 0

    def sync(self, name: str) -> int:
        return self.finish(str(self.open(name)))

    def unmount(self, name: str) -> int:
        for mount in mountinfo.mounts():
            if (mount.id, mount.device) == self._mount:
                unmount(mount._replace(number=self._number))
                return 0
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
