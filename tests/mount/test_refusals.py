"""Bad input: one clear line, the right exit status, nothing left behind."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.support.mounted import SNAPFS, run

pytestmark = pytest.mark.mount

USAGE = 2


def refused(*arguments: str | Path) -> tuple[int, str]:
    """Exit status and the one line of a `snapfs mount` that must fail."""
    done = run(*SNAPFS, "mount", *arguments, check=False)
    lines = done.stderr.splitlines()
    assert 1 == len(lines), done.stderr
    assert lines[0].startswith("snapfs: ")
    return done.returncode, lines[0]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"x" * 100_000)
    (tmp_path / "mnt").mkdir()
    return path


@pytest.fixture
def mnt(tmp_path: Path) -> Path:
    return tmp_path / "mnt"


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("cluster-size=5000", "power of two"),
        ("cluster-size=8M", "power of two"),
        ("cluster-size=", "needs a value"),
        ("on-cbw-error=panic", "break-snapshot"),
        ("on-cbw-eror=break-snapshot", "did you mean on-cbw-error?"),
        ("cbw-timeout=-1", "seconds"),
        ("auto_unmount", "refused"),
        ("uid=root", "not a number"),
    ],
)
def test_bad_options(disk, mnt, option, words):
    status, line = refused(disk, mnt, "-o", option)
    assert (USAGE, True) == (status, words in line), line
    assert not os.path.exists(f"{disk}.snapfs")


def test_bad_images(disk, mnt, tmp_path):
    for path, words in (
        (tmp_path / "none.img", "there is no image"),
        (tmp_path, "is a directory"),
        (Path("/dev/null"), "not a regular file"),
    ):
        status, line = refused(path, mnt)
        assert (USAGE, True) == (status, words in line), line
    assert [] == [name for name in os.listdir(tmp_path) if name.endswith(".snapfs")]
    assert not os.path.exists("/dev/null.snapfs")


def test_a_block_device_is_refused(mnt):
    device = next((path for path in Path("/dev").iterdir() if path.is_block_device()), None)
    if device is None:
        pytest.skip("this machine has no block device")
    mnt.mkdir()
    status, line = refused(device, mnt)
    assert (USAGE, True) == (status, "block device" in line)
    assert not os.path.exists(f"{device}.snapfs")


def test_bad_mountpoints(disk, tmp_path, mount):
    below = tmp_path / "below"
    below.mkdir()
    inner = below / "inner.img"
    inner.write_bytes(b"x")
    state = tmp_path / "state"
    (state / "mnt").mkdir(parents=True)
    busy = mount(1000)
    for arguments, words in (
        ((disk, tmp_path / "nowhere"), "does not exist"),
        ((disk, disk), "not a directory"),
        ((inner, below), "under the mountpoint"),
        ((disk, below, "-o", f"state={below}/state"), "under the mountpoint"),
        ((disk, state / "mnt", "-o", f"state={state}"), "under the state directory"),
        ((disk, busy.mountpoint), "is busy"),
    ):
        status, line = refused(*arguments)
        assert (True, True) == (status in (1, USAGE), words in line), line
    assert not os.path.exists(f"{disk}.snapfs")


def test_a_damaged_or_foreign_state_directory_is_refused(disk, mnt):
    state = Path(f"{disk}.snapfs")
    state.mkdir(mode=0o700)
    for content, words in (
        (b"{", "is not JSON"),
        (b"[]", "not a JSON object"),
        (b'{"version": 99}', "version 99"),
        (b'{"version": 1}', "damaged"),
    ):
        (state / "manifest.json").write_bytes(content)
        status, line = refused(disk, mnt)
        assert (1, True) == (status, words in line), line
        assert content == (state / "manifest.json").read_bytes()
    (state / "manifest.json").unlink()
    (state / "manifest.json").symlink_to("/etc/passwd")
    assert "symbolic link" in refused(disk, mnt)[1]
    state.chmod(0o777)
    assert "written by others" in refused(disk, mnt)[1]


def test_snapshot_names(mount):
    disk = mount(1000)
    for name in (".", "..", "a/b", "x" * 256, "a\nb", ""):
        done = disk.snapfs("create", disk.mountpoint, name, check=False)
        assert (USAGE, 1) == (done.returncode, len(done.stderr.splitlines())), name
    disk.snapfs("create", disk.mountpoint, "ünï")
    done = disk.snapfs("create", disk.mountpoint, "ünï", check=False)
    assert (1, True) == (done.returncode, "already" in done.stderr)
    assert ["ünï"] == os.listdir(disk.snapshots)
    assert ["1"] == os.listdir(disk.state / "snapshots")


def test_not_mounted(tmp_path):
    for verb in ("list", "status", "umount"):
        done = run(*SNAPFS, verb, tmp_path, check=False)
        assert (5, True) == (done.returncode, "no snapfs is mounted" in done.stderr)


def test_a_read_only_mount_is_a_view(mount):
    disk = mount(b"1" * 100_000)
    disk.create("s")
    disk.write(0, b"2" * 100_000)
    disk.stop()
    disk.options = ["ro"]
    disk.start()
    assert b"1" * 100_000 == (disk.snapshots / "s").read_bytes()
    assert b"2" * 100_000 == disk.active.read_bytes()
    for act in (lambda: disk.write(0, b"x"), lambda: disk.create("t")):
        with pytest.raises(OSError, match="Read-only"):
            act()


def test_an_image_resized_from_outside_is_noticed(mount):
    disk = mount(b"1" * 100_000)
    os.truncate(disk.image, 200_000)
    assert 200_000 == disk.json("status")["image"]["size"]
    assert b"1" * 100_000 + bytes(100_000) == disk.active.read_bytes()
    os.truncate(disk.image, 50_000)
    status = disk.snapfs("status", disk.mountpoint, "--json", check=False)
    assert (1, True) == (status.returncode, '"healthy": false' in status.stdout)
    done = disk.snapfs("create", disk.mountpoint, "s", check=False)
    assert (1, True) == (done.returncode, "from outside" in done.stderr)
    assert [] == os.listdir(disk.state / "snapshots")


def test_a_full_temp_file_system_at_creation_leaves_nothing(mount, tmp_path):
    if os.geteuid():
        pytest.skip("mounting a tmpfs takes root")
    small = tmp_path / "small"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=1M", "none", small)
    try:
        disk = mount(100 << 30, f"state={small}/state")  # its bitmaps are 200 KiB each
        used = (small / "filler").write_bytes(b"x" * (700 << 10))
        assert used
        done = disk.snapfs("create", disk.mountpoint, "s", check=False)
        assert (1, True) == (done.returncode, "No space left" in done.stderr), done.stderr
        assert [] == os.listdir(disk.snapshots)
        assert [] == os.listdir(small / "state" / "snapshots")
        (small / "filler").unlink()
        disk.create("s")
        disk.stop()
    finally:
        run("umount", small)


def test_a_state_directory_that_cannot_be_made_is_named_with_the_remedy(disk, mnt):
    status, line = refused(disk, mnt, "-o", "state=/proc/nowhere/state")
    assert (1, True) == (status, "/proc/nowhere/state cannot be made" in line), line
    assert "-o state=DIR" in line


@pytest.mark.skipif("os.geteuid()", reason="needs to make a device")
def test_an_unusable_dev_fuse_is_one_line(disk, mnt):
    inner = f"mount --bind /dev/null /dev/fuse && {sys.executable} -m snapfs mount {disk} {mnt}"
    done = run("unshare", "--mount", "sh", "-c", inner, check=False)
    assert 1 == done.returncode
    assert "cannot be mounted" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not os.path.exists(f"{disk}.snapfs")
