"""Pruning a directory in which something is damaged."""

from __future__ import annotations

import os

import pytest

from snapfs.backup import pruning
from snapfs.backup.chain import Directory
from snapfs.backup.pruning import PruneOptions
from snapfs.backup.restoring import RestoreOptions, restore
from snapfs.backup.retention import Policy
from snapfs.errors import BackupError, PointDamaged
from tests.support.points import Backup

K64 = 1 << 16


@pytest.mark.parametrize("kind", ["data", "tables", "gone"])
def test_a_damaged_point_does_not_keep_the_others_from_being_folded(tmp_path, kind):
    backup = Backup(tmp_path / "backup")
    needle = b"a needle in the hay"
    backup.add({0: os.urandom(8 * K64)})
    for number in range(1, 6):
        data = os.urandom(2 * K64)
        if number == 2:
            data = needle + data[len(needle) :]
        backup.add({number * K64: data})
    second = backup.directory.chain.points[2]
    path = tmp_path / "backup" / f"{second.name}.qcow2"
    content = path.read_bytes()
    if kind == "data":
        path.write_bytes(content.replace(needle, needle.upper()))
    elif kind == "tables":  # behind the header, which still looks right
        path.write_bytes(content[: 1 << 16] + b"\xff" * (3 << 16) + content[4 << 16 :])
    else:
        path.unlink()
    said: list[str] = []
    options = PruneOptions(Policy(last=1), say=said.append, chat=lambda _: None)
    result = pruning.prune(str(backup.path), options)
    assert second.name in result["failed"]
    assert not set(result["failed"]) & set(result["dropped"]) and result["dropped"]
    assert any(second.name in words for words in said)
    left = Directory(str(backup.path)).chain.points
    assert [*result["failed"], result["kept"][-1]] == [point.name for point in left]
    quiet = RestoreOptions(quiet=True, force=True)
    with pytest.raises((PointDamaged, BackupError)):  # the newest one needs what is damaged
        restore(str(backup.path), str(tmp_path / "r"), quiet)
