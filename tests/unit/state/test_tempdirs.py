"""Temp images outside of the state directory: found, cleaned up, refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import trio

from snapfs.errors import StateError
from snapfs.state import tempdirs
from snapfs.state.store import Store
from tests.support.stores import (
    CLUSTER,
    LIMITER,
    OLD,
    create,
    delete,
    engine_of,
    expect,
    state_of,
    write,
)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(OLD)
    return path


@pytest.fixture
def temps(tmp_path: Path) -> Path:
    path = tmp_path / "temps"
    path.mkdir(mode=0o755)
    return path


async def session(image: Path, temp_dir: Path | None, *steps, durability="process") -> Store:
    store = await Store.open(
        str(image),
        cluster_size=CLUSTER,
        durability=durability,
        temp_dir=None if temp_dir is None else str(temp_dir),
        limiter=LIMITER,
    )
    async with trio.open_nursery() as nursery:
        engine = engine_of(store, nursery)
        for step in steps:
            await step(engine)
        await trio.testing.wait_all_tasks_blocked()
    await store.close(engine.layers, list(engine.tracker.bitmaps))
    return store


def private(temps: Path) -> Path:
    """The one directory of ours in it."""
    [found] = temps.iterdir()
    return found


def names(image: Path, *numbers: int) -> list[str]:
    manifest = json.loads((state_of(image) / "manifest.json").read_text())
    return [f"{manifest['id']}-{number}.temp" for number in numbers]


@pytest.mark.parametrize("durability", ["process", "power"])
async def test_temp_images_are_where_the_option_says(image, temps, durability):
    store = await session(
        image, temps, create("s"), write(0, b"x" * CLUSTER), durability=durability
    )
    assert str(temps) == store.temp_directory
    assert names(image, 1) == os.listdir(private(temps))
    assert 0o40700 == private(temps).stat().st_mode
    status = (private(temps) / names(image, 1)[0]).stat()
    assert (0o100600, CLUSTER) == (status.st_mode, status.st_blocks * 512)
    assert not (state_of(image) / "snapshots/1/temp").exists()
    await session(image, None, expect("s", OLD), durability=durability)  # it is remembered
    await session(image, None, delete("s"), durability=durability)
    assert [] == os.listdir(temps)


async def test_another_directory_is_for_new_snapshots(image, temps, tmp_path):
    other = tmp_path / "other"
    other.mkdir(mode=0o755)
    await session(image, temps, create("a"), write(0, b"x"))
    await session(image, other, create("b"), write(CLUSTER, b"y"))
    assert names(image, 1) == os.listdir(private(temps))
    assert names(image, 2) == os.listdir(private(other))
    store = await session(image, state_of(image), create("c"), expect("a", OLD))
    assert str(state_of(image) / "snapshots") == store.temp_directory
    assert (state_of(image) / "snapshots/3/temp").exists()
    await session(image, None, expect("a", OLD), delete("a"), delete("b"), delete("c"))
    assert [] == os.listdir(temps) + os.listdir(other)


async def test_without_snapshots_there_the_directory_is_not_kept(image, temps):
    await session(image, temps, create("a"), delete("a"))
    temps.rmdir()
    store = await session(image, None, create("b"))
    assert str(state_of(image) / "snapshots") == store.temp_directory


async def test_a_missing_directory_or_file_is_named_with_the_remedy(image, temps):
    await session(image, temps, create("s"), write(0, b"x"))
    away = temps.with_name("away")
    temps.rename(away)
    with pytest.raises(StateError, match=f"{temps} .*does not exist; mount the file system"):
        await session(image, None)
    temps.mkdir(mode=0o755)  # the mountpoint alone
    words = f"{temps}/snapfs-.*of snapshot 's' is gone.*mount that first"
    with pytest.raises(StateError, match=words):
        await session(image, None)
    temps.rmdir()
    away.rename(temps)
    await session(image, None, expect("s", OLD))


async def test_a_nameless_layer_that_is_needed_must_have_its_temp_image_too(image, temps, tmp_path):
    await session(image, temps, create("a"), create("b"), write(0, b"x"), delete("b"))
    temp = private(temps) / names(image, 2)[0]
    temp.rename(tmp_path / "away")
    with pytest.raises(StateError, match="of a deleted snapshot is gone"):
        await session(image, None)
    (tmp_path / "away").rename(temp)
    await session(image, None, expect("a", OLD))


async def test_only_our_own_leftovers_are_removed(image, temps):
    await session(image, temps, create("s"))
    mine = json.loads((state_of(image) / "manifest.json").read_text())["id"]
    others = [
        f"{'0' * 32}-7.temp",  # another state directory's
        f"{mine}-7.tmp",
        f"{mine}-07.temp",
        f"x{mine}-7.temp",
        "precious",
    ]
    for name in (*others, f"{mine}-7.temp"):
        (private(temps) / name).write_bytes(b"x")
    store = await session(image, None, expect("s", OLD))
    assert [f"removed what was left in {temps} of snapshot number 7"] == store.notices
    assert {*others, *names(image, 1)} == set(os.listdir(private(temps)))


async def test_what_is_there_already_is_neither_taken_nor_removed(image, temps):
    async def obstruct(engine) -> None:
        (private(temps) / names(image, 1)[0]).symlink_to("/etc/hostname")
        with pytest.raises(FileExistsError):
            await engine.create_snapshot("s")

    await session(image, temps, obstruct)
    assert 1 == len(os.listdir(private(temps)))
    assert [] == os.listdir(state_of(image) / "snapshots")


async def test_a_link_in_place_of_a_temp_image_is_refused(image, temps):
    await session(image, temps, create("s"))
    temp = private(temps) / names(image, 1)[0]
    temp.unlink()
    temp.symlink_to("/etc/hostname")
    with pytest.raises(StateError, match="symbolic link"):
        await session(image, None)


async def test_a_moved_state_directory_finds_its_temp_images(image, temps, tmp_path):
    await session(image, temps, create("s"), write(0, b"x"))
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "disk.img"
    shutil.copy2(image, moved)
    shutil.copytree(state_of(image), state_of(moved), copy_function=shutil.copy2)
    await session(moved, None, expect("s", OLD), write(CLUSTER, b"y"))
    await session(moved, None, expect("s", OLD))
    # The copy has taken them: the original must not serve what it does not know.
    with pytest.raises(StateError, match=r"is gone.*a copy of the state directory"):
        await session(image, None)


async def test_a_mount_that_dies_while_it_takes_temp_images_over(image, temps, monkeypatch):
    await session(image, temps, create("a"), write(0, b"x"), create("b"), write(0, b"y"))
    copy = state_of(image).with_name("copy")
    shutil.copytree(state_of(image), copy, copy_function=shutil.copy2)
    shutil.rmtree(state_of(image))
    real, calls = tempdirs.os.rename, []

    def rename(*arguments, **options):
        if str(arguments[0]).endswith(".temp"):
            calls.append(arguments)
            if len(calls) == 2:
                raise KeyboardInterrupt
        real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(tempdirs.os, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            await Store.open(str(image), state_dir=str(copy), limiter=LIMITER)
    store = await Store.open(str(image), state_dir=str(copy), limiter=LIMITER)
    async with trio.open_nursery() as nursery:
        engine = engine_of(store, nursery)
        await expect("a", OLD)(engine)
        await expect("b", b"x" + OLD[1:])(engine)
    await store.close(engine.layers, ())


async def test_a_directory_that_others_can_write_must_be_sticky(image, temps):
    temps.chmod(0o777)
    with pytest.raises(StateError, match="chmod go-w"):
        await session(image, temps)
    temps.chmod(0o1777)
    await session(image, temps, create("s"), write(0, b"x"), expect("s", OLD))


async def test_in_a_directory_of_everybody_others_can_do_nothing(image, temps, tmp_path):
    """Whoever sees our names can make such files and directories, but not where we look."""
    temps.chmod(0o1777)
    await session(image, temps, create("s"), write(0, b"x"))
    (temps / names(image, 2)[0]).mkdir()
    await session(image, None, expect("s", OLD), create("t"), delete("s"), delete("t"))
    former = json.loads((state_of(image) / "manifest.json").read_text())["temp_dir"]
    Path(former).symlink_to(tmp_path)  # it was removed: by now it can be anything
    await session(image, temps, create("s"), write(0, b"y"), expect("s", b"x" + OLD[1:]))
    assert Path(former).is_symlink()


@pytest.mark.parametrize("damage", ["mode", "link", "owner"])
async def test_a_directory_that_is_not_ours_alone_is_refused(image, temps, tmp_path, damage):
    await session(image, temps, create("s"), write(0, b"x"))
    found = private(temps)
    if damage == "mode":
        found.chmod(0o750)
    elif damage == "link":
        found.rename(tmp_path / "away")
        found.symlink_to(tmp_path / "away")
    elif os.geteuid():
        pytest.skip("needs root to give a directory away")
    else:
        os.chown(found, 12345, -1)
    with pytest.raises(StateError, match=str(found)):
        await session(image, None)


@pytest.mark.skipif("os.geteuid()", reason="needs root to give a directory away")
async def test_a_directory_of_somebody_else_is_refused(image, temps):
    os.chown(temps, 12345, -1)
    with pytest.raises(StateError, match=r"belongs to user 12345.*temp-dir"):
        await session(image, temps)


async def test_a_file_as_directory_is_refused(image, tmp_path):
    with pytest.raises(StateError, match="Not a directory"):
        await session(image, image)
    assert not state_of(image).exists()


@pytest.mark.parametrize("path", ["relative", "/a/../b", "/nul\0", 5])
async def test_a_manifest_with_a_bad_directory_is_refused(image, temps, path):
    await session(image, temps, create("s"))
    manifest = state_of(image) / "manifest.json"
    value = json.loads(manifest.read_text())
    value["layers"][0]["temp_dir"] = path
    manifest.write_text(json.dumps(value))
    with pytest.raises(StateError, match="damaged"):
        await session(image, None)


async def test_an_id_that_is_a_path_is_refused(image, temps):
    await session(image, temps, create("s"))
    manifest = state_of(image) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"id": "../../evil"}))
    with pytest.raises(StateError, match="damaged"):
        await session(image, None)
