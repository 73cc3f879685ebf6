"""File systems told from each other; what really changes at a mount is in crash/test_remount.py."""

from __future__ import annotations

import os

import pytest

from snapfs.errors import UsageError
from snapfs.storage import filesystems


@pytest.fixture
def here(tmp_path):
    fd = os.open(tmp_path, os.O_RDONLY)
    yield fd
    os.close(fd)


def test_one_file_system_has_one_identity(here, tmp_path):
    (tmp_path / "file").touch()
    fd = os.open(tmp_path / "file", os.O_PATH)
    assert "" != filesystems.identity_of(here) == filesystems.identity_of(fd)
    os.close(fd)


def test_without_sysfs_the_mount_is_what_is_known(here, monkeypatch):
    if filesystems.kind_of(here) in (filesystems.TMPFS, filesystems.RAMFS):
        pytest.skip("a tmpfs needs none")
    monkeypatch.setattr(filesystems, "directory_of", lambda fd: "/sys/fs/no/such")
    assert filesystems.identity_of(here).startswith("mount ")
    monkeypatch.setattr(filesystems, "_mount_of", lambda fd: None)
    assert "" == filesystems.identity_of(here)


def test_other_kinds_are_refused_by_name_and_with_a_remedy(here, monkeypatch):
    filesystems.check_kind(here, "the image")
    for kind, name in ((0x6969, "NFS"), (0x01021997, "9p"), (0x1234, "does not know")):
        monkeypatch.setattr(filesystems, "kind_of", lambda fd, kind=kind: kind)
        with pytest.raises(UsageError, match=f"the image .*{name}.* -o any_fs"):
            filesystems.check_kind(here, "the image")


def test_a_file_system_without_errors_has_none(here):
    assert filesystems.ask_for_errors(here) is None
