"""The manifest of a backup directory, its lock, and which points prune keeps."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta

import pytest
from attrs import evolve

from snapfs.backup import chain as chain_module
from snapfs.backup import records
from snapfs.backup.chain import MANIFEST, VERSION, Chain, Fold, Point, init, opened
from snapfs.errors import BackupError, InUse

START = datetime(2026, 11, 2, 12, tzinfo=UTC)  # a Monday


def point(number: int, parent: str | None, hours: float = 0.0) -> Point:
    return Point(
        number=number,
        name=f"{number:04d}-x".replace("x", "2026"),
        token=f"{number:012x}",
        created=(START + timedelta(hours=hours)).isoformat(),
        size=1000,
        parent=parent,
        image="/vm/disk.img",
        data_bytes=1,
        zero_bytes=2,
        digest="0" * 32,
    )


def chain_of(count: int, step_hours: float = 24.0) -> Chain:
    points: list[Point] = []
    for number in range(1, count + 1):
        parent = points[-1].name if points else None
        points.append(point(number, parent, step_hours * (number - 1)))
    return Chain(VERSION, "0" * 12, count + 1, tuple(points))


def load(chain: object) -> Chain:
    return records.structure(json.dumps(chain).encode(), Chain, "it", VERSION)


def test_a_manifest_is_read_as_it_was_written():
    chain = evolve(chain_of(3), garbage=("0009-2026",), fold=Fold("0000-2026", "0001-2026"))
    assert chain == records.structure(records.unstructure(chain), Chain, "it", VERSION)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(version=2),
        lambda m: m.update(id="../../etc"),
        lambda m: m.update(more=1),
        lambda m: m.pop("points"),
        lambda m: m["points"][0].update(name="../0001"),
        lambda m: m["points"][0].update(size=-1),
        lambda m: m["points"][0].update(size="1"),
        lambda m: m["points"][0].update(number=True),
        lambda m: m["points"][0].update(created="yesterday"),
        lambda m: m["points"][0].update(created="2026-11-24T00:00:00"),
        lambda m: m["points"][1].update(number=1),
        lambda m: m["points"][1].update(name=m["points"][0]["name"]),
        lambda m: m["points"][1].update(parent="0099-2026"),
        lambda m: m["points"][2].update(parent=m["points"][0]["name"]),
        lambda m: m["points"].reverse(),
        lambda m: m.update(next_number=3),
        lambda m: m.update(garbage=["../../etc/passwd"]),
        lambda m: m.update(garbage=[m["points"][0]["name"]]),
        lambda m: m.update(fold={"old": m["points"][0]["name"], "into": m["points"][1]["name"]}),
    ],
)
def test_a_manifest_that_is_not_one_is_refused(change):
    stored = json.loads(records.unstructure(chain_of(3)))
    assert chain_of(3) == load(stored)
    change(stored)
    if "points" not in stored:  # it has a default: an empty chain is fine, a lost one is not
        stored["points"] = None
    with pytest.raises(BackupError):
        load(stored)


def test_a_directory_that_was_not_made_one_is_refused_and_stays_empty(tmp_path):
    with pytest.raises(BackupError, match="--init"), opened(str(tmp_path), change=True):
        pass
    assert [] == list(tmp_path.iterdir())


def test_one_changes_beside_many_that_read(tmp_path):
    init(str(tmp_path))
    with (
        opened(str(tmp_path), change=False),
        opened(str(tmp_path), change=False),
        opened(str(tmp_path), change=True) as directory,
        opened(str(tmp_path), change=False),
    ):
        with pytest.raises(InUse), opened(str(tmp_path), change=True):
            pass
        with pytest.raises(InUse), directory.without_readers():
            pass
    with opened(str(tmp_path), change=True) as directory, directory.without_readers():
        with pytest.raises(InUse), opened(str(tmp_path), change=False):
            pass


def test_a_lock_is_waited_for(tmp_path, monkeypatch):
    init(str(tmp_path))
    other = opened(str(tmp_path), change=True)
    other.__enter__()
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            other.__exit__(None, None, None)

    monkeypatch.setattr(chain_module.time, "sleep", sleep)
    with opened(str(tmp_path), change=True, wait=math.inf):
        assert 3 == len(slept)
        monkeypatch.setattr(chain_module.time, "monotonic", lambda: sum(slept))
        with pytest.raises(InUse), opened(str(tmp_path), change=True, wait=60):
            pass
        assert 60 <= sum(slept) < 62


def test_a_directory_gets_its_id_once(tmp_path):
    made = init(str(tmp_path / "new"))
    with pytest.raises(BackupError, match="already"):
        init(str(tmp_path / "new"))
    assert made.chain.id != init(str(tmp_path / "other")).chain.id


def test_garbage_is_swept_by_name_and_nothing_else(tmp_path):
    directory = init(str(tmp_path))
    directory.save(evolve(directory.chain, garbage=("0001-2026",), next_number=2))
    for name in ("0001-2026.qcow2.partial", "0001-2026.sums", "0002-2026.qcow2", "mine.txt"):
        (tmp_path / name).touch()
    directory.sweep()
    assert {"0002-2026.qcow2", "mine.txt", MANIFEST} == {each.name for each in tmp_path.iterdir()}
    assert () == directory.chain.garbage
