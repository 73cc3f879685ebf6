"""How an image is served: by a build of snapfs, by QEMU, by XFS, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .builds import Build, run, wait_for_end
from .images import Images

QEMU = "qemu-storage-daemon"

Served = Iterator[tuple[Path, Path]]


class Serving:
    """The images, and how they are served: each way gives `active` and where the snapshots are.

    `build`: the snapfs that serves, and whose commands are used.
    """

    def __init__(self, images: Images, build: Build) -> None:
        self.images = images
        self.build = build
        self.directory = images.directory
        self.size = images.size
        self.image = images.image

    @contextmanager
    def snapfs(
        self,
        snapshots: int = 1,
        image: Path | None = None,
        options: str = "durability=process",
        program: tuple[object, ...] = (),
    ) -> Served:
        """Serve by snapfs, or by a `program` that is like it."""
        image = image or self.image
        where = self.directory / "mnt"
        where.mkdir(exist_ok=True)
        run(*(program or (self.build.snapfs,)), "mount", image, where, "-o", options)
        try:
            for number in range(snapshots):
                (where / f"snapshots/s{number}").touch()
            yield where / "active", where / "snapshots"
        finally:
            # Nobody waits for what will be thrown away to be written back.
            pid = self.daemon(where / "snapshots")
            os.kill(pid, signal.SIGKILL)
            wait_for_end(pid)
            run("umount", "-l", where)  # of a daemon that is dead; snapfs would say so, and fail
            shutil.rmtree(f"{image}.snapfs")

    def daemon(self, snapshots: Path) -> int:
        """The process that serves."""
        if (self.directory / "pid").exists():
            return int((self.directory / "pid").read_text())
        status = run(self.build.snapfs, "status", snapshots.parent, "--json")
        return int(json.loads(status)["mount"]["pid"])

    @contextmanager
    def snapfs_on(self, kind: str, snapshots: int) -> Served:
        """As `snapfs`, image and state on a file system of their own."""
        with self.images.on(kind) as image, self.snapfs(snapshots, image) as served:
            yield served

    @contextmanager
    def tracked(self) -> Served:
        """As `snapfs` without snapshots, and with a dirty bitmap."""
        with self.snapfs(0) as (active, snapshots):
            run(self.build.snapfs, "bitmap", "add", snapshots.parent, "bench")
            yield active, snapshots

    @contextmanager
    def qemu(self, image: Path | None = None) -> Served:
        """Serve by QEMU; gives the live file and the directory of the one snapshot."""
        image = image or self.image
        temp = image.with_name("temp")
        live, where = (self.directory / name for name in ("live", "qemu"))
        where.mkdir(exist_ok=True)
        with open(temp, "wb") as file:
            file.truncate(image.stat().st_size)
        live.touch()
        (where / "s0").touch()
        with ExitStack() as stack:
            stack.callback(temp.unlink)
            stack.enter_context(
                self._storage_daemon(
                    "--blockdev", f"driver=file,node-name=disk,filename={image}",
                    "--blockdev", f"driver=file,node-name=temp,filename={temp},discard=unmap",
                    "--blockdev", "driver=copy-before-write,node-name=cbw,file=disk,target=temp",
                    "--blockdev", "driver=snapshot-access,node-name=snap,file=cbw",
                    "--export", f"type=fuse,id=e1,node-name=cbw,mountpoint={live},writable=on",
                    "--export", f"type=fuse,id=e2,node-name=snap,mountpoint={where / 's0'}",
                )
            )  # fmt: skip
            yield live, where

    @contextmanager
    def qemu_plain(self, image: Path | None = None) -> Served:
        """Serve the image by QEMU as it is; no snapshots."""
        live = self.directory / "live"
        live.touch()
        with self._storage_daemon(
            "--blockdev", f"driver=file,node-name=disk,filename={image or self.image}",
            "--export", f"type=fuse,id=e1,node-name=disk,mountpoint={live},writable=on",
        ):  # fmt: skip
            yield live, self.directory

    @contextmanager
    def qemu_on(self, kind: str, snapshots: int) -> Served:
        """As `qemu`, or `qemu_plain` without snapshots, on a file system of its own."""
        serve = self.qemu if snapshots else self.qemu_plain
        with self.images.on(kind) as image, serve(image) as served:
            yield served

    @contextmanager
    def _storage_daemon(self, *options: str) -> Iterator[None]:
        pidfile = self.directory / "pid"
        run(QEMU, "--daemonize", "--pidfile", pidfile, *options)
        try:
            yield
        finally:
            pid = int(pidfile.read_text())
            os.kill(pid, 15)
            wait_for_end(pid)
            pidfile.unlink(missing_ok=True)

    @contextmanager
    def bare(self) -> Served:
        """The image itself."""
        yield self.image, self.directory

    @contextmanager
    def xfs(self) -> Served:
        """The image on XFS, with a reflink copy of it as the snapshot."""
        with self.images.on("XFS") as image:
            run("cp", "--reflink=always", image, image.with_name("s0"))
            run("sync", "-f", image.parent)
            yield image, image.parent
