"""Errors in words and in JSON."""

from __future__ import annotations

import errno
import os

import pytest

from snapfs import errors
from snapfs.client.documents import document, error_values, human
from snapfs.client.reasons import why
from snapfs.client.wire import RemoteError


def failed(number: int, path: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), path)


def test_a_failing_system_call_says_where_why_and_what_to_do():
    assert "/b/x: No space left on device; free some space there" == why(
        failed(errno.ENOSPC, "/b/x")
    )
    text = why(failed(errno.EROFS, "/b/x"))
    assert text.startswith("/b/x: Read-only file system; ")
    assert "choose another place" in text


def test_whoever_says_more_than_the_system_is_not_talked_over():
    assert "a write made no progress" == why(OSError(errno.EIO, "a write made no progress"))


def test_a_renamed_file_is_called_what_it_is_to_be():
    error = OSError(errno.EACCES, os.strerror(errno.EACCES), "/b/x.new", None, "/b/x")
    assert why(error).startswith("/b/x: Permission denied")


@pytest.mark.parametrize(
    ("error", "values"),
    [
        (errors.SnapshotNotFound("no s"), ("snapshot-not-found", "no s", 5)),
        (errors.UsageError("odd"), ("usage-error", "odd", 2)),
        (RemoteError("it is pinned", 1, "pinned"), ("pinned", "it is pinned", 1)),
        (failed(errno.EBUSY, "/x"), ("system-error", "/x: Device or resource busy", 1)),
        (KeyboardInterrupt(), ("interrupted", "interrupted", 130)),
        (KeyboardInterrupt("go on"), ("interrupted", "go on", 130)),
    ],
)
def test_an_error_has_a_code_that_stays(error, values):
    assert dict(zip(("code", "message", "exit_code"), values, strict=True)) == error_values(error)


def test_every_kind_of_error_has_a_code_of_its_own():
    def below(kind: type) -> list[type]:
        return [kind, *(each for child in kind.__subclasses__() for each in below(child))]

    kinds = [each for each in below(errors.SnapfsError) if each.__module__ == "snapfs.errors"]
    codes = [errors.code_of(each.__name__) for each in kinds]
    assert len(codes) == len(set(codes))
    assert errors.SYSTEM_ERROR not in codes


def test_the_wrapper_comes_first_and_names_the_command():
    assert ["output_version", "a"] == list(document("list", {"a": 1}))


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (1 << 40, "1 TiB"), (2.5e6, "2.4 MiB")]
)
def test_sizes_are_in_powers_of_1024(size, text):
    assert text == human(size)
