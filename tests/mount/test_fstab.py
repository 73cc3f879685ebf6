"""Lines of fstab, by mount(8), findmnt(8) and the generator of systemd."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.installed import installed
from tests.support.mounted import PATIENCE

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif("os.geteuid()", reason="mount(8) with helpers of our own takes root"),
]

GENERATOR = Path("/usr/lib/systemd/system-generators/systemd-fstab-generator")
MAN = Path(__file__).parents[2] / "man"

# Options, and what the generator makes of them: lines of the unit, files that it makes.
LINES = {
    "defaults": ("defaults", [], ["local-fs.target.requires/{unit}"]),
    "before": (
        "allow_other,x-systemd.before=libvirtd.service", ["Before=libvirtd.service"], [],
    ),
    "nofail": ("nofail,x-systemd.before=libvirtd.service", ["Before=libvirtd.service"],
               ["local-fs.target.wants/{unit}"]),
    "noauto": ("noauto", [], []),
    "temp": ("temp-dir={top}/temp,x-systemd.requires-mounts-for={top}/temp",
             ["RequiresMountsFor={top}/temp"], []),
    "automount": ("noauto,x-systemd.automount,x-systemd.idle-timeout=10min", [],
                  ["local-fs.target.requires/{automount}"]),
    "device timeout": ("_netdev,x-systemd.mount-timeout=30", ["TimeoutSec=30s"], []),
    "user": ("user,noauto,nosuid,nodev", [], []),
}  # fmt: skip


@pytest.fixture
def line(tmp_path: Path):
    """A file with one line, and its fields."""
    (tmp_path / "a.img").write_bytes(b"abc")
    (tmp_path / "mnt").mkdir()
    (tmp_path / "temp").mkdir()

    def write(options: str) -> str:
        options = options.format(top=tmp_path)
        text = f"{tmp_path}/a.img {tmp_path}/mnt snapfs {options} 0 0\n"
        (tmp_path / "fstab").write_text(text)
        return options

    return write


@pytest.mark.parametrize("kind", LINES)
def test_mount_takes_the_line(kind, line, tmp_path):
    line(LINES[kind][0])
    done = installed(
        """
        findmnt --verify --tab-file fstab >verified 2>&1 || true
        mount -T fstab mnt
        findmnt -no FSTYPE,SOURCE mnt
        cat mnt/active
        umount mnt
        ! findmnt mnt
        test "$(pgrep -cf "snapfs.*$PWD/mnt")" = 0
        """,
        tmp_path,
    )
    assert f"fuse.snapfs {tmp_path}/a.img\nabc" == done.stdout.strip()
    verified = (tmp_path / "verified").read_text()
    assert "[E]" not in verified
    assert "parse error" not in verified.replace("0 parse errors", "")


def test_all_lines_are_mounted_at_once(line, tmp_path):
    line("defaults")
    done = installed(
        """
        mount -a -T fstab
        mount -a -T fstab   # once more: it is mounted
        findmnt -nlo TARGET -t fuse.snapfs
        umount -a -t fuse.snapfs
        """,
        tmp_path,
    )
    assert str(tmp_path / "mnt") in done.stdout.split()


@pytest.mark.skipif(not GENERATOR.exists(), reason="needs systemd")
@pytest.mark.parametrize("kind", LINES)
def test_systemd_makes_units_of_the_line(kind, line, tmp_path):
    options, lines, files = LINES[kind]
    given = line(options)
    units = tmp_path / "units"
    units.mkdir()
    subprocess.run(
        [GENERATOR, units, units, units], check=True, timeout=PATIENCE,
        env={**os.environ, "SYSTEMD_FSTAB": str(tmp_path / "fstab"), "SYSTEMD_LOG_TARGET": "null"},
    )  # fmt: skip
    unit = run_escape(tmp_path / "mnt")
    text = (units / unit).read_text()
    assert "Type=snapfs" in text
    if given != "defaults":
        assert f"Options={given}" in text
    for each in lines:
        assert each.format(top=tmp_path) in text
    for each in files:
        name = each.format(unit=unit, automount=unit.replace(".mount", ".automount"))
        assert (units / name).is_symlink(), sorted(units.rglob("*"))
    if shutil.which("systemd-analyze"):
        checked = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", units / unit],
            capture_output=True, text=True, timeout=PATIENCE, check=False,
            env={**os.environ, "SYSTEMD_UNIT_PATH": f"{units}:"},
        )  # fmt: skip
        assert 0 == checked.returncode, checked.stderr


def run_escape(path: Path) -> str:
    done = subprocess.run(
        ["systemd-escape", "--path", "--suffix=mount", path],
        capture_output=True, text=True, check=True, timeout=PATIENCE,
    )  # fmt: skip
    return done.stdout.strip()


def test_the_lines_of_the_manual_are_among_those_that_were_tried():
    text = (MAN / "mount.snapfs.8").read_text().replace("\\-", "-")
    written = re.findall(r"^/\S+ /\S+ snapfs (\S+) 0 0$", text, re.MULTILINE)
    assert len(written) > 2
    tried = {re.sub(r"=[^,]*", "", options) for options, *_ in LINES.values()}
    for options in written:
        assert re.sub(r"=[^,]*", "", options) in tried, options
