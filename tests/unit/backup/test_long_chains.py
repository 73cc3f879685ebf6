"""Many points and few descriptors; and the image that a disk of another size once was."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess

import pytest

from snapfs.backup.pruning import PruneOptions, prune
from snapfs.backup.restoring import RestoreOptions, restore
from snapfs.backup.retention import Policy
from snapfs.backup.verifying import VerifyOptions, verify
from tests.support.mounted import K64, SNAPFS, run
from tests.support.points import Backup

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="no qemu-utils")


def test_a_chain_longer_than_there_are_descriptors_is_restored_and_verified(tmp_path):
    backup = Backup(tmp_path / "b")
    backup.add({0: os.urandom(4 * K64)})
    for number in range(50):
        backup.add({number % 4 * K64: os.urandom(K64)})

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))

    for command in (["verify", tmp_path / "b"], ["restore", tmp_path / "b", tmp_path / "r"]):
        words = [str(word) for word in [*SNAPFS, *command]]
        done = subprocess.run(words, preexec_fn=few, capture_output=True, text=True, check=False)
        assert 0 == done.returncode, done.stderr
    assert backup.moments[-1] == (tmp_path / "r").read_bytes()


def test_what_a_smaller_disk_cut_off_is_not_restored(tmp_path):
    backup = Backup(tmp_path / "b")
    backup.add({0: os.urandom(8 * K64)})
    backup.add({K64: os.urandom(K64)}, size=3 * K64)
    backup.add({4 * K64: os.urandom(K64)}, size=6 * K64)
    for number, moment in enumerate(backup.moments, 1):
        options = RestoreOptions(at=str(number), force=True)
        (tmp_path / "r").write_bytes(b"x" * 9 * K64)
        restore(str(tmp_path / "b"), str(tmp_path / "r"), options)
        assert moment == (tmp_path / "r").read_bytes()
    assert 0 == verify(str(tmp_path / "b"), VerifyOptions())["damaged"]


def test_what_a_smaller_disk_cut_off_does_not_come_back_by_folding(tmp_path):
    backup = Backup(tmp_path / "b")
    backup.add({0: os.urandom(8 * K64)})
    backup.add({3 * K64: 4096}, size=3 * K64 + 4096)
    backup.add({3 * K64: 3 * K64 + 7}, size=6 * K64 + 7)
    for last in (2, 1):
        prune(str(tmp_path / "b"), PruneOptions(policy=Policy(last=last)))
        assert 0 == verify(str(tmp_path / "b"), VerifyOptions())["damaged"]
        newest = max((tmp_path / "b").glob("*.qcow2"))
        run("qemu-img", "convert", "-O", "raw", newest, tmp_path / "raw")
        assert backup.moments[-1] == (tmp_path / "raw").read_bytes()[: 6 * K64 + 7]
