"""qcow2 images by QEMU's own programs: qemu-img, and qemu-nbd to read and write them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from ..errors import BackupError, KeyRefused
from ..storage.linux import end_with_parent
from .keys import SECRET, Key
from .nbd import NbdClient
from .qcow2 import Qcow2File

PACKAGE = "qemu-utils"  # of Debian, for all programs used here
LOCKED = "Is another process using the image"  # what QEMU says of a lock that it does not get
WRONG_KEY = "Invalid password, cannot unlock"  # what QEMU says of another key
KEY_MS = 10  # what it spends on making a weak key strong: ours are strong, keys.py
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


def _refuse_key(complaint: str, image: str) -> None:
    """Raises KeyRefused if that is what QEMU complains of."""
    if WRONG_KEY in complaint:
        raise KeyRefused(f"{image} is encrypted with another key than the one that was given")


def image_name(path: str) -> str:
    """A file name that QEMU takes for nothing else (a colon makes a protocol of `a:b`)."""
    return os.path.abspath(path)


def backing_name(path: str, of: str) -> str:
    """The name of a backing file relative to the directory of `of`, as it is stored there."""
    directory = os.path.dirname(os.path.abspath(of))
    name = os.path.relpath(os.path.abspath(path), directory)
    return f"./{name}" if ":" in name.split("/")[0] else name


def run(*arguments: str, directory: str | None = None, image: str = "the image") -> str:
    """Run qemu-img; returns its output, raises BackupError with its complaint.

    It ends when we die, so that the next run does not find it at work; what it
    makes is for its owner's eyes only.  Raises KeyRefused, which names `image`.
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
        _refuse_key(done.stderr, image)
        reason = done.stderr.strip().removeprefix("qemu-img: ")
        raise BackupError(f"qemu-img {arguments[0]}: {reason or f'status {done.returncode}'}")
    return done.stdout


def create(
    path: str,
    size: int,
    backing: str | None = None,
    *,
    alone: bool = False,
    cluster: int | None = None,
    compress: bool = False,
    key: Key | None = None,
) -> None:
    """A new qcow2 image of `size` bytes, rounded up to 512, over `backing` or empty.

    `alone`: what is below is not opened, however many files that may be.  `compress`: what is
    compressed is so by zstd.  `key`: it is encrypted.
    """
    over = []
    if backing is not None:
        over = ["-b", backing_name(backing, path), "-F", file_format(backing)]
        over += ["-u"] if alone else []
    options = [f"cluster_size={cluster}"] if cluster else []
    options += ["compression_type=zstd"] if compress else []
    if key is not None:
        options += [
            "encrypt.format=luks",
            f"encrypt.key-secret={SECRET}",
            f"encrypt.iter-time={KEY_MS}",
        ]
        over += key.objects
    over += ["-o", ",".join(options)] if options else []
    run("create", "-q", "-f", "qcow2", *over, image_name(path), str(size))


def file_format(path: str) -> Literal["qcow2", "raw"]:
    """qcow2 or raw, from the first bytes."""
    with open(path, "rb") as file:
        return "qcow2" if file.read(4) == b"QFI\xfb" else "raw"


def layer_name(paths: Sequence[str], *, compress: bool = False) -> str:
    """Some qcow2 files of one directory, the topmost first, without those below.

    What they do not have reads as zeros.  The names are relative to the directory, which
    need not be one that JSON can say.  `compress`: what is written is compressed.
    """
    found: dict[str, Any] | None = None
    for path in reversed(paths):
        file = {"driver": "file", "filename": os.path.basename(path)}
        found = {"driver": "qcow2", "backing": found, "file": file}
        if is_encrypted(path):
            found["encrypt"] = {"format": "luks", "key-secret": SECRET}
    if compress:
        found = {"driver": "compress", "file": found}
    return "json:" + json.dumps(found)


def is_encrypted(path: str) -> bool:
    """Does it take a key to read a file?  False if it is none that can be read."""
    try:
        with Qcow2File(path) as file:
            return file.encrypted
    except (OSError, BackupError):
        return False


def key_objects(paths: Sequence[str], key: Key | None) -> list[str]:
    """Arguments that some files take; raises KeyRefused if that is a key and there is none."""
    for path in paths:
        if is_encrypted(path):
            if key is None:
                raise KeyRefused(f"{path} is encrypted; give its --key-file")
            return key.objects
    return []


def try_key(paths: Sequence[str], key: Key | None) -> None:
    """Raises KeyRefused if some files of one directory cannot be read with a key."""
    run_on(paths, key, "map", "-U", "--output=json", "--max-length=512")


def layer_map(*paths: str, key: Key | None = None) -> Iterator[dict[str, Any]]:
    """The extents that some qcow2 files have themselves, ascending: start, length, zero, data."""
    text = run_on(paths, key, "map", "-U", "--output=json")
    for each in json.loads(text):
        if each["present"]:
            yield each


def run_on(
    paths: Sequence[str], key: Key | None, *arguments: str, behind: Sequence[str] = ()
) -> str:
    """Run qemu-img on some files of one directory, without those below.

    `behind`: arguments that come behind the image.
    """
    image = layer_name(paths)
    objects = key_objects(paths, key)
    return run(
        arguments[0], *objects, *arguments[1:], image, *behind,
        directory=_directory(paths[0]), image=paths[0],
    )  # fmt: skip


def _directory(path: str) -> str:
    return os.path.dirname(os.path.abspath(path))


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
        connections: int = 1,
        compress: bool = False,
        key: Key | None = None,
    ) -> None:
        """`alone`: nothing below `paths` is opened, however many files that may be.

        `unordered`: never sync the file, not even to have metadata in an order.

        What is flushed is in the file then, but durable only when the caller syncs
        it; after a power cut before that the image may be spoilt altogether.

        `compress`: what is written is compressed: whole clusters only, and each only once.
        `connections`: so many `clients` there are; to be read by that many threads.
        """
        self._path = paths[0]
        assert alone or len(paths) == 1
        self._image = ["--format=qcow2", image_name(paths[0])]
        if alone:
            self._image = [*key_objects(paths, key), layer_name(paths, compress=compress)]
        cache = "--cache=unsafe" if unordered else "--cache=writeback"
        self._how = "--read-only" if read_only else cache
        self._connections = connections
        self._process, self.clients = self._start_patiently()
        self.client = self.clients[0]

    def _start_patiently(self) -> tuple[subprocess.Popen[bytes], tuple[NbdClient, ...]]:
        """Start; the server of a run that was killed may still have the image locked."""
        end = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                return self._start()
            except BackupError as error:
                if LOCKED not in str(error) or time.monotonic() > end:
                    raise
                time.sleep(0.2)

    def _start(self) -> tuple[subprocess.Popen[bytes], tuple[NbdClient, ...]]:
        command = [
            find_program("qemu-nbd"),
            "--discard=unmap",
            f"--shared={self._connections}",
            self._how,
            *self._image,
        ]
        connections, listener = _connected(self._connections)
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
            return process, tuple(NbdClient(each) for each in connections)
        except (OSError, BackupError) as error:
            _close(connections)
            try:  # it has most likely ended by itself
                complaint = (
                    process.communicate(timeout=START_SECONDS)[1].decode(errors="replace").strip()
                )
            except subprocess.TimeoutExpired:
                process.kill()
                complaint = process.communicate()[1].decode(errors="replace").strip()
            _refuse_key(complaint, self._path)
            reason = complaint.removeprefix("qemu-nbd: ") or str(error)
            raise BackupError(f"{self._path} cannot be opened: {reason}") from None
        except BaseException:
            _close(connections)
            process.kill()
            process.communicate()
            raise

    def finish(self) -> None:
        """End the server; raises BackupError if it could not write everything."""
        for client in self.clients:
            client.close()
        try:
            complaint = self._process.communicate(timeout=END_SECONDS)[1]
        except subprocess.TimeoutExpired:
            raise BackupError(f"the server of {self._path} does not end") from None
        if self._process.returncode:
            reason = complaint.decode(errors="replace").strip().removeprefix("qemu-nbd: ")
            raise BackupError(f"{self._path}: {reason or 'qemu-nbd failed'}")

    def abandon(self) -> None:
        """End the server, whatever it thinks of it."""
        for client in self.clients:
            client.close()
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


def _connected(count: int) -> tuple[list[socket.socket], socket.socket]:
    """Connected sockets and the listener that they wait at; its name exists no more."""
    directory = tempfile.mkdtemp(prefix="snapfs-")
    path = os.path.join(directory, "nbd")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connections: list[socket.socket] = []
    try:
        listener.bind(path)
        listener.listen(count)
        for _ in range(count):
            connections.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            connections[-1].connect(path)
    except BaseException:
        _close([listener, *connections])
        raise
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return connections, listener


def _close(sockets: list[socket.socket]) -> None:
    for each in sockets:
        each.close()


def free_leaks(path: str, key: Key | None = None) -> None:
    """Free the space that is in use for nothing since a server was killed."""
    if key is None:
        run("check", "-q", "-r", "leaks", "-f", "qcow2", image_name(path))
    else:
        run_on([path], key, "check", "-q", "-r", "leaks")


def resize(paths: Sequence[str], size: int, key: Key | None = None) -> None:
    """Give the first of some qcow2 files another size, rounded up to 512.

    What is added reads as zeros.  Those below it are among them, or of no account.
    """
    length = str(-(-size // 512) * 512)
    run_on(paths, key, "resize", "-q", "--shrink", behind=[length])
