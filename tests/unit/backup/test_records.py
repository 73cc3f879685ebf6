"""Replacing files durably, where file systems cannot sync everything."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from snapfs.backup import records


@pytest.fixture
def failing(monkeypatch):
    """fsync(2) of directories fails with an errno."""

    def factory(number: int) -> None:
        real = os.fsync

        def fsync(fd: int) -> None:
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                raise OSError(number, os.strerror(number))
            real(fd)

        monkeypatch.setattr(os, "fsync", fsync)

    return factory


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_that_syncs_no_directories_is_fine(tmp_path, failing, number):
    failing(number)
    records.replace_durably(str(tmp_path / "x"), b"content")
    assert b"content" == (tmp_path / "x").read_bytes()


def test_a_directory_that_cannot_be_synced_is_named(tmp_path, failing):
    failing(errno.EIO)
    with pytest.raises(OSError, match=str(tmp_path)):
        records.replace_durably(str(tmp_path / "x"), b"content")
