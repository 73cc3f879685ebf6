"""What comes from outside: signals, a terminal that goes away, standard files that are closed."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.mounted import K64, PATIENCE, SNAPFS, Mounted, helpers_of, mounts_below

OLD, NEW = b"o" * K64, b"n" * K64
HELPER = "import sys; sys.argv[0] = 'mount.snapfs'; from snapfs.cli import main; sys.exit(main())"
FORMS = {
    "background": [*SNAPFS, "mount"],
    "foreground": [*SNAPFS, "mount", "-f"],
    "mount(8)": [sys.executable, "-c", HELPER],
}


def ended(pid: int) -> None:
    """Return when a process is gone, whose child it may be."""
    process = os.pidfd_open(pid)
    select.select([process], [], [], PATIENCE)
    os.close(process)


def is_mounted(disk: Mounted) -> bool:
    return str(disk.mountpoint) in mounts_below(disk.mountpoint)


def is_clean(disk: Mounted) -> bool:
    return bool(json.loads((disk.state / "manifest.json").read_text())["clean"])


def ignores(pid: int) -> set[signal.Signals]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = int(next(line for line in lines if line.startswith("SigIgn:")).split()[1], 16)
    return {each for each in signal.Signals if mask & (1 << (each - 1))}


@contextmanager
def foreground(disk: Mounted, *, before: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """`snapfs mount -f`, when the mount answers; `before`: what the shell does first."""
    reader, writer = os.pipe()
    options = [word for option in disk.all_options for word in ("-o", option)]
    process = subprocess.Popen(
        ["sh", "-c", f'{before}\nexec "$@"', "-", *SNAPFS, "mount", "-f", "--ready-fd",
         str(writer), *options, disk.image, disk.mountpoint],
        pass_fds=[writer], start_new_session=True,
    )  # fmt: skip
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert b"READY\n" == pipe.read()
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(PATIENCE)


# Standard files


@pytest.mark.parametrize("form", FORMS)
def test_any_of_the_standard_files_may_be_closed(mount: Callable[..., Mounted], form):
    disk = mount(OLD * 2, start=False)
    options = [word for option in disk.all_options for word in ("-o", option)]
    for closed in range(8):
        fds = [fd for fd in range(3) if closed & 1 << fd]
        shut = " ".join(f"{fd}>&-" for fd in fds)
        reader, writer = os.pipe()
        command = [*FORMS[form], str(disk.image), str(disk.mountpoint), *options]
        if form == "foreground":
            command += ["--ready-fd", str(writer)]
        process = subprocess.Popen(
            ["sh", "-c", f'exec "$@" {shut}', "-", *command],
            pass_fds=[writer] if form == "foreground" else [],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            assert (b"READY\n" if form == "foreground" else b"") == pipe.read(), fds
        if form != "foreground":
            said = process.communicate(timeout=PATIENCE)
            assert (0, (b"", b"")) == (process.returncode, said), fds
        disk.pid = disk.json("status")["mount"]["pid"]
        for fd in range(3):
            target = os.readlink(f"/proc/{disk.pid}/fd/{fd}")
            assert target == "/dev/null" or target.startswith("pipe:"), fds
        disk.create(f"s{closed}")
        disk.write(0, NEW)
        assert NEW + OLD == disk.image.read_bytes()
        assert OLD == disk.read("snapshots/s0", 0, K64)
        disk.snapfs("umount", disk.mountpoint)
        if form == "foreground":
            process.communicate(timeout=PATIENCE)
            assert 0 == process.returncode


@pytest.mark.parametrize("form", FORMS)
def test_what_cannot_be_mounted_says_so_whatever_is_closed(mount: Callable[..., Mounted], form):
    disk = mount(OLD, start=False)
    disk.image.unlink()
    command = [*FORMS[form], str(disk.image), str(disk.mountpoint)]
    codes, said = set(), set()
    for shut in ("", "0<&-", "1>&-", "0<&- 1>&-", "0<&- 1>&- 2>&-"):
        done = subprocess.run(
            ["sh", "-c", f'exec "$@" {shut}', "-", *command],
            capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        codes.add(done.returncode)
        said.add(done.stderr.replace("ERROR: ", ""))
        assert "" == done.stdout
    assert 1 == len(codes)
    assert 0 not in codes
    first = {line[: line.find("\n") + 1].partition(";")[0] for line in said}
    assert {"", f"snapfs: there is no image {disk.image}"} == first


@pytest.mark.parametrize("fd", [1, 2])
def test_ready_may_go_to_a_standard_file(mount: Callable[..., Mounted], fd):
    disk = mount(OLD * 2, start=False)
    process = subprocess.Popen(
        [*SNAPFS, "mount", "-f", "--ready-fd", str(fd), disk.image, disk.mountpoint],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    pipe = {1: process.stdout, 2: process.stderr}[fd]
    assert pipe is not None
    assert b"READY\n" == pipe.read()  # to its end: it has been closed
    assert "/dev/null" == os.readlink(f"/proc/{process.pid}/fd/{fd}")
    disk.snapfs("umount", disk.mountpoint)
    process.communicate(timeout=PATIENCE)
    assert 0 == process.returncode
    assert OLD * 2 == disk.image.read_bytes()


def test_a_number_that_is_not_open_is_refused(mount: Callable[..., Mounted]):
    disk = mount(OLD, start=False)
    command = ["mount", "-f", "--ready-fd", "77", disk.image, disk.mountpoint]
    done = disk.snapfs(*command, check=False)
    assert (2, True) == (done.returncode, "--ready-fd=77: Bad file descriptor" in done.stderr)
    assert not disk.state.exists()


# Signals


def test_signals_that_mean_nothing_to_a_daemon(mount: Callable[..., Mounted]):
    disk = mount(OLD * 2)
    assert disk.pid is not None
    expected = {signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE, signal.SIGTTOU}
    assert expected <= ignores(disk.pid)
    for number in expected:
        os.kill(disk.pid, number)
    disk.write(0, NEW)
    assert disk.json("status")["mount"]["healthy"]


def test_the_helper_process_stays_with_the_daemon(mount: Callable[..., Mounted]):
    disk = mount(OLD * 2)
    assert disk.pid is not None
    expected = {signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1,
                signal.SIGUSR2}  # fmt: skip
    assert [True] == [expected <= ignores(helper) for helper in helpers_of(disk.pid)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_signals_that_end_a_daemon_in_order(mount: Callable[..., Mounted], number):
    disk = mount(OLD * 2)
    assert disk.pid is not None
    os.kill(disk.pid, number)
    ended(disk.pid)
    assert (False, True) == (is_mounted(disk), is_clean(disk))


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_in_the_foreground_they_are_these(mount: Callable[..., Mounted], number):
    disk = mount(OLD * 2, start=False)
    with foreground(disk) as process:
        assert {signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE} <= ignores(process.pid)
        process.send_signal(number)
        assert 0 == process.wait(PATIENCE)
    assert (False, True) == (is_mounted(disk), is_clean(disk))


def test_what_was_to_be_ignored_is(mount: Callable[..., Mounted]):
    disk = mount(OLD * 2, start=False)
    with foreground(disk, before="trap '' HUP QUIT") as process:
        assert {signal.SIGHUP, signal.SIGQUIT} <= ignores(process.pid)
        for number in (signal.SIGHUP, signal.SIGQUIT):
            process.send_signal(number)
        assert disk.json("status")["mount"]["healthy"]
        process.terminate()
        assert 0 == process.wait(PATIENCE)


def test_a_terminal_that_is_closed_ends_the_mount_in_order(mount: Callable[..., Mounted]):
    disk = mount(OLD * 2, start=False)
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    pid, terminal = pty.fork()
    if not pid:
        os.execv(
            SNAPFS[0],
            [*SNAPFS, "mount", "-f", "--ready-fd", str(writer), disk.image, disk.mountpoint],
        )
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert b"READY\n" == pipe.read()
    disk.write(0, NEW)
    os.close(terminal)
    assert 0 == os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert (False, True) == (is_mounted(disk), is_clean(disk))


def test_a_terminal_that_is_closed_leaves_a_mount_in_the_background(
    mount: Callable[..., Mounted],
):
    disk = mount(OLD * 2, start=False)
    pid, terminal = pty.fork()
    if not pid:
        os.execv(SNAPFS[0], [*SNAPFS, "mount", str(disk.image), str(disk.mountpoint)])
    assert 0 == os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(terminal)
    disk.write(0, NEW)
    assert disk.json("status")["mount"]["healthy"]
