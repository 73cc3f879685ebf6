"""A stream comes out as it went in, or it is broken; there is nothing in between."""

from __future__ import annotations

import io
import os

import pytest

from snapfs.backup.stream import MAGIC, Reader, StreamTarget
from snapfs.backup.sums import UNIT_BYTES
from snapfs.errors import BackupError, StreamBroken
from tests.support.streams import incoming, moment, stream

SIZE = 40_000
CHANGES = [(0, b"a" * 1000), (1000, 3000), (4000, b"b" * 36_000)]


def found(data: bytes) -> list[tuple[int, bytes | int]]:
    return [
        (record.offset, bytes(record.data) or record.length) for record in Reader(incoming(data))
    ]


def test_what_is_sent_arrives():
    base = moment(0, SIZE)
    whole = stream(moment(1, SIZE), CHANGES)
    assert CHANGES == found(whole)
    some = stream(moment(1, SIZE), CHANGES[1:2], base=base)
    assert CHANGES[1:2] == found(some)
    assert [] == found(stream(moment(1, SIZE), [], base=base))
    assert [] == found(stream(moment(1, 0), []))
    header = Reader(incoming(some)).header
    assert (moment(1, SIZE), base) == (header.moment, header.base)


def test_long_data_is_several_records():
    data = os.urandom(2 * UNIT_BYTES + 1)
    parts = found(stream(moment(1, len(data)), [(0, data)]))
    assert [0, UNIT_BYTES, 2 * UNIT_BYTES] == [offset for offset, _ in parts]
    assert data == b"".join(part for _, part in parts)


def test_wherever_it_is_cut_it_is_not_whole():
    data = stream(moment(1, 300), [(0, b"a" * 100), (100, 200)])
    for length in range(len(data)):
        with pytest.raises(StreamBroken):
            found(data[:length])


def test_whatever_byte_of_it_changes_nothing_is_taken_from_there_on():
    changes = [(0, b"a" * 100), (100, 100), (200, b"c" * 100)]
    data = stream(moment(1, 300), changes)
    for position in range(len(data)):
        broken = bytearray(data)
        broken[position] ^= 1 << position % 8
        with pytest.raises(StreamBroken):
            found(bytes(broken))
        good = []
        try:
            for record in Reader(incoming(bytes(broken))):
                good.append((record.offset, bytes(record.data) or record.length))
        except StreamBroken:
            pass
        assert good == changes[: len(good)]


def test_no_record_can_be_missing_twice_or_elsewhere():
    parts = [stream(moment(1, 300), [(0, 100)][:count], base=moment(0, 300)) for count in (0, 1)]
    done = len(parts[0]) - parts[0].index(b"DONE")
    head, record = parts[0][:-done], parts[1][len(parts[0]) - done :]
    assert [(0, 100)] == found(head + record)
    for wrong in (head + parts[1][-done:], head + record[:-done] * 2 + record[-done:]):
        with pytest.raises(StreamBroken):
            found(wrong)


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ([(0, b"a" * 100)], 0),  # ends too early
        ([(0, b"a" * 100), (200, 100)], 0),  # a gap
        ([(100, 200)], 0),  # begins too late
        ([(0, 200), (100, 200)], 0),  # overlaps
        ([(0, 400)], 0),  # beyond the end
        ([(0, 300)], 100),  # before it begins
    ],
)
def test_a_stream_of_everything_has_everything_once(changes, start):
    with pytest.raises(StreamBroken):
        found(stream(moment(1, 300), changes, start=start))


def test_what_is_no_stream_is_not_taken_for_one():
    for data, words in (
        (b"", "no stream came"),
        (b"hello, world: no stream", "no stream of snapfs"),
        (MAGIC[:5], "no stream of snapfs"),
        (MAGIC.replace(b"1", b"9") + b"x" * 100, "another version"),
    ):
        with pytest.raises(StreamBroken, match=words):
            Reader(incoming(data))


def test_when_nobody_reads_it_says_where_to_look():
    reader, writer = os.pipe()
    os.close(reader)
    header = Reader(incoming(stream(moment(1, 0), []))).header
    with pytest.raises(BackupError, match="receive --state"):
        StreamTarget(writer, header)
    os.close(writer)


def test_what_follows_is_seen():
    reader = Reader(io.BytesIO(stream(moment(1, 0), []) + b"x"))
    assert [] == list(reader)
    assert not reader.is_at_end()
