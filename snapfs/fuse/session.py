"""The session with the kernel: /dev/fuse, from the mount to its end.

The one place that starts pyfuse3.  To be imported after `requestfilter.load()`.
"""

from __future__ import annotations

from collections.abc import Iterable

import pyfuse3

from ..client.unmounting import Connection, unmount
from ..errors import MountError
from . import requestfilter
from .fusefs import MAX_TASKS, SnapshotFS
from .mounting import Mountpoint, attach


class Session:
    """One mount of `fs` on the directory `where`."""

    def __init__(
        self, fs: SnapshotFS, where: Mountpoint, source: str, options: Iterable[str]
    ) -> None:
        """Mount; raises MountError, NotPermitted or OSError, and then nothing is mounted."""
        options = list(options)
        words = ["allow_other" if word == "allow_root" else word for word in options]
        fd, self.mount = attach(where, source, words)
        self.connection = Connection(self.mount)
        try:
            # The kernel knows no allow_root: it lets everybody in, and libfuse refuses others.
            pyfuse3.init(fs, f"/dev/fd/{fd}", {"allow_root"} & set(options))
            attached = requestfilter.attached()
        except RuntimeError:
            attached = None
        if not attached:
            unmount(self.mount, lazy=True)
            if attached is None:
                raise MountError(f"{where.path} cannot be mounted; see the message above")
            self.close()
            raise MountError("this build of pyfuse3 goes past the request filter")

    async def run(self) -> None:
        """Answer requests until unmounted, or told to `terminate`."""
        await pyfuse3.main(max_tasks=MAX_TASKS)

    def terminate(self) -> None:
        """End `run` soon; what is mounted stays mounted."""
        pyfuse3.terminate()

    def close(self) -> None:
        """Close /dev/fuse; whoever still waits for an answer gets ENOTCONN."""
        pyfuse3.close(unmount=False)
