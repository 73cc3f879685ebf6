"""The tables of qcow2 files, beside what QEMU says of the same files."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import struct
import subprocess

import pytest

from snapfs.backup import qemu
from snapfs.backup.layers import Layer
from snapfs.backup.qcow2 import Kind, Qcow2File
from snapfs.errors import BackupError

pytestmark = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="no qemu-utils")

K64 = 1 << 16


def qemu_io(path: str, *commands: str, options: tuple[str, ...] = ()) -> None:
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qcow2", *options, *words, path],
                   check=True, capture_output=True)  # fmt: skip


def test_the_head_tells_size_and_backing_file(tmp_path):
    first, second = str(tmp_path / "a.qcow2"), str(tmp_path / "b.qcow2")
    qemu.create(first, 1000)
    qemu.create(second, 1 << 40, first, alone=True)
    with Qcow2File(first) as file:
        assert (1024, None, K64, True) == (file.size, file.backing, file.cluster_size, file.plain)
    with Qcow2File(second) as file:
        assert (1 << 40, "a.qcow2") == (file.size, file.backing)
    for content in (b"QFI", b"QFI\xfb", b"QFI\xfb" + bytes(1000)):
        (tmp_path / "c").write_bytes(content)
        with pytest.raises(BackupError, match="no qcow2"):
            Qcow2File(str(tmp_path / "c"))


@pytest.mark.parametrize("options", ["cluster_size=64K", "cluster_size=4K", "compat=0.10"])
def test_every_range_is_where_qemu_has_it(tmp_path, options):
    path = str(tmp_path / "a.qcow2")
    size = (1 << 30) + 7 * 512
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, str(size)],
                   check=True)  # fmt: skip
    chance = random.Random(1)
    zeros = "write -z" if options != "compat=0.10" else "write -P 9"
    commands = []
    for number in range(60):
        at = chance.randrange(size - 300_000) // 512 * 512
        length = chance.randrange(1, 500) * 512
        kind = f"write -P {number + 1}" if number % 3 else zeros
        commands.append(f"{kind} {at} {length}")
    commands.append(f"write -P 77 {size - 512} 512")
    qemu_io(path, *commands)
    shown = json.loads(
        subprocess.run(["qemu-img", "map", "--output=json", path], check=True, text=True,
                       capture_output=True).stdout
    )  # fmt: skip
    with Qcow2File(path) as file:
        extents = list(file.extents())
        assert (0, size) == (extents[0].start, extents[-1].stop)
        for before, after in itertools.pairwise(extents):
            assert before.stop == after.start
        for each in shown:
            (found,) = file.extents(each["start"], each["start"] + each["length"])
            if each["data"]:
                assert (Kind.PLAIN, each["offset"]) == (found.kind, found.host)
            elif each["present"]:
                assert Kind.ZERO is found.kind
            else:
                assert Kind.ABSENT is found.kind
    raw = tmp_path / "raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", path, raw], check=True)
    with Layer([path]) as layer, open(raw, "rb") as file:
        for _ in range(300):
            start = chance.randrange(size)
            stop = min(size, start + chance.randrange(1, 1 << 20))
            file.seek(start)
            assert file.read(stop - start) == layer.content(start, stop)


def test_two_files_are_read_as_one_over_the_other(tmp_path):
    first, second = str(tmp_path / "a.qcow2"), str(tmp_path / "b.qcow2")
    qemu.create(first, 1 << 20)
    qemu.create(second, 2 << 20, first)
    qemu_io(first, "write -P 1 0 1M")
    qemu_io(second, "write -P 2 64K 64K", "write -z 256K 64K", "write -P 3 1M 64K")
    with Layer([second, first]) as layer:
        content = layer.content(0, 2 << 20)
        spans = list(layer.spans())
    expected = bytearray(b"\1" * (1 << 20) + bytes(1 << 20))
    expected[K64 : 2 * K64] = b"\2" * K64
    expected[4 * K64 : 5 * K64] = bytes(K64)
    expected[1 << 20 : (1 << 20) + K64] = b"\3" * K64
    assert expected == content
    assert [((4 * K64, 5 * K64), True)] == [each for each in spans if each[1]]
    with Layer([second]) as layer:
        assert bytes(K64) == layer.content(0, K64)


def test_what_is_compressed_comes_from_qemu(tmp_path, monkeypatch):
    raw, path = tmp_path / "raw", str(tmp_path / "a.qcow2")
    content = random.Random(2).randbytes(K64) + b"text" * (1 << 18) + bytes(K64)
    raw.write_bytes(content)
    subprocess.run(["qemu-img", "convert", "-c", "-O", "qcow2", raw, path], check=True)
    qemu_io(path, "write -P 5 128K 64K")
    content = content[: 2 * K64] + b"\5" * K64 + content[3 * K64 :]
    with Layer([path]) as layer:
        assert content == layer.content(0, len(content))
        kinds = {extent.kind for extent, _ in layer.locate(0, len(content)).parts}
        assert {Kind.PLAIN, Kind.CODED} <= kinds
    monkeypatch.setattr(qemu, "Server", None)  # no program for what is plain
    with Layer([path]) as layer:
        assert b"\5" * K64 == layer.content(2 * K64, 3 * K64)


def test_a_file_that_ends_early_reads_as_zeros_and_one_without_tables_is_an_error(tmp_path):
    path = str(tmp_path / "a.qcow2")
    qemu.create(path, 1 << 20)
    qemu_io(path, "write -P 1 0 1M")
    with Qcow2File(path) as file:
        (extent,) = file.extents()
    with open(path, "r+b") as raw:
        raw.truncate(extent.host + K64)
    with Layer([path]) as layer:
        assert b"\1" * K64 + bytes(K64) == layer.content(0, 2 * K64)
    with open(path, "r+b") as raw:
        raw.truncate(3 * K64)
    with Layer([path]) as layer, pytest.raises(BackupError, match="in the middle of its tables"):
        layer.content(0, K64)


def test_features_that_change_the_tables_are_left_to_qemu(tmp_path):
    path = str(tmp_path / "a.qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "extended_l2=on", path, "1M"],
                   check=True)  # fmt: skip
    qemu_io(path, "write -P 4 4K 4K")
    with Qcow2File(path) as file:
        assert not file.plain
    with Layer([path]) as layer:
        assert bytes(4096) + b"\4" * 4096 + bytes(4096) == layer.content(0, 12288)
        assert {True, False} >= {zero for _, zero in layer.spans()}
    with open(path, "r+b") as file:
        file.seek(72)
        file.write(struct.pack(">Q", 1 << 40))
    with Layer([path]) as layer, pytest.raises(BackupError, match="cannot be opened"):
        layer.content(0, 512)
