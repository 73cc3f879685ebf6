"""Metrics: what Prometheus reads is what the mounts and backups said."""

from __future__ import annotations

import builtins
import re
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from snapfs.cli import metrics
from snapfs.errors import SnapfsError
from tests.support.answers import problem, snapshot, status

ALERTS = Path(__file__).parents[3] / "man" / "snapfs-alerts.yml"

BITMAPS = [
    {"name": "b", "count": 65536, "inconsistent": False},
    {"name": "old", "count": 0, "inconsistent": True},
]
POINTS = [
    {"time": "2026-11-28T00:00:00Z", "verified": {"good": False}},
    {"time": "2026-11-30T00:00:00Z", "verified": None},
]


def told(mounts, backups=None) -> dict[tuple[str, ...], float]:
    """Samples as Prometheus reads them, by name and values of labels."""

    class Collector:
        def collect(self):
            return metrics.families(mounts, backups or {})

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())
    text = generate_latest(registry).decode()
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation.endswith("."), family.name
        for sample in family.samples:
            labels = dict(sample.labels)
            first = [labels.pop(name) for name in ("mountpoint", "directory") if name in labels]
            key = (sample.name, *first, *(labels[name] for name in sorted(labels)))
            assert key not in found
            found[key] = sample.value
    return found


def test_a_mount_in_numbers():
    answer = status(
        snapshot(1, "a"), snapshot(2, 'b"\\', state="lost", clusters={"lost": 7}),
        bitmaps=BITMAPS, problems=[problem(), problem("warning", "temp-space"), problem()],
        mount={"healthy": False},
    )  # fmt: skip
    found = told({"/mnt/d": answer})
    for key, value in {
        "snapfs_up": 1, "snapfs_healthy": 0, "snapfs_temp_bytes": 8 << 20,
        "snapfs_temp_limit_bytes": 16 << 20, "snapfs_temp_room_bytes": 8 << 20,
        "snapfs_temp_full_seconds": 7200, "snapfs_cbw_copies_total": 130,
        "snapfs_cbw_seconds_sum": 0.2, "snapfs_cbw_seconds_count": 100,
        "snapfs_write_errors_total": 0, "snapfs_fastpath_share": 0.75, "snapfs_open_writers": 1,
        "snapfs_start_time_seconds": 1796007600,
    }.items():  # fmt: skip
        assert value == found[key, "/mnt/d"], key
    assert (60, 98, 100) == tuple(
        found["snapfs_cbw_seconds_bucket", "/mnt/d", bound] for bound in ("0.001", "0.003", "+Inf")
    )
    assert (1, 0, 1) == tuple(
        found["snapfs_snapshots", "/mnt/d", state] for state in metrics.STATES
    )
    assert 1 == found["snapfs_snapshot_state", "/mnt/d", 'b"\\', "lost"]
    assert 7 == found["snapfs_lost_clusters", "/mnt/d", 'b"\\']
    assert 65536 == found["snapfs_bitmap_dirty_bytes", "/mnt/d", "b"]
    assert ("snapfs_bitmap_dirty_bytes", "/mnt/d", "old") not in found
    assert 1 == found["snapfs_bitmap_inconsistent", "/mnt/d", "old"]
    assert 1 == found["snapfs_problem", "/mnt/d", "lost", "error"]


def test_what_is_not_known_is_left_out():
    counters = {**status()["counters"], "reads": 0, "writes": 0, "snapshot_reads": 0}
    temp = {"limit_bytes": None, "seconds_left": None}
    found = told({"/a": status(counters=counters, temp=temp), "/b\udcff": None})
    names = {key[0] for key in found}
    assert not names & {"snapfs_temp_limit_bytes", "snapfs_temp_full_seconds",
                        "snapfs_fastpath_share"}  # fmt: skip
    assert (1, 0) == (found["snapfs_up", "/a"], found["snapfs_up", "/b?"])
    assert ("snapfs_healthy", "/b?") not in found


def test_backups():
    found = told({}, {"/backup/d": POINTS, "/backup/gone": None, "/backup/new": []})
    assert (1, 0, 1) == tuple(
        found["snapfs_backup_up", f"/backup/{name}"] for name in ("d", "gone", "new")
    )
    assert (2, 1, 1795996800) == tuple(
        found[f"snapfs_backup_{name}", "/backup/d"]
        for name in ("points", "damaged_points", "newest_seconds")
    )
    assert ("snapfs_backup_newest_seconds", "/backup/new") not in found


def test_every_alert_is_about_a_metric_that_there_is():
    answer = status(snapshot(1, "a"), bitmaps=BITMAPS, problems=[problem()])
    known = {key[0] for key in told({"/mnt/d": answer}, {"/backup/d": POINTS})}
    rules = re.findall(r"^ +expr: (.*)$", ALERTS.read_text(), re.MULTILINE)
    assert len(rules) >= 6
    for rule in rules:
        used = set(re.findall(r"snapfs_\w+", rule))
        assert used and used <= known, rule


def test_without_the_library_the_remedy_is_named(monkeypatch):
    real = builtins.__import__

    def missing(name, *arguments):
        if name.startswith("prometheus_client"):
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(SnapfsError, match=f"{sys.executable} -m pip install prometheus-client"):
        metrics.library()
