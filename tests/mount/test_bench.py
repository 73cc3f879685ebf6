"""scripts/bench measures what it says, and leaves nothing when it is ended."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.mounted import mounts_below

pytestmark = [
    pytest.mark.mount,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif("os.geteuid()", reason="a benchmark drops caches"),
]

ROOT = Path(__file__).parents[2]
ROW = "active: 1 MiB read"


def start(directory: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    command = [ROOT / "scripts/bench", "--size", str(8 << 20), "--directory", directory]
    return subprocess.Popen(
        [str(word) for word in [*command, *arguments]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until_mounted(is_it: Callable[[list[str]], bool], path: Path) -> None:
    """proc(5): poll(2) on mountinfo tells of each change."""
    with open("/proc/self/mountinfo") as mounts:
        changes = select.poll()
        changes.register(mounts, select.POLLPRI)
        while not is_it(mounts_below(path)):
            changes.poll()


def test_two_builds_take_turns(tmp_path):
    numbers = tmp_path / "numbers.json"
    bench = start(tmp_path, "--beside", ROOT, "--rounds", "2", "--json", numbers, ROW)
    out, err = bench.communicate()
    assert 0 == bench.returncode, err
    assert [f"this: {ROOT} ", f"other: {ROOT} "] == [
        line.rpartition("(")[0] for line in out.splitlines()[:2]
    ]
    rows = json.loads(numbers.read_text())
    assert [ROW] == [row["name"] for row in rows]
    for row in rows:
        assert ["other", "this"] == sorted(row["values"])
        assert [2, 2] == [len(values) for values in row["values"].values()]
        assert [b / a for a, b in zip(*row["values"].values(), strict=True)] == row["ratios"]
    assert ["numbers.json"] == os.listdir(tmp_path)


@pytest.mark.parametrize("kind", ["tmpfs", "XFS"])
def test_sigterm_leaves_no_mount_and_no_loop_device(tmp_path, kind):
    bench = start(tmp_path, "--rounds", "1000", f"{kind}: 4 KiB random read")
    # Both: the file system, and what serves its image.
    wait_until_mounted(lambda found: len(found) > 1, tmp_path)
    bench.send_signal(signal.SIGTERM)
    _, err = bench.communicate()
    assert 1 == bench.returncode
    assert "bench: ended by SIGTERM" in err
    assert [] == mounts_below(tmp_path)
    loops = subprocess.run(["losetup", "-a"], capture_output=True, text=True, check=True)
    assert str(tmp_path) not in loops.stdout
    assert [] == os.listdir(tmp_path)


def test_a_program_that_fails_is_reported_and_the_rest_is_measured(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/mkfs.btrfs").write_text("#!/bin/sh\necho no disk >&2\nexit 1\n")
    (tmp_path / "bin/mkfs.btrfs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    where = tmp_path / "where"
    where.mkdir()
    bench = start(where, "--rounds", "1", "btrfs: 4 KiB random read", ROW)
    out, err = bench.communicate()
    assert 1 == bench.returncode, err
    measured, btrfs, said = out.splitlines()
    assert measured.startswith(ROW)
    assert "failed: mkfs.btrfs failed:" in btrfs
    assert "no disk" == said
    assert [] == os.listdir(where)
