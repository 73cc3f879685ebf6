"""File systems under a mount and in it: loop devices, tmpfs, ext4 in `active`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tests.support.mounted import MIB, Mounted, run


@contextlib.contextmanager
def tmpfs(where: Path, size: str) -> Iterator[Path]:
    where.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", where)
    try:
        yield where
    finally:
        run("umount", where)


def make_ext4(file: Path, *options: str) -> None:
    """An ext4 that writes nothing of its own accord when it is mounted."""
    extended = ",".join(("lazy_itable_init=0", "lazy_journal_init=0", *options))
    run("mkfs.ext4", "-q", "-E", extended, file)


@contextlib.contextmanager
def frozen(where: Path) -> Iterator[None]:
    """Nothing changes in the file system meanwhile, and what did is on its device."""
    run("fsfreeze", "-f", where)
    try:
        yield
    finally:
        run("fsfreeze", "-u", where)


@contextlib.contextmanager
def loop_device(file: Path) -> Iterator[Path]:
    device = Path(run("losetup", "--find", "--show", file).stdout.strip())
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextlib.contextmanager
def mounted_loop(file: Path, where: Path, *options: str) -> Iterator[Path]:
    where.mkdir(exist_ok=True)
    run("mount", "-o", ",".join(("loop", *options)), file, where)
    try:
        yield where
    finally:
        run("umount", where)


def use_file_system(disk: Mounted, tmp_path: Path) -> list[OSError]:
    """Fill a file system on active with more than the temp image can take; its errors."""
    failures: list[OSError] = []
    with mounted_loop(disk.active, tmp_path / "fs") as where:
        (where / "old").write_bytes(os.urandom(48 * MIB))
        os.sync()
        disk.create("s")
        with contextlib.suppress(OSError):
            (where / "old").unlink()
        for number in range(48):
            try:
                with open(where / f"new{number}", "wb") as file:
                    file.write(os.urandom(MIB))
                    os.fsync(file.fileno())
            except OSError as error:
                failures.append(error)
    return failures
