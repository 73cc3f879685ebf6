"""The file of the manifest, which can be replaced on a full file system, too.

All methods block.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from ..errors import LimitReached, StateError
from ..storage.descriptors import Reserve
from . import statefiles
from .manifest import MAX_BYTES, Encoded, Manifest

NAME = "manifest.json"
LIST_KEPT = 64 << 10  # bytes of the list that no new snapshot takes: to rename and delete


class ManifestFile:
    """manifest.json of a state directory that is open as `fd`.

    `spare`: descriptors for when there are no others.
    """

    def __init__(self, fd: int, directory: Path, spare: Reserve) -> None:
        self._fd = fd
        self._directory = directory
        self._spare = spare
        self._lines: Encoded = {}  # as it was saved last
        self._bytes = 0  # of all of it

    def read(self) -> Manifest | None:
        """What it says; None: there is none.  Raises StateError and OSError."""
        try:
            fd = statefiles.open_file(self._fd, NAME, os.O_RDONLY)
        except FileNotFoundError:
            return None
        with os.fdopen(fd, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        where = str(self._directory / NAME)
        if len(data) > MAX_BYTES:
            raise StateError(f"{where} is larger than {MAX_BYTES} bytes")
        return Manifest.loads(data, where)

    def write(self, manifest: Manifest, reserve: int = statefiles.RESERVE_BYTES) -> None:
        """Replace it, durably; then so many bytes are kept for the next time.  Raises OSError."""
        data = manifest.dumps(self._lines)
        if len(data) > MAX_BYTES:  # the next mount would not read it
            raise OSError(
                errno.EFBIG,
                f"the list of snapshots would have {len(data)} bytes and may have {MAX_BYTES}",
            )
        self._spare.serve(statefiles.replace_file, self._fd, NAME, data)
        self._bytes = len(data)
        # What is there must be deletable on a full file system: the list has to fit.
        statefiles.keep_reserve(self._fd, max(reserve, 2 * len(data)))

    def check_room(self) -> None:
        """Raise LimitReached if there is none for one more snapshot."""
        if self._bytes > MAX_BYTES - LIST_KEPT:
            raise LimitReached(f"the list of snapshots has {self._bytes} bytes: delete some")
