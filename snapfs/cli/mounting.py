"""Starting the daemon of a mount, and ending it."""

from __future__ import annotations

import errno
import logging
import os
import select
import sys
from collections.abc import Callable, Sequence
from io import RawIOBase
from select import PIPE_BUF

from ..client import mountinfo, unmounting
from ..client.wire import Client
from ..daemon.options import MountOptions, parse_options
from ..errors import ExitCode, MountError, NotMounted, SnapfsError
from .logs import start_logging

END_SECONDS = 90  # the daemon gives up by itself before


class _Warnings(logging.Handler):
    """What whoever mounts should read, too, until the mount is usable."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage().replace("\n", " "))


class StartError(MountError):
    """The daemon in the background could not start; it has said why."""


def mount_in_background(
    image: str,
    mountpoint: str,
    texts: Sequence[str],
    *,
    dry_run: bool = False,
    sloppy: bool = False,
) -> int:
    """Mount, and return when the mount answers.

    The daemon goes on in the background.  Raises SnapfsError with its reason if
    it could not start.
    """
    options = parse_options(texts, sloppy=sloppy)
    if dry_run:
        from ..daemon.daemon import Config, check  # noqa: PLC0415

        check(Config(image, mountpoint, options))
        return ExitCode.OK
    reader, writer = os.pipe()
    # Twice, so that the daemon is no session leader and has no parent to wait for it.
    if os.fork():
        os.close(writer)
        os.wait()
        return _wait_ready(reader)
    os.close(reader)
    os.setsid()
    if os.fork():
        os._exit(0)
    status = 1
    try:
        status = _run_in_background(image, mountpoint, options, writer)
    finally:
        os._exit(status)


def _wait_ready(reader: int) -> int:
    with os.fdopen(reader, "rb") as pipe:
        kind, _, message = pipe.read().decode(errors="replace").partition("\n")
    if kind == "ready":
        for line in message.splitlines():
            print(f"snapfs: warning: {line}", file=sys.stderr)
        return ExitCode.OK
    error = StartError(message or "the daemon ended before the mount was usable")
    error.exit_code = ExitCode(int(kind) if kind.isdigit() else ExitCode.ERROR)  # type: ignore[misc]
    raise error


def _run_in_background(image: str, mountpoint: str, options: MountOptions, writer: int) -> int:
    from ..daemon.daemon import Config, serve  # noqa: PLC0415 - after the fork: it imports trio
    from ..storage.linux import close_all_but  # noqa: PLC0415

    close_all_but(writer)  # a lock that a script holds while it mounts is not ours to keep
    # Relative names mean what they meant to the caller.
    config = Config(image, mountpoint, options)
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
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)
        os.chdir("/")
        # No more than a pipe takes at once: the one who reads may be stopped.
        _tell_ready(waiting, "\n".join(["ready", *warnings.texts]).encode()[:PIPE_BUF])

    def tell(text: bytes) -> None:
        if not waiting.closed:  # else it was ready before, and the number is another file's
            waiting.write(text)

    try:
        return _serve(lambda: serve(config, ready), tell)
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
        name = f"{error.filename}: " if error.filename else ""
        status, message = ExitCode.ERROR, f"{name}{error.strerror}"
    except BaseException as error:
        logging.getLogger("snapfs").critical("the daemon died", exc_info=True)
        status, message = ExitCode.ERROR, f"unexpected error: {error!r}"
    logging.getLogger("snapfs").error("%s", message)
    try:
        tell(f"{int(status)}\n{message}".encode())
    except OSError:
        pass  # nobody waits any more
    return status


def mount_in_foreground(
    image: str, mountpoint: str, texts: Sequence[str], ready_fd: int | None
) -> int:
    """Mount and serve until unmounted; raises SnapfsError if that cannot be."""
    from ..daemon.daemon import Config, serve  # noqa: PLC0415 - it imports trio

    options = parse_options(texts)
    log = start_logging(options.log_level)

    def ready() -> None:
        log.start()
        if ready_fd is not None:
            _tell_ready(os.fdopen(ready_fd, "wb", buffering=0), b"READY\n")

    try:
        serve(Config(image, mountpoint, options), ready)
    finally:
        if not log.drain():
            os._exit(ExitCode.ERROR)  # the interpreter would wait for the thread that writes
    return ExitCode.OK


def unmount(mountpoint: str, *, lazy: bool = False) -> int:
    """Unmount, and return when the daemon has flushed and exited.

    The mount of a dead daemon is cleaned away.  Raises NotMounted, MountError.
    """
    mount = mountinfo.find_snapfs(mountpoint)
    where = mount.mountpoint
    process = _daemon_of(where)
    try:
        _unmount(where, lazy)
        if process is not None and not lazy:
            _wait_end(process)
    finally:
        if process is not None:
            os.close(process)
    return ExitCode.OK


def _daemon_of(mountpoint: str) -> int | None:
    """A pidfd of the daemon, None if it is dead."""
    try:
        with Client(mountpoint) as client:
            pid = client.call("status")["mount"]["pid"]
        return os.pidfd_open(pid)
    except (NotMounted, ProcessLookupError):
        return None


def _unmount(where: str, lazy: bool) -> None:
    try:
        unmounting.unmount(where, lazy=lazy)
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            unmounting.unmount(where, lazy=True)
        elif error.errno == errno.EBUSY:
            raise MountError(f"{where} is in use; see who with: fuser -vm {where}") from None
        else:
            raise MountError(f"{where} cannot be unmounted: {error.strerror}") from None


def _wait_end(process: int) -> None:
    poll = select.poll()
    poll.register(process, select.POLLIN)
    if not poll.poll(END_SECONDS * 1000):
        raise MountError("the daemon has not finished writing; it goes on in the background")
