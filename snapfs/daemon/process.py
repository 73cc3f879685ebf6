"""What the daemon asks the kernel about itself as a process."""

from __future__ import annotations

import ctypes

OOM_SCORE_ADJ = -900
PR_SET_IO_FLUSHER = 57  # linux/prctl.h

_libc = ctypes.CDLL(None, use_errno=True)


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
