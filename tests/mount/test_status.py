"""Looking at mounts: status in all its forms, the picture, and metrics; by real programs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from pathlib import Path

import pytest

from snapfs.client import everywhere
from tests.support.calls import punch
from tests.support.filesystems import tmpfs
from tests.support.mounted import K64, MIB, PATIENCE, SNAPFS, Mounted, run
from tests.support.points import Backup
from tests.support.terminals import LEAVES, SHOWS_CURSOR, Terminal

pytestmark = pytest.mark.mount

MARKS = set("!◆░▒▓█%+-·")


@pytest.fixture
def disk(mount) -> Mounted:
    """64 clusters, of which a snapshot has lost none."""
    disk = mount(os.urandom(4 * MIB))
    disk.create("s")
    return disk


def test_the_document_says_how_the_mount_is(disk):
    disk.snapfs("bitmap", "add", disk.mountpoint, "b")
    disk.write(0, b"x" * 3 * K64)
    with open(disk.active, "rb"), open(disk.active, "r+b"), open(disk.snapshots / "s", "rb"):
        status = disk.json("status")
    version = {"command": "status", "vers_major": 1, "vers_minor": 0}
    assert version == status["output_version"]
    assert (True, None, []) == (
        status["mount"]["healthy"], status["mount"]["reason"], status["problems"],
    )  # fmt: skip
    since = datetime.fromisoformat(status["mount"]["since"])
    assert 0 <= (datetime.now(UTC) - since).total_seconds() < PATIENCE
    assert {"readers": 2, "writers": 1} == status["open"]
    assert {"readers": 0, "writers": 0} == disk.json("status")["open"]
    assert 1 == status["snapshots"][0]["open"]
    copies = status["copies"]
    assert copies["count"] >= 1
    assert [None, copies["count"]] == copies["buckets"][-1]
    assert copies["seconds"] == pytest.approx(status["counters"]["cbw_seconds"], abs=1e-3)
    assert 3 == status["counters"]["cbw_copies"]


def test_status_for_people_is_plain_where_there_is_no_terminal(disk):
    with open(disk.active, "rb"):
        text = disk.snapfs("status", disk.mountpoint).stdout
    assert text.startswith(f"{disk.mountpoint}: healthy\n")
    for words in (str(disk.image), "4 MiB", "1 for reading; by ", f"(process {os.getpid()})"):
        assert words in " ".join(text.split()), words
    assert "\x1b" not in text and "#" not in text
    colour = run("env", "FORCE_COLOR=1", *SNAPFS, "status", disk.mountpoint).stdout
    assert "\x1b[32mhealthy" in colour
    assert "\x1b" not in run("env", "FORCE_COLOR=1", "NO_COLOR=1", *SNAPFS, "status").stdout
    assert "\x1b" in disk.snapfs("status", disk.mountpoint, "--color=always").stdout


@pytest.mark.parametrize("columns", [30, 80, 200])
def test_status_on_a_terminal(disk, columns):
    with Terminal(*SNAPFS, "status", disk.mountpoint, columns=columns) as terminal:
        assert 0 == terminal.finish()
        assert "\x1b[32mhealthy" in terminal.output
        assert "[...................." in terminal.plain  # the bar
        assert max(map(len, terminal.plain.splitlines()[1:])) <= columns
    with Terminal(*SNAPFS, "status", disk.mountpoint, NO_COLOR="1") as terminal:
        assert 0 == terminal.finish()
        assert "\x1b" not in terminal.output


def test_writes_of_the_guest_that_fail_make_it_unhealthy(mount, tmp_path):
    """The image is sparse, and its file system is full."""
    with tmpfs(tmp_path / "small", "1M") as where:
        image = where / "disk.img"
        with open(image, "wb") as file:
            file.truncate(64 * MIB)
        mountpoint = tmp_path / "mnt"
        mountpoint.mkdir()
        options = ["temp-reserve=0", f"state={tmp_path}/state"]
        disk = Mounted(image, mountpoint, options).start()
        try:
            assert disk.json("status")["mount"]["healthy"]
            with pytest.raises(OSError, match="No space left"):
                for position in range(0, 2 * MIB, K64):
                    disk.write(position, os.urandom(K64))
            done = disk.snapfs("status", disk.mountpoint, check=False)
            assert 1 == done.returncode
            lines = done.stdout.splitlines()
            assert lines[0].endswith("NOT HEALTHY")
            assert lines[1].startswith("  error: 1 write to active failed, the last at 2")
            assert f"make room on the file system of {image}" in " ".join(done.stdout.split())
            status = disk.json("status", check=False)
            assert "No space left on device" in status["mount"]["reason"]
            assert 1 == status["counters"]["write_errors"]
        finally:
            disk.stop()


def test_what_is_wrong_decides_the_exit_status(mount):
    disk = mount(os.urandom(4 * MIB), "temp-limit=64K")
    disk.create("s")
    disk.write(0, b"x" * 2 * K64)
    done = disk.snapfs("status", disk.mountpoint, check=False)
    assert 1 == done.returncode  # there is no room any more
    assert "no room is left for temp images" in done.stdout
    disk.snapfs("limit", disk.mountpoint, "none")
    done = disk.snapfs("status", disk.mountpoint, check=False)
    assert 4 == done.returncode
    assert "1 snapshot is incomplete (s)" in done.stdout
    assert f"snapfs delete {disk.mountpoint} NAME" in done.stdout
    (disk.snapshots / "s").unlink()
    assert disk.json("status")["mount"]["healthy"]


# All mounts of the machine


def test_without_a_mountpoint_all_mounts_are_told_of(mount):
    one, other = mount(os.urandom(MIB)), mount(os.urandom(MIB))
    one.create("a")
    other.create("b")
    text = one.snapfs("status", check=False).stdout
    for disk in (one, other):
        assert f"{disk.mountpoint}: healthy" in text
    mounts = json.loads(one.snapfs("status", "--json", check=False).stdout)["mounts"]
    assert {str(one.mountpoint), str(other.mountpoint)} <= {
        each["mount"]["mountpoint"] for each in mounts
    }
    found = json.loads(one.snapfs("list", "--json", check=False).stdout)
    names = {each["mountpoint"]: [s["name"] for s in each["snapshots"]] for each in found["mounts"]}
    assert (["a"], ["b"]) == (names[str(one.mountpoint)], names[str(other.mountpoint)])
    assert re.search(rf"{one.mountpoint} +a ", one.snapfs("list", check=False).stdout)


def test_a_mount_whose_daemon_is_gone_does_not_hide_the_others(mount):
    one, dead = mount(os.urandom(MIB)), mount(os.urandom(MIB))
    dead.kill()
    done = one.snapfs("status", check=False)
    assert 5 == done.returncode
    assert f"{one.mountpoint}: healthy" in done.stdout
    assert f"{dead.mountpoint}: the daemon of {dead.mountpoint} is gone" in done.stderr
    mounts = json.loads(one.snapfs("status", "--json", check=False).stdout)["mounts"]
    errors = {each["mount"]["mountpoint"]: each.get("error") for each in mounts}
    assert "is gone" in errors[str(dead.mountpoint)]
    assert errors[str(one.mountpoint)] is None
    metrics = one.snapfs("metrics", check=False)
    assert 3 == metrics.returncode
    assert f'snapfs_up{{mountpoint="{dead.mountpoint}"}} 0.0' in metrics.stdout
    dead.snapfs("umount", dead.mountpoint, check=False)


def test_one_file_system_that_is_mounted_twice_is_one(mount, tmp_path):
    disk = mount(os.urandom(MIB))
    before = len(everywhere.mounts())
    second = tmp_path / "second"
    second.mkdir()
    run("mount", "--bind", disk.mountpoint, second)
    try:
        assert before == len(everywhere.mounts())
    finally:
        run("umount", second)


# Watching


def marks(terminal: Terminal) -> str:
    """The map in the newest frame."""
    rows = [line.rstrip() for line in terminal.frame]
    return "".join(row for row in rows if row and set(row) <= MARKS)


def test_watching_shows_what_happens(disk):
    with Terminal(*SNAPFS, "status", "--watch", disk.mountpoint) as terminal:
        terminal.wait_for(lambda it: marks(it) == "-" * 64)
        assert str(disk.mountpoint)[:40] in terminal.frame[0] and "healthy" in terminal.frame[0]
        assert len(terminal.frame) <= 24 and max(map(len, terminal.frame)) <= 80
        disk.write(0, b"x" * 4 * K64)
        terminal.wait_for(lambda it: marks(it) == "█" * 4 + "-" * 60)
        punch(disk.snapshots / "s", 0, 8 * K64)
        terminal.wait_for(lambda it: marks(it) == "%" * 8 + "-" * 56)
        with open(disk.snapshots / "s", "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no readahead
            os.pread(file.fileno(), 100, 20 * K64)
        terminal.wait_for(lambda it: marks(it)[20:21] == "◆")
        terminal.wait_for(lambda it: marks(it)[20:21] == "-")  # it is over
        terminal.press("\x03")
        assert 130 == terminal.finish()
        assert terminal.output.rindex(LEAVES) > terminal.output.rindex("Image,")
        assert SHOWS_CURSOR in terminal.output[terminal.output.rindex("Image,") :]
        assert "Traceback" not in terminal.plain


def test_watching_grows_and_shrinks_with_the_terminal(mount):
    disk = mount(os.urandom(MIB))
    disk.snapfs("create", disk.mountpoint, "s")
    with open(disk.active, "r+b") as file:
        file.truncate(4096 * K64)
    with Terminal(*SNAPFS, "status", "--watch", disk.mountpoint) as terminal:
        for columns, rows in ((80, 24), (160, 50), (40, 12), (20, 6)):
            terminal.resize(columns, rows)
            # Lines are padded; a frame that was drawn while it changed may be of two sizes.
            terminal.wait_for(
                lambda it, c=columns, r=rows: (
                    r == len(it.frame) and {c} == {len(line) for line in it.frame}
                )
            )
        terminal.press("\x03")
        assert 130 == terminal.finish()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_watch_that_is_ended_leaves_the_terminal_as_it_was(disk, number):
    with Terminal(*SNAPFS, "status", "--watch", disk.mountpoint) as terminal:
        terminal.wait_for(lambda it: bool(marks(it)))
        terminal.process.send_signal(number)
        assert 130 == terminal.finish()
        assert LEAVES in terminal.output and SHOWS_CURSOR in terminal.output


def test_watching_ends_with_the_mount(disk):
    with Terminal(*SNAPFS, "status", "--watch", disk.mountpoint) as terminal:
        terminal.wait_for(lambda it: bool(marks(it)))
        disk.stop()
        assert 5 == terminal.finish()
        assert LEAVES in terminal.output
        assert "snapfs: " in terminal.plain[terminal.plain.rindex("Image,") :]


def test_watching_without_colours_and_without_utf8(disk):
    command = (*SNAPFS, "status", "--watch", disk.mountpoint)
    with Terminal(*command, NO_COLOR="1", LC_ALL="C", PYTHONUTF8="0",
                  PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii") as terminal:  # fmt: skip
        terminal.wait_for(lambda it: "being read" in "".join(it.frame))
        assert terminal.output.isascii()
        assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", terminal.output)
        terminal.press("\x03")
        assert 130 == terminal.finish()


def test_watching_where_there_is_no_terminal_is_a_line_a_second(disk):
    with subprocess.Popen(
        [*SNAPFS, "status", "--watch", disk.mountpoint], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout and process.stderr
        for _ in range(2):
            line = process.stdout.readline()
            assert f"{disk.mountpoint} healthy; snapshots 1, temp 0 B of" in line
        process.stdout.close()  # as head(1) does
        assert 1 == process.wait(PATIENCE)
        assert "" == process.stderr.read()
    with subprocess.Popen(
        [*SNAPFS, "status", "--watch", "--json", disk.mountpoint], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        for _ in range(2):
            document = json.loads(process.stdout.readline())
            assert ("status", 1) == (
                document["message_type"], document["output_version"]["vers_major"],
            )  # fmt: skip
            assert 64 == sum(document["regions"]["clusters"]["needed"])
        disk.stop()
        *_, last = process.stdout.read().splitlines()
        assert 5 == process.wait(PATIENCE)
        assert ("error", 5) == (json.loads(last)["message_type"], json.loads(last)["exit_code"])


# Pictures


def test_the_picture_of_a_mount(disk, tmp_path):
    disk.write(0, b"x" * 2 * K64)
    disk.read("snapshots/s", 10 * K64, 1)
    picture = tmp_path / "disk.svg"
    done = disk.snapfs("map", disk.mountpoint, "--svg", picture)
    assert "" == done.stdout
    root = ElementTree.fromstring(picture.read_text())
    words = " ".join(text.text or "" for text in root.iter() if text.tag.endswith("}text"))
    assert f"snapfs: {disk.image}"[:40] in words
    assert "copied: 128 KiB, 3.1 %" in words
    assert "kept if it changes: 3.9 MiB" in words
    assert len([each for each in root.iter() if each.tag.endswith("}circle")]) >= 2
    assert 0o644 == picture.stat().st_mode & 0o777
    same = disk.snapfs("map", disk.active, "--svg", "-").stdout
    assert same.startswith("<svg ")


def test_a_picture_is_replaced_as_a_whole_or_not_at_all(disk, tmp_path):
    where = tmp_path / "pictures"
    where.mkdir()
    picture = where / "disk.svg"
    picture.write_text("old")
    picture.chmod(0o600)
    link = where / "link.svg"
    link.symlink_to("disk.svg")
    disk.snapfs("map", disk.mountpoint, "--svg", link)
    assert link.is_symlink()
    assert picture.read_text().startswith("<svg")
    assert 0o600 == picture.stat().st_mode & 0o777
    assert {"disk.svg", "link.svg"} == set(os.listdir(where))
    done = disk.snapfs("map", disk.mountpoint, "--svg", where / "no" / "x.svg", check=False)
    assert 1 == done.returncode
    assert f"{where}/no/x.svg" in done.stderr
    done = disk.snapfs("map", disk.mountpoint, "--svg", "/dev/full", check=False)
    assert 1 == done.returncode
    assert "No space left" in done.stderr
    with tmpfs(tmp_path / "small", "4k") as small:
        (small / "x.svg").write_text("old")
        done = disk.snapfs("map", disk.mountpoint, "--svg", small / "x.svg", check=False)
        assert 1 == done.returncode
        assert ["x.svg"] == os.listdir(small)
        assert "old" == (small / "x.svg").read_text()


def test_a_picture_is_of_the_whole_image(disk):
    for words in (("snapshots/s", "--svg", "-"), ("active", "--svg", "-", "--totals"),
                  ("active", "--svg", "-", "--json")):  # fmt: skip
        done = disk.snapfs("map", disk.mountpoint / words[0], *words[1:], check=False)
        assert 2 == done.returncode


# Metrics


def test_metrics_are_what_status_says(disk, tmp_path):
    disk.write(0, b"x" * 2 * K64)
    text = disk.snapfs("metrics", disk.mountpoint).stdout
    label = f'{{mountpoint="{disk.mountpoint}"}}'
    status = disk.json("status")
    for line in (
        f"snapfs_healthy{label} 1.0",
        f"snapfs_temp_bytes{label} {float(status['temp']['used_bytes'])}",
        f"snapfs_cbw_copies_total{label} 2.0",
        f"snapfs_cbw_seconds_count{label} {float(status['copies']['count'])}",
        f'snapfs_snapshots{{mountpoint="{disk.mountpoint}",state="ok"}} 1.0',
    ):
        assert line in text.splitlines(), line
    file = tmp_path / "snapfs.prom"
    assert "" == disk.snapfs("metrics", disk.mountpoint, "--textfile", file).stdout
    assert f"snapfs_healthy{label} 1.0" in file.read_text()
    assert ["snapfs.prom"] == [name for name in os.listdir(tmp_path) if "prom" in name]
    assert 0o644 == file.stat().st_mode & 0o777


def test_metrics_of_backups(disk, tmp_path):
    directory = tmp_path / "backup"
    backup = Backup(directory)
    backup.add({0: b"x" * K64}, MIB)
    done = disk.snapfs(
        "metrics", disk.mountpoint, "--backup", directory, "--backup", tmp_path / "none",
        check=False,
    )  # fmt: skip
    assert 3 == done.returncode
    assert str(tmp_path / "none") in done.stderr
    assert f'snapfs_backup_points{{directory="{directory}"}} 1.0' in done.stdout
    assert f'snapfs_backup_up{{directory="{tmp_path}/none"}} 0.0' in done.stdout
    newest = re.search(r"snapfs_backup_newest_seconds\{.*\} (\S+)", done.stdout)
    point = backup.directory.chain.points[-1]
    assert newest and point.time.timestamp() == float(newest[1])


def test_metrics_of_what_is_not_mounted(tmp_path: Path):
    assert 5 == run(*SNAPFS, "metrics", tmp_path, check=False).returncode
