"""-o control-group: its members look at the mount, and do nothing to it."""

from __future__ import annotations

import json
import os
import sys

import pytest

from tests.support.mounted import SNAPFS, Mounted, let_others_in, run

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif("os.geteuid()", reason="another user is needed"),
]

K64 = 1 << 16
NOBODY = 65534
GROUP = 54321  # that no user of the machine has
FOREIGN = 54322


def as_nobody(*command, groups: tuple[int, ...], group: int = NOBODY):
    more = f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups"
    return run("setpriv", f"--reuid={NOBODY}", f"--regid={group}", more, *command, check=False)


@pytest.fixture
def disk(mount, tmp_path) -> Mounted:
    let_others_in(tmp_path)
    disk = mount(os.urandom(4 * K64), f"control-group={GROUP}")
    disk.create("s")
    disk.write(0, b"x")
    return disk


@pytest.mark.parametrize("member", [{"groups": (1, GROUP, 7)}, {"groups": (), "group": GROUP}])
def test_a_member_looks(disk, member):
    for words in (
        ("list",), ("status",), ("status", "--json"), ("list", "--json"), ("events", "--once"),
        ("metrics",),
    ):  # fmt: skip
        verb, *rest = words
        done = as_nobody(*SNAPFS, verb, disk.mountpoint, *rest, **member)
        assert 0 == done.returncode, (words, done.stderr)
    status = json.loads(as_nobody(*SNAPFS, "status", disk.mountpoint, "--json", **member).stdout)
    assert ["s"] == [each["name"] for each in status["snapshots"]]
    for name in ("active", "snapshots/s"):
        done = as_nobody(*SNAPFS, "map", disk.mountpoint / name, "--json", **member)
        assert 0 == done.returncode, done.stderr
        assert 4 * K64 == sum(each["length"] for each in json.loads(done.stdout))
    assert "s" in as_nobody(*SNAPFS, "list", **member).stdout  # all mounts of the machine


def test_a_member_changes_nothing_and_reads_nothing(disk, tmp_path):
    for words in (
        ("create", disk.mountpoint, "t"), ("delete", disk.mountpoint, "s"),
        ("delete", disk.mountpoint, "s", "--dry-run"), ("limit", disk.mountpoint, "1M"),
        ("bitmap", "add", disk.mountpoint, "b"), ("bitmap", "list", disk.mountpoint),
        ("diff", disk.mountpoint, "s"), ("show", disk.mountpoint, "s"),
        ("umount", disk.mountpoint), ("trim", disk.snapshots / "s"),
        ("copy", disk.snapshots / "s", "/tmp/never"), ("backup", disk.mountpoint, "/tmp/never"),
    ):  # fmt: skip
        done = as_nobody(*SNAPFS, *words, groups=(GROUP,))
        assert done.returncode, words
        assert "Traceback" not in done.stderr
    assert as_nobody("cat", disk.active, groups=(GROUP,)).returncode
    assert as_nobody("cat", disk.snapshots / "s", groups=(GROUP,)).returncode
    assert as_nobody("ls", disk.state, groups=(GROUP,)).returncode
    status = disk.json("status")
    assert (["s"], [], None) == (
        [each["name"] for each in status["snapshots"]], status["bitmaps"],
        status["temp"]["limit_bytes"],
    )  # fmt: skip


def test_who_is_in_other_groups_does_not_look(disk):
    for groups in ((), (FOREIGN,), (0,)):
        for verb in ("list", "status", "metrics"):
            done = as_nobody(*SNAPFS, verb, disk.mountpoint, groups=groups)
            assert 1 == done.returncode
            assert "only the owner" in done.stderr
    done = as_nobody(*SNAPFS, "metrics", groups=(FOREIGN,))  # of all mounts: it is not down
    assert f'snapfs_up{{mountpoint="{disk.mountpoint}"}}' not in done.stdout
    done = as_nobody(*SNAPFS, "metrics", groups=(GROUP,))
    assert f'snapfs_up{{mountpoint="{disk.mountpoint}"}} 1.0' in done.stdout


# The groups are those of the connection's maker, whoever sends: a descriptor that root hands on.
HAND_ON = """
import json, os, socket, sys
from snapfs.client import mountinfo, wire
made = wire._connect_directly(mountinfo.find_snapfs(sys.argv[1]))
made.sendall(json.dumps({"version": 1, "command": "delete", "name": "s"}).encode() + b"\\n")
print(json.loads(made.makefile().readline())["ok"])
"""


def test_the_request_on_the_wire_is_refused_as_the_command_is(disk):
    done = as_nobody(sys.executable, "-c", HAND_ON, disk.mountpoint, groups=(GROUP,))
    assert "False" == done.stdout.strip(), done.stderr
    assert ["s"] == os.listdir(disk.snapshots)


def test_without_the_option_no_group_looks(mount, tmp_path):
    let_others_in(tmp_path)
    disk = mount(K64)
    assert 1 == as_nobody(*SNAPFS, "list", disk.mountpoint, groups=(0, GROUP)).returncode
