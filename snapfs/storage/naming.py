"""Errors that say which file they are about."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def naming(path: str | os.PathLike[str], parent: int | None = None) -> Iterator[None]:
    """Have an OSError carry the whole path: "no space left" alone helps nobody.

    `parent`: the descriptor of the directory that `path` is relative to.  One that names
    another file keeps that.
    """
    try:
        yield
    except OSError as error:
        if error.filename in (None, path):
            error.filename = os.path.join(_directory(parent), path)
        raise


def _directory(fd: int | None) -> str:
    if fd is None:
        return ""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""
