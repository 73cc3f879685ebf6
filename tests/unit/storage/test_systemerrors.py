"""Errors that a file system counts; those of a real ext4 are in mount/test_writeback.py."""

from __future__ import annotations

import errno
import gc
import os

import pytest

from snapfs.storage import filesystems
from snapfs.storage.systemerrors import ErrorsSince, SystemErrors


@pytest.fixture
def system(tmp_path, monkeypatch):
    (tmp_path / "errors_count").write_text("3\n")
    monkeypatch.setattr(filesystems, "directory_of", lambda fd: str(tmp_path))
    monkeypatch.setattr(filesystems, "kind_of", lambda fd: filesystems.EXT4)
    return tmp_path


def test_each_who_asks_is_told_once_of_each_error(system):
    one, other = ErrorsSince(0), ErrorsSince(0)
    assert one.failure() is None
    (system / "errors_count").write_text("4\n")
    for each in (one, other):
        failure = each.failure()
        assert failure is not None
        assert errno.EIO == failure.errno
        assert each.failure() is None
    assert ErrorsSince(0).failure() is None


def test_one_descriptor_for_all_and_none_afterwards(system):
    asking = [ErrorsSince(0) for _ in range(9)]
    (found,) = {each.system for each in asking}
    assert found is not None
    fd = found.fd
    assert 3 == found.first
    del asking, found
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_other_kinds_and_what_is_hidden_are_not_asked(system, monkeypatch):
    (system / "errors_count").unlink()
    assert SystemErrors.of(0) is None
    assert ErrorsSince(0).failure() is None
    monkeypatch.setattr(filesystems, "kind_of", lambda fd: filesystems.XFS)
    assert SystemErrors.of(0) is None
