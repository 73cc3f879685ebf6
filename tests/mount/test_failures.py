"""Temp storage that is full, and calls that fail, under the real mount."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Mounted, run
from .test_programs import mounted_loop

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif("os.geteuid()", reason="needs root to mount a tmpfs"),
]

MIB = 1 << 20
K64 = 1 << 16


@contextlib.contextmanager
def tmpfs(where: Path, size: str) -> Iterator[Path]:
    where.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", where)
    try:
        yield where
    finally:
        run("umount", where)


@contextlib.contextmanager
def small(mount, tmp_path: Path, content: int | bytes, size: str, *options: str):
    """An image whose state is on a tmpfs of `size`."""
    with tmpfs(tmp_path / "small", size) as where:
        disk = mount(content, f"state={where}/state", *options)
        try:
            yield disk
        finally:
            disk.stop()


def state_of(disk: Mounted, name: str) -> dict:
    done = disk.snapfs("show", disk.mountpoint, name, "--json", check=False)
    found = json.loads(done.stdout)["snapshot"]
    assert (4 if found["state"] != "ok" else 0) == done.returncode
    return found


def use_file_system(disk: Mounted, tmp_path: Path) -> list[OSError]:
    """Fill a file system on active with more than the temp image can take; its errors."""
    failures: list[OSError] = []
    with mounted_loop(disk.active, tmp_path / "fs") as where:
        (where / "old").write_bytes(os.urandom(48 * MIB))
        os.sync()
        disk.create("s")
        with contextlib.suppress(OSError):
            (where / "old").unlink()
        for number in range(48):
            try:
                with open(where / f"new{number}", "wb") as file:
                    file.write(os.urandom(MIB))
                    os.fsync(file.fileno())
            except OSError as error:
                failures.append(error)
    return failures


def test_a_full_temp_file_system_breaks_the_snapshot_and_no_guest_write(mount, tmp_path):
    with small(mount, tmp_path, 128 * MIB, "16M", "temp-reserve=0") as disk:
        run("mkfs.ext4", "-q", disk.active)
        assert [] == use_file_system(disk, tmp_path)
        run("e2fsck", "-fn", disk.active)
        found = state_of(disk, "s")
        assert ("incomplete", errno.ENOSPC) == (found["state"], found["errno"])
        assert found["clusters"]["lost"] > 0
        assert "incomplete" in os.getxattr(disk.snapshots / "s", "user.snapfs.state").decode()
        assert disk.json("status", check=False)["temp"]["used_bytes"] <= 16 * MIB
        extents = json.loads(disk.snapfs("map", "--json", disk.snapshots / "s").stdout)
        closed = [each for each in extents if not each["accessible"]]
        assert found["clusters"]["lost"] * K64 == sum(each["length"] for each in closed)
        with open(disk.snapshots / "s", "rb") as file, pytest.raises(PermissionError):
            os.pread(file.fileno(), 1, closed[0]["start"])
        (disk.snapshots / "s").unlink()
        assert 0 == disk.json("status")["temp"]["used_bytes"]


def test_a_full_temp_file_system_breaks_guest_writes_and_no_snapshot(mount, tmp_path):
    options = ("temp-reserve=0", "on-cbw-error=break-guest-write")
    with small(mount, tmp_path, 128 * MIB, "16M", *options) as disk:
        run("mkfs.ext4", "-q", disk.active)
        failures = use_file_system(disk, tmp_path)
        assert failures
        assert "ok" == state_of(disk, "s")["state"]
        copy = tmp_path / "copy"
        run("cp", disk.snapshots / "s", copy)
        run("e2fsck", "-fp", copy, check=False)
        run("e2fsck", "-fn", copy)
        with mounted_loop(copy, tmp_path / "backup", "ro") as where:
            assert 48 * MIB == len((where / "old").read_bytes())
        (disk.snapshots / "s").unlink()  # room for the journal's replay
        run("e2fsck", "-fp", disk.active, check=False)
        run("e2fsck", "-fn", disk.active)


@pytest.mark.parametrize("policy", ["break-snapshot", "break-guest-write"])
def test_temp_limit_is_exact_and_can_be_changed(mount, policy):
    disk = mount(os.urandom(4 * MIB), "temp-limit=1M", f"on-cbw-error={policy}")
    moment = disk.active.read_bytes()
    disk.create("s")
    disk.write(0, b"x" * MIB)
    assert MIB == disk.json("status")["temp"]["used_bytes"]
    assert 95 == disk.json("status")["temp"]["warning_percent"]
    if policy == "break-snapshot":
        disk.write(MIB, b"x" * K64)
        assert 1 == state_of(disk, "s")["clusters"]["lost"]
    else:
        with pytest.raises(OSError, match="No space left"):
            disk.write(MIB, b"x" * K64)
        assert moment[MIB:] == disk.image.read_bytes()[MIB:]
    disk.snapfs("limit", disk.mountpoint, "2M")
    disk.write(2 * MIB, b"x" * MIB)
    assert 2 * MIB == disk.json("status", check=False)["temp"]["used_bytes"]
    disk.snapfs("limit", disk.mountpoint, "none")
    disk.write(3 * MIB, b"x" * MIB)
    assert moment[2 * MIB :] == disk.read("snapshots/s", 2 * MIB, 2 * MIB)


def test_on_a_file_system_without_a_free_byte_one_can_still_free(mount, tmp_path):
    with tmpfs(tmp_path / "full", "8M") as where:
        disk = mount(os.urandom(4 * MIB), f"state={where}/state", "temp-reserve=0")
        for name in ("a", "b"):
            disk.create(name)
        disk.write(0, b"x" * MIB)
        with contextlib.suppress(OSError), open(where / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        assert 0 == os.statvfs(where).f_bavail
        run("fallocate", "-p", "-o", "0", "-l", str(K64), disk.snapshots / "b")
        os.rename(disk.snapshots / "b", disk.snapshots / "c")
        (disk.snapshots / "a").unlink()
        disk.stop()
        disk.start()
        assert ["c"] == os.listdir(disk.snapshots)
        (disk.snapshots / "c").unlink()
        disk.stop()
