"""Hearing of what could not be written back: real write-back, on a loop device that runs full."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from snapfs.storage.watch import Watch
from tests.support.failing import thin, write_back

MIB = 1 << 20

pytestmark = pytest.mark.skipif("os.geteuid()", reason="needs root to mount")


def test_nothing_is_told_of_a_file_that_is_sound(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * MIB)
    fd = os.open(path, os.O_RDWR)
    watch = Watch.beside(fd)
    os.pwrite(fd, b"y" * MIB, 0)
    assert watch.failure() is None
    os.fsync(fd)
    assert watch.failure() is None
    os.close(fd)
    watch.close()
    watch.close()


def test_each_description_is_told_once_and_none_that_comes_later(tmp_path: Path):
    with thin(tmp_path / "thin", 64 * MIB, 8 * MIB) as where:
        fd = os.open(where / "file", os.O_RDWR | os.O_CREAT)
        watches = [Watch.beside(fd) for _ in range(2)]
        for number in range(24):
            os.pwrite(fd, os.urandom(MIB), number * MIB)
        write_back(where)
        failure = watches[0].failure()
        assert failure is not None
        assert failure.errno in (errno.EIO, errno.ENOSPC)
        assert watches[0].failure() is None
        late = Watch.beside(fd)
        assert late.failure() is None, "somebody has been told: a later one is not"
        assert watches[1].failure() is not None
        with pytest.raises(OSError):
            os.fsync(fd)
        for watch in (*watches, late):
            watch.close()
        os.close(fd)


def test_what_nobody_was_told_the_next_one_is(tmp_path: Path):
    with thin(tmp_path / "thin", 64 * MIB, 8 * MIB) as where:
        fd = os.open(where / "file", os.O_RDWR | os.O_CREAT)
        for number in range(24):
            os.pwrite(fd, os.urandom(MIB), number * MIB)
        os.close(fd)
        write_back(where)
        watch = Watch(os.open(where / "file", os.O_RDONLY))
        assert watch.failure() is not None
        watch.close()
