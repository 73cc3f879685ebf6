"""What all tests share: fixtures, and how hard hypothesis tries.

HYPOTHESIS_PROFILE=dev      the default: some seconds
HYPOTHESIS_PROFILE=ci       10,000 steps of the engine's property test
HYPOTHESIS_PROFILE=soak     a lot, for a night
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.mounted import Mounted, mounts_below, run
from tests.support.patched import Program

_COMMON = {
    "deadline": None,  # machines differ; pytest-timeout ends what hangs
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    "print_blob": True,
    "report_multiple_bugs": False,
}
settings.register_profile("dev", max_examples=80, **_COMMON)
settings.register_profile("ci", max_examples=300, **_COMMON)
settings.register_profile("soak", max_examples=20_000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))


# Whoever started us may let signals be ignored (nohup, `&` in a script), and programs that we
# start would do so as well.
for _number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
    if signal.getsignal(_number) is signal.SIG_IGN:
        default = signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL
        signal.signal(_number, default)


CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 1 << 18  # sched.h, sys/mount.h


def pytest_configure(config: pytest.Config) -> None:
    """Of tests that run side by side each process has mounts of its own.

    Else a test that makes a mount namespace holds the mounts of the others, which say so at
    their end.  What a worker has mounted ends with it, so each test looks for its leftovers.
    """
    if hasattr(config, "workerinput") and not os.geteuid():
        libc = ctypes.CDLL(None, use_errno=True)
        done = libc.unshare(CLONE_NEWNS) or libc.mount(b"", b"/", None, MS_REC | MS_PRIVATE, None)
        assert not done, os.strerror(ctypes.get_errno())


@pytest.fixture(autouse=True)
def _needs_fuse(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("mount") and not os.path.exists("/dev/fuse"):
        if os.environ.get("CI"):
            pytest.fail("there is no /dev/fuse: CI must run the mount tests")
        pytest.skip("there is no /dev/fuse")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Mounted]]:
    """Make and mount an image: `mount(size_or_bytes, *options)`; unmounted at the end."""
    made: list[Mounted] = []

    def factory(content: int | bytes, *options: str, start: bool = True) -> Mounted:
        number = len(made)
        image = tmp_path / f"disk{number}.img"
        with open(image, "wb") as file:
            if isinstance(content, int):
                file.truncate(content)
            else:
                file.write(content)
        mountpoint = tmp_path / f"mnt{number}"
        mountpoint.mkdir()
        mounted = Mounted(image, mountpoint, list(options))
        made.append(mounted)
        return mounted.start() if start else mounted

    yield factory
    Program.end_all()
    for mounted in made:
        for path in sorted(mounts_below(mounted.mountpoint), reverse=True):
            done = mounted.snapfs("umount", path, check=False)
            if done.returncode:
                run("umount", "-l", path, check=False)
    left = mounts_below(tmp_path)
    assert [] == left
