"""What an interrupted full point says of itself, whatever became of its last lines."""

from __future__ import annotations

import pytest

from snapfs.backup.sums import Unit, unit_of
from snapfs.backup.unfinished import Ledger
from snapfs.errors import BackupError

K64 = 1 << 16
SIZE = 10 * K64
UNITS = [unit_of(0, b"a" * K64), Unit(K64, K64, None), unit_of(2 * K64, b"b" * K64)]


@pytest.fixture
def path(tmp_path):
    where = str(tmp_path / "ledger")
    with Ledger(where, SIZE) as ledger:
        assert (0, []) == (ledger.position, ledger.units)
        ledger.append(2 * K64, UNITS[:2])
        ledger.append(3 * K64, UNITS[2:])
        assert (3 * K64, UNITS) == (ledger.position, ledger.units)
    return where


def test_it_is_read_as_it_was_written_and_goes_on(path):
    with Ledger(path, SIZE) as ledger:
        assert (3 * K64, UNITS) == (ledger.position, ledger.units)
        ledger.append(SIZE, [])
    with Ledger(path, SIZE) as ledger:
        assert (SIZE, UNITS) == (ledger.position, ledger.units)


def test_it_never_goes_back(path):
    with Ledger(path, SIZE) as ledger:
        ledger.append(K64, [UNITS[0]])
        ledger.append(3 * K64, [UNITS[0]])
        assert (3 * K64, UNITS) == (ledger.position, ledger.units)


def test_of_every_torn_ledger_what_is_whole_counts(path, tmp_path):
    with open(path, "rb") as file:
        data = file.read()
    first = data.index(b"at ")
    whole = data.index(b"\n", first) + 1
    torn = str(tmp_path / "torn")
    for length in range(len(data)):
        for tail in (b"", bytes(len(data) - length)):
            with open(torn, "wb") as file:
                file.write(data[:length] + tail)
            with Ledger(torn, SIZE) as ledger:
                expected = (2 * K64, UNITS[:2]) if length >= whole else (0, [])
                assert expected == (ledger.position, ledger.units), (length, tail)
                ledger.append(SIZE, UNITS[2:])
            with Ledger(torn, SIZE) as ledger:
                assert SIZE == ledger.position


def test_lines_that_are_not_those_of_their_mark_count_for_nothing(path):
    with open(path, "r+b") as file:
        data = file.read()
        file.seek(data.rindex(b"131072"))
        file.write(b"131073")
    with Ledger(path, SIZE) as ledger:
        assert (2 * K64, UNITS[:2]) == (ledger.position, ledger.units)


def test_a_position_beyond_the_image_counts_for_nothing(path):
    with Ledger(path, 2 * K64) as ledger:
        assert 2 * K64 == ledger.position


def test_checksums_that_make_no_sense_are_an_error(tmp_path):
    where = str(tmp_path / "ledger")
    with Ledger(where, SIZE) as ledger:
        ledger.append(K64, [UNITS[0], UNITS[0]])
    with pytest.raises(BackupError, match="overlaps"):
        Ledger(where, SIZE)
