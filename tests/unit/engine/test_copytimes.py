"""Times of copies, and writes that failed: what status and metrics tell of them."""

from __future__ import annotations

import errno
import math
import re
from pathlib import Path

import pytest
import trio

from snapfs.engine.copytimes import BOUNDS, CopyTimes, within
from snapfs.engine.counters import Counters
from snapfs.engine.regions import REGIONS
from snapfs.engine.writefailures import PAST_SECONDS, WriteFailures
from tests.support.fakes import Bench, pattern
from tests.support.images import CLUSTER

TALLY = Path(__file__).parents[3] / "snapfs" / "port" / "tally.c"


def test_a_time_counts_up_to_its_bound():
    times = CopyTimes()
    for seconds in (0.0, 0.0001, 0.00011, 10.0, 10.1, 1e9):
        times.note(seconds)
    assert [2, 1, *[0] * 8, 1, 2] == times.counts
    times.add([1] * 12)
    assert (18, len(BOUNDS) + 1) == (sum(times.counts), len(times.counts))


def test_what_share_was_within_which_time():
    counts = [0, 50, 49, *[0] * 8, 1]
    assert (0.0003, 0.001, math.inf) == tuple(within(counts, share) for share in (0.5, 0.99, 1.0))
    assert within([0] * 12, 0.5) is None


def test_native_code_has_the_same_numbers():
    text = TALLY.read_text()
    numbers = re.search(r"bounds\[\] = \{(.*?)\}", text, re.DOTALL)
    assert numbers
    found = [int(word) / 1e9 for word in numbers[1].split(",") if word.strip()]
    assert list(BOUNDS) == found
    assert f"REGIONS = {REGIONS}," in text


async def test_copies_are_timed_if_they_land():
    async with trio.open_nursery() as nursery:
        it = Bench.make(nursery, pattern(1, 8 * CLUSTER))
        layer = await it.engine.create_snapshot("s")
        await it.engine.write(0, b"x" * 2 * CLUSTER)
        assert 1 == sum(it.engine.copier.times.counts)
        it.store.temp(layer).fail("pwrite", "copy_to")
        await it.engine.write(4 * CLUSTER, b"x")
        assert 1 == sum(it.engine.copier.times.counts)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("kind", ["write", "punch", "zero", "allocate", "resize"])
async def test_a_change_of_active_that_fails_is_counted(kind):
    async with trio.open_nursery() as nursery:
        it = Bench.make(nursery, pattern(1, 8 * CLUSTER))
        calls = {
            "write": lambda: it.engine.write(0, b"x"),
            "punch": lambda: it.engine.punch(0, CLUSTER),
            "zero": lambda: it.engine.zero(0, CLUSTER),
            "allocate": lambda: it.engine.allocate(0, CLUSTER, True),
            "resize": lambda: it.engine.resize(CLUSTER),
        }
        await calls[kind]()
        assert (0, None) == (it.engine.counters.write_errors, it.engine.write_failures.newest)
        it.image.fail("pwrite", "punch", "zero", "allocate", "truncate", errno=errno.ENOSPC)
        if kind == "resize":
            calls[kind] = lambda: it.engine.resize(2 * CLUSTER)
        with pytest.raises(OSError):
            await calls[kind]()
        assert 1 == it.engine.counters.write_errors
        assert it.engine.write_failures.newest is not None
        assert errno.ENOSPC == it.engine.write_failures.newest.errno
        nursery.cancel_scope.cancel()


def test_failures_are_past_when_others_wrote_for_a_while_without_one():
    now, counters = 0.0, Counters()
    failures = WriteFailures(counters, lambda: now)
    assert not failures.present

    def fail() -> None:
        with pytest.raises(OSError), failures:
            raise OSError(errno.ENOSPC, "no space left")

    fail()
    assert failures.present
    now = 2 * PAST_SECONDS
    assert failures.present  # nobody writes any more: the guest may have given up
    counters.writes += 1
    assert not failures.present
    fail()
    counters.writes += 1
    assert failures.present  # it is not long ago
    now *= 2
    assert not failures.present
    with failures:
        pass
    with pytest.raises(ValueError), failures:
        raise ValueError
    with pytest.raises(OSError), failures:
        raise OSError(errno.EOPNOTSUPP, "no such fallocate here")
    assert 2 == counters.write_errors
