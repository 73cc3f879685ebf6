"""mount.snapfs and umount.fuse.snapfs as mount(8) and umount(8) call them."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mounted import PATIENCE, SNAPFS, Mounted, let_others_in, mounts_below, run

pytestmark = pytest.mark.mount

MOUNT_USAGE, MOUNT_FAILURE = 1, 32


@pytest.fixture
def helper(tmp_path: Path):
    """Call the program by another name, as the links of scripts/install do."""
    program = Path(sys.executable).with_name("snapfs")

    def call(name: str, *arguments: str | Path, check: bool = True):
        link = tmp_path / name
        if not link.exists():
            link.symlink_to(program)
        return run(link, *arguments, check=check)

    return call


@pytest.fixture
def disk(mount) -> Mounted:
    return mount(1 << 20, start=False)


@pytest.mark.parametrize("umount", ["umount.fuse.snapfs", "umount.snapfs"])
def test_mount_and_umount_by_their_helpers(disk, helper, umount):
    helper("mount.snapfs", disk.image, disk.mountpoint, "-n", "-o", "rw,noauto,cbw-timeout=3")
    assert disk.active.exists()
    daemon = disk.json("status")["mount"]["pid"]
    helper(umount, disk.mountpoint, "-n")
    assert [] == mounts_below(disk.mountpoint)
    assert "snapfs" not in cmdline(daemon)


def cmdline(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    except FileNotFoundError:
        return ""


def test_the_form_of_fuse_snapfs(disk, helper):
    helper("snapfs", disk.image, disk.mountpoint, "-o", "ro,dev,suid")
    options = run("findmnt", "-no", "OPTIONS", disk.mountpoint).stdout
    assert "ro" in options.strip().split(",")


def test_a_dry_run_mounts_nothing(disk, helper):
    helper("mount.snapfs", "-f", disk.image, disk.mountpoint)
    assert [] == mounts_below(disk.mountpoint)
    assert not disk.state.exists()


def test_unknown_options_are_refused_unless_sloppy(disk, helper):
    refused = helper("mount.snapfs", disk.image, disk.mountpoint, "-o", "cbw-timout=3", check=False)
    assert MOUNT_USAGE == refused.returncode
    assert "did you mean cbw-timeout?" in refused.stderr
    helper("mount.snapfs", "-s", disk.image, disk.mountpoint, "-o", "cbw-timout=3")
    assert disk.active.exists()


def test_exit_statuses_are_those_of_mount(disk, helper, tmp_path):
    missing = helper("mount.snapfs", tmp_path / "none", disk.mountpoint, check=False)
    assert MOUNT_FAILURE == missing.returncode
    helper("mount.snapfs", disk.image, disk.mountpoint)
    other = tmp_path / "other"
    other.mkdir()
    second = helper("mount.snapfs", disk.image, other, check=False)
    assert MOUNT_FAILURE == second.returncode
    assert 1 == second.stderr.count("\n")
    held = os.open(disk.active, os.O_RDONLY)
    busy = helper("umount.fuse.snapfs", disk.mountpoint, check=False)
    os.close(held)
    assert MOUNT_FAILURE == busy.returncode
    assert "in use" in busy.stderr


@pytest.mark.skipif("os.geteuid()", reason="another user is needed")
def test_another_users_mount_is_explained(disk, tmp_path):
    let_others_in(tmp_path)
    disk.start()
    os.chmod(disk.image, 0o644)
    refused = run(
        "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
        sys.executable, "-m", "snapfs", "list", disk.mountpoint, check=False,
    )  # fmt: skip
    assert 1 == refused.returncode
    assert "only the owner of the mount may control it" in refused.stderr


@pytest.fixture
def manager(tmp_path, monkeypatch):
    """What systemd hears."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(PATIENCE)
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield manager


def test_the_daemon_tells_systemd(mount, manager):
    disk = mount(b"o" * (1 << 20), start=False)
    daemon = subprocess.Popen(
        [*SNAPFS, "mount", "-f", disk.image, disk.mountpoint], stderr=subprocess.DEVNULL
    )
    assert b"READY=1" == manager.recv(4096)
    told = manager.recv(4096).decode()
    assert f"STATUS=serving {disk.image}; 0 snapshots; 0 B of temp space" == told
    disk.snapfs("create", disk.mountpoint, "s")
    disk.write(0, b"x")
    while not re.fullmatch(r"STATUS=serving \S+; 1 snapshot; [1-9]\S* KiB of temp space", told):
        told = manager.recv(4096).decode()  # raises TimeoutError
    assert 1 << 20 == disk.active.stat().st_size
    command = "echo -900 > /proc/self/oom_score_adj"
    if not run("sh", "-c", command, check=False).returncode:  # where it is permitted
        score = Path(f"/proc/{daemon.pid}/oom_score_adj").read_text()
        assert int(score) < 0
    daemon.terminate()
    while told != "STOPPING=1":
        told = manager.recv(4096).decode()
    assert 0 == daemon.wait(timeout=PATIENCE)


# The command, which dies as soon as it has forked, and a daemon that begins when it is dead.
DYING = """
import os, sys
from snapfs import cli
from snapfs.daemon import starting
alive, held = os.pipe()
begin = starting._run_in_background
def later(*arguments):
    os.close(held)
    os.read(alive, 1)
    return begin(*arguments)
starting._run_in_background = later
starting._wait_ready = lambda _: os._exit(0)
cli.main(sys.argv[1:])
"""


def test_the_daemon_serves_though_the_command_that_mounts_has_died(mount, manager):
    disk = mount(b"abc", start=False)
    run(sys.executable, "-c", DYING, "mount", disk.image, disk.mountpoint)
    assert b"READY=1" == manager.recv(4096)
    assert b"abc" == disk.active.read_bytes()
    disk.stop()
    assert "nobody waits for the mount" in (disk.state / "daemon.log").read_text()


# A daemon that dies of an error when it is ready and has opened files.
FAILING = """
import os, sys
from snapfs import cli
from snapfs.daemon import daemon
def serve(config, ready, outsider):
    ready()
    for number in range(20):
        os.open(f"{config.state}.{number}", os.O_RDWR | os.O_CREAT)
    os.open(f"{config.state}.alive", os.O_WRONLY)
    raise OSError(5, "failed later")
daemon.serve = serve
cli.main(sys.argv[1:])
"""


def test_the_error_of_a_daemon_that_was_ready_gets_into_no_other_file(mount):
    disk = mount(b"abc", start=False)
    alive = Path(f"{disk.state}.alive")
    os.mkfifo(alive)
    run(sys.executable, "-c", FAILING, "mount", disk.image, disk.mountpoint)
    assert b"" == alive.read_bytes()  # until the daemon is dead
    opened = list(disk.state.parent.glob(f"{disk.state.name}.[0-9]*"))
    assert 20 == len(opened)
    assert {0} == {file.stat().st_size for file in opened}


def test_the_daemon_serves_though_nobody_hears_that_it_is_ready(mount, manager):
    disk = mount(b"abc", start=False)
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(
        [*SNAPFS, "mount", "-f", "--ready-fd", str(writer), disk.image, disk.mountpoint],
        pass_fds=[writer],
        stderr=subprocess.PIPE,
        text=True,
    ) as daemon:
        os.close(writer)
        assert b"READY=1" == manager.recv(4096)
        disk.stop()
        assert "nobody waits for the mount" in daemon.communicate(timeout=PATIENCE)[1]
    assert 0 == daemon.returncode


def test_the_daemon_keeps_no_descriptor_of_whoever_mounts(mount, tmp_path):
    """As in `flock FILE snapfs mount`: the lock would be held as long as the mount lives."""
    disk = mount(1 << 20, start=False)
    with open(tmp_path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        options = [word for option in disk.all_options for word in ("-o", option)]
        command = [*SNAPFS, "mount", disk.image, disk.mountpoint, *options]
        subprocess.run(command, check=True, pass_fds=[lock.fileno()])
    with open(tmp_path / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    disk.stop()
