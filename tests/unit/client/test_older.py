"""Daemons of earlier versions: what they do not say does no harm."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import pytest

from snapfs.backup import pruning, source
from snapfs.backup.retention import Policy
from snapfs.cli import metrics, picture, report, watch
from snapfs.cli.listing import list_row
from snapfs.cli.status import exit_status
from snapfs.cli.terminal import Painter
from snapfs.client.mountinfo import Mount
from snapfs.client.older import complete_list, complete_status
from tests.support.answers import regions, snapshot, status


def first_version(*snapshots: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The answer to status of version 0.1.0 before it knew problems."""
    answer = json.loads(json.dumps(status(*snapshots, **changes)))
    for key in ("problems", "copies", "open"):
        del answer[key]
    del answer["mount"]["since"], answer["temp"]["bytes_per_second"]
    del answer["counters"]["write_errors"]
    for each in answer["snapshots"]:
        del each["open"]
    return answer


@pytest.mark.parametrize(
    ("state", "healthy", "inconsistent", "code"),
    [
        ("ok", True, False, 0),
        ("ok", False, False, 1),
        ("lost", True, False, 4),
        ("incomplete", True, True, 4),
        ("ok", True, True, 6),
    ],
)
def test_what_is_wrong_follows_from_the_rest(state, healthy, inconsistent, code):
    bitmaps = [{"name": "b", "inconsistent": inconsistent, "count": 0, "reason": "it was cut"}]
    old = first_version(snapshot(1, "s", state=state), bitmaps=bitmaps)
    old["mount"]["healthy"] = healthy
    answer = complete_status(old)
    assert code == exit_status(answer)
    assert answer["mount"]["healthy"] == (code == 0)


def test_everything_that_shows_it_can():
    answer = complete_status(first_version(snapshot(1, "s")))
    now = report.current()
    assert "for ?, since ?" in "\n".join(report.report(answer, Painter(False), None, now))
    assert "<svg" in picture.svg(answer, regions(), now.isoformat())
    assert list(metrics.families({"/mnt/d": answer}, {}))
    looks = watch.Looks()
    looks.add(answer, regions(), 1.0)
    assert list(watch.screen(looks, 80, 24))


def test_what_a_daemon_says_stays():
    answer = status(snapshot(1, "s"), mount={"healthy": False})
    before = json.loads(json.dumps(answer))
    found = complete_status(answer)
    before["snapshots"][0] |= {"note": None, "pinned": False}
    assert before == found


def test_the_list_of_an_older_daemon_is_printed():
    found = complete_list({"snapshots": first_version(snapshot(1, "s"))["snapshots"]})
    assert ("s", "ok", "") == (
        list_row(found["snapshots"][0])[0],
        *list_row(found["snapshots"][0])[-2:],
    )


class OldDaemon:
    """Takes the place of `Client`: an earlier version, with two snapshots."""

    deleted: ClassVar[list[str]] = []

    def __init__(self, _mountpoint: object) -> None:
        self._snapshots = first_version(snapshot(1, "a-1"), snapshot(2, "a-2"))["snapshots"]

    def __enter__(self) -> OldDaemon:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def call(self, command: str, **arguments: Any) -> dict[str, Any]:
        if command == "delete":
            self.deleted.append(arguments["name"])
        return {"snapshots": self._snapshots, "snapshot": self._snapshots[0], "image": {}}


def test_snapshots_of_an_older_daemon_are_pruned_and_copied(monkeypatch, tmp_path):
    """Every night, also after the update."""
    monkeypatch.setattr(OldDaemon, "deleted", [])
    monkeypatch.setattr(pruning, "Client", OldDaemon)
    options = pruning.PruneOptions(Policy(last=1), "a-*", say=str)
    assert [] == pruning.prune_snapshots("/mnt/d", options)["failed"]
    assert ["a-1"] == OldDaemon.deleted
    monkeypatch.setattr(source, "Client", OldDaemon)
    mount = Mount(1, 0, "0:99", "/", "/mnt/d", "fuse.snapfs", "i", 0)
    monkeypatch.setattr(source.mountinfo, "split", lambda _path: (mount, "snapshots/a-1"))
    (tmp_path / "a-1").touch()
    opened = source.Source(str(tmp_path / "a-1"), discard=True)
    assert not opened.described["pinned"]
    opened.close()
