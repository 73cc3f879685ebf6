"""Answers of a daemon to status and regions, for what prints and draws them."""

from __future__ import annotations

from typing import Any

MIB = 1 << 20
CLUSTER = 1 << 16
SECOND = "2026-11-30T{:02}:00:00.000000Z"


def snapshot(number: int, name: str, **changes: Any) -> dict[str, Any]:
    """A snapshot of 1000 clusters, taken at that hour."""
    clusters = {"total": 1000, "accessible": 900, "copied": 5, "lost": 0, "discarded": 100}
    clusters |= changes.pop("clusters", {})
    return {
        "name": name, "id": number, "created": SECOND.format(number), "size": 1000 * CLUSTER,
        "state": "ok", "reason": None, "errno": None, "since": None, "clusters": clusters,
        "temp_bytes": 5 * CLUSTER, "open": 1, "bitmap": None, **changes,
    }  # fmt: skip


def status(*snapshots: dict[str, Any], **changes: dict[str, Any]) -> dict[str, Any]:
    """A mount since three o'clock, half of whose temp space is used."""
    answer: dict[str, Any] = {
        "image": {"path": "/vm/disk.img", "size": 1000 * CLUSTER, "cluster_size": CLUSTER},
        "mount": {
            "mountpoint": "/mnt/d", "pid": 4711, "since": SECOND.format(3), "healthy": True,
            "reason": None, "durability": "process", "fastpath": True,
        },
        "snapshots": list(snapshots),
        "bitmaps": [],
        "temp": {
            "directory": "/vm/disk.img.snapfs", "used_bytes": 8 * MIB, "limit_bytes": 16 * MIB,
            "room_bytes": 8 * MIB, "warning_percent": None, "seconds_left": 7200,
            "bytes_per_second": MIB, "age_seconds": 0.1,
        },
        "copies": {
            "count": 100, "seconds": 0.2,
            "buckets": [[0.0001, 0], [0.0003, 0], [0.001, 60], [0.003, 98], [0.01, 99],
                        [0.03, 100], [0.1, 100], [0.3, 100], [1.0, 100], [3.0, 100],
                        [10.0, 100], [None, 100]],
        },
        "counters": {
            "reads": 10, "writes": 20, "snapshot_reads": 10, "discards": 1,
            "discarded_bytes": 100 * CLUSTER, "cbw_copies": 130, "cbw_bytes": 8 * MIB,
            "cbw_seconds": 0.2, "cbw_errors": 0, "frozen_waits": 0, "write_errors": 0,
            "fastpath_requests": 30, "fastpath_reads": 10, "fastpath_writes": 10,
            "fastpath_snapshot_reads": 10,
        },
        "open": {"readers": 2, "writers": 1},
        "problems": [],
    }  # fmt: skip
    for part, values in changes.items():
        answer[part] = {**answer[part], **values} if isinstance(values, dict) else values
    return answer


def problem(severity: str = "error", kind: str = "lost", words: str = "2 are lost") -> Any:
    """Something that is wrong."""
    return {"severity": severity, "kind": kind, "message": words, "remedy": "delete them"}


def regions(count: int = 8, **kinds: dict[int, int]) -> dict[str, Any]:
    """So many regions of 10 clusters; of each kind the clusters by region, and `reads`."""
    values = {
        kind: [kinds.get(kind, {}).get(region, 0) for region in range(count)]
        for kind in ("needed", "copied", "dirty", "discarded", "lost", "reads")
    }
    reads = values.pop("reads")
    return {
        "size": count * 10 * CLUSTER, "region_size": 10 * CLUSTER, "cluster_size": CLUSTER,
        "clusters": values, "reads": reads,
    }  # fmt: skip
