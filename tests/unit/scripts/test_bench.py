"""scripts/bench: which rows are measured, between whom, and what the numbers say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))

from benchmarks import comparing
from benchmarks.builds import Build, Failed
from benchmarks.images import Images
from benchmarks.rows import measurements
from benchmarks.work import Bench


@pytest.fixture
def rows(tmp_path):
    return measurements(Bench(Images(tmp_path, 1 << 20), Build(tmp_path / "this")))


def test_rows_are_chosen_by_parts_of_their_names(rows):
    assert rows == comparing.chosen(rows, [])
    assert {} == comparing.chosen(rows, ["no such row"])
    found = comparing.chosen(rows, ["tmpfs: first", "resident"])
    assert [
        "tmpfs: first writes 1 MiB",
        "tmpfs: first writes 4 KiB, depth 16",
        "resident memory",
    ] == list(found)


def test_a_row_for_each_number_of_jobs_file_system_and_crowd(rows):
    for part in ("2 jobs, depth 1", "4 jobs, depth 1", "4 jobs, depth 16", "tmpfs", "XFS", "btrfs"):
        assert 2 <= len(comparing.chosen(rows, [part]))
    for part in ("257 snapshots", "1000 snapshots"):
        assert [part] == list(comparing.chosen(rows, [part]))


def test_beside_another_build_each_serves_what_is_compared(rows, tmp_path):
    other = Build(tmp_path / "other")
    others = measurements(Bench(Images(tmp_path, 1 << 20), other))
    both, left_out = comparing.beside(rows, others)
    assert set(rows) == {*both, *left_out}
    assert 4 == len(left_out)
    for title, (unit, sides) in both.items():
        assert rows[title][0] == unit
        assert ["other", "this"] == [label for label, _, _ in sides]
        assert [others[title][1][-1][1:], rows[title][1][-1][1:]] == [side[1:] for side in sides]


def test_a_patched_daemon_is_of_its_own_build():
    python, _, code = Build(Path("/that")).patched("os.x = 1")
    assert Path("/that/.venv/bin/python") == python
    assert "snapfs.state" not in str(code)  # which an older build does not have
    assert "os.x = 1" in str(code)


def test_a_ratio_is_of_the_two_numbers_of_a_round():
    values = {"other": [10.0, 100.0, 20.0], "this": [20.0, 100.0, 10.0]}
    assert [2.0, 1.0, 0.5] == comparing.ratios(values)
    assert [] == comparing.ratios({"this": [1.0]})
    assert [3.0] == comparing.ratios({"QEMU": [0.0, 1.0], "snapfs": [1.0, 3.0]})  # no division by 0


def test_what_is_printed_and_kept_of_a_row():
    values = {"other": [10.0, 100.0, 20.0], "this": [20.0, 100.0, 10.0]}
    text = comparing.line("a row", "1/s", values)
    assert ["a", "row", "1/s"] == text.split()[:3]
    assert text.endswith("other 20.0   this 20.0   ratio 1.00 (0.50 to 2.00)")
    assert comparing.line("a", "s", {"snapfs": [1.0]}).endswith("  s   snapfs 1.0")
    kept = json.loads(json.dumps(comparing.result("a row", "1/s", values)))
    assert {"other": 20.0, "this": 20.0} == kept["medians"]
    assert [2.0, 1.0, 0.5] == kept["ratios"]
    assert values == kept["values"]


def test_a_directory_that_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(Failed, match="no checkout of snapfs"):
        Build(tmp_path).bootstrap()
