"""snapfs check: each kind of damage, what a repair does, and that nothing outside is touched."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from snapfs.cli import main
from snapfs.errors import InUse, NotFound, StateError, UsageError
from snapfs.state import findings
from snapfs.state.check import check
from snapfs.state.findings import Report
from snapfs.state.store import Store
from snapfs.storage.locks import lock_image
from tests.support.stores import (
    CLUSTER,
    LIMITER,
    OLD,
    SIZE,
    add,
    create,
    damage_layer,
    damage_manifest,
    delete,
    engine_of,
    expect,
    opened,
    outside,
    session,
    state_of,
    stored,
    tree,
    write,
)


@pytest.fixture
async def image(tmp_path: Path) -> Path:
    """An image with a snapshot, of which one cluster is copied, and a bitmap."""
    path = tmp_path / "disk.img"
    path.write_bytes(OLD)
    await session(path, create("a"), add("b"), write(0, b"x"))
    return path


def seen(report: Report) -> list[tuple[str, str]]:
    """Grade and place of all that is not a note."""
    return [(str(each.grade), each.where) for each in report.findings if each.grade != "note"]


async def test_a_sound_directory_is_sound_and_nothing_is_written(image):
    before = tree(image.parent)
    report = check(str(state_of(image)))
    assert ([], 0, 1, 1) == (seen(report), report.exit_code, report.snapshots, report.bitmaps)
    assert str(image) == report.image
    assert 0 == check(str(image)).exit_code
    assert before == tree(image.parent)


# Damage, and what is said of it: the grade, the place, some words.


def layer(name: str) -> Callable[[Path], Path]:
    return lambda state: state / "snapshots/1" / name


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda state: os.truncate(state / name, size)


def gone(name: str) -> Callable[[Path], None]:
    def damage(state: Path) -> None:
        path = state / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    return damage


def linked(name: str) -> Callable[[Path], None]:
    def damage(state: Path) -> None:
        os.rename(state / name, state.parent / "away")
        os.symlink(state.parent / "away", state / name)

    return damage


def hard_linked(name: str) -> Callable[[Path], None]:
    return lambda state: os.link(state / name, state.parent / "away")


def wide(name: str) -> Callable[[Path], None]:
    return lambda state: (state / name).chmod(0o777)


def made(name: str) -> Callable[[Path], None]:
    def damage(state: Path) -> None:
        (state / name).mkdir(mode=0o700)
        (state / name / "temp").write_bytes(b"secret")

    return damage


def leftover_link(state: Path) -> None:
    (state.parent / "elsewhere").mkdir()
    (state / "snapshots/8").symlink_to(state.parent / "elsewhere")


def leftover_pipe(state: Path) -> None:
    os.mkfifo(state / "bitmaps/8")


def both(*damages: Callable[[Path], None]) -> Callable[[Path], None]:
    def damage(state: Path) -> None:
        for each in damages:
            each(state)

    return damage


unclean = damage_manifest(clean=False)
other_boot = damage_manifest(clean=False, boot_id="another")


def image_written(state: Path) -> None:
    with open(str(state).removesuffix(".snapfs"), "r+b") as file:
        file.write(b"behind our back")


def image_gone(state: Path) -> None:
    os.rename(str(state).removesuffix(".snapfs"), state.parent / "moved")


def damaged_by_a_user(state: Path) -> None:
    os.chown(state / "snapshots/1/temp", 4242, -1)


REPAIRABLE = [
    (stored("snapshots/1/access", 0, b"\xff"), "repairable", "snapshots/1/access", "beyond"),
    (stored("snapshots/1/done", 0, b"\x81"), "repairable", "snapshots/1/done", "beyond"),
    (gone("snapshots/1/losses"), "repairable", "snapshots/1/losses", "missing"),
    (wide("snapshots/1/temp"), "repairable", "snapshots/1/temp", "written by others"),
    (wide("snapshots/1"), "repairable", "snapshots/1", "written by others"),
    (wide("snapshots"), "repairable", "snapshots", "written by others"),
    (wide("manifest.json"), "repairable", "manifest.json", "written by others"),
    (wide("lock"), "repairable", "lock", "written by others"),
    (wide("bitmaps/2"), "repairable", "bitmaps/2", "written by others"),
    (wide("."), "repairable", ".", "written by others"),
    (linked("reserve"), "repairable", "reserve", "regular file"),
    (cut("activity", 5), "repairable", "activity", "5 bytes"),
    (made("snapshots/77"), "leftover", "snapshots/77", "no list"),
    (made("snapshots/01"), "leftover", "snapshots/01", "no list"),
    (leftover_link, "leftover", "snapshots/8", "no list"),
    (leftover_pipe, "leftover", "bitmaps/8", "no list"),
    (stored("bitmaps/9", 0, b"x"), "leftover", "bitmaps/9", "no list"),
    (stored("manifest.json.new", 0, b"{"), "leftover", "manifest.json.new", "finished"),
    (stored("control.sock", 0, b""), "leftover", "control.sock", "died"),
    (stored("snapshots/1/temp", CLUSTER, b"x"), "leftover", "snapshots/1/temp", "not finished"),
]


@pytest.mark.parametrize(("damage", "grade", "where", "words"), REPAIRABLE)
async def test_what_needs_no_guess_is_repaired_when_asked_for(
    image, damage, grade, where, words
):  # fmt: skip
    damage(state_of(image))
    before = tree(image.parent)
    report = check(str(state_of(image)))
    assert [(grade, where)] == seen(report)
    assert any(words in each.text and not each.repaired for each in report.findings)
    assert 3 == report.exit_code
    assert before == tree(image.parent)

    report = check(str(state_of(image)), repair=True)
    assert [(grade, where)] == seen(report)
    assert any(words in each.text and each.repaired for each in report.findings)
    assert 3 == report.exit_code
    assert 0 == check(str(state_of(image))).exit_code
    await session(image, expect("a", OLD))


REFUSED = [
    (cut("snapshots/1/access", 0), "damage", "snapshots/1/access", "must have 1"),
    (cut("snapshots/1/done", 9), "damage", "snapshots/1/done", "must have 1"),
    (cut("snapshots/1/losses", 9), "damage", "snapshots/1/losses", "9 bytes"),
    (cut("snapshots/1/temp", SIZE - 1), "damage", "snapshots/1/temp", f"must have {SIZE}"),
    (cut("snapshots/1/temp", SIZE + 1), "damage", "snapshots/1/temp", f"must have {SIZE}"),
    (linked("snapshots/1/temp"), "damage", "snapshots/1/temp", "symbolic link"),
    (linked("snapshots/1"), "damage", "snapshots/1", "symbolic link"),
    (linked("snapshots"), "damage", "snapshots", "symbolic link"),
    (linked("bitmaps"), "damage", "bitmaps", "symbolic link"),
    (linked("manifest.json"), "damage", "manifest.json", "symbolic link"),
    (linked("activity"), "damage", "activity", "symbolic link"),
    (hard_linked("snapshots/1/temp"), "damage", "snapshots/1/temp", "hard link"),
    (gone("snapshots/1"), "lost", "snapshots/1", "'a' is gone"),
    (gone("snapshots/1/temp"), "lost", "snapshots/1/temp", "'a' is gone"),
    (gone("snapshots"), "lost", "snapshots/1", "'a' is gone"),
    (both(unclean, gone("snapshots/1/losses")), "lost", "snapshots/1/losses", "'a' is gone"),
    (both(unclean, cut("activity", 5)), "damage", "activity", "5 bytes"),
    (both(unclean, gone("activity")), "damage", "activity", "no record"),
    (gone("manifest.json"), "damage", "manifest.json", "is missing"),
    (damage_manifest(version=99), "damage", "manifest.json", "version 99"),
    (damage_layer(name="../evil"), "damage", "manifest.json", "slash"),
    (damage_layer(name="a\x1b[2J"), "damage", "manifest.json", "control"),
    (stored("manifest.json", 0, b"["), "damage", "manifest.json", "not JSON"),
    (cut("manifest.json", (16 << 20) + 1), "damage", "manifest.json", "larger than"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "grade", "where", "words"), REFUSED)
async def test_what_needs_a_decision_is_said_and_left_alone(image, damage, grade, where, words):
    damage(state_of(image))
    before = tree(image.parent)
    for repair in (False, True):
        report = check(str(state_of(image)), repair=repair)
        assert (grade, where) in seen(report)
        assert any(words in each.text for each in report.findings if each.where == where)
        assert 4 == report.exit_code
        assert not any(each.repaired for each in report.findings)
        assert before == tree(image.parent)
    if where != "bitmaps":
        with pytest.raises(StateError):
            await opened(image)
    assert outside(before) == outside(tree(image.parent))


UNUSABLE = [
    (image_written, ("snapshots/1", "bitmaps/2"), "changed while it was not mounted"),
    (other_boot, ("snapshots/1", "bitmaps/2"), "went down"),
    (damage_layer(state="incomplete", reason="no room"), ("snapshots/1",), "incomplete: no room"),
    (damage_layer(state="lost", reason="\x1b[2J"), ("snapshots/1",), r"lost: \x1b[2J"),
    (stored("snapshots/1/losses", 0, b"\x03" + bytes(23) + b"disk"), ("snapshots/1",), "disk"),
    (gone("bitmaps/2"), ("bitmaps/2",), "missing"),
    (cut("bitmaps/2", 4096), ("bitmaps/2",), "4096 bytes"),
    (stored("bitmaps/2", 0, b"?"), ("bitmaps/2",), "its file is damaged"),
    (stored("bitmaps/2", 8, b"\x03\0\0\0why"), ("bitmaps/2",), "inconsistent: why"),
]


@pytest.mark.parametrize(("damage", "where", "words"), UNUSABLE)
async def test_what_the_next_mount_will_not_trust_is_foretold(image, damage, where, words):
    damage(state_of(image))
    before = tree(image.parent)
    for repair in (False, True):
        report = check(str(state_of(image)), repair=repair)
        assert [("lost", each) for each in where] == seen(report)
        assert all(words in each.text for each in report.findings)
        assert 4 == report.exit_code
        assert before == tree(image.parent)
    store = await opened(image)  # and so it comes
    states = {f"snapshots/{each.id}": each.state for each in store.layers if each.state != "ok"}
    spoilt = {f"bitmaps/{each.id}" for each in store.dirty if each.parts is None}
    assert set(where) == set(states) | spoilt
    await store.close(store.layers, store.dirty)


async def test_snapshots_that_need_nothing_of_a_changed_image_stay(image):
    await session(image, *(write(each * CLUSTER, b"y") for each in range(7)))
    image_written(state_of(image))
    assert [("lost", "bitmaps/2")] == seen(check(str(state_of(image))))


async def test_no_temp_data_is_freed_while_the_image_is_another(image):
    stored("snapshots/1/temp", CLUSTER, b"x")(state_of(image))
    image_written(state_of(image))
    before = tree(image.parent)
    assert 4 == check(str(state_of(image)), repair=True).exit_code
    assert before == tree(image.parent)


async def test_an_image_that_is_not_there_is_named(image):
    image_gone(state_of(image))
    report = check(str(state_of(image)))
    assert 4 == report.exit_code
    assert any(str(image) in each.text for each in report.findings)


async def test_a_moved_image_is_found_beside_its_directory(image, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    os.rename(image, there / "disk.img")
    os.rename(state_of(image), there / "disk.img.snapfs")
    report = check(str(there / "disk.img.snapfs"))
    assert (0, str(there / "disk.img")) == (report.exit_code, report.image)


async def test_a_bitmap_without_room_for_the_image_is_inconsistent(image):
    await session(image, write(4096 * 8 * CLUSTER, b"x"))
    os.truncate(state_of(image) / "bitmaps/2", 2 * 4096)
    report = check(str(state_of(image)))
    assert [("lost", "bitmaps/2")] == seen(report)
    assert "no room for the 32769 clusters" in report.findings[0].text


async def test_nameless_layers_are_leftovers_when_nothing_needs_them(image):
    await session(image, create("c"), write(CLUSTER, b"z"), delete("c"))
    assert 0 == check(str(state_of(image))).exit_code  # the older one needs what c copied
    manifest = state_of(image) / "manifest.json"
    value = json.loads(manifest.read_text())
    value["layers"][0]["name"] = None
    manifest.write_text(json.dumps(value))
    report = check(str(state_of(image)))
    assert {("leftover", "snapshots/1"), ("leftover", "snapshots/3")} == set(seen(report))
    os.truncate(state_of(image) / "snapshots/3/temp", 0)
    shutil.rmtree(state_of(image) / "snapshots/1")
    report = check(str(state_of(image)))
    assert 3 == report.exit_code
    assert {("leftover", "snapshots/1"), ("leftover", "snapshots/3/temp")} == set(seen(report))
    await session(image)
    assert [] == os.listdir(state_of(image) / "snapshots")


async def test_done_bits_that_nobody_needs_are_leftovers(image):
    access = state_of(image) / "snapshots/1/access"
    access.write_bytes(b"\x7e")  # the copied cluster was discarded
    report = check(str(state_of(image)))
    assert [("leftover", "snapshots/1/temp")] == seen(report)
    await session(image)
    assert 0 == check(str(state_of(image))).exit_code


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
async def test_what_belongs_to_somebody_else_is_left_to_the_user(image):
    damaged_by_a_user(state_of(image))
    before = tree(image.parent)
    report = check(str(state_of(image)), repair=True)
    assert [("damage", "snapshots/1/temp")] == seen(report)
    assert "user 4242" in report.findings[0].text
    assert before == tree(image.parent)


async def test_a_repair_that_fails_is_said(image, monkeypatch):
    made("snapshots/77")(state_of(image))

    def fail(*arguments: object, **named: object) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(findings.statefiles, "remove_tree", fail)
    report = check(str(state_of(image)), repair=True)
    assert [("damage", "snapshots/77")] == seen(report)
    assert "cannot be repaired: Read-only" in report.findings[0].text
    assert 4 == report.exit_code


# Refusals


async def test_a_mounted_directory_is_refused_and_not_touched(image):
    store = await opened(image)
    before = tree(image.parent)
    for repair in (False, True):
        with pytest.raises(InUse, match="is mounted"):
            check(str(image), repair=repair)
    assert before == tree(image.parent)
    await store.close(store.layers, store.dirty)


async def test_a_mount_whose_lock_was_removed_is_noticed(image):
    store = await opened(image)
    gone("lock")(state_of(image))
    for repair in (False, True):
        with pytest.raises(InUse, match="in use by another process"):
            check(str(image), repair=repair)
    await store.close(store.layers, store.dirty)


async def test_a_daemon_that_answers_is_noticed_without_a_lock(image):
    gone("lock")(state_of(image))
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    with listener:
        await listener.bind(str(state_of(image) / "control.sock"))
        listener.listen()
        with pytest.raises(InUse, match="is mounted"):
            check(str(image), repair=True)
    assert (state_of(image) / "control.sock").exists()


async def test_a_missing_lock_is_a_note_and_made_by_a_repair(image):
    gone("lock")(state_of(image))
    assert 0 == check(str(image)).exit_code
    assert not (state_of(image) / "lock").exists()
    check(str(image), repair=True)
    assert 0o600 == stat.S_IMODE((state_of(image) / "lock").stat().st_mode)


async def test_a_temp_image_in_use_is_refused(image):
    with open(state_of(image) / "snapshots/1/temp", "r+b") as file:
        assert lock_image(file.fileno(), writable=True)
        with pytest.raises(InUse, match="snapshots/1/temp is in use"):
            check(str(image))


async def test_what_is_no_state_directory_is_refused(image, tmp_path):
    with pytest.raises(UsageError, match="not a state directory"):
        check(str(tmp_path))
    with pytest.raises(NotFound, match="there is no state directory"):
        check(str(tmp_path / "nowhere"))
    (tmp_path / "link").symlink_to(state_of(image))
    with pytest.raises(StateError, match="symbolic link"):
        check(str(tmp_path / "link"))
    linked("lock")(state_of(image))
    with pytest.raises(StateError, match=r"lock .* symbolic link"):
        check(str(image), repair=True)


async def test_a_name_that_snapfs_does_not_know_is_left_alone(image):
    stored("notes.txt", 0, b"mine")(state_of(image))
    report = check(str(image), repair=True)
    assert (0, ["notes.txt"]) == (report.exit_code, [each.where for each in report.findings])
    assert b"mine" == (state_of(image) / "notes.txt").read_bytes()


# The command


async def test_the_command_prints_lines_or_json(image, capsys):
    assert 0 == main(["check", str(image)])
    assert "sound: 1 snapshots, 1 bitmaps\n" == capsys.readouterr().out
    stored("snapshots/1/access", 0, b"\xff")(state_of(image))
    assert 3 == main(["check", str(state_of(image))])
    line = "repairable: snapshots/1/access has bits set beyond the end of the snapshot"
    assert f"{line} (--repair puts it right)\n" == capsys.readouterr().out
    assert 3 == main(["check", str(state_of(image)), "--repair", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert "check" == answer["output_version"]["command"]
    assert (False, True) == (answer["sound"], answer["findings"][0]["repaired"])
    assert 0 == main(["check", str(state_of(image)), "--json"])
    assert json.loads(capsys.readouterr().out)["sound"]


async def test_the_command_refuses_a_mounted_directory(image, capsys):
    store = await opened(image)
    assert 1 == main(["check", str(image)])
    assert "is mounted" in capsys.readouterr().err
    await store.close(store.layers, store.dirty)


async def test_temp_images_in_another_directory_are_looked_at_too(tmp_path):
    image, elsewhere = tmp_path / "disk.img", tmp_path / "temps"
    image.write_bytes(OLD)
    elsewhere.mkdir(mode=0o700)
    store = await Store.open(
        str(image), cluster_size=CLUSTER, temp_dir=str(elsewhere), limiter=LIMITER
    )
    async with trio.open_nursery() as nursery:
        engine = engine_of(store, nursery)
        await engine.create_snapshot("a")
        await engine.write(0, b"x")
    await store.close(engine.layers, ())
    before = tree(tmp_path)
    assert 0 == check(str(image)).exit_code
    assert before == tree(tmp_path)
    (temp,) = elsewhere.glob("snapfs-*/*.temp")
    with open(temp, "r+b") as file:  # a copy that was not finished
        file.seek(2 * CLUSTER)
        file.write(b"y")
    content = temp.read_bytes()
    report = check(str(image), repair=True)
    assert ([("leftover", "snapshots/1/temp")], content) == (seen(report), temp.read_bytes())
    temp.rename(elsewhere / "gone")
    assert 4 == check(str(image)).exit_code
    temp.parent.rmdir()
    assert 4 == check(str(image)).exit_code
    shutil.rmtree(elsewhere)
    report = check(str(image))
    assert 4 == report.exit_code
    assert any("does not exist" in each.text for each in report.findings)
