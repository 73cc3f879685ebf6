"""Running out of file descriptors: refused in words before, survived with those set aside."""

from __future__ import annotations

import errno
import os

import pytest

from snapfs.errors import LimitReached
from snapfs.storage import descriptors
from snapfs.storage.descriptors import KEPT, Reserve


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) - 1


def failing(*numbers: int):
    """A call that fails with each of these errors, and then answers how many are open."""
    left = list(numbers)

    def call() -> int:
        if left:
            raise OSError(left.pop(0), "no")
        return open_descriptors()

    return call


def test_what_is_set_aside_serves_calls_that_find_none():
    reserve = Reserve(3)
    before = open_descriptors()
    assert before - 2 == reserve.serve(failing(errno.EMFILE, errno.ENFILE))
    assert (3, before) == (reserve.left, open_descriptors())
    reserve.close()
    assert before - 3 == open_descriptors()


@pytest.mark.parametrize("numbers", [[errno.ENOSPC], [errno.EMFILE] * 4])
def test_other_errors_and_the_end_of_the_reserve_are_told(numbers):
    reserve = Reserve(3)
    with pytest.raises(OSError) as failure:
        reserve.serve(failing(*numbers))
    assert (numbers[0], 3) == (failure.value.errno, reserve.left)
    reserve.close()


def test_what_would_leave_too_few_is_refused_with_numbers_and_remedy(monkeypatch):
    used = descriptors.in_use()
    monkeypatch.setattr(descriptors, "limit", lambda: used + KEPT + 5)
    descriptors.check(4, "that")
    with pytest.raises(LimitReached) as refused:
        descriptors.check(9, "that")
    for word in ("that needs 9", f"of {used + KEPT + 5}", "LimitNOFILE=", "ulimit", "fs.nr_open"):
        assert word in str(refused.value)


def test_mappings_are_bounded_too():
    descriptors.check_mappings(15_000, "that")
    with pytest.raises(LimitReached, match=r"vm\.max_map_count"):
        descriptors.check_mappings(1 << 31, "that")


def test_the_count_is_right_on_older_kernels_too(monkeypatch):
    new = descriptors.in_use()
    real = os.stat
    sizeless = os.stat_result((0,) * 10)
    monkeypatch.setattr(
        os, "stat", lambda path, **how: sizeless if path == "/proc/self/fd" else real(path, **how)
    )
    assert abs(new - descriptors.in_use()) <= 1  # that of the look itself


def test_errors_say_what_helps():
    assert "LimitNOFILE=" in descriptors.explain(OSError(errno.EMFILE, "x"))
    assert "fs.file-max" in descriptors.explain(OSError(errno.ENFILE, "x"))
