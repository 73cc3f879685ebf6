"""The images that are served: how they are made, and what of them is in the page cache."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .builds import run

MIB = 1 << 20
GIB = 1 << 30
MAKE = {"XFS": ("mkfs.xfs", "-q", "-m", "reflink=1"), "btrfs": ("mkfs.btrfs", "-q")}


class Images:
    """Images in one directory, most of them made when they are needed."""

    def __init__(self, directory: Path, size: int) -> None:
        self.directory = directory
        self.size = size
        self.image = directory / "disk.img"
        self.other = directory / "tebibyte.img"
        self.sparse = directory / "sparse.img"  # 16 GiB, half of it data
        self.pieces = directory / "pieces.img"  # 1 TiB, 100,000 extents of data
        self.large = directory / "large.img"  # 2 GiB
        self._large_folios = False  # how the image's data is in the page cache

    def prepare(self) -> None:
        self._fill(self.image, self.size)
        with open(self.other, "wb") as file:
            file.truncate(1 << 40)

    def _fill(self, image: Path, size: int) -> None:
        with open(image, "wb") as file:
            for _ in range(size // MIB):
                file.write(os.urandom(MIB))
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def in_pieces(self, image: Path, size: int, count: int, length: int) -> Path:
        """A sparse image with `count` extents of `length` bytes."""
        if not image.exists():
            with open(image, "wb") as file:
                file.truncate(size)
                for number in range(count):
                    os.pwrite(file.fileno(), os.urandom(length), number * (size // count))
                os.fsync(file.fileno())
        return image

    def the_large(self) -> Path:
        """An image of 2 GiB, its data in the page cache."""
        size = 2 * GIB
        if not self.large.exists():
            self._fill(self.large, size)
        self._touch_memory(2 * size)  # for what is read, and its copy
        self._read(self.large, large=False)
        return self.large

    @contextmanager
    def on(self, kind: str) -> Iterator[Path]:
        """A copy of the image on a file system of its own: tmpfs, or one of MAKE in a file.

        It is in the page cache as the image is.  Nothing of it stays, whatever ends this.
        """
        disk, where = self.directory / f"{kind}.img", self.directory / kind
        room = 4 * self.size + GIB
        where.mkdir(exist_ok=True)
        try:
            if kind == "tmpfs":
                run("mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", where)
            else:
                with open(disk, "wb") as file:
                    file.truncate(room)
                run(*MAKE[kind], disk)
                run("mount", "-o", "loop", disk, where)  # detached when it is unmounted
            image = where / "disk.img"
            run("cp", self.image, image)
            run("sync", "-f", where)
            self._forget(image)
            self._read(image, self._large_folios)
            yield image
        finally:
            if os.path.ismount(where):
                run("umount", where)
            disk.unlink(missing_ok=True)

    def warm(self, large: bool) -> None:
        """Bring the image's data into the page cache, and what is dirty to the disk.

        Page by page, as small requests leave it, or in `large` folios: all sides find it
        the same.
        """
        run("sync", "-f", self.directory)
        self._touch_memory(4 * self.size)
        if large != self._large_folios:
            self._forget(self.image)
            self._large_folios = large
        self._read(self.image, large)

    def _touch_memory(self, size: int) -> None:
        """Use so much of what is free.

        In a virtual machine memory that the guest has not used lately comes from the host,
        page by page: that takes several times as long as a copy, and hits whoever needs it
        first.
        """
        mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_POPULATE).close()

    def _forget(self, image: Path) -> None:
        with open(image, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _read(self, image: Path, large: bool) -> None:
        with open(image, "rb") as file:
            if not large:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            while file.read(MIB):
                pass
