"""Block devices as destinations: until it is whole, what lies there is no disk."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from snapfs.backup import devices
from tests.support.calls import copy
from tests.support.filesystems import loop_device, make_ext4
from tests.support.mounted import DYING, K64, MIB, SNAPFS, run
from tests.support.patched import Program, held_copy
from tests.support.patterns import pattern
from tests.support.steps import some_steps

pytestmark = pytest.mark.mount

SIZE = 24 * MIB
TITLE = b"SNAPFS UNFINISHED COPY "


@pytest.fixture(autouse=True)
def _state(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def device(tmp_path):
    """A loop device, larger than the images, full of 0xff."""
    (tmp_path / "device").write_bytes(b"\xff" * (SIZE + MIB))
    with loop_device(tmp_path / "device") as path:
        yield path


def content_of(device: Path) -> bytes:
    """What is on the device, past all caches."""
    run("blockdev", "--flushbufs", device)
    return device.read_bytes()


def stopped(disk, name: str, device: Path, *options: str) -> None:
    """A copy that was killed when some of it was durable, and not yet whole."""
    command = ["copy", disk.snapshots / name, device, "--force", *options]
    copying = Program(held_copy(12 * MIB), *command)
    copying.wait_reached()
    assert position(device) > devices.HEAD_BYTES
    copying.end(signal.SIGKILL)
    assert content_of(device).startswith(TITLE)


def position(device: Path) -> int:
    mark = devices.read_mark(str(device))
    return 0 if mark is None else json.loads(mark[1])["position"]


@pytest.mark.parametrize("size", [100, 130_000, 2 * MIB + 7, SIZE])
def test_a_copy_takes_force_and_leaves_what_is_behind_it(mount, tmp_path, device, size):
    content = pattern(size)
    disk = mount(content)
    disk.create("s")
    done = copy(disk, "s", device, check=False)
    assert 2 == done.returncode
    assert "--force" in done.stderr
    copy(disk, "s", device, "--force", "--discard")
    assert content + b"\xff" * (SIZE + MIB - size) == content_of(device)
    assert 0 == disk.json("show", "s")["snapshot"]["clusters"]["accessible"]
    assert not list(Path("/dev").glob("*.partial"))


def test_a_device_that_is_mounted_or_too_small_is_refused(mount, tmp_path, device):
    disk = mount(SIZE + 2 * MIB)
    disk.create("s")
    done = copy(disk, "s", device, "--force", check=False)
    assert (1, True) == (done.returncode, f"has {SIZE + MIB} bytes" in done.stderr)
    make_ext4(device)
    (tmp_path / "fs").mkdir()
    run("mount", device, tmp_path / "fs")
    try:
        done = copy(disk, "s", device, "--force", check=False)
        assert (1, True) == (done.returncode, "is mounted" in done.stderr)
    finally:
        run("umount", tmp_path / "fs")


@pytest.mark.slow
def test_an_unfinished_copy_is_no_disk_and_goes_on_after_a_reboot(mount, tmp_path):
    """The device comes back by another name, and nothing in /dev has survived."""
    disk = mount(SIZE)
    make_ext4(disk.active)
    disk.write(8 * MIB, os.urandom(8 * MIB))
    content = disk.active.read_bytes()
    disk.create("s")
    file = tmp_path / "device"
    run("cp", disk.image, file)  # a file system was there before as well
    with loop_device(file) as device:
        assert "ext4" in run("blkid", "-p", device).stdout
        stopped(disk, "s", device, "--discard")
        assert "" == run("blkid", "-p", device, check=False).stdout
        head = device.read_bytes()[: devices.HEAD_BYTES]
        assert b"Finish it with the same command" in head[:400]
        # Nor is anything left that blkid looks for beyond the mark, such as btrfs.
        assert bytes(devices.HEAD_BYTES - devices.MARK_BYTES) == head[devices.MARK_BYTES :]
        disk.write(0, b"x" * 12 * MIB)
    with loop_device(tmp_path / "device") as device:
        done = copy(disk, "s", device, "--force", "--discard", "--json")
        summary = json.loads(done.stdout.splitlines()[-1])
        assert devices.HEAD_BYTES < summary["resumed_at"]
        assert content == content_of(device)
        assert "ext4" in run("blkid", "-p", device).stdout
    assert 0 == disk.json("show", "s")["snapshot"]["clusters"]["accessible"]


@pytest.mark.slow
def test_an_increment_without_the_head_gets_it_back_in_the_end(mount, tmp_path, device):
    disk = mount(os.urandom(SIZE))
    disk.create("full")
    copy(disk, "full", device, "--force")
    disk.snapfs("bitmap", "add", disk.mountpoint, "b")
    disk.write(4 * MIB, os.urandom(16 * MIB))
    disk.write(K64, os.urandom(K64))  # some of the head
    disk.snapfs("create", disk.mountpoint, "incr", "--bitmap", "b")
    content = disk.active.read_bytes()
    stopped(disk, "incr", device, "--discard")
    token, _ = devices.read_mark(str(device))
    head = Path(devices.state_directory()) / f"{token}.head"
    assert 0o600 == head.stat().st_mode & 0o777
    done = copy(disk, "full", device, "--force", "--format", "qcow2", check=False)
    assert 2 == done.returncode
    copy(disk, "incr", device, "--force", "--discard")
    assert content + b"\xff" * MIB == content_of(device)
    assert not head.exists()


def test_heads_outlive_a_reboot(monkeypatch):
    monkeypatch.delenv("XDG_STATE_HOME")
    assert "/var/lib/snapfs" == devices.state_directory()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert "/home/somebody/.local/state/snapfs" == devices.state_directory()


@pytest.mark.slow
def test_an_increment_whose_head_is_gone_takes_a_full_copy(mount, device):
    disk = mount(os.urandom(SIZE))
    disk.create("full")
    copy(disk, "full", device, "--force")
    disk.snapfs("bitmap", "add", disk.mountpoint, "b")
    disk.write(4 * MIB, os.urandom(16 * MIB))
    disk.snapfs("create", disk.mountpoint, "incr", "--bitmap", "b")
    stopped(disk, "incr", device)
    token, _ = devices.read_mark(str(device))
    head = Path(devices.state_directory()) / f"{token}.head"
    kept = head.read_bytes()
    head.write_bytes(kept[:-5])
    done = copy(disk, "incr", device, "--force", check=False)
    assert (4, True) == (done.returncode, "copy a full snapshot" in done.stderr)
    disk.write(0, b"new")
    disk.snapfs("bitmap", "add", disk.mountpoint, "c")
    disk.snapfs("create", disk.mountpoint, "other", "--bitmap", "c")
    done = copy(disk, "other", device, "--force", check=False)
    assert (4, True) == (done.returncode, "unfinished copy of something else" in done.stderr)
    disk.create("now")
    copy(disk, "now", device, "--force")
    assert disk.active.read_bytes() == content_of(device)[:SIZE]
    assert not head.exists()


@pytest.mark.slow
def test_a_torn_mark_is_still_one(mount, device):
    disk = mount(os.urandom(SIZE))
    disk.create("s")
    stopped(disk, "s", device)
    content = device.read_bytes()[:4096]
    with open(device, "r+b") as file:
        file.write(content[: content.index(b"{") + 20] + b"\xee" * 100)
    copy(disk, "s", device, "--force")
    assert disk.active.read_bytes() == content_of(device)[:SIZE]


def test_an_incomplete_snapshot_leaves_the_mark_unless_that_is_allowed(mount, device):
    disk = mount(os.urandom(SIZE), "temp-limit=1M")
    disk.create("s")
    for offset in range(2 * MIB, 6 * MIB, MIB):
        disk.write(offset, b"x" * MIB)
    now = disk.active.read_bytes()
    done = copy(disk, "s", device, "--force", check=False)
    assert (4, True) == (done.returncode, "stays marked as partial" in done.stderr)
    assert content_of(device).startswith(TITLE)
    done = copy(disk, "s", device, "--force", "--allow-missing", check=False)
    assert (4, True) == (done.returncode, "has no mark any more" in done.stderr)
    found = content_of(device)
    assert (now[: 2 * MIB], now[6 * MIB :]) == (found[: 2 * MIB], found[6 * MIB : SIZE])


@pytest.mark.parametrize("size", [5000, 3 * MIB + 5, SIZE])
def test_a_restore_takes_force_and_ends_with_the_head(mount, tmp_path, device, size):
    content = pattern(size)
    disk = mount(content)
    directory = tmp_path / "backup"
    run(*SNAPFS, "backup", "--init", directory)
    disk.snapfs("backup", disk.mountpoint, directory)
    assert 2 == run(*SNAPFS, "restore", directory, device, check=False).returncode
    run(*SNAPFS, "restore", directory, device, "--force")
    assert content + b"\xff" * (SIZE + MIB - size) == content_of(device)


def test_a_disk_that_shrank_goes_back_to_a_device_of_its_size(mount, tmp_path):
    disk = mount(os.urandom(4 * MIB))
    directory = tmp_path / "backup"
    run(*SNAPFS, "backup", "--init", directory)
    disk.snapfs("backup", disk.mountpoint, directory)
    os.truncate(disk.active, 2 * MIB)
    disk.snapfs("backup", disk.mountpoint, directory)
    (tmp_path / "two").write_bytes(bytes(2 * MIB))
    with loop_device(tmp_path / "two") as device:
        run(*SNAPFS, "restore", directory, device, "--force")
        assert disk.active.read_bytes() == content_of(device)


def test_a_restore_that_finds_damage_leaves_no_disk(mount, tmp_path, device):
    disk = mount(b"the head" * 8192 + os.urandom(4 * MIB))
    disk.write(3 * MIB, b"a needle in the hay")
    directory = tmp_path / "backup"
    run(*SNAPFS, "backup", "--init", directory)
    disk.snapfs("backup", disk.mountpoint, directory)
    (point,) = directory.glob("*.qcow2")
    content = point.read_bytes()
    point.write_bytes(content.replace(b"a needle", b"a weedle"))
    done = run(*SNAPFS, "restore", directory, device, "--force", check=False)
    assert (4, True) == (done.returncode, "is damaged" in done.stderr)
    assert content_of(device).startswith(TITLE)
    disk.create("s")
    copy(disk, "s", device, "--force")
    assert content_of(device).startswith(b"the head")


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("whole", [True, False])
def test_killed_at_any_step_the_device_is_old_marked_or_whole(mount, tmp_path, device, whole):
    """And the same command makes it whole, whatever the step was."""
    disk = mount(os.urandom(2 * MIB))
    disk.create("full")
    copy(disk, "full", device, "--force")
    old = content_of(device)[: 2 * MIB]
    disk.snapfs("bitmap", "add", disk.mountpoint, "b")
    disk.write(MIB + K64, os.urandom(3 * K64))
    options = [] if whole else ["--bitmap", "b"]
    disk.snapfs("create", disk.mountpoint, "s", *options)
    new = disk.active.read_bytes()
    for step in some_steps():
        copy(disk, "full", device, "--force")
        command = ["copy", disk.snapshots / "s", device, "--force"]
        done = run(*DYING, str(step), *command, check=False)
        found = content_of(device)[: 2 * MIB]
        if done.returncode != -signal.SIGKILL:
            assert (0, new) == (done.returncode, found), done.stderr
            break
        assert found in (old, new) or found.startswith(TITLE), step
        run(*SNAPFS, *command)
        assert new == content_of(device)[: 2 * MIB], step
    assert step > 12
    assert not list(Path(devices.state_directory()).glob("*.head"))
