"""The examples of the manual and of README.md, typed in as they stand.

Where they work, /srv, /mnt and /backup, is empty and goes with them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.support.installed import installed

pytestmark = [
    pytest.mark.mount,
    pytest.mark.slow,
    pytest.mark.skipif("os.geteuid()", reason="they mount file systems through loop devices"),
]

TOP = Path(__file__).parents[2]

# What is there on a machine where somebody would type this.
MACHINE = """
mount -t tmpfs -o mode=755 snapfs-srv /srv
mount -t tmpfs -o mode=755 snapfs-mnt /mnt
mkdir /srv/work
cd /srv/work
"""

VIRSH = """#!/bin/sh
echo "virsh $*" >>{log}
"""


def blocks(page: str, title: str) -> list[str]:
    """What is between .nf and .fi in a part of a page, as it is to be typed."""
    text = (TOP / "man" / page).read_text().split(f'.SS "{title}"\n')[1]
    text = re.split(r"^\.S[SH] ", text, flags=re.MULTILINE)[0]
    found = re.findall(r"^\.nf\n(.*?)^\.fi$", text, re.MULTILINE | re.DOTALL)
    typed = [each.replace("\\-", "-").replace("\\&", "").replace("\\e", "\\") for each in found]
    return [each for each in typed if not each.startswith("<")]  # what goes into another file


def all_titles() -> list[str]:
    examples = (TOP / "man/snapfs.7").read_text().split(".SH EXAMPLES\n")[1].split("\n.SH ")[0]
    return re.findall(r'^\.SS "(.*)"$', examples, re.MULTILINE)


def test_the_examples_of_the_manual_are_there():
    assert [
        "A virtual machine",
        "A database in a file",
        "A file system, and rsync",
        "Back up what has changed",
        "One file back",
        "Going back",
        "Trimming",
    ] == all_titles()


@pytest.fixture
def virsh(tmp_path, monkeypatch) -> Path:
    """Writes down what it is told."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/virsh"
    program.write_text(VIRSH.format(log=tmp_path / "virsh.log"))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path / "virsh.log"


def test_a_virtual_machine_is_frozen_for_its_snapshot(virsh, tmp_path):
    script = "\n".join(blocks("snapfs.7", "A virtual machine"))
    done = installed(f"{MACHINE}{script}\ncmp /srv/vm/disk.img /srv/backup/monday.img", tmp_path)
    assert "monday\n" == done.stdout
    assert ["virsh domfsfreeze vm", "virsh domfsthaw vm"] == virsh.read_text().splitlines()


def test_a_virtual_machine_is_thawed_when_there_is_no_snapshot(virsh, tmp_path):
    script = "\n".join(blocks("snapfs.7", "A virtual machine"))
    assert "snapfs create /srv/snapfs/vm monday" in script
    script = script.replace("create /srv/snapfs/vm monday", "create /srv/nowhere monday")
    done = installed(f"{MACHINE}{script}", tmp_path, check=False)
    assert 5 == done.returncode
    assert ["virsh domfsfreeze vm", "virsh domfsthaw vm"] == virsh.read_text().splitlines()


def test_a_database_is_whole_in_its_snapshot(tmp_path):
    script = "\n".join(blocks("snapfs.7", "A database in a file"))
    done = installed(MACHINE + script, tmp_path)
    assert ["monday", "ok", "2"] == done.stdout.split()


def test_sqlite_on_active_itself_is_refused_as_the_manual_says(tmp_path):
    done = installed(
        f"""{MACHINE}
        mkdir -p /srv/d
        sqlite3 data.img 'create table t (x)'
        snapfs mount data.img /srv/d
        set +e
        sqlite3 /srv/d/active 'insert into t values (1)'
        snapfs umount /srv/d
        """,
        tmp_path,
    )
    assert "unable to open database file" in done.stderr


def test_a_file_system_is_backed_up_restored_and_taken_back(tmp_path):
    titles = all_titles()
    script = "".join(
        "\n".join([*blocks("snapfs.7", title), CHECKS.get(title, "")])
        for title in titles[titles.index("A file system, and rsync") :]
    )
    done = installed(MACHINE + script, tmp_path)
    assert "increment" in done.stdout
    assert "32 MiB" in done.stdout
    assert 4 == done.stdout.count("CHECKED\n")


CHECKS = {
    "A file system, and rsync": """
cmp /srv/backup/monday /srv/snapfs/fs/snapshots/monday && echo CHECKED
""",
    "Back up what has changed": """
e2fsck -fn /srv/restored.img >/dev/null && echo CHECKED
""",
    "One file back": """
diff -r /etc/default /srv/files/default && echo CHECKED
""",
    "Going back": """
test ! -e /srv/files/skel && test -e /srv/files/default && echo CHECKED
""",
}


def readme(title: str) -> str:
    """The lines of code of a part of README.md, without those that install."""
    text = (TOP / "README.md").read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    lines = re.findall(r"^    (.*)$", text, re.MULTILINE)
    assert lines
    return "\n".join(line for line in lines if not re.match(r"(scripts/|export PATH)", line)) + "\n"


def test_readme_can_be_typed_in(tmp_path):
    script = readme("Use it") + readme("Back up")
    done = installed(f"{MACHINE}\nmkdir -p /srv/backup\n{script}", tmp_path)
    assert "full" in done.stdout


@pytest.mark.parametrize("page", sorted(path.name for path in (TOP / "man").glob("snapfs*.1")))
def test_the_examples_of_a_command_can_be_typed_in(page, tmp_path):
    text = (TOP / "man" / page).read_text()
    if ".SH EXAMPLES" not in text:
        pytest.skip("it has none")
    examples = text.split(".SH EXAMPLES\n")[1].split("\n.SH ")[0]
    script = "\n".join(re.findall(r"^\.nf\n(.*?)^\.fi$", examples, re.MULTILINE | re.DOTALL))
    script = script.replace("\\-", "-").replace("/backup/d", "/srv/backup")
    before = "mkdir -p /mnt/d; truncate -s 4M disk.img\n"
    after = "! findmnt /mnt/d || snapfs umount /mnt/d\n"
    if "snapfs mount" not in script:
        before += "snapfs mount disk.img /mnt/d; touch /mnt/d/snapshots/tuesday\n"
        script = script.replace("/srv/backup disk.img", "/srv/backup restored.img")
    installed(MACHINE + before + script + after, tmp_path)
