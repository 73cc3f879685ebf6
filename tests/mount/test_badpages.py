"""Pages of mapped files that cannot be had: the daemon, and with it the guest, lives."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.calls import errno_of
from tests.support.devices import device
from tests.support.mounted import Mounted, run

MIB = 1 << 20
K64 = 1 << 16
SIZE = 16 * MIB

pytestmark = pytest.mark.mount


def test_done_bits_that_cannot_be_read_lose_the_snapshot_and_nothing_else(
    mount: Callable[..., Mounted],
):
    disk = mount(os.urandom(SIZE))
    disk.snapfs("bitmap", "add", disk.mountpoint, "b")
    disk.create("a")
    disk.write(0, b"new")
    os.truncate(disk.state / "snapshots/2/done", 0)  # as a disk that cannot read it again
    disk.write(MIB, b"more")
    assert b"more" == disk.read("active", MIB, 4)
    shown = disk.json("show", "a", check=False)["snapshot"]
    assert ("lost", errno.EIO) == (shown["state"], shown["errno"])
    assert errno.EIO == errno_of(os.open, disk.snapshots / "a", os.O_RDONLY)
    disk.create("c")
    disk.write(2 * MIB, b"again")
    assert disk.image.read_bytes()[2 * MIB : 2 * MIB + 5] == b"again"
    disk.snapfs("delete", disk.mountpoint, "a")
    disk.kill()
    disk.start()
    assert ["c"] == [each["name"] for each in disk.json("list")["snapshots"]]
    assert "recording" in disk.snapfs("bitmap", "list", disk.mountpoint).stdout


def test_dirty_bits_that_cannot_be_read_make_the_bitmap_inconsistent_for_good(
    mount: Callable[..., Mounted],
):
    disk = mount(os.urandom(SIZE))
    disk.snapfs("bitmap", "add", disk.mountpoint, "b")
    disk.create("a")
    (bitmap,) = (disk.state / "bitmaps").iterdir()
    kept = bitmap.read_bytes()
    os.truncate(bitmap, 0)
    disk.write(0, b"new")
    assert "inconsistent" in disk.snapfs("bitmap", "list", disk.mountpoint, check=False).stdout
    assert "ok" == disk.json("show", "a")["snapshot"]["state"]
    bitmap.write_bytes(kept)  # it can be read again, without the new bit
    disk.kill()
    disk.start()
    assert "inconsistent" in disk.snapfs("bitmap", "list", disk.mountpoint, check=False).stdout


def test_a_state_directory_that_shares_its_blocks_with_a_copy_on_a_full_file_system(
    mount: Callable[..., Mounted], tmp_path: Path
):
    """What cp makes on XFS: at the next change of a bitmap its page needs a new block."""
    with device(tmp_path / "fs", "xfs") as fs:
        disk = mount(os.urandom(SIZE), f"state={fs.where / 'state'}", f"temp-dir={tmp_path}")
        disk.create("a")
        disk.stop()
        run("cp", "-a", "--reflink=always", fs.where / "state", fs.where / "copy")
        fill(fs.where)
        options = [word for option in disk.all_options for word in ("-o", option)]
        refused = disk.snapfs("mount", disk.image, disk.mountpoint, *options, check=False)
        assert (1, True) == (refused.returncode, "No space left" in refused.stderr)
        shutil.rmtree(fs.where / "copy")
        (fs.where / "fill").unlink()
        disk.start()
        run("sync", "-f", fs.where)
        run("cp", "-a", "--reflink=always", fs.where / "state", fs.where / "copy")  # while mounted
        fill(fs.where)
        moment = disk.image.read_bytes()
        for number in range(0, SIZE // K64, 7):
            disk.write(number * K64, b"new")
        assert disk.pid == disk.json("status", check=False)["mount"]["pid"]
        if disk.json("show", "a", check=False)["snapshot"]["state"] == "ok":
            assert moment == (disk.snapshots / "a").read_bytes()
        else:
            assert errno.EIO == errno_of(os.open, disk.snapshots / "a", os.O_RDONLY)
        disk.snapfs("umount", disk.mountpoint, check=False)  # which may say that something is lost


def fill(where: Path) -> None:
    """Leave no free byte."""
    with open(where / "fill", "wb", buffering=0) as file:
        for size in (MIB, 4096):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)
        with contextlib.suppress(OSError):
            os.fsync(file.fileno())
