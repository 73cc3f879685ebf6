"""The record of activity: what survives of the writes in flight when the daemon dies.

One mapped page in the state directory.  With it the next mount tells our own last
write from one that somebody made behind our back.  Its words have 64 bits each, in the
machine's byte order.  Each is changed by one store, in an order in which every prefix is
a truth, so that a kill between any two leaves a record that can be judged:

     0  magic      "snapfs2\\n"
     8  session    the mount that the rest is of; 0: of none.  Stored last by `begin`
    16  under_way  changes of the image that have begun and not ended; C stores 1 for its own
    24  size       the image when nothing was under way last: stored while `under_way` is
    32  mtime      not 0, which is stored last
    40  ctime
    48  alive      when a sign of life was given last; durable with durability=power only
    56  failed     errno of a write-back that failed, found after the daemon's death; 0: none

`published.c` has the same layout; a test compares them.  There is one writer at a time:
the daemon's trio thread, which the native path is part of, or, when all of the daemon
is dead, the witness (witness.py).  Whoever holds the image for it later must be one, too.

What can be known when the image's lock is free, so that no thread of the dead daemon
can still be in a write:

    session is not the manifest's  that mount had not begun: the image looks as the
                                   manifest says, or somebody else wrote it
    under_way is 0                 the image looks as recorded, or somebody else wrote it
    under_way is not 0             the witness could not note the end.  The image looks as
                                   recorded, or nobody can tell who wrote it: a write that
                                   hung (fsfreeze, storage) sets the times when it goes on.
                                   No grace of some seconds makes up for that

"Looks": size, mtime, and ctime, too, unless the file was moved or copied.
"""

from __future__ import annotations

import mmap
import os
import time

from attrs import evolve

from ..errors import StateError
from ..storage.mapping import Mapping, map_file
from .activitywords import (
    ALIVE,
    CTIME,
    FAILED,
    FILE_BYTES,
    MAGIC,
    MAGIC_VALUE,
    MTIME,
    SESSION,
    SIZE,
    UNDER_WAY,
    note_image,
    words_of,
)
from .manifest import ImageStamp, moment
from .statefiles import open_file

WATCH_SECONDS = 0.5  # between two looks at the witness
SYNC_SECONDS = 20  # between two durable signs of life, with durability=power
POWER_GRACE_NS = 60_000_000_000


class Activity:
    """Changes of the image under way; see the module's text.

    The methods for changes are plain `def`, task-atomic, and do not block but
    for the page fault of a mapped page and an fstat(2).
    """

    def __init__(self, mapping: Mapping | mmap.mmap, fd: int) -> None:
        self._mapping = mapping
        self._words = words_of(mapping)
        self._fd = fd  # of the image; the store's
        self._under_way = 0

    @classmethod
    def open(cls, directory: int, image_fd: int) -> Activity:
        """Map the file, made if need be.  Blocks.  The record is kept until `begin`."""
        fd = open_file(directory, "activity", os.O_RDWR | os.O_CREAT)
        try:
            size = os.fstat(fd).st_size
            if size not in (0, FILE_BYTES):
                raise StateError(f"activity has {size} bytes and must have {FILE_BYTES}")
            return cls(map_file(fd, FILE_BYTES), image_fd)
        finally:
            os.close(fd)

    @property
    def page(self) -> Mapping | mmap.mmap:
        """The mapped record, for whoever writes to the image beside us.

        A change that begins while nothing is under way may count itself as one, and
        must record as we do at its end, both between two calls of ours; when something
        is under way it has nothing to do.
        """
        return self._mapping

    # Writing

    def prepare(self) -> None:
        """Make it a record, of no mount, if it is none: nothing was to be judged by it."""
        if not self._holds_record():
            self._words[SESSION] = 0
            self._words[SIZE] = self._words[FAILED] = 0
            self._words[MAGIC] = MAGIC_VALUE

    def begin(self, session: int) -> None:
        """Start recording for that mount: nothing is under way, and nothing failed.

        To be called after `prepare`.  The manifest must have its verdict, and `session`:
        this destroys what it was found by.
        """
        words = self._words
        words[SESSION] = 0
        words[UNDER_WAY] = 1
        words[FAILED] = 0
        words[ALIVE] = time.time_ns()
        note_image(self._words, self._fd)
        words[SESSION] = session

    def started(self) -> None:
        """A change begins."""
        self._under_way += 1
        self._words[UNDER_WAY] = self._under_way

    def finished(self) -> None:
        """A change has ended."""
        self._under_way -= 1
        if self._under_way:
            self._words[UNDER_WAY] = self._under_way
        else:
            note_image(self._words, self._fd)

    def end(self) -> None:
        """Nothing is under way any more, though it was never said."""
        self._under_way = 0
        self._words[UNDER_WAY] = 1
        note_image(self._words, self._fd)

    def beat(self) -> None:
        """Give a sign of life."""
        self._words[ALIVE] = time.time_ns()

    def fail(self, number: int) -> None:
        """Note the errno of a write-back that failed, which the kernel tells but once."""
        self._words[FAILED] = number

    # Judging

    def failed(self) -> int:
        """errno of a write-back that was found to have failed after the daemon's death; 0: none.

        Raises StateError if there is no record.
        """
        self._is_of(0)
        return self._words[FAILED]

    def change_since(self, session: int, known: ImageStamp, image: ImageStamp) -> str | None:
        """How the image differs from what the dead daemon left, None if it does not.

        `session` and `known` are what the manifest says of its mount.  Raises
        StateError if there is no record.
        """
        if not self._is_of(session):
            return image.change_since(known)
        words = self._words
        left = evolve(known, size=words[SIZE], mtime_ns=words[MTIME], ctime_ns=words[CTIME])
        change = image.change_since(left)
        if change is not None and words[UNDER_WAY]:
            return (
                f"{change}; writes were under way when the daemon died, and its witness did not "
                "live to note their end, so nobody can tell whether it was them or somebody else"
            )
        return change

    def change_since_sync(
        self, session: int, known: ImageStamp, image: ImageStamp, *, rebooted: bool
    ) -> str | None:
        """`change_since` when what was held is gone, and a durable sign of life is left.

        What was written before the sign is ours.  `rebooted`: so is what was
        written after it, within `POWER_GRACE_NS` and before this boot: what somebody
        else wrote in between is not noticed.
        """
        newest = image.newest(known)
        if self._is_of(session):
            limit = self._words[ALIVE]
            if rebooted:
                booted = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
                limit = max(limit, min(booted, limit + POWER_GRACE_NS))
        else:
            limit = max(known.mtime_ns, known.ctime_ns)
        if newest > limit:
            return (
                f"it was written at {moment(newest)}, and the last that is known of the "
                f"daemon is that it lived at {moment(self._words[ALIVE])}"
            )
        return None

    def _is_of(self, session: int) -> bool:
        if not self._holds_record():
            raise StateError("activity in the state directory holds no record")
        return self._words[SESSION] == session

    def _holds_record(self) -> bool:
        return self._words[MAGIC] == MAGIC_VALUE and self._words[SIZE] >= 0

    def close(self) -> None:
        """Unmap the file."""
        self._words.release()
        self._mapping.close()
