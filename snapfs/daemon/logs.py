"""The daemon's log, which nobody waits for.

stderr may be a pipe that nobody empties, and the system's logger may be writing
to the very disk that the daemon serves: a line that had to wait would hold up
every request, that of the logger too.  So once the mount answers a thread
writes the lines, and those that come while too many wait are lost.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import queue
import sys
import threading
from io import TextIOWrapper

LOG_NAME = "daemon.log"
LOG_BYTES = 1 << 20  # of daemon.log before it is rotated, once
MOST_WAITING = 1000  # lines
LAST_SECONDS = 2.0  # that the end waits for the last lines


class LaterHandler(logging.handlers.QueueHandler):
    """Hands records to `target`, after `start` in a thread."""

    def __init__(self, target: logging.Handler) -> None:
        # A signal's handler logs, too, maybe in the midst of a put: that must be reentrant.
        self._lines: queue.SimpleQueue[logging.LogRecord | threading.Event] = queue.SimpleQueue()
        super().__init__(self._lines)
        self._target = target
        self._started = False

    def start(self) -> None:
        """Write in a thread from now on.  Not before all forks are done."""
        self._started = True
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def _write(self) -> None:
        while True:
            item = self._lines.get()
            if isinstance(item, threading.Event):
                item.set()
            else:
                self._target.handle(item)

    def enqueue(self, record: logging.LogRecord) -> None:
        """Never waits once started; raises queue.Full, which loses the line."""
        if self._started:
            self._put(record)
        else:
            self._target.handle(record)

    def _put(self, item: logging.LogRecord | threading.Event) -> None:
        if self._lines.qsize() >= MOST_WAITING:
            raise queue.Full
        self._lines.put(item)

    def drain(self) -> bool:
        """Wait for what was logged so far to be written, but not for long; has it been?"""
        if not self._started:
            return True
        written = threading.Event()
        try:
            self._put(written)
        except queue.Full:
            return False
        return written.wait(LAST_SECONDS)

    def flush(self) -> None:
        """`drain`, for who has a handler of any kind."""
        self.drain()


class StateLog(logging.handlers.RotatingFileHandler):
    """The file in a state directory that is ours; else nothing is logged.

    Until it has been looked at, the directory may be anybody's, who would have us write
    to a file of his choice by a link.
    """

    def __init__(self, state: str) -> None:
        self._state = state
        super().__init__(os.path.join(state, LOG_NAME), "a", LOG_BYTES, 1, delay=True)

    def _open(self) -> TextIOWrapper:
        from ..state import statefiles  # noqa: PLC0415 - after the fork, see starting.py

        directory = statefiles.open_directory(self._state)
        try:
            fd = statefiles.open_file(directory, LOG_NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        finally:
            os.close(directory)
        return os.fdopen(fd, "a", errors="backslashreplace")

    def rotate(self, source: str, dest: str) -> None:
        """Give the file its other name."""
        from ..state import statefiles  # noqa: PLC0415

        directory = statefiles.open_directory(self._state)
        try:
            names = os.path.basename(source), os.path.basename(dest)
            os.rename(*names, src_dir_fd=directory, dst_dir_fd=directory)
        finally:
            os.close(directory)


def start_logging(level: str, state: str | None = None) -> LaterHandler:
    """Log to stderr, or for a daemon in the background with that state directory to syslog.

    Where there is no syslog, to the file daemon.log in the state directory.
    """
    logging.raiseExceptions = False  # a log that cannot be written is no reason to fail
    handler: logging.Handler
    if state is None:
        handler = logging.StreamHandler(sys.stderr)
        form = "snapfs: %(levelname)s: %(message)s"
    elif os.path.exists("/dev/log"):
        facility = logging.handlers.SysLogHandler.LOG_DAEMON
        handler = logging.handlers.SysLogHandler("/dev/log", facility)
        form = f"snapfs[{os.getpid()}]: %(message)s"
    else:
        handler = StateLog(state)
        form = "%(asctime)s %(levelname)s %(message)s"
    handler.setFormatter(logging.Formatter(form))
    later = LaterHandler(handler)
    root = logging.getLogger()
    root.handlers[:] = [later]
    root.setLevel(level.upper())
    return later
