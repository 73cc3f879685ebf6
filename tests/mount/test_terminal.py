"""Commands on a terminal: progress, colours, Ctrl-C; and completion in real shells."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mounted import MIB, PATIENCE, SNAPFS, Mounted, run
from tests.support.terminal import COLOUR, Terminal

pytestmark = pytest.mark.mount


@pytest.fixture
def disk(mount) -> Mounted:
    disk = mount(b"o" * (9 * MIB))
    disk.create("monday")
    return disk


def copying(disk: Mounted, *arguments: str) -> list[str | Path]:
    return [*SNAPFS, "copy", disk.mountpoint, "monday", disk.image.parent / "copy", *arguments]


@pytest.mark.parametrize("columns", [6, 30, 54, 80, 200])
def test_progress_is_one_line_of_a_terminal_however_narrow(disk, columns):
    with Terminal(copying(disk, "--bwlimit", "1G"), columns=columns) as terminal:
        assert 0 == terminal.finish()
        shown = [line for line in terminal.lines() if " %" in line]
        assert shown
        assert max(map(len, shown)) <= columns
        assert "100 %" in shown[-1]
        assert " MB" not in terminal.plain()
        done = terminal.plain().rsplit(" %", 1)[1].replace("\r\n", "\n")
        assert "9 MiB copied" in " ".join(done.split())


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
)
def test_colours_are_for_who_wants_them(disk, environment, coloured):
    with Terminal(copying(disk), **environment) as terminal:
        assert 0 == terminal.finish()
        assert coloured == bool(COLOUR.search(terminal.text)), terminal.text


def test_ctrl_c_ends_a_copy_and_says_how_to_go_on(disk):
    with Terminal(copying(disk, "--bwlimit", "1")) as terminal:
        terminal.read_until("0 %")
        terminal.type("\x03")
        assert 130 == terminal.finish()
        said = [line for line in terminal.lines() if "interrupted" in line]
        assert ["snapfs: interrupted; the same command goes on where it was"] == said
    run(*copying(disk))


def test_errors_and_tables_have_neither_colours_nor_escapes(disk):
    for arguments in (["list", disk.mountpoint], ["show", disk.mountpoint, "none"], ["sattus"]):
        with Terminal([*SNAPFS, *arguments]) as terminal:
            terminal.finish()
            assert "\x1b" not in terminal.text


def test_a_signal_has_a_line_printed(disk):
    reader, writer = os.pipe()
    with subprocess.Popen(
        [*map(str, copying(disk, "--bwlimit", "1", "--progress", str(writer)))],
        stderr=subprocess.PIPE, text=True, pass_fds=[writer],
    ) as process:  # fmt: skip
        os.close(writer)
        assert b"0/100\n" == os.read(reader, 100)
        process.send_signal(signal.SIGUSR1)
        assert process.stderr is not None
        assert "snapfs: monday: 0 %, 0 B of 9 MiB, 0 B/s\n" == process.stderr.readline()
        process.terminate()
        assert "goes on where it was" in process.communicate(timeout=PATIENCE)[1]
    os.close(reader)
    assert 130 == process.returncode


# Completion

SHELL_SETUP = {
    "bash": ["bash", "--norc", "-i"],
    "zsh": ["zsh", "-f", "-i"],
}


@pytest.fixture
def scripts(tmp_path, monkeypatch) -> Path:
    """The scripts, and snapfs in the path."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for shell in ("bash", "zsh", "fish"):
        text = run(*SNAPFS, "completion", shell).stdout
        (tmp_path / f"completion.{shell}").write_text(text)
    return tmp_path


def typed(shell: str, scripts: Path, line: str, wanted: str) -> None:
    """Type a line in an interactive shell, and TAB, until it shows what is wanted."""
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    begin = {
        "bash": f"PS1='ready> '; bind 'set enable-bracketed-paste off'; "
        f"source {scripts}/completion.bash\r",
        "zsh": "PS1='ready> '; unsetopt zle_bracketed_paste; autoload -U compinit; "
        f"compinit -u -D; "
        f'eval "$(<{scripts}/completion.zsh)"\r',
    }[shell]
    with Terminal(SHELL_SETUP[shell], columns=200, HOME=str(scripts)) as terminal:
        terminal.type(begin)
        terminal.type("echo be''gun\r")
        terminal.read_until("begun")
        terminal.text = ""
        terminal.type(line + "\t")
        terminal.read_until(wanted)


@pytest.mark.parametrize("shell", SHELL_SETUP)
def test_a_shell_completes_live_names(shell, disk, scripts):
    disk.snapfs("bitmap", "add", disk.mountpoint, "bees")
    for line, wanted in (
        ("snapfs stat", "snapfs status"),
        (f"snapfs show {disk.mountpoint} mon", f"{disk.mountpoint} monday"),
        (f"snapfs bitmap clear {disk.mountpoint} be", f"{disk.mountpoint} bees"),
        (f"snapfs list {str(disk.mountpoint)[:-2]}", f"snapfs list {disk.mountpoint}"),
        ("snapfs delete --dry", "--dry-run"),
    ):
        typed(shell, scripts, line, wanted)


def test_fish_completes_live_names(disk, scripts):
    if shutil.which("fish") is None:
        pytest.skip("needs fish")
    disk.snapfs("bitmap", "add", disk.mountpoint, "bees")

    def completed(line: str) -> list[str]:
        code = f"source {scripts}/completion.fish; complete -C {line!r}"
        done = subprocess.run(
            ["fish", "--no-config", "-c", code], capture_output=True, text=True,
            timeout=PATIENCE, check=True, env={**os.environ, "HOME": str(scripts)},
        )  # fmt: skip
        return [re.split(r"\t", word)[0] for word in done.stdout.splitlines()]

    assert ["monday"] == completed(f"snapfs show {disk.mountpoint} ")
    assert ["bees"] == completed(f"snapfs bitmap clear {disk.mountpoint} ")
    assert ["bees"] == completed(f"snapfs create {disk.mountpoint} x --bitmap ")
    assert str(disk.mountpoint) in completed("snapfs list ")
    assert ["status"] == completed("snapfs stat")
