"""What a long job says of itself: per cent, one kind of unit, and never more than a line."""

from __future__ import annotations

import io
import json

import pytest
from attrs import frozen
from rich.console import Console

from snapfs.backup import progress
from snapfs.backup.bar import Line, glyphs
from snapfs.backup.progress import Progress

MIB = 1 << 20


class Task:
    """What rich tells a column, half-way."""

    description = "backup"
    total, completed = 8192.0 * MIB, 4096.0 * MIB
    speed = 100.0 * MIB


@frozen
class Wanted:
    progress_fd: int | None = None
    json: bool = False
    quiet: bool = False


def shown(width: int, task: object = Task()) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(Line(lambda: width).render(task))  # type: ignore[arg-type]
    return capture.get()


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (6, " 50 %"),
        (16, "backup   50 %"),
        (30, "backup   50 %  100 MiB/s"),
        (36, "backup   50 %  100 MiB/s  0:41 left"),
        (54, "backup   50 %  100 MiB/s  0:41 left  4 GiB of 8 GiB"),
        (80, "backup  " + "━" * 10 + " " * 10 + "   50 %  100 MiB/s  0:41 left  4 GiB of 8 GiB"),
    ],
)
def test_a_terminal_gets_what_fits_into_one_line(width, line):
    assert f"{line}\n" == shown(width)


def test_no_width_makes_it_two_lines():
    for width in range(5, 120):
        assert 1 == shown(width).count("\n"), width
        assert len(shown(width).rstrip("\n")) <= width


def test_before_anything_is_known_there_is_no_rate():
    class Beginning(Task):
        completed, speed = 0.0, None

    assert "backup    0 %  0 B of 8 GiB\n" == shown(40, Beginning())


def test_a_plain_line_has_per_cent_and_one_kind_of_unit(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress("backup", 1000 * MIB, Wanted()) as job:
        now[0] += 100
        job.advance(250 * MIB)
    said = capsys.readouterr().err
    assert "snapfs: backup: 25 %, 250 MiB of 1000 MiB, 2.5 MiB/s, 300 s left\n" == said


def test_a_line_of_json_says_of_which_command_it_is(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress("monday", 4, Wanted(json=True), "copy") as job:
        now[0] += 2
        job.advance(1)
    line = json.loads(capsys.readouterr().out)
    assert "copy" == line["output_version"]["command"]
    assert ("status", "monday", 1) == (line["message_type"], line["what"], line["bytes_done"])


@pytest.mark.parametrize(
    ("encoding", "colour", "made_of"),
    [("utf-8", True, ("━", "━")), ("utf-8", False, ("━", " ")), ("latin-1", False, ("-", " "))],
)
def test_a_terminal_without_colours_or_unicode_has_a_bar_all_the_same(encoding, colour, made_of):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, force_terminal=True, color_system="standard", no_color=not colour)
    assert made_of == glyphs(console)
