"""snapfs send and receive, and diff --since: with the real mount, through real pipes."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import define, field

from snapfs.backup import receiving
from snapfs.client.wire import Client
from snapfs.errors import WrongBase
from snapfs.storage.locks import lock_image
from tests.support import streams
from tests.support.calls import bitmap, punch
from tests.support.filesystems import loop_device, tmpfs
from tests.support.filtered import wait_until
from tests.support.mounted import DYING, K64, MIB, PATIENCE, SNAPFS, Mounted, run
from tests.support.patched import Program, held_copy
from tests.support.steps import some_steps

pytestmark = pytest.mark.mount

# A receiver that notes after each record how far it is.
NOTING = """
import sys
from snapfs import cli
from snapfs.backup import receiving
receiving.CHECKPOINT_BYTES = 1
sys.exit(cli.main(sys.argv[1:]))
"""


def created(disk: Mounted, name: str) -> str:
    with Client(str(disk.mountpoint)) as client:
        return client.call("show", name=name)["snapshot"]["created"]


@define
class Pipe:
    """send | receive, with somebody in between who counts, cuts, flips and kills."""

    disk: Mounted
    image: Path
    ends: list[int] = field(factory=list)  # exit statuses of the last time
    words: list[str] = field(factory=list)  # and what they said

    def run(
        self, name: str, *options: str | Path, receive: tuple[str, ...] = (),
        after: int | None = None, how: str = "",
    ) -> bool:  # fmt: skip
        """Send a snapshot; `how` something happens when so many bytes went `after`."""
        sender = subprocess.Popen(
            [*SNAPFS, "send", self.disk.snapshots / name, *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        receiver = subprocess.Popen(
            [sys.executable, "-c", NOTING, "receive", *receive, self.image],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert sender.stdout and receiver.stdin
        passed = 0
        try:
            while data := bytearray(os.read(sender.stdout.fileno(), 40_000)):
                if after is not None and passed + len(data) > after:
                    if how == "flip":
                        data[after - passed] ^= 0x10
                    elif how == "cut":
                        data = data[: after - passed]
                    elif how == "sender":
                        sender.kill()
                    elif how == "receiver":
                        receiver.kill()
                    after = None
                    if how == "cut":
                        receiver.stdin.write(data)
                        break
                passed += len(data)
                receiver.stdin.write(data)
                receiver.stdin.flush()
        except BrokenPipeError:
            pass
        sender.stdout.close()
        try:
            receiver.stdin.close()
        except BrokenPipeError:
            pass
        receiver.stdin = None
        said = [each.communicate(timeout=PATIENCE)[1].decode() for each in (sender, receiver)]
        self.ends = [sender.returncode, receiver.returncode]
        self.words = said
        return self.ends == [0, 0]

    def state(self) -> str:
        return receiving.state(str(self.image))["state"]

    def holds(self, name: str) -> bool:
        """Does the image say that it holds a snapshot, and does it?"""
        if self.state() != f"complete@{created(self.disk, name)}":
            return False
        assert (self.disk.snapshots / name).read_bytes() == self.image.read_bytes()
        return True


@pytest.fixture(autouse=True)
def _own_records(tmp_path, monkeypatch):
    """What is noted of devices is gone with the test."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def pipe(mount, tmp_path) -> Pipe:
    content = os.urandom(2 * MIB) + bytes(2 * MIB) + os.urandom(2 * MIB + 100)
    return Pipe(mount(content), tmp_path / "there.img")


def change(disk: Mounted, at: int, length: int = K64) -> None:
    disk.write(at, os.urandom(length))


def test_everything_and_then_what_changed_since_a_snapshot(pipe):
    disk = pipe.disk
    disk.create("1")
    change(disk, 100)
    assert pipe.run("1") and pipe.holds("1")
    punch(disk.active, MIB, 3 * K64)
    os.truncate(disk.active, 7 * MIB + 5)
    disk.create("2")
    change(disk, 5 * MIB)
    assert pipe.run("2", "--since", "1") and pipe.holds("2")
    assert re.search(r"2 since snapshot 1: 1?\d\d.* sent", pipe.words[0]), pipe.words
    os.truncate(disk.active, 3 * MIB + 1)
    disk.create("3")
    assert pipe.run("3", "--since", disk.snapshots / "2") and pipe.holds("3")
    assert pipe.run("3", "--since", "2") and pipe.holds("3")  # again
    assert "already" not in pipe.words[1]


def test_what_changed_since_a_bitmap_began_with_its_snapshot_gone(pipe):
    disk = pipe.disk
    disk.snapfs("create", disk.mountpoint, "1", "--next", "b1")
    assert pipe.run("1") and pipe.holds("1")
    disk.snapfs("delete", disk.mountpoint, "1")
    change(disk, MIB)
    disk.snapfs("create", disk.mountpoint, "2", "--bitmap", "b1", "--next", "b2")
    punch(disk.active, 0, K64)  # in b1 as well, and not to be read in 2
    now = disk.active.read_bytes()
    assert pipe.run("2", "--since", "b1")
    expected = bytearray(pipe.image.read_bytes())
    assert re.search(r"since bitmap b1: 64 KiB sent", pipe.words[0]), pipe.words
    disk.create("3")
    assert pipe.run("3", "--since", disk.mountpoint / "bitmaps" / "b2") and pipe.holds("3")
    expected[:K64] = bytes(K64)
    assert now == bytes(expected) == pipe.image.read_bytes()
    disk.create("4")
    assert not pipe.run("4", "--since", "b1")  # too early
    assert 6 == pipe.ends[1] and pipe.holds("3")


def test_what_changed_since_a_point_that_was_restored_there(pipe, tmp_path):
    disk, directory = pipe.disk, tmp_path / "backup"
    run(*SNAPFS, "backup", "--init", directory)
    for at in (0, MIB, 4 * MIB):
        change(disk, at)
        disk.snapfs("backup", disk.mountpoint, directory)
    run(*SNAPFS, "restore", directory, pipe.image, "--at", "2", "--for-receive")
    change(disk, 5 * MIB)
    disk.create("s")
    change(disk, 5 * MIB + K64)
    assert not pipe.run("s", "--since", directory / "3")
    assert 6 == pipe.ends[1], pipe.words
    assert pipe.run("s", "--since", directory / "2") and pipe.holds("s")
    assert "point 0002" in pipe.words[0]
    (restored,) = [tmp_path / "r"]
    run(*SNAPFS, "restore", directory, restored)
    assert not (tmp_path / "r.received").exists()


def test_what_since_cannot_mean(mount, tmp_path):
    disk, other = mount(MIB), mount(MIB)
    other.create("s")
    directory = tmp_path / "backup"
    run(*SNAPFS, "backup", "--init", directory)
    disk.snapfs("backup", disk.mountpoint, directory)
    (point,) = (disk.mountpoint / "bitmaps").iterdir()
    point.unlink()
    disk.create("twice")
    bitmap(disk, "add", "twice")
    disk.snapfs("create", disk.mountpoint, "s", "--next", "with")
    disk.create("later")
    for since, status, words in (
        ("nothing", 5, "neither a snapshot nor a bitmap"),
        ("twice", 2, "is a snapshot and a bitmap"),
        ("later", 2, "it is newer"),
        ("s", 2, "it is itself"),
        ("with", 2, "began with snapshot 's' or later"),
        ("/etc/passwd", 5, "nor a point"),
        (directory, 2, "say which point"),
        (directory / "9", 5, "neither a number"),
        (directory / "1", 6, "no bitmap of point"),
        (disk.active, 2, "neither a snapshot nor a bitmap"),
        (other.snapshots / "s", 2, "another mount"),
    ):
        for command in (["send", disk.snapshots / "s"], ["diff", disk.mountpoint, "s"]):
            done = run(*SNAPFS, *command, "--since", since, check=False)
            assert (status, True) == (done.returncode, words in done.stderr), done.stderr
            assert "" == done.stdout


def test_a_bitmap_that_began_without_a_snapshot_fits_no_image(pipe):
    disk = pipe.disk
    disk.create("1")
    assert pipe.run("1")
    bitmap(disk, "add", "b")
    disk.create("2")
    assert not pipe.run("2", "--since", "b")
    assert 6 == pipe.ends[1] and pipe.holds("1")


def test_what_is_not_all_there_is_not_sent(pipe):
    disk = pipe.disk
    disk.create("1")
    bitmap(disk, "add", "b")
    change(disk, 0)
    disk.snapfs("create", disk.mountpoint, "some", "--bitmap", "b")
    disk.create("2")
    punch(disk.snapshots / "2", 0, K64)
    for name, options in (("some", []), ("2", []), ("2", ["--since", "1"])):
        assert not pipe.run(name, *options)
        assert 4 == pipe.ends[0] and "may not be read" in pipe.words[0], pipe.words
        assert not pipe.image.exists()


@pytest.mark.parametrize("limited", [False, True])
def test_what_is_discarded_on_the_way_ends_a_stream_without_its_end(pipe, tmp_path, limited):
    """Of a snapshot with a bitmap it must not be taken for what changed later."""
    disk = pipe.disk
    disk.snapfs("create", disk.mountpoint, "1", "--next", "b")
    assert pipe.run("1")
    for at in (0, 5 * MIB):
        change(disk, at)
    disk.snapfs("create", disk.mountpoint, "2", *(["--bitmap", "b"] if limited else []))
    before_plan = """
from snapfs.backup import source
plan = source.Source.plan
def held(self, *arguments):
    reached()
    return plan(self, *arguments)
source.Source.plan = held
"""
    patch = before_plan if limited else held_copy(5 * MIB)
    with open(tmp_path / "stream", "wb") as file:
        sending = Program(patch, "send", disk.snapshots / "2", "--since", "b", stdout=file)
    sending.wait_reached()
    punch(disk.snapshots / "2", 5 * MIB, K64)
    sending.go()
    status, words = sending.finish()
    assert (4, True) == (status, "discarded" in words), words
    stream = (tmp_path / "stream").read_bytes()
    assert b"HEAD" in stream and b"DONE" not in stream
    assert not pipe.run("2", "--since", "b")
    assert 4 == pipe.ends[0] and pipe.holds("1")


def test_a_snapshot_that_lost_something_is_named_and_not_sent(mount, tmp_path):
    disk = mount(os.urandom(4 * MIB), "temp-limit=1M")
    pipe = Pipe(disk, tmp_path / "there.img")
    disk.create("1")
    for at in range(0, 4 * MIB, MIB // 2):
        change(disk, at, MIB // 2)
    assert not pipe.run("1")
    assert 4 == pipe.ends[0] and "incomplete" in pipe.words[0], pipe.words
    assert not pipe.image.exists()


def test_terminals_are_refused(pipe):
    pipe.disk.create("1")
    controlling, terminal = pty.openpty()
    try:
        for command, where in (
            (["send", pipe.disk.snapshots / "1"], "stdout"),
            (["receive", pipe.image], "stdin"),
        ):
            done = subprocess.run(
                [*SNAPFS, *command], **{where: terminal}, stderr=subprocess.PIPE, text=True,
                timeout=PATIENCE, check=False,
            )  # fmt: skip
            assert (2, True) == (done.returncode, "terminal" in done.stderr)
    finally:
        os.close(controlling)
        os.close(terminal)
    assert not pipe.image.exists()


HOWS = ("sender", "receiver", "cut", "flip")


@pytest.mark.slow
@pytest.mark.parametrize("how", HOWS)
def test_whatever_happens_on_the_way_the_rest_follows(pipe, how):
    """And what was called whole is, to the byte."""
    disk, chance = pipe.disk, random.Random(how)
    disk.snapfs("create", disk.mountpoint, "0", "--next", "b0")
    known, moments = None, ["0"]
    for round_ in range(3):
        name = moments[-1]
        since = [] if known is None else ["--since", f"b{known}" if round_ % 2 else known]
        for _ in range(2):
            after = chance.randrange(5_000_000 if known is None else 400_000)
            pipe.run(name, *since, "--resume-from", pipe.state(), after=after, how=how)
            change(disk, chance.randrange(6 * MIB))
            assert pipe.holds(name) or known is None or pipe.holds(known) or (
                pipe.state().startswith("partial@")
            )  # fmt: skip
        assert pipe.run(name, *since, "--resume-from", pipe.state()), pipe.words
        assert pipe.holds(name)
        known = name
        for _ in range(5):
            change(disk, chance.randrange(6 * MIB))
        moments.append(str(round_ + 1))
        disk.snapfs("create", disk.mountpoint, moments[-1], "--next", f"b{moments[-1]}")
    if known is not None:
        assert any("--state" in words for words in pipe.words) or pipe.ends == [0, 0]


def test_a_resumed_stream_leaves_out_what_is_there(pipe):
    disk = pipe.disk
    disk.create("1")
    pipe.run("1", after=3_000_000, how="cut")
    found = pipe.state()
    assert 2 * MIB <= int(found.rpartition("/")[2]) < 6 * MIB
    assert pipe.run("1", "--resume-from", found) and pipe.holds("1")
    assert "resumed at" in pipe.words[0]
    assert pipe.run("1", "--resume-from", pipe.state())
    assert "0 B sent" in pipe.words[0]


def test_it_is_said_before_anything_is_sent_that_it_does_not_fit(pipe):
    disk = pipe.disk
    for name in ("1", "2", "3"):
        disk.create(name)
        change(disk, MIB)
    assert pipe.run("1")
    assert not pipe.run("3", "--since", "2", "--resume-from", pipe.state())
    assert 6 == pipe.ends[0] and "the image there is at" in pipe.words[0]
    pipe.image.unlink()
    assert not pipe.run("3", "--since", "2", "--resume-from", pipe.state())
    assert 6 == pipe.ends[0] and "there is no image yet" in pipe.words[0]
    pipe.run("3", after=3_000_000, how="cut")
    assert not pipe.run("2", "--resume-from", pipe.state())
    assert 6 == pipe.ends[0]
    assert not pipe.run("3", "--resume-from", "complete")
    assert 2 == pipe.ends[0]


def test_a_full_disk_there(pipe, tmp_path):
    disk = pipe.disk
    disk.create("1")
    with tmpfs(tmp_path / "small", "3m") as where:
        pipe.image = where / "there.img"
        assert not pipe.run("1")  # refused before anything is written
        assert 1 == pipe.ends[1] and not pipe.image.exists(), pipe.words
        assert not pipe.run("1", receive=("--force",))
        assert 1 == pipe.ends[1] and "is unfinished" in pipe.words[1], pipe.words
        assert pipe.state().startswith("partial@")
        run("mount", "-o", "remount,size=20m", where)
        assert pipe.run("1", "--resume-from", pipe.state()) and pipe.holds("1")


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("whole", [True, False])
def test_killed_at_any_step_a_device_is_old_marked_or_whole(tmp_path, whole):
    first, second = streams.moment(1, 2 * MIB), streams.moment(2, 2 * MIB)
    everything = [(0, os.urandom(2 * MIB))]
    changes = [(K64, os.urandom(K64)), (MIB + K64, os.urandom(K64))]
    old = streams.applied(b"", 2 * MIB, everything)
    new = streams.applied(old, 2 * MIB, changes)
    sent = streams.stream(second, [(0, new)] if whole else changes, base=None if whole else first)
    (tmp_path / "stream").write_bytes(sent)
    options = ["--force"] if whole else []

    def take(data: bytes, *, force: bool) -> None:
        settings = receiving.ReceiveOptions(force=force, quiet=True)
        receiving.receive(str(device), streams.incoming(data), settings)

    with open(tmp_path / "disk", "wb") as file:
        file.truncate(5 * MIB)
    with loop_device(tmp_path / "disk") as device:
        for step in some_steps():
            take(streams.stream(first, everything), force=True)
            assert old == device.read_bytes()[: 2 * MIB]
            with open(tmp_path / "stream", "rb") as file:
                done = subprocess.run(
                    [*DYING, str(step), "receive", device, *options], stdin=file,
                    capture_output=True, timeout=PATIENCE, check=False,
                )  # fmt: skip
            killed = done.returncode == -signal.SIGKILL
            assert killed or not done.returncode, done.stderr
            found = device.read_bytes()[: 2 * MIB]
            assert found in (old, new) or found.startswith(b"SNAPFS UNFINISHED"), step
            said = ""
            with contextlib.suppress(WrongBase):  # of the old moment, which is gone
                said = receiving.state(str(device))["state"]
            if said.startswith("complete"):
                assert said.endswith(second.created if found == new else first.created), step
                assert found in (old, new)
            if not killed:
                break
            try:
                take(sent, force=whole)
            except WrongBase:  # killed between the last byte and the note
                assert found == new
            assert new == device.read_bytes()[: 2 * MIB], step
    assert step > 12


@pytest.mark.parametrize("changes", [False, True])
def test_a_device_goes_on_where_the_stream_was_cut(mount, tmp_path, changes):
    """Its head, which comes first and is written last, does not come again."""
    disk = mount(os.urandom(6 * MIB))
    with open(tmp_path / "disk", "wb") as file:
        file.truncate(8 * MIB)
    with loop_device(tmp_path / "disk") as device:
        pipe = Pipe(disk, device)
        disk.create("1")
        since: list[str] = []
        if changes:
            assert pipe.run("1", receive=("--force",))
            for at in (0, 2 * MIB, 5 * MIB):
                change(disk, at)
            disk.create("2")
            since = ["--since", "1"]
        name = "2" if changes else "1"
        force = () if changes else ("--force",)
        after = K64 + 10_000 if changes else 4_300_000
        assert not pipe.run(name, *since, receive=force, after=after, how="cut")
        found = pipe.state()
        assert (K64 if changes else 4 * MIB) <= int(found.rpartition("/")[2]), found
        assert device.read_bytes().startswith(b"SNAPFS UNFINISHED")
        assert pipe.run(name, *since, "--resume-from", found, receive=force), pipe.words
        assert (disk.snapshots / name).read_bytes() == device.read_bytes()[: 6 * MIB]
        assert f"complete@{created(disk, name)}" == pipe.state()
        with open(device, "r+b") as file:
            file.seek(7 * MIB)
            file.write(b"x")
        disk.create("3")
        assert not pipe.run("3", "--since", name)
        assert 6 == pipe.ends[1] and "was written to since" in pipe.words[1]


def test_the_forms_of_diff(mount, tmp_path):
    disk = mount(8 * MIB)
    bitmap(disk, "add", "b")
    disk.create("1")
    change(disk, MIB, 2 * K64)
    disk.create("2")
    change(disk, 4 * MIB)
    mountpoint = disk.mountpoint

    def diff(*arguments: str) -> str:
        return disk.snapfs("diff", mountpoint, *arguments).stdout

    assert f"{MIB} {2 * K64}\n{4 * MIB} {K64}\n" == diff("--since", "b", "--format", "extents")
    assert diff("1") == diff("--since", "1") == diff("--since", "b")
    assert diff("1", "2") == diff("2", "--since", "1")
    expected = [{"start": MIB, "length": 2 * K64, "state": "changed"}]
    for form in (["--json"], ["--format", "json"]):
        assert expected == json.loads(diff("2", "--since", "1", *form))["extents"]
    assert ["extents: 1", f"changed: {2 * K64}", "unknown: 0"] == (
        diff("2", "--since", "1", "--totals").splitlines()
    )
    lines = diff("2", "--since", "1", "--format", "ddrescue").splitlines()
    assert ["0x0 0x100000 ?", "0x100000 0x20000 +"] == lines[2:]
    for wrong in (
        [], ["1", "2", "--since", "b"], ["1", "--json", "--format", "extents"],
        ["1", "--totals", "--format", "ddrescue"],
    ):  # fmt: skip
        assert 2 == disk.snapfs("diff", mountpoint, *wrong, check=False).returncode


def test_ddrescue_takes_what_differs(mount, tmp_path):
    if shutil.which("ddrescue") is None:
        pytest.skip("ddrescue is not installed")
    disk = mount(os.urandom(4 * MIB))
    disk.create("1")
    dest, domain = tmp_path / "copy", tmp_path / "map"
    dest.write_bytes((disk.snapshots / "1").read_bytes())
    for at in (0, 2 * MIB + 5):
        change(disk, at)
    disk.create("2")
    domain.write_text(
        disk.snapfs("diff", disk.mountpoint, "2", "--since", "1", "--format", "ddrescue").stdout
    )
    run("ddrescue", "-m", domain, disk.snapshots / "2", dest)
    assert (disk.snapshots / "2").read_bytes() == dest.read_bytes()


def wait_unlocked(image: Path) -> None:
    """Return when the receiver on the other machine has noticed that nothing comes any more."""
    with open(image, "r+b") as file:
        wait_until(lambda: lock_image(file.fileno(), writable=True))


@pytest.fixture
def ssh(tmp_path) -> Iterator[list[str]]:
    """What runs a command over ssh on this machine, as the user who runs the tests."""
    server = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if server is None or shutil.which("ssh") is None:
        pytest.skip("OpenSSH is not installed")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd(8): privilege separation
    for name in ("host", "user"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name)
    keys = tmp_path / "authorized_keys"
    keys.write_text((tmp_path / "user.pub").read_text())
    keys.chmod(0o600)
    (tmp_path / "sshd_config").write_text(
        f"HostKey {tmp_path}/host\nAuthorizedKeysFile {keys}\nStrictModes no\nUsePAM no\n"
    )
    # Started for each connection by the client itself: there is no port to be taken.
    proxy = f"{server} -i -f {tmp_path}/sshd_config"
    yield [
        "ssh", "-F", "none", "-i", str(tmp_path / "user"), "-o", f"ProxyCommand={proxy}",
        "-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={tmp_path}/known",
        "-o", "IdentitiesOnly=yes", "-o", "LogLevel=ERROR", "127.0.0.1",
    ]  # fmt: skip


def test_over_ssh_to_another_machine(pipe, ssh, tmp_path):
    """As the manual has it; killed in the middle, and gone on with."""
    disk, image = pipe.disk, pipe.image

    def there(*words: str | Path) -> str:
        return " ".join(map(str, (f"cd {Path.cwd()} &&", *SNAPFS, *words)))

    def send(name: str, *options: str, kill: bool = False) -> int:
        sender = subprocess.Popen(
            [*SNAPFS, "send", "--quiet", disk.snapshots / name, *options], stdout=subprocess.PIPE
        )
        receiver = subprocess.Popen(
            [*ssh, there("receive", "--quiet", image)], stdin=subprocess.PIPE
        )
        assert sender.stdout and receiver.stdin
        with contextlib.suppress(BrokenPipeError), receiver.stdin:
            while data := sender.stdout.read(3 * MIB):
                receiver.stdin.write(data)
                receiver.stdin.flush()
                if kill:
                    wait_until(Path(f"{image}.partial").exists)
                    receiver.kill()
                    wait_unlocked(image)
        sender.stdout.close()
        sender.wait(PATIENCE)
        return receiver.wait(PATIENCE)

    disk.create("1")
    assert send("1", kill=True)
    found = run(*ssh, there("receive", "--state", image)).stdout.strip()
    assert not send("1", "--resume-from", found)
    assert pipe.holds("1")
    change(disk, MIB)
    disk.create("2")
    assert not send("2", "--since", "1")
    assert pipe.holds("2")
    change(disk, MIB)
    disk.create("3")
    assert 6 == send("3", "--since", "1")  # ssh hands on what the receiver says


def test_a_device_that_was_restored_takes_what_changed_since(mount, tmp_path):
    disk, directory = mount(os.urandom(2 * MIB)), tmp_path / "backup"
    run(*SNAPFS, "backup", "--init", directory)
    disk.snapfs("backup", disk.mountpoint, directory)
    with open(tmp_path / "disk", "wb") as file:
        file.truncate(3 * MIB)
    with loop_device(tmp_path / "disk") as device:
        pipe = Pipe(disk, device)
        run(*SNAPFS, "restore", directory, device, "--force", "--for-receive")
        change(disk, MIB)
        disk.create("s")
        assert pipe.run("s", "--since", directory / "latest"), pipe.words
        assert (disk.snapshots / "s").read_bytes() == device.read_bytes()[: 2 * MIB]
