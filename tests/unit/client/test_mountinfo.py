from __future__ import annotations

import os
from pathlib import Path

import pytest

from snapfs.client import mountinfo


@pytest.fixture
def loops(tmp_path, monkeypatch) -> Path:
    """A sysfs in which what tmp_path is on is a device `top`, beside two loop devices."""
    monkeypatch.setattr(mountinfo, "BLOCKS", tmp_path)
    for name in ("a", "b"):
        (tmp_path / "devices" / name / "loop").mkdir(parents=True)
        (tmp_path / "devices" / name / "loop" / "backing_file").write_text(f"/no/such/{name}\n")
    (tmp_path / "devices" / "top").mkdir()
    device = os.stat(tmp_path).st_dev
    (tmp_path / f"{os.major(device)}:{os.minor(device)}").symlink_to("devices/top")
    return tmp_path / "devices"


def test_on_no_loop_device(loops):
    assert [] == mountinfo.lives_on(str(loops))


def test_on_a_volume_of_several(loops):
    (loops / "md" / "slaves").mkdir(parents=True)
    (loops / "md" / "slaves" / "b").symlink_to(loops / "b")
    (loops / "top" / "slaves").mkdir()
    (loops / "top" / "slaves" / "a").symlink_to(loops / "a")
    (loops / "top" / "slaves" / "md").symlink_to(loops / "md")
    assert ["/no/such/a", "/no/such/b"] == mountinfo.lives_on(str(loops))


def test_on_itself_it_comes_to_an_end(loops):
    (loops / "top" / "loop").mkdir()
    (loops / "top" / "loop" / "backing_file").write_text(f"{loops}/file\n")
    (loops / "file").touch()
    assert {f"{loops}/file"} == set(mountinfo.lives_on(str(loops)))
