"""What many points cost: files and programs, not seconds.  scripts/soak-points has the seconds."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.backedup import K64, MIB, Disk
from tests.support.mounted import SNAPFS, run

pytestmark = [pytest.mark.mount, pytest.mark.timeout(1200)]

FEW, MANY = 4, 40
DESCRIPTORS = 40

# A command of snapfs; how often it opens files of a directory, and starts programs.
COUNTED = """
import json, sys
directory, *arguments = sys.argv[1:]
counts = {"opens": 0, "programs": 0}
def hook(event, args):
    if event == "subprocess.Popen":
        counts["programs"] += 1
    elif event == "open" and str(args[0]).startswith(directory):
        counts["opens"] += 1
sys.addaudithook(hook)
from snapfs import cli
status = cli.main(arguments)
print(json.dumps(counts))
sys.exit(status)
"""


@pytest.fixture
def disk(mount, tmp_path):
    directory = tmp_path / "backup"
    run(*SNAPFS, "backup", "--init", directory)
    return Disk(mount(os.urandom(4 * MIB)), directory, tmp_path)


def count(it: Disk, *command: str | Path) -> dict[str, int]:
    """What a command does, with few descriptors."""

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))

    words = [sys.executable, "-c", COUNTED, str(it.directory), *map(str, command)]
    done = subprocess.run(words, preexec_fn=few, capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_many_points_take_no_more_programs_and_few_files_each(disk):
    it = disk
    counted: dict[int, dict[str, dict[str, int]]] = {}
    for number in range(MANY):
        it.mounted.write(number * K64, os.urandom(K64))
        it.moments[number + 1] = it.mounted.active.read_bytes()
        counts = count(it, "backup", it.mounted.mountpoint, it.directory)
        if number + 1 in (FEW, MANY):
            dest = it.scratch / "r"
            counted[number + 1] = {
                "backup": counts,
                "points": count(it, "points", it.directory),
                "verify": count(it, "verify", it.directory, "--at", "latest"),
                "restore": count(it, "restore", it.directory, dest, "--force"),
            }
            assert it.moments[number + 1] == dest.read_bytes()
    few, many = counted[FEW], counted[MANY]
    assert {"points": 0, "verify": 0, "restore": 0, "backup": 2} == {
        verb: many[verb]["programs"] for verb in ("points", "verify", "restore", "backup")
    }
    assert many["backup"]["programs"] == few["backup"]["programs"]
    for verb, counts in many.items():
        more = counts["opens"] - few[verb]["opens"]
        assert 0 < more <= 6 * (MANY - FEW), (verb, counts, few[verb])
