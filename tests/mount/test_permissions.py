"""What another user can do: nothing, or with allow_other what the image's mode says."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.support.mounted import Mounted, let_others_in
from tests.support.patched import Patched

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif("os.geteuid()", reason="another user is needed"),
]

K64 = 1 << 16
NOBODY = 65534

CONNECT = """
import json, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
request = {"version": 1, "command": sys.argv[2], "name": "s"}
connection.sendall(json.dumps(request).encode() + b"\\n")
print(connection.makefile().readline())
"""


def as_other(*command) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups",
         *map(str, command)],
        capture_output=True, text=True, check=False, cwd="/",
    )  # fmt: skip


def refused(*command) -> bool:
    done = as_other(*command)
    return bool(done.returncode) and any(
        words in done.stderr for words in ("Permission denied", "not permitted")
    )


@pytest.fixture
def open_to_all(mount, tmp_path):
    """An image that everybody may read and write, mounted with options."""
    let_others_in(tmp_path)

    def factory(*options: str, mode: int = 0o666) -> Mounted:
        disk = mount(b"1" * 4 * K64, *options, start=False)
        disk.image.chmod(mode)
        disk.start()
        disk.create("s")
        return disk

    return factory


def test_without_allow_other_another_user_gets_nowhere(open_to_all):
    disk = open_to_all()
    for command in (
        ("ls", disk.mountpoint), ("cat", disk.active), ("touch", disk.snapshots / "t"),
        ("rm", "-f", disk.snapshots / "s"), ("cat", disk.snapshots / "s"),
        ("ls", disk.state), ("cat", disk.state / "manifest.json"),
    ):  # fmt: skip
        assert refused(*command), command
    assert refused("/usr/bin/python3", "-c", CONNECT, disk.state / "control.sock", "list")
    assert ["s"] == os.listdir(disk.snapshots)


def test_with_allow_other_the_mode_of_the_image_holds_and_snapshots_are_the_owners(open_to_all):
    disk = open_to_all("allow_other")
    snapshot = disk.snapshots / "s"
    assert "1" * 4 * K64 == as_other("cat", snapshot).stdout
    write = ("dd", f"of={disk.active}", "if=/dev/zero", "bs=64K", "count=1", "conv=notrunc")
    assert 0 == as_other(*write).returncode
    for command in (
        ("touch", disk.snapshots / "t"), ("rm", "-f", snapshot), ("truncate", "-s1", snapshot),
        ("mv", snapshot, disk.snapshots / "t"), ("chmod", "777", snapshot),
        ("fallocate", "-p", "-o", "0", "-l", "64K", snapshot),
        ("setfattr", "-n", "user.x", "-v", "1", snapshot),
    ):  # fmt: skip
        assert as_other(*command).returncode, command
    assert refused("/usr/bin/python3", "-c", CONNECT, disk.state / "control.sock", "list")
    assert b"1" * 4 * K64 == snapshot.read_bytes()
    assert ["s"] == os.listdir(disk.snapshots)


HOLD = """
import os, sys
for path in sys.argv[1:]:
    try:
        os.open(path, os.O_RDONLY)
    except OSError as error:
        print(error.errno)
"""


def test_another_user_cannot_fill_memory_with_bitmaps(open_to_all):
    disk = open_to_all("allow_other", mode=0o644)
    disk.stop()
    daemon = Patched(disk, "from snapfs.fuse import bitmapfs\nbitmapfs.MOST_TEXT = 20")
    disk.snapfs("bitmap", "add", disk.mountpoint, "b")
    disk.write(0, b"2" * K64)
    path = disk.mountpoint / "bitmaps" / "b"
    found = as_other("/usr/bin/python3", "-c", HOLD, *[path] * 4)
    assert [str(errno.ENFILE)] * 2 == found.stdout.split()
    files = [path.open() for _ in range(4)]
    assert ["0 65536\n"] * 4 == [file.read() for file in files]
    assert [str(errno.ENFILE)] == as_other("/usr/bin/python3", "-c", HOLD, path).stdout.split()
    for file in files:
        file.close()
    assert [] == as_other("/usr/bin/python3", "-c", HOLD, path).stdout.split()
    disk.stop()
    assert 0 == daemon.finish()[0]


def test_a_private_image_stays_private(open_to_all):
    disk = open_to_all("allow_other", mode=0o600)
    for command in (("cat", disk.active), ("cat", disk.snapshots / "s"), ("ls", disk.snapshots)):
        assert refused(*command), command


def test_umask_and_owner(open_to_all):
    disk = open_to_all("allow_other", "umask=077", f"uid={NOBODY}", f"gid={NOBODY}")
    status = os.stat(disk.active)
    assert (NOBODY, NOBODY, 0o600) == (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode))
    assert "1" * 4 * K64 == as_other("cat", disk.snapshots / "s").stdout
    assert 0 == as_other("touch", disk.snapshots / "theirs").returncode


def test_nobody_makes_the_image_a_program_of_its_owner(open_to_all):
    disk = open_to_all("allow_other", f"uid={NOBODY}")
    as_other("dd", f"of={disk.active}", "if=/bin/true", "conv=notrunc")
    for mode in ("4755", "2755", "755", "1777"):
        assert refused("chmod", mode, disk.active), mode
    assert refused("chgrp", NOBODY, disk.active)
    assert 1 == subprocess.run(["chmod", "600", disk.active], check=False).returncode
    assert 1 == subprocess.run(["chown", "1:1", disk.active], check=False).returncode
    status = disk.image.stat()
    assert (0, 0, 0o100666) == (status.st_uid, status.st_gid, status.st_mode)
    # What changes nothing of what is shown may be asked for, as libvirt does.
    os.chown(disk.active, NOBODY, 0)
    assert 0 == as_other("chmod", "666", disk.active).returncode
    assert (0, 0o100666) == (disk.image.stat().st_uid, disk.image.stat().st_mode)


def test_set_user_id_bits_are_neither_shown_nor_set(open_to_all):
    disk = open_to_all("allow_other", mode=0o666)
    os.chmod(disk.active, 0o7751)
    assert 0o100751 == os.stat(disk.active).st_mode == disk.image.stat().st_mode
    os.chmod(disk.image, 0o6755)
    assert 0o100755 == os.stat(disk.active).st_mode
    assert 0o100644 == os.stat(disk.snapshots / "s").st_mode


def test_a_mount_of_root_has_neither_programs_of_others_nor_devices(open_to_all):
    disk = open_to_all("allow_other", "suid", "dev")
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    options = next(line[5] for line in lines if line[4] == str(disk.mountpoint))
    assert {"nosuid", "nodev"} <= set(options.split(","))


def test_the_socket_looks_at_who_calls(open_to_all):
    disk = open_to_all()
    socket = disk.state / "control.sock"
    assert 0o600 == stat.S_IMODE(os.stat(socket).st_mode)
    disk.state.chmod(0o755)
    socket.chmod(0o666)
    for command in ("list", "delete"):
        done = as_other("/usr/bin/python3", "-c", CONNECT, socket, command)
        assert not done.stdout.strip() or not json.loads(done.stdout)["ok"], done
    assert ["s"] == os.listdir(disk.snapshots)
    disk.state.chmod(0o700)


@pytest.mark.skipif("os.path.exists('/dev/log')", reason="the log is a file where there is none")
def test_what_another_user_has_put_beside_the_image_is_not_followed(mount, tmp_path):
    disk = mount(K64, start=False)
    victim = tmp_path / "victim"
    victim.touch()
    disk.state.mkdir()
    (disk.state / "daemon.log").symlink_to(victim)
    os.chown(disk.state, NOBODY, NOBODY)
    done = disk.snapfs("mount", disk.image, disk.mountpoint, check=False)
    assert done.returncode
    assert f"belongs to user {NOBODY}" in done.stderr
    assert "" == victim.read_text()
