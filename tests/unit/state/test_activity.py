"""The record of activity: every prefix of the stores of a change can be judged."""

from __future__ import annotations

import itertools
import mmap
import os
from pathlib import Path
from typing import Any

import pytest

from snapfs.errors import StateError
from snapfs.state import witness
from snapfs.state.activity import Activity
from snapfs.state.activitywords import (
    FAILED,
    FILE_BYTES,
    SESSION,
    UNDER_WAY,
    storable,
    words_of,
)
from snapfs.state.manifest import ImageStamp

SESSION_A, SESSION_B = 11, 22


class Stores:
    """The words of a record; keeps what the page was after each store."""

    def __init__(self, page: Any) -> None:
        self._words = words_of(page)
        self._page = page
        self.pages = [bytes(page)]

    def __getitem__(self, index: int) -> int:
        return self._words[index]

    def __setitem__(self, index: int, value: int) -> None:
        self._words[index] = value
        self.pages.append(bytes(self._page))


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(b"x" * 5000)
    return path


def stamp_of(path: Path) -> ImageStamp:
    with open(path, "rb") as file:
        return ImageStamp.of(str(path), file.fileno())


def judged(page: bytes, known: ImageStamp, path: Path, session: int = SESSION_A) -> str | None:
    copy = mmap.mmap(-1, FILE_BYTES)
    copy[:] = page
    return Activity(copy, -1).change_since(session, known, stamp_of(path))


def write(path: Path, data: bytes = b"y", offset: int = 0) -> None:
    before = os.stat(path).st_mtime_ns
    while os.stat(path).st_mtime_ns == before:  # coarse clocks
        with open(path, "r+b") as file:
            os.pwrite(file.fileno(), data, offset)


@pytest.fixture
def recording(image):
    """A record of a mount that has begun, and the manifest's stamp."""
    with open(image, "r+b") as file:
        activity = Activity(mmap.mmap(-1, FILE_BYTES), file.fileno())
        activity.prepare()
        activity.begin(SESSION_A)
        yield activity, stamp_of(image)


def test_every_prefix_of_a_change_tells_ours_from_somebody_elses(recording, image):
    activity, known = recording
    write(image)  # ours, and noted
    activity.started()
    activity.finished()
    activity._words = stores = Stores(activity.page)
    before = len(stores.pages)
    for number in range(3):
        activity.started()
        if number == 1:
            activity.started()  # two at once
            activity.finished()
        write(image, b"z", 6000 * number)
        activity.finished()
    pages = stores.pages[before - 1 :]
    assert 12 < len(pages)
    assert judged(pages[-1], known, image) is None
    under_way = [words_of(bytearray(page))[UNDER_WAY] for page in pages]
    write(image, b"behind our back")
    for page, busy in zip(pages, under_way, strict=True):
        change = judged(page, known, image)
        assert change is not None
        assert bool(busy) == ("writes were under way" in change)


def test_a_change_whose_end_was_noted_is_ours_at_every_store(recording, image):
    """With the image as it was when the stores of the end began."""
    activity, known = recording
    activity.started()
    write(image)
    activity._words = stores = Stores(activity.page)
    activity.finished()
    *torn, last = stores.pages
    assert judged(last, known, image) is None
    for page in torn:  # then the witness notes it; without one it is in doubt
        change = judged(page, known, image)
        assert change is None or "writes were under way" in change
        copy = bytearray(page)
        with open(image, "rb") as file:
            witness.bear_witness(words_of(copy), file.fileno(), SESSION_A)
        assert judged(bytes(copy), known, image) is None


def test_every_prefix_of_the_beginning_leaves_the_evidence_of_the_manifest(image):
    """The manifest has the session already; the record is that of the mount before."""
    with open(image, "r+b") as file:
        activity = Activity(mmap.mmap(-1, FILE_BYTES), file.fileno())
        activity.prepare()
        activity.begin(SESSION_A)
        activity.started()
        write(image)
        known = stamp_of(image)
        activity._words = stores = Stores(activity.page)
        activity.begin(SESSION_B)
        for page in stores.pages:
            assert judged(page, known, image, SESSION_B) is None
        write(image, b"behind our back")
        for page in stores.pages:
            assert judged(page, known, image, SESSION_B) is not None


def test_no_record_is_no_record(image):
    with pytest.raises(StateError, match="no record"):
        judged(bytes(FILE_BYTES), stamp_of(image), image)
    activity = Activity(mmap.mmap(-1, FILE_BYTES), -1)
    activity.prepare()
    assert judged(bytes(activity.page[:]), stamp_of(image), image) is None  # of no mount


def test_what_failed_is_kept_until_the_next_beginning(recording):
    activity, _ = recording
    activity.fail(5)
    assert 5 == activity.failed()
    activity.begin(SESSION_B)
    assert 0 == activity.failed()


# The witness


def test_the_witness_notes_what_was_under_way_and_attributes(recording, image):
    activity, known = recording
    words = words_of(activity.page)
    with open(image, "rb") as file:
        activity.started()
        write(image)
        witness.bear_witness(words, file.fileno(), SESSION_A)
        assert (0, None) == (words[UNDER_WAY], judged(activity.page[:], known, image))
        os.chmod(image, 0o640)
        assert "ctime" in str(judged(activity.page[:], known, image))
        witness.bear_witness(words, file.fileno(), SESSION_A)
        assert judged(activity.page[:], known, image) is None


def test_the_witness_notes_nothing_of_somebody_elses(recording, image):
    activity, known = recording
    before = activity.page[:]
    with open(image, "rb") as file:
        write(image)  # nothing is under way
        witness.bear_witness(words_of(activity.page), file.fileno(), SESSION_A)
        assert before == activity.page[:]
        assert judged(activity.page[:], known, image) is not None
        activity.started()
        before = activity.page[:]
        witness.bear_witness(words_of(activity.page), file.fileno(), SESSION_B)  # another mount
        assert before == activity.page[:]


@pytest.mark.parametrize("index", [SESSION, UNDER_WAY, FAILED])
def test_a_word_is_one_store(index):
    """All 8 bytes at once, aligned: what `words_of` gives writes nothing else."""
    page = bytearray(b"\xaa" * FILE_BYTES)
    words_of(page)[index] = 0
    found = [number for number, byte in enumerate(page) if byte != 0xAA]
    assert list(itertools.chain(range(8 * index, 8 * index + 8))) == found


@pytest.mark.parametrize(
    ("time_ns", "word"),
    [
        (0, 0),
        (-1, -1),
        ((1 << 63) - 1, (1 << 63) - 1),
        (1 << 63, (1 << 63) - 1),
        (-(1 << 63), -(1 << 63)),
        (-(1 << 90), -(1 << 63)),
    ],
)
def test_a_time_that_no_word_holds_is_at_the_end_of_time(time_ns, word):
    assert word == storable(time_ns)
