"""Copies and backups: the commands over snapfs.backup, which is imported when it is used."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from typing import Any

from ..errors import ExitCode, SnapfsError
from ..wire import RemoteError
from .output import human


def _interrupted(*_signal: object) -> None:
    raise KeyboardInterrupt


def _long_job(arguments: argparse.Namespace, job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run a job that SIGTERM ends as Ctrl-C does; with --json its end is a line of JSON."""
    from ..backup.progress import emit  # noqa: PLC0415

    signal.signal(signal.SIGTERM, _interrupted)
    try:
        result = job()
    except (SnapfsError, OSError) as error:
        if arguments.json:
            if isinstance(error, RemoteError):
                code = error.exit_status
            else:
                code = int(error.exit_code) if isinstance(error, SnapfsError) else ExitCode.ERROR
            emit("error", {"message": str(error), "exit_code": int(code)})
        raise
    if arguments.json:
        emit("summary", result)
    return result


def copy(arguments: argparse.Namespace) -> int:
    """snapfs copy SNAPSHOT DEST."""
    from ..backup import copies  # noqa: PLC0415

    options = copies.CopyOptions(
        format=arguments.format,
        backing=arguments.backing,
        discard=arguments.discard,
        force=arguments.force,
        allow_missing=arguments.allow_missing,
        bytes_per_second=arguments.bwlimit,
        progress_fd=arguments.progress,
        json=arguments.json,
    )
    result = _long_job(arguments, lambda: copies.copy(arguments.snapshot, arguments.dest, options))
    if not arguments.json:
        resumed = f", resumed at {result['resumed_at']}" if result["resumed_at"] else ""
        print(
            f"{result['dest']}: {human(result['copied_bytes'])} copied, "
            f"{human(result['zero_bytes'])} of zeros{resumed}",
            file=sys.stderr,
        )
    return ExitCode.OK
