"""The control socket: whatever comes in, one answer in words, and the daemon goes on."""

from __future__ import annotations

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

from snapfs.daemon.commands import Commands
from snapfs.daemon.control import MAX_LINE, ControlServer
from tests.support.fakes import CLUSTER, Bench, pattern

SIZE = 4 * CLUSTER
WORDS = ("create", "delete", "rename", "list", "show", "status", "map", "runs", "limit", "x", "")
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
async def serving(path: str) -> AsyncIterator[Bench]:
    async with trio.open_nursery() as nursery:
        bench = Bench.make(nursery, pattern(1, SIZE))
        fast = lambda: defaultdict(int)  # noqa: E731
        commands = Commands(bench.engine, "image", "/mnt", "process", fast, "/temp", lambda: None)
        server = ControlServer(path, commands.table(), frozenset({os.geteuid()}))
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
        assert status["result"]["mount"]["healthy"]
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
