"""A disk that loses power: what is on it is what was synced, and some of the rest.

`Recorder` stands in for the one place that makes each kind of change while a
real store and engine work on real files.  After every change `crash` writes
what a disk may hold at that moment into another directory: unsynced writes
kept or dropped at random, a mapped file in any of its states since its last
sync, the manifest old or new while it is being replaced.
"""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attrs import define, field

from snapfs.state import layerfiles, statefiles
from snapfs.storage import image

MAPPED = ("access", "done", "losses")


@define
class Contents:
    """A data file: what is durable, and the changes since."""

    durable: bytearray
    changes: list[tuple[int, bytes | None, int]] = field(factory=list)  # offset, data, new size
    synced: int = 0  # changes that are in `durable`

    def some(self, chance: random.Random) -> bytes:
        """What the disk may hold."""
        content = bytearray(self.durable)
        keep = chance.random()
        for offset, data, size in self.changes:
            if chance.random() < keep:
                _apply(content, offset, data, size)
        return bytes(content)

    def newest(self) -> int:
        """The number of the newest change, counted from the first ever."""
        return self.synced + len(self.changes)

    def sync(self, newest: int) -> None:
        """The changes up to that number have become durable."""
        count = max(0, newest - self.synced)
        for change in self.changes[:count]:
            _apply(self.durable, *change)
        del self.changes[:count]
        self.synced += count


def _apply(content: bytearray, offset: int, data: bytes | None, size: int) -> None:
    if data is None:
        del content[size:]
        content.extend(bytes(size - len(content)))
    else:
        content.extend(bytes(max(0, offset + len(data) - len(content))))
        content[offset : offset + len(data)] = data


class Recorder:
    """Follows an image and its state directory.  `on_change` is called after every change."""

    def __init__(self, disk: Path, monkeypatch: Any, on_change: Callable[[], None]) -> None:
        self.disk = disk
        self.state = Path(f"{disk}.snapfs")
        self._on_change = on_change
        self._data: dict[str, Contents] = {str(disk): Contents(bytearray(disk.read_bytes()))}
        self._mapped: dict[str, list[bytes]] = {}  # states since the last sync, oldest first
        # Files are made and synced in a thread: a state that was read before one of its
        # syncs, as that a file was empty, must not be entered after it.
        self._looking = threading.Lock()
        self._manifests: list[bytes] = [b""]  # possible ones
        self._syncs: Counter[str] = Counter()  # fdatasync(2) that succeeded, by path
        self._patch(monkeypatch)

    # Hooks

    def _patch(self, monkeypatch: Any) -> None:
        for name in ("pwrite", "punch", "zero", "truncate", "copy_to", "flush"):
            real = getattr(image.FileImage, name)
            monkeypatch.setattr(image.FileImage, name, self._wrapped(name, real))
        real_sync, real_replace = layerfiles.MappedFile.sync, statefiles.replace_file
        real_sync_file, real_fdatasync = statefiles.sync_file, os.fdatasync

        def fdatasync(fd: int) -> None:
            real_fdatasync(fd)
            self._syncs[_path(fd)] += 1

        async def sync(file: Any) -> None:
            if file.closed:  # its layer is gone
                return await real_sync(file)
            opened = file.fd < 0  # for each sync, by its name
            path = f"{_path(file.directory)}/{file.name}" if opened else _path(file.fd)
            count, before = self._look(path), self._syncs[path]
            await real_sync(file)
            if self._syncs[path] > before:
                self._synced(path, count)
            self._on_change()

        def sync_file(parent: int, name: str) -> None:
            path = f"{_path(parent)}/{name}"
            real_sync_file(parent, name)
            if name != "temp":
                self._synced(path, self._look(path))
            else:
                contents = self._data.get(path)
                if contents is None:
                    contents = Contents(bytearray(os.stat(path).st_size))
                    self._data[path] = contents
                contents.sync(contents.newest())

        def replace_file(parent: int, name: str, data: bytes) -> None:
            self._manifests.append(data)
            real_replace(parent, name, data)
            self._manifests = [data]

        monkeypatch.setattr(os, "fdatasync", fdatasync)
        monkeypatch.setattr(layerfiles.MappedFile, "sync", sync)
        monkeypatch.setattr(statefiles, "sync_file", sync_file)
        monkeypatch.setattr(statefiles, "replace_file", replace_file)

    def _wrapped(self, name: str, real: Any) -> Any:
        async def call(file: image.FileImage, *arguments: Any) -> Any:
            path = _path(file.fd)
            contents = self._contents(path, file.fd)
            self._on_change()  # bits may have changed since the last
            if name == "flush":
                newest, before = contents.newest(), self._syncs[path]
                result = await real(file)
                if self._syncs[path] > before:
                    contents.sync(newest)
            elif name == "copy_to" and arguments[-1] is True:  # durable when it returns
                path = _path(arguments[0].fd)
                contents = self._contents(path, arguments[0].fd)
                offset, length = arguments[1:3]
                contents.changes.append((offset, os.pread(file.fd, length, offset), 0))
                newest, before = contents.newest(), self._syncs[path]
                result = await real(file, *arguments)
                if self._syncs[path] > before:
                    contents.sync(newest)
            else:
                target = arguments[0] if name == "copy_to" else file
                path = _path(target.fd)
                contents = self._contents(path, target.fd)
                if name == "pwrite":  # it may be there before it returns
                    arguments = (arguments[0], bytes(arguments[1]))
                    contents.changes.append((*arguments, 0))
                result = await real(file, *arguments)
                if name == "truncate":
                    contents.changes.append((0, None, arguments[0]))
                else:  # as it is now: other writes may have come in between
                    offset, length = arguments[1:3] if name == "copy_to" else arguments[:2]
                    if name == "pwrite":
                        length = len(arguments[1])
                    contents.changes.append((offset, os.pread(target.fd, length, offset), 0))
            self._on_change()
            return result

        return call

    def _contents(self, path: str, fd: int) -> Contents:
        if path not in self._data:
            self._data[path] = Contents(bytearray(os.fstat(fd).st_size))
        return self._data[path]

    def _look(self, path: str) -> int:
        """Note the state of a mapped file; the number of the newest one."""
        with self._looking:
            try:
                now = Path(path).read_bytes()
            except FileNotFoundError:  # removed in a thread, just now
                return len(self._mapped.setdefault(path, [b""])) - 1
            states = self._mapped.setdefault(path, [bytes(len(now))])
            if states[-1] != now:
                states.append(now)
            return len(states) - 1

    def _synced(self, path: str, number: int) -> None:
        wanted = self._mapped[path][number]
        del self._mapped[path][:number]
        assert self._mapped[path][0] == wanted

    # The disk

    def crash(self, where: Path, chance: random.Random) -> Path:
        """Write a disk that may be found now; returns its image.

        Raises FileNotFoundError if a thread is removing files now.
        """
        where.mkdir()
        disk = where / "disk.img"
        disk.write_bytes(self._data[str(self.disk)].some(chance))
        state = Path(f"{disk}.snapfs")
        (state / "snapshots").mkdir(parents=True, mode=0o700)
        state.chmod(0o700)
        (state / "manifest.json").write_bytes(chance.choice(self._manifests))
        (state / "activity").write_bytes((self.state / "activity").read_bytes())
        for layer in (self.state / "snapshots").iterdir():
            copy = state / "snapshots" / layer.name
            copy.mkdir(mode=0o700)
            for name in MAPPED:
                if (layer / name).exists():  # rmtree(3) of a layer may be under way
                    self._look(str(layer / name))
                    (copy / name).write_bytes(chance.choice(self._mapped[str(layer / name)]))
            if (layer / "temp").exists():
                temp = self._data.get(str(layer / "temp"))
                size = (layer / "temp").stat().st_size
                (copy / "temp").write_bytes(temp.some(chance) if temp else bytes(size))
        (state / "bitmaps").mkdir(mode=0o700)
        for bitmap in (self.state / "bitmaps").iterdir():
            self._look(str(bitmap))
            content = chance.choice(self._mapped[str(bitmap)])
            (state / "bitmaps" / bitmap.name).write_bytes(content)
        return disk


def _path(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)")
