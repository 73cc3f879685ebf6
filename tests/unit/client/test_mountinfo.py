from __future__ import annotations

import functools
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


LINES = b"""\
22 27 0:21 / /proc rw,relatime - proc proc rw
90 22 0:39 / /a\\040b\\134\xff\xe2\x80\xa8 rw - fuse.snapfs /i\\011\\134,x rw,user_id=65,group_id=7
91 90 0:40 /sub /a\\040b\\134\xff\xe2\x80\xa8 rw shared:3 master:1 - tmpfs over rw
"""


@pytest.fixture
def table(tmp_path, monkeypatch) -> list[mountinfo.Mount]:
    (tmp_path / "9").mkdir()
    (tmp_path / "9" / "mountinfo").write_bytes(LINES)
    monkeypatch.setattr(mountinfo, "PROC", tmp_path)
    monkeypatch.setattr(mountinfo, "mounts", functools.partial(mountinfo.mounts, 9))
    return mountinfo.mounts()


def test_names_are_bytes(table):
    ours = table[1]
    assert "/a b\\\udcff\u2028" == ours.mountpoint
    assert "/i\t\\,x" == ours.source
    assert ("0:39", 22, 65, 7) == (ours.device, ours.parent, ours.user, ours.group)
    assert (None, "/sub") == (table[2].user, table[2].root)


def test_what_covers_a_mount(table):
    assert [table[2], None] == [mountinfo.cover(each) for each in table[1:]]
    assert [*table] == [mountinfo.still(each) for each in table]


def test_a_look_asks_for_the_mount_and_follows_links(tmp_path):
    (tmp_path / "link").symlink_to("/proc")
    assert mountinfo.look(str(tmp_path / "link")).is_root
    assert not mountinfo.look(str(tmp_path / "link"), follow=False).is_root
    found = os.stat(tmp_path).st_dev
    assert f"{os.major(found)}:{os.minor(found)}" == mountinfo.look(str(tmp_path)).device
    assert mountinfo.find("/proc").fs_type == "proc"
    assert mountinfo.find(str(tmp_path / "none")) is None
