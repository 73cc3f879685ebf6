"""Points that are compressed or encrypted: they read as all others do, with the key."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
from pathlib import Path

import pytest
import xxhash

from tests.support.backedup import K64, MIB, check_tidy, held_backup, names
from tests.support.mounted import DYING, SNAPFS, run
from tests.support.steps import EVERY, some_steps

pytestmark = pytest.mark.mount

TEXT = b"all work and no play makes Jack a dull boy\n" * (4 * MIB // 43)
SECRET = os.urandom(12).hex().encode() * (K64 // 24 + 1)


def make_key(path: Path) -> list[str]:
    path.write_text(os.urandom(32).hex())
    path.chmod(stat.S_IRUSR)
    return ["--key-file", str(path)]


@pytest.mark.parametrize("options", [(), ("cluster-size=4K",), ("cluster-size=256K",)])
def test_compressed_points_are_smaller_and_read_the_same(disk, options):
    it = disk(TEXT + os.urandom(MIB) + bytes(MIB) + b"the end" * 100, *options)
    first = it.backup("--compress", "zstd")
    assert (2 if options == ("cluster-size=4K",) else 1.5) * MIB > first["disk_bytes"]
    it.mounted.write(MIB + 5000, TEXT[:300_000])
    it.mounted.write(4 * MIB + 7 * 4096, bytes(MIB))
    run("fallocate", "-p", "-o", str(5 * 4096), "-l", str(3 * 4096), it.mounted.active)
    run("fallocate", "-p", "-o", str(2 * MIB), "-l", str(MIB + 4096), it.mounted.active)
    assert "incremental" == it.backup("--compress", "zstd")["kind"]
    it.change(1)
    it.backup()
    it.change(2)
    it.backup("--compress", "zstd")
    os.truncate(it.mounted.active, 3 * MIB + 513)
    it.backup("--compress", "zstd")
    os.truncate(it.mounted.active, 5 * MIB + 1)
    it.mounted.write(5 * MIB - 77, b"the end")
    it.backup("--compress", "zstd")
    check_tidy(it)
    it.check_all()
    run(*SNAPFS, "prune", it.directory, "--keep-last", "3")
    it.check_all()
    run(*SNAPFS, "prune", it.directory, "--keep-last", "1")
    it.check_all()
    assert "incremental" == it.backup("--compress", "zstd")["kind"]
    it.check_all()


def test_a_compressed_full_that_was_killed_goes_on(disk):
    it = disk((TEXT + os.urandom(2 * MIB)) * 3)
    moment = it.mounted.active.read_bytes()
    held_backup(it, "--compress", "zstd").end(signal.SIGKILL)
    it.mounted.write(0, TEXT[7:MIB])
    it.mounted.write(9 * MIB, TEXT[7:MIB])
    summary = it.backup("--compress", "zstd")
    assert ("full", 4 * MIB) == (summary["kind"], summary["resumed_at"])
    it.moments[1] = moment
    check_tidy(it)
    it.backup("--compress", "zstd")
    it.check_all()


def test_what_a_killed_compression_left_behind_the_safe_part_is_written_again(disk):
    it = disk((TEXT + os.urandom(2 * MIB)) * 2)
    moment = it.mounted.active.read_bytes()
    held_backup(it, "--compress", "zstd").end(signal.SIGKILL)
    (partial,) = it.directory.glob("*.qcow2.partial")
    described = (
        f"driver=compress,file.driver=qcow2,file.file.driver=file,file.file.filename={partial}"
    )
    run("qemu-io", "--image-opts", described, "-c", "write -P 3 5M 128K", "-c", "write -P 3 8M 64K")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 3 6M 64K", partial)
    assert 4 * MIB == it.backup("--compress", "zstd")["resumed_at"]
    it.moments[1] = moment
    it.check_all()


def test_damage_in_what_is_compressed_costs_that_and_no_more(disk, tmp_path):
    it = disk(b"".join(os.urandom(K64 // 2) + bytes(K64 // 2) for _ in range(64)))
    it.backup("--compress", "zstd")
    (image,) = it.directory.glob("*.qcow2")
    size = image.stat().st_size
    with open(image, "r+b") as file:
        file.seek(size * 6 // 10)
        file.write(bytes(byte ^ 0x55 for byte in os.pread(file.fileno(), 100, file.tell())))
    dest = tmp_path / "r"
    assert 4 == run(*SNAPFS, "verify", it.directory, check=False).returncode
    assert 4 == run(*SNAPFS, "restore", it.directory, dest, check=False).returncode
    done = run(*SNAPFS, "restore", it.directory, dest, "--salvage", "--json", check=False)
    assert 3 == done.returncode, done.stderr
    damaged = json.loads(done.stdout.splitlines()[-1])["damaged"]
    assert 0 < sum(length for _, length in damaged) <= 2 * K64
    expected = bytearray(it.moments[1])
    for start, length in damaged:
        expected[start : start + length] = bytes(length)
    assert bytes(expected) == dest.read_bytes()


def test_an_encrypted_point_tells_nothing_without_its_key(disk, tmp_path):
    it = disk(SECRET[:K64] + os.urandom(MIB) + SECRET[:K64])
    it.reading = make_key(tmp_path / "key,file")
    it.backup("--encrypt", *it.reading)
    it.mounted.write(5 * K64, SECRET[:K64])
    assert "incremental" == it.backup("--encrypt", *it.reading)["kind"]
    check_tidy(it)
    it.check_all()
    piece = (xxhash.xxh3_64_intdigest(SECRET[:K64]) & 0xFFFFFFFF).to_bytes(4).hex().encode()
    key = (tmp_path / "key,file").read_bytes()
    for path in it.directory.iterdir():
        content = path.read_bytes()
        assert SECRET[:24] not in content
        assert piece not in content
        assert key not in content
    dest = tmp_path / "r"
    for options, words in (
        ([], "is encrypted; give its --key-file"),
        (make_key(tmp_path / "other"), "another key"),
    ):
        for command in (
            ["restore", it.directory, dest],
            ["restore", it.directory, dest, "--salvage"],
            ["verify", it.directory],
            ["prune", it.directory, "--keep-last", "1"],
        ):
            done = run(*SNAPFS, *command, *options, check=False)
            assert (1, True) == (done.returncode, words in done.stderr), (command, done.stderr)
            assert "DAMAGED" not in done.stdout
        assert not dest.exists()
        assert not Path(f"{dest}.partial").exists()
    assert 2 == len(it.manifest()["points"])
    shown = json.loads(run(*SNAPFS, "points", it.directory, "--json").stdout)["points"]
    assert [(True, True)] * 2 == [(each["encrypted"], each["verified"]["good"]) for each in shown]
    run(*SNAPFS, "prune", it.directory, "--keep-last", "1", *it.reading)
    it.check_all()
    assert "incremental" == it.backup("--encrypt", *it.reading)["kind"]
    it.check_all()


def test_what_is_no_key_is_refused(disk, tmp_path):
    it = disk(MIB)
    backup = ["backup", it.mounted.mountpoint, it.directory, "--encrypt"]

    def said(*options: str, status: int = 1) -> str:
        done = run(*SNAPFS, *backup, *options, check=False)
        assert status == done.returncode, done.stderr
        return done.stderr

    assert "--key-file" in said(status=2)
    key = tmp_path / "key"
    assert f"{key}: No such file" in said("--key-file", str(key))
    for content in (b"short", os.urandom(64), b"\0" * 64, b"x" * 5000):
        key.write_bytes(content)
        assert "openssl rand" in said("--key-file", str(key))
    assert "--compress" in said(*make_key(tmp_path / "good"), "--compress", "zstd", status=2)
    assert [] == it.manifest()["points"]
    assert [] == names(it, "snapshots")


def test_chains_mix_and_what_is_secret_gets_into_no_plain_file(disk, tmp_path):
    it = disk(os.urandom(2 * MIB))
    it.reading = make_key(tmp_path / "key")
    it.backup()
    it.mounted.write(3 * K64, os.urandom(K64))
    it.backup("--compress", "zstd")
    it.mounted.write(5 * K64, SECRET[:K64])
    it.backup("--encrypt", *it.reading)
    run("fallocate", "-p", "-o", str(7 * K64), "-l", str(K64), it.mounted.active)
    it.mounted.write(8 * K64 + 99, SECRET[:1000])
    it.backup("--encrypt", *it.reading)
    done = it.mounted.snapfs("backup", it.mounted.mountpoint, it.directory, check=False)
    assert (2, True) == (done.returncode, "--no-encrypt" in done.stderr), done.stderr
    other = make_key(tmp_path / "other")
    done = it.mounted.snapfs(
        "backup", it.mounted.mountpoint, it.directory, "--encrypt", *other, check=False
    )
    assert (1, True) == (done.returncode, "another key" in done.stderr), done.stderr
    it.mounted.write(10 * K64, os.urandom(K64))
    assert "incremental" == it.backup("--no-encrypt")["kind"]
    it.check_all()

    def check_secret() -> None:
        for path in it.directory.iterdir():
            assert SECRET[:24] not in path.read_bytes(), path

    check_secret()
    for last in (4, 3, 2, 1):
        run(*SNAPFS, "prune", it.directory, "--keep-last", str(last), *it.reading)
        it.check_all()
        check_secret()
        check_tidy(it)


def test_an_encrypted_full_that_was_killed_goes_on_with_its_key(disk, tmp_path):
    it = disk(os.urandom(12 * MIB) + SECRET)
    it.reading = make_key(tmp_path / "key")
    key = (tmp_path / "key").read_text()
    moment = it.mounted.active.read_bytes()
    backup = held_backup(it, "--encrypt", *it.reading)
    keyed = 0
    for path in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                content = (path / name).read_bytes()
            except OSError:
                continue  # it has ended
            assert key.encode() not in content
            keyed += b"secret,id=key" in content
    assert keyed
    backup.end(signal.SIGKILL)
    it.mounted.write(9 * MIB, SECRET)
    done = it.mounted.snapfs("backup", it.mounted.mountpoint, it.directory, check=False)
    assert (2, True) == (done.returncode, "--no-encrypt" in done.stderr), done.stderr
    summary = it.backup("--encrypt", *it.reading)
    assert ("full", 4 * MIB) == (summary["kind"], summary["resumed_at"])
    it.moments[1] = moment
    it.backup("--encrypt", *it.reading)
    check_tidy(it)
    it.check_all()


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_prune_of_what_becomes_secret_killed_at_any_step(disk, tmp_path):
    """See test_backup.py: the same for a fold that has to encrypt a file first."""
    it = disk(os.urandom(2 * MIB))
    it.reading = make_key(tmp_path / "key")
    it.backup()
    it.mounted.write(5 * K64, SECRET[:K64])
    it.backup("--encrypt", *it.reading)
    it.mounted.stop()
    killed = 0
    for step in some_steps(rarer=3):
        trial = tmp_path / "trial"
        shutil.copytree(it.directory, trial)
        command = ["prune", trial, "--keep-last", "1", *it.reading]
        done = run(*DYING, str(step), *command, check=False)
        assert it.moments[2] == it.restored(2, trial)
        run(*SNAPFS, "verify", trial, *it.reading)
        run(*SNAPFS, *command)
        run(*SNAPFS, "verify", trial, *it.reading)
        assert it.moments[2] == it.restored(2, trial)
        for path in trial.iterdir():
            assert path.suffix in (".json", ".lock", ".readers", ".verified", ".qcow2", ".sums")
            assert SECRET[:24] not in path.read_bytes()
        shutil.rmtree(trial)
        if done.returncode != -signal.SIGKILL:
            assert 0 == done.returncode, done.stderr
            break
        killed += 1
    assert killed * EVERY > 10
