"""A FUSE file system in a process of its own (memoryfs.py) that can be made to hang.

While it does, no call on it returns that needs an answer of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Hanging:
    """The process of such a file system, mounted on `where`."""

    def __init__(self, where: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("memoryfs.py"), where], stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"mounted\n"
        (where / "closed").touch()

    def hang(self) -> None:
        """Answer nothing from now on."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def go_on(self) -> None:
        """Answer again."""
        self._process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """What still waits fails."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def hanging(where: Path) -> Iterator[Hanging]:
    """Mounted during the block."""
    where.mkdir()
    storage = Hanging(where)
    try:
        yield storage
    finally:
        storage.end()
        subprocess.run(["umount", "-l", where], check=False)
