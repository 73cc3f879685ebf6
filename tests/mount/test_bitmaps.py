"""Dirty bitmaps and what is seen through them, with real programs on the mount."""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
import subprocess

import pytest

from tests.support.calls import bitmap, errno_of, extents, mapped, punch
from tests.support.mounted import K64, MIB, PATIENCE, SNAPFS, run
from tests.support.patterns import OVERWRITES, PATTERNS, SIZE, patterned

pytestmark = pytest.mark.mount


def piped(text: str, *command) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*SNAPFS, *map(str, command)], input=text, capture_output=True, text=True, timeout=PATIENCE,
        check=False,
    )  # fmt: skip


# Cases of the semantics


def test_with_a_bitmap_only_the_patterns_are_read_before_and_after(mount):
    """Case 2: zero probes are EACCES, and nothing there is ever copied."""
    disk = mount(SIZE)
    bitmap(disk, "add", "b")
    before = patterned()
    for offset, value in PATTERNS.items():
        disk.write(offset, bytes([value]) * K64)
    assert [(offset, K64) for offset in PATTERNS] == extents(disk, "b")
    disk.snapfs("create", disk.mountpoint, "s", "--bitmap", "b")
    probes = (K64, MIB - K64, 16 * MIB, 32 * MIB + K64, SIZE - 2 * K64)
    fd = os.open(disk.snapshots / "s", os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, 4096)
    for after in (False, True):
        for offset in PATTERNS:
            assert before[offset : offset + K64] == disk.read("snapshots/s", offset, K64)
            assert 4096 == os.preadv(fd, [buffer], offset)
        for offset in probes:
            assert errno.EACCES == errno_of(disk.read, "snapshots/s", offset, 4096)
            assert errno.EACCES == errno_of(os.preadv, fd, [buffer], offset)
        if not after:
            for offset in OVERWRITES:
                disk.write(offset, b"\xee" * K64)
    os.close(fd)
    # Of the clusters overwritten just those of the bitmap were kept: 0, 1 MiB, 32 MiB.
    assert 3 * K64 == disk.temp_bytes("s")
    (shown,) = disk.json("list")["snapshots"]
    assert ("b", 4, 3) == (
        shown["bitmap"], shown["clusters"]["accessible"], shown["clusters"]["copied"],
    )  # fmt: skip


def test_read_everything_with_discard_behind(mount):
    """Case 5: temp ends empty, all is EACCES; reading first, then writing, copies nothing."""
    disk = mount(bytes(patterned()))
    bitmap(disk, "add", "b")
    for offset in OVERWRITES:
        disk.write(offset, b"\xee" * K64)
    for name, options in (("all", []), ("some", ["--bitmap", "b"])):
        disk.snapfs("create", disk.mountpoint, name, *options)
        now = disk.active.read_bytes()
        disk.write(0, b"\xdd" * K64)  # one copy that the discard has to free
        path = disk.snapshots / name
        with open(path, "r+b", buffering=0) as file:
            for extent in mapped(disk, f"snapshots/{name}"):
                for offset in range(extent["start"], extent["start"] + extent["length"], MIB):
                    if not extent["accessible"]:
                        assert errno.EACCES == errno_of(os.pread, file.fileno(), 1, offset)
                        continue
                    length = min(MIB, extent["start"] + extent["length"] - offset)
                    data = os.pread(file.fileno(), length, offset)
                    assert now[offset : offset + length] == data
                    punch(path, offset, length)
        copied = disk.json("status")["counters"]["cbw_bytes"]
        disk.write(0, b"\xcc" * SIZE)
        status = disk.json("status")
        assert (0, copied) == (status["temp"]["used_bytes"], status["counters"]["cbw_bytes"])
        assert 0 == status["snapshots"][-1]["clusters"]["accessible"]
        for offset in range(0, SIZE, 4 * MIB):
            assert errno.EACCES == errno_of(disk.read, f"snapshots/{name}", offset, 4096)


# bitmaps/


def test_a_bitmap_in_the_mount_is_text_of_the_moment_of_its_open(mount):
    disk = mount(10 * K64 + 100)
    bitmap(disk, "add", "b")
    assert [] == extents(disk, "b")
    disk.write(0, b"x")
    disk.write(K64, b"x")
    disk.write(4 * K64 - 1, b"xy")
    disk.write(10 * K64 + 99, b"x")
    path = disk.mountpoint / "bitmaps" / "b"
    expected = f"0 {2 * K64}\n{3 * K64} {2 * K64}\n{10 * K64} 100\n"
    with open(path) as file:
        disk.write(6 * K64, b"x")
        assert expected == file.read()
    assert f"{6 * K64} {K64}\n" in run("cat", path).stdout
    copied = disk.image.parent / "copied"
    run("cp", path, copied)
    assert path.read_text() == copied.read_text()
    assert ["b"] == os.listdir(disk.mountpoint / "bitmaps")
    fd = os.open(path, os.O_RDONLY)
    assert 0 == os.lseek(fd, 0, os.SEEK_DATA)
    os.close(fd)


def test_a_bitmap_in_the_mount_can_be_removed_and_nothing_else(mount):
    disk = mount(K64)
    bitmap(disk, "add", "b")
    bitmap(disk, "add", "c")
    path = disk.mountpoint / "bitmaps" / "b"
    assert errno.EROFS == errno_of(os.open, path, os.O_RDWR)
    assert errno.EPERM == errno_of(os.truncate, path, 0)
    assert errno.EPERM == errno_of(os.rename, path, disk.mountpoint / "bitmaps" / "d")
    assert errno.EPERM == errno_of(os.utime, path)
    assert errno.EPERM == errno_of((disk.mountpoint / "bitmaps" / "new").touch)
    path.unlink()
    assert ["c"] == os.listdir(disk.mountpoint / "bitmaps")
    assert errno.ENOENT == errno_of(path.unlink)
    assert ["c"] == [each["name"] for each in disk.json("status")["bitmaps"]]


# Commands


def test_the_life_of_a_bitmap(mount):
    disk = mount(16 * K64)
    bitmap(disk, "add", "a")
    disk.write(0, b"x")
    bitmap(disk, "add", "b")
    disk.write(K64, b"x")
    listed = json.loads(bitmap(disk, "list", "--json").stdout)["bitmaps"]
    assert {"a": 2 * K64, "b": K64} == {each["name"]: each["count"] for each in listed}
    assert listed[0]["began"] < listed[1].pop("began")
    assert {
        "name": "b", "granularity": K64, "count": K64, "recording": True, "busy": False,
        "persistent": True, "inconsistent": False, "reason": None, "backup": None,
    } == listed[1]  # fmt: skip
    bitmap(disk, "clear", "b")
    disk.write(5 * K64, b"x")
    bitmap(disk, "clear", "a")
    bitmap(disk, "merge", "b", "a")
    assert [(5 * K64, K64)] == extents(disk, "a")
    bitmap(disk, "remove", "b")
    assert 5 == bitmap(disk, "remove", "b", check=False).returncode
    assert 1 == bitmap(disk, "add", "a", check=False).returncode
    assert 2 == bitmap(disk, "add", "..", check=False).returncode
    disk.stop()
    disk.start()
    assert [(5 * K64, K64)] == extents(disk, "a")


def test_the_interval_switches_in_the_instant_of_the_snapshot(mount):
    disk = mount(16 * K64)
    disk.snapfs("create", disk.mountpoint, "full", "--next", "b1")
    disk.write(0, b"1")
    disk.snapfs("create", disk.mountpoint, "s1", "--bitmap", "b1", "--next", "b2")
    disk.write(K64, b"2")
    assert ([(0, 2 * K64)], [(K64, K64)]) == (extents(disk, "b1"), extents(disk, "b2"))
    disk.snapfs("create", disk.mountpoint, "s2", "--bitmap", "b2", "--clear-bitmap")
    assert [] == extents(disk, "b2")
    for name, readable in (("s1", 0), ("s2", K64)):
        runs = [each for each in mapped(disk, f"snapshots/{name}") if each["accessible"]]
        assert [(readable, readable + K64)] == [
            (runs[0]["start"], runs[-1]["start"] + runs[-1]["length"])
        ]


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--bitmap", "none"], 6, "there is no bitmap 'none'; a full copy is needed"),
        (["--clear-bitmap"], 2, "needs --bitmap"),
        (["--next", "b"], 1, "there is a bitmap 'b' already"),
        (["--bitmap", "b", "--next", "a/b"], 2, "slash"),
        (["--extents", "/nonexistent"], 1, "No such file"),
    ],
)
def test_what_cannot_be_used_creates_nothing(mount, options, status, words):
    disk = mount(4 * K64)
    bitmap(disk, "add", "b")
    done = disk.snapfs("create", disk.mountpoint, "s", *options, check=False)
    assert (status, True) == (done.returncode, words in done.stderr), done.stderr
    assert [] == os.listdir(disk.snapshots)
    assert ["b"] == os.listdir(disk.mountpoint / "bitmaps")


def test_access_from_a_list_of_extents(mount):
    disk = mount(5000 * K64)
    text = "".join(f"{number * 2 * K64 + 5} 1\n" for number in range(2500))
    done = piped(text, "create", disk.mountpoint, "s", "--extents", "-")
    assert (0, "s\n") == (done.returncode, done.stdout)
    assert 2500 == disk.json("list")["snapshots"][0]["clusters"]["accessible"]
    assert b"\0" == disk.read("snapshots/s", 2 * K64, 1)
    assert errno.EACCES == errno_of(disk.read, "snapshots/s", 3 * K64, 1)
    for text, words in (
        (f"0 {5000 * K64 + 1}\n", "outside the image"),
        ("0 1\n5\n", 'line 2: not "offset length"'),
        ("-1 5\n", "line 1"),
    ):
        done = piped(text, "create", disk.mountpoint, "t", "--extents", "-")
        assert (2, True) == (done.returncode, words in done.stderr), done.stderr
    bitmap(disk, "add", "b")
    disk.write(7 * K64, b"x")
    listed = disk.mountpoint / "bitmaps" / "b"
    disk.snapfs("create", disk.mountpoint, "u", "--extents", listed)
    assert 1 == disk.json("show", "u")["snapshot"]["clusters"]["accessible"]


@pytest.mark.parametrize(
    ("durability", "reason"),
    [
        ("process", "the machine went down"),
        # What was written since the last that is known of the daemon is somebody else's doing.
        ("power", "the machine went down.*the image may have been changed since"),
    ],
)
def test_an_unclean_reboot_makes_bitmaps_inconsistent(mount, durability, reason):
    disk = mount(4 * K64, f"durability={durability}")
    bitmap(disk, "add", "b")
    disk.kill()
    with open(disk.image, "r+b") as image:
        image.write(b"y")
    manifest = disk.state / "manifest.json"
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    manifest.write_text(manifest.read_text().replace(boot, "another boot"))
    disk.start()
    done = disk.snapfs("create", disk.mountpoint, "s", "--bitmap", "b", check=False)
    assert 6 == done.returncode
    assert re.search(f"'b' is inconsistent: {reason}", done.stderr)
    assert "a full copy is needed" in done.stderr
    assert 6 == bitmap(disk, "list", check=False).returncode
    bitmap(disk, "add", "c")
    for command in (
        ["bitmap", "merge", disk.mountpoint, "b", "c"],
        ["bitmap", "merge", disk.mountpoint, "c", "b"],
        ["map", "--bitmap", "b", disk.active],
        ["create", disk.mountpoint, "s", "--bitmap", "b", "--clear-bitmap"],
        ["create", disk.mountpoint, "s", "--bitmap", "b", "--next", "d"],
    ):
        done = disk.snapfs(*command, check=False)
        assert (6, True) == (done.returncode, "a full copy is needed" in done.stderr), command
    bitmap(disk, "remove", "c")
    assert errno.EIO == errno_of((disk.mountpoint / "bitmaps" / "b").read_text)
    assert [] == os.listdir(disk.snapshots)
    bitmap(disk, "clear", "b")
    disk.write(0, b"x")
    assert [(0, K64)] == extents(disk, "b")


# map and diff


def test_map_says_what_is_dirty(mount):
    disk = mount(8 * K64)
    bitmap(disk, "add", "a")
    disk.write(0, b"x" * K64)
    bitmap(disk, "add", "b")
    disk.write(2 * K64, b"x" * K64)
    for options, dirty in (([], [0, 2]), (["--bitmap", "b"], [2]), (["--bitmap", "a"], [0, 2])):
        found = [each["start"] // K64 for each in mapped(disk, "active", *options) if each["dirty"]]
        assert dirty == found
    totals = disk.snapfs("map", disk.active, "--totals").stdout
    assert f"dirty: {2 * K64}\n" in totals
    assert 5 == disk.snapfs("map", disk.active, "--bitmap", "c", check=False).returncode


@pytest.mark.parametrize("name", ["", "bitmaps", "bitmaps/b", "snapshots", "snapshots/none"])
def test_map_of_what_has_no_extents_prints_nothing_but_why(mount, name):
    disk = mount(K64)
    bitmap(disk, "add", "b")
    done = disk.snapfs("map", disk.mountpoint / name, check=False)
    assert (5, "") == (done.returncode, done.stdout)
    assert re.search("^snapfs: (the mountpoint|there is no|bitmaps|snapshots)", done.stderr)


def test_map_agrees_with_qemu_img(mount):
    disk = mount(64 * K64)
    for cluster in range(0, 60, 3):
        disk.write(cluster * K64 + 8192, os.urandom(4096 * (cluster % 5 + 1)))
    disk.create("s")
    for cluster in range(0, 60, 7):
        disk.write(cluster * K64, os.urandom(3 * K64))
    punch(disk.active, 40 * K64, 5 * K64)
    for name in ("active", "snapshots/s"):
        theirs = json.loads(
            run(
                "qemu-img", "map", "-U", "--output=json", "--image-opts",
                f"driver=file,filename={disk.mountpoint / name},locking=off",
            ).stdout
        )  # fmt: skip
        assert merged_data(theirs) == merged_data(mapped(disk, name))


def merged_data(found: list[dict]) -> list[tuple[int, int, bool]]:
    result: list[tuple[int, int, bool]] = []
    position = 0
    for each in found:
        assert position == each["start"]
        position += each["length"]
        if result and result[-1][2] == each["data"]:
            start, length, data = result.pop()
            result.append((start, length + each["length"], data))
        else:
            result.append((each["start"], each["length"], each["data"]))
    return result


def differing(disk, *names: str) -> list[tuple[int, int, str]]:
    found = disk.json("diff", *names)["extents"]
    return [(each["start"] // K64, each["length"] // K64, each["state"]) for each in found]


def test_diff_lists_what_was_written_between_two_moments(mount):
    disk = mount(16 * K64)
    disk.create("a")
    disk.write(0, b"x")
    disk.create("b")
    disk.write(2 * K64, b"x" * 2 * K64)
    disk.create("c")
    disk.write(2 * K64, b"y")
    disk.write(0, b"y")
    assert [(0, 1, "changed")] == differing(disk, "a", "b")
    assert [(0, 1, "changed")] == differing(disk, "b", "a")
    assert [(2, 2, "changed")] == differing(disk, "b", "c")
    assert [(0, 1, "changed"), (2, 2, "changed")] == differing(disk, "a", "c")
    assert [(0, 1, "changed"), (2, 1, "changed")] == differing(disk, "c")
    assert [] == differing(disk, "a", "a")
    (disk.snapshots / "b").unlink()
    assert [(0, 1, "changed"), (2, 2, "changed")] == differing(disk, "a", "c")
    punch(disk.snapshots / "a", 2 * K64, K64)
    assert [(0, 1, "changed"), (2, 1, "unknown"), (3, 1, "changed")] == differing(disk, "a", "c")
    assert f"unknown: {K64}\n" in disk.snapfs("diff", disk.mountpoint, "a", "--totals").stdout
    os.truncate(disk.active, 18 * K64)
    assert (16, 2, "changed") == differing(disk, "c")[-1]
    assert 5 == disk.snapfs("diff", disk.mountpoint, "nothing", check=False).returncode


def test_diff_knows_nothing_of_what_a_snapshot_may_not_read(mount):
    disk = mount(4 * K64)
    bitmap(disk, "add", "b")
    disk.write(K64, b"x")
    disk.snapfs("create", disk.mountpoint, "s", "--bitmap", "b")
    assert [(0, 1, "unknown"), (2, 2, "unknown")] == differing(disk, "s")
    disk.write(K64, b"y")
    assert (1, 1, "changed") == differing(disk, "s")[1]
