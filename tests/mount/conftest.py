"""What several files of mount tests use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import sanitized
from tests.support.backedup import Disk
from tests.support.mounted import SNAPFS, Mounted, run


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with snapfs in it, its C under sanitizers; built once."""
    return sanitized.build(tmp_path_factory.mktemp("sanitized"))


@pytest.fixture
def connections() -> Iterator[None]:
    """The file system that tells which FUSE mounts there are, as systemd mounts it."""
    where = "/sys/fs/fuse/connections"
    if os.path.ismount(where):
        yield
        return
    run("mount", "-t", "fusectl", "fusectl", where)
    yield
    run("umount", "-l", where)


@pytest.fixture(autouse=True)
def state_home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What backups note of where they went is not this user's."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp() / "state-home"))


@pytest.fixture
def disk(mount: Callable[..., Mounted], tmp_path: Path) -> Callable[..., Disk]:
    """Mount an image that has a backup directory: as `mount`."""

    def factory(content: int | bytes, *options: str) -> Disk:
        directory = tmp_path / "backup"
        run(*SNAPFS, "backup", "--init", directory)
        return Disk(mount(content, *options), directory, tmp_path)

    return factory
