"""The families of commands put together, and what all of them cost before anything runs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from snapfs.cli.mounthelpers import is_mount_form
from snapfs.cli.parser import FAMILIES, build_parser

# What takes longer to import than most commands take to run, and is for daemons, backups and check.
HEAVY = {
    "bitarray",
    "cattrs",
    "ctypes",
    "logging",
    "pyfuse3",
    "rich",
    "subprocess",
    "trio",
    "xxhash",
}


SCRIPT = """
import sys
try:
    {code}
except SystemExit:
    pass
print(*sys.modules, file=sys.stderr)
"""


def imported_by(code: str) -> set[str]:
    """Modules of a fresh interpreter after `code`, which may end it."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(code=code)],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return set(done.stderr.split())


@pytest.mark.parametrize("arguments", [["--version"], ["list", "--help"], ["mount", "--help"]])
def test_a_command_starts_without_what_others_need(arguments):
    before = imported_by("pass")
    after = imported_by(f"from snapfs.cli import main; main({arguments})")
    assert "snapfs.cli.parser" in after
    assert set() == {name.split(".")[0] for name in after - before} & HEAVY
    assert set() == {name for name in after if name.startswith(("snapfs.state", "snapfs.fuse"))}


def test_every_command_runs_something_of_its_own_family():
    families = {family.__name__ for family in FAMILIES}
    _, verbs = build_parser()
    for name, verb in verbs.items():
        if name != "bitmap":  # has actions below it
            assert verb.get_default("run").__module__ in families, name


@pytest.mark.parametrize(
    ("mounts", "arguments"),
    [
        (True, ["disk.img", "/mnt/d"]),
        (True, ["disk.img", "/mnt/d", "-o", "ro,dev"]),
        (True, ["-o", "list", "disk.img", "/mnt/d"]),
        (True, ["./list", "/mnt/d"]),
        (False, ["list", "/mnt/d"]),
        (False, ["umount", "/mnt/d"]),
        (False, ["mount", "disk.img", "/mnt/d"]),
        (False, ["disk.img"]),
        (False, ["sattus", "/mnt/d"]),
        (True, ["/nowhere/disk.img", "/mnt/d"]),
        (False, []),
    ],
)
def test_the_form_of_mount_is_two_names_of_which_the_first_is_a_path(
    mounts, arguments, tmp_path, monkeypatch
):
    (tmp_path / "disk.img").touch()
    monkeypatch.chdir(tmp_path)
    _, verbs = build_parser()
    assert mounts == is_mount_form(arguments, verbs)
