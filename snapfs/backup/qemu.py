"""qcow2 images by QEMU's own programs: qemu-img, and qemu-nbd to read and write them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from ..errors import BackupError
from ..storage.linux import end_with_parent
from .nbd import NbdClient

PACKAGE = "qemu-utils"  # of Debian, for all programs used here
LOCKED = "Is another process using the image"  # what QEMU says of a lock that it does not get
LOCK_SECONDS = 15.0  # for the server of a killed run to finish and let the image go
START_SECONDS = 5.0  # for a server that does not answer to say why
END_SECONDS = 600.0  # for a server to write what is left

# A server that is handed its listening socket as stdin (sd_listen_fds(3)).
_ACTIVATE = 'exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'


def find_program(name: str) -> str:
    """The path of a program; raises BackupError that names the package it comes in."""
    path = shutil.which(name)
    if path is None:
        raise BackupError(f"{name} is missing, which qcow2 takes; apt-get install {PACKAGE}")
    return path


def image_name(path: str) -> str:
    """A file name that QEMU takes for nothing else (a colon makes a protocol of `a:b`)."""
    return os.path.abspath(path)


def backing_name(path: str, of: str) -> str:
    """The name of a backing file relative to the directory of `of`, as it is stored there."""
    directory = os.path.dirname(os.path.abspath(of))
    name = os.path.relpath(os.path.abspath(path), directory)
    return f"./{name}" if ":" in name.split("/")[0] else name


def run(*arguments: str, directory: str | None = None) -> str:
    """Run qemu-img; returns its output, raises BackupError with its complaint.

    It ends when we die, so that the next run does not find it at work; what it
    makes is for its owner's eyes only.
    """
    end = time.monotonic() + LOCK_SECONDS
    while True:
        done = subprocess.run(
            [find_program("qemu-img"), *arguments],
            capture_output=True,
            text=True,
            errors="surrogateescape",
            check=False,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            umask=0o077,
            preexec_fn=end_with_parent(signal.SIGKILL),
        )
        if not done.returncode or LOCKED not in done.stderr or time.monotonic() > end:
            break
        time.sleep(0.2)  # the programs of a run that was killed end in a moment
    if done.returncode:
        reason = done.stderr.strip().removeprefix("qemu-img: ")
        raise BackupError(f"qemu-img {arguments[0]}: {reason or f'status {done.returncode}'}")
    return done.stdout


def create(path: str, size: int, backing: str | None = None, *, alone: bool = False) -> None:
    """A new qcow2 image of `size` bytes, rounded up to 512, over `backing` or empty.

    `alone`: what is below is not opened, however many files that may be.
    """
    over = []
    if backing is not None:
        over = ["-b", backing_name(backing, path), "-F", file_format(backing)]
        over += ["-u"] if alone else []
    run("create", "-q", "-f", "qcow2", *over, image_name(path), str(size))


def file_format(path: str) -> Literal["qcow2", "raw"]:
    """qcow2 or raw, from the first bytes."""
    with open(path, "rb") as file:
        return "qcow2" if file.read(4) == b"QFI\xfb" else "raw"


def layer_name(paths: Sequence[str]) -> str:
    """Some qcow2 files of one directory, the topmost first, without those below.

    What they do not have reads as zeros.  The names are relative to the directory, which
    need not be one that JSON can say.
    """
    found: dict[str, Any] | None = None
    for path in reversed(paths):
        file = {"driver": "file", "filename": os.path.basename(path)}
        found = {"driver": "qcow2", "backing": found, "file": file}
    return "json:" + json.dumps(found)


def layer_map(*paths: str) -> Iterator[dict[str, Any]]:
    """The extents that some qcow2 files have themselves, ascending: start, length, zero, data."""
    text = run("map", "-U", "--output=json", layer_name(paths), directory=_directory(paths[0]))
    for each in json.loads(text):
        if each["present"]:
            yield each


def _directory(path: str) -> str:
    return os.path.dirname(os.path.abspath(path))


def header(path: str) -> tuple[int, str | None]:
    """The virtual size and the backing file of a qcow2 image; raises BackupError if it has none.

    As docs/interop/qcow2.txt of QEMU has it; quicker than a program for each of many files.
    """
    with open(path, "rb") as file:
        head = file.read(32)
        if len(head) < 32 or head[:4] != b"QFI\xfb":
            raise BackupError(f"{path} is no qcow2 image any more")
        offset, length, _bits, size = struct.unpack(">QIIQ", head[8:32])
        file.seek(offset if offset < 1 << 21 else 0)
        backing = file.read(min(length, 1023)) if offset else b""
    return size, os.fsdecode(backing) if offset else None


class Server:
    """A qemu-nbd that serves one qcow2 image to us alone, for as long as we live.

    It gets a connected socket at its start, so nobody else can reach it.  When
    we are killed it is killed as well: it can miss a SIGTERM while it starts, and
    would hold the locks of the image and of those below for ever.  What was
    flushed is safe, and the rest is at worst space that is in use for nothing.
    """

    def __init__(
        self,
        *paths: str,
        alone: bool = False,
        read_only: bool = False,
        unordered: bool = False,
    ) -> None:
        """`alone`: nothing below `paths` is opened, however many files that may be.

        `unordered`: never sync the file, not even to have metadata in an order.

        What is flushed is in the file then, but durable only when the caller syncs
        it; after a power cut before that the image may be spoilt altogether.
        """
        self._path = paths[0]
        assert alone or len(paths) == 1
        self._image = [layer_name(paths)] if alone else ["--format=qcow2", image_name(paths[0])]
        cache = "--cache=unsafe" if unordered else "--cache=writeback"
        self._how = "--read-only" if read_only else cache
        self._process, self.client = self._start_patiently()

    def _start_patiently(self) -> tuple[subprocess.Popen[bytes], NbdClient]:
        """Start; the server of a run that was killed may still have the image locked."""
        end = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                return self._start()
            except BackupError as error:
                if LOCKED not in str(error) or time.monotonic() > end:
                    raise
                time.sleep(0.2)

    def _start(self) -> tuple[subprocess.Popen[bytes], NbdClient]:
        command = [
            find_program("qemu-nbd"),
            "--discard=unmap",
            self._how,
            *self._image,
        ]
        connection, listener = _socket_pair()
        with listener:
            process = subprocess.Popen(
                ["/bin/sh", "-c", _ACTIVATE, "sh", *command],
                stdin=listener.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                preexec_fn=end_with_parent(signal.SIGKILL),  # noqa: PLW1509 - no threads yet
                cwd=_directory(self._path),
                start_new_session=True,  # Ctrl-C is for us; the server ends after us
            )
        try:
            return process, NbdClient(connection)
        except (OSError, BackupError) as error:
            connection.close()
            try:  # it has most likely ended by itself
                complaint = (
                    process.communicate(timeout=START_SECONDS)[1].decode(errors="replace").strip()
                )
            except subprocess.TimeoutExpired:
                process.kill()
                complaint = process.communicate()[1].decode(errors="replace").strip()
            reason = complaint.removeprefix("qemu-nbd: ") or str(error)
            raise BackupError(f"{self._path} cannot be opened: {reason}") from None
        except BaseException:
            connection.close()
            process.kill()
            process.communicate()
            raise

    def finish(self) -> None:
        """End the server; raises BackupError if it could not write everything."""
        self.client.close()
        try:
            complaint = self._process.communicate(timeout=END_SECONDS)[1]
        except subprocess.TimeoutExpired:
            raise BackupError(f"the server of {self._path} does not end") from None
        if self._process.returncode:
            reason = complaint.decode(errors="replace").strip().removeprefix("qemu-nbd: ")
            raise BackupError(f"{self._path}: {reason or 'qemu-nbd failed'}")

    def abandon(self) -> None:
        """End the server, whatever it thinks of it."""
        self.client.close()
        self._process.terminate()
        try:
            self._process.communicate(timeout=LOCK_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: object, *_exception: object) -> Literal[False]:
        if kind is None:
            self.finish()
        else:
            self.abandon()
        return False


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    """A connected socket and the listener that it waits at; its name exists no more."""
    directory = tempfile.mkdtemp(prefix="snapfs-")
    path = os.path.join(directory, "nbd")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        listener.listen(1)
        connection.connect(path)
    except BaseException:
        listener.close()
        connection.close()
        raise
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return connection, listener


def free_leaks(path: str) -> None:
    """Free the space that is in use for nothing since a server was killed."""
    run("check", "-q", "-r", "leaks", "-f", "qcow2", image_name(path))


def resize(path: str, size: int) -> None:
    """Give a qcow2 image another size, rounded up to 512; what is added reads as zeros."""
    run("resize", "-q", "--shrink", "-f", "qcow2", image_name(path), str(-(-size // 512) * 512))
