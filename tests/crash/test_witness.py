"""Who notes how the image was left when the daemon is killed, and what if nobody does."""

from __future__ import annotations

import os
import select
import time
from pathlib import Path

import pytest

from snapfs.state.activitywords import UNDER_WAY
from tests.support.calls import state_of
from tests.support.mounted import K64

pytestmark = pytest.mark.mount
SIZE = 64 * K64


def witness_of(disk) -> int | None:
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            parent = (each.parent / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == disk.pid and b"snapfs.state.witness" in each.read_bytes():
                return int(each.parent.name)
        except OSError:
            pass
    return None


def end(pid: int) -> None:
    process = os.pidfd_open(pid)
    os.kill(pid, 9)
    select.select([process], [], [])
    os.close(process)


def under_way(disk) -> bool:
    words = memoryview((disk.state / "activity").read_bytes()).cast("q")
    return bool(words[UNDER_WAY])


def leave_something_under_way(disk) -> None:
    """As if a write had begun; C and Python count theirs in the same word."""
    with open(disk.state / "activity", "r+b") as file:
        os.pwrite(file.fileno(), (1).to_bytes(8, "little"), 8 * UNDER_WAY)


def test_a_write_under_way_is_noted_and_what_comes_later_is_not_ours(mount):
    disk = mount(os.urandom(SIZE))
    moment = disk.active.read_bytes()
    disk.create("s")
    disk.write(0, b"x" * K64)
    leave_something_under_way(disk)
    with open(disk.image, "r+b") as file:  # stands for it
        os.pwrite(file.fileno(), b"y" * K64, 0)
    disk.kill()
    disk.start()  # waits for the witness
    assert moment == (disk.snapshots / "s").read_bytes()
    leave_something_under_way(disk)
    disk.kill()
    while under_way(disk):  # until it is noted
        pass
    with open(disk.image, "r+b") as file:
        os.pwrite(file.fileno(), b"behind our back", SIZE - 100)
    disk.start()
    assert "lost" == state_of(disk, "s")["state"]


def test_without_a_witness_what_was_under_way_is_in_doubt(mount):
    disk = mount(os.urandom(SIZE))
    disk.create("s")
    disk.write(0, b"x" * K64)
    witness = witness_of(disk)
    assert witness is not None
    leave_something_under_way(disk)
    with open(disk.image, "r+b") as file:
        os.pwrite(file.fileno(), b"y" * K64, 0)
    os.kill(disk.pid, 19)  # it must not start another
    os.kill(witness, 9)
    disk.kill()
    disk.start()
    found = state_of(disk, "s")
    assert "lost" == found["state"]
    assert "its witness did not live" in found["reason"]


def test_without_a_witness_nothing_is_lost_when_nothing_was_under_way(mount):
    disk = mount(os.urandom(SIZE))
    moment = disk.active.read_bytes()
    disk.create("s")
    disk.write(0, b"x" * K64)
    disk.json("status")  # the drain with the write has ended
    witness = witness_of(disk)
    os.kill(disk.pid, 19)
    os.kill(witness, 9)
    disk.kill()
    disk.start()
    assert moment == (disk.snapshots / "s").read_bytes()


def test_attributes_that_change_while_mounted_are_no_change_of_the_image(mount):
    disk = mount(os.urandom(SIZE))
    moment = disk.active.read_bytes()
    disk.create("s")
    os.chmod(disk.image, 0o640)
    os.link(disk.image, disk.image.parent / "other")
    disk.kill()
    disk.start()
    assert moment == (disk.snapshots / "s").read_bytes()


def test_a_witness_that_is_killed_is_replaced_and_none_is_left_at_the_end(mount):
    disk = mount(os.urandom(SIZE))
    first = witness_of(disk)
    assert first is not None
    os.kill(first, 15)  # does not end it
    end(first)
    while witness_of(disk) in (None, first):
        time.sleep(0.05)
    second = witness_of(disk)
    disk.stop()
    assert not Path(f"/proc/{second}").exists()
    assert "the witness of the daemon's end was killed" in (disk.state / "daemon.log").read_text()
