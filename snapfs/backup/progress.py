"""How far a long job is: a bar on a terminal, lines elsewhere, JSON for programs."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, Literal, Protocol

from ..client.documents import document, human

LINE_SECONDS = 60.0  # between two plain lines
STATUS_SECONDS = 1.0  # between two JSON lines


class Wanted(Protocol):
    """What the options of every long job say of its progress."""

    @property
    def progress_fd(self) -> int | None:
        """Where to write lines `N/100`."""

    @property
    def json(self) -> bool:
        """Lines of JSON on stdout."""

    @property
    def quiet(self) -> bool:
        """Nothing by itself."""


class Progress:
    """Counts bytes up to `total`.  A context manager; `advance` is cheap.

    SIGUSR1 prints a line.
    """

    def __init__(self, what: str, total: int, wanted: Wanted, command: str | None = None) -> None:
        """`what` is worked on by `command`, if that is not the same word."""
        self._what = what
        self._command = command or what
        self._total = total
        self._done = 0
        self._fd = wanted.progress_fd
        self._json = wanted.json
        self._quiet = wanted.quiet
        self._began = time.monotonic()
        self._shown_at = self._began
        self._percent = -1
        self._bar: Callable[[int], None] | None = None
        self._end_bar: Callable[[], None] | None = None
        self._before: Any = None

    def __enter__(self) -> Progress:
        self._before = signal.signal(signal.SIGUSR1, lambda *_: self._print_line())
        if fd_is_terminal(2) and not (self._json or self._quiet) and self._fd is None:
            self._start_bar()
        self.advance(0)
        return self

    def _start_bar(self) -> None:
        # Here: it takes a while to import, and scripts do without.
        from . import bar  # noqa: PLC0415

        self._bar, self._end_bar = bar.start(self._what, self._total)

    def advance(self, count: int) -> None:
        """Count some bytes as done."""
        self._done += count
        if self._bar is not None:
            self._bar(count)
        if self._fd is not None:
            self._write_percent()
        now = time.monotonic()
        silent = self._quiet and not self._json
        if self._bar is None and not silent and now - self._shown_at >= self._interval():
            self._shown_at = now
            if self._json:
                print(json.dumps(self._status()), flush=True)
            else:
                self._print_line()

    def _interval(self) -> float:
        return STATUS_SECONDS if self._json else LINE_SECONDS

    def _write_percent(self) -> None:
        percent = 100 if not self._total else min(100, self._done * 100 // self._total)
        if percent > self._percent and self._fd is not None:
            self._percent = percent
            os.write(self._fd, b"%d/100\n" % percent)

    def _status(self) -> dict[str, Any]:
        seconds = time.monotonic() - self._began
        rate = self._done / seconds if seconds > 0 else 0.0
        left = (self._total - self._done) / rate if rate else None
        values = {
            "message_type": "status",
            "what": self._what,
            "bytes_done": self._done,
            "total_bytes": self._total,
            "seconds_elapsed": round(seconds, 1),
            "seconds_remaining": None if left is None else round(left),
        }
        return document(self._command, values)

    def _print_line(self) -> None:
        status = self._status()
        left = status["seconds_remaining"]
        rate = self._done / max(status["seconds_elapsed"], 0.1)
        percent = self._done * 100 // self._total if self._total else 100
        print(
            f"snapfs: {self._what}: {percent} %, {human(self._done)} of {human(self._total)}, "
            f"{human(rate)}/s" + ("" if left is None else f", {left} s left"),
            file=sys.stderr,
        )

    def __exit__(self, *_exception: object) -> Literal[False]:
        signal.signal(signal.SIGUSR1, self._before)
        if self._end_bar is not None:
            self._end_bar()
        return False


def fd_is_terminal(fd: int) -> bool:
    """Is a descriptor a terminal?  False if it is closed."""
    try:
        return os.isatty(fd)
    except OSError:
        return False
