"""Files whose write-back fails: what was not synced is gone, and each description is told once,
and if none has been told so far the next one that is opened, too.

`Losing` stands in for the kernel's part in it (errseq_t): it follows which content of each
file is durable, and `lose` puts that back in the place of what the page cache had, as if the
pages could not be stored, and had been dropped.  Real files else, on a tmpfs.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from snapfs.storage import image, watch

Key = tuple[int, int]  # st_dev, st_ino


class Losing:
    """`on_call` is called before each call that changes, opens or syncs a file."""

    def __init__(self, monkeypatch: Any, on_call: Callable[[], None]) -> None:
        self._on_call = on_call
        self._durable: dict[Key, bytes] = {}
        self._errors: dict[Key, int] = {}  # how often it has failed
        self._told: dict[tuple[int, Key], int] = {}  # the same, as a description was told
        self._seen: dict[Key, int] = {}  # the same, as anybody was told
        self._lock = threading.RLock()
        self._real = {name: getattr(os, name) for name in ("open", "fsync", "fdatasync")}
        monkeypatch.setattr(os, "open", self._open)
        monkeypatch.setattr(os, "fsync", self._sync("fsync"))
        monkeypatch.setattr(os, "fdatasync", self._sync("fdatasync"))
        for name in ("write", "pwrite", "pwritev", "ftruncate", "rename", "unlink"):
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))
        for name in ("fallocate", "copy_clusters"):
            monkeypatch.setattr(image, name, self._counted(getattr(image, name)))
        monkeypatch.setattr(watch, "sync_file_range", self._asked)

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self._on_call()
            return real(*arguments, **options)

        return call

    @staticmethod
    def _key(fd: int) -> Key:
        status = os.fstat(fd)
        return status.st_dev, status.st_ino

    def _open(self, *arguments: Any, **options: Any) -> int:
        self._on_call()
        fd: int = self._real["open"](*arguments, **options)
        key = self._key(fd)
        self._told[fd, key] = self._seen.get(key, 0)
        return fd

    def _tells(self, fd: int) -> bool:
        """Is a description told of a failure now?"""
        key = self._key(fd)
        count = self._errors.get(key, 0)
        told = self._told.get((fd, key), 0)
        self._told[fd, key] = self._seen[key] = count
        return told < count

    def _sync(self, name: str) -> Callable[[int], None]:
        def sync(fd: int) -> None:
            self._on_call()
            with self._lock:
                path = f"/proc/self/fd/{fd}"
                if os.path.isfile(path):
                    self._durable[self._key(fd)] = Path(path).read_bytes()
                if self._tells(fd):
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
            self._real[name](fd)

        return sync

    def _asked(self, fd: int, *_range: int) -> int:
        with self._lock:
            return errno.EIO if self._tells(fd) else 0

    def start(self, *paths: Path) -> None:
        """What these files have now is durable."""
        for path in paths:
            status = path.stat()
            self._durable[status.st_dev, status.st_ino] = path.read_bytes()

    def lose(self, path: Path) -> bool:
        """What of a file was not synced is gone; False: nothing was."""
        with self._lock:
            try:
                fd = self._real["open"](path, os.O_RDWR)
            except FileNotFoundError:
                return False
            try:
                key = self._key(fd)
                size = os.fstat(fd).st_size
                before = self._durable.get(key, b"")[:size].ljust(size, b"\0")
                if before == Path(f"/proc/self/fd/{fd}").read_bytes():
                    return False
                self._errors[key] = self._errors.get(key, 0) + 1
                with os.fdopen(os.dup(fd), "r+b", 0) as file:
                    file.write(before)
                return True
            finally:
                os.close(fd)
