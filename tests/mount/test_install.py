"""scripts/install: what it leaves, and what it refuses while mounts live.

The tree and its links are below a temporary directory: an installation of the person
who runs this is not touched.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import define

pytestmark = [
    pytest.mark.mount,
    pytest.mark.slow,
    pytest.mark.xdist_group("install"),  # one for all of them
    pytest.mark.timeout(3600),  # it builds from what pip fetches
    pytest.mark.skipif("os.geteuid()", reason="what is installed belongs to root"),
]

SCRIPT = Path(__file__).parents[2] / "scripts/install"
NOTHING_TO_FETCH = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/nonexistent"}


@define
class Installation:
    """Where one is, with nothing else in `top`."""

    top: Path

    @property
    def prefix(self) -> Path:
        return self.top / "opt/deep/snapfs"

    @property
    def old(self) -> Path:
        return Path(f"{self.prefix}.old")

    @property
    def links(self) -> Path:
        return self.top / "root"

    @property
    def snapfs(self) -> Path:
        return self.links / "usr/local/bin/snapfs"

    def install(self, **environment: str) -> subprocess.CompletedProcess[str]:
        where = ["--prefix", self.prefix, "--link-root", self.links]
        return run(SCRIPT, *where, **environment)

    def uninstall(self) -> subprocess.CompletedProcess[str]:
        return run(SCRIPT, "--uninstall", "--prefix", self.prefix)

    def works(self) -> bool:
        return self.snapfs.exists() and run(self.snapfs, "--version").returncode == 0


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(
        words, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def files(top: Path) -> list[str]:
    return sorted(str(path.relative_to(top)) for path in top.rglob("*"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """One for all, since it takes a minute; the last test removes it."""
    installation = Installation(tmp_path_factory.mktemp("install"))
    done = installation.install()
    assert 0 == done.returncode, done.stderr
    return installation


@pytest.fixture
def mounts(installed: Installation, tmp_path: Path) -> Iterator[list[Path]]:
    """Two mounts, one in the way of mount(8), with a name that mountinfo writes in octal."""
    found = []
    for program, name in ((("snapfs", "mount"), "d"), (("mount.snapfs",), "d 2")):
        image, mountpoint = tmp_path / f"{name}.img", tmp_path / f"mnt {name}"
        image.write_bytes(bytes(1 << 20))
        mountpoint.mkdir()
        folder = "usr/local/bin" if program[0] == "snapfs" else "sbin"
        done = run(installed.links / folder / program[0], *program[1:], image, mountpoint)
        assert 0 == done.returncode, done.stderr
        found.append(mountpoint)
    yield found
    for mountpoint in found:
        run(installed.snapfs, "umount", mountpoint)


def test_the_links_lead_to_the_tree(installed):
    assert installed.works()
    for link in (
        "usr/local/bin/snapfs",
        "sbin/mount.snapfs",
        "sbin/umount.snapfs",
        "sbin/umount.fuse.snapfs",
        "usr/local/share/man/man1/snapfs.1",
        "usr/local/share/man/man8/mount.snapfs.8",
        "usr/local/share/man/man8/umount.fuse.snapfs.8",
        "usr/local/share/man/man7/snapfs.7",
        "usr/local/lib/systemd/system/snapfs@.service",
        "usr/local/lib/systemd/system/snapfs-backup@.service",
        "usr/local/lib/systemd/system/snapfs-backup@.timer",
        "usr/local/lib/systemd/system/snapfs-backup-failed@.service",
        "usr/local/share/bash-completion/completions/snapfs",
        "usr/local/share/zsh/site-functions/_snapfs",
        "usr/local/share/fish/vendor_completions.d/snapfs.fish",
    ):
        path = installed.links / link
        assert path.is_symlink()
        assert path.resolve(strict=True).is_relative_to(installed.prefix)


def test_it_is_neither_removed_nor_replaced_while_mounts_live(installed, mounts):
    for refused in (installed.uninstall(), installed.install()):
        assert 1 == refused.returncode
        for mountpoint in mounts:
            assert f"    {mountpoint} (process " in refused.stderr
        assert 2 == refused.stderr.count("(process ")
        assert "    process" not in refused.stderr  # their helpers are no news
    assert not installed.old.exists()
    for mountpoint in mounts:
        assert 0 == run(installed.snapfs, "create", mountpoint, "s").returncode
        assert 0 == run(installed.snapfs, "umount", mountpoint).returncode


def test_a_tree_that_cannot_be_built_leaves_the_one_before_it(installed):
    before = files(installed.top)
    done = installed.install(**NOTHING_TO_FETCH)
    assert 0 != done.returncode
    assert "is as it was" in done.stderr
    assert installed.works()
    assert before == files(installed.top)


def test_what_a_kill_left_is_put_in_order(installed):
    before = files(installed.top)
    installed.prefix.rename(installed.old)
    installed.prefix.mkdir()
    (installed.prefix / ".snapfs-install").write_bytes(
        (installed.old / ".snapfs-install").read_bytes()
    )
    (installed.prefix / "venv").mkdir()
    assert not installed.works()
    assert 0 != installed.install(**NOTHING_TO_FETCH).returncode
    assert installed.works()
    assert before == files(installed.top)


def test_after_a_kill_at_the_end_the_new_tree_stays(installed):
    before = files(installed.top)
    installed.old.mkdir()
    (installed.old / ".snapfs-install").touch()
    assert 0 != installed.install(**NOTHING_TO_FETCH).returncode
    assert installed.works()
    assert before == files(installed.top)


def test_a_first_tree_that_cannot_be_built_leaves_nothing(tmp_path):
    assert 0 != Installation(tmp_path).install(**NOTHING_TO_FETCH).returncode
    assert [] == files(tmp_path)


def test_what_belongs_to_others_is_refused(tmp_path):
    other = Installation(tmp_path)
    other.prefix.mkdir(parents=True)
    (other.prefix / "precious").touch()
    for done in (other.install(), other.uninstall()):
        assert 1 == done.returncode
        assert "is not ours" in done.stderr
    (other.prefix / "precious").unlink()
    other.prefix.rmdir()
    other.snapfs.parent.mkdir(parents=True)
    other.snapfs.symlink_to("/nonexistent/snapfs")
    done = other.install()
    assert 1 == done.returncode
    assert f"{other.snapfs} is there already" in done.stderr
    assert other.snapfs.is_symlink()
    assert 0 == other.uninstall().returncode
    assert other.snapfs.is_symlink()


def test_a_directory_that_others_can_write_to_is_refused(tmp_path):
    (tmp_path / "opt").mkdir()
    (tmp_path / "opt").chmod(0o777)
    done = Installation(tmp_path).install()
    assert 1 == done.returncode
    assert "can be written by others than root" in done.stderr
    assert ["opt"] == files(tmp_path)


def test_uninstalling_leaves_only_what_others_put_there(installed):
    theirs = installed.snapfs.with_name("theirs")
    theirs.touch()
    done = installed.uninstall()
    assert 0 == done.returncode, done.stderr
    assert [
        "root",
        "root/usr",
        "root/usr/local",
        "root/usr/local/bin",
        "root/usr/local/bin/theirs",
    ] == files(installed.top)
    assert 0 == installed.uninstall().returncode
