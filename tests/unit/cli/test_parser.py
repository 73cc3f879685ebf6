"""The families of commands put together, and what all of them cost before anything runs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from snapfs.cli.mounthelpers import is_mount_form
from snapfs.cli.parser import COMMANDS, build_parser, family

# What takes longer to import than most commands take to run, and is for daemons, backups and check.
HEAVY = {
    "attr",
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


DAEMONS = {"snapfs.client.wire", "snapfs.client.mountinfo", "snapfs.cli.mounting"}
OTHERS = {"snapfs.cli.backups", "snapfs.backup", "snapfs.daemon.options", "difflib", "pathlib"}


@pytest.mark.parametrize(
    ("arguments", "beside"),
    [
        (["--help"], {"json", "socket", "shutil", *DAEMONS, *OTHERS}),
        (["--version"], {"json", "socket", *DAEMONS, *OTHERS}),
        (["list", "--help"], OTHERS),
        (["list", "/nonexistent"], OTHERS),
        (["status", "/nonexistent"], OTHERS),
        (["mount", "--help"], OTHERS),
    ],
)
def test_a_command_starts_without_what_others_need(arguments, beside):
    before = imported_by("pass")
    after = imported_by(f"from snapfs.cli import main; main({arguments})")
    assert "snapfs.cli.parser" in after
    found = after - before
    heavy = HEAVY if "/nonexistent" not in arguments else HEAVY - {"ctypes"}  # statx(2)
    assert set() == {name.split(".")[0] for name in found} & heavy
    assert set() == found & beside
    assert set() == {name for name in after if name.startswith(("snapfs.state", "snapfs.fuse"))}


def test_what_is_said_of_all_commands_is_what_each_says():
    parser, verbs = build_parser()
    assert list(COMMANDS) == list(verbs)
    assert build_parser(["--help"])[0].format_help() == parser.format_help()


def test_every_command_is_of_the_family_that_is_imported_for_it():
    _, verbs = build_parser()
    for name, verb in verbs.items():
        if name != "bitmap":  # has actions below it
            assert verb.get_default("run").__module__ == family(COMMANDS[name][0]).__name__, name
        _, few = build_parser([name, "x"])
        assert verb.format_help() == few[name].format_help()


@pytest.mark.parametrize("columns", ["60", "200", "0", "x"])
def test_help_is_as_wide_as_the_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    widest = max(map(len, build_parser(["--help"])[0].format_help().splitlines()))
    assert widest <= {"60": 58, "200": 198}.get(columns, 78)


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
    assert mounts == is_mount_form(arguments, COMMANDS)
