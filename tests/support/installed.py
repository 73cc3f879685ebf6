"""snapfs as it is when it is installed: found by mount(8), umount(8) and the shell.

In a mount namespace of its own, where /usr/sbin has the helpers, so that nothing of the machine is
touched; what is mounted there ends with it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.mounted import PATIENCE

HELPERS = ("mount.snapfs", "umount.snapfs", "umount.fuse.snapfs")

# $1: the directory, $2: the program, $3: the script.
_OUTSIDE = f"""
set -e
mkdir -p "$1/sbin"
mount -t tmpfs snapfs-test "$1/sbin"
mkdir "$1/sbin/upper" "$1/sbin/work"
for name in {" ".join(HELPERS)}; do ln -s "$2" "$1/sbin/upper/$name"; done
upper="lowerdir=/usr/sbin,upperdir=$1/sbin/upper,workdir=$1/sbin/work"
mount -t overlay -o "$upper" overlay /usr/sbin
export PATH=${{2%/*}}:$PATH
cd "$1"
status=0
bash -e -c "$3" || status=$?
# What a script that has failed leaves: daemons would live on, and this namespace with them.
cd /
findmnt -nlo TARGET | tac | grep -E "^(/srv|/mnt|$1)/" |
    while read -r where; do umount -l "$where" || true; done
exit $status
"""


def installed(script: str, top: Path, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a script of bash, in the directory `top`, where snapfs is installed.  Takes root."""
    program = Path(sys.executable).with_name("snapfs")
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "bash", "-c", _OUTSIDE, "installed",
         top, program, script],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert not check or done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
