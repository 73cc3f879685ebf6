"""Starting the daemon of a mount, in the background or in this process.

Quick to import, since every command that mounts waits for it: what serves, and trio
with it, comes only after the fork.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from io import RawIOBase
from select import PIPE_BUF
from typing import TYPE_CHECKING

from ..client.reasons import why
from ..errors import ExitCode, MountError, SnapfsError, UsageError
from ..fuse.mounting import Mountpoint
from . import signals, standardfiles
from .logs import start_logging
from .options import MountOptions

if TYPE_CHECKING:
    from ..fuse.outsider import Outsider


class _Warnings(logging.Handler):
    """What whoever mounts should read, too, until the mount is usable."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage().replace("\n", " "))


class StartError(MountError):
    """The daemon in the background could not start; it has said why."""


def in_background(image: str, mountpoint: str, options: MountOptions) -> list[str]:
    """Start a daemon that goes on in the background; returns its warnings when the mount answers.

    Raises SnapfsError with the daemon's reason if it could not start.
    """
    # By us, whom systemd lets pass where it mounts on demand: see `Mountpoint.open`.
    where = Mountpoint.open(mountpoint)
    reader, writer = os.pipe()
    # Twice, so that the daemon is no session leader and has no parent to wait for it.
    if os.fork():
        where.close()
        os.close(writer)
        os.wait()
        return _wait_ready(reader)
    os.close(reader)
    signals.prepare(background=True)
    status = 1
    try:
        from ..fuse.outsider import Outsider  # noqa: PLC0415 - after the fork: it imports trio

        outsider = Outsider.start(where)
        os.setsid()
        if os.fork():
            os._exit(0)
        status = _run_in_background(image, where, options, writer, outsider)
    finally:
        os._exit(status)


def _wait_ready(reader: int) -> list[str]:
    with os.fdopen(reader, "rb") as pipe:
        kind, _, message = os.fsdecode(pipe.read()).partition("\n")
    if kind == "ready":
        return message.splitlines()
    error = StartError(message or "the daemon ended before the mount was usable")
    error.exit_code = ExitCode(int(kind) if kind.isdigit() else ExitCode.ERROR)  # type: ignore[misc]
    raise error


def _run_in_background(
    image: str, where: Mountpoint, options: MountOptions, writer: int, outsider: Outsider
) -> int:
    from ..storage.linux import close_all_but  # noqa: PLC0415
    from .daemon import serve  # noqa: PLC0415 - after the fork: it imports trio
    from .preflight import Config  # noqa: PLC0415

    # A lock that a script holds while it mounts is not ours to keep.
    close_all_but(writer, where.fd, where.parent, outsider.fileno())
    # Relative names mean what they meant to the caller.
    config = Config(image, where, options)
    options.state = config.state
    if options.temp_dir is not None:
        options.temp_dir = os.path.realpath(options.temp_dir)
    waiting = os.fdopen(writer, "wb", buffering=0)
    log = start_logging(options.log_level, config.state)
    warnings = _Warnings(logging.WARNING)
    logging.getLogger().addHandler(warnings)

    def ready() -> None:
        logging.getLogger().removeHandler(warnings)
        log.start()
        standardfiles.discard(*standardfiles.STANDARD)
        os.chdir("/")
        # No more than a pipe takes at once: the one who reads may be stopped.
        _tell_ready(waiting, os.fsencode("\n".join(["ready", *warnings.texts]))[:PIPE_BUF])

    def tell(text: bytes) -> None:
        if not waiting.closed:  # else it was ready before, and the number is another file's
            waiting.write(text)

    try:
        return _serve(lambda: serve(config, ready, outsider), tell)
    finally:
        log.flush()


def _tell_ready(waiting: RawIOBase, text: bytes) -> None:
    """Tell who waits for the mount that it is usable, and close the file."""
    try:
        with waiting:
            waiting.write(text)
    except BrokenPipeError:  # no reason to take the mount away
        logging.getLogger("snapfs").warning("nobody waits for the mount any more")


def _serve(serve: Callable[[], None], tell: Callable[[bytes], object]) -> int:
    try:
        serve()
        return ExitCode.OK
    except SnapfsError as error:
        status, message = error.exit_code, str(error)
    except OSError as error:
        status, message = ExitCode.ERROR, why(error)
    except BaseException as error:
        logging.getLogger("snapfs").critical("the daemon died", exc_info=True)
        status, message = ExitCode.ERROR, f"unexpected error: {error!r}"
    logging.getLogger("snapfs").error("%s", message)
    try:
        tell(os.fsencode(f"{int(status)}\n{message}"))
    except OSError:
        pass  # nobody waits any more
    return status


def in_foreground(
    image: str, mountpoint: str, options: MountOptions, ready_fd: int | None = None
) -> None:
    """Mount and serve until unmounted; raises SnapfsError if that cannot be.

    READY is written to `ready_fd` when the mount answers, and the descriptor closed.
    """
    from .daemon import serve  # noqa: PLC0415 - it imports trio
    from .preflight import Config  # noqa: PLC0415

    waiting = None if ready_fd is None else _take(ready_fd)
    signals.prepare(background=False)
    log = start_logging(options.log_level)

    def ready() -> None:
        log.start()
        if waiting is not None:
            _tell_ready(waiting, b"READY\n")

    try:
        serve(Config(image, Mountpoint.open(mountpoint), options), ready)
    finally:
        if not log.drain():
            os._exit(ExitCode.ERROR)  # the interpreter would wait for the thread that writes


def _take(ready_fd: int) -> RawIOBase:
    """The file of a descriptor that the caller has opened for us; UsageError if it has not.

    Later the number could be a file of ours.
    """
    try:
        waiting = os.fdopen(os.dup(ready_fd), "wb", buffering=0)
    except OSError as error:
        raise UsageError(f"--ready-fd={ready_fd}: {error.strerror}") from None
    if ready_fd in standardfiles.STANDARD:
        standardfiles.discard(ready_fd)
    else:
        os.close(ready_fd)
    return waiting
