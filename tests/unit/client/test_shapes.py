"""Whatever answers for a mount, the others are shown, and nothing reaches the terminal by it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from snapfs.cli import main, metrics, report
from snapfs.cli.listing import list_row
from snapfs.cli.terminal import Painter
from snapfs.client import everywhere, shapes
from snapfs.client.mountinfo import Mount
from snapfs.client.older import complete_status
from snapfs.errors import NotMounted
from tests.support.answers import SECOND, snapshot, status

ESCAPE = "\x1b]0;x\x07"
BITMAP = {"name": "b", "inconsistent": False, "count": 65536, "reason": None}
PROBLEM = {"severity": "error", "kind": "lost", "message": "it is", "remedy": "none"}
JUNK = (None, True, -1, 1 << 70, float("nan"), "", "x", "\ud800", [], [1], [[]], {}, {"a": 1})


def good() -> dict[str, Any]:
    return complete_status(status(snapshot(1, "s"), bitmaps=[BITMAP], problems=[PROBLEM]))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where there is something in a document, the whole of it first."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def changed(value: Any, path: tuple[Any, ...], other: Any) -> Any:
    """A document with something else there."""
    if not path:
        return other
    copy = value.copy()
    copy[path[0]] = changed(value[path[0]], path[1:], other)
    return copy


def answering(monkeypatch: pytest.MonkeyPatch, *answers: Any) -> None:
    """There are mounts whose daemons give these answers."""
    found = [
        Mount(n, 1, f"0:{n}", "/", f"/m{n}", "fuse.snapfs", "i", 1) for n in range(len(answers))
    ]

    class Client:
        def __init__(self, mount: Mount) -> None:
            self._answer = answers[mount.id]

        def __enter__(self) -> Client:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def be_patient(self, _seconds: float) -> None:
            pass

        def call(self, _command: str) -> Any:
            return self._answer

    monkeypatch.setattr(everywhere, "Client", Client)
    monkeypatch.setattr(everywhere, "mounts", lambda: found)


def test_what_has_the_right_shape_can_be_shown_and_nothing_else_passes():
    now = report.current()
    for path in places(good()):
        for other in JUNK:
            answer = changed(good(), path, other)
            if shapes.fits(answer, shapes.STATUS):
                text = "\n".join(report.report(answer, Painter(False), None, now))
                assert text.replace("\n", "").isprintable()
                list(metrics.families({"/m": answer}, {}))
                [list_row(each) for each in answer["snapshots"]]


def test_the_answer_of_a_daemon_passes():
    assert shapes.fits(good(), shapes.STATUS)
    assert shapes.fits({"snapshots": good()["snapshots"]}, shapes.LIST)
    assert not shapes.fits({"snapshots": [{"name": "s"}]}, shapes.LIST)
    escaped = snapshot(1, "s", created=SECOND.format(1).replace("T", "\x1b"))
    assert not shapes.fits({"snapshots": [escaped | {"note": None, "pinned": False}]}, shapes.LIST)


@pytest.mark.parametrize("bad", [{}, [], {"snapshots": [1]}, {"mount": {}, "snapshots": [{}]}])
def test_one_that_is_no_snapfs_does_not_hide_the_others(monkeypatch, capsys, bad):
    answering(monkeypatch, bad, json.loads(json.dumps(good())))
    (_, first), (_, second) = everywhere.ask("status")
    assert isinstance(first, NotMounted)
    assert isinstance(second, dict)
    for command in ("list", "status"):
        assert 5 == main([command])
        assert "s" in capsys.readouterr().out
    assert 3 == main(["metrics"])
    assert 'snapfs_up{mountpoint="/m0"} 0.0' in capsys.readouterr().out


def test_no_name_moves_the_cursor(monkeypatch, capsys):
    answer = good()
    answer["snapshots"][0] |= {"name": ESCAPE, "note": ESCAPE, "state": ESCAPE}
    answer["problems"] = [dict.fromkeys(PROBLEM, ESCAPE)]
    answer["mount"] |= {"durability": ESCAPE, "mountpoint": ESCAPE}
    answering(monkeypatch, answer)
    for command in ("list", "status"):
        main([command])
        found = capsys.readouterr()
        assert "\x1b" not in found.out + found.err
