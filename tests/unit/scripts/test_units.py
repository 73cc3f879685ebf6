"""The units for systemd, as it reads them itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from snapfs.cli.parser import build_parser
from snapfs.errors import ExitCode
from tests.support.mounted import PATIENCE

UNITS = Path(__file__).parents[3] / "scripts/systemd"
PROGRAM = "/usr/local/bin/snapfs"
INSTANCES = [path.name.replace("@.", "@a.") for path in sorted(UNITS.iterdir())]


def value(unit: str, key: str) -> list[str]:
    lines = (UNITS / unit).read_text().splitlines()
    return [line.partition("=")[2] for line in lines if line.startswith(f"{key}=")]


def in_shell(command: str, program: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command line of a unit, but for systemd's own expansions."""
    line = command.removeprefix("-").replace("$$", "$").replace(PROGRAM, str(program))
    return subprocess.run(
        ["sh", "-c", line], capture_output=True, text=True, timeout=PATIENCE, check=False,
        env={"PATH": os.environ["PATH"], **variables},
    )  # fmt: skip


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Stands for snapfs, and says what it was told."""
    path = tmp_path / "snapfs"
    path.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    path.chmod(0o755)
    return path


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("unit", INSTANCES)
def test_systemd_takes_the_unit(unit, tmp_path, program):
    for path in UNITS.iterdir():
        (tmp_path / path.name).write_text(path.read_text().replace(PROGRAM, str(program)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / unit],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )  # fmt: skip
    ours = [line for line in done.stderr.splitlines() if "snapfs" in line]
    assert (0, []) == (done.returncode, ours), done.stderr


@pytest.mark.parametrize("unit", [path.name for path in sorted(UNITS.glob("*.service"))])
def test_its_commands_are_ones_that_there_are(unit):
    parser, _ = build_parser()
    for line in value(unit, "ExecStart") + value(unit, "ExecStop"):
        for words in re.findall(rf"{PROGRAM} ([^']*)", line):
            arguments = words.replace("$KEEP", "--keep-daily 7").split()
            assert parser.parse_args(arguments).run, words


def test_what_was_unmounted_in_another_way_does_not_come_back():
    codes = value("snapfs@.service", "RestartPreventExitStatus")[0].split()
    assert {str(int(ExitCode.NOT_STORED)), str(int(ExitCode.USAGE))} == set(codes)
    assert ["on-failure"] == value("snapfs@.service", "Restart")
    assert str(int(ExitCode.ERROR)) not in codes


def test_a_stop_waits_for_those_who_use_the_mount(program):
    (stop,) = value("snapfs@.service", "ExecStop")
    done = in_shell(stop, program, MAINPID="123", MOUNTPOINT="/srv/a b")
    assert (0, "umount|--wait|45|--|/srv/a b|") == (done.returncode, done.stdout)


def test_the_mount_of_a_dead_daemon_is_not_taken_away(program):
    (stop,) = value("snapfs@.service", "ExecStop")
    done = in_shell(stop, program, MOUNTPOINT="/srv/a")
    assert (0, "") == (done.returncode, done.stdout)


def test_what_runs_from_the_mount_is_ordered_behind_it():
    assert {"libvirtd.service", "virtqemud.service", "libvirt-guests.service"} <= set(
        value("snapfs@.service", "Before")[0].split()
    )


def test_the_default_rules_of_the_backup_are_rules():
    text = value("snapfs-backup@.service", "Environment")[0].strip('"')
    key, _, rules = text.partition("=")
    assert "KEEP" == key
    parsed = build_parser()[0].parse_args(["prune", "/backup/a", *rules.split()])
    assert (7, 4, 12) == (parsed.keep_daily, parsed.keep_weekly, parsed.keep_monthly)


def test_a_failed_backup_starts_what_says_so():
    assert ["snapfs-backup-failed@%i.service"] == value("snapfs-backup@.service", "OnFailure")
    assert any(
        "--priority=alert" in line for line in value("snapfs-backup-failed@.service", "ExecStart")
    )


def test_a_failed_backup_is_mailed_where_there_is_a_mail(tmp_path):
    mailed = tmp_path / "mailed"
    for name, text in (
        ("mail", f'printf "%s|" "$@" >{mailed}; cat >>{mailed}'),
        ("systemctl", 'echo "status of $3"'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    line = value("snapfs-backup-failed@.service", "ExecStart")[-1].replace("%i", "a")
    assert 0 == in_shell(line, Path("unused")).returncode
    assert not mailed.exists()
    done = in_shell(line, Path("unused"), PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert 0 == done.returncode, done.stderr
    assert "-s|snapfs: the backup of a has failed|root|status of snapfs-backup@a.service\n" == (
        mailed.read_text()
    )
