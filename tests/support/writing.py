"""Somebody who writes to `active` until the daemon is killed under him."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable

from tests.support.mounted import Mounted


def killed_while_writing(disk: Mounted, after: int, write: Callable[[int], None]) -> None:
    """Call `write` with a descriptor of `active` again and again; kill the daemon meanwhile.

    It is killed when `write` has returned more than `after` times, and mounted again.
    """
    enough = threading.Event()

    def work() -> None:
        fd = os.open(disk.active, os.O_WRONLY)
        try:
            for number in range(10_000):
                write(fd)
                if number == after:
                    enough.set()
        except OSError as error:
            assert error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
        finally:
            with contextlib.suppress(OSError):  # flush of a dead mount
                os.close(fd)

    writer = threading.Thread(target=work)
    writer.start()
    enough.wait()
    disk.kill()
    writer.join()
    disk.start()
