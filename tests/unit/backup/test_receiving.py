"""What a stream does to an image: all of it, with the moment noted, or it says so."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from snapfs.backup import receiving
from snapfs.backup.receiving import ReceiveOptions, receive, state
from snapfs.errors import (
    BackupError,
    InUse,
    PartialCopy,
    SnapfsError,
    StreamBroken,
    UsageError,
    WrongBase,
)
from snapfs.storage.locks import lock_image
from tests.support.mounted import DYING, PATIENCE
from tests.support.steps import some_steps
from tests.support.streams import applied, incoming, moment, stream

SIZE = 300_000
QUIET = ReceiveOptions(quiet=True)
FORCE = ReceiveOptions(quiet=True, force=True)

ONE, TWO, THREE = (moment(hour, SIZE) for hour in (1, 2, 3))
FULL = [(0, os.urandom(100_000)), (100_000, 100_000), (200_000, os.urandom(100_000))]
FIRST = applied(b"", SIZE, FULL)
MORE = [(50_000, os.urandom(1000)), (120_000, os.urandom(70_000)), (200_000, 4096)]
SECOND = applied(FIRST, SIZE, MORE)
WHOLE = stream(ONE, FULL)
CHANGES = stream(TWO, MORE, base=ONE)


@pytest.fixture
def image(tmp_path) -> Path:
    return tmp_path / "disk.img"


def take(image: Path, data: bytes, options: ReceiveOptions = QUIET) -> dict:
    return receive(str(image), incoming(data), options)


def names(image: Path) -> list[str]:
    return sorted(each.name.removeprefix("disk.img") for each in image.parent.iterdir())


def test_everything_and_then_what_changed(image):
    assert not take(image, WHOLE)["already_there"]
    assert FIRST == image.read_bytes()
    assert f"complete@{ONE.created}" == state(str(image))["state"]
    take(image, CHANGES)
    assert SECOND == image.read_bytes()
    assert f"complete@{TWO.created}" == state(str(image))["state"]
    assert ["", ".received"] == names(image)
    assert take(image, CHANGES)["already_there"]  # twice does no harm
    assert SECOND == image.read_bytes()


def test_zeros_take_no_space(image):
    take(image, stream(moment(1, 8 << 20), [(0, 8 << 20)]))
    assert (8 << 20, 0) == (image.stat().st_size, image.stat().st_blocks)


@pytest.mark.parametrize("size", [0, 1, SIZE // 2 + 1, 2 * SIZE])
def test_an_image_of_another_size(image, size):
    take(image, WHOLE)
    changes = [(SIZE, size - SIZE)] if size > SIZE else []
    take(image, stream(moment(2, size), changes, base=ONE))
    assert applied(FIRST, size, []) == image.read_bytes()
    take(image, stream(THREE, [(size, SIZE - size)] if size < SIZE else [], base=moment(2, size)))
    assert applied(applied(FIRST, size, []), SIZE, []) == image.read_bytes()


def test_changes_since_another_moment_are_refused(image):
    take(image, WHOLE)
    for base in (moment(0, SIZE), moment(1, SIZE - 1), TWO):
        with pytest.raises(WrongBase, match=r"is at s .*changed since"):
            take(image, stream(THREE, MORE, base=base))
        with pytest.raises(WrongBase):  # nor by force
            take(image, stream(THREE, MORE, base=base), FORCE)
    assert FIRST == image.read_bytes()
    assert ["", ".received"] == names(image)


def test_changes_to_what_nobody_knows_are_refused(image):
    with pytest.raises(WrongBase, match="nobody knows"):
        take(image, CHANGES)
    assert [] == names(image)
    image.write_bytes(FIRST)
    with pytest.raises(WrongBase, match="nobody knows"):
        take(image, CHANGES, FORCE)
    assert [""] == names(image)
    assert "none" == state(str(image))["state"]


def test_an_image_that_somebody_wrote_to_is_of_no_moment_any_more(image):
    take(image, WHOLE)
    with open(image, "r+b") as file:
        file.write(b"x")
    with pytest.raises(WrongBase, match="was written to"):
        take(image, CHANGES)
    with pytest.raises(WrongBase, match="was written to"):
        state(str(image))
    take(image, WHOLE, FORCE)
    take(image, CHANGES)
    assert SECOND == image.read_bytes()


def test_what_is_there_is_not_overwritten_unasked(image):
    image.write_text("remember the milk\n")
    with pytest.raises(UsageError, match="--force"):
        take(image, WHOLE)
    assert "remember the milk\n" == image.read_text()
    assert [""] == names(image)
    image.write_bytes(b"")
    take(image, WHOLE)
    with pytest.raises(UsageError, match="is at s"):
        take(image, stream(TWO, FULL))
    take(image, stream(TWO, FULL), FORCE)
    assert FIRST == image.read_bytes()


def test_a_stream_that_does_not_come_to_its_first_record_changes_nothing(image):
    take(image, WHOLE)
    before = image.stat()
    for length in (0, 10, CHANGES.index(b"DATA") + 500):
        with pytest.raises(StreamBroken):
            take(image, CHANGES[:length])
    after = image.stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)
    assert ["", ".received"] == names(image)
    take(image, CHANGES)


def cuts(data: bytes) -> list[int]:
    """Lengths at which something is begun and not over: around each record, and in it."""
    places = [at for kind in (b"DATA", b"ZERO", b"DONE")
              for at in range(len(data)) if data.startswith(kind, at)]  # fmt: skip
    return sorted({min(len(data) - 1, at + more) for at in places for more in (0, 20, 60)})


@pytest.mark.parametrize("kind", ["cut", "flip"])
@pytest.mark.parametrize("changes", [False, True])
def test_a_broken_stream_leaves_a_mark_and_the_same_goes_on(image, kind, changes):
    base, data, expected = (FIRST, CHANGES, SECOND) if changes else (b"", WHOLE, FIRST)
    begun = 0
    for position in cuts(data):
        for path in image.parent.iterdir():
            path.unlink()
        if changes:
            take(image, WHOLE)
        broken = bytearray(data)
        if kind == "flip":
            broken[position] ^= 4
        else:
            del broken[position:]
        with pytest.raises(StreamBroken):
            take(image, bytes(broken))
        if ".partial" in "".join(names(image)):
            begun += 1
            found = state(str(image))["state"]
            at = TWO if changes else ONE
            assert found.startswith(f"partial@{at.created}/")
            resumed = int(found.rpartition("/")[2])
            assert 0 < resumed <= SIZE
            with pytest.raises(WrongBase, match="unfinished"):
                take(image, stream(THREE, MORE, base=ONE))
            rest = [(max(offset, resumed), part(what, resumed - offset)) for offset, what in
                    (MORE if changes else FULL) if end(offset, what) > resumed]  # fmt: skip
            base_moment = ONE if changes else None
            take(image, stream(at, rest, base=base_moment, start=resumed))
        else:
            assert (base if changes else None) == (image.read_bytes() if changes else None)
            take(image, data)
        assert expected == image.read_bytes()
        assert ["", ".received"] == names(image)
    assert begun > 3


def test_what_goes_on_behind_a_gap_is_refused(image):
    with pytest.raises(StreamBroken):
        take(image, WHOLE[: WHOLE.index(b"ZERO") + 40])
    assert f"partial@{ONE.created}/200000" == state(str(image))["state"]
    with pytest.raises(UsageError, match=r"goes on at 250000.* up to 200000"):
        take(image, stream(ONE, [(250_000, 50_000)], start=250_000))
    take(image, stream(ONE, [(200_000, FULL[-1][1])], start=200_000))
    assert FIRST == image.read_bytes()


def end(offset: int, what: bytes | int) -> int:
    return offset + (what if isinstance(what, int) else len(what))


def part(what: bytes | int, before: int) -> bytes | int:
    """What is left of a change without its first bytes."""
    before = max(0, before)
    return what - before if isinstance(what, int) else what[before:]


def test_the_same_again_from_the_beginning_will_do(image):
    take(image, WHOLE)
    with pytest.raises(StreamBroken):
        take(image, CHANGES[:-10])
    take(image, CHANGES)
    assert SECOND == image.read_bytes()


def test_a_full_one_that_was_given_up_gives_way_to_another(image):
    with pytest.raises(StreamBroken):
        take(image, WHOLE[:-10])
    take(image, stream(TWO, [(0, SIZE)]))
    assert bytes(SIZE) == image.read_bytes()
    with pytest.raises(StreamBroken):
        take(image, stream(THREE, FULL, base=TWO)[:-10])
    with pytest.raises(WrongBase, match="unfinished"):
        take(image, WHOLE)
    take(image, WHOLE, FORCE)
    assert FIRST == image.read_bytes()


@pytest.mark.parametrize("replaced", [b"", b"x" * 7])
def test_what_is_not_the_file_that_has_a_part_does_not_get_the_rest(image, replaced):
    with pytest.raises(StreamBroken):
        take(image, WHOLE[:-10])
    image.unlink()
    if replaced:
        image.write_bytes(replaced)
    with pytest.raises(UsageError, match="up to 0"):
        take(image, stream(ONE, [], start=SIZE))
    take(image, WHOLE, FORCE)
    with pytest.raises(StreamBroken):
        take(image, CHANGES[:-10])
    image.write_bytes(replaced)
    with pytest.raises(WrongBase, match="is not what had got a part"):
        take(image, CHANGES)


@pytest.mark.parametrize("changes", [False, True])
def test_what_somebody_wrote_to_since_does_not_get_the_rest(image, changes):
    if changes:
        take(image, WHOLE)
    data = CHANGES if changes else WHOLE
    with pytest.raises(StreamBroken):
        take(image, data[:-10])
    with open(image, "r+b") as file:
        file.write(b"x")
    if changes:
        with pytest.raises(WrongBase, match="written to since"):
            state(str(image))
        with pytest.raises(WrongBase, match="written to since"):
            take(image, CHANGES)
        take(image, WHOLE, FORCE)
    else:
        assert f"partial@{ONE.created}/0" == state(str(image))["state"]
        with pytest.raises(UsageError, match="up to 0"):
            take(image, stream(ONE, [(200_000, FULL[-1][1])], start=200_000))
        take(image, WHOLE)
    assert FIRST == image.read_bytes()


def test_an_image_in_use_is_left_alone(image):
    take(image, WHOLE)
    with open(image, "r+b") as file:
        assert lock_image(file.fileno(), writable=True)
        with pytest.raises(InUse):
            take(image, CHANGES)
    assert FIRST == image.read_bytes()
    assert ["", ".received"] == names(image)


def test_a_copy_of_something_else_is_not_gone_on_with(image):
    take(image, WHOLE)
    journal = {"version": 1, "source": "/vm/x 1 2026", "size": SIZE, "format": "raw",
               "backing": None, "position": SIZE, "incomplete": False, "missing": [],
               "missing_more": 0}  # fmt: skip
    Path(f"{image}.partial").write_text(json.dumps(journal))
    with pytest.raises(WrongBase, match="something else"):
        take(image, CHANGES)
    with pytest.raises(PartialCopy):
        state(str(image))
    take(image, WHOLE, FORCE)


def test_there_must_be_room(image, monkeypatch):
    real = os.statvfs(image.parent)
    little = os.statvfs_result((*real[:3], 0, 0, *real[5:10]))
    monkeypatch.setattr(receiving.os, "statvfs", lambda path: little)
    with pytest.raises(BackupError, match="make room"):
        take(image, WHOLE)
    assert [] == names(image)


def test_a_full_disk_leaves_a_mark(image, monkeypatch):
    take(image, WHOLE)
    write = os.pwrite

    def full(fd, data, offset):
        if offset >= 120_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(BackupError, match=r"No space left.*is unfinished"):
            take(image, CHANGES)
    assert f"partial@{TWO.created}/0" == state(str(image))["state"]
    take(image, CHANGES)
    assert SECOND == image.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [False, True])
def test_killed_at_any_step_it_is_never_called_whole_with_a_wrong_byte(image, changes):
    data, expected = (CHANGES, SECOND) if changes else (WHOLE, FIRST)
    incoming_file = image.with_name("stream")
    incoming_file.write_bytes(data)
    for step in some_steps():
        for path in image.parent.glob("disk.img*"):
            path.unlink()
        if changes:
            take(image, WHOLE)
        with open(incoming_file, "rb") as file:
            done = subprocess.run(
                [*DYING, str(step), "receive", "--quiet", str(image)], stdin=file,
                capture_output=True, timeout=PATIENCE, check=False,
            )  # fmt: skip
        killed = done.returncode == -signal.SIGKILL
        assert killed or not done.returncode, done.stderr
        try:
            found = state(str(image))["state"]
        except SnapfsError as error:
            raise AssertionError(step) from error
        if found.startswith("complete"):
            at = found.partition("@")[2]
            known = {ONE.created: FIRST, TWO.created: SECOND}
            assert known[at] == image.read_bytes(), step
        take(image, data)
        assert expected == image.read_bytes(), step
        assert f"complete@{(TWO if changes else ONE).created}" == state(str(image))["state"]
        if not killed:
            break
    assert step > 10
