"""File descriptors, which a process can run out of.

Every snapshot takes some for as long as it is there.  `KEPT` are left for what comes and
goes, so that a mount that has as many snapshots as it can have still answers, deletes and
ends in order: whatever stays asks `check` first.  Should there be none left all the same
(somebody lowered the limit, or the system has no more: EMFILE and ENFILE), what must go
on takes those that a `Reserve` has set aside.
"""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

from ..errors import LimitReached

KEPT = 64  # clients of the control socket, pipes, and the files that some threads open at once
MAPPINGS_KEPT = 1000  # of libraries, threads and memory
EXHAUSTED = (errno.EMFILE, errno.ENFILE)
REMEDY = (
    "raise the limit (LimitNOFILE= of a systemd service, else ulimit -n before the mount; "
    "fs.nr_open bounds both), or delete snapshots"
)

_Result = TypeVar("_Result")
_Arguments = TypeVarTuple("_Arguments")


def limit() -> int:
    """How many descriptors this process may have now."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft


def in_use() -> int:
    """How many descriptors this process has."""
    try:
        # Linux 6.2 tells the number as the size of the directory.
        return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))
    except OSError as error:
        if error.errno in EXHAUSTED:
            return limit()
        return 0  # there is no /proc: whoever opens one too many is told


def check(wanted: int, what: str) -> None:
    """Refuse what would take `wanted` descriptors for long if too few would be left.

    Raises LimitReached with the numbers and the remedy.
    """
    most, used = limit(), in_use()
    if used + wanted + KEPT > most:
        raise LimitReached(
            f"{what} needs {wanted} file descriptors, and {KEPT} more are kept for what comes and "
            f"goes; {used} of {most} are in use: {REMEDY}"
        )


def check_mappings(wanted: int, what: str) -> None:
    """Refuse what would need `wanted` files to be mapped at once.  Raises LimitReached."""
    try:
        with open("/proc/sys/vm/max_map_count") as file:
            most = int(file.read())
    except (OSError, ValueError):
        return  # whoever maps one too many is told
    if wanted + MAPPINGS_KEPT > most:
        raise LimitReached(
            f"{what} needs {wanted} mapped files, and a process may have {most} less "
            f"{MAPPINGS_KEPT} for other things: raise vm.max_map_count, or delete snapshots"
        )


def explain(error: OSError) -> str:
    """What an exhausted supply is and what helps, for an error that is one of `EXHAUSTED`."""
    if error.errno == errno.ENFILE:
        return "the system has no file descriptors left: raise fs.file-max (sysctl)"
    return f"all {limit()} file descriptors of the daemon are in use: {REMEDY}"


class Reserve:
    """Descriptors set aside for when there are no others.  May be used by several threads."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._lock = threading.Lock()
        self._fds: list[int] = []
        self.refill()

    @property
    def left(self) -> int:
        """How many there are."""
        return len(self._fds)

    def give(self) -> bool:
        """Close one, so that another file can be opened; False if none is left."""
        with self._lock:
            if not self._fds:
                return False
            os.close(self._fds.pop())
            return True

    def refill(self) -> None:
        """Set aside again what was given, as far as that can be."""
        with self._lock:
            try:
                while len(self._fds) < self._count:
                    self._fds.append(os.eventfd(0, os.EFD_CLOEXEC))  # a file, and no path to it
            except OSError:
                pass  # the next time

    def serve(self, call: Callable[[*_Arguments], _Result], *arguments: *_Arguments) -> _Result:
        """Run a call that opens files, and again with what is set aside if it runs out of them.

        For calls that can be made again when they failed half-way.
        """
        try:
            while True:
                try:
                    return call(*arguments)
                except OSError as error:
                    if error.errno not in EXHAUSTED or not self.give():
                        raise
        finally:
            self.refill()

    def close(self) -> None:
        """Give all of them back."""
        self._count = 0
        while self.give():
            pass
