"""snapfs with a part of it replaced: to make things go wrong, or to hold them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO, ClassVar

from tests.support.mounted import PATIENCE, Mounted

START = """
import os, sys
reached_fd, go_fd, verb, *arguments = sys.argv[1:]
reached_fd, go_fd = int(reached_fd), int(go_fd)
def reached():
    os.write(reached_fd, b"x")
    os.read(go_fd, 1)
{patch}
from snapfs import cli
sys.exit(cli.main([verb, *arguments]))
"""

# Copies of the clusters from 2 MiB on hang until told.
SLOW = """
import snapfs.storage.image as image
copy = image.copy_clusters
def slow(source, target, offset, *rest):
    if offset >= 2 << 20:
        reached()
    return copy(source, target, offset, *rest)
image.copy_clusters = slow
"""

# Time counts, for copies and for the end of the daemon, only while the file IMAGE.hurry is there.
UNHURRIED = """
import attrs, signal
from snapfs.engine import copier
hurry = arguments[0] + ".hurry"
preserve, alarm = copier.Copier.preserve, signal.alarm
async def unhurried(self, first, stop):
    meant = self.__dict__.setdefault("meant", self._settings)
    self._settings = meant if os.path.exists(hurry) else attrs.evolve(meant, cbw_timeout=0)
    await preserve(self, first, stop)
copier.Copier.preserve = unhurried
signal.alarm = lambda seconds: alarm(seconds if os.path.exists(hurry) else 0)
"""


def hurry(disk: Mounted, on: bool) -> None:
    """Let timeouts of an UNHURRIED daemon count from now on, or none that begins from now on."""
    file = Path(f"{disk.image}.hurry")
    file.touch() if on else file.unlink()


def held_copy(position: int) -> str:
    """Copies and backups are held before they take what lies at a position or behind it.

    What comes before it is durable then, if the copy makes anything durable on its way.
    """
    return f"""
from snapfs.backup import copying
copying.CHECKPOINT_BYTES = 1
copy = copying.Copying._copy
def held(self, start, stop):
    if start >= {position}:
        reached()
    copy(self, start, stop)
copying.Copying._copy = held
"""


class Program:
    """A command of snapfs, a verb and its `arguments`, that runs `patch` first.

    There `reached()` tells us and waits for our `go`.
    """

    _running: ClassVar[list[Program]] = []

    def __init__(
        self,
        patch: str,
        *arguments: str | Path,
        pass_fds: tuple[int, ...] = (),
        stdout: int | BinaryIO = subprocess.PIPE,
    ) -> None:
        self._reached, reached = os.pipe()
        go, self._go = os.pipe()
        self.output = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", START.format(patch=patch), str(reached), str(go), *arguments],
            pass_fds=(reached, go, *pass_fds),
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )
        for fd in (reached, go, *pass_fds):
            os.close(fd)
        Program._running.append(self)

    def wait_reached(self) -> None:
        """Return when it has come to a `reached()`."""
        assert os.read(self._reached, 1), self.process.communicate()[1]

    def go(self) -> None:
        """Let every `reached()`, also later ones, return."""
        os.close(self._go)
        self._go = -1

    def end(self, number: int) -> None:
        """Send a signal, and wait for what it does."""
        self.process.send_signal(number)
        self.finish()

    def finish(self) -> tuple[int, str]:
        """Exit status and stderr, when it has ended; stdout is in `output` then."""
        self.output, stderr = self.process.communicate(timeout=PATIENCE)
        for fd in (self._reached, self._go):
            if fd >= 0:
                os.close(fd)
        self._reached = self._go = -1
        Program._running.remove(self)
        return self.process.returncode, stderr

    @classmethod
    def end_all(cls) -> None:
        """After a test: what one that failed has left."""
        for each in list(cls._running):
            each.end(signal.SIGKILL)


class Patched(Program):
    """A daemon in the foreground that runs `patch` before it mounts."""

    def __init__(self, disk: Mounted, patch: str) -> None:
        ready, told = os.pipe()
        options = [word for option in disk.all_options for word in ("-o", option)]
        super().__init__(
            patch, "mount", disk.image, disk.mountpoint, *options, "-f", "--ready-fd", str(told),
            pass_fds=(told,),
        )  # fmt: skip
        said = os.read(ready, 9)
        os.close(ready)
        assert said == b"READY\n", self.process.communicate()[1]
