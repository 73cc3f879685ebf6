"""Real programs on the mount: file systems, fio, qemu-img, tar, rsync, cmp."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from pathlib import Path

import pytest

from tests.support.filesystems import loop_device, make_ext4, mounted_loop
from tests.support.mounted import run

pytestmark = pytest.mark.mount

MIB = 1 << 20
K64 = 1 << 16


def fill(where: Path, count: int, seed: int) -> dict[str, bytes]:
    files = {}
    for number in range(count):
        name = f"{seed}-{number}"
        files[name] = bytes([seed, number % 256]) * (5000 + 731 * number)
        (where / name).write_bytes(files[name])
    return files


def files_of(where: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in where.iterdir() if path.is_file()}


def test_a_file_system_on_active_and_on_a_copied_snapshot(mount, tmp_path):
    disk = mount(256 * MIB)
    make_ext4(disk.active)
    with mounted_loop(disk.active, tmp_path / "fs") as where:
        files = fill(where, 200, 1)
        os.sync()
        disk.create("monday")
        for name in list(files)[::2]:
            (where / name).unlink()
        fill(where, 200, 2)
        os.sync()
        assert "trimmed" in run("fstrim", "-v", where).stdout
    run("e2fsck", "-fn", disk.active)
    assert disk.temp_bytes("monday") > 0
    copy = tmp_path / "copy"
    run("cp", "--sparse=auto", disk.snapshots / "monday", copy)
    run("e2fsck", "-fp", copy, check=False)  # replays the journal
    run("e2fsck", "-fn", copy)
    with mounted_loop(copy, tmp_path / "backup", "ro") as where:
        assert files == files_of(where)


def test_fstrim_gives_space_of_the_image_back(mount, tmp_path):
    disk = mount(256 * MIB)
    make_ext4(disk.active)
    with mounted_loop(disk.active, tmp_path / "fs") as where:
        (where / "big").write_bytes(os.urandom(64 * MIB))
        os.sync()
        before = disk.image.stat().st_blocks
        (where / "big").unlink()
        os.sync()
        run("fstrim", where)
    assert disk.image.stat().st_blocks < before - 60 * MIB // 512


def test_what_was_written_to_a_loop_device_is_in_the_snapshot(mount):
    disk = mount(4 * MIB)
    with loop_device(disk.active) as device:
        with open(device, "r+b", buffering=0) as file:
            file.write(b"before" * 1000)
            os.fsync(file.fileno())
            disk.create("s")
            os.pwrite(file.fileno(), b"after!" * 1000, 0)
            os.fsync(file.fileno())
    assert b"before" * 1000 == disk.read("snapshots/s", 0, 6000)
    assert b"after!" * 1000 == disk.read("active", 0, 6000)


def test_a_file_system_of_a_snapshot_is_mounted_read_only_without_a_word(mount, tmp_path):
    disk = mount(64 * MIB, start=False)
    run("mkfs.ext4", "-q", disk.image)
    disk.start()
    snapshot = disk.create("s")
    directory = tmp_path / "d"
    directory.mkdir()
    run("mount", "-o", "loop", snapshot, directory)
    try:
        assert "lost+found" in os.listdir(directory)
        assert "ro" in run("findmnt", "-no", "OPTIONS", directory).stdout.split(",")
    finally:
        run("umount", directory)
    run("fallocate", "-p", "-o", "0", "-l", "1M", snapshot)  # which is open read-write
    assert 63 * MIB == disk.json("show", "s")["snapshot"]["clusters"]["accessible"] * 65536


def test_fio_verifies_random_writes_while_snapshots_come_and_go(mount):
    disk = mount(os.urandom(32 * MIB))
    command = [
        "fio", "--name=x", f"--filename={disk.active}", "--rw=randrw", "--bsrange=512-96k",
        "--bs_unaligned", "--ioengine=libaio", "--iodepth=16", "--size=32M",
        "--io_size=128M", "--verify=crc32c", "--verify_fatal=1", "--allow_file_create=0",
        "--output-format=terse",
    ]  # fmt: skip
    number = 0
    contents: dict[str, bytes] = {}
    while number < 6:  # fio may be quicker than that
        fio = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while fio.poll() is None:
            name = f"s{number}"
            path = disk.create(name)
            contents[name] = path.read_bytes()
            if number >= 3:
                oldest = f"s{number - 3}"
                assert contents.pop(oldest) == (disk.snapshots / oldest).read_bytes(), oldest
                (disk.snapshots / oldest).unlink()
            number += 1
        output = fio.communicate()[0]
        assert 0 == fio.returncode, output
    for name, content in contents.items():
        assert content == (disk.snapshots / name).read_bytes(), name


def test_qemu_img_converts_and_maps_a_snapshot(mount, tmp_path):
    content = bytearray(16 * MIB)
    content[0:K64] = os.urandom(K64)
    content[MIB : 3 * MIB] = os.urandom(2 * MIB)
    disk = mount(16 * MIB)
    for offset in (0, *range(MIB, 3 * MIB, K64)):
        disk.write(offset, bytes(content[offset : offset + K64]))
    snapshot = disk.create("s")
    disk.write(0, b"x" * 2 * K64)
    run("fallocate", "-p", "-o", str(2 * MIB), "-l", str(MIB), disk.active)
    made = tmp_path / "made.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", snapshot, made)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", snapshot, made)
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", made, tmp_path / "raw")
    assert content == (tmp_path / "raw").read_bytes()

    def data(extents):
        return [
            (each["start"], each["length"]) for each in extents if each["data"] and not each["zero"]
        ]

    theirs = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", snapshot).stdout)
    ours = json.loads(disk.snapfs("map", "--json", snapshot).stdout)
    assert [(0, K64), (MIB, 2 * MIB)] == data(theirs)
    merged: list[tuple[int, int]] = []
    for start, length in data(ours):  # theirs does not tell temp from active
        if merged and sum(merged[-1]) == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((start, length))
    assert data(theirs) == merged


def test_tar_stores_a_snapshot_of_which_nothing_is_copied(mount, tmp_path):
    content = bytearray(8 * MIB)
    content[5 * MIB : 5 * MIB + 10000] = os.urandom(10000)
    disk = mount(8 * MIB)
    disk.write(5 * MIB, bytes(content[5 * MIB : 5 * MIB + 10000]))
    disk.create("s")
    run("tar", "-C", disk.snapshots, "-S", "-cf", tmp_path / "s.tar", "s")
    run("tar", "-C", tmp_path, "-xf", tmp_path / "s.tar")
    assert content == (tmp_path / "s").read_bytes()
    assert (tmp_path / "s.tar").stat().st_size < MIB


def test_rsync_in_place_again_and_again(mount, tmp_path):
    disk = mount(os.urandom(8 * MIB))
    backup = tmp_path / "backup"
    for _ in range(3):
        content = disk.active.read_bytes()
        snapshot = disk.create("s")
        disk.write(3 * K64, os.urandom(K64))
        run("rsync", "--ignore-times", "--inplace", snapshot, backup)
        assert content == backup.read_bytes()
        snapshot.unlink()


def test_cmp_of_two_snapshots(mount):
    disk = mount(os.urandom(64 * MIB))
    disk.create("a")
    disk.create("b")
    run("cmp", disk.snapshots / "a", disk.snapshots / "b")
    disk.write(40 * MIB, b"\0\0")
    disk.create("c")
    different = run("cmp", disk.snapshots / "a", disk.snapshots / "c", check=False)
    assert f"byte {40 * MIB + 1}," in different.stdout
    run("cmp", disk.snapshots / "c", disk.active)


def test_four_readers_and_two_writers_at_once(mount):
    content = os.urandom(16 * MIB)
    disk = mount(content)
    snapshot = disk.create("s")
    expected = bytearray(content)
    ending = threading.Event()
    failures: list[str] = []

    def write(half: int) -> None:
        with open(disk.active, "r+b", buffering=0) as file:
            for number in range(120):
                offset = half * 8 * MIB + number * 65 * 1024
                data = os.urandom(40_000)
                os.pwrite(file.fileno(), data, offset)
                expected[offset : offset + len(data)] = data

    def read(number: int) -> None:
        rounds = 0
        while not (ending.is_set() and rounds):
            rounds += 1
            direct = ["iflag=direct"] if number % 2 else []
            done = run("dd", f"if={snapshot}", "bs=1M", "status=none", *direct, binary=True)
            if done.stdout != content:
                failures.append(f"reader {number}, round {rounds}")
                return

    writers = [threading.Thread(target=write, args=(half,)) for half in (0, 1)]
    readers = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in [*writers, *readers]:
        thread.start()
    for thread in writers:
        thread.join()
    ending.set()
    for thread in readers:
        thread.join()
    assert [] == failures
    assert expected == disk.active.read_bytes()


def test_the_kernel_reads_ahead_as_much_as_a_request_can_be(mount):
    disk = mount(MIB)
    device = os.stat(disk.active).st_dev
    where = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    if os.geteuid() or not os.access(where, os.W_OK):
        pytest.skip("only root may change it, where /sys can be written")
    assert "1024" == where.read_text().strip()
