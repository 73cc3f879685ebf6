"""What status tells people: what is wrong first, and as wide as the terminal is."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from snapfs.cli import report, terminal
from snapfs.cli.status import exit_status
from snapfs.cli.terminal import Painter
from tests.support.answers import MIB, problem, snapshot, status

NOW = datetime(2026, 11, 30, 18, tzinfo=UTC)


def lines(answer, width=None, colour=False, users=()) -> list[str]:
    return list(report.report(answer, Painter(colour), width, NOW, users))


def text(answer, **options) -> str:
    return "\n".join(lines(answer, **options))


def test_a_healthy_mount():
    found = text(status(snapshot(5, "monday")), users=["qemu (process 7)"])
    assert found.startswith("/mnt/d: healthy\n")
    for words in (
        "/vm/disk.img, 62.5 MiB, clusters of 64 KiB", "for 15 h, since 2026-11-30 03:00:00Z",
        "process 4711", "8 MiB of 16 MiB (50 %), limit 16 MiB", "grows by 1 MiB/s, full in 2 h",
        "130 clusters, 8 MiB, 2 ms for one copy on average, 50 % within 1 ms, 99 % within 10 ms",
        "75 % on the fast path", "1 for writing, 2 for reading; by qemu (process 7)",
    ):  # fmt: skip
        assert words in found.replace("\n            ", " "), words
    assert "monday  13 h  ok       <1 %      90 %       10 %   0 %  320 KiB     1" in found


def test_what_is_wrong_comes_first_with_what_to_do():
    answer = status(
        mount={"healthy": False},
        problems=[problem(words="1 is lost"), problem("warning", "temp-space", "it is full soon")],
    )
    assert [
        "/mnt/d: NOT HEALTHY", "  error: 1 is lost", "    what to do: delete them",
        "  warning: it is full soon", "    what to do: delete them",
    ] == lines(answer)[:5]  # fmt: skip


@pytest.mark.parametrize("width", [1, 10, 20, 30, 40, 60, 79, 80, 100, 200])
def test_no_line_is_wider_than_the_terminal(width):
    answer = status(
        *(snapshot(number, f"a-rather-long-name-{number}") for number in range(5)),
        mount={"healthy": False}, problems=[problem(words="word " * 30)],
        bitmaps=[{"name": "b" * 60, "inconsistent": False, "count": MIB, "reason": None}],
    )  # fmt: skip
    assert max(map(len, lines(answer, width=width)[1:])) <= max(width, report.NARROWEST)


def test_columns_go_before_rows_are_cut():
    table = list(report.snapshot_table([snapshot(1, "monday")], Painter(False), 30, NOW))
    assert "NAME     AGE  STATE     TEMP" == table[0]
    assert all(len(line) <= 8 for line in
               report.snapshot_table([snapshot(1, "monday")], Painter(False), 8, NOW))  # fmt: skip


def test_many_snapshots_are_not_all_shown():
    found = lines(status(*(snapshot(1, f"s{number}") for number in range(1000))))
    assert len(found) < 40
    assert "and 980 older ones; snapfs list shows all" == found[-1]


def test_colours_only_where_they_are_wanted():
    answer = status(snapshot(1, "s", state="lost"), mount={"healthy": False}, problems=[problem()])
    assert "\x1b" not in text(answer)
    assert "\x1b[31;1mNOT HEALTHY\x1b[0m" in text(answer, colour=True)
    lost = [line for line in lines(answer, colour=True) if "lost" in line and "0 %" in line]
    assert lost[0].startswith("\x1b[31m")


@pytest.mark.parametrize(
    ("choice", "no", "force", "tty", "wanted"),
    [
        ("auto", None, None, True, True),
        ("auto", None, None, False, False),
        ("auto", "1", None, True, False),
        ("auto", "1", "1", True, False),
        ("auto", "", "1", False, True),
        ("always", "1", None, False, True),
        ("never", None, "1", True, False),
    ],
)
def test_who_says_whether_there_are_colours(monkeypatch, choice, no, force, tty, wanted):
    class Stream:
        def isatty(self):
            return tty

    monkeypatch.setenv("TERM", "xterm")
    for name, value in (("NO_COLOR", no), ("FORCE_COLOR", force)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert wanted == terminal.wants_colour(choice, Stream())


def test_names_do_not_move_the_cursor():
    answer = status(
        snapshot(1, "ü\u202e"), image={"path": "/vm/\x1b[2J\n.img"}, mount={"mountpoint": "/m\a"}
    )
    found = text(answer)
    assert r"/vm/\x1b[2J\x0a.img" in found
    assert r"/m\x07" in found
    assert "ü" in found
    assert not {letter for letter in found if not letter.isprintable()} - {"\n"}
    assert "\udcff" == terminal.printable("\udcff")  # a byte of a file name


@pytest.mark.parametrize(
    ("kinds", "code"),
    [
        ([], 0),
        (["lost"], 4),
        (["incomplete", "bitmaps"], 4),
        (["bitmaps"], 6),
        (["bitmaps", "guest-writes"], 1),
        (["temp-space", "lost"], 1),
    ],
)
def test_the_exit_status_is_that_of_the_worst_problem(kinds, code):
    problems = [problem(kind=kind) for kind in kinds] + [problem("warning", "internal")]
    assert code == exit_status(status(problems=problems))


def test_numbers_in_words():
    assert ["0 s", "119 s", "2 min", "119 min", "2 h", "2 d"] == [
        report.duration(length) for length in (0, 119, 120, 7140, 7200, 172800)
    ]
    assert ["50 us", "1 ms", "1.5 ms", "1 s", "more than 10 s"] == [
        report.seconds(length) for length in (5e-5, 0.00099999, 0.0015, 0.9999, None)
    ]
    assert "0 s" == report.age("2026-11-30T18:00:09.000000Z", NOW)
    assert "[##########..........]" == report.bar(50, 20)
    assert "[....]" == report.bar(0, 4) and "[####]" == report.bar(200, 4)


def test_nothing_has_happened_yet():
    none = {"count": 0, "seconds": 0.0, "buckets": [[None, 0]]}
    counters = dict.fromkeys(status()["counters"], 0)
    temp = {"limit_bytes": None, "used_bytes": 0, "room_bytes": 0, "seconds_left": None,
            "bytes_per_second": 0}  # fmt: skip
    found = text(status(copies=none, counters=counters, temp=temp))
    assert "Copies      none yet" in found
    assert "none on the fast path" in found
    assert "0 B of 0 B (100 %), which is what is free, in" in found
    assert "Snapshots   none" in found
