"""How an image is served: by snapfs, by QEMU, by XFS, or not at all."""

from __future__ import annotations

import mmap
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SNAPFS = ROOT / ".venv/bin/snapfs"
QEMU = "qemu-storage-daemon"
MIB = 1 << 20
CLUSTER = 1 << 16


def patched(change: str) -> tuple[object, ...]:
    """A program that is snapfs with a change."""
    code = "import mmap, os, sys, time; from snapfs import cli; from snapfs.state import statefiles"
    code += f"\n{change}\n"
    return ROOT / ".venv/bin/python", "-c", f"{code}sys.exit(cli.main(sys.argv[1:]))"


def run(*command: object) -> str:
    """Run a program; its output.  Ends the benchmark if it fails.

    A signal to our process group does not reach it: a daemon that has begun must
    be there to be ended, and who uses a mount must be gone.
    """
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, process_group=0)
    if done.returncode:
        sys.exit(f"bench: {command[0]} failed:\n{done.stderr}")
    return done.stdout


def wait_for_end(pid: int) -> None:
    """Return when a process is gone, be it our child or not."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    select.select([process], [], [])
    os.close(process)


class Serving:
    """The image, and how it is served: each way gives `active` and where the snapshots are."""

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

    @contextmanager
    def snapfs(
        self,
        snapshots: int = 1,
        image: Path | None = None,
        options: str = "durability=process",
        program: tuple[object, ...] = (SNAPFS,),
    ) -> Iterator[tuple[Path, Path]]:
        """Serve by snapfs; gives `active` and the directory of the snapshots."""
        image = image or self.image
        where = self.directory / "mnt"
        where.mkdir(exist_ok=True)
        run(*program, "mount", image, where, "-o", options)
        try:
            for number in range(snapshots):
                (where / f"snapshots/s{number}").touch()
            yield where / "active", where / "snapshots"
        finally:
            for snapshot in (where / "snapshots").iterdir():
                snapshot.unlink()
            run(SNAPFS, "umount", where)
            shutil.rmtree(f"{image}.snapfs")

    @contextmanager
    def tracked(self) -> Iterator[tuple[Path, Path]]:
        """As `snapfs` without snapshots, and with a dirty bitmap."""
        with self.snapfs(0) as (active, snapshots):
            run(SNAPFS, "bitmap", "add", snapshots.parent, "bench")
            yield active, snapshots

    @contextmanager
    def in_pieces(
        self, image: Path, size: int, count: int, length: int
    ) -> Iterator[tuple[Path, Path]]:
        """Serve a sparse image with `count` extents of `length` bytes, made when it is needed."""
        if not image.exists():
            with open(image, "wb") as file:
                file.truncate(size)
                for number in range(count):
                    os.pwrite(file.fileno(), os.urandom(length), number * (size // count))
                os.fsync(file.fileno())
        with self.snapfs(0, image) as served:
            yield served

    def the_large(self) -> Path:
        """An image of 2 GiB, its data in the page cache; made when it is needed."""
        size = 2 << 30
        if not self.large.exists():
            self._fill(self.large, size)
        self._touch_memory(2 * size)  # for what is read, and its copy
        self._read(self.large)
        return self.large

    @contextmanager
    def qemu(self, image: Path | None = None) -> Iterator[tuple[Path, Path]]:
        """Serve by QEMU; gives the live file and the directory of the one snapshot."""
        image = image or self.image
        temp, live, where = (self.directory / name for name in ("temp", "live", "qemu"))
        where.mkdir(exist_ok=True)
        with open(temp, "wb") as file:
            file.truncate(image.stat().st_size)
        live.touch()
        (where / "s0").touch()
        pidfile = self.directory / "pid"
        run(
            QEMU, "--daemonize", "--pidfile", pidfile,
            "--blockdev", f"driver=file,node-name=disk,filename={image}",
            "--blockdev", f"driver=file,node-name=temp,filename={temp},discard=unmap",
            "--blockdev", "driver=copy-before-write,node-name=cbw,file=disk,target=temp",
            "--blockdev", "driver=snapshot-access,node-name=snap,file=cbw",
            "--export", f"type=fuse,id=e1,node-name=cbw,mountpoint={live},writable=on",
            "--export", f"type=fuse,id=e2,node-name=snap,mountpoint={where / 's0'}",
        )  # fmt: skip
        try:
            yield live, where
        finally:
            pid = int(pidfile.read_text())
            os.kill(pid, 15)
            wait_for_end(pid)
            pidfile.unlink(missing_ok=True)
            temp.unlink()

    @contextmanager
    def qemu_plain(self) -> Iterator[tuple[Path, Path]]:
        """Serve the image by QEMU as it is; no snapshots."""
        live, pidfile = self.directory / "live", self.directory / "pid"
        live.touch()
        run(
            QEMU, "--daemonize", "--pidfile", pidfile,
            "--blockdev", f"driver=file,node-name=disk,filename={self.image}",
            "--export", f"type=fuse,id=e1,node-name=disk,mountpoint={live},writable=on",
        )  # fmt: skip
        try:
            yield live, self.directory
        finally:
            pid = int(pidfile.read_text())
            os.kill(pid, 15)
            wait_for_end(pid)
            pidfile.unlink(missing_ok=True)

    @contextmanager
    def bare(self) -> Iterator[tuple[Path, Path]]:
        """The image itself."""
        yield self.image, self.directory

    @contextmanager
    def xfs(self) -> Iterator[tuple[Path, Path]]:
        """The image on XFS on a loop device, with a reflink copy of it as the snapshot."""
        disk, where = self.directory / "xfs.img", self.directory / "xfs"
        where.mkdir(exist_ok=True)
        with open(disk, "wb") as file:
            file.truncate(4 * self.size + (1 << 30))
        run("mkfs.xfs", "-q", "-m", "reflink=1", disk)
        run("mount", "-o", "loop", disk, where)
        try:
            run("cp", self.image, where / "disk.img")
            run("cp", "--reflink=always", where / "disk.img", where / "s0")
            run("sync", "-f", where)
            self._read(where / "disk.img")
            yield where / "disk.img", where
        finally:
            run("umount", where)
            disk.unlink()

    def warm(self, large: bool) -> None:
        """Bring the image's data into the page cache, and what is dirty to the disk.

        Page by page, as small requests leave it, or in `large` folios: both sides find it
        the same.
        """
        run("sync", "-f", self.directory)
        self._touch_memory(4 * self.size)
        if large != self._large_folios:
            with open(self.image, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._large_folios = large
        self._read(self.image, large)

    def _touch_memory(self, size: int) -> None:
        """Use so much of what is free.

        In a virtual machine memory that the guest has not used lately comes from the host,
        page by page: that takes several times as long as a copy, and hits whoever needs it
        first.
        """
        mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_POPULATE).close()

    def _read(self, image: Path, large: bool = False) -> None:
        with open(image, "rb") as file:
            if not large:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            while file.read(MIB):
                pass
