"""Of which directory a bitmap is, from its name."""

from __future__ import annotations

import pytest

from snapfs.backup import chain, known

TOKEN = "0123456789ab"
TIME = "2026-11-02T12:00:00Z"


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def directory(tmp_path):
    return chain.init(str(tmp_path / "backup"))


def name(directory: chain.Directory, token: str = TOKEN) -> str:
    return directory.chain.prefix + token


def test_a_bitmap_of_something_else_is_of_no_directory():
    assert None is known.about("mine")
    assert None is known.about("backup-mine")


def test_what_was_noted_is_found(directory, tmp_path):
    known.note(directory, TOKEN, TIME)
    expected = {"id": directory.chain.id, "directory": directory.path, "time": TIME, "there": True}
    assert expected == known.about(name(directory))
    other = chain.init(str(tmp_path / "other"))
    known.note(other, "f" * 12, TIME)
    assert expected == known.about(name(directory))
    (tmp_path / "backup").rename(tmp_path / "away")
    assert {**expected, "there": False} == known.about(name(directory))
    (tmp_path / "other").rename(tmp_path / "backup")  # another disk is mounted there
    assert {**expected, "there": False} == known.about(name(directory))


def test_only_bitmaps_that_can_be_there_are_remembered(directory):
    known.note(directory, TOKEN, TIME)
    known.note(directory, "f" * 12, TIME)
    assert known.about(name(directory))["time"] is None
    assert TIME == known.about(name(directory, "f" * 12))["time"]


def test_without_the_file_nothing_is_known_and_nothing_fails(directory, home):
    unknown = {"id": directory.chain.id, "directory": None, "time": None, "there": False}
    assert unknown == known.about(name(directory))
    home.mkdir()
    (home / "snapfs").write_text("in the way")
    known.note(directory, TOKEN, TIME)
    assert unknown == known.about(name(directory))
    (home / "snapfs").unlink()
    (home / "snapfs").mkdir()
    (home / "snapfs" / known.NAME).write_text("{")
    assert unknown == known.about(name(directory))
    known.note(directory, TOKEN, TIME)
    assert TIME == known.about(name(directory))["time"]
