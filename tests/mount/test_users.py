"""Mounts of ordinary users, and what root may do about them.

One after the other: one of these takes all names of daemons that a user can have.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounted import (
    ODD_NAMES,
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
    pytest.mark.xdist_group("users"),
    pytest.mark.skipif("os.geteuid()", reason="becoming an ordinary user takes root"),
]

USER = 65534


@pytest.fixture
def user_disk(request) -> Iterator[Mounted]:
    """An image of an ordinary user, not mounted; anybody may go to its directory."""
    where = Path(tempfile.mkdtemp(prefix="snapfs-test-"))
    node = where / "fuse"
    bound = not os.stat("/dev/fuse").st_mode & 2
    if bound:
        run("mknod", "-m", "666", node, "c", "10", "229")
        run("mount", "--bind", node, "/dev/fuse")
    disk = Mounted(where / "disk.img", where / "mnt")
    try:
        disk.mountpoint.mkdir()
        disk.image.write_bytes(b"abc")
        for path in (where, disk.image, disk.mountpoint):
            os.chown(path, USER, USER)
        where.chmod(0o755)
        yield disk
    finally:
        if mounts_below(where):
            run("umount", "-l", disk.mountpoint, check=False)
        if bound:
            run("umount", "/dev/fuse")
        shutil.rmtree(where)


def as_user(*command: str | Path, check: bool = True):
    user = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups")
    return run(*user, *command, check=check)


def start_as_user(disk: Mounted) -> None:
    options = [word for option in disk.all_options for word in ("-o", option)]
    as_user(*SNAPFS, "mount", disk.image, disk.mountpoint, *options)
    disk.pid = json.loads(as_user(*SNAPFS, "status", disk.mountpoint, "--json").stdout)["mount"][
        "pid"
    ]


def test_root_unmounts_a_users_mount(user_disk):
    start_as_user(user_disk)
    with pytest.raises(PermissionError):
        os.listdir(user_disk.mountpoint)  # not even root sees it
    process = os.pidfd_open(user_disk.pid)
    assert user_disk.pid == user_disk.json("status")["mount"]["pid"]
    user_disk.stop()
    assert select.select([process], [], [], 0)[0]  # the daemon is gone when umount returns
    os.close(process)
    assert [] == mounts_below(user_disk.mountpoint)
    assert is_clean(user_disk)


def test_root_unmounts_a_users_mount_from_another_network(user_disk):
    start_as_user(user_disk)
    process = os.pidfd_open(user_disk.pid)
    run("unshare", "--net", *SNAPFS, "umount", user_disk.mountpoint)
    assert select.select([process], [], [], 0)[0]
    os.close(process)


@pytest.mark.parametrize("option", ["", "-l", "-f"])
def test_root_unmounts_a_users_mount_that_is_dead(user_disk, option):
    start_as_user(user_disk)
    user_disk.kill()
    done = user_disk.snapfs("umount", user_disk.mountpoint, *[option] * bool(option), check=False)
    assert (7, True) == (done.returncode, "is unmounted" in done.stderr)  # not in order
    assert [] == mounts_below(user_disk.mountpoint)


def test_root_unmounts_a_users_mount_that_is_stopped(user_disk):
    start_as_user(user_disk)
    os.kill(user_disk.pid, signal.SIGSTOP)
    process = os.pidfd_open(user_disk.pid)
    user_disk.snapfs("umount", "--lazy", user_disk.mountpoint)
    assert [] == mounts_below(user_disk.mountpoint)
    os.kill(user_disk.pid, signal.SIGCONT)
    wait_end(process)


def test_a_signal_unmounts_a_users_mount(user_disk):
    start_as_user(user_disk)
    terminate(user_disk.pid)
    assert [] == mounts_below(user_disk.mountpoint)
    assert is_clean(user_disk)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_user_mounts_any_name(user_disk, name):
    user_disk.image = user_disk.image.rename(user_disk.image.with_name(name))
    user_disk.options = ["max_read=64K", "nosymfollow", "lazytime", "nodiratime"]
    start_as_user(user_disk)
    found = run("findmnt", "-rno", "SOURCE", user_disk.mountpoint, binary=True).stdout
    assert found.strip()
    assert str(user_disk.image) == user_disk.json("status")["image"]["path"]
    as_user(*SNAPFS, "umount", user_disk.mountpoint)
    assert [] == mounts_below(user_disk.mountpoint)


def test_who_takes_the_daemons_name_is_not_taken_for_it(user_disk, mount):
    """Anybody can listen where a daemon would: then the mount tells where it is."""
    command = """
import socket, sys
found = []
for minor in range(1, 400):
    try:
        for number in range(8):
            s = socket.socket(socket.AF_UNIX)
            s.bind(f"\\0snapfs-0:{minor}-{number}")
            s.listen(0)
            found.append(s)
    except OSError:
        continue
print(flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups",
         sys.executable, "-c", command],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as squatter:  # fmt: skip
        squatter.stdout.readline()
        disk = mount(b"abc")
        assert disk.pid not in (None, squatter.pid)
        process = os.pidfd_open(disk.pid)
        disk.stop()
        wait_end(process)
        squatter.communicate()
