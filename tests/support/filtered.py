"""A file system of one file behind the request filter: python filtered.py MOUNTPOINT.

The program (`serve`) answers one JSON command a line: see its `commands`.  `Mount` runs it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from snapfs.fuse import requestfilter

MIB = 1 << 20
PATIENCE = 400  # seconds, as in mounted.py, which its environment may lack
SIZE = 4 * MIB
INO = 2


def serve(mountpoint: str) -> None:
    """Serve MOUNTPOINT/file (and file1, file2, ...: the same data) until it is unmounted."""
    requestfilter.load()
    import pyfuse3  # noqa: PLC0415
    import trio  # noqa: PLC0415

    data = bytearray(os.urandom(SIZE))
    events: list[list[Any]] = []
    settings: dict[str, Any] = {"errno": 0, "raise": None, "hold": False, "mtime": 0}
    held: list[int] = []

    class File(pyfuse3.Operations):
        def __init__(self) -> None:
            super().__init__()
            self.freed = trio.Event()
            self.opened = 0

        async def getattr(self, inode: int, ctx: object = None) -> pyfuse3.EntryAttributes:
            entry = pyfuse3.EntryAttributes()
            entry.st_ino = pyfuse3.InodeT(inode)
            entry.st_mode = pyfuse3.ModeT(0o40755 if inode == pyfuse3.ROOT_INODE else 0o100600)
            entry.st_size = 0 if inode == pyfuse3.ROOT_INODE else SIZE
            entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
            entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = settings["mtime"]
            entry.attr_timeout = entry.entry_timeout = 0
            return entry

        async def lookup(
            self, parent_inode: int, name: bytes, ctx: object
        ) -> pyfuse3.EntryAttributes:
            if not name.startswith(b"file"):
                raise pyfuse3.FUSEError(errno.ENOENT)
            return await self.getattr(INO + int(name[4:] or 0))

        async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
            self.opened += 1
            return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(77), keep_cache=True)

        async def release(self, fh: int) -> None:
            self.opened -= 1

        async def read(self, fh: int, off: int, size: int) -> bytes:
            events.append(["read", off, size, requestfilter.direct_read()])
            if settings["hold"]:
                await self.freed.wait()
            return bytes(data[off : off + size])

        async def write(self, fh: int, off: int, buf: bytes) -> int:
            events.append(["write", off, len(buf)])
            data[off : off + len(buf)] = buf
            return len(buf)

        async def setattr(self, inode: int, *args: object) -> pyfuse3.EntryAttributes:
            return await self.getattr(inode)

    def outcome(function: Callable[..., object], *args: object) -> object:
        try:
            return function(*args)
        except (OSError, ValueError) as error:
            return [type(error).__name__, getattr(error, "errno", None)]

    def on_fallocate(request: int, ino: int, fh: int, mode: int, offset: int, length: int) -> None:
        events.append(["fallocate", ino, fh, mode, offset, length])
        if settings["raise"] == "before":
            raise LookupError("before the reply")
        events.append(["refused", outcome(requestfilter.reply_offset, request, 0)])
        events.append(["refused", outcome(requestfilter.reply_error, request, 512)])
        events.append(["refused", outcome(requestfilter.reply_error, request, -1)])
        requestfilter.reply_error(request, settings["errno"])
        events.append(["refused", outcome(requestfilter.reply_error, request, 0)])
        if settings["raise"] == "after":
            raise LookupError("after the reply")

    def on_lseek(request: int, ino: int, fh: int, offset: int, whence: int) -> None:
        events.append(["lseek", ino, fh, offset, whence])
        if settings["hold"]:
            held.append(request)
            return
        events.append(["refused", outcome(requestfilter.reply_error, request, 0)])
        events.append(["refused", outcome(requestfilter.reply_offset, request, -1)])
        if settings["errno"]:
            requestfilter.reply_error(request, settings["errno"])
        else:
            requestfilter.reply_offset(request, offset + 4096)
        events.append(["refused", outcome(requestfilter.reply_offset, request, 0)])

    def set_handlers(on: bool) -> None:
        if on:
            requestfilter.set_handlers(fallocate=on_fallocate, lseek=on_lseek)
        else:
            requestfilter.set_handlers()

    def poke(offset: int, text: str) -> None:
        data[offset : offset + len(text)] = text.encode()

    def take_events() -> list[list[Any]]:
        taken = events.copy()
        events.clear()
        return taken

    def answer_held(order: list[int]) -> None:
        for index in order:
            requestfilter.reply_offset(held[index], index)
        held.clear()

    file = File()
    commands: dict[str, Callable[..., Any]] = {
        "answer": answer_held,
        "attached": requestfilter.attached,
        "configure": lambda on: requestfilter.configure(receive=on),
        "cpu": time.process_time,
        "descriptors": lambda: len(os.listdir("/proc/self/fd")),
        "events": take_events,
        "free": file.freed.set,
        "handlers": set_handlers,
        "invalidate": lambda *args: outcome(requestfilter.invalidate_range, *args),
        "opened": lambda: file.opened,
        "peek": lambda offset, length: data[offset : offset + length].hex(),
        "poke": poke,
        "set": settings.update,
        "statistics": requestfilter.statistics,
        "terminate": pyfuse3.terminate,
    }

    async def control() -> None:
        buffer = b""
        async with trio.lowlevel.FdStream(os.dup(0)) as stream:
            async for piece in stream:
                buffer += piece
                while b"\n" in buffer:
                    line, buffer = buffer.split(b"\n", 1)
                    name, *args = json.loads(line)
                    if name == "invalidate":
                        result = await trio.to_thread.run_sync(commands[name], *args)
                    else:
                        result = commands[name](*args)
                    print(json.dumps(result), flush=True)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(control)
            await pyfuse3.main()
            nursery.cancel_scope.cancel()

    set_handlers(True)
    options = {"fsname=requestfilter", *pyfuse3.default_options}
    pyfuse3.init(file, mountpoint, options)
    print(json.dumps("ready"), flush=True)
    trio.run(main)
    statistics = requestfilter.statistics()
    pyfuse3.close()
    print(
        json.dumps(
            {
                "outstanding": [
                    statistics["outstanding"],
                    requestfilter.statistics()["outstanding"],
                ],
                "attached": requestfilter.attached(),
                "invalidate": outcome(requestfilter.invalidate_range, INO, 0, 1),
                "late_reply": [outcome(requestfilter.reply_offset, h, 0) for h in held],
            }
        ),
        flush=True,
    )


class Mount:
    def __init__(self, mountpoint: Path, environment: dict[str, str] | None = None) -> None:
        mountpoint.mkdir()
        self.mountpoint = mountpoint
        self.file = mountpoint / "file"
        # SNAPFS_TEST_RUNNER: a command to run it under, such as valgrind
        runner = os.environ.get("SNAPFS_TEST_RUNNER", "").split()
        self.process = subprocess.Popen(
            [*runner, sys.executable, __file__, mountpoint],
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.line() == "ready"

    def line(self) -> Any:
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        if not text:
            raise AssertionError(f"the file system died: {self.process.communicate()[1]}")
        return json.loads(text)

    def __call__(self, *command: object) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self.line()

    @contextlib.contextmanager
    def open(
        self, flags: int = os.O_RDWR, name: str = "file", aborted: bool = False
    ) -> Iterator[int]:
        fd = os.open(self.mountpoint / name, flags)
        try:
            yield fd
        finally:
            # flush meets the end of the connection
            with contextlib.suppress(OSError) if aborted else contextlib.nullcontext():
                os.close(fd)

    def finish(self) -> tuple[Any, str]:
        """Wait for the end; what it printed last, and its stderr."""
        assert self.process.stdout is not None
        stdout = self.process.stdout.read()  # communicate() misses what is in its buffer
        stderr = self.process.communicate(timeout=PATIENCE)[1]
        assert self.process.returncode == 0, stderr
        return json.loads(stdout), stderr

    def unmount(self) -> tuple[Any, str]:
        subprocess.run(["fusermount3", "-u", self.mountpoint], check=True)
        return self.finish()

    def kill(self) -> None:
        """Leave nothing behind, whatever happened."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
        subprocess.run(
            ["fusermount3", "-u", "-z", self.mountpoint], check=False, capture_output=True
        )


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline


if __name__ == "__main__":
    serve(sys.argv[1])
