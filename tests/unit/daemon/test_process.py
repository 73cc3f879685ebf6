from __future__ import annotations

import resource
import subprocess
import sys

CODE = """
import resource as r
from snapfs.daemon import process
for kind in process.RAISED:
    r.setrlimit(kind, (1 << 36, r.getrlimit(kind)[1]) if kind != r.RLIMIT_NOFILE else (256, 512))
process.raise_limits()
print(*(r.getrlimit(kind)[0] for kind in process.RAISED), process.largest_file())
"""


def test_limits_are_raised_as_far_as_they_may_be():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    kinds = (resource.RLIMIT_FSIZE, resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_DATA)
    hard = [resource.getrlimit(kind)[1] for kind in kinds]
    largest = None if hard[0] == resource.RLIM_INFINITY else hard[0]
    assert ["512", *map(str, hard), str(largest)] == done.stdout.split()
