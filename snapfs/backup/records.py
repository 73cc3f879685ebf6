"""Small JSON files that must be right: validated when read, replaced durably."""

from __future__ import annotations

import errno
import json
import os
from typing import Any, TypeVar

import cattrs

from .. import strictjson
from ..errors import BackupError
from ..storage.naming import naming
from ..storage.smallfiles import write_and_close
from ..strictjson import make_converter, reasons

T = TypeVar("T")


def replace_durably(path: str, data: bytes) -> None:
    """Replace a file by another content: after a crash it has the old one or the new one."""
    beside = f"{path}.new"
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with naming(path):
        write_and_close(fd, data)
    os.rename(beside, path)
    sync_directory(os.path.dirname(path))


def sync_directory(path: str) -> None:
    """Make the names in a directory durable, as far as its file system has that."""
    fd = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:  # some SMB and FUSE file systems can sync files only
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF):
            error.filename = path
            raise
    finally:
        os.close(fd)


def sync_file(path: str) -> None:
    """Make the content of a file durable, whoever wrote it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with naming(path):
            os.fsync(fd)
    finally:
        os.close(fd)


def remove(path: str) -> None:
    """Remove a file if it is there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def structure(data: bytes, kind: type[T], where: str, version: int) -> T:
    """The object that a file says; raises BackupError that names `where` and what is wrong."""
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BackupError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict) or value.get("version") != version:
        raise BackupError(f"{where} is not of version {version}, which this snapfs reads")
    try:
        return _converter.structure(value, kind)
    except (cattrs.BaseValidationError, ValueError, TypeError) as error:
        raise BackupError(f"{where} is damaged: {'; '.join(reasons(error))}") from None


def unstructure(value: Any) -> bytes:
    """The object as it is stored."""
    return json.dumps(_converter.unstructure(value), indent=1).encode() + b"\n"


_converter = make_converter()


def register(*classes: type) -> None:
    """Have the attrs classes read strictly: no unknown keys, no converted values."""
    strictjson.register(_converter, *classes)
