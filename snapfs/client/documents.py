"""What programs read of us: JSON documents, and errors in them; and sizes as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import SYSTEM_ERROR, ExitCode, SnapfsError, code_of
from .reasons import why

VERSION = (1, 0)  # major: something has gone or means something else; minor: something was added


def document(command: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values in the wrapper that names the command and its version."""
    major, minor = VERSION
    version = {"command": command, "vers_major": major, "vers_minor": minor}
    return {"output_version": version, **values}


def exit_status(error: BaseException) -> int:
    """The exit status that an error stands for."""
    told: int | None = getattr(error, "exit_status", None)  # of a RemoteError
    if told is not None:
        return told
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    return error.exit_code if isinstance(error, SnapfsError) else ExitCode.ERROR


def error_values(error: BaseException) -> dict[str, Any]:
    """What JSON tells of an error: code, message and exit_code."""
    return {
        "code": getattr(error, "code", None) or _code(error),
        "message": why(error) if isinstance(error, OSError) else str(error) or "interrupted",
        "exit_code": int(exit_status(error)),
    }


def _code(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return SYSTEM_ERROR if isinstance(error, OSError) else code_of(type(error).__name__)


def human(size: float) -> str:
    """A size as fstrim prints it: 1 GiB, 1.5 MiB, 512 B."""
    value, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        del units[0]
    return f"{value:.1f}".removesuffix(".0") + f" {units[0]}"
