"""What snapfs-send(1) says of other machines and programs, typed in as it stands."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.support.installed import installed

pytestmark = [
    pytest.mark.mount,
    pytest.mark.slow,
    pytest.mark.skipif("os.geteuid()", reason="they mount file systems"),
]

PAGE = Path(__file__).parents[2] / "man/snapfs-send.1"

MACHINE = """
mount -t tmpfs -o mode=755 snapfs-srv /srv
mount -t tmpfs -o mode=755 snapfs-mnt /mnt
mount -t tmpfs -o mode=755 snapfs-media /media
mkdir -p /mnt/d /srv/there /srv/bin /media/usb
cat >/srv/bin/ssh <<'END'
#!/bin/sh
shift
cd /srv/there
exec "$@"
END
chmod +x /srv/bin/ssh
export PATH=/srv/bin:$PATH HOME=/srv
cd /srv
head -c 3000000 /dev/urandom >disk.img
truncate -s 8M disk.img
snapfs mount disk.img /mnt/d
change() { head -c 70000 /dev/urandom | dd of=/mnt/d/active bs=64k seek=$1 conv=notrunc; }
"""


def blocks(title: str) -> list[str]:
    """What is between .nf and .fi in a part of the page, as it is to be typed."""
    text = re.split(r"^\.S[SH] ", PAGE.read_text().split(f'.SS "{title}"\n')[1], flags=re.M)[0]
    found = re.findall(r"^\.nf\n(.*?)^\.fi$", text, re.MULTILINE | re.DOTALL)
    return [each.replace("\\-", "-").replace("\\e", "\\") for each in found]


def test_each_night_the_other_machine_gets_what_changed_wherever_it_was_interrupted(tmp_path):
    once, nightly = blocks("An image on another machine")
    script = f"""
{once}
cat >nightly <<'END'
{nightly}END
change 10; bash nightly
cmp /mnt/d/active there/d.img
change 20
sed 's/^rm sent/exit 9/' nightly | bash || [ $? = 9 ]  # it has arrived
change 30
sed 's/^mv next sent/exit 9/' nightly | bash || [ $? = 9 ]
[ ! -e /mnt/d/snapshots/sent ]
cmp /mnt/d/snapshots/next there/d.img
change 40; bash nightly
cmp /mnt/d/active there/d.img
[ "$(ls /mnt/d/snapshots)" = sent ]
snapfs umount /mnt/d
"""
    installed(MACHINE + script, tmp_path)


def test_borg_and_restic(tmp_path):
    for program in ("borg", "restic"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    there, back = blocks("borg and restic")
    script = f"""
export RESTIC_PASSWORD=x
borg init -e none borgs
restic -q -r restics init
change 5
cp /mnt/d/active expected
{there.replace("restic -r REPO", "restic -r /srv/restics").replace("REPO", "/srv/borgs")}
change 6
cd /srv
archive=$(borg list --short borgs)
{back.replace("restic -r REPO", "restic -r restics").replace("REPO::ARCHIVE", "borgs::$archive")}
cmp now expected
cmp d.img expected
snapfs umount /mnt/d
"""
    installed(MACHINE + script, tmp_path)


def test_only_what_changed(tmp_path):
    for program in ("restic", "ddrescue"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    there, back, ranges = (each.replace("REPO", "restics") for each in blocks("Only what changed"))
    before, after = there.split("snapfs create /mnt/d 2")
    script = f"""
export RESTIC_PASSWORD=x
restic -q -r restics init
{before}
change 7
snapfs create /mnt/d 2{after}
change 8
{back}
snapfs create /mnt/d mon
cp /mnt/d/snapshots/mon /media/usb/d.img
change 9
snapfs create /mnt/d tue
{ranges}
cmp /mnt/d/snapshots/tue /media/usb/d.img
snapfs diff /mnt/d mon
"""
    done = installed(MACHINE + script + "snapfs umount /mnt/d\n", tmp_path)
    assert re.search(r"is at 2, 1\d\d KiB received", done.stdout), done.stdout
