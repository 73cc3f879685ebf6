"""Terminal: a program on a terminal of some size, what it shows there, and keys."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from tests.support.mounted import PATIENCE

HOME = "\x1b[H"  # where a frame begins
LEAVES = "\x1b[?1049l"  # the screen that is the program's own
SHOWS_CURSOR = "\x1b[?25h"
SEQUENCE = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[()][A-Z0-9])")


class Terminal:
    """A context manager: what still runs at its end is killed."""

    def __init__(
        self, *command: str | Path, columns: int = 80, rows: int = 24, **environment: str
    ) -> None:
        self._fd, theirs = pty.openpty()
        self.output = ""
        self._resize(columns, rows)
        known = {
            name: value for name, value in os.environ.items()
            if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")
        }  # fmt: skip
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *(str(word) for word in command)],
            stdin=theirs, stdout=theirs, stderr=theirs,
            env={**known, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **environment},
        )  # fmt: skip
        os.close(theirs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._fd)

    def _resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def resize(self, columns: int, rows: int) -> None:
        """The window gets another size."""
        self._resize(columns, rows)
        self.process.send_signal(signal.SIGWINCH)

    def press(self, key: str) -> None:
        """A key, such as Ctrl-C: \\x03."""
        os.write(self._fd, key.encode())

    def _read(self, seconds: float) -> bool:
        """Some more of the output; False at its end."""
        if select.select([self._fd], [], [], seconds)[0]:
            try:
                data = os.read(self._fd, 1 << 16)
            except OSError:  # nobody has the other side open
                return False
            self.output += data.decode(errors="replace")
        return True

    def wait_for(self, condition: Callable[[Terminal], bool]) -> None:
        """Return when something is so of what it shows."""
        until = time.monotonic() + PATIENCE
        while not condition(self):
            assert self._read(1.0), f"it has ended: {self.plain[-2000:]}"
            assert time.monotonic() < until, self.plain[-4000:]

    def finish(self) -> int:
        """Its exit status, when it has ended and all is read."""
        until = time.monotonic() + PATIENCE
        while self._read(1.0):
            assert time.monotonic() < until, self.plain[-4000:]
        return self.process.wait(PATIENCE)

    @property
    def plain(self) -> str:
        """All output, without colours and moves of the cursor."""
        return SEQUENCE.sub("", self.output).replace("\r", "")

    @property
    def frame(self) -> list[str]:
        """The lines of the newest frame that is complete."""
        frames = self.output.split(HOME)
        if len(frames) < 3:
            return []
        return SEQUENCE.sub("", frames[-2]).replace("\r", "").rstrip("\n").split("\n")
