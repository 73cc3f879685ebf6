"""Temp storage that is full, and calls that fail, under the real mount."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.calls import state_of
from tests.support.filesystems import make_ext4, mounted_loop, tmpfs, use_file_system
from tests.support.mounted import K64, MIB, SNAPFS, run
from tests.support.patched import SLOW, UNHURRIED, Patched, hurry

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif("os.geteuid()", reason="needs root to mount a tmpfs"),
]


@contextlib.contextmanager
def small(mount, tmp_path: Path, content: int | bytes, size: str, *options: str):
    """An image whose state is on a tmpfs of `size`."""
    with tmpfs(tmp_path / "small", size) as where:
        disk = mount(content, f"state={where}/state", *options)
        try:
            yield disk
        finally:
            disk.stop()


def test_a_full_temp_file_system_breaks_the_snapshot_and_no_guest_write(mount, tmp_path):
    with small(mount, tmp_path, 128 * MIB, "16M", "temp-reserve=0") as disk:
        make_ext4(disk.active)
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
    # Without a hole, so that it does not matter which blocks the guest chooses.
    with small(mount, tmp_path, os.urandom(128 * MIB), "16M", *options) as disk:
        make_ext4(disk.active, "nodiscard")
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
    status = disk.json("status", check=False)
    assert (MIB, 95) == (status["temp"]["used_bytes"], status["temp"]["warning_percent"])
    assert ["temp-space"] == [problem["kind"] for problem in status["problems"]]
    assert not status["mount"]["healthy"]
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


@contextlib.contextmanager
def made(kind: str, where: Path) -> Iterator[Path]:
    """A small file system of a kind."""
    if kind == "tmpfs":
        with tmpfs(where, "8M"):
            yield where
        return
    if shutil.which(f"mkfs.{kind}") is None or f"\t{kind}\n" not in Path(
        "/proc/filesystems"
    ).read_text(encoding="ascii"):
        pytest.skip(f"no {kind} here")
    device = where.with_suffix(".device")
    with open(device, "wb") as file:
        file.truncate(320 * MIB)  # XFS wants 300
    run(f"mkfs.{kind}", "-q", device)
    where.mkdir()
    run("mount", "-o", "loop", device, where)
    try:
        yield where
    finally:
        run("umount", where)


def fill(where: Path) -> None:
    """Take every byte and every inode."""
    for size in (MIB, 4096, 1):
        with contextlib.suppress(OSError), open(where / f"filler{size}", "wb", 0) as filler:
            while True:
                filler.write(bytes(size))
    with contextlib.suppress(OSError):
        for number in range(100_000):
            (where / f"small{number}").write_bytes(b"x" * 4096)
    os.sync()


@pytest.mark.parametrize("durability", ["process", "power"])
@pytest.mark.parametrize("kind", ["tmpfs", "ext4", "xfs", "btrfs"])
def test_on_a_file_system_without_a_free_byte_one_can_still_free(mount, tmp_path, kind, durability):
    with made(kind, tmp_path / "full") as where:
        options = (f"state={where}/state", "temp-reserve=0", f"durability={durability}")
        disk = mount(os.urandom(4 * MIB), *options)
        moment = disk.active.read_bytes()
        for name in ("a", "b"):
            disk.create(name)
        disk.write(0, b"x" * MIB)
        fill(where)
        run("fallocate", "-p", "-o", "0", "-l", str(K64), disk.snapshots / "b")
        os.rename(disk.snapshots / "b", disk.snapshots / "c")
        fill(where)
        (disk.snapshots / "a").unlink()
        disk.write(0, b"y" * MIB)  # copies nothing, but is noted in a mapped file
        disk.stop()
        if kind != "xfs":  # where the control socket finds no inode if others took the last
            fill(where)
        disk.start()
        assert ["c"] == os.listdir(disk.snapshots)
        assert moment[K64:MIB] == disk.read("snapshots/c", K64, MIB - K64)
        disk.kill()
        disk.start()
        (disk.snapshots / "c").unlink()
        disk.stop()


# Copies of the cluster at 1 MiB fail with an I/O error.
BAD_CLUSTER = """
import errno, snapfs.storage.image as image
copy = image.copy_clusters
def bad(source, target, offset, length, cluster_size, budget):
    if offset <= 1 << 20 < offset + length:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return copy(source, target, offset, length, cluster_size, budget)
image.copy_clusters = bad
"""

# A punch of active is done in steps of 1 MiB, and the second one fails.
HALF = """
import errno, snapfs.engine.active, snapfs.storage.image as image
snapfs.engine.active.STEP = 1 << 20
punch = image.FileImage.punch
async def half(self, offset, length):
    if offset >= 1 << 20:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    await punch(self, offset, length)
image.FileImage.punch = half
"""

# Reads of the image and its creation of snapshots have a bug.
BUG = """
import snapfs.engine.engine as cbw
read = cbw.Engine.read
async def broken(self, offset, length):
    if offset == 1 << 20:
        raise RuntimeError("a bug")
    return await read(self, offset, length)
cbw.Engine.read = broken
"""


@contextlib.contextmanager
def patched(mount, content: bytes, patch: str, *options: str):
    disk = mount(content, "no_fastpath", *options, start=False)  # Python's copies
    daemon = Patched(disk, patch)
    try:
        yield disk, daemon
    finally:
        disk.stop()
        daemon.finish()


@pytest.mark.parametrize("policy", ["break-snapshot", "break-guest-write"])
def test_an_io_error_of_the_temp_image(mount, policy):
    moment = os.urandom(4 * MIB)
    with patched(mount, moment, BAD_CLUSTER, f"on-cbw-error={policy}") as (disk, daemon):
        snapshot = disk.create("s")
        if policy == "break-guest-write":
            with pytest.raises(OSError, match="Input/output"):
                disk.write(MIB - K64, b"x" * 3 * K64)
            assert moment == disk.image.read_bytes()
            assert moment == snapshot.read_bytes()
            assert "ok" == state_of(disk, "s")["state"]
            return
        disk.write(MIB - K64, b"x" * 3 * K64)
        assert b"x" * 3 * K64 == disk.image.read_bytes()[MIB - K64 : MIB + 2 * K64]
        found = state_of(disk, "s")
        assert ("incomplete", errno.EIO, 1) == (
            found["state"], found["errno"], found["clusters"]["lost"],
        )  # fmt: skip
        assert found["since"] > found["created"]
        with pytest.raises(PermissionError):
            disk.read("snapshots/s", MIB, 1)
        assert moment[:MIB] == disk.read("snapshots/s", 0, MIB)
        assert moment[MIB + K64 :] == disk.read("snapshots/s", MIB + K64, 4 * MIB)
        daemon.process.kill()
        daemon.process.wait()
        disk.start()  # nothing was saved in order since the failure
        assert {**state_of(disk, "s"), "temp_bytes": 0} == {**found, "temp_bytes": 0}


@pytest.mark.parametrize("policy", ["break-snapshot", "break-guest-write"])
def test_temp_storage_that_hangs(mount, policy):
    moment = os.urandom(4 * MIB)
    options = ("cbw-timeout=1", f"on-cbw-error={policy}")
    with patched(mount, moment, UNHURRIED + SLOW, *options) as (disk, daemon):
        snapshot = disk.create("s")
        disk.write(0, b"x" * K64)
        results: list[int] = []

        def write() -> None:
            try:
                disk.write(2 * MIB, b"x" * K64)
            except OSError as error:
                results.append(error.errno)
            else:
                results.append(0)

        hurry(disk, True)
        writer = threading.Thread(target=write)
        writer.start()
        daemon.wait_reached()
        for number in range(200):  # nobody else waits
            offset = number % 16 * K64 + MIB
            assert moment[offset : offset + 4096] == disk.read("snapshots/s", offset, 4096)
            assert moment[offset : offset + 4096] == disk.read("active", offset, 4096)
        writer.join()
        if policy == "break-guest-write":
            assert [errno.ETIMEDOUT] == results
            assert moment[2 * MIB :] == disk.image.read_bytes()[2 * MIB :]
        else:
            assert [0] == results
            assert errno.ETIMEDOUT == state_of(disk, "s")["errno"]
            with pytest.raises(PermissionError):
                disk.read("snapshots/s", 2 * MIB, 1)
        hurry(disk, False)
        daemon.go()
        if policy == "break-guest-write":
            disk.write(2 * MIB, b"x" * K64)
            assert moment == snapshot.read_bytes()


def test_a_snapshot_can_be_deleted_while_its_temp_storage_hangs(mount):
    with patched(mount, os.urandom(4 * MIB), SLOW, "cbw-timeout=1") as (disk, daemon):
        snapshot = disk.create("s")
        disk.write(2 * MIB, b"x" * K64)
        snapshot.unlink()
        assert [] == os.listdir(disk.snapshots)
        daemon.go()


def test_a_bug_costs_one_request_and_is_told(mount):
    content = os.urandom(4 * MIB)
    disk = mount(content, "no_fastpath", start=False)
    daemon = Patched(disk, BUG)
    fd = os.open(disk.active, os.O_RDONLY | os.O_DIRECT)
    with pytest.raises(OSError, match="Input/output"):
        os.pread(fd, 4096, MIB)
    os.close(fd)
    assert content[: 1 << 19] == disk.read("active", 0, 1 << 19)
    disk.write(0, b"x")
    status = disk.snapfs("status", disk.mountpoint, "--json", check=False)
    assert 1 == status.returncode
    assert "a bug" in json.loads(status.stdout)["mount"]["reason"]
    disk.stop()
    returned, stderr = daemon.finish()
    assert 0 == returned
    assert 'RuntimeError("a bug")' in stderr or "RuntimeError: a bug" in stderr


def test_a_punch_that_fails_half_way_leaves_no_old_page(mount):
    moment = os.urandom(4 * MIB)
    with patched(mount, moment, HALF) as (disk, _):
        assert moment == disk.active.read_bytes()  # cached now
        done = run("fallocate", "-p", "-l", str(2 * MIB), disk.active, check=False)
        assert "Input/output error" in done.stderr
        assert bytes(MIB) + moment[MIB:] == disk.active.read_bytes()
        assert disk.image.read_bytes() == disk.active.read_bytes()


def test_a_log_that_nobody_reads_holds_up_nobody(mount):
    disk = mount(MIB, start=False)
    daemon = Patched(disk, "")
    stderr = os.open(f"/proc/{daemon.process.pid}/fd/2", os.O_WRONLY | os.O_NONBLOCK)
    for size in (4096, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(stderr, b"x" * size)
    os.close(stderr)
    for name in "abc":
        disk.create(name)  # a line each
    assert ["a", "b", "c"] == [each["name"] for each in disk.json("list")["snapshots"]]
    disk.stop()
    assert 1 == daemon.finish()[0]  # some of the log is lost
    disk.start()
    assert disk.json("status")["mount"]["healthy"]
    disk.stop()


def test_random_names_of_attributes_are_answered(mount):
    disk = mount(os.urandom(K64))
    snapshot = disk.create("s")
    chance = random.Random(1)
    for number in range(5_000):
        length = chance.choice((1, 5, 200))
        name = "user." + "".join(chr(chance.randrange(33, 0x24F)) for _ in range(length))
        name = name.encode()[:255].decode(errors="ignore")
        path = (snapshot, disk.active, disk.mountpoint)[number % 3]
        with pytest.raises(OSError) as caught:
            os.getxattr(path, name)
        assert caught.value.errno in (errno.EOPNOTSUPP, errno.ENODATA)
        with pytest.raises(OSError):
            os.setxattr(path, name, chance.randbytes(9))
    assert disk.json("status")["mount"]["healthy"]


@pytest.mark.parametrize("policy", ["break-snapshot", "break-guest-write"])
def test_what_fails_again_and_again_is_logged_once(mount, policy):
    disk = mount(os.urandom(4 * MIB), "temp-limit=0", f"on-cbw-error={policy}", start=False)
    daemon = Patched(disk, "")
    disk.create("s")
    for number in range(20):
        with contextlib.suppress(OSError):
            disk.write(number * K64, b"x")
    disk.stop()
    lines = [line for line in daemon.finish()[1].splitlines() if "ERROR" in line]
    assert 1 == len(lines), lines
    assert "temp-limit=0 is reached" in lines[0]


def test_events_tell_of_temp_space_and_of_losses(mount):
    disk = mount(os.urandom(4 * MIB), f"temp-limit={20 * K64}")
    disk.create("s")
    lines = subprocess.Popen(
        [*SNAPFS, "events", disk.mountpoint, "--json"], stdout=subprocess.PIPE, text=True
    )
    try:
        for number in range(24):
            disk.write(number * K64, b"x")
        assert lines.stdout is not None
        found = [json.loads(lines.stdout.readline()) for _ in range(3)]
    finally:
        lines.kill()
        lines.communicate()
    assert ["temp-space", "temp-space", "incomplete"] == [each["event"] for each in found]
    assert [80, 95] == [each["percent"] for each in found[:2]]
    assert ("s", errno.ENOSPC) == (found[2]["snapshot"], found[2]["errno"])
    once = disk.snapfs("events", disk.mountpoint, "--once").stdout.splitlines()
    assert 3 == len(once)
    assert "incomplete snapshot=s" in once[2]


ODD = """
import snapfs.storage.image as image
class Odd:
    def __getattr__(self, name):
        return getattr(os, name)
    def pwritev(self, *rest):
        raise OSError(524, "ENOTSUPP of the kernel")
    def pwrite(self, *rest):
        raise OSError(524, "ENOTSUPP of the kernel")
    def fdatasync(self, fd):
        raise OSError(38, "Function not implemented")
image.os = Odd()
"""


def test_errnos_that_are_none_do_not_end_the_mount(mount):
    disk = mount(bytes(1 << 20), "no_fastpath", start=False)
    daemon = Patched(disk, ODD)
    try:
        with open(disk.active, "r+b", buffering=0) as file:
            for _ in range(3):
                with pytest.raises(OSError) as caught:
                    os.pwrite(file.fileno(), b"x", 0)
                assert errno.EIO == caught.value.errno
                with pytest.raises(OSError) as caught:  # once more, too: it was not believed
                    os.fsync(file.fileno())
                assert errno.EOPNOTSUPP == caught.value.errno
        assert bytes(1 << 20) == disk.active.read_bytes()
        reason = disk.json("status", check=False)["mount"]["reason"]
        assert "the image could not be written back" in reason
    finally:
        disk.snapfs("umount", disk.mountpoint, check=False)
        _, stderr = daemon.finish()
    assert 1 == stderr.count("ENOTSUPP of the kernel")
