"""What copy-before-write promises, seen through the mount with real files."""

from __future__ import annotations

import errno
import json
import mmap
import os
import subprocess

import pytest

from snapfs.storage.linux import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    fallocate,
)
from tests.support.calls import errno_of, punch
from tests.support.mounted import K64, MIB, PATIENCE, SNAPFS, run
from tests.support.patterns import OVERWRITES, patterned

pytestmark = pytest.mark.mount


def test_a_snapshot_keeps_what_is_overwritten(mount):
    before = patterned()
    after = bytearray(before)
    disk = mount(bytes(before))
    snapshot = disk.create("s")
    for offset in OVERWRITES:
        disk.write(offset, b"\xee" * K64)
        after[offset : offset + K64] = b"\xee" * K64
    assert before == snapshot.read_bytes()
    assert after == disk.active.read_bytes()
    disk.stop()
    assert after == disk.image.read_bytes()


def test_each_of_several_snapshots_has_its_own_moment_whichever_goes_first(mount):
    for first in ("a", "b", "c"):
        disk = mount(b"1" * K64 * 8)
        moments = {}
        for name, letter in (("a", b"2"), ("b", b"3"), ("c", b"4")):
            moments[name] = disk.active.read_bytes()
            disk.create(name)
            disk.write(K64 * (len(moments) - 1), letter * K64 * 4)
        # One copy of each cluster a write, in the newest, however many need it.
        assert 3 * 4 * K64 == disk.json("status")["temp"]["used_bytes"]
        for gone in [first, *sorted(set(moments) - {first})]:
            for name, content in moments.items():
                assert content == (disk.snapshots / name).read_bytes(), (first, name)
            (disk.snapshots / gone).unlink()
            del moments[gone]
        assert [] == os.listdir(disk.snapshots)
        assert 0 == disk.json("status")["temp"]["used_bytes"]


def test_discard_frees_and_forbids(mount):
    disk = mount(bytes(patterned()))
    snapshot = disk.create("s")
    disk.write(0, b"\xee" * K64)
    assert K64 == disk.temp_bytes("s")
    reader = os.open(snapshot, os.O_RDONLY)
    assert b"\x5d" * K64 == os.pread(reader, K64, 0)  # now in the page cache
    with mmap.mmap(reader, K64, prot=mmap.PROT_READ) as mapping:
        assert 0x5D == mapping[0]
    punch(snapshot, 0, MIB)
    assert 0 == disk.temp_bytes("s")
    assert errno.EACCES == errno_of(os.pread, reader, 4096, 0)
    os.close(reader)
    direct = run(
        "dd", f"if={snapshot}", "of=/dev/null", "bs=4k", "count=1", "iflag=direct", check=False
    )
    assert "Permission denied" in direct.stderr
    disk.write(4096, b"x" * K64)  # nothing is copied any more
    assert 0 == disk.temp_bytes("s")
    assert b"\xd5" * K64 == disk.read("snapshots/s", MIB, K64)


def test_a_discard_is_no_error_of_close_where_the_kernel_keeps_the_times(mount):
    disk = mount(bytes(patterned()), "writeback_cache")
    snapshot = disk.create("s")
    created = snapshot.stat().st_mtime_ns
    writer = os.open(snapshot, os.O_RDWR)
    fallocate(writer, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, MIB)
    os.fsync(writer)
    os.close(writer)  # it stores the times then, which the punch has changed
    assert errno.EPERM == errno_of(os.utime, snapshot)
    disk.stop()
    disk.start()
    assert created == snapshot.stat().st_mtime_ns


def test_a_mapping_of_a_discarded_range_faults(mount):
    disk = mount(bytes(patterned()))
    snapshot = disk.create("s")
    reader = (
        "import mmap,os,sys\n"
        "fd=os.open(sys.argv[1],os.O_RDWR)\n"
        "m=mmap.mmap(fd,65536,prot=mmap.PROT_READ)\n"
        "assert m[0]==0x5d\n"
        "print('mapped',flush=True); sys.stdin.readline(); print(m[0])\n"
    )
    child = subprocess.Popen(
        ["python3", "-c", reader, snapshot],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert "mapped\n" == child.stdout.readline()
    punch(snapshot, 0, K64)
    out, _ = child.communicate("\n", timeout=PATIENCE)
    assert ("", -7) == (out, child.returncode)  # SIGBUS


@pytest.mark.parametrize(
    ("offset", "length", "gone"),
    [(100, 5000, 0), (4096, 8192, 0), (100, 3 * K64, 2), (K64, K64 + 77, 1), (0, K64, 1)],
)
def test_a_punch_is_rounded_to_whole_clusters_and_changes_no_byte_beside(
    mount, offset, length, gone
):
    disk = mount(b"7" * K64 * 5)
    snapshot = disk.create("s")
    snapshot.read_bytes()  # fill the page cache
    punch(snapshot, offset, length)
    listed = disk.json("list")["snapshots"][0]["clusters"]
    assert gone == listed["discarded"]
    first = -(-offset // K64)
    for page in range(0, K64 * 5, 4096):
        cluster = page // K64
        if first <= cluster < first + gone:
            assert errno.EACCES == errno_of(disk.read, "snapshots/s", page, 4096)
        else:
            assert b"7" * 4096 == disk.read("snapshots/s", page, 4096)


def test_direct_reads_get_the_prefix_and_cached_reads_the_accessible_pages(mount):
    disk = mount(b"7" * K64 * 4)
    snapshot = disk.create("s")
    punch(snapshot, 2 * K64, K64)
    reader = os.open(snapshot, os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, 4 * K64)
    assert 2 * K64 == os.preadv(reader, [buffer], 0)
    assert errno.EACCES == errno_of(os.preadv, reader, [buffer], 2 * K64)
    os.close(reader)
    assert b"7" * K64 == disk.read("snapshots/s", K64, K64)
    assert b"7" * K64 == disk.read("snapshots/s", 3 * K64, 2 * K64)
    copied = run("cp", snapshot, disk.image.parent / "copy", check=False)
    assert (1, True) == (copied.returncode, "Permission denied" in copied.stderr)
    assert 4 * K64 == os.stat(snapshot).st_size


@pytest.mark.parametrize("size", [1, 130000, 4 * K64])
def test_images_of_any_size(mount, size):
    content = os.urandom(size)
    disk = mount(content)
    snapshot = disk.create("s")
    disk.write(size - 1, b"!")
    disk.write(size + 5, b"beyond")
    assert content == snapshot.read_bytes()
    assert content[:-1] + b"!" + bytes(5) + b"beyond" == disk.active.read_bytes()
    assert b"" == disk.read("snapshots/s", size, 100)
    os.truncate(disk.active, size // 2)
    os.truncate(disk.active, size)
    assert content == snapshot.read_bytes()
    assert content[: size // 2] + bytes(size - size // 2) == disk.active.read_bytes()
    punch(snapshot, 0, size)  # the end of the snapshot counts as aligned
    assert errno.EACCES == errno_of(snapshot.read_bytes)
    assert 0 == disk.temp_bytes("s")


def test_an_empty_image(mount):
    disk = mount(b"")
    snapshot = disk.create("s")
    assert (b"", 0) == (snapshot.read_bytes(), os.stat(snapshot).st_blocks)
    disk.write(0, b"now")
    assert (b"", b"now") == (snapshot.read_bytes(), disk.active.read_bytes())


def test_reading_with_discard_behind_leaves_nothing_to_copy(mount):
    disk = mount(os.urandom(MIB))
    snapshot = disk.create("s")
    with open(snapshot, "r+b", buffering=0) as file:
        for offset in range(0, MIB, K64):
            assert K64 == len(os.pread(file.fileno(), K64, offset))
            punch(snapshot, offset, K64)
    disk.write(0, b"x" * MIB)
    status = disk.json("status")
    assert (0, 0) == (status["temp"]["used_bytes"], status["counters"]["cbw_bytes"])
    assert MIB // K64 == status["snapshots"][0]["clusters"]["discarded"]


def test_zeros_and_holes_cost_no_temp_space_and_stay_holes(mount):
    disk = mount(4 * MIB)
    disk.write(0, bytes(MIB))  # zeros that are data
    snapshot = disk.create("s")
    disk.write(0, b"x" * 2 * MIB)
    assert 0 == disk.temp_bytes("s")
    assert bytes(4 * MIB) == snapshot.read_bytes()
    fd = os.open(snapshot, os.O_RDONLY)
    assert errno.ENXIO == errno_of(os.lseek, fd, 0, os.SEEK_DATA)
    os.close(fd)


def test_what_may_not_be_read_is_data(mount):
    disk = mount(4 * K64)
    snapshot = disk.create("s")
    punch(snapshot, K64, K64)
    fd = os.open(snapshot, os.O_RDONLY)
    assert K64 == os.lseek(fd, 0, os.SEEK_DATA)
    assert 2 * K64 == os.lseek(fd, K64, os.SEEK_HOLE)
    os.close(fd)
    assert 0 < os.stat(snapshot).st_blocks


def test_punch_zero_and_truncate_of_active_are_writes(mount):
    content = os.urandom(8 * K64)
    disk = mount(content)
    snapshot = disk.create("s")
    punch(disk.active, 0, K64 + 100)
    run("fallocate", "-z", "-o", str(3 * K64), "-l", "1000", disk.active)
    os.truncate(disk.active, 6 * K64 + 10)
    expected = bytearray(content[: 6 * K64 + 10])
    expected[: K64 + 100] = bytes(K64 + 100)
    expected[3 * K64 : 3 * K64 + 1000] = bytes(1000)
    assert expected == disk.active.read_bytes()
    assert content == snapshot.read_bytes()


def test_a_write_through_a_mapping_is_in_the_snapshot_after_msync_or_even_before(mount):
    disk = mount(bytes(K64 * 2))
    with open(disk.active, "r+b") as file, mmap.mmap(file.fileno(), K64) as mapping:
        mapping[0:5] = b"hello"
        snapshot = disk.create("s")
        mapping[0:5] = b"later"
        mapping.flush()
    assert b"hello" == snapshot.read_bytes()[:5]
    assert b"later" == disk.image.read_bytes()[:5]


def test_deleted_snapshots_are_readable_through_open_descriptors(mount):
    disk = mount(b"1" * K64)
    fd = os.open(disk.create("s"), os.O_RDONLY)
    disk.snapfs("delete", disk.mountpoint, "s")
    disk.write(0, b"2" * K64)
    assert b"1" * K64 == os.pread(fd, K64, 0)
    assert [] == os.listdir(disk.snapshots)
    os.close(fd)
    disk.create("t")  # whatever the release did is done
    assert ["2"] == os.listdir(disk.state / "snapshots")


def test_refusals(mount):
    disk = mount(K64)
    snapshot = disk.create("s")
    created = os.stat(snapshot).st_mtime_ns
    assert errno.EPERM == errno_of(os.utime, snapshot)
    assert 1 == run("touch", snapshot, check=False).returncode
    assert created == os.stat(snapshot).st_mtime_ns
    disk.create("t")
    assert errno.EEXIST == errno_of(os.rename, snapshot, disk.snapshots / "t")
    os.rename(snapshot, disk.snapshots / "u")
    assert ["t", "u"] == sorted(os.listdir(disk.snapshots))
    assert errno.EPERM == errno_of(os.unlink, disk.active)
    assert errno.EPERM == errno_of(os.rename, disk.active, disk.mountpoint / "x")
    assert errno.EPERM == errno_of(os.mkdir, disk.snapshots / "d")
    assert errno.EPERM == errno_of((disk.mountpoint / "file").touch)
    with open(disk.snapshots / "t", "r+b", buffering=0) as file:
        assert errno.EROFS == errno_of(file.write, b"x")
        assert errno.EROFS == errno_of(file.truncate, 1)
        assert errno.EOPNOTSUPP == errno_of(fallocate, file.fileno(), 0, 0, K64)
    assert errno.EOPNOTSUPP == errno_of(os.setxattr, disk.active, "user.x", b"1")
    assert errno.EINVAL == errno_of((disk.snapshots / "a\nb").touch)


@pytest.mark.parametrize("bound", [None, "1G"])
def test_a_size_beyond_the_bound_changes_nothing(mount, bound):
    content = os.urandom(4 * K64)
    disk = mount(content, *([f"max-size={bound}"] if bound else []))
    snapshot = disk.create("s")
    fd = os.open(disk.active, os.O_RDWR)
    try:
        for size in (1 << 60, (1 << 63) - 1, 1 << 47, *([2 << 30] if bound else [])):
            assert errno.EFBIG == errno_of(os.ftruncate, fd, size)
            assert errno.EFBIG == errno_of(os.pwrite, fd, b"x", size - 1)
            assert errno.EFBIG == errno_of(fallocate, fd, 0, size - 4096, 4096)
            assert errno.EFBIG == errno_of(fallocate, fd, FALLOC_FL_ZERO_RANGE, size - 4096, 4096)
            assert (4 * K64, 4 * K64) == (os.fstat(fd).st_size, disk.image.stat().st_size)
        os.pwrite(fd, b"y" * K64, 0)
        os.ftruncate(fd, K64)
        os.ftruncate(fd, 8 * K64)
        if bound:
            os.ftruncate(fd, 1 << 30)
    finally:
        os.close(fd)
    assert content == snapshot.read_bytes()
    status = disk.json("status")
    assert status["mount"]["healthy"]
    disk.stop()
    disk.start()
    assert ["ok"] == [each["state"] for each in disk.json("list")["snapshots"]]
    assert content == snapshot.read_bytes()


@pytest.mark.parametrize("year", [1, 1930, 1969, 2117, 2300, 2400])
def test_times_that_64_bits_of_nanoseconds_do_not_hold(mount, year):
    disk = mount(b"1" * 2 * K64)
    snapshot = disk.create("s")
    stamp = (year - 1970) * 31_556_952 * 10**9 + 123456789
    for again in (disk.stop, disk.kill, disk.stop):
        os.utime(disk.active, ns=(stamp, stamp))
        there = disk.image.stat().st_mtime_ns  # the file system may have another end of time
        assert there == disk.active.stat().st_mtime_ns
        if 1930 <= year:
            assert stamp == there
        again()
        disk.start()
        assert there == disk.active.stat().st_mtime_ns
        assert ["ok"] == [each["state"] for each in disk.json("list")["snapshots"]]
        disk.write(0, b"2")
        assert b"1" * 2 * K64 == snapshot.read_bytes()
    assert disk.json("status")["mount"]["healthy"]
    disk.stop()
    os.utime(disk.image, ns=(stamp, stamp))
    disk.start()
    shown = disk.json("list", check=False)["snapshots"]
    assert ["lost"] == [each["state"] for each in shown]


def test_what_cannot_be_written_does_not_create(mount):
    disk = mount(K64)
    new = disk.snapshots / "new"
    for flags in (os.O_EXCL, os.O_TRUNC, os.O_APPEND):
        for access in (os.O_WRONLY, os.O_RDWR):
            assert errno.EROFS == errno_of(os.open, new, access | os.O_CREAT | flags)
    source = disk.mountpoint.parent / "x"
    source.write_text("text")
    for command in (
        ("cp", source, new), ("mv", source, new), ("dd", f"if={source}", f"of={new}"),
        ("mktemp", disk.snapshots / "XXXXXX"), ("install", source, new),
        ("sh", "-c", f"echo > {new}"), ("sh", "-c", f"echo >> {new}"), ("tee", new),
    ):  # fmt: skip
        assert 0 != run(*command, check=False).returncode, command
    assert [] == os.listdir(disk.snapshots)
    assert source.exists()
    run("touch", new)
    (disk.snapshots / "other").touch()
    assert ["new", "other"] == sorted(os.listdir(disk.snapshots))


def test_a_directory_has_its_dots(mount):
    disk = mount(K64)
    names = [f"s{number:03}" for number in range(200)]
    for name in names:
        disk.create(name)
    for path, found in (
        (disk.mountpoint, ["active", "bitmaps", "snapshots"]),
        (disk.snapshots, names), (disk.mountpoint / "bitmaps", []),
    ):  # fmt: skip
        listed = run("ls", "-fai", path).stdout.splitlines()
        inodes = {line.split()[1]: int(line.split()[0]) for line in listed}
        assert len(listed) == len(inodes)
        assert [".", "..", *found] == sorted(inodes)
        assert os.stat(path).st_ino == inodes["."]


def test_a_name_that_is_too_long(mount):
    disk = mount(K64)
    disk.create("s")
    longest = "n" * 255
    for name in ("n" * 256, "ü" * 128):
        path = disk.snapshots / name
        assert errno.ENAMETOOLONG == errno_of(path.stat)
        assert errno.ENAMETOOLONG == errno_of(path.touch)
        assert errno.ENAMETOOLONG == errno_of(path.unlink)
        assert errno.ENAMETOOLONG == errno_of(os.rename, disk.snapshots / "s", path)
        assert errno.ENAMETOOLONG == errno_of((disk.mountpoint / name).stat)
        assert 2 == disk.snapfs("create", disk.mountpoint, name, check=False).returncode
    disk.create(longest)
    assert ["s", longest] == os.listdir(disk.snapshots)


def test_attributes_have_names_but_are_not_listed(mount, tmp_path):
    disk = mount(b"x" * K64)
    snapshot = disk.create("s")
    assert b"ok" == os.getxattr(snapshot, "user.snapfs.state")
    assert b"0" == os.getxattr(snapshot, "user.snapfs.temp_bytes")
    for path in (disk.mountpoint, disk.active, snapshot):
        assert [] == os.listxattr(path)
    run("cp", "-a", snapshot, tmp_path / "copy")
    run("rsync", "-aX", snapshot, tmp_path / "other")
    for name in ("copy", "other"):
        assert b"x" * K64 == (tmp_path / name).read_bytes()
        assert [] == os.listxattr(tmp_path / name)


def test_changes_through_the_socket_are_seen_at_once(mount):
    disk = mount(K64)
    path = disk.snapshots / "s"
    assert not path.exists()
    disk.snapfs("create", disk.mountpoint, "s")
    assert path.exists()
    disk.snapfs("delete", disk.mountpoint, "s")
    assert not path.exists()
    assert 5 == disk.snapfs("delete", disk.mountpoint, "s", check=False).returncode


def test_owner_and_mode_of_active_are_those_of_the_image(mount):
    disk = mount(K64)
    os.chmod(disk.active, 0o640)
    os.utime(disk.active, ns=(1, 2))
    assert (0o640, 2) == (disk.image.stat().st_mode & 0o777, disk.image.stat().st_mtime_ns)
    disk.create("s")
    status = os.stat(disk.snapshots / "s")
    assert (0o640, K64) == (status.st_mode & 0o777, status.st_blksize)


def test_trim_and_map(mount):
    disk = mount(os.urandom(4 * K64))
    snapshot = disk.create("s")
    disk.write(0, b"x" * K64)
    trimmed = disk.snapfs("trim", "-v", "-o", "64K", "-l", "128K", snapshot).stdout
    assert f"{snapshot}: 128 KiB (131072 bytes) trimmed\n" == trimmed
    kinds = [
        (each["start"], each["length"], each["source"], each["accessible"])
        for each in json.loads(disk.snapfs("map", "--json", snapshot).stdout)
    ]
    assert [
        (0, K64, "temp", True),
        (K64, 2 * K64, "none", False),
        (3 * K64, K64, "active", True),
    ] == kinds


def test_a_second_daemon_is_refused(mount, tmp_path):
    disk = mount(K64)
    other = tmp_path / "other"
    other.mkdir()
    second = run(*SNAPFS, "mount", disk.image, other, check=False)
    assert (1, True) == (second.returncode, "in use by another process" in second.stderr)
    refused = run(
        "qemu-img", "convert", "-f", "raw", "-O", "raw", disk.image, other / "x", check=False
    )
    assert "lock" in refused.stderr
