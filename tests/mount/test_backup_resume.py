"""A full backup that was interrupted goes on where it was, with the bytes of its moment."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest

from tests.support.backedup import K64, MIB, Disk, check_tidy, held_backup, names
from tests.support.filesystems import tmpfs
from tests.support.mounted import DYING, SNAPFS, run
from tests.support.patched import Program
from tests.support.steps import EVERY, some_steps

pytestmark = pytest.mark.mount

CHECKPOINTS = "from snapfs.backup import copying\ncopying.CHECKPOINT_BYTES = 1\n"

LATER = """
from datetime import datetime, timedelta
from snapfs.backup import resuming
class Later(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.now(tz) + timedelta(days=4)
resuming.datetime = Later
"""


def interrupted(it: Disk) -> bytes:
    """A first full that was killed with 4 MiB of it safe; returns what it is of."""
    moment = it.mounted.active.read_bytes()
    held_backup(it).end(signal.SIGKILL)
    return moment


@pytest.mark.parametrize("end", ["kill", "int", "daemon", "both"])
def test_an_interrupted_full_goes_on_where_it_was(disk, end):
    it = disk(os.urandom(16 * MIB))
    moment = it.mounted.active.read_bytes()
    backup = held_backup(it)
    it.mounted.write(0, os.urandom(K64))  # is safe
    it.mounted.write(12 * MIB, os.urandom(2 * MIB))  # is not yet
    if end in ("daemon", "both"):
        it.mounted.kill()
    if end == "int":
        backup.process.send_signal(signal.SIGINT)
    elif end != "daemon":
        backup.process.send_signal(signal.SIGKILL)
    else:
        backup.go()
    _, complaint = backup.finish()
    assert ("the same command goes on there" in complaint) == (end in ("int", "daemon")), complaint
    if end in ("daemon", "both"):
        it.mounted.start()
    it.mounted.write(13 * MIB, os.urandom(K64))
    (snapshot,) = names(it, "snapshots")
    summary = it.backup()
    assert ("full", 4 * MIB, 12 * MIB) == (
        summary["kind"], summary["resumed_at"], summary["copied_bytes"],
    )  # fmt: skip
    it.moments[1] = moment
    check_tidy(it)
    assert [snapshot] == names(it, "bitmaps")
    summary = it.backup()
    assert ("incremental", 0) == (summary["kind"], summary["resumed_at"])
    assert 2 * MIB < summary["copied_bytes"] <= 3 * MIB
    check_tidy(it)
    it.check_all()


def test_a_full_disk_loses_nothing_of_what_was_copied(disk, tmp_path):
    it = disk(os.urandom(16 * MIB))
    with tmpfs(tmp_path / "small", "10m") as small:
        it.directory = small / "backup"
        run(*SNAPFS, "backup", "--init", it.directory)
        it.moments[1] = it.mounted.active.read_bytes()
        backup = Program(CHECKPOINTS, "backup", it.mounted.mountpoint, it.directory, "--force")
        status, complaint = backup.finish()
        assert 1 == status
        assert re.search(r"(4|8)\d{6} bytes of the full point .* are safe: the same command goes "
                         r"on there", complaint)  # fmt: skip
        assert "No space left" in complaint
        it.mounted.write(14 * MIB, os.urandom(MIB))
        done = it.mounted.snapfs("backup", it.mounted.mountpoint, it.directory, check=False)
        assert (1, True) == (done.returncode, "make room" in done.stderr), done.stderr
        run("mount", "-o", "remount,size=64m", small)
        done = it.mounted.snapfs("backup", it.mounted.mountpoint, it.directory)
        assert "resumed at" in done.stdout
        assert "going on with the full point" in done.stderr
        check_tidy(it)
        assert "incremental" == it.backup()["kind"]
        it.check_all()


def test_a_full_that_cannot_go_on_begins_anew_and_says_why(disk, tmp_path):
    it = disk(os.urandom(16 * MIB))

    def backup(*options: str) -> str:
        done = it.mounted.snapfs("backup", it.mounted.mountpoint, it.directory, *options)
        assert "resumed" not in done.stdout
        return done.stderr

    def again() -> None:
        it.directory = tmp_path / f"another{len(list(tmp_path.iterdir()))}"
        run(*SNAPFS, "backup", "--init", it.directory)
        interrupted(it)

    interrupted(it)
    assert "longer ago than --keep-snapshot-for" in backup("--keep-snapshot-for", "0d")
    again()
    it.mounted.snapfs("delete", it.mounted.mountpoint, *names(it, "snapshots"))
    assert "has no such snapshot" in backup()
    again()
    it.mounted.snapfs("limit", it.mounted.mountpoint, "64K")
    it.mounted.write(12 * MIB, b"x" * MIB)
    it.mounted.snapfs("limit", it.mounted.mountpoint, "none")
    assert re.search("given up: its snapshot is (lost|incomplete)", backup())
    again()
    (partial,) = it.directory.glob("*.qcow2.partial")
    partial.unlink()
    assert "No such file" in backup()
    again()
    later = Program(LATER, "backup", it.mounted.mountpoint, it.directory)
    status, complaint = later.finish()
    assert (0, True) == (status, "--keep-snapshot-for" in complaint), complaint
    assert [] == names(it, "snapshots")
    it.moments[2] = it.mounted.active.read_bytes()
    it.check_all()


def test_nothing_stays_if_that_is_asked_for(disk):
    it = disk(os.urandom(16 * MIB))
    patch = "from snapfs.backup import copying\ndef full(*_):\n    raise OSError(28, 'full')\n"
    for position, left in ((4 * MIB, True), (0, False)):
        held = f"""{patch}
copying.CHECKPOINT_BYTES = 1
copy = copying.Copying._copy
copying.Copying._copy = lambda self, start, *rest: (
    copy(self, start, *rest) if start < {position} else full()
)
"""
        for options in ([], ["--keep-snapshot-for", "0d"]):
            backup = Program(held, "backup", it.mounted.mountpoint, it.directory, *options)
            status, complaint = backup.finish()
            assert (1, left and not options) == (status, "goes on there" in complaint), complaint
            kept = len(names(it, "snapshots")), len(names(it, "bitmaps"))
            assert (int(left and not options),) * 2 == kept
            files = {path.suffix for path in it.directory.iterdir()} - {".json", ".lock"}
            assert ({".partial"} if left and not options else set()) == files


def test_an_image_that_can_have_an_increment_gets_one(disk):
    it = disk(os.urandom(16 * MIB))
    it.backup()
    full = held_backup(it, "--full")
    moment = it.mounted.active.read_bytes()
    full.end(signal.SIGKILL)
    it.mounted.write(0, b"new")
    summary = it.backup("--full")
    assert ("full", 4 * MIB) == (summary["kind"], summary["resumed_at"])
    it.moments[summary["number"]] = moment
    it.check_all()
    held = held_backup(it, "--full")
    held.end(signal.SIGKILL)
    done = it.mounted.snapfs("backup", it.mounted.mountpoint, it.directory)
    assert ("given up: the image can be backed up on top of" in done.stderr, True) == (
        True, "incremental" in done.stdout,
    )  # fmt: skip
    check_tidy(it)


def test_what_was_begun_of_one_image_refuses_another(disk, mount):
    it = disk(os.urandom(16 * MIB))
    interrupted(it)
    (snapshot,) = names(it, "snapshots")
    other = mount(os.urandom(MIB))
    command = ["backup", other.mountpoint, it.directory]
    done = other.snapfs(*command, check=False)
    assert (2, True) == (done.returncode, str(it.mounted.image) in done.stderr), done.stderr
    done = other.snapfs(*command, "--force")
    assert f"delete MOUNTPOINT {snapshot}" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_full_killed_at_any_step_is_the_image_at_its_moment(disk, tmp_path):
    it = disk(os.urandom(9 * MIB))
    resumed = 0
    for step in some_steps(rarer=4):
        it.directory = tmp_path / f"backup{step}"
        run(*SNAPFS, "backup", "--init", it.directory)
        it.moments = {}
        moment = it.mounted.active.read_bytes()
        done = run(
            *DYING, str(step), "backup", it.mounted.mountpoint, it.directory, "--full", check=False
        )
        it.change(step)
        if it.manifest()["points"]:
            it.moments[1] = moment
        else:
            summary = it.backup()
            if summary["resumed_at"]:
                it.moments[summary["number"]] = moment
                resumed += 1
        it.change(-step)
        assert "incremental" == it.backup()["kind"]
        check_tidy(it)
        it.check_images(it.directory)
        run(*SNAPFS, "verify", it.directory)
        it.mounted.snapfs("bitmap", "remove", it.mounted.mountpoint, *names(it, "bitmaps"))
        if done.returncode != -signal.SIGKILL:
            assert 0 == done.returncode, done.stderr
            break
    assert resumed * EVERY > 10
    assert json.loads(run(*SNAPFS, "points", it.directory, "--json").stdout)["points"]
