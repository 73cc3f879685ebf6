"""Checksums of points: the file, and what a newer point leaves of an older one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapfs.backup.sums import (
    PIECE_BYTES,
    UNIT_BYTES,
    Unit,
    damaged,
    digest_of,
    dump,
    left_of,
    load,
    spans,
    unit_of,
)
from snapfs.errors import BackupError, KeyRefused

DIGEST = digest_of(b"x")
UNITS = [Unit(0, 10, DIGEST), Unit(10, 1 << 40, None), Unit((1 << 40) + 10, 5, DIGEST)]


def test_what_is_stored_is_read_again():
    assert UNITS == load(dump(UNITS), (1 << 40) + 15, "x.sums")
    assert [] == load(b"", 0, "x.sums")


@pytest.mark.parametrize(
    "text",
    [
        b"0 10",
        b"0 10 zero more",
        b"-1 10 zero",
        b"0 0 zero",
        b"0 10 " + DIGEST.upper().encode(),
        b"0 10 zero\n9 1 zero",
        b"0 101 zero",
        b"0 10 zero\n\n20 10 zero",
        b"00 10 zero",
    ],
)
def test_everything_else_is_refused(text):
    with pytest.raises(BackupError, match=r"x\.sums: line"):
        load(text, 100, "x.sums")
    with pytest.raises(BackupError):
        load(dump([Unit(0, UNIT_BYTES + 1, DIGEST)]), 1 << 30, "x.sums")


def units_of(pairs: list[tuple[int, int]]) -> list[Unit]:
    """Units from gaps and lengths."""
    units, end = [], 0
    for gap, length in pairs:
        units.append(Unit(end + gap, length, DIGEST))
        end += gap + length
    return units


def test_the_spans_of_a_file_are_merged():
    units = [unit_of(5, b"ab"), unit_of(7, b"c"), Unit(8, 4, None), unit_of(20, b"d")]
    assert [(5, 8, True), (8, 12, False), (20, 21, True)] == list(spans(dump(units)))
    assert [] == list(spans(b""))


PAIRS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 8)), max_size=12)


@given(PAIRS, PAIRS, st.integers(0, 120))
def test_what_is_left_is_all_that_is_below_and_in_nothing_newer(old, new, size):
    old_units, new_units = units_of(old), [each for each in units_of(new) if each.stop <= size]
    covered = {offset for unit in new_units for offset in range(unit.start, unit.stop)}
    expected = [
        offset
        for unit in old_units
        for offset in range(unit.start, min(unit.stop, size))
        if offset not in covered
    ]
    parts = list(left_of(old_units, new_units, size))
    assert expected == [offset for part in parts for offset in range(part.start, part.stop)]
    for part in parts:
        assert part.unit.start <= part.start < part.stop <= part.unit.stop
        assert part.whole == (part.stop - part.start == part.unit.length)


@given(st.integers(0, 3 * PIECE_BYTES), st.integers(1, 4 * PIECE_BYTES), st.data())
def test_damage_is_found_to_the_piece(start, length, data):
    content = bytearray(b"0123456789" * (length // 10 + 1))[:length]
    unit = unit_of(start, content)
    assert [unit] == load(dump([unit]), start + length, "x.sums")
    assert [] == damaged(unit, content)
    spoilt = data.draw(st.integers(0, length - 1))
    content[spoilt] ^= 1
    ((first, stop),) = damaged(unit, content)
    assert first <= start + spoilt < stop
    assert stop - first <= PIECE_BYTES
    assert [(start, start + length)] == damaged(unit._replace(pieces=None), content)


def test_a_line_has_a_checksum_for_each_of_its_pieces():
    unit = unit_of(PIECE_BYTES - 1, b"ab")
    assert 8 == len(unit.pieces)
    with pytest.raises(BackupError, match="1 pieces"):
        load(dump([unit._replace(pieces=unit.pieces[:4])]), 1 << 20, "x.sums")


def test_keyed_checksums_tell_nothing_without_the_secret():
    content = bytes(range(256)) * 1024
    first, second = unit_of(5, content, b"a" * 64), unit_of(5, content, b"b" * 64)
    assert first.digest != second.digest
    assert first.pieces != second.pieces != unit_of(5, content).pieces
    assert [first] == load(dump([first]), 1 << 30, "here")
    assert [] == damaged(first, content, b"a" * 64)
    with pytest.raises(KeyRefused):
        damaged(first, content)
    spoilt = bytearray(content)
    spoilt[PIECE_BYTES] ^= 1
    expected = damaged(unit_of(5, content), spoilt)
    assert 1 == len(expected)
    assert expected == damaged(first, spoilt, b"a" * 64)
    assert [] == damaged(unit_of(5, content), content, b"a" * 64)
