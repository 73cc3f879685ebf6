"""snapfs copy: what arrives at the destination, and what an interrupted one leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.calls import copy
from tests.support.mounted import K64, MIB, run
from tests.support.patched import Program, held_copy
from tests.support.patterns import pattern

pytestmark = pytest.mark.mount


@pytest.mark.parametrize("size", [0, 1, 130_000, 8 * MIB])
def test_a_new_raw_file_is_the_snapshot_whatever_is_written_meanwhile(mount, tmp_path, size):
    content = pattern(size)
    disk = mount(content)
    disk.create("s")
    if size:
        disk.write(0, b"x" * min(size, 3 * K64))
    copy(disk, "s", tmp_path / "copy")
    assert content == (tmp_path / "copy").read_bytes()
    assert not (tmp_path / "copy.partial").exists()


@pytest.mark.parametrize("size", [1, 130_000, 8 * MIB])
def test_a_qcow2_copy_reads_as_the_snapshot(mount, tmp_path, size):
    content = pattern(size)
    disk = mount(content)
    disk.create("s")
    disk.write(0, b"x")
    copy(disk, "s", tmp_path / "copy.qcow2", "--format", "qcow2")
    run("qemu-img", "check", tmp_path / "copy.qcow2")
    run("qemu-img", "convert", "-O", "raw", tmp_path / "copy.qcow2", tmp_path / "raw")
    assert content == (tmp_path / "raw").read_bytes()[:size]


def test_holes_stay_holes(mount, tmp_path):
    disk = mount(64 * MIB)
    disk.write(MIB, b"x" * K64)
    disk.create("s")
    copy(disk, "s", tmp_path / "copy")
    assert 64 * MIB == (tmp_path / "copy").stat().st_size
    assert (tmp_path / "copy").stat().st_blocks * 512 <= 4 * K64


def test_written_zeros_take_no_space(mount, tmp_path):
    disk = mount(bytes(4 * MIB))
    disk.create("s")
    copy(disk, "s", tmp_path / "copy")
    assert 0 == (tmp_path / "copy").stat().st_blocks


def test_discard_gives_everything_up_when_it_is_copied(mount, tmp_path):
    content = pattern(8 * MIB + 100)
    disk = mount(content)
    disk.create("s")
    disk.write(0, b"x" * MIB)
    assert disk.temp_bytes("s") > 0
    copy(disk, "s", tmp_path / "copy", "--discard")
    assert content == (tmp_path / "copy").read_bytes()
    assert 0 == disk.temp_bytes("s")
    assert 0 == disk.json("show", "s")["snapshot"]["clusters"]["accessible"]


def test_what_may_not_be_read_is_left_alone_in_an_existing_file(mount, tmp_path):
    disk = mount(pattern(4 * MIB))
    disk.create("s")
    run("fallocate", "-p", "-o", str(MIB), "-l", str(MIB), disk.snapshots / "s")
    dest = tmp_path / "copy"
    dest.write_bytes(b"\xaa" * 5 * MIB)
    copy(disk, "s", dest)
    found = dest.read_bytes()
    expected = bytearray(disk.image.read_bytes())
    expected[MIB : 2 * MIB] = b"\xaa" * MIB
    assert bytes(expected) == found  # zeros over what was there, and cut to size


@pytest.mark.parametrize("increment", [False, True])
def test_a_file_that_is_no_image_of_that_size_is_not_overwritten_unasked(
    mount, tmp_path, increment
):
    disk = mount(pattern(4 * MIB))
    disk.create("s")
    if increment:
        run("fallocate", "-p", "-o", str(MIB), "-l", str(MIB), disk.snapshots / "s")
    dest = tmp_path / "notes.txt"
    dest.write_text("remember the milk\n")
    done = copy(disk, "s", dest, check=False)
    assert (2, True) == (done.returncode, "--force" in done.stderr), done.stderr
    assert "remember the milk\n" == dest.read_text()
    assert ["notes.txt"] == [each.name for each in tmp_path.glob("notes*")]
    dest.write_bytes(b"")  # mktemp(1): there is nothing to lose, and no image either
    assert (2 if increment else 0) == copy(disk, "s", dest, check=False).returncode
    dest.write_bytes(b"\xaa" * 4 * MIB)
    copy(disk, "s", dest)
    dest.write_text("remember the milk\n")
    copy(disk, "s", dest, "--force")
    assert 4 * MIB == dest.stat().st_size


def test_a_new_file_that_would_not_be_the_whole_image_is_refused(mount, tmp_path):
    disk = mount(pattern(4 * MIB))
    disk.create("s")
    run("fallocate", "-p", "-o", str(MIB), "-l", str(MIB), disk.snapshots / "s")
    done = copy(disk, "s", tmp_path / "copy", check=False)
    assert 2 == done.returncode
    assert "1048576 bytes of s may not be read" in done.stderr
    assert [] == list(tmp_path.glob("copy*"))
    copy(disk, "s", tmp_path / "copy", "--allow-missing")


def test_a_zero_cluster_of_an_increment_hides_what_the_backing_file_has(mount, tmp_path):
    first = os.urandom(4 * MIB)
    disk = mount(first)
    disk.create("s1")
    copy(disk, "s1", tmp_path / "1.qcow2", "--format", "qcow2")
    run("fallocate", "-p", "-o", str(MIB), "-l", str(MIB), disk.active)
    disk.write(3 * MIB, b"new" * 1000)
    disk.create("s2")
    second = (disk.snapshots / "s2").read_bytes()
    run("fallocate", "-p", "-o", "0", "-l", str(MIB), disk.snapshots / "s2")
    copy(
        disk, "s2", tmp_path / "2.qcow2", "--format", "qcow2", "--backing", tmp_path / "1.qcow2"
    )  # fmt: skip
    info = json.loads(run("qemu-img", "info", "--output=json", tmp_path / "2.qcow2").stdout)
    assert "1.qcow2" == info["backing-filename"]
    run("qemu-img", "convert", "-O", "raw", tmp_path / "2.qcow2", tmp_path / "raw")
    assert second == (tmp_path / "raw").read_bytes()


def interrupted(disk, name: str, dest: Path, number: int, *options: str) -> None:
    """A copy, ended by a signal when some of it is durable."""
    copying = Program(held_copy(8 * MIB), "copy", disk.snapshots / name, dest, *options)
    copying.wait_reached()
    journal = Path(f"{dest}.partial")
    assert 8 * MIB == json.loads(journal.read_text())["position"]
    copying.end(number)
    assert (130 if number != signal.SIGKILL else -number) == copying.process.returncode
    assert journal.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_an_interrupted_copy_with_discard_goes_on(mount, tmp_path, number, form):
    content = os.urandom(24 * MIB)
    disk = mount(content)
    disk.create("s")
    dest = tmp_path / "copy"
    interrupted(disk, "s", dest, number, "--discard", "--format", form)
    disk.write(0, b"x" * MIB)
    done = copy(disk, "s", dest, "--discard", "--format", form, "--json")
    summary = json.loads(done.stdout.splitlines()[-1])
    assert "summary" == summary["message_type"]
    assert 8 * MIB == summary["resumed_at"]
    assert summary["copied_bytes"] == 24 * MIB - summary["resumed_at"]
    if form == "qcow2":
        run("qemu-img", "check", dest)
        run("qemu-img", "convert", "-O", "raw", dest, tmp_path / "raw")
        dest = tmp_path / "raw"
    assert content == dest.read_bytes()
    assert not (tmp_path / "copy.partial").exists()


def test_an_unfinished_copy_of_something_else_is_not_gone_on_with(mount, tmp_path):
    disk = mount(os.urandom(24 * MIB))
    disk.create("s")
    dest = tmp_path / "copy"
    interrupted(disk, "s", dest, signal.SIGKILL)
    disk.create("t")
    run("fallocate", "-p", "-o", "0", "-l", str(MIB), disk.snapshots / "t")
    done = copy(disk, "t", dest, check=False)
    assert 4 == done.returncode
    assert "unfinished copy of something else" in done.stderr
    disk.create("u")  # holds everything
    copy(disk, "u", dest)
    assert disk.image.read_bytes() == dest.read_bytes()


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_an_incomplete_snapshot_says_what_is_missing_and_stays_partial(mount, tmp_path, form):
    disk = mount(os.urandom(8 * MIB), "temp-limit=1M")
    disk.create("s")
    for offset in range(0, 4 * MIB, MIB):
        disk.write(offset, b"x" * MIB)
    assert "incomplete" == disk.json("show", "s", check=False)["snapshot"]["state"]
    dest = tmp_path / "copy"
    said = []
    for _ in range(3):
        done = copy(disk, "s", dest, "--format", form, check=False)
        assert 4 == done.returncode
        said.append(done.stderr.partition("missing, as offset+length: ")[2])
        assert (tmp_path / "copy.partial").exists()
    assert said[0]
    assert [said[0]] * 3 == said
    if form == "qcow2":
        run("qemu-img", "check", dest)
        run("qemu-img", "convert", "-O", "raw", dest, tmp_path / "raw")
        dest = tmp_path / "raw"
    assert disk.image.read_bytes()[4 * MIB :] == dest.read_bytes()[4 * MIB :]


def test_a_lost_snapshot_is_not_copied(mount, tmp_path):
    disk = mount(os.urandom(MIB))
    disk.create("s")
    disk.stop()
    with open(disk.image, "r+b") as file:
        file.write(b"behind your back")
    disk.start()
    done = copy(disk, "s", tmp_path / "copy", check=False)
    assert 4 == done.returncode
    assert "lost" in done.stderr
    assert [] == list(tmp_path.glob("copy*"))


def test_no_room_is_known_before_anything_is_written(mount, tmp_path):
    disk = mount(os.urandom(8 * MIB))
    disk.create("s")
    small = tmp_path / "small"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", small)
    try:
        done = copy(disk, "s", small / "copy", check=False)
        assert 1 == done.returncode
        assert "make room" in done.stderr
        assert [] == list(small.iterdir())
    finally:
        run("umount", small)


def test_the_image_itself_and_its_mount_are_no_destination(mount):
    disk = mount(os.urandom(MIB))
    disk.create("s")
    for dest in (disk.image, disk.active):
        assert 2 == copy(disk, "s", dest, check=False).returncode
    done = disk.snapfs("copy", disk.active, "/nonexistent/x", check=False)
    assert 2 == done.returncode
    assert "not a snapshot" in done.stderr


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_an_image_in_use_stays_as_it_is_and_unmarked(mount, tmp_path, form):
    """With a mark beside it the next copy would have taken it for an unfinished one of its own."""
    disk = mount(os.urandom(MIB))
    disk.create("s")
    dest = tmp_path / "copy"
    run("qemu-img", "create", "-q", "-f", form, dest, "1M")
    run("qemu-io", "-f", form, "-c", "write -q -P 7 0 1M", dest)
    before = dest.read_bytes()
    user = subprocess.Popen(
        ["qemu-io", "-f", form, str(dest)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert user.stdin is not None
        assert user.stdout is not None
        user.stdin.write(b"length\n")
        user.stdin.flush()
        user.stdout.readline()  # it is open now
        done = copy(disk, "s", dest, "--force", "--format", form, check=False)
        assert (1, True) == (done.returncode, "in use" in done.stderr), done.stderr
        assert before == dest.read_bytes()
        assert not (tmp_path / "copy.partial").exists()
    finally:
        user.communicate()


def test_a_mark_that_cannot_be_made_leaves_nothing(mount, tmp_path):
    disk = mount(os.urandom(MIB))
    disk.create("s")
    (tmp_path / "copy.partial.new").mkdir()
    for form in ("raw", "qcow2"):
        assert 1 == copy(disk, "s", tmp_path / "copy", "--format", form, check=False).returncode
        assert not (tmp_path / "copy").exists()


def test_a_descriptor_that_is_not_open_is_no_place_for_progress(mount, tmp_path):
    disk = mount(MIB)
    disk.create("s")
    done = copy(disk, "s", tmp_path / "copy", "--progress", "77", check=False)
    assert (2, True) == (done.returncode, "77 is not an open descriptor" in done.stderr)
    assert [] == list(tmp_path.glob("copy*"))


def test_progress_goes_to_a_descriptor(mount, tmp_path):
    disk = mount(os.urandom(MIB))
    disk.create("s")
    done = copy(disk, "s", tmp_path / "copy", "--progress", "1")
    assert "0/100" == done.stdout.splitlines()[0]
    assert "100/100" == done.stdout.splitlines()[-1]
