"""snapfs as it is when it is installed: found by mount(8), umount(8) and the shell.

In a mount namespace of its own, where /usr/sbin has the helpers, so that nothing of the machine is
touched; what is mounted there ends with it.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from tests.support.mounted import PATIENCE

HELPERS = ("mount.snapfs", "umount.snapfs", "umount.fuse.snapfs")

_SETUP = """
set -e
mkdir -p {top}/sbin
mount -t tmpfs snapfs-test {top}/sbin
mkdir {top}/sbin/upper {top}/sbin/work
for name in {helpers}; do ln -s {program} {top}/sbin/upper/$name; done
chmod 755 {top}/sbin/upper
mount -t overlay overlay -o lowerdir=/usr/sbin,upperdir={top}/sbin/upper,workdir={top}/sbin/work \
    /usr/sbin
export PATH={bin}:$PATH
cd {top}
"""


def installed(script: str, top: Path, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a script of bash, in the directory `top`, where snapfs is installed.  Takes root."""
    program = Path(sys.executable).with_name("snapfs")
    setup = _SETUP.format(
        top=shlex.quote(str(top)), helpers=" ".join(HELPERS), program=shlex.quote(str(program)),
        bin=shlex.quote(str(program.parent)),
    )  # fmt: skip
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "bash", "-c", setup + script],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert not check or done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
