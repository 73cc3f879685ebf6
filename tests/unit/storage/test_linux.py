"""System calls: a child that must not outlive its parent."""

from __future__ import annotations

import os
import signal

from snapfs.storage.linux import end_with_parent


def test_a_child_whose_parent_died_first_ends_at_once():
    reader, writer = os.pipe()
    parent = os.fork()
    if not parent:
        prepare = end_with_parent(signal.SIGKILL)
        me = os.getpid()
        if not os.fork():
            while os.getppid() == me:
                pass
            prepare()
            os.write(writer, b"alive")
        os._exit(0)
    os.close(writer)
    os.waitpid(parent, 0)
    with os.fdopen(reader, "rb") as pipe:
        assert b"" == pipe.read()


def test_a_child_ends_with_its_parent():
    reader, writer = os.pipe()
    parent = os.fork()
    if not parent:
        prepare = end_with_parent(signal.SIGKILL)
        ready, tell = os.pipe()
        if not os.fork():
            prepare()
            os.write(tell, b"x")
            signal.pause()
            os._exit(0)
        os.read(ready, 1)
        os._exit(0)
    os.close(writer)
    os.waitpid(parent, 0)
    with os.fdopen(reader, "rb") as pipe:
        assert b"" == pipe.read()  # returns when the child has closed it, too
