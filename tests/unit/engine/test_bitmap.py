from __future__ import annotations

import mmap
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapfs.engine import bitmap
from snapfs.engine.bitmap import Bitmap, buffer_size

LENGTH = 77
ranges = st.tuples(st.integers(0, LENGTH), st.integers(0, LENGTH)).map(sorted)


@given(st.lists(st.tuples(st.booleans(), ranges)), ranges, st.booleans(), st.sampled_from((5, 999)))
def test_against_a_list(steps, within, value, counted):
    bits, model = Bitmap(LENGTH), [False] * LENGTH
    for on, (first, stop) in steps:
        (bits.set if on else bits.clear)(first, stop)
        model[first:stop] = [on] * (stop - first)
    first, stop = within
    part = model[first:stop]
    assert model == [bits.get(index) for index in range(LENGTH)]
    assert any(part) == bits.any(first, stop)
    assert all(part) == bits.all(first, stop)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitmap, "COUNTED", counted)
        assert sum(part) == bits.count(first, stop)
    found = list(bits.runs(first, stop, value))
    assert [index for index in range(first, stop) if model[index] == value] == [
        index for start, end in found for index in range(start, end)
    ]
    assert all(before[1] < after[0] for before, after in pairwise(found))


def test_bits_are_numbered_from_the_least_significant_one():
    buffer = bytearray(2)
    Bitmap(16, buffer).set(0, 1)
    Bitmap(16, buffer).set(9, 10)
    assert b"\x01\x02" == buffer


def test_a_mapped_file_is_taken_over_and_let_go():
    mapping = mmap.mmap(-1, 4096)
    mapping[0] = 0b101
    bits = Bitmap(3, mapping)
    assert [True, False, True] == [bits.get(index) for index in range(3)]
    with pytest.raises(BufferError):
        mapping.close()
    bits.release()
    mapping.close()


def test_a_short_buffer_is_refused():
    assert 2 == buffer_size(9)
    with pytest.raises(ValueError, match="needs 2 bytes"):
        Bitmap(9, bytearray(1))


def test_what_grows_is_clear():
    bits = Bitmap(3)
    bits.set(0, 3)
    bits.grow(9)
    bits.grow(2)
    assert (9, 3) == (len(bits), bits.count())
