"""What is counted since the mount."""

from __future__ import annotations

from attrs import define


@define
class Counters:
    """Totals since the mount, for status."""

    reads: int = 0
    writes: int = 0
    snapshot_reads: int = 0
    discards: int = 0
    discarded_bytes: int = 0
    cbw_copies: int = 0
    cbw_bytes: int = 0
    cbw_seconds: float = 0.0
    cbw_errors: int = 0
    frozen_waits: int = 0
    write_errors: int = 0  # of `active`: what a guest was told
