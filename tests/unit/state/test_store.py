"""The state directory: what comes back, what is cleaned up, what is refused."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from snapfs.engine.engine import Engine
from snapfs.errors import BitmapUnusable, InUse, Pinned, StateError, UsageError
from snapfs.state import statefiles
from snapfs.state.store import Store
from snapfs.storage.image import FileImage
from tests.support.stores import (
    CLUSTER,
    LIMITER,
    OLD,
    SIZE,
    add,
    as_left,
    create,
    damage_layer,
    damage_manifest,
    delete,
    discard,
    engine_of,
    expect,
    opened,
    session,
    state_of,
    write,
)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(OLD)
    return path


async def test_snapshots_come_back_with_their_bytes_and_discards(image):
    await session(
        image, create("a"), write(0, b"x" * CLUSTER), create("b"), write(CLUSTER, b"y"),
        discard("a", 0, CLUSTER),
    )  # fmt: skip
    after = b"x" * CLUSTER + OLD[CLUSTER:]

    async def look(engine: Engine) -> None:
        assert ["a", "b"] == [layer.name for layer in engine.snapshots]
        assert 6 == engine.find("a").accessible

    await session(image, look, expect("b", after), expect("a", OLD[CLUSTER:], CLUSTER))


async def test_a_deleted_snapshot_leaves_what_an_older_one_needs(image):
    await session(image, create("a"), create("b"), write(0, b"x"), delete("b"))
    assert 2 == len(os.listdir(state_of(image) / "snapshots"))
    await session(image, expect("a", OLD), delete("a"))
    assert [] == os.listdir(state_of(image) / "snapshots")


async def test_ids_are_never_used_again(image):
    await session(image, create("a"), delete("a"))
    ids = []

    async def note(engine: Engine) -> None:
        ids.append(engine.find("b").id)

    await session(image, create("b"), note)
    assert [2] == ids


async def test_leftovers_are_removed_and_said(image):
    await session(image, create("a"))
    leftover = state_of(image) / "snapshots" / "77"
    leftover.mkdir(mode=0o700)
    (leftover / "temp").write_bytes(b"secret")
    store = await session(image)
    assert not leftover.exists()
    assert ["removed what was left of snapshot number 77"] == store.notices


async def test_temp_data_without_a_done_bit_is_punched_out(image):
    await session(image, create("a"))
    temp = state_of(image) / "snapshots" / "1" / "temp"
    with open(temp, "r+b") as file:
        file.write(b"never finished" * 100)
    await session(image, expect("a", OLD))
    assert 0 == temp.stat().st_blocks


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda state: os.truncate(state / "snapshots/1" / name, size)


def link(name: str) -> Callable[[Path], None]:
    def damage(state: Path) -> None:
        path = state / "snapshots/1" / name
        path.unlink()
        path.symlink_to("/etc/hostname")

    return damage


def not_json(state: Path) -> None:
    (state / "manifest.json").write_text("{")


def writable_by_all(state: Path) -> None:
    (state / "snapshots").chmod(0o777)


def bit_beyond_the_end(state: Path) -> None:
    with open(state / "snapshots/1/access", "r+b") as file:
        file.write(b"\xff")  # 7 clusters


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (bit_beyond_the_end, "beyond the end"),
        (not_json, "is not JSON"),
        (damage_manifest(version=99), "version 99"),
        (damage_manifest(surprise=1), "damaged"),
        (damage_manifest(next_id="2"), "damaged"),
        (damage_manifest(next_id=1), "not ascending"),
        (damage_manifest(cluster_size=5000), "power of two"),
        (damage_layer(name="../evil"), "slash"),
        (damage_layer(name=""), "cannot be the name"),
        (damage_layer(id="../../x"), "damaged"),
        (damage_layer(size=-5), "negative"),
        (cut("temp", 5), "temp image has 5 bytes"),
        (cut("done", 0), "done"),
        (cut("access", 0), "access"),
        (link("temp"), "symbolic link"),
        (link("done"), "symbolic link"),
        (writable_by_all, "can be written by others"),
    ],
)
async def test_a_damaged_or_hostile_state_is_refused_in_words(image, damage, words):
    await session(image, create("a"), write(0, b"x"))
    damage(state_of(image))
    with pytest.raises(StateError, match=words):
        await opened(image)
    assert b"x" + OLD[1:] == image.read_bytes()


async def test_a_second_store_is_refused_and_changes_nothing(image, tmp_path):
    store = await opened(image)
    with pytest.raises(InUse, match="in use by another process"):
        await opened(image)
    other = tmp_path / "other.img"
    other.write_bytes(OLD)
    with pytest.raises(InUse, match="state directory"):
        await Store.open(str(other), state_dir=str(state_of(image)), limiter=LIMITER)
    await store.close((), ())


async def test_another_cluster_size_needs_an_empty_directory(image):
    await session(image, create("a"))
    with pytest.raises(UsageError, match="delete them"):
        await Store.open(str(image), cluster_size=8192, limiter=LIMITER)
    await session(image, delete("a"))
    store = await Store.open(str(image), cluster_size=8192, limiter=LIMITER)
    assert 8192 == store.geometry.cluster_size
    await store.close((), ())


async def test_what_was_made_for_a_mount_that_failed_is_removed(image):
    store = await opened(image)
    await store.close((), (), unused=True)
    assert not state_of(image).exists()
    await session(image, create("a"))
    store = await opened(image)
    await store.close(store.layers, store.dirty, unused=True)
    assert state_of(image).exists()


async def test_a_mount_that_died_while_it_removed_a_deleted_snapshot(image):
    await session(image, create("s"))
    manifest = state_of(image) / "manifest.json"
    value = json.loads(manifest.read_text())
    value["layers"][0]["name"] = None
    manifest.write_text(json.dumps(value))
    shutil.rmtree(state_of(image) / "snapshots/1")
    store = await session(image)
    assert [] == store.layers


async def test_the_list_goes_before_the_files_of_what_recovery_drops(image, monkeypatch):
    await session(image, create("s"))
    manifest = state_of(image) / "manifest.json"
    value = json.loads(manifest.read_text())
    value["layers"][0]["name"] = None
    manifest.write_text(json.dumps(value))

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(statefiles, "replace_file", fail)
        with pytest.raises(OSError, match="No space"):
            await opened(image)
    assert (state_of(image) / "snapshots/1/temp").exists()
    await session(image)
    assert [] == os.listdir(state_of(image) / "snapshots")


async def test_space_that_cannot_be_freed_does_not_keep_a_mount_from_starting(image, monkeypatch):
    await session(image, create("s"), write(0, b"new"))

    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(FileImage, "punch_data", fail)
    store = await session(image, expect("s", OLD))
    assert any("cannot free space" in notice for notice in store.notices)


# Dirty bitmaps


def dirty(engine: Engine, name: str) -> list[int]:
    bits = engine.tracker.bitmaps.wanted(name, engine.geometry.clusters)
    return [cluster for cluster, bit in enumerate(bits) if bit]


def expect_dirty(name: str, *clusters: int):
    async def step(engine: Engine) -> None:
        assert list(clusters) == dirty(engine, name)

    return step


def expect_inconsistent(name: str, why: str):
    async def step(engine: Engine) -> None:
        with pytest.raises(BitmapUnusable, match=f"{why}.*a full copy is needed"):
            dirty(engine, name)

    return step


async def test_bitmaps_come_back(image):
    await session(image, add("b"), write(0, b"x"), write(3 * CLUSTER, b"y"))
    await session(image, expect_dirty("b", 0, 3), write(SIZE + 200 * CLUSTER, b"z"))
    await session(image, expect_dirty("b", 0, 3, *range(6, 207)))


async def test_when_a_bitmap_began_is_known_whatever_became_of_it(image):
    began: list[int | None] = []

    async def look(engine: Engine) -> None:
        began.append(engine.tracker.bitmaps.find("b").began_ns)

    await session(image, add("b"), look)
    await session(image, look)
    with open(image, "r+b") as file:
        file.write(b"behind our back")
    await session(image, look)
    await session(image, look)
    assert began[0] and 1 == len(set(began))


async def test_a_bitmap_grows_by_pages(image):
    far = 4096 * 8 * CLUSTER  # the bits of one page
    await session(image, add("b"), write(far, b"x"))
    assert 3 * 4096 == (state_of(image) / "bitmaps" / "1").stat().st_size
    await session(image, expect_dirty("b", *range(6, 4096 * 8 + 1)))


async def test_cleared_and_removed_bitmaps_leave_no_files(image):
    async def clear(engine: Engine) -> None:
        await engine.tracker.clear("b")
        await engine.tracker.remove("c")

    await session(image, add("b"), add("c"), write(0, b"x"), clear)
    assert ["3"] == os.listdir(state_of(image) / "bitmaps")
    await session(image, expect_dirty("b"))


async def test_an_image_changed_from_outside_makes_bitmaps_inconsistent(image):
    await session(image, add("b"))
    with open(image, "r+b") as file:
        file.write(b"behind our back")
    store = await session(image, expect_inconsistent("b", "changed while it was not mounted"))
    assert "bitmap 'b' is inconsistent" in store.notices[0]
    await session(image, expect_inconsistent("b", "changed"), lambda e: e.tracker.clear("b"))
    await session(image, expect_dirty("b"), write(0, b"x"), expect_dirty("b", 0))


def lose(path: Path) -> None:
    path.unlink()


def shorten(path: Path) -> None:
    os.truncate(path, 4096)


def scribble(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"garbage")


def scribble_length(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(8)
        file.write(b"\xff\xff\xff\xff")


@pytest.mark.parametrize("damage", [lose, shorten, scribble, scribble_length])
async def test_a_damaged_bitmap_is_inconsistent_and_the_image_mounts(image, damage):
    await session(image, add("b"), write(0, b"x"))
    damage(state_of(image) / "bitmaps" / "1")
    await session(image, expect_inconsistent("b", ""))


async def test_a_bitmap_too_small_for_the_image_is_inconsistent(image):
    await session(image, add("b"))
    await session(image, write(4096 * 8 * CLUSTER, b"x"))
    os.truncate(state_of(image) / "bitmaps" / "1", 2 * 4096)
    await session(image, expect_inconsistent("b", "room for 32768 clusters.*32769"))


async def test_leftovers_of_bitmaps_are_removed(image):
    await session(image, add("b"))
    (state_of(image) / "bitmaps" / "9").write_bytes(b"x")
    store = await session(image, expect_dirty("b"))
    assert ["removed what was left of bitmap number 9"] == store.notices


async def test_the_cluster_size_stays_while_there_are_bitmaps(image):
    await session(image, add("b"))
    with pytest.raises(UsageError, match="bitmaps"):
        await Store.open(str(image), cluster_size=2 * CLUSTER, limiter=LIMITER)


@pytest.mark.parametrize(
    ("old", "new"),
    [('"id": 1', '"id": 7'), ('"name": "b"', '"name": "a/b"'), ('"name": "b"', '"name": 5')],
)
async def test_a_manifest_with_a_bad_bitmap_is_refused(image, old, new):
    await session(image, add("b"))
    path = state_of(image) / "manifest.json"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(StateError, match="damaged"):
        await opened(image)


# Bad input that must not get further than a sentence


def deeply_nested(state: Path) -> None:
    text = '{"version": 3, "image": ' + "[" * 20_000 + "]" * 20_000 + "}"
    (state / "manifest.json").write_text(text)


def nested_version(state: Path) -> None:
    (state / "manifest.json").write_text('{"version": ' + "[" * 900 + "]" * 900 + "}")


def without_manifest(state: Path) -> None:
    (state / "manifest.json").unlink()


def hard_link(state: Path) -> None:
    os.link(state / "snapshots/1/temp", state.parent / "other-name")


def no_record(state: Path) -> None:
    damage_manifest(clean=False)(state)
    with open(state / "activity", "r+b") as file:
        file.seek(24)
        file.write(b"\xff" * 8)  # the size is -1


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (deeply_nested, "damaged|not JSON"),
        (nested_version, "no version|not JSON"),
        (without_manifest, "manifest.json is missing"),
        (hard_link, "hard link"),
        (no_record, "no record"),
        (damage_layer(size=1 << 70, name=None), "too large"),
        (damage_layer(lost=1 << 70), "too large"),
        (damage_layer(since_ns=-(1 << 70)), "too large"),
        (damage_layer(errno=1 << 40), "too large"),
        (damage_manifest(next_id=1 << 70), "too large"),
    ],
)
async def test_bad_input_is_refused_in_words(image, damage, words):
    await session(image, create("a"), write(0, b"x"))
    damage(state_of(image))
    kept = (state_of(image) / "snapshots/1/temp").read_bytes()
    with pytest.raises(StateError, match=words):
        await opened(image)
    assert kept == (state_of(image) / "snapshots/1/temp").read_bytes()


async def test_a_leftover_that_is_a_link_or_a_pipe_is_removed(image, tmp_path):
    await session(image, create("a"))
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_bytes(b"mine")
    (state_of(image) / "snapshots/7").symlink_to(kept)
    os.mkfifo(state_of(image) / "snapshots/8")
    (state_of(image) / "snapshots/01").mkdir()
    await session(image, expect("a", OLD))
    assert ["1"] == os.listdir(state_of(image) / "snapshots")
    assert b"mine" == (kept / "file").read_bytes()


async def test_a_refused_state_is_let_go_of(image):
    await session(image, create("a"), create("b"))
    done = state_of(image) / "snapshots/2/done"
    done.rename(image.parent / "away")
    with pytest.raises(StateError, match="lacks its file done"):
        await opened(image)
    (image.parent / "away").rename(done)
    await session(image, expect("a", OLD))


async def test_storage_that_hangs_takes_no_thread_of_another(image, monkeypatch, nursery):
    """Image, temp images and state directory are in different hands."""
    hanging = threading.Event()

    def hang(*_arguments: object) -> None:
        hanging.wait()

    store = await opened(image)
    temp = (await store.create(1, store.geometry)).temp
    try:
        monkeypatch.setattr("snapfs.storage.image._punch", hang)
        monkeypatch.setattr(store._layers, "usage", hang)
        monkeypatch.setattr(store._layers, "remove", hang)
        for _ in range(2 * int(LIMITER.total_tokens)):
            nursery.start_soon(temp.punch, 0, CLUSTER)
            nursery.start_soon(store.usage, [temp])
            nursery.start_soon(store.remove, 2)
        await trio.testing.wait_all_tasks_blocked()
        await store.image.flush()
        await store.save([], store.geometry)
    finally:
        hanging.set()
    await trio.testing.wait_all_tasks_blocked()
    await store.close([], [])


@pytest.mark.parametrize("durability", ["power", "process"])
async def test_what_a_durable_list_names_is_durable_itself(image, monkeypatch, durability):
    """Else the mount after a power cut refuses the files, whose snapshots may only be lost."""
    real, synced = os.fsync, set()

    def fsync(fd: int) -> None:
        real(fd)
        synced.add(os.readlink(f"/proc/self/fd/{fd}").removesuffix(".new"))

    monkeypatch.setattr(os, "fsync", fsync)
    store = await Store.open(str(image), durability=durability, limiter=LIMITER)
    state = state_of(image)
    assert {str(state), str(state / "manifest.json")} <= synced
    assert (durability == "power") == (str(image.parent) in synced)
    synced.clear()
    async with trio.open_nursery() as nursery:
        engine = engine_of(store, nursery)
        layer = await engine.create_snapshot("s")
    where = state / "snapshots" / str(layer.id)
    names = ("access", "done", "losses", "temp")
    assert {str(where.parent), str(where), *(str(where / name) for name in names)} <= synced
    await store.close(engine.layers, [])


async def test_on_a_full_disk_the_manifest_changes_places_with_the_reserve(image, monkeypatch):
    """Again and again, and no file is made for it."""
    await session(image, create("s"))
    store = await opened(image)
    real = statefiles._write_beside

    def full(*arguments) -> None:
        real(*arguments)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(statefiles, "_write_beside", full)
    before = set(os.listdir(state_of(image)))
    inodes = []
    async with trio.open_nursery() as nursery:
        engine = engine_of(store, nursery)
        for old, new in (("s", "t"), ("t", "u"), ("u", "v")):
            await engine.rename_snapshot(old, new)
            assert f'"{new}"' in (state_of(image) / "manifest.json").read_text()
            inodes.append([(state_of(image) / name).stat().st_ino for name in FIXED])
    assert inodes[0] == inodes[1][::-1] == inodes[2]
    assert before == set(os.listdir(state_of(image)))
    await store.close(engine.layers, [])
    assert ["v"] == [layer.name for layer in (await session(image)).layers]
    monkeypatch.setattr(statefiles, "_write_beside", full)
    (state_of(image) / "reserve").unlink()
    with pytest.raises(OSError, match="No space"):
        await opened(image)


FIXED = ("manifest.json", "reserve")


async def test_a_layer_is_removed_while_its_loss_is_made_durable(image, monkeypatch, nursery):
    """Who writes waits for the rest of that, and must not fail."""
    store = await Store.open(str(image), cluster_size=CLUSTER, durability="power", limiter=LIMITER)
    engine = engine_of(store, nursery)
    layer = await engine.create_snapshot("s")
    real, syncing, removed = os.fdatasync, threading.Event(), threading.Event()

    def fdatasync(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("/losses"):
            syncing.set()
            assert removed.wait(400)
        real(fd)

    async def copy_to(*_arguments: object) -> int:
        raise OSError(errno.EIO, "cannot copy")

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr(FileImage, "copy_to", copy_to)
    async with trio.open_nursery() as writing:
        writing.start_soon(engine.write, 0, b"x")
        await trio.to_thread.run_sync(syncing.wait, 400)
        assert "incomplete" == layer.state
        await engine.delete_snapshot("s")
        with trio.fail_after(400):
            while list(store.directory.glob("snapshots/*")):
                await trio.testing.wait_all_tasks_blocked(0.01)
        removed.set()
    assert b"x" == image.read_bytes()[:1]
    await store.close(engine.layers, [])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: os.chmod(path, 0o600), "its ctime is .* and was .*chmod.* nothing tells"),
        (lambda path: os.link(path, path.with_name("other")), "links"),
        (lambda path: os.truncate(path, 5), "it has 5 bytes and had"),
        (lambda path: os.utime(path, (7, 7)), "modified at 1970-01-01 00:00:07.*, and before at"),
    ],
    ids=["mode", "link", "size", "times"],
)
async def test_what_was_seen_of_an_image_that_was_not_mounted_is_said(image, change, words):
    await session(image, create("s"), add("b"))
    change(image)
    store = await session(image)
    (layer,) = store.layers
    assert "lost" == layer.state
    assert re.search(words, str(layer.reason)), layer.reason
    assert any(re.search(words, notice) for notice in store.notices if "bitmap" in notice)


async def test_what_an_older_version_left_is_read_if_it_was_unmounted(image):
    """Version 2 did not say what held it, so it must have been stored."""
    await session(image, create("s"))
    path = state_of(image) / "manifest.json"
    value = json.loads(path.read_text())
    for name in ("session", "held_by"):
        del value[name]
    path.write_text(json.dumps(value | {"version": 2}))
    (state_of(image) / "activity").write_bytes(b"snapfs1\n".ljust(4096, b"\0"))
    await session(image, expect("s", OLD))
    path.write_text(json.dumps(value | {"version": 2, "clean": False}))
    store = await session(image)
    assert "older version" in str(store.layers[0].reason)


async def test_a_list_of_version_3_which_has_no_notes_is_read(image):
    await session(image, create("s"))
    path = state_of(image) / "manifest.json"
    value = json.loads(path.read_text())
    for layer in value["layers"]:
        del layer["note"], layer["pinned"]
    path.write_text(json.dumps(value | {"version": 3}))

    async def look(engine: Engine) -> None:
        assert (None, False) == (engine.find("s").note, engine.find("s").pinned)

    await session(image, expect("s", OLD), look)
    assert 4 == json.loads(path.read_text())["version"]


async def test_a_note_and_a_pin_come_back(image):
    async def make(engine: Engine) -> None:
        await engine.create_snapshot("a", note="before the upgrade, é", pinned=True)
        await engine.create_snapshot("b")
        await engine.annotate_snapshot("b", note="x" * 255)

    async def look(engine: Engine) -> None:
        found = [(each.note, each.pinned) for each in engine.snapshots]
        assert [("before the upgrade, é", True), ("x" * 255, False)] == found
        await engine.annotate_snapshot("a", note="")
        await engine.annotate_snapshot("b", pinned=True)
        found = [(each.note, each.pinned) for each in engine.snapshots]
        assert [(None, True), ("x" * 255, True)] == found

    await session(image, make)
    await session(image, look)


async def test_a_pinned_snapshot_is_neither_deleted_nor_discarded(image):
    async def use(engine: Engine) -> None:
        layer = await engine.create_snapshot("a", pinned=True)
        with pytest.raises(Pinned, match="'a' is pinned"):
            await engine.delete_snapshot("a")
        with pytest.raises(Pinned):
            await engine.discard(layer, 0, CLUSTER)
        await engine.rename_snapshot("a", "b")
        await engine.annotate_snapshot("b", pinned=False)
        await engine.discard(layer, 0, CLUSTER)
        await engine.delete_snapshot("b")

    await session(image, use)


@pytest.mark.parametrize("note", ["x" * 256, "é" * 128, "two\nlines", "\x1b[31m", "\udcff"])
async def test_a_note_is_one_short_line(image, note):
    async def use(engine: Engine) -> None:
        with pytest.raises(UsageError, match="the note"):
            await engine.create_snapshot("a", note=note)
        await engine.create_snapshot("b", note="good")
        with pytest.raises(UsageError, match="the note"):
            await engine.annotate_snapshot("b", note=note)
        assert ["good"] == [each.note for each in engine.snapshots]

    await session(image, use)


async def test_a_note_that_cannot_be_saved_is_not_taken(image, monkeypatch):
    async def use(engine: Engine) -> None:
        await engine.create_snapshot("a", note="old")

        async def fail(*_arguments: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patched:
            patched.setattr(Store, "save", fail)
            with pytest.raises(OSError):
                await engine.annotate_snapshot("a", note="new", pinned=True)
        layer = engine.find("a")
        assert ("old", False) == (layer.note, layer.pinned)

    await session(image, use)


async def test_an_error_names_the_whole_path(image, monkeypatch):
    await session(image, create("s"))
    fd = statefiles.open_directory(state_of(image))

    def refuse(*_arguments: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("write_synced", "set_nocow"):
        with monkeypatch.context() as patched, pytest.raises(OSError) as raised:
            patched.setattr(statefiles, name, refuse)
            statefiles.replace_file(fd, "manifest.json", b"")
        assert str(state_of(image) / "manifest.json") == raised.value.filename
    with pytest.raises(FileNotFoundError) as missing:
        statefiles.open_file(fd, "none", os.O_RDONLY)
    assert str(state_of(image) / "none") == missing.value.filename
    os.close(fd)


async def test_write_back_that_failed_after_the_death_is_kept_in_mind(image, monkeypatch):
    """The file system tells it once; the mount that it told may die before it has saved."""
    await session(image, create("s"))
    path = state_of(image) / "manifest.json"
    store = await opened(image)
    unclean = path.read_text()
    await store.close(store.layers, [])
    path.write_text(unclean)
    errors = [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))]
    monkeypatch.setattr(
        "snapfs.storage.filesystems.ask_for_errors", lambda fd: errors.pop() if errors else None
    )

    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(statefiles, "replace_file", fail)
        with pytest.raises(OSError, match="Input/output"):
            await opened(image)
    assert [] == errors
    store = await session(image)
    assert "could not store all that it was given: No space" in str(store.layers[0].reason)


@pytest.mark.parametrize("saved", [False, True])
async def test_what_file_systems_say_at_the_end_is_kept_until_it_is_saved(
    image, monkeypatch, tmp_path, saved
):
    """They say it once; the daemon may be killed before it has asked the files."""
    await session(image, create("s"))
    store = await opened(image)
    errors = [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))]
    monkeypatch.setattr(
        "snapfs.storage.filesystems.ask_for_errors", lambda fd: errors.pop() if errors else None
    )
    await store.take_errors()
    if saved:
        store.errors_saved()
    left = tmp_path / "left.img"
    shutil.copy2(image, left)
    shutil.copytree(state_of(image), state_of(left))
    await store.close(store.layers, [])
    (layer,) = (await session(as_left(left))).layers
    assert ("ok" if saved else "lost") == layer.state


async def test_what_the_first_sync_of_a_mount_is_told_the_next_mount_knows(image, monkeypatch):
    """With power: it syncs an image that the dead daemon may have written, before all else."""
    store = await opened(image)
    async with trio.open_nursery() as nursery:
        engine = engine_of(store, nursery)
        await engine.create_snapshot("s")
    await store.close(engine.layers, [], clean=False)
    real = os.fdatasync

    def fdatasync(fd: int) -> None:
        if os.path.samestat(os.fstat(fd), image.stat()):
            raise OSError(errno.EIO, "Input/output error")
        real(fd)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fdatasync)
        with pytest.raises(OSError, match="Input/output error"):
            await Store.open(str(image), durability="power", limiter=LIMITER)
    store = await opened(image)
    assert ["lost"] == [layer.state for layer in store.layers]
    assert "could not store all that it was given" in store.notices[-1]
    await store.close(store.layers, [])
