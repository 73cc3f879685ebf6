"""Telling those who take the mount away how it ended.

A client of the control socket asks for it before it unmounts; its connection is kept
until everything is durable and marked clean, or is not, and gets one more line then, as an
answer of control.py.  A connection that ends without it tells that the daemon was killed.
"""

from __future__ import annotations

import json
import os
import select
from typing import Any

MOST = 32  # who wait; as many as there can be clients


class Farewell:
    """Connections that are told how the mount ended.  Task-atomic."""

    def __init__(self) -> None:
        self._fds: list[int] = []

    def add(self, fd: int) -> bool:
        """Keep the connection `fd`, which its owner may close; False if there are too many."""
        self._prune()
        if len(self._fds) >= MOST:
            return False
        self._fds.append(os.dup(fd))
        return True

    def _prune(self) -> None:
        """Let go of those who have gone away."""
        poll = select.poll()
        for fd in self._fds:
            poll.register(fd, 0)
        for fd, _ in poll.poll(0):
            self._fds.remove(fd)
            os.close(fd)

    def tell(self, answer: dict[str, Any]) -> None:
        """Send the last answer, and close.  Does not block; callable from a signal handler."""
        while self._fds:
            fd = self._fds.pop()
            try:
                os.write(fd, json.dumps(answer).encode() + b"\n")
            except OSError:
                pass  # gone
            os.close(fd)
