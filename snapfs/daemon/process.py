"""What the daemon asks the kernel about itself as a process."""

from __future__ import annotations

import ctypes
import resource

OOM_SCORE_ADJ = -900
PR_SET_IO_FLUSHER = 57  # linux/prctl.h

# What whoever mounts allows programs of his own is not meant for a disk: the size of a file, for
# one, would be that of the image.
RAISED = (
    resource.RLIMIT_NOFILE,
    resource.RLIMIT_FSIZE,
    resource.RLIMIT_CPU,
    resource.RLIMIT_AS,
    resource.RLIMIT_DATA,
)

_libc = ctypes.CDLL(None, use_errno=True)


def raise_limits() -> None:
    """Let this process have as much of everything as it may (getrlimit(2))."""
    for kind in RAISED:
        _, hard = resource.getrlimit(kind)
        try:
            resource.setrlimit(kind, (hard, hard))
        except (OSError, ValueError):
            pass  # descriptors above fs.nr_open, which was lowered since: it stays as it is


def largest_file() -> int | None:
    """The size in bytes that a file may get by us after `raise_limits`, None: any."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    return None if hard == resource.RLIM_INFINITY else hard


def spare_from_oom() -> None:
    """Ask the kernel to kill others first: without us a guest loses its disk (proc(5))."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write(str(OOM_SCORE_ADJ))
    except OSError:
        pass  # only root may


def set_io_flusher() -> bool:
    """Tell the kernel that we are in the write-back path of a file system (prctl(2)).

    Memory that we need is then found without writing back through ourselves.
    False where it is not permitted.
    """
    return bool(_libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) == 0)
