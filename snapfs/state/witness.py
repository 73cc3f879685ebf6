"""A small process beside the daemon, which notes how the image is when all of the daemon is dead.

Why: a write that was under way when the daemon was killed may end much later.  One that
waits for storage, or for a file system that is frozen, sets the times of the image when
it goes on, and its thread, and with it the dead daemon's locks, stay until then.  No
clock tells the times that it leaves from those of somebody else's write after it.

So the witness holds the same open files of the image and of the state directory's lock,
and with them their locks (they belong to the open file, fcntl(2)), and the reading end
of a pipe whose other end only the daemon has.  The pipe ends when the last thread of
the daemon has ended; then no write of it can be under way any more.  The witness stores
what the image looks like (activitywords.py) and ends, and only with it the locks do: the
next mount, and whoever respects the locks, finds the image as it was noted.

It notes nothing if that is neither needed nor sure: with nothing under way, and mtime or size
not as recorded, it was not us who wrote.  Somebody who ignores the locks and writes in the
instants between the end of the pipe and the note is not told from the daemon; the
witness has the priority of a real-time process, where that is permitted, to make
them few.  If it is killed itself in that time, or before, writes under way are judged as
activity.py says: as lost, when in doubt.

It needs 6 MiB, and imports nothing but activitywords.py.  Later it watches the port.
"""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .activitywords import (
    CTIME,
    FILE_BYTES,
    MTIME,
    SESSION,
    SIZE,
    UNDER_WAY,
    note_image,
    storable,
    words_of,
)

_START = "import sys; sys.path.insert(0, sys.argv.pop(1)); "
_START += "from snapfs.state.witness import main; main(sys.argv[1:])"


class Witness:
    """The process, seen from the daemon.  All methods block, if not for long."""

    def __init__(self, process: subprocess.Popen[bytes], pipe: int) -> None:
        self._process = process
        self._pipe = pipe  # its writing end

    @classmethod
    def appoint(cls, image: int, lock: int, page: int, session: int) -> Witness:
        """Start it; the descriptors stay the caller's.  Raises OSError."""
        reader, writer = os.pipe()
        try:
            root = str(Path(__file__).parents[2])
            numbers = [str(number) for number in (image, page, reader, session)]
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _START, root, *numbers],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(image, lock, page, reader),
                env={},
                cwd="/",
                start_new_session=True,
            )
        except BaseException:
            os.close(writer)
            raise
        finally:
            os.close(reader)
        return cls(process, writer)

    @property
    def pid(self) -> int:
        return self._process.pid

    def lives(self) -> bool:
        """Is it there?"""
        return self._process.poll() is None

    def dismiss(self) -> None:
        """End it; it notes nothing.  Its locks are gone on return."""
        self._process.kill()
        self._process.wait()
        os.close(self._pipe)


# The process


def main(arguments: Sequence[str]) -> None:
    """Wait for the daemon's end and note what it left."""
    image, page_fd, pipe, session = (int(argument) for argument in arguments)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with the daemon
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError:
        pass  # only root may
    words = words_of(mmap.mmap(page_fd, FILE_BYTES))
    while os.read(pipe, 1):
        pass
    bear_witness(words, image, session)


def bear_witness(words: memoryview, image: int, session: int) -> None:
    """Note how the image is, if that is the daemon's doing; see the module's text."""
    if words[SESSION] != session:
        return
    if not words[UNDER_WAY]:
        status = os.fstat(image)
        now = status.st_size, storable(status.st_mtime_ns)
        if now != (words[SIZE], words[MTIME]) or storable(status.st_ctime_ns) == words[CTIME]:
            return
        words[UNDER_WAY] = 1
    note_image(words, image)
