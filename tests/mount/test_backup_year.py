"""Some weeks of backups in a minute; a year of them is scripts/soak --year."""

from __future__ import annotations

import pytest

from tests.support.year import Year

pytestmark = [pytest.mark.mount, pytest.mark.slow, pytest.mark.timeout(2400)]


def test_weeks_of_backups_with_everything_that_happens_in_a_year(tmp_path):
    year = Year.begin(tmp_path, seed=1)
    try:
        for number in range(0, 28, 7):  # each of the two disks twice
            year.day(number, busy=0.5)
            disk = year.disks[number // 7 % 2]
            year.happen(disk, "send", "kill_restore", "jump")
            year.backup(disk, step=25)
            year.prune(disk, step=15)
            year.fill(disk)
            year.kill_daemon()
            year.hour(disk)
            if number >= 14:
                year.damage(disk)
                year.hour(disk)
            year.week(disk)
        year.close()
    finally:
        year.end()
    assert year.totals["points"] > 16
    for what in ("restores", "backups killed", "daemons killed", "disks full", "files damaged",
                 "points pruned", "points verified", "sent"):  # fmt: skip
        assert year.totals[what], (what, year.totals)
