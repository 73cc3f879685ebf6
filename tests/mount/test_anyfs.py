"""Image or state on a file system whose times tell nothing: refused, or nothing survives a kill."""

from __future__ import annotations

import os
from contextlib import contextmanager

import pytest

from tests.support.calls import state_of
from tests.support.hanging import hanging
from tests.support.mounted import K64, Mounted, run

pytestmark = pytest.mark.mount
SIZE = 16 * K64


@contextmanager
def elsewhere(tmp_path, *options):
    """An image on a FUSE file system, its state beside the test."""
    with hanging(tmp_path / "fuse"):
        image = tmp_path / "fuse" / "disk.img"
        image.write_bytes(os.urandom(SIZE))
        mountpoint = tmp_path / "mnt"
        mountpoint.mkdir()
        disk = Mounted(image, mountpoint, [f"state={tmp_path / 'state'}", *options])
        try:
            yield disk
        finally:
            disk.snapfs("umount", mountpoint, check=False)
            run("umount", "-l", mountpoint, check=False)


@pytest.mark.parametrize("what", ["image", "state"])
def test_another_kind_is_refused_in_words(tmp_path, what):
    with elsewhere(tmp_path) as disk:
        if what == "state":
            plain = tmp_path / "disk.img"
            plain.write_bytes(disk.image.read_bytes())
            disk.options = [f"state={tmp_path / 'fuse' / 'state'}"]
            disk.image = plain
        words = [word for option in disk.options for word in ("-o", option)]
        done = disk.snapfs("mount", disk.image, disk.mountpoint, *words, check=False)
        assert 2 == done.returncode
        for text in ("FUSE", "any_fs", what):
            assert text in done.stderr
        assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("durability", ["process", "power"])
def test_when_wanted_all_the_same_nothing_survives_a_kill(tmp_path, durability):
    with elsewhere(tmp_path, "any_fs", f"durability={durability}") as disk:
        disk.start()
        moment = disk.active.read_bytes()
        disk.create("s")
        disk.write(0, b"x" * K64)
        disk.stop()
        disk.start()  # in order it was
        assert moment == (disk.snapshots / "s").read_bytes()
        disk.kill()
        disk.start()
        found = state_of(disk, "s")
        assert "lost" == found["state"]
        assert "cannot be known" in found["reason"]
