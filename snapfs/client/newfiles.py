"""Files that somebody else may read at any moment: the old one or the new one, never a part."""

from __future__ import annotations

import os
import secrets

from ..storage.smallfiles import write_and_close


def replace(path: str, data: bytes) -> None:
    """Make a file with this content, durable, in place of one of that name.  Blocks; OSError.

    Its mode is that of the one before, or what the umask leaves of 0644.  What a link names is
    replaced, not the link; what is no file (a terminal, a pipe) is written.
    """
    path = os.path.realpath(path)
    mode = None
    if os.path.exists(path):
        mode = os.stat(path).st_mode & 0o777
        if not os.path.isfile(path):
            write_all(path, data)
            return
    directory, name = os.path.split(path)
    temporary = os.path.join(directory, f".{name[:200]}.{secrets.token_hex(6)}")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = os.open(temporary, flags, 0o644)
        try:
            if mode is not None:
                os.fchmod(fd, mode)
        except OSError:
            pass  # of a file system without modes
        write_and_close(fd, data)
        os.replace(temporary, path)
    except BaseException as error:
        try:
            os.unlink(temporary)
        except OSError:
            pass
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, path) from None
        raise


def write_all(path: str, data: bytes) -> None:
    """Write to what is there and no file."""
    with open(path, "wb", buffering=0) as file:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
