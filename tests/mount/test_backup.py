"""snapfs backup, restore, verify, prune: every point is the image at its moment."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from snapfs.storage.locks import lock_image
from tests.support.backedup import OURS, Disk, check_tidy, held_backup, names, servers_of, spoil
from tests.support.filesystems import make_ext4, mounted_loop, tmpfs
from tests.support.mounted import DYING, SNAPFS, Mounted, run
from tests.support.steps import EVERY, some_steps

pytestmark = pytest.mark.mount

K64 = 1 << 16
MIB = 1 << 20


def test_full_first_then_what_changed(disk):
    it = disk(os.urandom(4 * MIB + 130_000))
    first = it.backup()
    assert ("full", 4 * MIB + 130_000) == (first["kind"], first["copied_bytes"])
    it.mounted.write(MIB, b"x" * 100)
    run("fallocate", "-p", "-o", str(2 * MIB), "-l", str(K64), it.mounted.active)
    second = it.backup()
    assert "incremental" == second["kind"]
    assert (K64, K64) == (second["copied_bytes"], second["zero_bytes"])
    third = it.backup()
    assert (0, 0) == (third["copied_bytes"], third["zero_bytes"])
    check_tidy(it)
    it.check_all()


def test_the_size_of_the_image_may_change_between_points(disk):
    it = disk(os.urandom(8 * MIB + 1))
    it.backup()
    for number, size in enumerate((3 * MIB + 7, 9 * MIB, 1, 0, 5 * MIB + 513)):
        os.truncate(it.mounted.active, size)
        if size > MIB:
            it.change(number)
        assert ("incremental" if size else "full") == it.backup()["kind"]
    it.check_all()
    # Fold the shrunken ones away: what they cut off must not come back.
    run(*SNAPFS, "prune", it.directory, "--keep-last", "3")
    it.check_all()
    run(*SNAPFS, "prune", it.directory, "--keep-last", "1")
    it.check_all()


def test_without_init_nothing_is_written(disk, tmp_path):
    it = disk(MIB)
    (tmp_path / "unmounted").mkdir()
    done = it.mounted.snapfs("backup", it.mounted.mountpoint, tmp_path / "unmounted", check=False)
    assert 1 == done.returncode
    assert "--init" in done.stderr
    assert [] == list((tmp_path / "unmounted").iterdir())
    assert [] == names(it, "bitmaps")


def test_a_mount_and_a_disk_in_it_are_no_place_for_backups(disk, tmp_path):
    """A file that is made among the snapshots would be one."""
    it = disk(64 * MIB)
    it.backup()
    inside = it.mounted.snapshots / "copy"
    for command in (
        ["backup", "--init", it.mounted.snapshots],
        ["backup", "--init", it.mounted.mountpoint / "new"],
        ["restore", it.directory, inside],
    ):
        done = run(*SNAPFS, *command, check=False)
        assert (2, True) == (done.returncode, "is in the mount" in done.stderr), done.stderr
    assert [] == names(it, "snapshots")
    make_ext4(it.mounted.active)
    with mounted_loop(it.mounted.active, tmp_path / "fs") as where:
        for place in (where, where / "new", where / "a" / "new"):
            done = run(*SNAPFS, "backup", "--init", place, check=False)
            assert (2, True) == (done.returncode, "on a disk that is in the mount" in done.stderr)
        it.mounted.create("s")
        done = it.mounted.snapfs("copy", it.mounted.snapshots / "s", where / "copy", check=False)
        assert (2, True) == (done.returncode, "on a disk that is in the mount" in done.stderr)
        shutil.copytree(it.directory, where / "backup")
        done = it.mounted.snapfs("backup", it.mounted.mountpoint, where / "backup", check=False)
        assert (2, True) == (done.returncode, "on a disk that is in the mount" in done.stderr)


def test_a_base_that_is_no_image_any_more_gives_a_full_point(disk):
    it = disk(os.urandom(MIB))
    it.backup()
    (point,) = it.directory.glob("*.qcow2")
    os.truncate(point, 0)
    it.change(1)
    summary = it.backup()
    assert ("full", True) == (summary["kind"], "no qcow2 image any more" in summary["reason"])
    assert it.moments[2] == it.restored(2)
    done = run(*SNAPFS, "verify", it.directory, check=False)
    assert (4, True) == (done.returncode, "no qcow2 image any more" in done.stdout)


def test_a_full_disk_is_named_and_the_next_run_has_every_change(disk, tmp_path):
    it = disk(os.urandom(8 * MIB))
    small = tmp_path / "small"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", small)
    try:
        it.directory = small / "backup"
        run(*SNAPFS, "backup", "--init", it.directory)
        it.backup()
        it.mounted.write(0, os.urandom(6 * MIB))
        command = ["backup", it.mounted.mountpoint, it.directory]
        done = it.mounted.snapfs(*command, check=False)
        assert (1, True) == (done.returncode, "make room" in done.stderr)
        done = it.mounted.snapfs(*command, "--force", check=False)
        assert 1 == done.returncode
        assert re.search(rf"{small}.*No space left on device", done.stderr), done.stderr
        check_tidy(it)
        done = run(*SNAPFS, "restore", it.directory, small / "r", "--force", check=False)
        assert (1, True) == (done.returncode, f"{small}/r: No space" in done.stderr), done.stderr
        run("rm", small / "r", small / "r.partial")
        run("mount", "-o", "remount,size=32m", small)
        assert "incremental" == it.backup()["kind"]
        it.check_all()
    finally:
        run("umount", small)


def test_two_rotated_directories_each_get_every_change(disk, tmp_path):
    it = disk(os.urandom(4 * MIB))
    other = Disk(it.mounted, tmp_path / "other", tmp_path)
    run(*SNAPFS, "backup", "--init", other.directory)
    for number in range(6):
        it.change(number)
        each = (it, other)[number % 2]
        assert ("full" if number < 2 else "incremental") == each.backup()["kind"]
    it.check_all()
    other.check_all()


def test_another_image_is_refused_and_both_are_named(disk, mount):
    it = disk(os.urandom(MIB))
    it.backup()
    other = mount(os.urandom(MIB))
    before = it.manifest()
    command = ["backup", other.mountpoint, it.directory]
    done = other.snapfs(*command, check=False)
    assert 2 == done.returncode
    for word in (it.directory, it.mounted.image, other.image, "--init", "--force"):
        assert str(word) in done.stderr, done.stderr
    assert before == it.manifest()
    assert "incremental" == it.backup()["kind"]
    first, it.mounted = it.mounted, other
    summary = it.backup("--force")
    assert ("full", True) == (summary["kind"], "takes the place of" in summary["reason"])
    assert "incremental" == it.backup()["kind"]
    assert 2 == first.snapfs("backup", first.mountpoint, it.directory, check=False).returncode
    it.check_all()


def test_an_image_is_the_same_after_it_was_moved_and_its_copy_is_another(disk, mount, tmp_path):
    it = disk(os.urandom(MIB))
    it.backup()
    it.mounted.stop()
    image, moved = it.mounted.image, tmp_path / "moved.img"
    image.rename(moved)
    it.mounted.state.rename(f"{moved}.snapfs")
    it.mounted.image = moved
    it.mounted.start()
    it.change(1)
    assert "incremental" == it.backup()["kind"]
    it.mounted.stop()
    run("cp", "-a", moved, image)
    run("cp", "-a", f"{moved}.snapfs", f"{image}.snapfs")
    clone = Mounted(image, it.mounted.mountpoint).start()
    done = clone.snapfs("backup", clone.mountpoint, it.directory, check=False)
    assert (2, True) == (done.returncode, f"a copy of {moved}" in done.stderr), done.stderr
    assert 1 == len(names(it, "bitmaps"))  # it was not even tidied
    clone.stop()
    it.mounted.start()
    assert "incremental" == it.backup()["kind"]
    it.check_all()


def test_a_lost_bitmap_gives_a_full_point_and_says_so(disk):
    it = disk(os.urandom(MIB))
    it.backup()
    it.mounted.snapfs("bitmap", "remove", it.mounted.mountpoint, names(it, "bitmaps")[0])
    summary = it.backup()
    assert "full" == summary["kind"]
    assert "has no bitmap" in summary["reason"]
    it.mounted.stop()
    shutil.rmtree(it.mounted.state)
    it.mounted.start()
    assert "full" == it.backup()["kind"]
    it.mounted.stop()
    run(*SNAPFS, "restore", it.directory, it.mounted.image, "--at", "1", "--force")
    it.mounted.start()
    assert "full" == it.backup()["kind"]
    it.check_all()


def test_an_image_written_behind_our_back_gives_a_full_point(disk):
    it = disk(os.urandom(MIB))
    it.backup()
    it.mounted.stop()
    with open(it.mounted.image, "r+b") as file:
        file.write(b"behind your back")
    it.mounted.start()
    summary = it.backup()
    assert "full" == summary["kind"]
    assert summary["reason"]
    it.check_all()


def test_the_bitmap_survives_an_unmount(disk):
    it = disk(os.urandom(2 * MIB))
    it.backup()
    it.change(1)
    it.mounted.stop()
    it.mounted.start()
    it.change(2)
    assert "incremental" == it.backup()["kind"]
    it.check_all()


def test_a_snapshot_that_loses_clusters_adds_no_point(disk):
    it = disk(os.urandom(24 * MIB))
    it.backup()
    it.mounted.write(0, os.urandom(12 * MIB))
    it.mounted.snapfs("limit", it.mounted.mountpoint, "64K")
    backup = held_backup(it)
    it.mounted.write(8 * MIB, b"x" * 2 * MIB)  # ahead of the copy
    backup.go()
    status, complaint = backup.finish()
    assert 4 == status, (backup.output, complaint)
    assert "lost clusters" in complaint
    assert 1 == len(it.manifest()["points"])
    it.mounted.snapfs("limit", it.mounted.mountpoint, "none")
    assert "incremental" == it.backup()["kind"]
    check_tidy(it)
    it.check_all()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_backup_ended_by_a_signal_leaves_every_change_to_the_next_one(disk, number):
    it = disk(os.urandom(16 * MIB))
    it.backup()
    it.mounted.write(0, os.urandom(8 * MIB))
    backup = held_backup(it)
    it.mounted.write(12 * MIB, b"meanwhile" * 1000)
    backup.process.send_signal(number)
    _, complaint = backup.finish()
    assert (130 if number != signal.SIGKILL else -number) == backup.process.returncode
    assert (number != signal.SIGKILL) == ("the next run has what this one had" in complaint)
    if number != signal.SIGKILL:
        check_tidy(it)
    assert "incremental" == it.backup()["kind"]
    check_tidy(it)
    it.check_all()


@pytest.mark.parametrize("client_too", [False, True])
def test_a_killed_daemon_leaves_every_change_to_the_next_one(disk, client_too):
    it = disk(os.urandom(16 * MIB))
    it.backup()
    it.mounted.write(0, os.urandom(8 * MIB))
    backup = held_backup(it)
    it.mounted.write(12 * MIB, b"meanwhile" * 1000)
    it.mounted.kill()
    if client_too:
        backup.end(signal.SIGKILL)
    else:
        backup.go()
        status, complaint = backup.finish()
        assert (5, True) == (status, "mount the image again" in complaint), complaint
    it.mounted.start()
    assert "incremental" == it.backup()["kind"]
    check_tidy(it)
    it.check_all()


def test_only_one_run_at_a_time(disk):
    it = disk(os.urandom(16 * MIB))
    backup = held_backup(it)
    done = it.mounted.snapfs("backup", it.mounted.mountpoint, it.directory, check=False)
    assert 1 == done.returncode
    assert "another snapfs" in done.stderr
    backup.go()
    status, complaint = backup.finish()
    assert 0 == status, complaint


def test_points_are_read_while_a_backup_runs_and_another_can_wait(disk, tmp_path):
    it = disk(os.urandom(16 * MIB))
    it.backup()
    it.mounted.write(0, os.urandom(8 * MIB))
    backup = held_backup(it)
    command = [str(word) for word in [*SNAPFS, "prune", it.directory, "--keep-last", "1", "--wait"]]
    waiting = subprocess.Popen(command, stderr=subprocess.PIPE)
    assert it.moments[1] == it.restored(1)
    run(*SNAPFS, "verify", it.directory)
    assert "1" == run(*SNAPFS, "points", it.directory).stdout.splitlines()[1].split()[0]
    assert waiting.poll() is None
    it.moments[2] = it.mounted.active.read_bytes()
    backup.go()
    status, complaint = backup.finish()
    assert 0 == status, complaint
    waiting.communicate()
    assert 0 == waiting.returncode
    assert [2] == [point["number"] for point in it.manifest()["points"]]
    it.check_all()


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_killed_at_any_step_the_next_run_has_every_change(disk):
    it = disk(os.urandom(MIB))
    it.backup()
    killed = 0
    for step in some_steps():
        it.change(step)
        before = it.mounted.active.read_bytes()
        command = ["backup", it.mounted.mountpoint, it.directory]
        done = run(*DYING, str(step), *command, check=False)
        points = it.manifest()["points"]
        if points[-1]["number"] not in it.moments:  # it was complete before it died
            it.moments[points[-1]["number"]] = before
        if done.returncode != -signal.SIGKILL:
            assert 0 == done.returncode, done.stderr
            break
        killed += 1
        it.change(-step)
        assert "incremental" == it.backup()["kind"]
        check_tidy(it)
    assert killed * EVERY > 20
    while servers_of(it.directory):
        pass  # a server that outlives its client holds locks for ever
    last = it.manifest()["points"][-1]["number"]
    run(*SNAPFS, "prune", it.directory, "--keep-last", str(6))
    assert it.moments[last] == it.restored(last)
    it.check_all()


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_prune_killed_at_any_step_leaves_every_kept_point_whole(disk, tmp_path):
    it = disk(os.urandom(2 * MIB))
    for number, size in enumerate((2 * MIB, MIB + 100, 3 * MIB)):
        it.change(number)
        os.truncate(it.mounted.active, size)
        it.backup()
    it.mounted.stop()
    killed = 0
    for step in some_steps():
        trial = tmp_path / "trial"
        shutil.copytree(it.directory, trial)
        command = ["prune", trial, "--keep-last", "1"]
        done = run(*DYING, str(step), *command, check=False)
        it.check_images(trial)
        assert it.moments[3] == it.restored(3, trial)
        run(*SNAPFS, *command)
        it.check_images(trial)
        run(*SNAPFS, "verify", trial)
        left = {path.name for path in trial.iterdir()}
        assert 2 == len(left - OURS), left
        shutil.rmtree(trial)
        if done.returncode != -signal.SIGKILL:
            assert 0 == done.returncode, done.stderr
            break
        killed += 1
    assert killed * EVERY > 10


def test_prune_stopped_in_the_middle_of_a_commit(disk):
    """The older file is half overwritten: the points above read the same, and it is finished."""
    it = disk(os.urandom(2 * MIB))
    for number in range(3):
        it.change(number)
        it.backup()
    program = it.scratch / "bin" / "qemu-img"
    program.parent.mkdir()
    real = shutil.which("qemu-img")
    program.write_text(
        f'#!/bin/sh\n[ "$1" = commit ] || exec {real} "$@"\n'
        f'for file; do :; done\nold=$({real} info "$file" | sed -n "s/^backing file: //p")\n'
        'old=${old%% (*}\n'
        f'{real} info "$file" >/dev/null\n'
        f'qemu-io -f qcow2 -c "write -q -P 7 0 1" "$(dirname "$file")/$old" >/dev/null\n'
        "kill -9 $PPID\n"
    )  # fmt: skip
    program.chmod(0o755)
    # The byte that is overwritten must be one that the newer point has itself.
    it.mounted.write(0, b"\x07")
    it.backup()
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    command = [*SNAPFS, "prune", str(it.directory), "--keep-last", "1"]
    number = len(it.moments)
    run(*SNAPFS, "prune", it.directory, "--keep-last", "2")
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert -signal.SIGKILL == done.returncode
    assert it.moments[number] == it.restored(number)
    run(*SNAPFS, "verify", it.directory)
    it.change(9)
    assert "incremental" == it.backup()["kind"]  # which finishes the fold first
    check_tidy(it)
    it.check_all()


def test_prune_keeps_what_it_says(disk):
    it = disk(os.urandom(MIB))
    for number in range(4):
        it.change(number)
        it.backup("--full") if number == 2 else it.backup()
    done = run(*SNAPFS, "prune", it.directory, "--keep-last", "3", "--dry-run", "--json")
    summary = json.loads(done.stdout.splitlines()[-1])
    assert 1 == len(summary["dropped"])
    assert 4 == len(it.manifest()["points"])
    assert 2 == run(*SNAPFS, "prune", it.directory, check=False).returncode
    run(*SNAPFS, "prune", it.directory, "--keep-last", "3")
    it.check_all()
    run(*SNAPFS, "prune", it.directory, "--keep-last", "2")  # the whole older chain goes
    assert [3, 4] == [point["number"] for point in it.manifest()["points"]]
    check_tidy(it)
    it.check_all()


def test_prune_says_by_which_rule_a_point_is_kept(disk):
    it = disk(os.urandom(MIB))
    for _ in range(3):
        it.backup()
    command = ["prune", it.directory, "--keep-last", "2", "--keep-yearly", "1", "--keep-within",
               "0h", "--dry-run"]  # fmt: skip
    lines = run(*SNAPFS, *command).stdout.splitlines()
    assert ["NUMBER", "TIME", "KEPT BY"] == re.split(r"  +", lines[0])
    assert [["1", "- would go"], ["2", "last"], ["3", "last, within, yearly"]] == [
        [re.split(r" +", line.strip())[0], re.split(r"  +", line.strip())[-1]]
        for line in lines[1:4]
    ]
    assert "2 points kept, 1 would go" == lines[4]
    summary = json.loads(run(*SNAPFS, *command, "--json").stdout.splitlines()[-1])
    assert [None, ["last"], ["last", "within", "yearly"]] == [
        each["kept_by"] for each in summary["points"]
    ]
    assert 3 == len(it.manifest()["points"])


def test_snapshots_are_pruned_by_pattern(disk):
    it = disk(os.urandom(16 * MIB))
    backup = held_backup(it)
    for name in ("auto-1", "mine", "auto-2", "auto-3"):
        it.mounted.create(name)
    command = ["prune", it.mounted.mountpoint, "--keep-last", "2"]
    assert 2 == it.mounted.snapfs(*command, check=False).returncode
    (ours,) = set(names(it, "snapshots")) - {"auto-1", "mine", "auto-2", "auto-3"}
    done = it.mounted.snapfs(*command, "--pattern", "auto-*", "--dry-run")
    assert "2 snapshots kept, 1 would go" == done.stdout.splitlines()[-1]
    it.mounted.snapfs(*command, "--pattern", "auto-*")
    assert {"auto-2", "auto-3", "mine", ours} == set(names(it, "snapshots"))
    it.mounted.snapfs("prune", it.mounted.mountpoint, "--keep-last", "1", "--pattern", "*")
    assert {"auto-3", ours} == set(names(it, "snapshots"))
    done = it.mounted.snapfs(
        "prune", it.directory, "--keep-last", "1", "--pattern", "*", check=False
    )
    assert (2, True) == (done.returncode, "--pattern is for" in done.stderr)
    backup.go()
    assert 0 == backup.finish()[0]


def test_a_broken_chain_that_nobody_keeps_is_deleted(disk):
    it = disk(os.urandom(MIB))
    for number in range(4):
        it.change(number)
        it.backup("--full") if number == 2 else it.backup()
    broken = [it.directory / f"{point['name']}.qcow2" for point in it.manifest()["points"][:2]]
    broken[0].unlink()
    broken[1].write_bytes(b"no image")
    run(*SNAPFS, "prune", it.directory, "--keep-last", "2")
    assert [3, 4] == [point["number"] for point in it.manifest()["points"]]
    check_tidy(it)
    it.check_all()


def test_prune_needs_no_room_for_what_it_deletes_and_asks_for_it_before_it_folds(disk, tmp_path):
    it = disk(os.urandom(6 * MIB))
    with tmpfs(tmp_path / "small", "64m") as small:
        it.directory = small / "backup"
        run(*SNAPFS, "backup", "--init", it.directory)
        it.backup()
        it.backup("--full")
        os.truncate(it.mounted.active, 12 * MIB)
        it.mounted.write(6 * MIB, os.urandom(6 * MIB))
        it.backup()
        with open(small / "ballast", "wb", buffering=0) as ballast:
            left = os.statvfs(small).f_bavail * 4096
            ballast.write(bytes(left))  # not a byte is left
        done = run(*SNAPFS, "prune", it.directory, "--keep-last", "1", check=False)
        assert (1, True) == (done.returncode, "folding 0002" in done.stderr), done.stderr
        assert [2, 3] == [point["number"] for point in it.manifest()["points"]]
        with open(small / "ballast", "ab", buffering=0) as ballast:
            ballast.write(bytes(os.statvfs(small).f_bavail * 4096 - 3 * MIB))
        free = os.statvfs(small).f_bavail
        done = run(*SNAPFS, "prune", it.directory, "--keep-last", "1", check=False)
        assert (1, free) == (done.returncode, os.statvfs(small).f_bavail), done.stderr
        assert "incremental" == it.backup()["kind"]
        (small / "ballast").unlink()
        run(*SNAPFS, "prune", it.directory, "--keep-last", "1")
        check_tidy(it)
        it.check_all()


def test_an_unfinished_fold_never_blocks_a_backup(disk, tmp_path):
    it = disk(os.urandom(6 * MIB))
    with tmpfs(tmp_path / "small", "64m") as small:
        it.directory = small / "backup"
        run(*SNAPFS, "backup", "--init", it.directory)
        it.backup()
        os.truncate(it.mounted.active, 12 * MIB)
        it.mounted.write(6 * MIB, os.urandom(6 * MIB))
        it.backup()
        command = ["prune", it.directory, "--keep-last", "1"]
        step = 1
        while not it.manifest()["fold"]:
            run(*DYING, str(step), *command, check=False)
            step += 1
        with open(small / "ballast", "wb", buffering=0) as ballast:
            ballast.write(bytes(os.statvfs(small).f_bavail * 4096 - 3 * MIB))
        it.mounted.write(0, b"new")
        assert "incremental" == it.backup()["kind"]
        assert it.manifest()["fold"]
        assert it.moments[2] == it.restored(2)
        assert it.moments[3] == it.restored(3)
        run(*SNAPFS, "verify", it.directory)
        (small / "ballast").unlink()
        assert "incremental" == it.backup()["kind"]
        check_tidy(it)
        it.check_all()


def test_verify_and_restore_find_a_changed_byte(disk, tmp_path):
    it = disk(os.urandom(MIB))
    it.backup()
    it.mounted.write(3 * K64, b"a needle in the hay")
    it.backup()
    names_ = [point["name"] for point in it.manifest()["points"]]
    spoil(it.directory / f"{names_[1]}.qcow2", b"a needle")
    done = run(*SNAPFS, "verify", it.directory, check=False)
    assert 4 == done.returncode
    assert f"{names_[0]}: good" in done.stdout
    assert f"{names_[1]}: DAMAGED" in done.stdout
    assert "the newest point is damaged" in done.stdout
    assert "offset 196608" in done.stdout
    done = run(*SNAPFS, "restore", it.directory, tmp_path / "r", check=False)
    assert 4 == done.returncode
    assert (tmp_path / "r.partial").exists()
    run(*SNAPFS, "restore", it.directory, tmp_path / "r", "--at", "1")
    assert it.moments[1] == (tmp_path / "r").read_bytes()
    assert not (tmp_path / "r.partial").exists()


def test_verify_finds_zeros_that_are_none_a_missing_file_and_another_base(disk):
    it = disk(os.urandom(MIB))
    it.backup()
    run("fallocate", "-p", "-o", "0", "-l", str(K64), it.mounted.active)
    it.backup()
    it.backup()
    names_ = [point["name"] for point in it.manifest()["points"]]
    files = [it.directory / f"{name}.qcow2" for name in names_]

    def verified() -> str:
        done = run(*SNAPFS, "verify", it.directory, check=False)
        assert 4 == done.returncode
        return done.stdout

    saved = files[1].read_bytes()
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 1 100 1", files[1])
    assert "not zeros any more" in verified()
    files[1].write_bytes(saved)
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 1 512k 1", files[2])
    assert "data that was not backed up" in verified()
    run("qemu-img", "rebase", "-u", "-b", files[0].name, "-F", "qcow2", files[2])
    assert f"stands on {names_[0]}.qcow2" in verified()
    files[0].unlink()
    assert "is missing" in verified()


def test_damage_that_a_later_point_replaced_does_not_matter_any_more(disk, tmp_path):
    it = disk(os.urandom(MIB) + b"a needle" * 8192 + os.urandom(MIB))
    it.backup()
    it.mounted.write(MIB, os.urandom(K64))
    it.backup()
    it.change(3)
    it.backup()
    first = next(it.directory.glob("0001-*.qcow2"))
    spoil(first, b"a needlea needle")
    for number in (2, 3):
        assert it.moments[number] == it.restored(number)
    done = run(*SNAPFS, "restore", it.directory, tmp_path / "r", "--at", "1", check=False)
    assert (4, True) == (done.returncode, f"{MIB}+{K64}" in done.stderr), done.stderr
    done = run(*SNAPFS, "verify", it.directory, check=False)
    assert 4 == done.returncode
    assert f"offset {MIB}, length {K64}: the checksum differs" in done.stdout
    assert re.search(r"0001-.*DAMAGED.*0002-.*good\n0003-.*good\nfrom 0002-.* on all is good",
                     done.stdout, re.DOTALL)  # fmt: skip
    run(*SNAPFS, "prune", it.directory, "--keep-last", "2")
    it.moments.pop(1)
    assert "incremental" == it.backup()["kind"]
    it.check_all()


def test_salvage_restores_what_is_good_and_names_what_is_not(disk, tmp_path):
    it = disk(os.urandom(MIB) + b"a needle" * 8192 + os.urandom(MIB))
    it.backup()
    it.mounted.write(8 * K64, os.urandom(K64))
    it.backup()
    files = [it.directory / f"{point['name']}.qcow2" for point in it.manifest()["points"]]
    spoil(files[0], b"a needlea needle")
    dest = tmp_path / "r"

    def salvaged() -> list[list[int]]:
        command = ["restore", it.directory, dest, "--salvage", "--json", "--force"]
        done = run(*SNAPFS, *command, check=False)
        assert 3 == done.returncode, done.stderr
        assert not Path(f"{dest}.partial").exists()
        damaged = json.loads(done.stdout.splitlines()[-1])["damaged"]
        expected = bytearray(it.moments[2])
        for start, length in damaged:
            expected[start : start + length] = bytes(length)
        assert bytes(expected) == dest.read_bytes()
        return damaged

    assert [[MIB, K64]] == salvaged()
    done = run(*SNAPFS, "restore", it.directory, dest, "--salvage", "--force", check=False)
    assert (3, True) == (done.returncode, f"offset {MIB}, length {K64}" in done.stdout)
    files[1].unlink()
    assert [[8 * K64, K64], [MIB, K64]] == salvaged()
    files[0].write_bytes(b"QFI\xfb" + bytes(1000))
    assert [[0, 2 * MIB + K64]] == salvaged()


def test_salvage_without_checksums_names_all_that_nothing_proves(disk, tmp_path):
    it = disk(os.urandom(MIB))
    it.backup()
    it.mounted.write(0, os.urandom(K64))
    it.backup()
    sums = [it.directory / f"{point['name']}.sums" for point in it.manifest()["points"]]
    sums[1].write_bytes(b"0 65536 zero\n")
    command = ["restore", it.directory, tmp_path / "r", "--salvage", "--json"]
    done = run(*SNAPFS, *command, check=False)
    assert (3, [[0, K64]]) == (
        done.returncode, json.loads(done.stdout.splitlines()[-1])["damaged"],
    )  # fmt: skip
    assert it.moments[2] == (tmp_path / "r").read_bytes()
    next(it.directory.glob("0002-*.qcow2")).unlink()
    done = run(*SNAPFS, *command, "--force", check=False)
    assert (3, [[0, MIB]]) == (done.returncode, json.loads(done.stdout.splitlines()[-1])["damaged"])
    assert it.moments[1] == (tmp_path / "r").read_bytes()


def test_a_base_that_is_known_to_be_damaged_gives_a_full_point(disk, tmp_path):
    it = disk(os.urandom(MIB) + b"a needle" * 8192)
    it.backup()
    it.change(1)
    it.backup()
    first, second = (it.directory / f"{each['name']}.qcow2" for each in it.manifest()["points"])
    spoil(first, b"a needlea needle")
    assert 4 == run(*SNAPFS, "verify", it.directory, check=False).returncode
    summary = it.backup()
    assert ("full", True) == (summary["kind"], "was found damaged on" in summary["reason"])
    assert "incremental" == it.backup()["kind"]
    sums = next(it.directory.glob("0004-*.sums"))
    kept = sums.read_bytes()
    sums.write_bytes(kept + b"\n")
    summary = it.backup()
    assert ("full", True) == (summary["kind"], "is not what it was" in summary["reason"])
    sums.write_bytes(kept)
    it.backup()
    for number in (3, 4, 5, 6):
        assert it.moments[number] == it.restored(number)
    done = run(*SNAPFS, "restore", it.directory, tmp_path / "r", check=False)
    assert 0 == done.returncode
    assert second.exists()


def test_restore_and_verify_refuse_a_partial_point(disk, tmp_path):
    it = disk(os.urandom(MIB))
    it.backup()
    name = it.manifest()["points"][0]["name"]
    (it.directory / f"{name}.qcow2.partial").write_text("{}")
    assert 4 == run(*SNAPFS, "verify", it.directory, check=False).returncode
    done = run(*SNAPFS, "restore", it.directory, tmp_path / "r", check=False)
    assert 4 == done.returncode
    assert "unfinished" in done.stderr
    assert not (tmp_path / "r").exists()


def test_restore_does_not_overwrite_unasked(disk, tmp_path):
    it = disk(os.urandom(MIB))
    it.backup()
    dest = tmp_path / "precious"
    dest.write_bytes(b"precious" * MIB)
    done = run(*SNAPFS, "restore", it.directory, dest, check=False)
    assert 2 == done.returncode
    assert b"precious" * MIB == dest.read_bytes()
    run(*SNAPFS, "restore", it.directory, dest, "--force")
    assert it.moments[1] == dest.read_bytes()
    assert 5 == run(*SNAPFS, "restore", it.directory, dest, "--at", "7", check=False).returncode
    run(*SNAPFS, "restore", it.directory, tmp_path / "now", "--at", "2999-01-01")


def test_a_refused_restore_leaves_the_image_unmarked(disk, tmp_path):
    """With a mark beside it the next restore, without --force, would have overwritten it."""
    it = disk(os.urandom(MIB))
    it.backup()
    dest = tmp_path / "live"
    dest.write_bytes(b"live" * K64)
    with open(dest, "r+b") as file:
        assert lock_image(file.fileno(), writable=True)
        done = run(*SNAPFS, "restore", it.directory, dest, "--force", check=False)
        assert (1, True) == (done.returncode, "in use" in done.stderr), done.stderr
    assert not (tmp_path / "live.partial").exists()
    assert 2 == run(*SNAPFS, "restore", it.directory, dest, check=False).returncode
    assert b"live" * K64 == dest.read_bytes()


def test_a_restored_image_is_sparse(disk, tmp_path):
    it = disk(64 * MIB)
    it.mounted.write(MIB, b"x" * K64)
    it.backup()
    run(*SNAPFS, "restore", it.directory, tmp_path / "r")
    assert (tmp_path / "r").stat().st_blocks * 512 <= 4 * K64


def test_paths_need_not_be_utf_8(disk, tmp_path, monkeypatch):
    it = disk(os.urandom(MIB))
    it.directory = tmp_path / os.fsdecode(b"back\xffup")
    run(*SNAPFS, "backup", "--init", it.directory)
    it.backup()
    it.change(1)
    it.backup()
    it.check_all()
    dest = tmp_path / os.fsdecode(b"im\xffage")
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    for json_too in ([], ["--json"]):
        done = run(*SNAPFS, "restore", it.directory, dest, "--force", *json_too, binary=True)
        assert (b"\\udcff" if json_too else b"im\xffage") in done.stdout
        assert it.moments[2] == dest.read_bytes()
    run(*SNAPFS, "prune", it.directory, "--keep-last", "1")
    done = run(*SNAPFS, "restore", it.directory, dest, check=False)
    said = done.stderr.replace("\\udcff", "\udcff")  # escaped or not
    assert (2, True) == (done.returncode, "im\udcffage exists" in said)
    it.mounted.create("s")
    command = ["copy", it.mounted.snapshots / "s", f"{dest}2", "--format", "qcow2"]
    run(*SNAPFS, *command, binary=True)


def test_quiet_says_nothing_unless_something_is_wrong(disk, tmp_path):
    it = disk(os.urandom(MIB) + b"a needle" * 8192)
    it.mounted.create("s")

    def said(*command: str | Path, status: int = 0) -> str:
        done = run(*SNAPFS, *command, "--quiet", check=False)
        assert status == done.returncode, done.stderr
        return done.stdout + done.stderr

    backup = ["backup", it.mounted.mountpoint, it.directory]
    assert "" == said(*backup)
    assert "" == said(*backup)
    assert "" == said("copy", it.mounted.snapshots / "s", tmp_path / "copy")
    assert "" == said("restore", it.directory, tmp_path / "r")
    assert "" == said("verify", it.directory)
    assert "" == said("prune", it.directory, "--keep-last", "1")
    it.mounted.snapfs("bitmap", "remove", it.mounted.mountpoint, *names(it, "bitmaps"))
    assert "has no bitmap" in said(*backup)
    done = run(*SNAPFS, *backup)
    assert re.fullmatch(r"0004-\S+: incremental, 0 B copied \(.* KiB on the disk\), 0 B of zeros\n",
                        done.stdout)  # fmt: skip
    spoil(next(it.directory.glob("0002-*.qcow2")), b"a needlea needle")
    text = said("verify", it.directory, status=4)
    assert ("DAMAGED" in text, ": good" in text) == (True, False), text


def test_points_tells_what_at_takes_and_what_verify_found(disk):
    it = disk(os.urandom(MIB) + b"a needle" * 8192)
    it.backup()
    it.change(1)
    it.backup()

    def points() -> list[dict]:
        shown = json.loads(run(*SNAPFS, "points", it.directory, "--json").stdout)
        assert "points" == shown["output_version"]["command"]
        return shown["points"]

    first, second = points()
    assert (1, "full", None, None) == tuple(
        first[key] for key in ("number", "kind", "parent", "verified")
    )
    assert (2, "incremental", 1) == tuple(second[key] for key in ("number", "kind", "parent"))
    assert [each["name"] for each in it.manifest()["points"]] == [first["name"], second["name"]]
    assert MIB < first["disk_bytes"] < 3 * MIB
    for each in (first, second):
        for text in (each["time"], each["name"], f"{each['number']:04d}"):
            assert it.moments[each["number"]] == it.restored(text)
    run(*SNAPFS, "verify", it.directory)
    assert [True, True] == [each["verified"]["good"] for each in points()]
    spoil(next(it.directory.glob("0001-*.qcow2")), b"a needlea needle")
    run(*SNAPFS, "verify", it.directory, check=False)
    table = run(*SNAPFS, "points", it.directory).stdout.splitlines()
    assert ["NUMBER", "TIME", "KIND"] == table[0].split()[:3]
    assert 3 == len(table)
    assert ["1", first["time"][:19] + "Z", "full"] == table[1].split()[:3]
    assert "DAMAGED" in table[1]


def test_bitmap_list_says_of_which_directory_and_how_old(disk, tmp_path):
    it = disk(MIB)
    it.backup()
    it.mounted.snapfs("bitmap", "add", it.mounted.mountpoint, "mine")

    def listed() -> dict[str, str]:
        rows = it.mounted.snapfs("bitmap", "list", it.mounted.mountpoint).stdout.splitlines()
        assert "BACKUP" == rows[0].split()[-1]
        return {row.split()[0]: re.split("  +", row)[-1] for row in rows[1:]}

    (ours,) = set(names(it, "bitmaps")) - {"mine"}
    assert "-" == listed()["mine"]
    assert re.fullmatch(rf"{it.directory}, \d+ (s|min) old", listed()[ours])
    it.directory.rename(tmp_path / "away")
    assert re.fullmatch(rf"{it.directory} \(not there now\), \d+ (s|min) old", listed()[ours])
    done = it.mounted.snapfs("bitmap", "list", it.mounted.mountpoint, "--json")
    shown = {each["name"]: each["backup"] for each in json.loads(done.stdout)["bitmaps"]}
    assert shown["mine"] is None
    assert (str(it.directory), False) == (shown[ours]["directory"], shown[ours]["there"])


def test_zeros_take_no_space_however_many(disk, tmp_path):
    """A table for each 512 MiB of zeros made 128 MiB of them, which nobody checked for."""
    it = disk(1 << 40)
    first = os.urandom(MIB)
    it.mounted.write(600 << 30, first)

    def used() -> int:
        return sum(path.stat().st_blocks * 512 for path in it.directory.iterdir())

    with tmpfs(tmp_path / "small", "10m") as small:
        it.directory = small / "backup"
        run(*SNAPFS, "backup", "--init", it.directory)
        for kind in ("full", "incremental"):
            done = it.mounted.snapfs("backup", it.mounted.mountpoint, it.directory, "--json")
            assert kind == json.loads(done.stdout.splitlines()[-1])["kind"]
            run("fallocate", "-p", "-o", "0", "-l", str(1 << 40), it.mounted.active)
            it.mounted.write(100 << 30, first)
        assert used() < 6 * MIB
        for number, (full, empty) in ((1, (600, 100)), (2, (100, 600))):
            command = ["restore", it.directory, tmp_path / "r", "--at", str(number), "--force"]
            run(*SNAPFS, *command)
            with open(tmp_path / "r", "rb") as file:
                assert first == os.pread(file.fileno(), MIB, full << 30)
                assert bytes(MIB) == os.pread(file.fileno(), MIB, empty << 30)
            assert (tmp_path / "r").stat().st_blocks * 512 < 2 * MIB
        newest = next(it.directory.glob("0002-*.qcow2"))
        reading = ["-c", "read -P 0 600G 1M", "-c", "read -P 0 99G 1M"]
        shown = run("qemu-io", "-r", "-f", "qcow2", *reading, newest)
        assert "verification failed" not in shown.stdout
        run(*SNAPFS, "verify", it.directory)
        run(*SNAPFS, "prune", it.directory, "--keep-last", "1")
        run(*SNAPFS, "verify", it.directory)
        done = it.mounted.snapfs(
            "copy", "--format", "qcow2", it.mounted.snapshots / it.mounted.create("s").name,
            small / "copy",
        )  # fmt: skip
        assert (small / "copy").stat().st_blocks * 512 < 2 * MIB


def test_zeros_hide_what_is_below(disk):
    it = disk(os.urandom(4 * MIB))
    it.backup()
    run("fallocate", "-p", "-o", "0", "-l", str(3 * MIB), it.mounted.active)
    it.backup()
    run("fallocate", "-p", "-o", "0", "-l", str(4 * MIB), it.mounted.active)
    it.mounted.write(MIB + 5000, b"x" * 100)
    it.backup()
    os.truncate(it.mounted.active, MIB)
    it.backup()
    os.truncate(it.mounted.active, 4 * MIB)
    it.mounted.write(2 * MIB + 5000, b"x" * 100)
    it.backup()
    it.check_all()
    run(*SNAPFS, "prune", it.directory, "--keep-last", "3")
    it.check_all()
    run(*SNAPFS, "prune", it.directory, "--keep-last", "1")
    it.check_all()


def test_small_clusters_are_filled_up_from_below(disk):
    it = disk(os.urandom(MIB), "cluster-size=4K")
    it.backup()
    it.mounted.write(5 * 4096 + 7, b"x")
    run("fallocate", "-p", "-o", str(9 * 4096), "-l", "8192", it.mounted.active)
    it.backup()
    run("fallocate", "-p", "-o", str(9 * 4096), "-l", "16384", it.mounted.active)
    it.backup()
    it.check_all()
    run(*SNAPFS, "prune", it.directory, "--keep-last", "1")
    it.check_all()


def test_a_missing_program_is_named_with_its_package(disk):
    it = disk(MIB)
    command = [*SNAPFS, "backup", str(it.mounted.mountpoint), str(it.directory)]
    done = subprocess.run(
        command, env={**os.environ, "PATH": "/nonexistent"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert 1 == done.returncode
    assert "qemu-utils" in done.stderr
    assert [] == it.manifest()["points"]


def test_with_json_an_error_is_the_last_line(tmp_path):
    done = run(*SNAPFS, "restore", tmp_path / "nothing", tmp_path / "r", "--json", check=False)
    last = json.loads(done.stdout.splitlines()[-1])
    assert ("error", 1) == (last["message_type"], last["exit_code"])
    assert "no backup directory" in last["message"]
    assert not (tmp_path / "nothing").exists()
