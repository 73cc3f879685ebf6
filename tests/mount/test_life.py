"""What people do to mounts: cover them, bind them, rename what is above, use what is on them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapfs.client import mountinfo, unmounting
from tests.support.mounted import (
    MIB,
    ODD_NAMES,
    PATIENCE,
    SNAPFS,
    Mounted,
    is_clean,
    mounts_below,
    run,
    terminate,
    wait_end,
)

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif("os.geteuid()", reason="mounting other file systems takes root"),
]

PARTIAL, MOUNT_FAILURE = 3, 32
AUTOMOUNT = Path(__file__).parent.parent / "support" / "automount.py"


@contextmanager
def mounted(*arguments: str | Path) -> Iterator[None]:
    """Mount something at the last argument, until the end if it is not unmounted before."""
    run("mount", *arguments)
    try:
        yield
    finally:
        run("umount", "-l", arguments[-1], check=False)


# Which mount is unmounted


def test_a_signal_does_not_unmount_what_is_mounted_over_it(mount):
    disk = mount(MIB)
    with mounted("-t", "tmpfs", "over", disk.mountpoint):
        (disk.mountpoint / "file").touch()
        terminate(disk.pid)
        assert ["file"] == os.listdir(disk.mountpoint)
    assert is_clean(disk)
    left = disk.snapfs("umount", disk.mountpoint, check=False)  # which says that its daemon is gone
    assert (7, True) == (left.returncode, "is unmounted" in left.stderr)


def test_umount_does_not_unmount_what_is_mounted_over_it(mount):
    disk = mount(MIB)
    with mounted("-t", "tmpfs", "over", disk.mountpoint):
        (disk.mountpoint / "file").touch()
        for option in ([], ["-l"], ["-f"]):
            done = disk.snapfs("umount", disk.mountpoint, *option, check=False)
            assert done.returncode
            assert "over is mounted over the snapfs" in done.stderr
        assert ["file"] == os.listdir(disk.mountpoint)
    disk.stop()


def test_a_directory_above_is_renamed(mount, tmp_path):
    disk = mount(MIB, start=False)
    above = tmp_path / "above"
    disk.mountpoint = above / "mnt"
    disk.mountpoint.mkdir(parents=True)
    disk.start()
    disk.create("s")
    above.rename(tmp_path / "elsewhere")
    now = tmp_path / "elsewhere" / "mnt"
    with open(now / "active", "r+b") as file:  # what is dirty gets there, and into the snapshot
        file.write(b"x")
    run(*SNAPFS, "create", now, "t")
    assert b"x" == (now / "snapshots" / "t").read_bytes()[:1]
    terminate(disk.pid)
    assert [] == mounts_below(tmp_path)
    assert is_clean(disk)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_directory_above_is_replaced_in_the_middle(mount, tmp_path, monkeypatch, lazy):
    """By its owner, who would have a mount of somebody else unmounted by root."""
    theirs, others = tmp_path / "theirs", tmp_path / "others"
    disk = mount(MIB, start=False)
    disk.mountpoint = theirs / "mnt"
    for where in (theirs, others):
        (where / "mnt").mkdir(parents=True)
    disk.start()
    found = mountinfo.find_snapfs(str(disk.mountpoint))
    umount2 = unmounting.umount2

    def replaced(path: str, flags: int = 0) -> None:
        theirs.rename(tmp_path / "moved")
        theirs.symlink_to(others)
        try:
            umount2(path, flags)
        finally:
            theirs.unlink()
            (tmp_path / "moved").rename(theirs)

    with mounted("-t", "tmpfs", "other", others / "mnt"):
        monkeypatch.setattr(unmounting, "umount2", replaced)
        process = os.pidfd_open(disk.pid)
        unmounting.unmount(found, lazy=lazy)
        assert [str(others / "mnt")] == mounts_below(tmp_path)
    wait_end(process)


# Who else has the file system


def test_a_bind_mount_outlives_the_unmount(mount, tmp_path):
    disk = mount(b"abc")
    other = tmp_path / "other"
    other.mkdir()
    with mounted("--bind", disk.mountpoint, other):
        done = disk.snapfs("umount", disk.mountpoint, check=False)
        assert PARTIAL == done.returncode
        assert f"a mount on {other}" in done.stderr
        assert [str(other)] == mounts_below(tmp_path)
        assert b"abc" == (other / "active").read_bytes()
        process = os.pidfd_open(disk.pid)
        run(*SNAPFS, "umount", other)
    wait_end(process)
    assert is_clean(disk)


def test_a_mount_in_another_namespace_outlives_the_unmount(mount):
    disk = mount(b"abc")
    command = 'echo; read line; cat "$0"/active'
    with subprocess.Popen(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", command, disk.mountpoint],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as inside:  # fmt: skip
        inside.stdout.readline()
        done = disk.snapfs("umount", disk.mountpoint, check=False)
        assert PARTIAL == done.returncode
        where = f"a mount on {disk.mountpoint} in the mount namespace of sh (process {inside.pid})"
        assert where in done.stderr
        process = os.pidfd_open(disk.pid)
        assert b"abc" == inside.communicate(b"\n")[0]
    wait_end(process)
    assert is_clean(disk)


def test_umount_says_who_uses_the_mount(mount, tmp_path):
    disk = mount(64 * MIB)
    run("mkfs.ext4", "-q", disk.active)
    inner = Mounted(tmp_path / "inner.img", tmp_path / "inner")
    where = tmp_path / "fs"
    for directory in (where, inner.mountpoint):
        directory.mkdir()
    device = run("losetup", "--find", "--show", disk.active).stdout.strip()
    try:
        with mounted(device, where):
            inner.image = where / "inner.img"
            inner.image.write_bytes(bytes(MIB))
            done = disk.snapfs("umount", disk.mountpoint, check=False)
            assert f"the loop device {device}, mounted on {where}" in done.stderr
            assert "fuser" not in done.stderr
            inner.start()
            done = run(*SNAPFS, "umount", where, check=False)
            assert 5 == done.returncode
            inner.stop()
    finally:
        run("losetup", "--detach", device)
    disk.create("s")
    inner.image = disk.snapshots / "s"
    inner.options = ["ro", "any_fs", f"state={tmp_path}/state"]
    inner.start()
    held = subprocess.Popen(["sleep", "600"], cwd=disk.mountpoint)
    done = disk.snapfs("umount", disk.mountpoint, check=False)
    held.kill()
    held.wait()
    assert 1 == done.returncode
    assert f"sleep (process {held.pid})" in done.stderr
    assert f"(process {inner.pid}), which serves the snapfs on {inner.mountpoint}" in done.stderr
    inner.stop()
    disk.stop()


def test_umount_names_who_has_a_file_mapped(mount):
    disk = mount(MIB)
    command = "import mmap,sys; f = open(sys.argv[1]); m = mmap.mmap(f.fileno(), 4096, prot=1)"
    command += "; f.close(); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", command, disk.active],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        process.stdout.readline()
        done = disk.snapfs("umount", disk.mountpoint, check=False)
        process.communicate(b"\n")
    assert f"(process {process.pid})" in done.stderr


# A daemon that does not answer


@pytest.fixture
def stopped(mount) -> Iterator[Mounted]:
    """Its daemon is stopped, and lives on when the test is through."""
    disk = mount(b"abc")
    os.kill(disk.pid, signal.SIGSTOP)
    yield disk
    process = os.pidfd_open(disk.pid)
    os.kill(disk.pid, signal.SIGCONT)
    wait_end(process)


@pytest.mark.parametrize("option", ["-l", "-f", ""])
def test_a_daemon_that_is_stopped_keeps_no_mount(stopped, option, tmp_path):
    program = tmp_path / "umount.fuse.snapfs"
    program.symlink_to(Path(sys.executable).with_name("snapfs"))
    done = run(program, stopped.mountpoint, *[option] * bool(option), check=False)
    assert [] == mounts_below(tmp_path)
    if option == "-l":
        assert 0 == done.returncode
        assert "is unmounted, and all of it is stored once" in done.stderr
    else:
        assert MOUNT_FAILURE == done.returncode
        assert f"kill -CONT {stopped.pid}" in done.stderr


def test_a_lazy_umount_says_that_the_daemon_is_stopped(stopped, connections):
    done = stopped.snapfs("umount", "--lazy", stopped.mountpoint)
    assert f"kill -CONT {stopped.pid}" in done.stderr


def test_force_frees_who_waits_for_a_daemon_that_is_stopped(stopped, tmp_path):
    control = tmp_path / "control"
    control.mkdir()
    minor = mountinfo.find(str(stopped.mountpoint)).device.partition(":")[2]
    reader = subprocess.Popen(["cat", stopped.active], stderr=subprocess.PIPE, text=True)
    with mounted("-t", "fusectl", "none", control):
        while not int((control / minor / "waiting").read_text()):
            assert reader.poll() is None
            os.sched_yield()
    done = stopped.snapfs("umount", "--force", stopped.mountpoint, check=False)
    assert f"kill -CONT {stopped.pid}" in done.stderr
    assert "cat: " in reader.communicate()[1]
    assert [] == mounts_below(tmp_path)


def test_another_mount_that_has_the_number_now_is_not_aborted(mount, connections):
    """The kernel gives the lowest device number that is free, and the lowest id of a mount."""
    disk = mount(b"abc")
    for _ in range(10):
        found = mountinfo.identified(mountinfo.find(str(disk.mountpoint)))
        connection = unmounting.Connection(found)
        assert connection.is_there()
        disk.stop()
        disk = mount(b"def")
        now = mountinfo.find(str(disk.mountpoint))
        if (now.device, now.id) == (found.device, found.id):
            break  # else somebody else was faster
    else:
        raise AssertionError("the number was not given again")
    assert not connection.is_there()
    connection.abort()
    with pytest.raises(FileNotFoundError):
        unmounting.unmount(found)
    assert mountinfo.still(mountinfo.identified(now)).mountpoint == str(disk.mountpoint)
    assert b"def" == disk.active.read_bytes()
    unmounting.Connection(mountinfo.find(str(disk.mountpoint))).abort()
    with pytest.raises(OSError, match="not connected"):
        disk.active.read_bytes()
    run("umount", "-l", disk.mountpoint)


# What is at the mountpoint already


@pytest.mark.skipif(
    "autofs" not in Path("/proc/filesystems").read_text(), reason="the kernel has no autofs"
)
def test_mounting_on_demand(mount, tmp_path):
    """x-systemd.automount: whoever comes there but systemd's own group waits for us."""
    disk = mount(b"abc", start=False)
    helper = tmp_path / "mount.snapfs"
    helper.symlink_to(Path(sys.executable).with_name("snapfs"))
    options = ",".join(["x-systemd.automount", *disk.all_options])
    with subprocess.Popen(
        [sys.executable, AUTOMOUNT, disk.mountpoint, helper, disk.image, disk.mountpoint,
         "-o", options],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    ) as manager:  # fmt: skip
        try:
            assert b"armed\n" == manager.stdout.readline()
            with subprocess.Popen(["cat", disk.active], stdout=subprocess.PIPE) as reader:
                assert b"abc" == reader.communicate(timeout=PATIENCE)[0]
            disk.pid = disk.json("status")["mount"]["pid"]
            terminate(disk.pid)
            assert [str(disk.mountpoint)] == mounts_below(tmp_path)  # autofs is there
            assert is_clean(disk)
        finally:
            manager.stdin.close()
            assert 0 == manager.wait(PATIENCE)
            run("umount", "-l", disk.mountpoint, check=False)


def test_a_bind_mount_is_a_mountpoint(mount, tmp_path):
    disk = mount(b"abc", start=False)
    volume = tmp_path / "volume"
    volume.mkdir()
    with mounted("--bind", volume, disk.mountpoint):
        disk.start()
        assert b"abc" == disk.active.read_bytes()
        again = disk.snapfs("mount", disk.image, disk.mountpoint, check=False)
        assert "is busy" in again.stderr
        disk.stop()
        assert [str(disk.mountpoint)] == mounts_below(tmp_path)


# Names and options


@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_name_can_be_mounted(mount, tmp_path, name):
    disk = mount(b"abc", start=False)
    disk.image = disk.image.rename(tmp_path / name)
    disk.mountpoint = tmp_path / f"mnt {name}"
    disk.mountpoint.mkdir()
    disk.start()
    status = disk.json("status")
    assert (str(disk.image), str(disk.mountpoint)) == (
        status["image"]["path"],
        status["mount"]["mountpoint"],
    )
    run(*SNAPFS, "create", disk.mountpoint, "s")
    assert ["s"] == [each["name"] for each in disk.json("list")["snapshots"]]
    assert b"abc" == (disk.snapshots / "s").read_bytes()
    again = run(*SNAPFS, "mount", disk.image, disk.mountpoint, check=False, binary=True)
    assert b"is busy" in again.stderr
    plain = run(*SNAPFS, "status", disk.mountpoint, binary=True).stdout
    assert b": healthy\nImage " in plain  # with its name so that it can be printed
    disk.stop()
    assert [] == [each for each in mounts_below(tmp_path)]


def test_a_name_as_long_as_can_be(mount, tmp_path):
    disk = mount(b"abc", start=False)
    where = tmp_path
    while len(str(where)) < 3800:
        where /= "d" * 200
    where.mkdir(parents=True)
    disk.image = disk.image.rename(where / "disk.img")
    disk.options = [f"state={tmp_path}/state"]
    disk.start()
    assert str(disk.image) == disk.json("status")["image"]["path"]
    disk.stop()
    shutil.rmtree(tmp_path / ("d" * 200))


def options_of(path: Path) -> tuple[str, set[str]]:
    found = run("findmnt", "-J", "-o", "SOURCE,OPTIONS", path).stdout
    entry = json.loads(found)["filesystems"][-1]
    return entry["source"], set(entry["options"].split(","))


def test_options_for_the_kernel(mount):
    disk = mount(
        MIB, "fsname=a\\,b", "max_read=64K", "nodiratime", "lazytime", "strictatime", "dirsync",
        "nosymfollow", "silent", "noexec",
    )  # fmt: skip
    source, options = options_of(disk.mountpoint)
    assert "a,b" == source
    assert {"max_read=65536", "nodiratime", "lazytime", "dirsync", "nosymfollow"} <= options
    assert {"noexec", "nosuid", "nodev"} <= options
    assert b"\0" * MIB == disk.active.read_bytes()
    disk.stop()


def test_remount_is_refused_with_the_remedy(mount):
    disk = mount(MIB)
    done = disk.snapfs("mount", disk.image, disk.mountpoint, "-o", "remount,ro", check=False)
    assert 2 == done.returncode
    assert "unmount it and mount it again" in done.stderr
    disk.stop()
