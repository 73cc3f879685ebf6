"""JSON into attrs classes without mercy: no unknown keys, nothing converted silently."""

from __future__ import annotations

from typing import Any

import cattrs
from cattrs.gen import make_dict_structure_fn


def _strict(value: Any, kind: type) -> Any:
    """JSON has ints, strings and booleans."""
    if type(value) is not kind:
        raise ValueError(f"{value!r} is not of type {kind.__name__}")
    return value


def register(converter: cattrs.Converter, *classes: type) -> None:
    """Let a converter read these classes; those that others contain come first."""
    for kind in classes:
        converter.register_structure_hook(kind, make_dict_structure_fn(kind, converter))


def make_converter(*classes: type) -> cattrs.Converter:
    """A converter that reads these classes, and those that are registered later."""
    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind in (int, str, bool):
        converter.register_structure_hook(kind, _strict)
    register(converter, *classes)
    return converter


def reasons(error: Exception) -> list[str]:
    """What is wrong with the value, with the place where that is known."""
    if isinstance(error, cattrs.BaseValidationError):
        return cattrs.transform_error(error)
    return [str(error)]
