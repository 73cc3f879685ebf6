"""Giving ranges up: snapfs trim, blkdiscard and fstrim, on snapshots and on active."""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
from pathlib import Path

import pytest

from tests.support.calls import errno_of, extents, mapped, punch
from tests.support.filesystems import frozen, loop_device, make_ext4, mounted_loop
from tests.support.mounted import K64, MIB, run

pytestmark = pytest.mark.mount


# Snapshots


def test_what_was_trimmed_from_a_snapshot_is_not_copied(mount):
    disk = mount(os.urandom(16 * K64))
    snapshot = disk.create("s")
    done = disk.snapfs("trim", "-v", "-o", str(4 * K64), "-l", str(8 * K64), snapshot)
    assert f"{snapshot}: 512 KiB ({8 * K64} bytes) trimmed\n" == done.stdout
    disk.write(4 * K64, os.urandom(8 * K64))
    assert 0 == disk.json("status")["counters"]["cbw_bytes"]
    disk.write(3 * K64, os.urandom(K64))
    assert K64 == disk.json("status")["counters"]["cbw_bytes"]
    again = json.loads(disk.snapfs("trim", "--json", snapshot).stdout)
    assert 8 * K64 == again["trimmed"]
    assert 0 == json.loads(disk.snapfs("trim", "--json", snapshot).stdout)["trimmed"]


def test_trim_leaves_out_short_runs(mount):
    disk = mount(16 * K64)
    snapshot = disk.create("s")
    punch(snapshot, K64, K64)
    done = disk.snapfs("trim", "--json", "-m", "128K", snapshot)
    assert 14 * K64 == json.loads(done.stdout)["trimmed"]


def test_a_dry_run_of_a_snapshot_discards_nothing(mount):
    disk = mount(os.urandom(4 * K64))
    snapshot = disk.create("s")
    done = disk.snapfs("trim", "-n", "-o", "64K", snapshot)
    assert f"{snapshot}: 192 KiB ({3 * K64} bytes) trimmed (dry run)\n" == done.stdout
    assert disk.image.read_bytes() == snapshot.read_bytes()


# active


@pytest.mark.parametrize("options", [[], ["-o", "0"], ["-l", "64K"], ["-n"], ["-m", "64K"]])
def test_trim_of_active_takes_the_whole_range_or_names_what_to_do(mount, options):
    content = os.urandom(4 * K64)
    disk = mount(content)
    done = disk.snapfs("trim", *options, disk.active, check=False)
    assert (2, "") == (done.returncode, done.stdout)
    assert "both -o and -l" in done.stderr
    assert "fstrim(8) in the guest" in done.stderr
    assert content == disk.active.read_bytes()


def test_trim_of_active_is_a_write(mount):
    """To the byte; the snapshot keeps what was there, the bitmap marks it, space is freed."""
    content = os.urandom(16 * K64)
    disk = mount(content)
    disk.snapfs("create", disk.mountpoint, "s", "--next", "b")
    start, length = 3 * K64 + 1000, 5 * K64
    done = disk.snapfs("trim", "-v", "-o", str(start), "-l", str(length), disk.active)
    assert f"{disk.active}: 320 KiB ({length} bytes) trimmed\n" == done.stdout
    expected = content[:start] + bytes(length) + content[start + length :]
    assert expected == disk.active.read_bytes()
    assert content == (disk.snapshots / "s").read_bytes()
    assert 6 * K64 == disk.temp_bytes("s")
    assert [(3 * K64, 6 * K64)] == extents(disk, "b")
    assert disk.image.stat().st_blocks * 512 <= len(content) - 4 * K64
    disk.stop()
    assert expected == disk.image.read_bytes()


def test_trim_of_active_leaves_holes_and_short_runs_alone(mount):
    """What is a hole already does not become dirty, and does not count."""
    disk = mount(16 * K64)
    disk.write(2 * K64, b"x" * K64)
    disk.write(8 * K64, b"x" * 3 * K64)
    disk.snapfs("bitmap", "add", disk.mountpoint, "b")

    def trimmed(*options: str) -> int:
        done = disk.snapfs("trim", "--json", "-o", "0", "-l", "1G", *options, disk.active)
        return json.loads(done.stdout)["trimmed"]

    assert 4 * K64 == trimmed("--dry-run")
    assert 3 * K64 == trimmed("-m", "128K", "-n")
    assert (b"x", []) == (disk.read("active", 2 * K64, 1), extents(disk, "b"))
    assert 3 * K64 == trimmed("-m", "128K")
    assert [(8 * K64, 3 * K64)] == extents(disk, "b")
    assert b"x" * K64 == disk.read("active", 2 * K64, K64)
    assert (K64, 0) == (trimmed(), trimmed())
    assert 16 * K64 == disk.active.stat().st_size


def test_trim_of_active_knows_what_is_only_in_the_page_cache(mount):
    disk = mount(4 * K64)
    with open(disk.active, "r+b") as file, mmap.mmap(file.fileno(), 4 * K64) as mapping:
        mapping[:K64] = b"x" * K64
        done = disk.snapfs("trim", "--json", "-o", "0", "-l", "64K", disk.active)
        assert K64 == json.loads(done.stdout)["trimmed"]
        assert bytes(K64) == mapping[:K64]
    assert bytes(4 * K64) == disk.active.read_bytes()


def test_trim_of_many_runs_goes_page_by_page(mount):
    """More runs than one answer of the daemon has."""
    count = 6000
    disk = mount(2 * count * 4096)
    with open(disk.active, "r+b", buffering=0) as file:
        for number in range(count):
            os.pwrite(file.fileno(), b"x" * 4096, 2 * number * 4096)
    end = (2 * count - 2) * 4096  # without the last one
    done = disk.snapfs("trim", "--json", "-o", "4096", "-l", str(end - 4096), disk.active)
    assert (count - 2) * 4096 == json.loads(done.stdout)["trimmed"]
    left = [each["start"] for each in mapped(disk, "active") if each["data"]]
    assert [0, end] == left


def test_trim_beyond_the_end_of_active(mount):
    disk = mount(b"x" * 5000)
    done = disk.snapfs("trim", "-o", "5001", "-l", "1", disk.active, check=False)
    assert (2, True) == (done.returncode, "beyond the end" in done.stderr)
    disk.snapfs("trim", "-o", "100", "-l", "1E", disk.active)
    assert b"x" * 100 + bytes(4900) == disk.active.read_bytes()


# Loop devices and file systems


def test_blkdiscard_on_a_loop_device_over_a_snapshot(mount):
    disk = mount(os.urandom(64 * K64))
    snapshot = disk.create("s")
    with loop_device(snapshot) as device:
        run("blkdiscard", "-o", str(8 * K64), "-l", str(16 * K64), device)
    (shown,) = disk.json("list")["snapshots"]
    assert 16 == shown["clusters"]["discarded"]
    disk.write(8 * K64, os.urandom(16 * K64))
    assert 0 == disk.json("status")["counters"]["cbw_bytes"]


def test_fstrim_of_a_file_system_in_active_is_a_write(mount, tmp_path):
    """It frees space of the image, marks what it freed, and the snapshot keeps its bytes."""
    disk = mount(64 * MIB)
    make_ext4(disk.active, "nodiscard")
    with mounted_loop(disk.active, tmp_path / "fs") as directory:
        data = os.urandom(8 * MIB)
        (directory / "file").write_bytes(data)
        with frozen(directory):
            moment = disk.active.read_bytes()
            disk.snapfs("create", disk.mountpoint, "s", "--next", "b")
            before = os.stat(disk.image).st_blocks
        (directory / "file").unlink()
        os.sync()
        trimmed = run("fstrim", "-v", directory).stdout
        assert "trimmed" in trimmed
        assert os.stat(disk.image).st_blocks < before - 8 * MIB // 512 // 2
        assert sum(length for _, length in extents(disk, "b")) > 8 * MIB
        assert moment == (disk.snapshots / "s").read_bytes()


def free_ranges(path: Path) -> list[tuple[int, int]]:
    """(offset, length) of what ext4 says is free, from dumpe2fs."""
    listed = run("dumpe2fs", path).stdout
    (size,) = re.findall(r"^Block size: +(\d+)$", listed, re.MULTILINE)
    found = []
    for line in re.findall(r"^  Free blocks: (.*)$", listed, re.MULTILINE):
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", line):
            start = int(first) * int(size)
            found.append((start, (int(last or first) + 1) * int(size) - start))
    return found


def test_what_a_guest_writes_to_trimmed_free_space_is_not_copied(mount, tmp_path):
    disk = mount(os.urandom(64 * MIB))
    make_ext4(disk.active, "nodiscard")
    with mounted_loop(disk.active, tmp_path / "fs") as directory:
        (directory / "old").write_bytes(os.urandom(4 * MIB))
        with frozen(directory):
            snapshot = disk.create("s")
        free = free_ranges(snapshot)
        for offset, length in free:
            disk.snapfs("trim", "-o", str(offset), "-l", str(length), snapshot)
        given_up = disk.json("show", "s")["snapshot"]["clusters"]["discarded"] * K64
        assert given_up > sum(length for _, length in free) * 0.9
        (directory / "new").write_bytes(os.urandom(16 * MIB))
    # What ext4 changed beside the file was copied, and nothing that was free as a whole.
    copied = [each for each in mapped(disk, "snapshots/s") if each["source"] == "temp"]
    size = sum(each["length"] for each in copied if each["data"])
    assert 0 < size == disk.json("status")["counters"]["cbw_bytes"]
    for extent in copied:
        for start in range(extent["start"], extent["start"] + extent["length"], K64):
            assert not any(first <= start and start + K64 <= first + count for first, count in free)
    assert errno.EACCES == errno_of(disk.read, "snapshots/s", -(-free[-1][0] // K64) * K64, 4096)
