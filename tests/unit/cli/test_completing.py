"""Completion: the scripts, and the names that shells ask for."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapfs.cli import completing, main
from snapfs.cli.completing import candidates, kind_of
from snapfs.cli.parser import build_parser
from tests.support.mounted import PATIENCE


@pytest.fixture(params=completing.SHELLS)
def shell(request) -> str:
    if shutil.which(request.param) is None:
        pytest.skip(f"needs {request.param}")
    return str(request.param)


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    below = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    if not below:
        yield parser
    for each in below:
        for leaf in each.choices.values():
            yield from leaves(leaf)


def test_every_argument_is_completed():
    seen = set()
    for leaf in leaves(build_parser()[0]):
        for action in leaf._get_positional_actions():
            kind = kind_of(leaf, action)
            seen.add(kind)
            free = action.metavar == "SIZE"
            assert free or kind in (*completing.KINDS, "file", "directory"), (leaf.prog, action)
    assert {*completing.KINDS, "file", "directory", None} - {"point"} == seen


def test_the_script_is_one_that_the_shell_takes(shell, tmp_path, capsys):
    assert 0 == main(["completion", shell])
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    done = subprocess.run(
        [shell, "-n", script], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (0, "") == (done.returncode, done.stderr)
    for kind in ("mount", "snapshot", "bitmap", "point"):
        assert f"_snapfs_names {kind}" in script.read_text()


def test_without_shtab_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(completing.__dict__["__builtins__"], "__import__", _without("shtab"))
    assert 1 == main(["completion", "bash"])
    assert "pip install 'shtab>=1.9.3'" in capsys.readouterr().err


def _without(missing: str):
    real = __import__

    def fail(name, *rest, **more):
        if name == missing:
            raise ImportError(name)
        return real(name, *rest, **more)

    return fail


def test_names_of_points_are_those_of_the_directory_that_was_typed(tmp_path):
    (tmp_path / "snapfs-backup.json").touch()
    for name in ("0001-2026-11-29T02-47-02Z", "0002-2026-11-30T02-47-02Z"):
        (tmp_path / f"{name}.qcow2").touch()
    (tmp_path / "0001-2026-11-29T02-47-02Z.sums").touch()
    line = ["restore", str(tmp_path), "--at"]
    assert ["0002-2026-11-30T02-47-02Z"] == candidates("point", ["0002", *line])
    assert 2 == len(candidates("point", ["", *line]))
    assert [] == candidates("point", ["", "restore", str(tmp_path / "other"), "--at"])


def test_names_that_a_shell_could_take_for_something_else_are_left_out(monkeypatch):
    names = ["monday", "a b", "$(reboot)", "`x`", "*", "-n;ls", "x\ny", "tues'day", "2026-01-01"]
    monkeypatch.setattr(completing, "_names", lambda *_: iter(names))
    assert ["monday", "2026-01-01"] == candidates("snapshot", [""])


def test_no_mount_is_no_error(monkeypatch):
    monkeypatch.setattr(completing.mountinfo, "mounts", list)
    assert [] == candidates("snapshot", ["x", "show", "/nowhere"])
    assert [] == candidates("bitmap", [])


def bash(script: Path, *words: str, directory: Path) -> list[str]:
    line = " ".join(f"'{word}'" for word in words)
    code = f"""
        source {script}
        COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}
        _shtab_snapfs
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", code], capture_output=True, text=True, timeout=PATIENCE,
        cwd=directory, check=True,
    )  # fmt: skip
    return done.stdout.split()


def test_bash_completes_commands_options_and_asks_for_names(tmp_path, capsys):
    main(["completion", "bash"])
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    asked = tmp_path / "asked"
    program = tmp_path / "snapfs"
    program.write_text(f"#!/bin/sh\nprintf '%s|' \"$@\" >>{asked}\necho monday\n")
    program.chmod(0o755)
    assert ["status"] == bash(script, str(program), "stat", directory=tmp_path)
    found = bash(script, str(program), "delete", "--d", directory=tmp_path)
    assert ["--dry-run"] == found
    assert not asked.exists()
    found = bash(script, str(program), "delete", "/mnt/d", "mo", directory=tmp_path)
    assert ["monday"] == found
    assert "completion|--for=snapshot|--|mo|delete|/mnt/d|" == asked.read_text()
    program.write_text("#!/bin/sh\nexit 5\n")
    found = bash(script, str(program), "show", "ask", directory=tmp_path)
    assert ["asked"] == found, "files, where there are no names"
