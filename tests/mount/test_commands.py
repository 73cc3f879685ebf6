"""How the commands take names, tell errors, and keep what is pinned."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.mounted import K64, MIB, PATIENCE, SNAPFS, Mounted, run

pytestmark = pytest.mark.mount


@pytest.fixture
def disk(mount) -> Mounted:
    return mount(b"o" * MIB)


def say(*arguments: str | Path, status: int = 0, cwd: Path | None = None) -> str:
    """What a command prints."""
    done = subprocess.run(
        [*SNAPFS, *map(str, arguments)],
        capture_output=True, text=True, timeout=PATIENCE, check=False, cwd=cwd,
    )  # fmt: skip
    assert status == done.returncode, done.stderr
    return done.stdout or done.stderr


# Names


def test_a_snapshot_is_a_mountpoint_and_a_name_or_a_path(disk, tmp_path):
    where, path = disk.mountpoint, disk.snapshots / "a"
    assert "a\n" == say("create", path)
    assert "b\n" == say("create", where / "snapshots", "b")
    disk.write(0, b"x")
    assert say("show", where, "a") == say("show", path) == say("show", "a", cwd=disk.snapshots)
    by_name = say("diff", where, "a", "b")
    assert by_name == say("diff", path, disk.snapshots / "b") == say("diff", where, path, "b")
    assert say("map", where, "a") == say("map", path)
    say("copy", where, "--format", "raw", "a", tmp_path / "1")
    say("copy", path, tmp_path / "2")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes() == b"o" * MIB
    assert "64 KiB" in say("trim", where, "a", "-v", "-o", "0", "-l", "64K")
    assert "64 KiB" in say("trim", path, "-v", "-o", "64K", "-l", "64K")
    say("delete", path, disk.snapshots / "b")
    assert [] == os.listdir(disk.snapshots)


def test_a_bitmap_has_a_path_too(disk):
    say("bitmap", "add", disk.mountpoint / "bitmaps/a")
    say("bitmap", "add", disk.mountpoint, "b")
    say("bitmap", "merge", disk.mountpoint, "a", "b")
    say("bitmap", "clear", disk.mountpoint / "bitmaps/a")
    say("bitmap", "remove", disk.mountpoint / "bitmaps/a", disk.mountpoint / "bitmaps/b", status=2)
    say("bitmap", "remove", disk.mountpoint / "bitmaps/a")
    assert ["b"] == os.listdir(disk.mountpoint / "bitmaps")


@pytest.mark.parametrize("inside", ["", "snapshots", "bitmaps", "active"])
def test_any_path_in_a_mount_finds_it(disk, inside):
    disk.create("monday")
    where = disk.mountpoint / inside
    assert "monday" in say("list", where)
    assert str(disk.mountpoint) in say("status", where)


def test_umount_takes_no_path_in_a_mount(disk):
    text = say("umount", disk.snapshots, status=5)
    assert f"no snapfs is mounted on {disk.snapshots}; " in text
    assert str(disk.mountpoint) in text


@pytest.mark.parametrize(
    ("arguments", "said", "status"),
    [
        (["show", "{m}"], "it takes one name", 2),
        (["show", "{m}", "a", "b"], "it takes one name", 2),
        (["show", "{m}/active"], "is no snapshot; those are MOUNTPOINT/snapshots/NAME", 2),
        (["create", "{m}", "a", "b"], "it takes one name at most", 2),
        (["delete", "{m}"], "say which snapshots", 2),
        (["show", "{m}", "none"], "there is no snapshot 'none'; snapfs list", 5),
        (["show", "/none/snapshots/a"], "no snapfs is mounted on /none/snapshots/a", 5),
        (["note", "{m}", "text"], "it takes one snapshot and the text", 2),
        (["bitmap", "add", "{m}"], "it takes NAME", 2),
    ],
)
def test_what_is_not_meant_is_said(disk, arguments, said, status):
    words = [word.format(m=disk.mountpoint) for word in arguments]
    assert said in say(*words, status=status)


def test_paths_of_two_mounts_are_refused(mount):
    first, second = mount(MIB), mount(MIB)
    first.create("a")
    second.create("a")
    assert "of two mounts" in say("delete", first.snapshots / "a", second.snapshots / "a", status=2)
    assert ["a"] == os.listdir(first.snapshots) == os.listdir(second.snapshots)


def test_default_names_do_not_collide(disk):
    names = [say("create", disk.mountpoint).strip() for _ in range(3)]
    running = [
        subprocess.Popen([*SNAPFS, "create", disk.mountpoint], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    names += [process.communicate(timeout=PATIENCE)[0].strip() for process in running]
    assert 7 == len(set(names))
    assert sorted(names) == sorted(os.listdir(disk.snapshots))


def test_patterns_delete_what_they_match_and_nothing_of_a_backup(disk):
    backups = f"backup-{'0' * 12}-{'1' * 12}"
    for name in ("auto-1", "auto-2", "auto-*", "keep", backups):
        disk.create(name)
    dry = say("delete", disk.mountpoint, "auto-?", "-n")
    assert ["auto-*", "auto-1", "auto-2"] == sorted(
        line.split()[2][:-1] for line in dry.splitlines()
    )
    assert 5 == len(os.listdir(disk.snapshots))
    say("delete", disk.snapshots / "auto-*")  # a snapshot that is called so
    assert {"auto-1", "auto-2", "keep", backups} == set(os.listdir(disk.snapshots))
    assert "matches 'none*'" in say("delete", disk.mountpoint, "none*", status=5)
    say("delete", disk.mountpoint, "none*", "auto-*", status=3)
    say("delete", disk.mountpoint, "*")
    assert [backups] == os.listdir(disk.snapshots)


# Notes and pins


def test_notes_are_listed_and_outlive_the_mount(disk):
    say("create", disk.mountpoint, "a", "--note", "before the upgrade")
    say("create", disk.mountpoint, "b")
    say(
        "note",
        disk.mountpoint,
        "b",
        "über",
    )
    for _ in range(2):
        lines = say("list", disk.mountpoint).splitlines()
        assert lines[0].endswith("NOTE")
        assert lines[1].endswith("before the upgrade")
        assert lines[2].endswith("über")
        disk.stop()
        disk.start()
    say("note", disk.snapshots / "a", "")
    assert None is disk.json("show", "a")["snapshot"]["note"]
    assert "at most 255" in say("note", disk.mountpoint, "a", "x" * 256, status=2)


def test_a_pinned_snapshot_stays(disk):
    say("create", disk.mountpoint, "a", "--pin")
    disk.create("b")
    say("pin", disk.mountpoint, "b")
    disk.kill()
    disk.start()
    path = disk.snapshots / "a"
    with pytest.raises(PermissionError) as refused:
        path.unlink()
    assert errno.EPERM == refused.value.errno
    punch = run("fallocate", "-p", "-o", "0", "-l", "64K", path, check=False)
    assert "Operation not permitted" in punch.stderr
    assert "'a' is pinned; to let go of it: snapfs unpin" in say(
        "delete", disk.mountpoint, "a", "b", status=1
    )
    assert "is pinned" in say("delete", disk.mountpoint, "a", "-n", status=1)
    pruned = disk.json("prune", "--pattern", "*", "--keep-last", "1")
    assert [["pinned"], ["last", "pinned"]] == [each["kept_by"] for each in pruned["snapshots"]]
    assert b"o" * MIB == path.read_bytes()
    assert "ok, pinned" in say("list", disk.mountpoint)
    copied = say("copy", path, disk.image.parent / "copy", "--discard", status=1)
    assert "leave --discard out" in copied
    say("unpin", path, disk.snapshots / "b")
    path.unlink()
    say("delete", disk.mountpoint, "b")


# Errors

FAILING = [
    ("mount", ["{t}/none.img", "{t}/mnt"], "start-error"),
    ("umount", ["{t}"], "not-mounted"),
    ("create", ["{m}", "s"], "snapshot-exists"),
    ("create", ["{m}", "x/y"], "usage-error"),
    ("delete", ["{t}", "s"], "not-mounted"),
    ("pin", ["{t}", "s"], "not-mounted"),
    ("note", ["{m}", "none", "text"], "snapshot-not-found"),
    ("list", ["{t}"], "not-mounted"),
    ("show", ["{m}", "none"], "snapshot-not-found"),
    ("status", ["{t}"], "not-mounted"),
    ("limit", ["{t}", "1G"], "not-mounted"),
    ("events", ["{t}"], "not-mounted"),
    ("trim", ["{m}/active"], "usage-error"),
    ("map", ["{m}", "none"], "snapshot-not-found"),
    ("diff", ["{m}", "none"], "snapshot-not-found"),
    ("bitmap", ["clear", "{m}", "none"], "bitmap-not-found"),
    ("check", ["{t}/none"], "not-found"),
    ("copy", ["{m}/active", "{t}/x"], "usage-error"),
    ("copy", ["{m}", "s", "{t}/no/x"], "system-error"),
    ("backup", ["{m}", "{t}"], "backup-error"),
    ("backup", ["--init", "{t}", "x"], "misused"),
    ("restore", ["{t}", "{t}/x"], "backup-error"),
    ("points", ["{t}"], "backup-error"),
    ("verify", ["{t}"], "backup-error"),
    ("prune", ["{t}", "--keep-last", "1"], "backup-error"),
    ("prune", ["{t}"], "usage-error"),
]


@pytest.mark.parametrize(("verb", "arguments", "code"), FAILING)
def test_an_error_is_json_with_a_code(disk, tmp_path, verb, arguments, code):
    disk.create("s")
    (tmp_path / "mnt").mkdir()
    words = [word.format(m=disk.mountpoint, t=tmp_path) for word in arguments]
    done = run(*SNAPFS, verb, *words, "--json", check=False)
    document = json.loads(done.stdout)
    command = document["output_version"]["command"]
    assert verb == command.split()[0]
    error = document.get("error", document)
    assert ("message_type" in document) == (verb in {"copy", "backup", "restore", "verify", "prune",
                                                     "events"})  # fmt: skip
    assert (code, done.returncode) == (error["code"], error["exit_code"])
    *_, line = done.stderr.splitlines()
    assert f"snapfs: {' '.join(error['message'].split())}" == line


def test_what_failed_of_several_is_json_too(disk):
    disk.create("s")
    done = disk.snapfs("delete", disk.mountpoint, "s", "none", "--json", check=False)
    document = json.loads(done.stdout)
    assert 3 == done.returncode
    assert ["s"] == [each["name"] for each in document["deleted"]]
    (failed,) = document["failed"]
    assert ("none", "snapshot-not-found", 5) == (
        failed["name"],
        failed["code"],
        failed["exit_code"],
    )


def test_every_document_names_its_version(disk, tmp_path):
    disk.create("s")
    say("bitmap", "add", disk.mountpoint, "b")
    backup = tmp_path / "backup"
    where = str(disk.mountpoint)
    for words in (
        ["create", where, "t"], ["delete", where, "t"], ["pin", where, "s"], ["unpin", where, "s"],
        ["note", where, "s", "text"], ["list", where], ["show", where, "s"], ["status", where],
        ["limit", where, "1G"], ["events", where, "--once"], ["trim", f"{where}/snapshots/s", "-n"],
        ["map", where, "s", "--totals"], ["diff", where, "s"], ["bitmap", "list", where],
        ["bitmap", "add", where, "c"], ["copy", where, "s", str(tmp_path / "copy")],
        ["backup", "--init", str(backup)], ["backup", where, str(backup)], ["points", str(backup)],
        ["verify", str(backup)], ["restore", str(backup), str(tmp_path / "restored")],
        ["prune", str(backup), "--keep-last", "1"], ["umount", where], ["check", str(disk.image)],
        ["mount", str(disk.image), where],
    ):  # fmt: skip
        out = run(*SNAPFS, *words, "--json").stdout
        documents = (
            [json.loads(out)] if out.startswith("{\n") else map(json.loads, out.splitlines())
        )
        for document in documents:
            assert "output_version" == next(iter(document)), words
            version = document["output_version"]
            assert (words[0], 1) == (version["command"].split()[0], version["vers_major"])


@pytest.mark.skipif("os.geteuid()", reason="mounts a file system of its own")
def test_a_full_or_read_only_file_system_is_named(mount, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=8M,nr_inodes=60", "small", small)
    try:
        disk = mount(MIB, f"state={small}/state")
        said = ""
        for number in range(20):
            done = disk.snapfs("create", disk.mountpoint, f"s{number}", check=False)
            said = said or done.stderr
        assert "No space left on device; free some space there" in said
        assert f"snapfs: {small}/state/" in said
        run("mount", "-o", "remount,ro", small, check=False)
        disk.stop()
    finally:
        run("umount", "-l", small)


def test_a_copy_to_a_place_that_is_full_names_it(disk):
    disk.create("s")
    done = disk.snapfs("copy", disk.mountpoint, "s", "/dev/full/x", check=False)
    assert "/dev/full/x" in done.stderr
    assert "something on the way to it is a file" in done.stderr


# The end of a mount that is in use


def test_umount_waits_for_those_who_use_the_mount_and_names_them(disk):
    with subprocess.Popen(["sleep", "600"], cwd=disk.mountpoint) as user:
        waiting = subprocess.Popen(
            [*SNAPFS, "umount", disk.mountpoint, "--wait"], stderr=subprocess.PIPE, text=True
        )
        line = waiting.stderr.readline()
        assert f"waiting for {disk.mountpoint}, in use by sleep (process {user.pid})" in line
        assert disk.active.exists()
        user.kill()
    assert "" == waiting.communicate(timeout=PATIENCE)[1]
    assert 0 == waiting.returncode


def test_umount_gives_up_waiting_after_the_time(disk):
    with subprocess.Popen(["sleep", "600"], cwd=disk.mountpoint) as user:
        done = disk.snapfs("umount", disk.mountpoint, "--wait", "0", check=False)
        user.kill()
    assert 1 == done.returncode
    assert f"is in use by sleep (process {user.pid}); end that" in done.stderr


def test_the_reader_of_the_output_may_go(disk):
    for number in range(40):
        disk.create(f"s{number}")
    code = f"""{" ".join(SNAPFS)} events {disk.mountpoint} --once --json | true
               {" ".join(SNAPFS)} list {disk.mountpoint} | head -n 1 >/dev/null
               echo ${{PIPESTATUS[0]}}"""
    done = run("bash", "-c", code)
    assert "" == done.stderr
    assert K64 > len(done.stdout)
