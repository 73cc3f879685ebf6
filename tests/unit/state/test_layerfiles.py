"""The files of a layer that survive a power cut, on a disk that fails."""

from __future__ import annotations

import errno
import os

import pytest
import trio

from snapfs.engine.layer import LOSSES_BYTES
from snapfs.state import statefiles
from snapfs.state.layerfiles import LayerFiles
from tests.support.images import MemoryImage

BITS = 16


@pytest.fixture
def files(tmp_path):
    directory = os.open(tmp_path, os.O_RDONLY)
    mappings = {
        name: statefiles.map_bitmap(directory, name, BITS, create=True)
        for name in ("done", "access")
    }
    mappings["losses"] = statefiles.map_record(directory, "losses", LOSSES_BYTES, create=True)
    made = LayerFiles.open((directory, "."), MemoryImage(), mappings, BITS, trio.CapacityLimiter(1))
    yield made
    made.close()
    os.close(directory)


async def test_a_done_bit_that_could_not_be_stored_is_stored_later(files, tmp_path, monkeypatch):
    """Its page was taken for clean, and dropped: what is mapped is what the disk has."""
    real, failures = os.fdatasync, [errno.EIO]

    def fdatasync(fd: int) -> None:
        if failures:
            with open(tmp_path / "done", "r+b") as file:
                file.write(bytes(2))
            raise OSError(failures.pop(), "")
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    files.parts.done.set(3, 5)
    commits = files.parts.commits
    async with trio.open_nursery() as nursery:
        with pytest.raises(OSError, match="Errno 5"):
            await commits.done.commit(nursery)
        await commits.done.commit(nursery)
    assert b"\x18\0" == (tmp_path / "done").read_bytes()
