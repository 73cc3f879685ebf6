"""How fast a copy goes when it is told."""

from __future__ import annotations

from typing import Any

from snapfs.backup import copying
from snapfs.backup.copying import Copying
from snapfs.backup.plan import Kind
from snapfs.backup.sums import UNIT_BYTES


class Memory:
    """Source and target of a copy."""

    def read(self, start: int, length: int) -> bytearray:
        return bytearray(b"x" * length)

    def write(self, offset: int, data: memoryview) -> None:
        pass


def test_a_copy_waits_before_each_piece_for_the_time_that_it_may_take(monkeypatch):
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(copying.time, "monotonic", lambda: now)
    monkeypatch.setattr(copying.time, "sleep", sleep)
    memory: Any = Memory()
    after: list[float] = []
    copy = Copying(
        memory, memory, durable=lambda _: None, progress=lambda _: after.append(now),
        bytes_per_second=UNIT_BYTES // 4,
    )  # fmt: skip
    plan: Any = [(0, 2 * UNIT_BYTES + UNIT_BYTES // 2, Kind.DATA)]
    copy.copy(plan)
    assert [4, 8, 10] == after
