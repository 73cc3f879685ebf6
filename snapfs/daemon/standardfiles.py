"""Standard input, output and error: numbers that nothing else may have.

A program can be started with some of them closed (`0<&- 1>&-`), and the next file that it
opens gets such a number: what is printed would then go into an image.
"""

from __future__ import annotations

import os
import sys

STANDARD = (0, 1, 2)


def occupy() -> None:
    """Open /dev/null where one is closed.  To be called before anything is opened."""
    closed = []
    for fd in STANDARD:
        try:
            os.fstat(fd)
        except OSError:
            discard(fd)
            closed.append(fd)
    if 0 in closed:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - as long as the process
    if 1 in closed:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if 2 in closed:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def discard(*fds: int) -> None:
    """Let these descriptors be /dev/null, open or not."""
    try:
        null = os.open(os.devnull, os.O_RDWR)
    except OSError:  # there is none: nothing can be read or written, but the number is taken
        null = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    for fd in fds:
        if fd == null:
            os.set_inheritable(fd, True)
        else:
            os.dup2(null, fd)
    if null not in fds:
        os.close(null)
