"""A failing system call in words: the thing, the reason, and what to do next."""

from __future__ import annotations

import errno
import os

_REMEDIES = {
    errno.ENOSPC: "free some space there",
    errno.ENOENT: "check the path, and whether its file system is mounted",
    errno.EDQUOT: "free some space there, or have the quota raised",
    errno.EROFS: "that file system is read-only: choose another place, or remount it read-write",
    errno.EACCES: "ask its owner, or be root",
    errno.EPERM: "ask its owner, or be root",
    errno.ENOTDIR: "something on the way to it is a file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "its storage fails: see the kernel's log (dmesg)",
    errno.ENOTCONN: "the daemon behind it is gone: unmount that, and mount it again",
    errno.ESTALE: "it was replaced meanwhile: try again",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the sysctl fs.file-max",
    errno.EFBIG: "raise the limit of the size of files (ulimit -f), or use another file system",
    errno.ETXTBSY: "a program runs from it",
    errno.ENOMEM: "end some programs",
}


def name_of(error: OSError) -> str | None:
    """The path that it is about, if that is known."""
    name = error.filename2 if error.filename2 is not None else error.filename
    return None if name is None or isinstance(name, int) else os.fsdecode(name)


def why(error: OSError) -> str:
    """One line for people."""
    name = name_of(error)
    text = error.strerror or str(error) or type(error).__name__
    remedy = _REMEDIES.get(error.errno or 0)
    if remedy is None or text != os.strerror(error.errno or 0):
        remedy = None  # who raised it has said what there is to say
    return (f"{name}: " if name else "") + text + (f"; {remedy}" if remedy else "")
