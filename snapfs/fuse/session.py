"""The session with the kernel: /dev/fuse, from the mount to its end.

The one place that starts pyfuse3.  To be imported after `requestfilter.load()`.
"""

from __future__ import annotations

import pyfuse3

from ..errors import MountError
from . import requestfilter
from .fusefs import MAX_TASKS, SnapshotFS


class Session:
    """One mount of `fs` on the directory `where`."""

    def __init__(self, fs: SnapshotFS, where: str, options: set[str]) -> None:
        """Mount; raises MountError, and then nothing is mounted."""
        try:
            pyfuse3.init(fs, where, options)
        except RuntimeError:
            raise MountError(f"{where} cannot be mounted; see the message above") from None
        if not requestfilter.attached():
            self.close(unmount=True)
            raise MountError("this build of pyfuse3 goes past the request filter")

    async def run(self) -> None:
        """Answer requests until unmounted, or told to `terminate`."""
        await pyfuse3.main(max_tasks=MAX_TASKS)

    def terminate(self) -> None:
        """End `run` soon; what is mounted stays mounted."""
        pyfuse3.terminate()

    def close(self, *, unmount: bool) -> None:
        """Close /dev/fuse; whoever still waits for an answer gets ENOTCONN."""
        pyfuse3.close(unmount=unmount)
