"""The process that makes calls on our own mount, here on a plain directory."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from snapfs.client import mountinfo
from snapfs.fuse.mounting import Mountpoint
from snapfs.fuse.outsider import Outsider
from snapfs.fuse.pagecache import PageCache


@pytest.fixture
def outsider(tmp_path) -> Iterator[Outsider]:
    os.mkfifo(tmp_path / "fifo")  # to open it waits for a writer
    (tmp_path / "file").touch()
    made = Outsider.start(Mountpoint.open(str(tmp_path)))
    yield made
    made.close()
    os.waitpid(made.pid, 0)


async def refused(outsider: Outsider, call: str, name: str) -> None:
    with pytest.raises(OSError, match="helper process") as caught:
        await outsider.call(call, name)
    assert errno.ESRCH == caught.value.errno


async def test_calls_and_their_errors(outsider, tmp_path, nursery):
    await nursery.start(outsider.run)
    assert 0 == await outsider.call("wait", f"0 {mountinfo.look(str(tmp_path)).device} 0")
    assert 0 == await outsider.call("sync", "file")
    with pytest.raises(FileNotFoundError):
        await outsider.call("open", "nothing")


async def test_a_call_that_is_about_to_be_sent_when_the_process_ends_fails(outsider, nursery):
    ended = trio.Event()

    async def run(task_status: trio.TaskStatus[None]) -> None:
        await outsider.run(task_status)
        ended.set()

    await nursery.start(run)
    async with trio.open_nursery() as waiting:
        async with outsider._sending:
            waiting.start_soon(refused, outsider, "sync", "file")
            await trio.testing.wait_all_tasks_blocked()
            os.kill(outsider.pid, signal.SIGKILL)
            await ended.wait()


async def test_the_number_of_one_that_is_gone_is_not_ours(outsider, nursery):
    """Its fsync(2) is answered without one of ours, so who gets the number must not pass for it."""
    cache = PageCache(outsider)
    await nursery.start(outsider.run)
    assert cache.is_own(outsider.pid)
    os.kill(outsider.pid, signal.SIGKILL)  # the number stays until the fixture waits for it
    while outsider.lives:
        await trio.lowlevel.checkpoint()
    assert Path(f"/proc/{outsider.pid}/task/{outsider.pid}").exists()
    assert not cache.is_own(outsider.pid)


async def test_before_it_runs_there_is_nobody_to_ask(outsider):
    await refused(outsider, "sync", "file")


@pytest.mark.parametrize("busy", [False, True])
async def test_calls_after_its_end_and_those_under_way_fail(outsider, nursery, busy):
    """`busy`: it dies with a question unread, which resets the connection."""
    ended = trio.Event()

    async def run(task_status: trio.TaskStatus[None]) -> None:
        await outsider.run(task_status)
        ended.set()

    await nursery.start(run)
    if busy:
        os.kill(outsider.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, outsider.pid, os.WSTOPPED | os.WNOWAIT)
    async with trio.open_nursery() as waiting:
        waiting.start_soon(refused, outsider, "open", "fifo")
        await trio.testing.wait_all_tasks_blocked()
        os.kill(outsider.pid, signal.SIGKILL)
    await ended.wait()
    await refused(outsider, "sync", "file")


async def test_writing_back_leaves_the_file_open_for_the_one_who_asks_to_close_it(
    outsider, tmp_path, nursery
):
    await nursery.start(outsider.run)
    await outsider.call("wait", f"0 {mountinfo.look(str(tmp_path)).device} 0")
    fd = await outsider.call("write_back", "4096/file")
    assert 0 == await outsider.call("close", str(fd))
    with pytest.raises(FileNotFoundError):
        await outsider.call("write_back", "0/nothing")
    os.mkfifo(tmp_path / "other")
    writer = os.open(tmp_path / "other", os.O_RDWR)
    with pytest.raises(OSError) as caught:  # no file: and closed again
        await outsider.call("write_back", "0/other")
    os.close(writer)
    assert errno.ESPIPE == caught.value.errno
