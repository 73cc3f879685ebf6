"""As many snapshots as a process can have files for: what is one too many changes nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import trio
import trio.testing
from attrs import evolve

from snapfs.engine.engine import Engine
from snapfs.errors import LimitReached
from snapfs.state import layerstore, manifestfile, statefiles
from snapfs.state.manifest import Manifest
from snapfs.state.store import Store
from snapfs.storage import descriptors
from tests.support.stores import (
    CLUSTER,
    LIMITER,
    OLD,
    create,
    engine_of,
    opened,
    session,
    state_of,
)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(OLD)
    return path


def allow(monkeypatch, more: int) -> None:
    """From now on so many descriptors more than now can be had, and those that are kept."""
    most = descriptors.in_use() + descriptors.KEPT + more
    monkeypatch.setattr(descriptors, "limit", lambda: most)


async def deleted(engine: Engine, image: Path, name: str) -> None:
    """Delete a snapshot, and return when its files are gone."""
    where = state_of(image) / "snapshots" / str(engine.find(name).id)
    await engine.delete_snapshot(name)
    while where.exists():
        await trio.sleep(0.001)


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(("durability", "each"), [("process", 2), ("power", 2)])
async def test_what_a_snapshot_takes(image, durability, each):
    files = await Store.open(
        str(image), cluster_size=CLUSTER, durability=durability, limiter=LIMITER
    )
    async with trio.open_nursery() as nursery:
        engine = engine_of(files, nursery)
        before = descriptors.in_use()
        for number in range(1, 4):
            await engine.create_snapshot(str(number))
            assert before + number * each == descriptors.in_use()
        await deleted(engine, image, "2")
        assert before + 2 * each == descriptors.in_use()
    await files.close(engine.layers, [])


async def test_a_snapshot_too_many_changes_nothing_and_another_can_be_deleted(image, monkeypatch):
    files = await opened(image)
    async with trio.open_nursery() as nursery:
        engine = engine_of(files, nursery)
        allow(monkeypatch, 2 * layerstore.DESCRIPTORS)
        await engine.create_snapshot("a")
        await engine.create_snapshot("b")
        before = contents(state_of(image))
        with pytest.raises(LimitReached, match="LimitNOFILE="):
            await engine.create_snapshot("c")
        assert before == contents(state_of(image))
        assert ["a", "b"] == [layer.name for layer in engine.snapshots]
        await deleted(engine, image, "a")
        await engine.create_snapshot("c")
    await files.close(engine.layers, [])


async def test_a_mount_with_too_many_changes_nothing(image, monkeypatch):
    await session(image, *map(create, "abc"))
    before = contents(state_of(image))
    with monkeypatch.context() as patch:
        allow(patch, 5)  # three, and what a store has open itself
        with pytest.raises(LimitReached, match="3 snapshots"):
            await opened(image)
    assert before == contents(state_of(image))
    await (await opened(image)).close([], [])


async def test_when_there_is_no_descriptor_nothing_is_left_of_a_creation(image, monkeypatch):
    """ENFILE comes without warning."""
    real, failing = statefiles.open_file, False

    def open_file(parent, name, flags=os.O_RDWR):
        if failing and name == "losses":
            raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))
        return real(parent, name, flags)

    monkeypatch.setattr(statefiles, "open_file", open_file)
    files = await opened(image)
    async with trio.open_nursery() as nursery:
        engine = engine_of(files, nursery)
        failing = True
        with pytest.raises(LimitReached, match=r"fs\.file-max"):
            await engine.create_snapshot("a")
        failing = False
        assert [] == os.listdir(state_of(image) / "snapshots")
        await engine.create_snapshot("a")
    await files.close(engine.layers, [])


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
async def test_deleting_and_ending_do_without(image, monkeypatch, number):
    """Every file and directory can be opened once in a while only, with what is set aside."""
    files = await opened(image)
    async with trio.open_nursery() as nursery:
        engine = engine_of(files, nursery)
        for name in "ab":
            await engine.create_snapshot(name)
        await engine.tracker.add("bitmap")
        before = descriptors.in_use()
        real = os.open

        def scarce(*arguments, **keywords):
            if descriptors.in_use() >= before:
                raise OSError(number, os.strerror(number))
            return real(*arguments, **keywords)

        monkeypatch.setattr(os, "open", scarce)
        await engine.delete_snapshot("a")
        await engine.resize(300 * 8 * 4096 * CLUSTER)  # more than the bitmap has room for
        await trio.testing.wait_all_tasks_blocked()
    await files.close(engine.layers, list(engine.tracker.bitmaps))
    monkeypatch.undo()
    assert ["2"] == os.listdir(state_of(image) / "snapshots")
    again = await opened(image)
    assert (["b"], [], [None]) == (
        [layer.name for layer in again.layers],
        again.notices,
        [bitmap.reason for bitmap in again.dirty],
    )
    await again.close(again.layers, again.dirty)


async def test_the_reserve_has_room_for_the_list(image):
    files = await opened(image)
    async with trio.open_nursery() as nursery:
        layer = await engine_of(files, nursery).create_snapshot("a" * 200)
    record = layer.record()
    many = [evolve(record, id=number, name=f"{number:0200}") for number in range(1, 1500)]
    await files.save(many, files.geometry)
    size = (state_of(image) / "manifest.json").stat().st_size
    assert size > statefiles.RESERVE_BYTES
    assert 2 * size == (state_of(image) / "reserve").stat().st_size
    await files.close([layer], [])
    assert statefiles.RESERVE_BYTES == (state_of(image) / "reserve").stat().st_size


async def test_a_list_that_could_not_be_read_is_not_written(image, monkeypatch):
    files = await opened(image)
    async with trio.open_nursery() as nursery:
        engine = engine_of(files, nursery)
        await engine.create_snapshot("a")
        size = (state_of(image) / "manifest.json").stat().st_size
        monkeypatch.setattr(manifestfile, "LIST_KEPT", 100)
        monkeypatch.setattr(manifestfile, "MAX_BYTES", size + 99)
        with pytest.raises(LimitReached, match="the list of snapshots has"):
            await engine.create_snapshot("b")
        with pytest.raises(OSError, match="the list of snapshots would have") as refused:
            await engine.rename_snapshot("a", "a" * 200)
        assert errno.EFBIG == refused.value.errno
        assert ["a"] == [layer.name for layer in engine.snapshots]
        assert size == (state_of(image) / "manifest.json").stat().st_size
        await engine.delete_snapshot("a")
        await engine.create_snapshot("b")
    await files.close(engine.layers, [])


async def test_lines_of_the_list_are_made_once(image):
    await session(image, create("a"), create("b"))
    data = (state_of(image) / "manifest.json").read_bytes()
    manifest = Manifest.loads(data, "here")
    lines = {}
    assert data == manifest.dumps() == manifest.dumps(lines) == manifest.dumps(lines)
    assert list(manifest.layers) == [record for record, _ in lines.values()]
    lines[2] = manifest.layers[1], '{"kept": true}'
    assert b'{"kept": true}' in manifest.dumps(lines)
    shorter = manifest.with_lists(manifest.layers[:1], ())
    assert shorter == Manifest.loads(shorter.dumps(lines), "here")
    assert [1] == list(lines)


@pytest.mark.parametrize("count", [1, 40])
async def test_a_file_that_cannot_be_synced_keeps_the_end_from_being_clean(
    image, monkeypatch, count
):
    await session(image, *(create(str(number)) for number in range(count)))
    files = await opened(image)
    synced, real = [], layerstore.LayerDirectory.sync

    def sync(files: layerstore.LayerDirectory, layer_id: int) -> None:
        synced.append(layer_id)
        if len(synced) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(files, layer_id)

    monkeypatch.setattr(layerstore.LayerDirectory, "sync", sync)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        await files.close(files.layers, [])
    monkeypatch.undo()
    assert not Manifest.loads((state_of(image) / "manifest.json").read_bytes(), "here").clean
    again = await opened(image)  # all is let go of
    await again.close(again.layers, [])
    assert Manifest.loads((state_of(image) / "manifest.json").read_bytes(), "here").clean
