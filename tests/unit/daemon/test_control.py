"""The control socket: whatever comes in, one answer in words, and the daemon goes on."""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import socket
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from snapfs import errors
from snapfs.daemon import commands as commands_module
from snapfs.daemon import control
from snapfs.daemon.commands import Commands
from snapfs.daemon.control import MAX_LINE, ControlServer
from snapfs.daemon.farewell import Farewell
from tests.support.fakes import Bench, pattern
from tests.support.images import CLUSTER

SIZE = 4 * CLUSTER
WORDS = ("create", "delete", "rename", "list", "show", "status", "map", "regions", "runs", "limit",
         "x", "")  # fmt: skip
NAMES = ("a", "b", "", ".", "../x", "a/b", "n" * 300, "\0", "\ud800", "ü")
FILES = ("active", "snapshots/a", "snapshots/", "snapshots", "/etc/passwd", "")
NUMBERS = (0, 1, -1, 4096, 1 << 40, 1 << 63, -(1 << 70), 1.5)
RAW = (b"", b"[" * 5000, b'{"a":' * 3000, b"\xff\xfe", b"null", b"1e999", b'"\\ud800"', b"{}")
KEYS = {
    "name": NAMES, "old": NAMES, "new": NAMES, "file": FILES, "offset": NUMBERS,
    "length": NUMBERS, "minimum": NUMBERS, "bytes": NUMBERS, "dry_run": (True, False, 0),
}  # fmt: skip


def junk(chance: random.Random, depth: int = 0):
    """Any JSON value."""
    kind = chance.randrange(8 if depth < 3 else 6)
    if kind == 6:
        return [junk(chance, depth + 1) for _ in range(chance.randrange(4))]
    if kind == 7:
        return {chance.choice("abc"): junk(chance, depth + 1) for _ in range(chance.randrange(4))}
    return (None, True, chance.randrange(-9, 9), 0.5, "", chance.choice(NAMES))[kind]


def message(chance: random.Random) -> bytes:
    """A line: mostly requests that are nearly right."""
    kind = chance.random()
    if kind < 0.05:
        return chance.choice(RAW)
    if kind < 0.1:
        return chance.randbytes(chance.randrange(80)).replace(b"\n", b"")
    if kind < 0.15:
        return json.dumps(junk(chance)).encode()
    request = {"version": 1, "command": chance.choice(WORDS)}
    for key, values in KEYS.items():
        if chance.random() < 0.7:
            request[key] = junk(chance) if chance.random() < 0.1 else chance.choice(values)
    if chance.random() < 0.05:
        request["version"] = junk(chance)
    return json.dumps(request).encode()


@asynccontextmanager
async def serving(path: str, *, group: int | None = None, owners: bool = True):
    """A server; unless `owners` nobody owns its mount."""
    async with trio.open_nursery() as nursery:
        bench = Bench.make(nursery, pattern(1, SIZE))
        fast = lambda: defaultdict(int)  # noqa: E731
        commands = Commands(bench.engine, "image", "/mnt", "process", fast, "/temp", lambda: None)
        server = ControlServer(
            path, commands.table(), frozenset({os.geteuid()}), Farewell(),
            group=group, visible=commands.visible(),
        )  # fmt: skip
        if not owners:
            server._uids = frozenset()
        await nursery.start(server.serve)
        yield bench
        nursery.cancel_scope.cancel()


async def converse(path: str, lines: list[bytes]) -> list[dict]:
    """Send lines, all at once, and read an answer to each."""
    answers: list[dict] = []
    stream = await trio.open_unix_socket(path)
    async with stream, trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, b"".join(line + b"\n" for line in lines))
        received = b""
        while len(answers) < len(lines):
            data = await stream.receive_some(65536)
            assert data, "the server hung up"
            *complete, received = (received + data).split(b"\n")
            answers += [json.loads(line) for line in complete]
    return answers


@pytest.mark.parametrize("seed", range(4))
async def test_random_messages(tmp_path, seed):
    """100,000 in CI."""
    path = str(tmp_path / "socket")
    chance = random.Random(seed)
    async with serving(path) as bench:
        for _ in range(100 if "CI" in os.environ else 10):
            lines = [message(chance) for _ in range(250)]
            for line, answer in zip(lines, await converse(path, lines), strict=True):
                assert isinstance(answer["ok"], bool)
                if not answer["ok"]:
                    assert "internal error" not in answer["error"]["message"], line
        [status] = await converse(path, [b'{"version": 1, "command": "status"}'])
        kinds = {problem["kind"] for problem in status["result"]["problems"]}
        assert kinds <= {"temp-space"}  # of a limit that is 0
        assert all(layer.pins == 0 and layer.openers == 0 for layer in bench.engine.layers)
        assert len(bench.engine.layers) <= 6


async def test_a_line_without_end_is_refused_and_the_next_client_served(tmp_path):
    path = str(tmp_path / "socket")
    async with serving(path):
        stream = await trio.open_unix_socket(path)
        async with stream:
            await stream.send_all(b"x" * (MAX_LINE + 1))
            answer = json.loads(await stream.receive_some(65536))
            assert "too long" in answer["error"]["message"]
        assert (await converse(path, [b'{"version": 1, "command": "list"}']))[0]["ok"]


async def test_clients_that_say_nothing_or_go_away_cost_nothing(tmp_path):
    path = str(tmp_path / "socket")
    async with serving(path):
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(300):
            client = socket.socket(socket.AF_UNIX)
            client.connect(path)
            client.send(b'{"version": 1, "comm')
            await trio.testing.wait_all_tasks_blocked()
            client.close()
            await trio.testing.wait_all_tasks_blocked()
        gc.collect()
        assert before == len(os.listdir("/proc/self/fd"))
        assert (await converse(path, [b'{"version": 1, "command": "list"}']))[0]["ok"]


STATUS = b'{"version": 1, "command": "status"}'


class Scarce:
    """Stands in for trio's sockets: accept(2) fails where `numbers` has an errno."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.numbers: list[int] = []
        real = trio.socket.socket
        scarce = self

        class Listener:
            def __init__(self, *arguments: int) -> None:
                self._socket = real(*arguments)

            def __enter__(self):
                return self

            def __exit__(self, *_exception: object) -> None:
                self._socket.close()

            def __getattr__(self, name: str):
                return getattr(self._socket, name)

            async def accept(self):
                await trio.lowlevel.wait_readable(self._socket)  # as accept(2) would fail then
                if scarce.numbers:
                    number = scarce.numbers.pop(0)
                    raise OSError(number, os.strerror(number))
                return await self._socket.accept()

        monkeypatch.setattr(trio.socket, "socket", Listener)
        self._undo = lambda: monkeypatch.setattr(trio.socket, "socket", real)

    @asynccontextmanager
    async def serving(self, path: str) -> AsyncIterator[None]:
        async with serving(path):
            self._undo()  # only the server's
            yield


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ECONNABORTED])
async def test_a_client_that_cannot_be_accepted_at_once_is_a_moment_later(
    tmp_path, monkeypatch, number
):
    monkeypatch.setattr(control, "RETRY_SECONDS", 0)
    path = str(tmp_path / "socket")
    scarce = Scarce(monkeypatch)
    async with scarce.serving(path):
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            scarce.numbers = [number] * 2
            assert (await converse(path, [STATUS]))[0]["ok"]
            await trio.testing.wait_all_tasks_blocked()
            assert before == len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.EMFILE, "LimitNOFILE="), (errno.ENFILE, "fs.file-max")]
)
async def test_the_last_descriptor_tells_a_client_why_it_is_refused(
    tmp_path, monkeypatch, number, remedy
):
    monkeypatch.setattr(control, "RETRY_SECONDS", 0)
    path = str(tmp_path / "socket")
    scarce = Scarce(monkeypatch)
    async with scarce.serving(path):
        scarce.numbers = [number] * (control.SPARE_DESCRIPTORS + 3)
        [answer] = await converse(path, [STATUS])
        assert "LimitReached" == answer["error"]["kind"]
        assert remedy in answer["error"]["message"]
        assert (await converse(path, [STATUS]))[0]["ok"]


async def test_a_command_without_a_descriptor_says_what_helps(tmp_path, monkeypatch):
    path = str(tmp_path / "socket")
    async with serving(path) as bench:
        monkeypatch.setattr(bench.engine, "create_snapshot", refuse)
        request = b'{"version": 1, "command": "create", "name": "a"}'
        [answer] = await converse(path, [request])
        assert "LimitNOFILE=" in answer["error"]["message"]


async def refuse(*_arguments: object, **_keywords: object) -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


class _StandingClock(commands_module.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2026, 11, 30, 12, 0, 0, tzinfo=tz)


async def test_unnamed_snapshots_of_one_second_have_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(commands_module, "datetime", _StandingClock)
    path = str(tmp_path / "socket")
    request = b'{"version": 1, "command": "create", "unnamed": true}'
    found: list[str] = []

    async def create() -> None:
        answers = await converse(path, [request])
        found.append(answers[0]["result"]["name"])

    async with serving(path):
        async with trio.open_nursery() as creators:
            for _ in range(5):
                creators.start_soon(create)
    moment = "2026-11-30T12-00-00Z"
    assert [moment, *(f"{moment}-{number}" for number in range(2, 6))] == sorted(found)


async def test_without_a_name_nothing_is_created_unless_that_is_meant(tmp_path):
    path = str(tmp_path / "socket")
    async with serving(path) as bench:
        [answer] = await converse(path, [b'{"version": 1, "command": "create"}'])
        assert not answer["ok"]
        assert not bench.engine.layers


async def test_the_directory_of_the_socket_is_given_to_another_one_name(tmp_path):
    state, moved = tmp_path / "state", tmp_path / "moved"
    state.mkdir(mode=0o700)
    async with trio.open_nursery() as nursery:
        server = ControlServer(str(state / "control.sock"), {}, frozenset(), Farewell())
        await nursery.start(server.serve)
        assert 0o600 == (state / "control.sock").stat().st_mode & 0o777
        state.rename(moved)
        state.mkdir()
        (state / "control.sock").touch()
        nursery.cancel_scope.cancel()
    assert ["control.sock"] == os.listdir(state)
    assert [] == os.listdir(moved)


async def test_no_socket_is_made_in_a_directory_of_others(tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o777)
    (tmp_path / "theirs").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    for name in ("theirs", "link"):
        server = ControlServer(str(tmp_path / name / "control.sock"), {}, frozenset(), Farewell())
        async with trio.open_nursery() as nursery:
            with pytest.raises(errors.StateError):
                await nursery.start(server.serve)
            nursery.cancel_scope.cancel()
    assert [] == os.listdir(tmp_path / "theirs")


LOOKS = ("list", "status", "map", "regions", "events")


async def test_members_of_the_group_may_look_and_nothing_else(tmp_path):
    path = str(tmp_path / "socket")
    async with serving(path, group=os.getegid(), owners=False) as bench:
        await bench.engine.create_snapshot("s")
        words = {*Commands.table(_commands(bench)), "farewell", "metrics", "", "visible"}
        for word in sorted(words):
            request = {"version": 1, "command": word, "name": "s", "new": "t", "file": "active"}
            request |= {
                "offset": 0,
                "length": 1,
                "bytes": 5,
                "a": "s",
                "source": "s",
                "target": "s",
            }
            [answer] = await converse(path, [json.dumps(request).encode()])
            assert answer["ok"] == (word in LOOKS), (word, answer)
            if not answer["ok"]:
                assert "NotPermitted" == answer["error"]["kind"]
                assert "may look" in answer["error"]["message"]
        assert ["s"] == [layer.name for layer in bench.engine.snapshots]
        assert bench.engine.space.limit is None


def _commands(bench: Bench) -> Commands:
    fast = lambda: defaultdict(int)  # noqa: E731
    return Commands(bench.engine, "image", "/mnt", "process", fast, "/temp", lambda: None)


async def test_who_may_only_look_makes_the_kernel_write_nothing_back(tmp_path):
    path = str(tmp_path / "socket")
    written: list[str] = []

    async def barrier() -> None:
        written.append("back")

    request = b'{"version": 1, "command": "map", "file": "active"}'
    for owners in (False, True):
        async with serving(path, group=os.getegid(), owners=owners) as bench:
            bench.engine.barrier = barrier
            assert (await converse(path, [request]))[0]["ok"]
            assert owners == bool(written)


@pytest.mark.parametrize("group", [None, 1 << 31])
async def test_others_may_not_even_look(tmp_path, group):
    path = str(tmp_path / "socket")
    async with serving(path, group=group, owners=False):
        [answer] = await converse(path, [STATUS])
        assert "only the owner" in answer["error"]["message"]


async def test_visitors_do_not_keep_the_owner_out(tmp_path):
    path = str(tmp_path / "socket")
    async with serving(path, group=os.getegid(), owners=False):
        streams = [await trio.open_unix_socket(path) for _ in range(control.MAX_VISITORS)]
        await trio.testing.wait_all_tasks_blocked()
        [answer] = await converse(path, [STATUS])
        assert "InUse" == answer["error"]["kind"]
        for stream in streams:
            await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert (await converse(path, [STATUS]))[0]["ok"]


async def test_the_groups_of_a_peer_are_those_that_it_connected_with():
    one, other = trio.socket.socketpair()
    with one, other:
        assert {os.getegid(), *os.getgroups()} == control._groups(one, os.getegid())
