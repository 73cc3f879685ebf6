"""snapfs check, a repair and a mount, whatever is in the files of a state directory."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import example, given
from hypothesis import strategies as st

from snapfs.errors import SnapfsError
from snapfs.state.check import check
from snapfs.state.store import Store
from tests.support.images import CLUSTER
from tests.support.stores import (
    LIMITER,
    OLD,
    add,
    create,
    damage_manifest,
    delete,
    outside,
    session,
    state_of,
    stored,
    tree,
    write,
)

MAPPED = (
    "activity", "snapshots/1/access", "snapshots/1/done", "snapshots/1/losses",
    "snapshots/1/temp", "snapshots/3/access", "snapshots/3/done", "bitmaps/2", "manifest.json",
)  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([-1, 0, 1 << 62, 1 << 64, 10**400]),
    st.floats(allow_nan=False), st.text(max_size=5),
    st.sampled_from(
        ["..", "../canary", "/etc/passwd", "a\0b", "\ud800", "\x1b[2J", "x" * 300, "lost", "power"]
    ),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)
MUTATIONS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(["set", "drop"]), VALUES),
    min_size=1,
    max_size=3,
)


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """An image with two snapshots, a nameless layer and a bitmap, to be copied."""
    path = tmp_path_factory.mktemp("template") / "disk.img"
    path.write_bytes(OLD)
    trio.run(
        session, path, create("a"), add("b"), write(0, b"x"), create("c"), write(CLUSTER, b"y"),
        delete("c"), create("d"),
    )  # fmt: skip
    return path


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything in a JSON value."""
    found = [path]
    items = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def mutate(value: Any, mutations: list[tuple[Any, str, Any]]) -> Any:
    """Values of a JSON document replaced or left out: at a path, or that share of all paths."""
    box = {"top": value}
    for place, action, new in mutations:
        paths = places(box)[1:]
        path = place if isinstance(place, tuple) else paths[int(place * len(paths))]
        *inner, last = path
        at: Any = box
        for key in inner:
            at = at[key]
        if action == "set" or last == "top":
            at[last] = new
        else:
            del at[last]
    return box["top"]


async def open_and_close(image: Path) -> None:
    store = await Store.open(str(image), limiter=LIMITER)
    await store.close(store.layers, store.dirty)


def assert_contained(template: Path, damage: Callable[[Path], None]) -> None:
    """A check, a repair and a mount raise what the user can read, and stay inside."""
    with tempfile.TemporaryDirectory() as name:
        parent = Path(name)
        (parent / "canary").mkdir()
        (parent / "canary" / "temp").write_bytes(b"canary")
        image = parent / "disk.img"
        shutil.copy2(template, image)
        shutil.copytree(state_of(template), state_of(image))
        for each in state_of(image).rglob("*"):
            each.chmod(0o700 if each.is_dir() else 0o600)
        os.symlink(parent / "canary", state_of(image) / "snapshots" / "9")
        os.symlink(parent / "canary" / "temp", state_of(image) / "bitmaps" / "x")
        os.symlink(parent / "canary" / "temp", state_of(image) / "manifest.json.new")
        damage(state_of(image))
        before = tree(parent)
        for repair in (False, True):
            try:
                check(str(state_of(image)), repair=repair)
            except (SnapfsError, OSError):
                pass
            after = tree(parent)
            assert outside(before) == outside(after)
            assert repair or before == after
        try:
            trio.run(open_and_close, image)
        except (SnapfsError, OSError):
            pass
        assert outside(before) == outside(tree(parent))


@given(mutations=MUTATIONS)
@example(mutations=[(("top", "layers", 0, "id"), "set", "../../canary")])
@example(mutations=[(("top", "layers", 1, "size"), "set", 1 << 70)])
@example(mutations=[(("top", "layers", 1, "size"), "set", 1 << 61)])
@example(mutations=[(("top", "image", "path"), "set", "a\0b")])
def test_no_manifest_is_a_traceback_or_a_way_out(template, mutations):
    def damage(state: Path) -> None:
        path = state / "manifest.json"
        path.write_text(json.dumps(mutate(json.loads(path.read_text()), mutations)))

    assert_contained(template, damage)


@given(
    name=st.sampled_from(MAPPED),
    size=st.none() | st.integers(0, 10_000),
    offset=st.integers(0, 64) | st.integers(0, 5000),
    data=st.binary(max_size=64),
    clean=st.booleans(),
)
@example(name="activity", size=None, offset=24, data=b"\xff" * 8, clean=False)
def test_no_file_is_a_traceback_or_a_way_out(template, name, size, offset, data, clean):
    def damage(state: Path) -> None:
        damage_manifest(clean=clean)(state)
        if size is not None:
            os.truncate(state / name, size)
        stored(name, offset, data)(state)

    assert_contained(template, damage)


@given(seed=st.integers(0, 1 << 32), name=st.sampled_from(MAPPED))
def test_no_file_of_random_bytes_is_a_traceback_or_a_way_out(template, seed, name):
    def damage(state: Path) -> None:
        size = (state / name).stat().st_size
        (state / name).write_bytes(random.Random(seed).randbytes(size))

    assert_contained(template, damage)
