"""Temp images on a file system of their own, under the real mount."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest

from tests.support.calls import state_of
from tests.support.filesystems import make_ext4, mounted_loop, tmpfs, use_file_system
from tests.support.mounted import SNAPFS, Mounted, run
from tests.support.patched import Patched

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif("os.geteuid()", reason="needs root to mount a tmpfs"),
]

MIB = 1 << 20
K64 = 1 << 16


@pytest.fixture
def temps(mount, tmp_path):
    """A file system of 16 MiB, gone before `mount` looks for mounts that are left."""
    where = tmp_path / "temps"
    where.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=16M,mode=755", "tmpfs", where)
    yield where
    run("umount", "-l", where)  # if the test failed a daemon may still use it


@pytest.mark.parametrize("policy", ["break-snapshot", "break-guest-write"])
def test_a_full_temp_directory(mount, tmp_path, temps, policy):
    options = (f"temp-dir={temps}", "temp-reserve=0", f"on-cbw-error={policy}")
    # Without a hole, so that it does not matter which blocks the guest chooses.
    disk = mount(os.urandom(128 * MIB), *options)
    make_ext4(disk.active, "nodiscard")
    failures = use_file_system(disk, tmp_path)
    status = disk.json("status", check=False)["temp"]
    assert (str(temps), 0) == (status["directory"], status["room_bytes"])
    assert 15 * MIB < status["used_bytes"] <= 16 * MIB
    found = state_of(disk, "s")
    if policy == "break-snapshot":
        assert [] == failures
        assert ("incomplete", errno.ENOSPC) == (found["state"], found["errno"])
        run("e2fsck", "-fn", disk.active)
    else:
        assert failures
        assert "ok" == found["state"]
        copy = tmp_path / "copy"
        run("cp", disk.snapshots / "s", copy)
        run("e2fsck", "-fp", copy, check=False)
        with mounted_loop(copy, tmp_path / "backup", "ro") as where:
            assert 48 * MIB == len((where / "old").read_bytes())
    disk.stop()
    disk.start()
    assert found["clusters"] == state_of(disk, "s")["clusters"]
    (disk.snapshots / "s").unlink()
    assert 0 == disk.json("status")["temp"]["used_bytes"]
    disk.stop()
    disk.start()  # what a stop leaves of files that are on their way out goes here
    assert [] == list(temps.glob("*/*"))
    disk.stop()
    assert [] == os.listdir(temps)


def test_after_a_kill_everything_is_there(mount, temps):
    disk = mount(os.urandom(4 * MIB), f"temp-dir={temps}")
    moment = disk.active.read_bytes()
    disk.create("s")
    disk.write(K64 // 2, os.urandom(5 * K64))
    active = disk.active.read_bytes()
    disk.kill()
    disk.options.clear()
    disk.start()
    assert (active, moment) == (disk.active.read_bytes(), (disk.snapshots / "s").read_bytes())
    assert 6 * K64 == disk.temp_bytes("s")
    assert str(temps) == disk.json("status")["temp"]["directory"]
    disk.stop()


def test_image_and_state_move_while_temp_images_stay(mount, tmp_path, temps):
    disk = mount(os.urandom(4 * MIB), f"temp-dir={temps}")
    moment = disk.active.read_bytes()
    disk.create("s")
    disk.write(0, os.urandom(MIB))
    disk.stop()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run("cp", "--sparse=always", "-a", disk.image, disk.state, elsewhere)
    disk.image.unlink()
    shutil.rmtree(disk.state)
    moved = Mounted(elsewhere / disk.image.name, disk.mountpoint).start()
    assert moment == (moved.snapshots / "s").read_bytes()
    moved.write(MIB, os.urandom(MIB))
    assert moment == (moved.snapshots / "s").read_bytes()
    moved.stop()


def test_another_directory_from_one_mount_to_the_next(mount, tmp_path, temps):
    disk = mount(os.urandom(4 * MIB), f"temp-dir={temps}")
    moment = disk.active.read_bytes()
    disk.create("a")
    disk.write(0, b"x" * MIB)
    disk.stop()
    other = tmp_path / "other"
    other.mkdir(mode=0o755)
    disk.options[:] = [f"temp-dir={other}"]
    disk.start()
    later = disk.active.read_bytes()
    disk.create("b")
    disk.write(MIB, b"y" * MIB)
    assert [1, 1] == [len(list(path.glob("snapfs-*/*.temp"))) for path in (temps, other)]
    assert str(other) == disk.json("status")["temp"]["directory"]
    disk.kill()
    disk.start()
    assert moment == (disk.snapshots / "a").read_bytes()
    assert later == (disk.snapshots / "b").read_bytes()
    disk.stop()


def refused(disk: Mounted, *options: str) -> str:
    words = [word for option in options for word in ("-o", option)]
    done = run(*SNAPFS, "mount", disk.image, disk.mountpoint, *words, check=False)
    assert done.returncode
    assert 1 == len(done.stderr.splitlines()), done.stderr
    return done.stderr


def test_a_temp_directory_that_is_not_mounted_is_named(mount, tmp_path):
    with tmpfs(tmp_path / "gone", "16M") as where:
        disk = mount(os.urandom(4 * MIB), f"temp-dir={where}")
        disk.create("s")
        disk.stop()
    os.chmod(where, 0o755)
    assert "mount that first" in refused(disk)
    where.rmdir()
    assert f"{where} for temp images does not exist; mount the file system" in refused(disk)


@pytest.mark.parametrize("kind", ["ext4", "btrfs"])
def test_a_temp_directory_that_would_wait_for_the_mount_is_refused(mount, tmp_path, kind):
    disk = mount(MIB, start=False)
    below = f"temp-dir={disk.mountpoint}/temps"
    assert "is under the mountpoint" in refused(disk, below)
    with open(disk.active, "wb") as file:  # what a dead mount's loop device is on
        file.truncate(128 * MIB)
    run(f"mkfs.{kind}", "-q", disk.active)
    with mounted_loop(disk.active, tmp_path / "fs") as where:
        assert "the temp-dir is on a file system that lives on" in refused(
            disk, f"temp-dir={where}"
        )
    assert not disk.state.exists()


def test_a_recorded_directory_under_the_mountpoint_is_refused(mount):
    disk = mount(os.urandom(MIB), start=False)
    inside = disk.mountpoint / "temps"
    inside.mkdir(mode=0o755)
    other = disk.mountpoint.with_name("other")
    other.mkdir()
    elsewhere = Mounted(disk.image, other, [f"temp-dir={inside}"]).start()
    elsewhere.create("s")
    elsewhere.stop()
    assert "under the mountpoint" in refused(disk)
    elsewhere.options.clear()
    elsewhere.start()
    assert "ok" == state_of(elsewhere, "s")["state"]
    elsewhere.stop()


def test_a_sparse_image_that_cannot_grow_to_its_size_is_warned_of(mount, tmp_path):
    with tmpfs(tmp_path / "small", "16M") as where:
        disk = mount(MIB, "temp-reserve=0", start=False)
        disk.image = where / "disk.img"
        with open(disk.image, "wb") as file:
            file.truncate(64 * MIB)
        mounted = disk.snapfs("mount", disk.image, disk.mountpoint, "-o", "temp-reserve=0")
        assert f"snapfs: warning: {64 * MIB} bytes of" in mounted.stderr
        disk.stop()
        daemon = Patched(disk, "")
        disk.stop()
        _, stderr = daemon.finish()
        lines = [line for line in stderr.splitlines() if "unallocated" in line]
        assert 1 == len(lines), stderr
        assert f"{64 * MIB} bytes" in lines[0]
        assert json.dumps(str(disk.image)).strip('"') in lines[0]
