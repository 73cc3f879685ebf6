"""Which image a backup directory belongs to."""

from __future__ import annotations

import pytest

from snapfs.backup import belonging
from snapfs.backup.belonging import why_strange
from snapfs.backup.chain import VERSION, Chain, Point


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    path = tmp_path / "machine-id"
    monkeypatch.setattr(belonging, "MACHINE_ID", str(path))
    path.write_text("a" * 32 + "\n")
    return path


def chain_of(image: str, made_on: str = "a" * 32) -> Chain:
    point = Point(
        number=1, name="0001-2026", token="0" * 12, created="2026-11-02T12:00:00Z", size=1,
        parent=None, image=image, data_bytes=1, zero_bytes=0, digest="0" * 32, machine=made_on,
    )  # fmt: skip
    return Chain(VERSION, "f" * 12, 2, (point,))


BITMAPS = {f"backup-{'f' * 12}-{'0' * 12}"}
OLDER = {f"backup-{'f' * 12}-{'9' * 12}"}


def test_a_directory_without_points_is_anybodys():
    assert None is why_strange(Chain(VERSION, "f" * 12), "/vm/a.img", set())


def test_the_bitmap_tells_an_image_that_was_moved(tmp_path):
    chain = chain_of(str(tmp_path / "gone.img"))
    assert None is why_strange(chain, "/vm/other.img", BITMAPS)
    assert "no bitmap" in why_strange(chain, "/vm/other.img", OLDER)


def test_two_names_of_one_file_are_one_image_and_two_files_are_two(tmp_path):
    (tmp_path / "a.img").write_bytes(b"a")
    (tmp_path / "link.img").symlink_to("a.img")
    (tmp_path / "hard.img").hardlink_to(tmp_path / "a.img")
    (tmp_path / "b.img").write_bytes(b"a")
    chain = chain_of(str(tmp_path / "a.img"))
    for name in ("a.img", "link.img", "hard.img"):
        assert None is why_strange(chain, str(tmp_path / name), BITMAPS)
    assert "a copy of" in why_strange(chain, str(tmp_path / "b.img"), BITMAPS)


def test_without_a_bitmap_it_is_the_path_on_the_same_machine(machine):
    assert None is why_strange(chain_of("/vm/a.img"), "/vm/a.img", set())
    assert None is why_strange(chain_of("/vm/a.img", ""), "/vm/a.img", set())
    assert "no bitmap" in why_strange(chain_of("/vm/a.img"), "/vm/b.img", set())
    machine.write_text("b" * 32)
    assert "another machine" in why_strange(chain_of("/vm/a.img"), "/vm/a.img", set())
    assert None is why_strange(chain_of("/vm/a.img"), "/vm/a.img", BITMAPS)
    machine.unlink()
    assert None is why_strange(chain_of("/vm/a.img"), "/vm/a.img", set())
