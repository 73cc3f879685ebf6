"""A program on a terminal, of which everything that it prints is read."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Sequence
from pathlib import Path

from tests.support.mounted import PATIENCE

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\x1b\][^\x07]*\x07")
COLOUR = re.compile(r"\x1b\[[0-9;]*(3[0-8]|9[0-7])[0-9;]*m")


class Terminal:
    """One, with the program on it.  A context manager: the program is ended at the end."""

    def __init__(
        self, command: Sequence[str | Path], *, columns: int = 80, **environment: str
    ) -> None:
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        known = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CI")
        inherited = {key: value for key, value in os.environ.items() if key not in known}
        self.text = ""
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *(str(word) for word in command)],
            stdin=theirs, stdout=theirs, stderr=theirs,
            env={**inherited, "TERM": "xterm", **environment},
        )  # fmt: skip
        os.close(theirs)

    def read_until(self, wanted: str) -> None:
        """Read until the text has this, escapes left out; raises AssertionError at the end."""
        end = time.monotonic() + PATIENCE
        while wanted not in self.plain():
            assert self._read(end - time.monotonic()), f"no {wanted!r} in {self.text!r}"

    def type(self, text: str) -> None:
        """What somebody types."""
        os.write(self.ours, text.encode())

    def finish(self) -> int:
        """Read to the end; the exit status."""
        end = time.monotonic() + PATIENCE
        while self._read(end - time.monotonic()):
            pass
        return self.process.wait(timeout=PATIENCE)

    def _read(self, seconds: float) -> bool:
        if not select.select([self.ours], [], [], max(0.0, seconds))[0]:
            raise AssertionError(f"it hangs: {self.text!r}")
        try:
            data = os.read(self.ours, 65536)
        except OSError:  # EIO: nobody has the other end any more
            return False
        self.text += data.decode(errors="replace")
        return bool(data)

    def plain(self) -> str:
        """The text without escapes."""
        return ESCAPE.sub("", self.text)

    def lines(self) -> list[str]:
        """What was on a line at some time."""
        return [line for line in re.split(r"[\r\n]+", self.plain()) if line]

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)
