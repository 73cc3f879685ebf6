"""A daemon in the foreground with a part of it replaced, to make things go wrong."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support.mounted import Mounted

START = """
import os, sys
arguments = sys.argv[1:]
{patch}
from snapfs import cli
sys.exit(cli.main(["mount", *arguments]))
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


class Patched:
    """Runs `patch` in the daemon's process before it mounts.

    There `reached()` tells us and waits for our `go`.
    """

    HOLD = """
reached_fd, go_fd = int(arguments.pop(0)), int(arguments.pop(0))
def reached():
    os.write(reached_fd, b"x")
    os.read(go_fd, 1)
"""

    def __init__(self, disk: Mounted, patch: str) -> None:
        self._reached, reached = os.pipe()
        go, self._go = os.pipe()
        ready, told = os.pipe()
        options = [word for option in disk.all_options for word in ("-o", option)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", START.format(patch=self.HOLD + patch), str(reached), str(go),
             disk.image, disk.mountpoint, *options, "-f", "--ready-fd", str(told)],
            pass_fds=(reached, go, told),
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        for fd in (reached, go, told):
            os.close(fd)
        assert os.read(ready, 9) == b"READY\n"
        os.close(ready)

    def wait_reached(self) -> None:
        """Return when the daemon has come to a `reached()`."""
        assert os.read(self._reached, 1)

    def go(self) -> None:
        """Let every `reached()`, also later ones, return."""
        os.close(self._go)
        self._go = -1

    def finish(self) -> tuple[int, str]:
        """Exit status and what was logged, when the daemon has ended."""
        stderr = self.process.communicate(timeout=60)[1]
        for fd in (self._reached, self._go):
            if fd >= 0:
                os.close(fd)
        return self.process.returncode, stderr
