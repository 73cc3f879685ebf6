"""snapfs, killed at the Nth step: python dying.py N ARGUMENT...

Steps are the moments before and after everything that changes something that
outlives the process.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from typing import Any

from snapfs.backup import copying, qemu, records
from snapfs.backup.devices import DeviceTarget
from snapfs.backup.source import Source
from snapfs.backup.targets import Qcow2Target, RawTarget
from snapfs.backup.unfinished import Ledger
from snapfs.cli import main
from snapfs.client.wire import Client

left = int(sys.argv[1])


def step() -> None:
    global left  # noqa: PLW0603
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def watch(owner: Any, name: str) -> None:
    real = getattr(owner, name)

    @functools.wraps(real)
    def stepping(*arguments: Any, **options: Any) -> Any:
        step()
        result = real(*arguments, **options)
        step()
        return result

    setattr(owner, name, stepping)


copying.CHECKPOINT_BYTES = 1  # each piece is made durable
for owner, name in (
    (records, "replace_durably"),
    (records, "remove"),
    (os, "rename"),
    (qemu, "run"),
    (subprocess, "Popen"),
    (Client, "call"),
    (Source, "give_up_to"),
    (Ledger, "append"),
    (Qcow2Target, "flush"),
    (Qcow2Target, "finish"),
    (DeviceTarget, "mark"),
    (DeviceTarget, "_write_through"),
):
    watch(owner, name)
if sys.argv[2] == "receive":
    for name in ("write", "zero", "flush"):
        watch(RawTarget, name)
    watch(os, "ftruncate")
sys.exit(main(sys.argv[2:]))
