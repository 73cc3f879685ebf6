"""Opening bitmaps, which takes memory and time."""

from __future__ import annotations

import os

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from snapfs.errors import LimitReached
from snapfs.fuse import bitmapfs
from snapfs.fuse.bitmapfs import MOST_WAITING, BitmapTree
from tests.support.fakes import Bench, pattern
from tests.support.images import CLUSTER


async def test_others_do_not_wait_in_numbers_for_bitmaps_to_be_opened(nursery, monkeypatch):
    bench = Bench.make(nursery, pattern(1, CLUSTER))
    await bench.engine.tracker.add("b")
    tree = BitmapTree(bench.engine)
    inode = tree.lookup("b")
    go, texts = trio.Event(), []

    async def held(call, *arguments):
        await go.wait()
        return call(*arguments)

    monkeypatch.setattr(bitmapfs, "in_thread", held)

    async def open_one(owner: bool) -> None:
        texts.append(await tree.open(inode, os.O_RDONLY, owner=owner))

    for _ in range(1 + MOST_WAITING):
        nursery.start_soon(open_one, False)
        await wait_all_tasks_blocked()
    with pytest.raises(LimitReached):
        await tree.open(inode, os.O_RDONLY, owner=False)
    nursery.start_soon(open_one, True)
    await wait_all_tasks_blocked()
    go.set()
    await wait_all_tasks_blocked()
    assert [b""] * (2 + MOST_WAITING) == texts
