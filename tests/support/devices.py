"""File systems that go away and come back: on loop devices, shut down, frozen."""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.mounted import PATIENCE, run

FS_IOC_SHUTDOWN = 0x8004587D  # linux/fs.h
NOLOGFLUSH = 2  # FS_SHUTDOWN_FLAGS_NOLOGFLUSH: nothing more is stored, not even the journal


def when_free(*command: str | Path) -> None:
    """Run it once the processes of a dead daemon are gone, its witness the last of them."""
    end = time.monotonic() + PATIENCE
    while run(*command, check=False).returncode:
        assert time.monotonic() < end, command
        time.sleep(0.05)


class Device:
    """A file system on a loop device, which is mounted on `where`."""

    def __init__(self, file: Path, where: Path, kind: str, options: tuple[str, ...]) -> None:
        self.where = where
        self._loop = run("losetup", "--find", "--show", file).stdout.strip()
        where.mkdir(exist_ok=True)
        run(f"mkfs.{kind}", "-q", *options, self._loop)
        self.mount()

    def mount(self) -> None:
        run("mount", self._loop, self.where)

    def unmount(self) -> None:
        when_free("umount", self.where)

    def shut_down(self) -> None:
        """What is not stored is gone, and all calls fail from now on."""
        fd = os.open(self.where, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, FS_IOC_SHUTDOWN, struct.pack("I", NOLOGFLUSH))
        finally:
            os.close(fd)

    def freeze(self) -> None:
        run("fsfreeze", "-f", self.where)

    def thaw(self) -> None:
        run("fsfreeze", "-u", self.where)

    def end(self) -> None:
        """Unmount it, if it is mounted, and let go of the device."""
        run("fsfreeze", "-u", self.where, check=False)
        while run("umount", self.where, check=False).returncode == 0:
            pass
        run("losetup", "--detach", self._loop)


@contextmanager
def device(
    where: Path, kind: str = "ext4", mib: int = 400, options: tuple[str, ...] = ()
) -> Iterator[Device]:
    """A new one during the block, in a file beside it; `options` are those of mkfs."""
    file = where.with_name(f"{where.name}.device")
    with open(file, "wb") as new:
        new.truncate(mib << 20)
    made = Device(file, where, kind, options)
    try:
        yield made
    finally:
        made.end()
